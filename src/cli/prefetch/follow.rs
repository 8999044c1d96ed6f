//! Waiting for orders, and showing how they get on.

use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::signal::unix::Signal;

use crate::cli::long_work::is_seen;
use crate::cli::table::printable;
use crate::control::Client;
use crate::control::status::{OrderState, OrderStatus};

/// How often orders are looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Times that a server may not answer, one after the other, before nobody waits for it any more: it may be restarted.
const SILENCES: u32 = 150;

/// An order that was given.
#[derive(Debug)]
pub(super) struct Given {
    pub(super) client: Client,
    pub(super) id: u64,
    pub(super) status: OrderStatus,
}

/// How waiting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// No order is active.
    Ended,
    /// Somebody did not want to wait any longer.
    Interrupted,
}

/// Waits until all orders have ended, with a bar for each. Each has its last status then.
pub(super) async fn wait(orders: &mut [Given], interrupt: &mut Signal) -> anyhow::Result<End> {
    let bars = bars(orders)?;
    let mut silences = 0;
    let end = loop {
        for (order, bar) in orders.iter().zip(&bars) {
            show(bar, &order.status);
        }
        if orders.iter().all(|order| order.status.state != OrderState::Active) {
            break End::Ended;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = interrupt.recv() => break End::Interrupted,
        }
        match look(orders).await {
            Ok(()) => silences = 0,
            Err(error) if silences >= SILENCES || !error.may_pass() => return Err(error.into()),
            Err(_) => silences += 1,
        }
    };
    bars.iter().for_each(ProgressBar::finish_and_clear);
    Ok(end)
}

/// Asks for the status of all that are active.
pub(super) async fn look(orders: &mut [Given]) -> Result<(), crate::control::CallError> {
    for order in orders.iter_mut().filter(|order| order.status.state == OrderState::Active) {
        order.status = order.client.prefetched(order.id).await?;
    }
    Ok(())
}

fn bars(orders: &[Given]) -> anyhow::Result<Vec<ProgressBar>> {
    if !is_seen() {
        return Ok(orders.iter().map(|_| ProgressBar::hidden()).collect());
    }
    let form = "{prefix} {wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    let style = ProgressStyle::with_template(form)?;
    let all = MultiProgress::new();
    let bar = |order: &Given| {
        let bar = all.add(ProgressBar::new(order.status.total_bytes).with_style(style.clone()));
        bar.set_prefix(printable(&order.status.image));
        // What is here already did not come in the time that is measured.
        bar.set_position(order.status.here_bytes);
        bar.reset_eta();
        bar
    };
    Ok(orders.iter().map(bar).collect())
}

fn show(bar: &ProgressBar, status: &OrderStatus) {
    bar.set_position(status.here_bytes);
    if status.state != OrderState::Active && !bar.is_finished() {
        bar.abandon();
    }
}
