//! `headwater cast`.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | ordering, and saying what comes of it |
//! | `args` | what it is told, and what mirrors are told |
//! | `follow` | waiting, with a bar and a line for each receiver |

pub(super) mod args;
mod follow;

use std::process::ExitCode;

use anyhow::Context;
use jiff::Zoned;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

use super::output;
use super::running::{block_on, find_image, ranges, reach};
use super::status::{ago, percent, short_name, size};
use super::table::{Table, printable};
use crate::control::status::{
    CastOrder, CastState, CastStatus, CastTaken, ReceiverState, ReceiverStatus, ReceptionStatus,
};
use args::Cast;
use follow::End;

/// Somebody was left to its upstream, or nobody came.
const LEFT_OUT: u8 = 3;
/// It was called off.
const CANCELLED: u8 = 4;
/// Nobody waits any more, and it goes on.
const LEFT: u8 = 5;

pub(super) fn run(arguments: Cast) -> anyhow::Result<ExitCode> {
    block_on(async {
        match (arguments.list, arguments.cancel) {
            (true, _) => list(arguments).await,
            (_, Some(id)) => cancel(arguments, id).await,
            _ => cast(arguments).await,
        }
    })
}

async fn list(arguments: Cast) -> anyhow::Result<ExitCode> {
    let list = reach(arguments.server).await?.casts().await?;
    output::print(&match (arguments.json, list.casts.is_empty()) {
        (true, _) => format!("{}\n", serde_json::to_string_pretty(&list)?),
        (false, true) => "no casts\n".to_owned(),
        (false, false) => table(&list.casts).to_string(),
    })?;
    Ok(ExitCode::SUCCESS)
}

async fn cancel(arguments: Cast, id: u64) -> anyhow::Result<ExitCode> {
    let status = reach(arguments.server.clone()).await?.cancel_cast(id).await?;
    say(&arguments, &status)?;
    Ok(ExitCode::SUCCESS)
}

async fn cast(arguments: Cast) -> anyhow::Result<ExitCode> {
    // Before there is anything that it could be mistaken about.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let image = arguments.image.clone().context("the image is missing")?;
    let client = reach(arguments.server.clone()).await?;
    // Says which images there are if this is none of them.
    let found = find_image(&client, &image).await?;
    let taken = client.cast(&image, &order(&arguments, found.size)?).await?;
    if !arguments.json {
        output::print(&describe(&image, &taken))?;
    }
    if arguments.no_wait {
        if arguments.json {
            output::print(&format!("{}\n", serde_json::to_string_pretty(&taken)?))?;
        }
        return Ok(if taken.late_by_seconds.is_some() { LEFT_OUT.into() } else { ExitCode::SUCCESS });
    }
    let (status, end) = follow::wait(&client, taken.cast, &mut interrupt).await?;
    say(&arguments, &status)?;
    Ok(exit_code(&status, end))
}

fn order(arguments: &Cast, image_size: u64) -> anyhow::Result<CastOrder> {
    let deadline = match arguments.by {
        Some(when) => Some(when.after(&Zoned::now())?.as_duration().as_secs_f64()),
        None => None,
    };
    Ok(CastOrder {
        group: arguments.group.map(|group| group.to_string()),
        interface: arguments.interface.clone(),
        ttl: Some(arguments.ttl),
        mtu: arguments.mtu,
        ranges: ranges(&arguments.range, image_size)?,
        profile: arguments.profile.clone(),
        all: arguments.all,
        rate: arguments.rate,
        min_rate: arguments.min_rate,
        repair_percent: arguments.repair.0,
        wait_for: arguments.wait_for,
        patience_seconds: arguments.patience.map(|patience| patience.as_secs_f64()),
        carousel: arguments.carousel,
        deadline,
        deadline_seconds: arguments.within.map(|time| time.as_secs_f64()),
        no_tell: arguments.no_tell,
    })
}

