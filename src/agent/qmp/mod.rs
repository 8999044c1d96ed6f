//! The disks of a virtual machine of qemu, moved to another server by its monitor.
//!
//! | file | holds |
//! | --- | --- |
//! | `message` | what a monitor sends: lines, replies, events |
//! | `monitor` | a client of a monitor |
//! | `address` | servers as qemu writes them |
//! | `graph` | the block nodes of a machine, and who holds them |
//! | `compare` | whether a server can take the place of another one |
//! | `redirect` | the move: in which order, and how it is taken back |
//!
//! Owns: everything that is said to a monitor. Does not own: the servers, and how a report is shown.

mod address;
pub mod compare;
mod graph;
pub mod message;
mod monitor;
mod redirect;

pub use monitor::MonitorError;
pub use redirect::{Order, Outcome, RedirectError, Report, State, Way, redirect};
