//! Waking up at a given time.
//!
//! Tokio's timers have a resolution of one millisecond and are up to one late. Where a read of a resident image takes
//! 0.1 ms that would be most of what is measured, so this asks the kernel (`timerfd_create(2)`).

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::Context;
use headwater::clock;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;

/// A timer of the kernel.
#[derive(Debug)]
pub struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    /// A new timer, in a runtime with I/O.
    #[expect(deprecated, reason = "the newer function is unsafe; an OwnedFd has one number until it is dropped")]
    pub fn new() -> anyhow::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).context("a timer")?;
        Ok(Self(AsyncFd::new(timer)?))
    }

    /// Waits until `when`; not at all if that is past.
    ///
    /// *Cancel safety*: may be dropped and asked again, for another time too.
    pub async fn until(&mut self, when: Instant) -> anyhow::Result<()> {
        let left = when.saturating_duration_since(clock::now());
        if left.is_zero() {
            return Ok(());
        }
        let once = Itimerspec { it_interval: Timespec::default(), it_value: timespec(left)? };
        // This also forgets an expiry that nobody has read.
        rustix::time::timerfd_settime(self.0.get_ref(), TimerfdTimerFlags::empty(), &once)?;
        loop {
            let mut guard = self.0.readable().await?;
            let mut count = [0; 8];
            match guard.try_io(|timer| Ok(rustix::io::read(timer.get_ref(), &mut count)?)) {
                Ok(read) => return Ok(read.map(drop)?),
                Err(_not_yet) => {}
            }
        }
    }
}

fn timespec(left: Duration) -> anyhow::Result<Timespec> {
    Ok(Timespec { tv_sec: left.as_secs().try_into()?, tv_nsec: left.subsec_nanos().into() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_never_rings_early_and_can_be_set_again() {
        let mut alarm = Alarm::new().unwrap();
        let start = clock::now();
        for step in [0, 300, 200, 2500] {
            let when = start + Duration::from_micros(step);
            alarm.until(when).await.unwrap();
            assert!(clock::now() >= when);
        }
        // One that is given up, after which a sooner one counts.
        tokio::select! {
            biased;
            _ = alarm.until(start + Duration::from_secs(3600)) => panic!("an hour has not passed"),
            () = tokio::task::yield_now() => {}
        }
        alarm.until(clock::now() + Duration::from_micros(100)).await.unwrap();
    }
}