fn say(arguments: &Cast, status: &CastStatus) -> anyhow::Result<()> {
    if !arguments.json {
        return output::print(&outcome(status));
    }
    let mut value = serde_json::to_value(status)?;
    value["complete"] = json!(status.is_complete());
    output::print(&format!("{}\n", serde_json::to_string_pretty(&value)?))
}

/// What is said when it has begun.
fn describe(image: &str, taken: &CastTaken) -> String {
    let CastTaken { cast, group, total_bytes, wait_for, rate, late_by_seconds, .. } = taken;
    let (image, group) = (printable(image), printable(group));
    let mut text = format!("cast {cast}: {image}, {} to {group}, {} a second at most", size(*total_bytes), size(*rate));
    match wait_for {
        0 => text.push('\n'),
        1 => text.push_str(", waiting for a receiver\n"),
        count => text.push_str(&format!(", waiting for {count} receivers\n")),
    }
    if let Some(late) = late_by_seconds {
        text.push_str(&format!(
            "  LATE: at that rate it is expected {} after its deadline; --rate allows more\n",
            ago(*late)
        ));
    }
    text
}

/// What is said of a cast that is not waited for any more.
fn outcome(status: &CastStatus) -> String {
    let CastStatus { cast, total_bytes, sent_bytes, seconds, receivers, .. } = status;
    let image = printable(&status.image);
    let of = |state| receivers.iter().filter(|receiver| receiver.state == state).count();
    let (complete, all) = (of(ReceiverState::Complete), receivers.len());
    let have = format!("{complete} of {all} receivers have everything");
    let sent = format!("{} of datagrams for {} in {}", size(*sent_bytes), size(*total_bytes), ago(*seconds));
    let mut text = match status.state {
        CastState::Done if all == 0 => format!("cast {cast}: {image}: nobody came\n"),
        CastState::Done => format!("cast {cast}: {image}: {have}, {sent}\n"),
        CastState::Cancelled => format!("cast {cast}: {image} was called off, {have}\n"),
        CastState::Failed => {
            let why = printable(status.error.as_deref().unwrap_or("unknown"));
            format!("cast {cast}: {image} failed, {have}: {why}\n")
        }
        CastState::Waiting | CastState::Sending | CastState::Ending => {
            format!("cast {cast}: {image} goes on without us, {have}: headwater cast --list shows it\n")
        }
    };
    if status.is_over() && complete < all {
        text.push_str("  the others fetch the rest from their upstreams\n");
    }
    if let Some(late) = status.late_by_seconds.filter(|_| status.is_over()) {
        text.push_str(&format!("  {} late\n", ago(late)));
    }
    if !receivers.is_empty() {
        text.push_str(&of_receivers(status).to_string());
    }
    text
}

fn exit_code(status: &CastStatus, end: End) -> ExitCode {
    match status.state {
        CastState::Failed => ExitCode::FAILURE,
        CastState::Cancelled => CANCELLED.into(),
        _ if end == End::Interrupted => LEFT.into(),
        _ if status.is_complete() => ExitCode::SUCCESS,
        _ => LEFT_OUT.into(),
    }
}

fn of_receivers(status: &CastStatus) -> Table {
    let mut table = Table::new(&["RECEIVER", "ADDRESS", "STATE", ">HERE", ">LOSS", ">HEARD"]);
    for receiver in &status.receivers {
        table.row(vec![
            receiver.receiver.chars().take(8).collect(),
            receiver.address.clone(),
            receiver.state.name().to_owned(),
            percent(u64::from(receiver.done_blocks), u64::from(status.blocks)),
            loss(receiver),
            format!("{} ago", ago(receiver.heard_seconds_ago)),
        ]);
    }
    table
}

fn loss(receiver: &ReceiverStatus) -> String {
    format!("{:.1} %", receiver.loss * 100.0)
}

