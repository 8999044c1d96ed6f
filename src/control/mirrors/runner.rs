//! Carrying orders out: one after the other, oldest first, step by step.

use std::sync::Arc;
use std::time::Duration;

use super::{Generation, Mirrors};
use crate::clock;
use crate::export::Export;
use crate::fill::orders::{Order, State};
use crate::ranges::ByteRange;
use crate::units::MIB;

/// Bytes that are fetched at once, if no rate says less.
const STEP: u64 = 8 * MIB;
/// Steps in a second of an order with a rate.
const STEPS_PER_SECOND: u64 = 10;
/// After what could not be fetched, and while what was fetched is made durable.
const PAUSE: Duration = Duration::from_millis(100);

impl Mirrors {
    /// Carries orders out, for ever. One task of a worker does this.
    pub(super) async fn run_orders(self) {
        let mut changed = self.0.orders.changed();
        loop {
            changed.mark_unchanged();
            for order in self.0.orders.active() {
                self.advance(&order).await;
            }
            if self.0.orders.active().is_empty() {
                // The sender lives as long as the table.
                let _ = changed.changed().await;
            } else {
                tokio::time::sleep(PAUSE).await;
            }
        }
    }

    /// Goes through an order once.
    async fn advance(&self, order: &Arc<Order>) {
        let generation = match self.generation_of(order) {
            Ok(generation) => generation,
            Err(why) => return self.0.orders.end(order.id, State::Failed(why)).await,
        };
        let chunk = generation.mirror.chunk_size();
        let step = order.rate.map_or(STEP, |rate| (rate / STEPS_PER_SECOND / chunk * chunk).clamp(chunk, STEP));
        for piece in order.ranges.iter().flat_map(|range| range.pieces(step)) {
            if !self.is_active(order) || !self.fetch(&generation, order, piece).await {
                return;
            }
        }
        if generation.mirror.here(&order.ranges).is_all() {
            tracing::info!(order = order.id, name = order.image, "an order to prefetch is done");
            self.0.orders.end(order.id, State::Done).await;
        }
    }

    fn is_active(&self, order: &Order) -> bool {
        self.0.orders.get(order.id).is_some_and(|order| order.state == State::Active)
    }

    /// Whether a step could be made. What has come since the last time costs nothing.
    async fn fetch(&self, generation: &Generation, order: &Order, piece: ByteRange) -> bool {
        let here = generation.mirror.here(&[piece]);
        if here.is_all() {
            return true;
        }
        let began = clock::now();
        if let Err(error) = generation.mirror.cache(piece).await {
            tracing::debug!(order = order.id, %error, "cannot prefetch now");
            return false;
        }
        if let Some(rate) = order.rate {
            let time = Duration::from_nanos((here.total - here.done()).saturating_mul(1_000_000_000) / rate);
            while began.elapsed() < time && self.is_active(order) {
                tokio::time::sleep(PAUSE.min(time.saturating_sub(began.elapsed()))).await;
            }
        }
        true
    }
}
