//! `headwater redirect` at a running server.

use std::process::ExitCode;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{Redirect, Way as Asked};
use crate::cli::long_work;
use crate::cli::output;
use crate::cli::running::{block_on, find_image, reach};
use crate::cli::table::{Table, printable};
use crate::control::status::{ClientReport, ClientState, RedirectOrder, RedirectState, RedirectStatus, Way};
use crate::control::{CallError, Client};

/// Some clients are served as before.
const STAYED: u8 = 3;
/// An order that was waited for was called off.
const CANCELLED: u8 = 4;
/// Nobody waits any more, and the order goes on.
const LEFT: u8 = 5;

/// How often an order is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// Times that a server may not answer, one after the other, before nobody waits for it any more: it may be restarted.
const SILENCES: u32 = 300;

pub(super) fn run(arguments: Redirect) -> anyhow::Result<ExitCode> {
    block_on(async {
        match (arguments.list, arguments.cancel) {
            (true, _) => list(arguments).await,
            (_, Some(id)) => cancel(arguments, id).await,
            _ => redirect(arguments).await,
        }
    })
}

async fn list(arguments: Redirect) -> anyhow::Result<ExitCode> {
    let list = reach(arguments.server).await?.redirects().await?;
    output::print(&match (arguments.json, list.redirects.is_empty()) {
        (true, _) => format!("{}\n", serde_json::to_string_pretty(&list)?),
        (false, true) => "no orders\n".to_owned(),
        (false, false) => table(&list.redirects).to_string(),
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn cancel(arguments: Redirect, id: u64) -> anyhow::Result<ExitCode> {
    let status = reach(arguments.server).await?.cancel_redirect(id).await?;
    output::print(&if arguments.json { as_json(&status)? } else { outcome(&status) })?;
    Ok(ExitCode::SUCCESS)
}

async fn redirect(arguments: Redirect) -> anyhow::Result<ExitCode> {
    // Before there is anything that it could be mistaken about.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let export = arguments.export.clone().unwrap_or_default();
    let client = reach(arguments.server.clone()).await?;
    // Says which there are if this is none of them.
    find_image(&client, &export).await?;
    let taken = client.redirect(&export, &order(&arguments)).await?;
    for warning in &taken.warnings {
        output::complain(&anyhow::anyhow!("warning: {}", printable(warning)));
    }
    if !arguments.wait {
        output::print(&if arguments.json {
            format!("{}\n", serde_json::to_string_pretty(&taken)?)
        } else {
            format!("order {}: {} clients of {}\n", taken.order, taken.clients, printable(&export))
        })?;
        return Ok(ExitCode::SUCCESS);
    }
    let (status, is_left) = wait(&client, taken.order, &mut interrupt).await?;
    output::print(&if arguments.json { as_json(&status)? } else { outcome(&status) })?;
    Ok(exit_code(&status, is_left))
}

fn order(arguments: &Redirect) -> RedirectOrder {
    RedirectOrder {
        to: arguments.to.iter().map(ToString::to_string).collect(),
        clients: (!arguments.clients.is_empty()).then(|| arguments.clients.clone()),
        fraction: arguments.fraction,
        count: arguments.count,
        all: arguments.all,
        way: match arguments.way {
            Asked::Auto => Way::Auto,
            Asked::Notice => Way::Notice,
            Asked::Qmp => Way::Qmp,
            Asked::Kernel => Way::Kernel,
            Asked::Relay => Way::Relay,
            Asked::Close => Way::Close,
        },
        force: arguments.force,
    }
}

/// Waits until an order has ended, and tells whether somebody did not want to wait so long.
async fn wait(client: &Client, id: u64, interrupt: &mut Signal) -> anyhow::Result<(RedirectStatus, bool)> {
    let bar = long_work::bar("{prefix} {wide_bar} {pos} of {len} clients, {msg}")?;
    let mut silences = 0;
    let mut status = client.redirected(id).await?;
    let is_left = loop {
        show(&bar, &status);
        if status.state != RedirectState::Active {
            break false;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = interrupt.recv() => break true,
        }
        match client.redirected(id).await {
            Ok(next) => (status, silences) = (next, 0),
            Err(error) if silences >= SILENCES || !error.may_pass() => return Err(forgotten(error)),
            Err(_) => silences += 1,
        }
    };
    bar.finish_and_clear();
    Ok((status, is_left))
}

/// A server that was restarted, and could not write the order down, does not know it.
fn forgotten(error: CallError) -> anyhow::Error {
    anyhow::Error::from(error).context("what came of the order is not known")
}

fn show(bar: &ProgressBar, status: &RedirectStatus) {
    let counts = &status.counts;
    bar.set_prefix(printable(&status.export));
    bar.set_length(counts.total);
    bar.set_position(counts.total.saturating_sub(counts.waiting).saturating_sub(counts.moving));
    bar.set_message(format!("{} moving", counts.moving));
}

fn as_json(status: &RedirectStatus) -> anyhow::Result<String> {
    let mut value = serde_json::to_value(status)?;
    value["clients_left_out"] = json!(status.left_out());
    Ok(format!("{}\n", serde_json::to_string_pretty(&value)?))
}

/// What is said of an order that is not waited for any more.
fn outcome(status: &RedirectStatus) -> String {
    let RedirectStatus { order, counts, .. } = status;
    let export = printable(&status.export);
    let moved = format!("{} of {} clients moved", counts.moved, counts.total);
    let why = status.error.as_deref().map_or_else(String::new, |error| format!(": {}", printable(error)));
    let mut text = match status.state {
        RedirectState::Active => {
            format!("order {order}: {export} goes on without us, {moved}: headwater redirect --list shows it\n")
        }
        RedirectState::Done => format!("order {order}: {export}: {moved}{why}\n"),
        RedirectState::Cancelled => format!("order {order}: {export} was called off, {moved}\n"),
        RedirectState::Failed => format!("order {order}: {export} failed, {moved}{why}\n"),
    };
    if !status.clients.is_empty() {
        text.push_str(&clients(&status.clients).to_string());
    }
    if status.left_out() > 0 {
        text.push_str(&format!("  and {} more\n", status.left_out()));
    }
    text
}

fn clients(clients: &[ClientReport]) -> Table {
    let headings = [">ID", "CLIENT", "WAY", "STATE", ">PAUSE", ">IN FLIGHT", ">REPLAYED", ">ERRORS", "WHY"];
    let mut table = Table::new(&headings);
    for client in clients {
        table.row(vec![
            client.id.to_string(),
            client
                .mirror
                .as_ref()
                .map_or_else(|| client.peer.clone(), |node| format!("{} (mirror {:.8})", client.peer, node)),
            client.way.to_string(),
            client.state.name().to_owned(),
            client.pause_ms.map_or_else(|| "-".to_owned(), |pause| format!("{pause:.1} ms")),
            client.in_flight.to_string(),
            client.replayed.to_string(),
            client.errors.to_string(),
            client.why.clone().unwrap_or_default(),
        ]);
    }
    table
}

fn exit_code(status: &RedirectStatus, is_left: bool) -> ExitCode {
    let stayed = status.counts.stayed + status.counts.failed;
    match status.state {
        RedirectState::Active if is_left => LEFT.into(),
        RedirectState::Active | RedirectState::Failed => ExitCode::FAILURE,
        RedirectState::Cancelled => CANCELLED.into(),
        RedirectState::Done if stayed > 0 => STAYED.into(),
        RedirectState::Done => ExitCode::SUCCESS,
    }
}

/// Orders in columns.
pub(in crate::cli) fn table(orders: &[RedirectStatus]) -> Table {
    let headings = [">ORDER", "EXPORT", "TO", "WAY", "STATE", ">CLIENTS", ">MOVED", ">STAYED", ">LEFT", ">FAILED"];
    let mut table = Table::new(&headings);
    for order in orders {
        let state = match (order.state, &order.error) {
            (RedirectState::Active, _) => "active".to_owned(),
            (RedirectState::Done, None) => "done".to_owned(),
            (RedirectState::Done, Some(error)) => format!("done: {error}"),
            (RedirectState::Cancelled, _) => "cancelled".to_owned(),
            (RedirectState::Failed, error) => format!("failed: {}", error.as_deref().unwrap_or("unknown")),
        };
        let counts = &order.counts;
        table.row(vec![
            order.order.to_string(),
            order.export.clone(),
            order.to.join(","),
            order.way.to_string(),
            state,
            counts.total.to_string(),
            counts.moved.to_string(),
            counts.stayed.to_string(),
            counts.left.to_string(),
            counts.failed.to_string(),
        ]);
    }
    table
}

/// What an order says of one client, in words: for those who wait for it to leave.
pub(in crate::cli) fn in_words(client: &ClientReport) -> String {
    let why = client.why.as_deref().map_or_else(String::new, |why| format!(" ({})", printable(why)));
    match client.state {
        ClientState::Moved => format!("moved{why}"),
        state => format!("{}{why}", state.name()),
    }
}
