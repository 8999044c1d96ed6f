//! The one place that asks the operating system for the time.
//!
//! Owns: monotonic time, and the time of day where a person has named one (a deadline at 09:00). Does not own: timers
//! (tokio's). Policy code takes the time as an argument and never calls this itself.

use std::time::{Instant, SystemTime};

/// The monotonic clock, now.
#[expect(clippy::disallowed_methods, reason = "this is the place")]
pub fn now() -> Instant {
    Instant::now()
}

/// Both clocks at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// The monotonic clock.
    pub steady: Instant,
    /// The time of day, which somebody may set back or forward.
    pub wall: SystemTime,
}

/// Both clocks, now. For what a person's clock is meant in; all else uses [`now`].
#[expect(clippy::disallowed_methods, reason = "this is the place")]
pub fn moment() -> Moment {
    Moment { steady: Instant::now(), wall: SystemTime::now() }
}
