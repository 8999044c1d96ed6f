//! `headwater index`.

use std::fmt::Write;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use anyhow::Context;
use indicatif::ProgressBar;
use serde::Serialize;

use super::args;
use super::long_work;
use super::output;
use crate::image::index::{self, IndexError, Made, Progress, Rate, Settings};
use crate::image::{Format, manifest_path};
use crate::manifest::Header;

pub(super) fn run(arguments: args::Index) -> anyhow::Result<()> {
    long_work::run(move |cancel| index_all(&arguments, cancel))
}

/// One image and its manifest. The field names are those of the JSON.
#[derive(Debug, Serialize)]
struct Indexed {
    path: PathBuf,
    identity: String,
    manifest: PathBuf,
    size: u64,
    chunk_size: u32,
    /// Whether it was made now, and not found.
    made: bool,
    /// Bytes of the image that were read for it now.
    read_bytes: u64,
}

fn index_all(arguments: &args::Index, cancel: &AtomicBool) -> anyhow::Result<()> {
    let mut all = Vec::new();
    for path in &arguments.images {
        let indexed = index_one(path.clone(), arguments, cancel)?;
        if !arguments.json {
            let mut line = String::new();
            writeln!(line, "{}  {}", indexed.identity, indexed.path.display())?;
            output::print(&line)?;
        }
        all.push(indexed);
    }
    if arguments.json { output::print(&format!("{}\n", serde_json::to_string_pretty(&all)?)) } else { Ok(()) }
}

fn index_one(path: PathBuf, arguments: &args::Index, cancel: &AtomicBool) -> anyhow::Result<Indexed> {
    let format: Format = arguments.format.into();
    let found = index::existing(&path, format)?;
    let is_wanted = |header: &Header| arguments.chunk_size.is_none_or(|wanted| wanted == header.shape.chunk_size);
    if let Some(header) = found.filter(|header| is_wanted(header) && !arguments.force) {
        tracing::info!(path = %path.display(), "the manifest still fits: nothing to do");
        return Ok(Indexed::new(path, header, false, 0));
    }
    let mut settings = Settings { rate: Rate::new(arguments.rate), ..Settings::default() };
    settings.chunk_size = arguments.chunk_size.unwrap_or(settings.chunk_size);
    settings.threads = arguments.threads.map_or(settings.threads, usize::from);
    let bar = progress_bar(&path)?;
    let show = |Progress { done, total }| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let made = index::make(&path, format, &settings, cancel, &show);
    bar.finish_and_clear();
    match made {
        Ok(Made { header, read_bytes, resumed_bytes }) => {
            if resumed_bytes > 0 {
                tracing::info!(path = %path.display(), resumed_bytes, "went on from where an earlier run had stopped");
            }
            Ok(Indexed::new(path, header, true, read_bytes))
        }
        Err(IndexError::Cancelled) => Err(IndexError::Cancelled).with_context(|| path.display().to_string()),
        Err(error) => Err(error.into()),
    }
}

impl Indexed {
    fn new(path: PathBuf, header: Header, made: bool, read_bytes: u64) -> Self {
        Self {
            identity: header.id.to_string(),
            manifest: manifest_path(&path),
            size: header.shape.image_size,
            chunk_size: header.shape.chunk_size,
            path,
            made,
            read_bytes,
        }
    }
}

fn progress_bar(path: &std::path::Path) -> anyhow::Result<ProgressBar> {
    let name = path.file_name().unwrap_or(path.as_os_str()).display().to_string();
    let bar = long_work::bar("{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")?;
    Ok(bar.with_message(name))
}
