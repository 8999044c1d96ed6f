//! Which order moves which client: the last one that was given.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::export::NodeId;
use crate::server::ClientTable;

/// A client, as orders name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Subject {
    /// One connection.
    Client(u64),
    /// All connections of a mirror.
    Mirror(NodeId),
}

/// Who is moved by which order, and who is served from elsewhere. Those who have left are forgotten at the next order.
#[derive(Debug, Default)]
pub(super) struct Claims {
    inner: Mutex<Inner>,
    changed: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Inner {
    orders: HashMap<Subject, u64>,
    relayed: HashMap<u64, u64>,
}

impl Claims {
    /// From now on `order` moves them, and no other order does.
    pub(super) fn take(&self, order: u64, subjects: impl Iterator<Item = Subject>, clients: &ClientTable) {
        let connected: std::collections::HashSet<_> = clients.list().iter().map(|client| client.id).collect();
        let mut inner = self.lock();
        inner.relayed.retain(|id, _| connected.contains(id));
        inner.orders.retain(|subject, _| match subject {
            Subject::Client(id) => connected.contains(id),
            Subject::Mirror(_) => true,
        });
        inner.orders.extend(subjects.map(|subject| (subject, order)));
        drop(inner);
        self.changed.send_modify(|count| *count += 1);
    }

    /// The order has ended: it holds nobody any more.
    pub(super) fn release(&self, order: u64) {
        self.lock().orders.retain(|_, holder| *holder != order);
    }

    /// Whether another order has taken it over.
    pub(super) fn is_taken_over(&self, order: u64, subject: Subject) -> Option<u64> {
        self.lock().orders.get(&subject).copied().filter(|holder| *holder != order)
    }

    /// Waits until another order takes it over, and says which.
    pub(super) async fn taken_over(&self, order: u64, subject: Subject) -> u64 {
        let mut changed = self.changed.subscribe();
        loop {
            if let Some(other) = self.is_taken_over(order, subject) {
                return other;
            }
            if changed.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Notes that a connection is served from where `order` leads, or from here.
    pub(super) fn set_relayed(&self, client: u64, order: Option<u64>) {
        let mut inner = self.lock();
        match order {
            Some(order) => drop(inner.relayed.insert(client, order)),
            None => drop(inner.relayed.remove(&client)),
        }
    }

    /// Whether it is served from elsewhere.
    pub(super) fn is_relayed(&self, client: u64) -> bool {
        self.lock().relayed.contains_key(&client)
    }

    /// Whether it is served from where this order leads.
    pub(super) fn is_relayed_by(&self, client: u64, order: u64) -> bool {
        self.lock().relayed.get(&client) == Some(&order)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_last_order_moves_a_client() {
        let claims = Claims::default();
        let mirror = Subject::Mirror(NodeId([1; 16]));
        claims.take(1, [mirror].into_iter(), &ClientTable::default());
        assert_eq!(claims.is_taken_over(1, mirror), None);
        claims.take(2, [mirror].into_iter(), &ClientTable::default());
        assert_eq!(claims.taken_over(1, mirror).await, 2);
        claims.release(2);
        assert_eq!(claims.is_taken_over(1, mirror), None);
    }

    #[test]
    fn who_left_is_forgotten() {
        let claims = Claims::default();
        claims.set_relayed(7, Some(1));
        assert!(claims.is_relayed(7) && claims.is_relayed_by(7, 1) && !claims.is_relayed_by(7, 2));
        claims.take(2, std::iter::empty(), &ClientTable::default());
        assert!(!claims.is_relayed(7));
    }
}
