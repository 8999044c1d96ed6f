//! How much may be in flight.
//!
//! Each connection has [`GUARANTEED`] bytes of its own and always gets one request through, however large. What it
//! wants beyond that comes from a budget that all connections share and that nobody waits for: a connection that gets
//! nothing from it goes on with what it has. So clients that stop reading, or never send the payload they announced,
//! can use up the shared budget and still stall nobody but themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that each connection may have in flight whatever the others do.
pub(super) const GUARANTEED: usize = 2 << 20;
/// Bytes that one connection may have in flight at most, apart from its one request that always goes through.
pub(super) const PER_CONNECTION: usize = 64 << 20;
/// Requests that one connection may have in flight. The kernel sends 128, nbdcopy 64, qemu 16.
pub(super) const REQUESTS: usize = 512;

/// Bytes that all connections share.
#[derive(Debug)]
pub(super) struct SharedBudget {
    left: AtomicUsize,
}

impl SharedBudget {
    pub(super) const fn new(bytes: usize) -> Self {
        Self { left: AtomicUsize::new(bytes) }
    }

    fn try_take(&self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn give_back(&self, bytes: usize) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// What one connection has of the shared budget.
#[derive(Debug)]
pub(super) struct ConnectionBudget {
    shared: Arc<SharedBudget>,
    taken: usize,
}

impl ConnectionBudget {
    pub(super) const fn new(shared: Arc<SharedBudget>) -> Self {
        Self { shared, taken: 0 }
    }

    /// Whether something that costs `cost` bytes may be added to `used` bytes.
    pub(super) fn admit(&mut self, used: usize, cost: usize) -> bool {
        let total = used + cost;
        let beyond = total.saturating_sub(GUARANTEED + self.taken);
        if used == 0 || beyond == 0 {
            return true;
        }
        if total > PER_CONNECTION || !self.shared.try_take(beyond) {
            return false;
        }
        self.taken += beyond;
        true
    }

    /// Gives back what `used` bytes do not need.
    pub(super) fn settle(&mut self, used: usize) {
        let needed = used.saturating_sub(GUARANTEED);
        if self.taken > needed {
            self.shared.give_back(self.taken - needed);
            self.taken = needed;
        }
    }
}

impl Drop for ConnectionBudget {
    fn drop(&mut self) {
        self.shared.give_back(self.taken);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn what_is_guaranteed_needs_no_shared_budget() {
        let mut connection = ConnectionBudget::new(Arc::new(SharedBudget::new(0)));
        assert!(connection.admit(0, 32 * MIB), "one request always goes through");
        assert!(connection.admit(MIB, MIB));
        assert!(!connection.admit(MIB, MIB + 1));
    }

    #[test]
    fn the_shared_budget_is_taken_and_given_back() {
        let shared = Arc::new(SharedBudget::new(10 * MIB));
        let mut greedy = ConnectionBudget::new(Arc::clone(&shared));
        let mut modest = ConnectionBudget::new(Arc::clone(&shared));
        assert!(greedy.admit(2 * MIB, 10 * MIB));
        assert!(!greedy.admit(12 * MIB, 1));
        assert!(!modest.admit(2 * MIB, 1));
        assert!(modest.admit(MIB, MIB), "nobody takes what is guaranteed");
        greedy.settle(3 * MIB);
        assert!(modest.admit(2 * MIB, 9 * MIB));
        drop(greedy);
        drop(modest);
        assert_eq!(shared.left.load(Ordering::Relaxed), 10 * MIB);
    }

    #[test]
    fn one_connection_cannot_have_it_all() {
        let shared = Arc::new(SharedBudget::new(usize::MAX / 2));
        let mut connection = ConnectionBudget::new(shared);
        assert!(connection.admit(MIB, PER_CONNECTION - MIB));
        assert!(!connection.admit(PER_CONNECTION, 1));
    }
}
