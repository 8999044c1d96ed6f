//! Handing orders to the engine: which image each is for, and where else its bytes can be had.

use std::sync::Arc;
use std::time::Duration;

use super::{Generation, Mirrors};
use crate::export::{Export, Facts, SharedExport};
use crate::fill::orders::{Order, State};
use crate::fill::peer::Peer;
use crate::nbd::Uri;
use crate::upstream::{self, Expectation, Remote};

/// How often it is looked whether an order's image is still the one that it is for.
const EVERY: Duration = Duration::from_secs(1);
/// How long a peer may take; the image's own upstream is asked then.
const PATIENCE: Duration = Duration::from_secs(2);

impl Mirrors {
    /// Has orders carried out, for ever. One task of a worker does this.
    pub(super) async fn run_orders(self) {
        let mut changed = self.0.orders.changed();
        let engine = self.0.engine.clone();
        self.0.orders.set_forecaster(move || engine.forecast());
        loop {
            changed.mark_unchanged();
            let active = self.0.orders.active();
            self.0.engine.retain(|id| active.iter().any(|order| order.id == id));
            for order in active {
                match self.generation_of(&order) {
                    Ok(generation) => self.hand_over(order, &generation),
                    Err(why) => self.0.orders.end(order.id, State::Failed(why)).await,
                }
            }
            self.hold_orders();
            // Whether it is news or time does not matter.
            let _ = tokio::time::timeout(EVERY, changed.changed()).await;
        }
    }

    /// Has the engine carry an order out, unless it does.
    pub(super) fn hand_over(&self, order: Arc<Order>, generation: &Generation) {
        if !self.0.engine.carries_out(order.id) {
            let source = self.source(&order, generation);
            let is_held = self.is_held(&order);
            self.0.engine.carry_out(order, Arc::clone(generation.filled.image()), source, is_held);
        }
    }

    /// The peers that an order names. They are connected to when something is asked of them.
    fn source(&self, order: &Order, generation: &Generation) -> Option<SharedExport> {
        let uris: Vec<Uri> = order.source.iter().filter_map(|uri| uri.parse().ok()).collect();
        let identity = order.identity.filter(|_| !uris.is_empty())?;
        let mut facts = Facts::read_only(generation.mirror.facts().size, "a peer");
        facts.identity = Some(identity);
        let expectation = Expectation {
            size: Some(facts.size),
            identity: Some(identity),
            not_through: Some(generation.mirror.node()),
        };
        let settings = upstream::Settings { patience: PATIENCE, ..self.named(Some(generation.mirror.node())) };
        let remote = Remote::offline(uris, facts, expectation, settings);
        Some(Arc::new(Peer::new(Arc::new(remote))))
    }
}
