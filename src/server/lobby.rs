//! Connections that negotiate: how many may at a time, and who goes when there are more.
//!
//! Who has not negotiated has shown nothing: it may be a port scanner, or somebody who wants to keep others out. So no more
//! than a quarter of all connections may be such. Of more, those go that have been at it for longest, if that is a second
//! at least: an honest client is done by then.
//!
//! **Bounds.** A quarter of `--max-connections`, and as many as come within a second; each holds the longest option at
//! most (`nbd::handshake`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

/// How long everybody may negotiate.
const GRACE: Duration = Duration::from_secs(1);

/// Those who negotiate.
#[derive(Debug)]
pub(super) struct Lobby {
    limit: usize,
    inside: Arc<Mutex<Inside>>,
}

#[derive(Debug, Default)]
struct Inside {
    count: u64,
    /// Oldest first: since when, and how to send it away. Those who were sent away are none of them any more.
    guests: BTreeMap<u64, (Instant, Arc<Notify>)>,
}

/// One that negotiates, until it is dropped.
#[derive(Debug)]
pub(super) struct Guest {
    number: u64,
    leave: Arc<Notify>,
    inside: Arc<Mutex<Inside>>,
}

impl Lobby {
    /// That of a server with so many connections.
    pub(super) fn of(connections: usize) -> Self {
        Self { limit: (connections / 4).max(1), inside: Arc::default() }
    }

    /// Somebody begins to negotiate.
    pub(super) fn enter(&self, now: Instant) -> Guest {
        let leave = Arc::new(Notify::new());
        let mut inside = lock(&self.inside);
        inside.count += 1;
        let number = inside.count;
        inside.guests.insert(number, (now, Arc::clone(&leave)));
        drop(inside);
        self.make_room(now);
        Guest { number, leave, inside: Arc::clone(&self.inside) }
    }

    /// Sends those away who are too many and have had their time.
    pub(super) fn make_room(&self, now: Instant) {
        let mut inside = lock(&self.inside);
        while inside.guests.len() > self.limit
            && let Some(oldest) = inside.guests.first_entry()
            && now.saturating_duration_since(oldest.get().0) >= GRACE
        {
            oldest.remove().1.notify_one();
        }
    }
}

impl Guest {
    /// Waits until it has to go.
    ///
    /// Cancel safety: nothing is lost.
    pub(super) async fn dismissed(&self) {
        self.leave.notified().await;
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        lock(&self.inside).guests.remove(&self.number);
    }
}

fn lock(inside: &Mutex<Inside>) -> MutexGuard<'_, Inside> {
    inside.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use proptest::prelude::*;

    fn is_dismissed(guest: &Guest) -> bool {
        guest.dismissed().now_or_never().is_some()
    }

    #[test]
    fn the_oldest_go_when_there_are_too_many() {
        let start = crate::clock::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let lobby = Lobby::of(8);
        let mut guests: Vec<_> = (0..3).map(|index| lobby.enter(at(index))).collect();
        assert!(!guests.iter().any(is_dismissed), "everybody has a second");
        lobby.make_room(at(999));
        assert!(!guests.iter().any(is_dismissed));
        lobby.make_room(at(5000));
        assert_eq!(guests.iter().map(is_dismissed).collect::<Vec<_>>(), [true, false, false]);
        guests.push(lobby.enter(at(5001)));
        assert_eq!(guests.iter().map(is_dismissed).collect::<Vec<_>>(), [false, true, false, false]);
        drop(guests);
        assert!(lock(&lobby.inside).guests.is_empty());
    }

    proptest! {
        /// Nobody goes who is within the limit or has not had its second; and of the others there is none.
        #[test]
        fn there_are_never_too_many_for_long(
            connections in 1_usize..40,
            events in proptest::collection::vec((0_u64..500, proptest::option::of(0_usize..50)), 1..200),
        ) {
            let lobby = Lobby::of(connections);
            let mut now = crate::clock::now();
            let mut guests: Vec<(Instant, Guest)> = Vec::new();
            for (passed, leaves) in events {
                now += Duration::from_millis(passed);
                match leaves.filter(|index| *index < guests.len()) {
                    Some(index) => drop(guests.remove(index)),
                    None => guests.push((now, lobby.enter(now))),
                }
                lobby.make_room(now);
                guests.retain(|(since, guest)| {
                    let goes = is_dismissed(guest);
                    assert!(!goes || now - *since >= GRACE);
                    !goes
                });
                let old = guests.iter().filter(|(since, _)| now - *since >= GRACE).count();
                prop_assert!(guests.len() <= lobby.limit || old == 0, "{} of {}, {old} old", guests.len(), lobby.limit);
            }
        }
    }
}
