//! Repeats the reads of a recorded boot, and says how long the machine had to wait for its disk.
//!
//! | module | owns |
//! | --- | --- |
//! | [`trace`] | the recording |
//! | [`pace`] | when a read is due |
//! | [`stall`] | how long was waited in all |
//! | [`alarm`] | waking up at a given time, to some microseconds |

pub mod alarm;
pub mod pace;
pub mod stall;
pub mod trace;
