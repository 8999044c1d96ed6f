//! Asking servers again and again, and giving orders, beside whatever else is done.
//!
//! Owns: how often, and how long anybody is waited for. Does not own: what is made of the answers (`state`).

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use tokio::time::MissedTickBehavior;

use super::dialog::{Order, What};
use super::rows::Seen;
use super::state::{Answer, Message};
use crate::control::status::{DrainStatus, RedirectOrder, RedirectState, RedirectStatus};
use crate::control::{CallError, Client};

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// What takes a look at every chunk is asked for each so many times.
const STATUS_EACH: u32 = 5;
/// Rates are about so many seconds.
pub(super) const SECONDS: u32 = 5;
/// How often it is looked how far an order has come, and how many times.
const LOOK: Duration = Duration::from_millis(200);
const LOOKS: u32 = 300;

/// What happens beside drawing.
#[derive(Debug)]
pub(super) enum Event {
    /// A server, by its place, has answered.
    Answer(usize, Answer),
    /// Something came of an order.
    Told(Message),
}

/// Asks a server each `interval`, and at once when it is nudged. Ends when nobody listens.
pub(super) async fn watch(
    server: usize,
    client: Client,
    interval: Duration,
    nudge: Rc<Notify>,
    events: Sender<Event>,
) {
    let mut ticks = tokio::time::interval(interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut until_status = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = nudge.notified() => until_status = 0,
        }
        let wants_status = until_status == 0;
        let answer = match tokio::time::timeout(PATIENCE, ask(&client, wants_status)).await {
            Ok(Ok(seen)) => {
                until_status = if wants_status { STATUS_EACH } else { until_status } - 1;
                Answer::Seen(Box::new(seen))
            }
            Ok(Err(error)) => {
                until_status = 0;
                Answer::Silent(format!("{:#}", anyhow::Error::from(error)))
            }
            Err(_) => {
                until_status = 0;
                Answer::Silent(format!("nothing within {} s", PATIENCE.as_secs()))
            }
        };
        if events.send(Event::Answer(server, answer)).await.is_err() {
            return;
        }
    }
}

async fn ask(client: &Client, wants_status: bool) -> Result<Seen, CallError> {
    let status = if wants_status { Some(client.status().await?.1) } else { None };
    Ok(Seen { load: client.load(SECONDS).await?, drain: client.draining().await?, status })
}

/// Gives an order, and tells what came of it, as long as somebody listens.
pub(super) async fn carry_out(client: Client, order: Order, nudge: Rc<Notify>, events: Sender<Event>) {
    let told = match order.what {
        What::Drain(export, order) => {
            let what = whole(export.as_deref());
            client.drain(export.as_deref(), &order).await.map(|status| drained(&what, &status))
        }
        What::Undrain(export) => {
            let what = whole(export.as_deref());
            client.undrain(export.as_deref()).await.map(|_| good(format!("{what} is in service again")))
        }
        What::Redirect(export, order) => redirect(&client, &export, &order, &events).await,
    };
    nudge.notify_one();
    let message = told.unwrap_or_else(|error| bad(format!("not done: {:#}", anyhow::Error::from(error))));
    // Nobody listens when the program ends; the order goes on.
    let _ = events.send(Event::Told(message)).await;
}

fn whole(export: Option<&str>) -> String {
    export.map_or_else(|| "the server".to_owned(), str::to_owned)
}

fn drained(what: &str, status: &DrainStatus) -> Message {
    let (left, orders) = (status.clients.len(), status.orders.len());
    let moving = if orders > 0 { format!(", {orders} orders move them") } else { String::new() };
    good(format!("{what} is out of service: {left} connections are left{moving}; d ends that"))
}

const fn good(text: String) -> Message {
    Message { text, is_bad: false }
}

const fn bad(text: String) -> Message {
    Message { text, is_bad: true }
}

/// Waits for the end of an order, a minute at most.
async fn redirect(
    client: &Client,
    export: &str,
    order: &RedirectOrder,
    events: &Sender<Event>,
) -> Result<Message, CallError> {
    let taken = client.redirect(export, order).await?;
    let id = taken.order;
    let warnings: String = taken.warnings.iter().map(|warning| format!("; {warning}")).collect();
    let begun = format!("order {id}: moving {} clients of {export}{warnings}", taken.clients);
    let _ = events.send(Event::Told(good(begun))).await;
    for _ in 0..LOOKS {
        let status = client.redirected(id).await?;
        if status.state != RedirectState::Active {
            return Ok(outcome(&status, &warnings));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(good(format!("order {id} goes on: headwater redirect --list shows it")))
}

/// What came of an order that has ended.
fn outcome(status: &RedirectStatus, warnings: &str) -> Message {
    let RedirectStatus { order, export, counts, .. } = status;
    let mut text = format!("order {order}: {} of {} clients of {export} moved", counts.moved, counts.total);
    for (count, word) in [(counts.stayed, "stayed"), (counts.left, "left"), (counts.failed, "failed")] {
        if count > 0 {
            text.push_str(&format!(", {count} {word}"));
        }
    }
    let unmoved = status.clients.iter().filter(|client| !matches!(client.state.name(), "moved" | "left"));
    let why = unmoved.filter_map(|client| client.why.as_deref()).next();
    for why in status.error.as_deref().into_iter().chain(why) {
        text.push_str(&format!(": {why}"));
    }
    text.push_str(warnings);
    let is_bad = status.state != RedirectState::Done || counts.stayed + counts.failed > 0;
    Message { text, is_bad }
}
