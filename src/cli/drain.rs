//! `headwater drain`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::args::RunningServer;
use super::output;
use super::redirect;
use super::running::{block_on, find_image, reach};
use super::table::{Table, printable};
use crate::control::Client;
use crate::control::status::{ClientStatus, DrainOrder, DrainStatus, RedirectState, RedirectStatus, Status};
use crate::nbd::Uri;

const EXAMPLES: &str = "\
Examples:
  headwater drain --to nbd://second
  headwater drain debian12 --to nbd://second/debian12 --close
  headwater drain --cancel

With --to, mirrors are told and leave for it. Other clients cannot be told: with --close their connections are
closed when all is answered, for clients that reconnect by themselves; without it they are waited for.

Exit status: 0 when nobody is connected any more, 1 when it was refused or has failed, 2 when the command line makes
no sense, 5 when Ctrl-C ended the waiting: newcomers are sent away all the same, until --cancel or a restart.";

/// Nobody waits any more, and the drain goes on.
const LEFT: u8 = 5;
/// How often it is looked who is left.
const LOOK: Duration = Duration::from_millis(200);
/// Clients that are named while they are waited for.
const NAMED: usize = 20;

/// Take a running server, or one of its exports, out of service.
///
/// Newcomers are sent away. With --to, all clients that can be moved are moved there. Ends when nobody is connected any
/// more.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Drain {
    /// The export. [default: all of them]
    pub(super) export: Option<String>,
    /// Where the clients go: the same image on another server. Without the name of an export, each keeps its own.
    #[arg(long, value_name = "URI", value_delimiter = ',')]
    pub(super) to: Vec<Uri>,
    /// Also when the other server does not say what it holds, or would lose something: the refusal says what.
    #[arg(long)]
    pub(super) force: bool,
    /// Close the connections of clients that cannot be told, when all is answered.
    #[arg(long)]
    pub(super) close: bool,
    /// Let newcomers in again; clients that were moved stay where they are.
    #[arg(long, conflicts_with_all = ["to", "force", "close"])]
    pub(super) cancel: bool,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

pub(super) fn run(arguments: Drain) -> anyhow::Result<ExitCode> {
    block_on(async {
        // Before there is anything that it could be mistaken about.
        let mut interrupt = signal(SignalKind::interrupt())?;
        let client = reach(arguments.server.clone()).await?;
        let export = arguments.export.as_deref();
        if let Some(name) = export {
            // Says which there are if this is none of them.
            find_image(&client, name).await?;
        }
        if arguments.cancel {
            return cancel(&client, &arguments).await;
        }
        let to = arguments.to.iter().map(ToString::to_string).collect();
        let order = DrainOrder { to, force: arguments.force, close: arguments.close };
        let mut status = client.drain(export, &order).await?;
        let mut told = None;
        let is_left = loop {
            let clients = of(&client, &status, export).await?;
            if clients.is_empty() && !is_moving(&client, &status).await? {
                break false;
            }
            let text = left_over(&client, &clients, &status).await?;
            if !arguments.json && !clients.is_empty() && told.as_ref() != Some(&text) {
                output::print(&text)?;
                told = Some(text);
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                _ = interrupt.recv() => break true,
            }
            status = client.draining().await?;
            anyhow::ensure!(status.is_draining(), "somebody has called the drain off");
        };
        finish(&client, &arguments, is_left).await
    })
}

async fn cancel(client: &Client, arguments: &Drain) -> anyhow::Result<ExitCode> {
    let status = client.undrain(arguments.export.as_deref()).await?;
    output::print(&if arguments.json {
        format!("{}\n", serde_json::to_string_pretty(&status)?)
    } else {
        "in service again\n".to_owned()
    })?;
    Ok(ExitCode::SUCCESS)
}

/// The clients that are waited for: of one export, or all.
async fn of(client: &Client, status: &DrainStatus, export: Option<&str>) -> anyhow::Result<Vec<u64>> {
    let Some(export) = export else { return Ok(status.clients.clone()) };
    let (_, Status { clients, .. }) = client.status().await?;
    let is_of = |name: &str| name.strip_prefix(export).is_some_and(|rest| rest.is_empty() || rest.starts_with('@'));
    Ok(clients.into_iter().filter(|client| is_of(&client.export)).map(|client| client.id).collect())
}

/// Whether an order of the drain is at work still: its report is not whole.
async fn is_moving(client: &Client, drain: &DrainStatus) -> anyhow::Result<bool> {
    let orders = client.redirects().await?.redirects;
    Ok(orders.iter().any(|order| drain.orders.contains(&order.order) && order.state == RedirectState::Active))
}

/// Who is left, and what becomes of them.
async fn left_over(client: &Client, ids: &[u64], drain: &DrainStatus) -> anyhow::Result<String> {
    let (_, status) = client.status().await?;
    let mut orders = client.redirects().await?.redirects;
    orders.retain(|order| drain.orders.contains(&order.order));
    let mut table = Table::new(&[">ID", "CLIENT", "EXPORT", "STATE"]);
    for left in status.clients.iter().filter(|client| ids.contains(&client.id)).take(NAMED) {
        let words = said(&orders, left).unwrap_or_else(|| "is waited for: it has to leave by itself".to_owned());
        table.row(vec![left.id.to_string(), left.peer.clone(), left.export.clone(), words]);
    }
    let more = match ids.len().saturating_sub(NAMED) {
        0 => String::new(),
        more => format!("  and {more} more\n"),
    };
    Ok(format!("{} connections are left\n{table}{more}", ids.len()))
}

/// What an order says of a connection, or of the mirror that it belongs to.
fn said(orders: &[RedirectStatus], left: &ClientStatus) -> Option<String> {
    let clients = orders.iter().rev().flat_map(|order| &order.clients);
    clients
        .into_iter()
        .find(|client| client.id == left.id || (left.mirror.is_some() && client.mirror == left.mirror))
        .map(redirect::in_words)
}

async fn finish(client: &Client, arguments: &Drain, is_left: bool) -> anyhow::Result<ExitCode> {
    let status = client.draining().await?;
    let mut orders = client.redirects().await?.redirects;
    orders.retain(|order| status.orders.contains(&order.order));
    let whole = arguments.export.as_deref().map_or_else(|| "the server".to_owned(), printable);
    output::print(&if arguments.json {
        let mut value = serde_json::to_value(&status)?;
        value["reports"] = json!(orders);
        format!("{}\n", serde_json::to_string_pretty(&value)?)
    } else if is_left {
        format!("{whole} goes on sending newcomers away: headwater drain --cancel ends that\n")
    } else {
        format!("{whole} is empty\n")
    })?;
    Ok(if is_left { LEFT.into() } else { ExitCode::SUCCESS })
}
