//! The one place that asks the operating system for the time.
//!
//! Owns: monotonic time. Does not own: timers (tokio's) and wall-clock time, on which nothing here depends.
//! Policy code takes `now` as an argument and never calls this itself.

use std::time::Instant;

/// The monotonic clock, now.
#[expect(clippy::disallowed_methods, reason = "this is the place")]
pub fn now() -> Instant {
    Instant::now()
}
