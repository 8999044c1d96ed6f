//! `headwater prefetch`.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | ordering, and saying what comes of it |
//! | `args` | what it is told |
//! | `when` | times as people write them |
//! | `file` | many orders in a file |
//! | `deploy` | `--to`: mirrors that fetch from each other |
//! | `follow` | waiting, with progress bars |

pub(super) mod args;
mod deploy;
mod file;
mod follow;
pub(super) mod when;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use jiff::Zoned;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::output;
use super::running::{block_on, find_image, ranges, reach};
use super::status::{ago, percent, short_name, size};
use super::table::{Table, printable};
use crate::control::Client;
use crate::control::status::{Late, OrderState, OrderStatus, PrefetchOrder, PrefetchReport};
use args::Prefetch;
use follow::{End, Given};

/// An order will be late, or was.
const LATE: u8 = 3;
/// An order that was waited for was called off.
const CANCELLED: u8 = 4;
/// Nobody waits any more, and the order goes on.
const LEFT: u8 = 5;

/// How long a server is asked how fast its link is before that counts as unknown.
const FORECAST_PATIENCE: Duration = Duration::from_secs(3);
/// How often.
const FORECAST_LOOK: Duration = Duration::from_millis(100);

pub(super) fn run(arguments: Prefetch) -> anyhow::Result<ExitCode> {
    block_on(async {
        match (arguments.list, arguments.cancel, &arguments.from) {
            (true, _, _) => list(arguments).await,
            (_, Some(id), _) => cancel(arguments, id).await,
            (_, _, Some(path)) => {
                let orders = file::read(path)?;
                prefetch(orders, &arguments).await
            }
            _ => prefetch(vec![arguments.clone()], &arguments).await,
        }
    })
}