/// Casts in columns.
pub(super) fn table(casts: &[CastStatus]) -> Table {
    let headings =
        [">CAST", "IMAGE", "GROUP", "STATE", ">PASSED", ">BYTES", ">SENT", ">RATE", ">RECEIVERS", ">COMPLETE", ">TIME"];
    let mut table = Table::new(&headings);
    for cast in casts {
        let complete = cast.receivers.iter().filter(|receiver| receiver.state == ReceiverState::Complete).count();
        let state = match &cast.error {
            Some(error) => format!("{}: {error}", cast.state.name()),
            None => cast.state.name().to_owned(),
        };
        table.row(vec![
            cast.cast.to_string(),
            short_name(&cast.image),
            cast.group.clone(),
            state,
            percent(u64::from(cast.passed_blocks), u64::from(cast.blocks)),
            size(cast.total_bytes),
            size(cast.sent_bytes),
            format!("{}/s", size(cast.rate)),
            cast.receivers.len().to_string(),
            complete.to_string(),
            ago(cast.seconds),
        ]);
    }
    table
}

/// Groups that a mirror hears, in columns: a row for each session, or one for a group without any.
pub(super) fn of_receptions(receptions: &[ReceptionStatus]) -> Table {
    let headings =
        ["GROUP", "IMAGE", "STATE", ">HERE", ">HEARD", ">MENDED", ">WRONG", ">FOREIGN", ">FORGED", ">OVERFLOWED"];
    let mut table = Table::new(&headings);
    for group in receptions {
        let row = |image: String, state: String, here: String, mended: u64, wrong: u64| {
            let counts = [mended, wrong, group.foreign, group.forged + group.broken, group.overflowed];
            let mut cells = vec![group.group.clone(), image, state, here, size(group.bytes)];
            cells.extend(counts.map(|count| count.to_string()));
            cells
        };
        if group.sessions.is_empty() {
            table.row(row("-".to_owned(), "listening".to_owned(), "-".to_owned(), 0, 0));
        }
        for heard in &group.sessions {
            let here = percent(u64::from(heard.done_blocks), u64::from(heard.blocks));
            table.row(row(short_name(&heard.image), heard.state.clone(), here, heard.mended, heard.wrong));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: CastState, receivers: &[ReceiverState]) -> CastStatus {
        let receiver = |state: &ReceiverState| ReceiverStatus { state: *state, ..ReceiverStatus::default() };
        CastStatus { state, receivers: receivers.iter().map(receiver).collect(), blocks: 4, ..CastStatus::default() }
    }

    #[test]
    fn the_exit_status_says_who_has_everything() {
        use ReceiverState::{Complete, Dropped, Left as Gone, Receiving, Silent};
        let code = |state, receivers: &[_], end| format!("{:?}", exit_code(&status(state, receivers), end));
        let is = |code: u8| format!("{:?}", ExitCode::from(code));
        assert_eq!(code(CastState::Done, &[Complete, Complete], End::Ended), is(0));
        for other in [Dropped, Gone, Silent, Receiving] {
            assert_eq!(code(CastState::Done, &[Complete, other], End::Ended), is(LEFT_OUT), "{other:?}");
        }
        assert_eq!(code(CastState::Done, &[], End::Ended), is(LEFT_OUT), "nobody came");
        assert_eq!(code(CastState::Cancelled, &[Complete], End::Ended), is(CANCELLED));
        assert_eq!(code(CastState::Failed, &[Complete], End::Ended), is(1));
        assert_eq!(code(CastState::Sending, &[Receiving], End::Interrupted), is(LEFT));
    }

    #[test]
    fn what_came_of_it_is_said_in_words() {
        let said = |state, receivers: &[_]| outcome(&status(state, receivers));
        assert!(said(CastState::Done, &[]).contains("nobody came"));
        let some = said(CastState::Done, &[ReceiverState::Complete, ReceiverState::Dropped]);
        assert!(some.contains("1 of 2 receivers") && some.contains("from their upstreams"), "{some}");
        assert!(said(CastState::Sending, &[]).contains("goes on without us"));
        let late = CastTaken { late_by_seconds: Some(61.0), wait_for: 3, ..CastTaken::default() };
        let text = describe("a", &late);
        assert!(text.contains("LATE") && text.contains("1 min 1 s") && text.contains("3 receivers"), "{text}");
    }
}
