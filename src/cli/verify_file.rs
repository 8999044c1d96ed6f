//! `headwater verify` for files: an image is held against the manifest beside it.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use indicatif::ProgressBar;
use serde::Serialize;

use super::args::Verify;
use super::long_work;
use super::output;
use super::table::printable;
use super::verify::{DAMAGED, bar};
use crate::image::index::{Check, CheckError, Checked, Damage, Damaged, Settings};
use crate::units::ByteSize;

/// Damaged parts that are listed; there may be many on a disk that dies.
const LISTED: usize = 100;

pub(super) fn run(arguments: Verify) -> anyhow::Result<ExitCode> {
    long_work::run(move |cancel| verify(&arguments, cancel))
}

/// What was found. The field names are those of the JSON.
#[derive(Debug, Serialize)]
struct Verified {
    path: PathBuf,
    /// What the manifest says that it is.
    identity: String,
    size: u64,
    chunk_size: u32,
    /// What of the file is not as it was when the manifest was made.
    differences: Vec<&'static str>,
    checked_chunks: u64,
    damaged_chunks: u64,
    /// Where they are: the first ones, joined where they touch.
    damaged: Vec<Part>,
    /// Whether there are more than these.
    more: bool,
}

/// A damaged part of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Part {
    start: u64,
    length: u64,
    /// It could be read, and has other bytes than it should have.
    readable: bool,
}

fn verify(arguments: &Verify, cancel: &AtomicBool) -> anyhow::Result<ExitCode> {
    let path = PathBuf::from(&arguments.image);
    let check = Check::open(&path, arguments.format.into())?;
    let threads = arguments.threads.map_or_else(|| Settings::default().threads, usize::from);
    let header = *check.header();
    let found = Found::new(bar(header.shape.image_size)?);
    let result = check.run(threads, arguments.rate, &|| cancel.load(Ordering::Relaxed), &|part| found.add(&part));
    found.bar.finish_and_clear();
    match result {
        Err(CheckError::Cancelled) => return Err(CheckError::Cancelled).with_context(|| path.display().to_string()),
        result => result?,
    }
    let Tally { checked_chunks, damaged_chunks, parts, more } = found.into_tally();
    let verified = Verified {
        path,
        identity: header.id.to_string(),
        size: header.shape.image_size,
        chunk_size: header.shape.chunk_size,
        differences: check.differences(),
        checked_chunks,
        damaged_chunks,
        damaged: parts.into_values().collect(),
        more,
    };
    let text =
        if arguments.json { format!("{}\n", serde_json::to_string_pretty(&verified)?) } else { verified.describe()? };
    output::print(&text)?;
    // What is behind the end that the manifest knows is damage too, though no chunk of it is.
    let is_right = damaged_chunks == 0 && check.image_size() == header.shape.image_size;
    Ok(if is_right { ExitCode::SUCCESS } else { DAMAGED.into() })
}

impl Verified {
    fn describe(&self) -> anyhow::Result<String> {
        let Self { path, identity, differences, checked_chunks, damaged_chunks, .. } = self;
        let name = printable(&path.display().to_string());
        let mut text = format!("{name}: {checked_chunks} chunks checked, {damaged_chunks} damaged\n");
        for Part { start, length, readable } in &self.damaged {
            let how = if *readable { "other bytes" } else { "cannot be read" };
            writeln!(text, "  {start}..{}  {}, {how}", start + length, ByteSize(*length))?;
        }
        if self.more {
            writeln!(text, "  and more")?;
        }
        if !differences.is_empty() {
            let other = differences.join(", ");
            writeln!(
                text,
                "the manifest, {identity}, was made from another state of the file (other {other}): servers do not use \
                 it until headwater index has been run again"
            )?;
        }
        Ok(text)
    }
}

/// What is found meanwhile, by several threads.
struct Found {
    bar: ProgressBar,
    tally: Mutex<Tally>,
}

#[derive(Debug, Default)]
struct Tally {
    checked_chunks: u64,
    damaged_chunks: u64,
    /// By where they start: the first ones, joined where they touch.
    parts: BTreeMap<u64, Part>,
    more: bool,
}

impl Found {
    fn new(bar: ProgressBar) -> Self {
        Self { bar, tally: Mutex::default() }
    }

    fn add(&self, checked: &Checked) {
        let mut tally = self.lock();
        tally.checked_chunks += checked.chunks;
        checked.damaged.iter().for_each(|damaged| tally.add(damaged));
        if tally.damaged_chunks > 0 {
            self.bar.set_message(format!("{} damaged", tally.damaged_chunks));
        }
        self.bar.inc(checked.range.length());
    }

    fn lock(&self) -> MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn into_tally(self) -> Tally {
        self.tally.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tally {
    fn add(&mut self, damaged: &Damaged) {
        self.damaged_chunks += 1;
        let (start, end) = (damaged.range.start(), damaged.range.end());
        let readable = damaged.damage == Damage::Wrong;
        let mut part = Part { start, length: end - start, readable };
        if let Some(next) = self.parts.get(&end).copied().filter(|next| next.readable == readable) {
            self.parts.remove(&end);
            part.length += next.length;
        }
        let before = self.parts.range_mut(..start).next_back();
        if let Some((_, before)) = before
            && before.start + before.length == start
            && before.readable == readable
        {
            before.length += part.length;
            return;
        }
        self.parts.insert(part.start, part);
        if self.parts.len() > LISTED {
            self.parts.pop_last();
            self.more = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::ByteRange;

    #[test]
    fn damaged_chunks_are_listed_joined_and_bounded() {
        let mut tally = Tally::default();
        let mut add = |start, damage| tally.add(&Damaged { range: ByteRange::between(start, start + 10), damage });
        // In the disorder of several threads.
        for start in [40, 10, 30, 20, 0, 70] {
            add(start, Damage::Wrong);
        }
        add(50, Damage::Unreadable);
        let part = |start, length, readable| Part { start, length, readable };
        let parts: Vec<_> = tally.parts.values().copied().collect();
        assert_eq!(parts, [part(0, 50, true), part(50, 10, false), part(70, 10, true)]);
        for start in (0..300).rev().map(|number| 1000 + 20 * number) {
            tally.add(&Damaged { range: ByteRange::between(start, start + 10), damage: Damage::Unreadable });
        }
        assert_eq!((tally.parts.len(), tally.more, tally.damaged_chunks), (LISTED, true, 307));
        assert!(tally.parts.keys().all(|start| *start < 3000), "the first ones are listed");
    }
}
