//! Waiting for a cast, and showing how it gets on.

use std::collections::HashMap;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use tokio::signal::unix::Signal;

use super::loss;
use crate::cli::long_work::is_seen;
use crate::cli::status::{percent, size};
use crate::cli::table::printable;
use crate::control::Client;
use crate::control::status::{CastStatus, ReceiverStatus};

/// How often it is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Times that a server may not answer, one after the other, before nobody waits for it any more.
const SILENCES: u32 = 25;
/// Receivers that have a line; the table at the end has all.
const MOST_LINES: usize = 16;

/// How waiting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// The cast is over.
    Ended,
    /// Somebody did not want to wait any longer.
    Interrupted,
}

/// Waits until a cast is over, and gives its last status.
pub(super) async fn wait(client: &Client, id: u64, interrupt: &mut Signal) -> anyhow::Result<(CastStatus, End)> {
    let mut screen = Screen::new()?;
    let mut silences = 0;
    let mut status = client.cast_status(id).await?;
    let end = loop {
        screen.show(&status);
        if status.is_over() {
            break End::Ended;
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => {}
            _ = interrupt.recv() => break End::Interrupted,
        }
        match client.cast_status(id).await {
            Ok(next) => (status, silences) = (next, 0),
            // A server that was restarted does not know it any more, and says so.
            Err(error) if silences >= SILENCES || !error.may_pass() => return Err(error.into()),
            Err(_) => silences += 1,
        }
    };
    screen.clear();
    Ok((status, end))
}

/// A bar in all, and a line for each receiver. Nothing where nobody sees it.
struct Screen {
    all: Option<MultiProgress>,
    whole: ProgressBar,
    form: ProgressStyle,
    lines: HashMap<String, ProgressBar>,
}

impl Screen {
    fn new() -> anyhow::Result<Self> {
        let form = ProgressStyle::with_template("  {msg}")?;
        let all = is_seen().then(MultiProgress::new);
        let whole = match &all {
            Some(all) => {
                let style = ProgressStyle::with_template("{prefix} {wide_bar} {pos} of {len} blocks, {msg}")?;
                all.add(ProgressBar::new(0).with_style(style))
            }
            None => ProgressBar::hidden(),
        };
        Ok(Self { all, whole, form, lines: HashMap::new() })
    }

    fn show(&mut self, status: &CastStatus) {
        let Some(all) = &self.all else { return };
        self.whole.set_prefix(printable(&status.image));
        self.whole.set_length(u64::from(status.blocks));
        self.whole.set_position(u64::from(status.passed_blocks));
        self.whole.set_message(format!(
            "{}, {}/s, {} receivers",
            status.state.name(),
            size(status.rate),
            status.receivers.len()
        ));
        for receiver in &status.receivers {
            if !self.lines.contains_key(&receiver.receiver) && self.lines.len() < MOST_LINES {
                let line = all.add(ProgressBar::no_length().with_style(self.form.clone()));
                self.lines.insert(receiver.receiver.clone(), line);
            }
            if let Some(line) = self.lines.get(&receiver.receiver) {
                line.set_message(describe(receiver, status.blocks));
            }
        }
    }

    fn clear(self) {
        self.lines.values().for_each(ProgressBar::finish_and_clear);
        self.whole.finish_and_clear();
    }
}

fn describe(receiver: &ReceiverStatus, blocks: u32) -> String {
    let here = percent(u64::from(receiver.done_blocks), u64::from(blocks));
    let (name, address) = (receiver.receiver.chars().take(8).collect::<String>(), &receiver.address);
    printable(&format!("{name} {address}  {here}  {}, {} lost", receiver.state.name(), loss(receiver)))
}