async fn list(arguments: Prefetch) -> anyhow::Result<ExitCode> {
    let list = reach(arguments.server).await?.prefetches().await?;
    output::print(&match (arguments.json, list.orders.is_empty()) {
        (true, _) => format!("{}\n", serde_json::to_string_pretty(&list)?),
        (false, true) => "no orders\n".to_owned(),
        (false, false) => table(&list.orders).to_string(),
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn cancel(arguments: Prefetch, id: u64) -> anyhow::Result<ExitCode> {
    let client = reach(arguments.server).await?;
    let status = client.cancel_prefetch(id).await?;
    output::print(&if arguments.json {
        format!("{}\n", serde_json::to_string_pretty(&status)?)
    } else {
        outcome(&status)
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What one server is told.
struct Wanted {
    client: Client,
    image: String,
    order: PrefetchOrder,
    wait: bool,
}

/// What came of it.
struct Taken {
    given: Given,
    report: PrefetchReport,
    wait: bool,
}

/// Gives all orders, and waits for those that are to be waited for.
async fn prefetch(orders: Vec<Prefetch>, whole: &Prefetch) -> anyhow::Result<ExitCode> {
    // Before there is anything that it could be mistaken about.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut wanted = Vec::new();
    for mut order in orders {
        order.wait |= whole.wait;
        order.server.at = order.server.at.or_else(|| whole.server.at.clone());
        order.server.token.file = order.server.token.file.or_else(|| whole.server.token.file.clone());
        wanted.extend(resolve(order).await?);
    }
    let is_one = wanted.len() == 1 && whole.from.is_none() && whole.to.is_empty();
    let (mut taken, mut refused) = (Vec::new(), 0);
    for wanted in wanted {
        match give(wanted).await {
            Ok(order) => taken.push(order),
            Err(error) if is_one => return Err(error),
            Err(error) => {
                output::complain(&error);
                refused += 1;
            }
        }
    }
    settle_forecasts(&mut taken).await?;
    if !whole.json {
        for order in &taken {
            output::print(&describe(order))?;
        }
    }
    let (mut followed, left): (Vec<_>, Vec<_>) = taken.into_iter().partition(|order| order.wait);
    let mut givens: Vec<_> = followed.iter().map(|order| clone(&order.given)).collect();
    let end = if givens.is_empty() { End::Ended } else { follow::wait(&mut givens, &mut interrupt).await? };
    for (order, given) in followed.iter_mut().zip(givens) {
        order.given = given;
    }
    if whole.json {
        let all: Vec<_> = followed.iter().chain(&left).map(as_json).collect::<anyhow::Result<_>>()?;
        let text = if is_one { serde_json::to_string_pretty(&all[0])? } else { serde_json::to_string_pretty(&all)? };
        output::print(&format!("{text}\n"))?;
    } else {
        for order in &followed {
            output::print(&outcome(&order.given.status))?;
        }
    }
    Ok(exit_code(&followed, &left, end, refused))
}

fn clone(given: &Given) -> Given {
    Given { client: given.client.clone(), id: given.id, status: given.status.clone() }
}

/// What an order means, and whom it is for. Looks at the servers, and orders nothing.
async fn resolve(order: Prefetch) -> anyhow::Result<Vec<Wanted>> {
    let image = order.image.clone().context("the image is missing")?;
    let deadline = match order.by {
        Some(when) => Some(when.after(&Zoned::now())?.as_duration().as_secs_f64()),
        None => None,
    };
    let spec = PrefetchOrder {
        ranges: None,
        profile: order.profile.clone(),
        all: order.range.is_empty() && order.profile.is_none(),
        rate: order.rate,
        deadline,
        deadline_seconds: order.within.map(|time| time.as_secs_f64()),
        strategy: order.strategy.map(|strategy| strategy.to_string()),
        source: Vec::new(),
    };
    let wait = order.wait;
    if order.to.is_empty() {
        let client = reach(order.server).await?;
        // Says which images there are if this is none of them.
        let found = find_image(&client, &image).await?;
        let ranges = ranges(&order.range, found.size)?;
        return Ok(vec![Wanted { client, image, order: PrefetchOrder { ranges, ..spec }, wait }]);
    }
    let members = deploy::plan(&image, &order.to, order.shape, &order.server.token).await?;
    let mut wanted = Vec::new();
    for member in members {
        let ranges = ranges(&order.range, member.size)?;
        let order = PrefetchOrder { ranges, source: member.source, ..spec.clone() };
        wanted.push(Wanted { client: member.client, image: member.image, order, wait });
    }
    Ok(wanted)
}

async fn give(wanted: Wanted) -> anyhow::Result<Taken> {
    let Wanted { client, image, order, wait } = wanted;
    let report = client.prefetch(&image, &order).await.with_context(|| format!("{image:?} at {}", client.address()))?;
    let status = client.prefetched(report.order).await?;
    Ok(Taken { given: Given { client, id: report.order, status }, report, wait })
}

/// Asks again for a moment where it is not known yet whether a deadline can be met.
async fn settle_forecasts(taken: &mut [Taken]) -> anyhow::Result<()> {
    let is_open = |order: &Taken| {
        let OrderStatus { state, deadline, .. } = &order.given.status;
        *state == OrderState::Active && deadline.is_some() && order.report.expected_end_seconds.is_none()
    };
    let asking = async {
        while taken.iter().any(is_open) {
            tokio::time::sleep(FORECAST_LOOK).await;
            for order in taken.iter_mut().filter(|order| is_open(order)) {
                order.given.status = order.given.client.prefetched(order.given.id).await?;
                let expected = order.given.status.expected_end_seconds;
                if expected.is_some() {
                    order.report.expected_end_seconds = expected;
                    order.report.late = late(&order.given.client).await?;
                }
            }
        }
        anyhow::Ok(())
    };
    // Unknown, if it takes longer.
    tokio::time::timeout(FORECAST_PATIENCE, asking).await.unwrap_or(Ok(()))
}

/// The orders of a server that are expected to miss their deadlines.
async fn late(client: &Client) -> anyhow::Result<Vec<Late>> {
    let orders = client.prefetches().await?.orders.into_iter();
    let active = orders.filter(|order| order.state == OrderState::Active);
    let late = |order: OrderStatus| {
        let by_seconds = order.late_by_seconds?;
        Some(Late { order: order.order, image: order.image, by_seconds })
    };
    Ok(active.filter_map(late).collect())
}

fn as_json(order: &Taken) -> anyhow::Result<serde_json::Value> {
    let server = order.given.client.address().to_string();
    let mut value =
        if order.wait { serde_json::to_value(&order.given.status)? } else { serde_json::to_value(&order.report)? };
    value["server"] = json!(server);
    Ok(value)
}

/// What is said when an order has been taken.
fn describe(order: &Taken) -> String {
    let (report, status) = (&order.report, &order.given.status);
    let (total, missing) = (report.total_bytes, report.total_bytes.saturating_sub(report.here_bytes));
    let image = printable(&status.image);
    let mut text = format!("order {}: {image}, {} of {} to fetch", report.order, size(missing), size(total));
    if let Some(seconds) = report.expected_end_seconds {
        text.push_str(&format!(", expected in {}", ago(seconds)));
    }
    if let Some(deadline) = status.deadline {
        text.push_str(&format!(", wanted by {}", when::shown(deadline)));
    }
    text.push('\n');
    let is_unknown = status.deadline.is_some() && report.expected_end_seconds.is_none();
    if is_unknown && status.state == OrderState::Active {
        text.push_str(
            "  whether that can be met is not known yet: nothing has come that would show how fast the link is\n",
        );
    }
    for late in &report.late {
        text.push_str(&format!(
            "  LATE: order {} ({}) is expected {} after its deadline\n",
            late.order,
            printable(&late.image),
            ago(late.by_seconds)
        ));
    }
    text
}

/// What is said when an order is not waited for any more.
fn outcome(status: &OrderStatus) -> String {
    let OrderStatus { order, total_bytes, here_bytes, .. } = status;
    let image = printable(&status.image);
    let here = format!("{} of {} here", size(*here_bytes), size(*total_bytes));
    match status.state {
        OrderState::Active => {
            format!("order {order}: {image} goes on without us, {here}: headwater prefetch --list shows it\n")
        }
        OrderState::Done => match status.late_by_seconds {
            Some(seconds) => format!("order {order}: {image} is here, {} late\n", ago(seconds)),
            None => format!("order {order}: {image} is here\n"),
        },
        OrderState::Cancelled => format!("order {order}: {image} was called off, {here}\n"),
        OrderState::Failed => {
            format!(
                "order {order}: {image} failed, {here}: {}\n",
                printable(status.error.as_deref().unwrap_or("unknown"))
            )
        }
    }
}

fn exit_code(followed: &[Taken], left: &[Taken], end: End, refused: usize) -> ExitCode {
    let any = |state| followed.iter().any(|order| order.given.status.state == state);
    let was_late = followed.iter().any(|order| order.given.status.late_by_seconds.is_some());
    let will_be_late = left.iter().any(|order| !order.report.late.is_empty());
    match () {
        () if refused > 0 || any(OrderState::Failed) => ExitCode::FAILURE,
        () if end == End::Interrupted => LEFT.into(),
        () if any(OrderState::Cancelled) => CANCELLED.into(),
        () if was_late || will_be_late => LATE.into(),
        () => ExitCode::SUCCESS,
    }
}

/// Orders in columns.
pub(super) fn table(orders: &[OrderStatus]) -> Table {
    let headings = ["ORDER", "IMAGE", "WHAT", "STATE", ">HERE", ">OF", ">RATE", "WANTED BY", "EXPECTED"];
    let mut table = Table::new(&headings);
    for order in orders {
        table.row(vec![
            order.order.to_string(),
            short_name(&order.image),
            order.what.clone(),
            state(order),
            percent(order.here_bytes, order.total_bytes),
            size(order.total_bytes),
            order.rate.map_or_else(|| "-".to_owned(), |rate| format!("{}/s", size(rate))),
            order.deadline.map_or_else(|| "-".to_owned(), when::shown),
            expected(order),
        ]);
    }
    table
}

fn state(order: &OrderStatus) -> String {
    match (order.state, &order.error) {
        (OrderState::Active, _) if order.held => "held: a cast brings it".to_owned(),
        (OrderState::Active, _) => "active".to_owned(),
        (OrderState::Done, _) => "done".to_owned(),
        (OrderState::Cancelled, _) => "cancelled".to_owned(),
        (OrderState::Failed, error) => format!("failed: {}", error.as_deref().unwrap_or("unknown")),
    }
}

fn expected(order: &OrderStatus) -> String {
    match (order.expected_end_seconds, order.late_by_seconds) {
        (Some(end), Some(late)) => format!("in {}, {} LATE", ago(end), ago(late)),
        (Some(end), None) => format!("in {}", ago(end)),
        (None, Some(late)) => format!("{} late", ago(late)),
        (None, None) => "-".to_owned(),
    }
}
