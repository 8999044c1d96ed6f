//! Exports over an export. Each does one thing and forwards the rest.
//!
//! They are how faults, delays and observation come into tests without any tier knowing of it.

mod fault;
mod gate;
mod record;

pub use fault::Fault;
pub use gate::Gate;
pub use record::{Record, Recorded};
