//! Waiting for the next request awake.
//!
//! A client that asks for one thing at a time sends its next request some microseconds after it got a reply. Putting
//! the worker to sleep and waking it costs more than that, on virtual machines ten times as much. So a connection
//! that has nothing to do looks for input for a short while first, letting everything else on this worker and this
//! CPU go before each look. Each time that this is in vain it does it more seldom. It is in vain, too, when input comes
//! at once: then the client runs on this very CPU, gets its turn whether we sleep or not, and would only be hurried.
//!
//! Owns: how long and how often. Does not own: what is looked at.

use std::cell::Cell;
use std::time::{Duration, Instant};

/// About what falling asleep and waking up costs where it costs most.
const AWAKE: Duration = Duration::from_micros(50);
/// Looks in vain before one that pays. A client on another CPU takes longer than so many.
const AT_ONCE: u32 = 5;
/// Once in so many times it is tried again, however often it was in vain.
const SELDOM: u32 = 1024;

thread_local! {
    /// Whether a connection of this worker waits awake. One is enough.
    static TAKEN: Cell<bool> = const { Cell::new(false) };
}

/// When one connection waits awake.
#[derive(Debug)]
pub(super) struct Spin {
    /// Chances that are left out after the next failure.
    pause: u32,
    /// Chances that are still to be left out.
    left_out: u32,
}

/// The right to wait awake, until a moment. Dropped without [`Awake::found`], it was in vain.
#[derive(Debug)]
pub(super) struct Awake<'a> {
    spin: &'a mut Spin,
    until: Instant,
    looks: u32,
}

impl Default for Spin {
    fn default() -> Self {
        Self { pause: 1, left_out: 0 }
    }
}

impl Spin {
    /// Begins to wait awake, if that is promising.
    pub(super) fn begin(&mut self, now: Instant) -> Option<Awake<'_>> {
        if self.left_out > 0 {
            self.left_out -= 1;
            return None;
        }
        if TAKEN.replace(true) {
            return None;
        }
        Some(Awake { spin: self, until: now + AWAKE, looks: 0 })
    }
}

impl Awake<'_> {
    /// Nothing was there. Says whether it has been long enough.
    pub(super) fn is_over(&mut self, now: Instant) -> bool {
        self.looks += 1;
        now >= self.until
    }

    /// Input came.
    pub(super) fn found(self) {
        if self.looks >= AT_ONCE {
            // Then no chance is left out when this is dropped, which it is here.
            self.spin.pause = 0;
        }
    }
}

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        self.spin.left_out = self.spin.pause;
        self.spin.pause = (self.spin.pause * 2).clamp(1, SELDOM);
        TAKEN.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn vain_waits_become_rare_and_paid_ones_stay() {
        let now = clock::now();
        let mut spin = Spin::default();
        let waits = |spin: &mut Spin, looks: u32| {
            let mut waits = 0;
            for _ in 0..10_000 {
                if let Some(mut awake) = spin.begin(now) {
                    waits += 1;
                    (0..looks).for_each(|_| assert!(!awake.is_over(now)));
                    if looks > 0 {
                        awake.found();
                    } else {
                        assert!(awake.is_over(now + AWAKE));
                    }
                }
            }
            waits
        };
        assert!((10..40).contains(&waits(&mut spin, 0)), "nothing came");
        assert!((5..40).contains(&waits(&mut spin, AT_ONCE - 1)), "it came at once");
        let paid = waits(&mut spin, AT_ONCE);
        assert!(paid > 8_000, "{paid} waits that paid");
    }

    #[test]
    fn one_connection_of_a_worker_waits_awake() {
        let now = clock::now();
        let (mut first, mut second) = (Spin::default(), Spin::default());
        let awake = first.begin(now).expect("nobody does");
        assert!(second.begin(now).is_none());
        drop(awake);
        assert!(second.begin(now).is_some(), "it is the other's turn");
    }
}
