//! `headwater attach` and `headwater detach`.
//!
//! Attaching leaves a keeper: this program once more, in a session of its own and without a terminal. It begins when
//! the record names it, so that there is one at most.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use super::output;
use super::prefetch::when::length_of_time;
use crate::agent::kernel::{self, Attached, DIRECTORY, Wishes};
use crate::nbd::Uri;
use crate::nbd::uri::ParseUriError;

/// Bind an export to a block device of the kernel.
///
/// Ends when the device is there. A keeper stays in the background until the device is detached: it connects anew what
/// was lost, to the same servers, so that readers see a pause and no error.
#[derive(Debug, Clone, Args)]
pub(super) struct Attach {
    /// What to attach. With several, the next is used when one fails.
    #[arg(required_unless_present = "keeper", value_name = "URI,URI")]
    pub(super) uris: Option<UriList>,
    /// The device, as /dev/nbd0. [default: the first that is free]
    #[arg(value_name = "DEVICE")]
    pub(super) device: Option<PathBuf>,
    /// Connections; with two or more the device can be moved without a pause.
    #[arg(long, value_name = "N", default_value = "2", value_parser = clap::value_parser!(u8).range(1..=16))]
    pub(super) connections: u8,
    /// How long the kernel waits for an answer before it asks again over another connection.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = length_of_time)]
    pub(super) timeout: Duration,
    /// How long readers wait for a server while none is connected.
    #[arg(long, value_name = "TIME", default_value = "2m", value_parser = length_of_time)]
    pub(super) dead_timeout: Duration,
    /// Let nobody write.
    #[arg(short, long)]
    pub(super) read_only: bool,
    /// Keep the device from the foreground, until a signal comes: for service managers.
    #[arg(long)]
    pub(super) foreground: bool,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// Keep this device, which is attached: what the keeper is started with.
    #[arg(long, hide = true, value_name = "DEVICE", conflicts_with = "uris")]
    pub(super) keeper: Option<PathBuf>,
}

/// Servers with commas between them: one argument, as another follows.
#[derive(Debug, Clone)]
pub(super) struct UriList(Vec<Uri>);

impl FromStr for UriList {
    type Err = ParseUriError;

    fn from_str(text: &str) -> Result<Self, ParseUriError> {
        Uri::parse_list(text).map(Self)
    }
}

/// Give a block device back.
#[derive(Debug, Clone, Args)]
pub(super) struct Detach {
    /// The device, as /dev/nbd0.
    #[arg(value_name = "DEVICE")]
    pub(super) device: PathBuf,
}

/// What is printed with `--json`.
#[derive(Debug, Serialize)]
struct Told<'a> {
    device: &'a str,
    uri: &'a str,
    size: u64,
    block_size: u64,
    connections: usize,
    identity: Option<&'a str>,
    backend: Option<&'a str>,
    notes: &'a [String],
}

pub(super) fn attach(arguments: Attach) -> anyhow::Result<()> {
    if let Some(device) = &arguments.keeper {
        return keep_in_background(index_of(device)?);
    }
    let wishes = Wishes {
        index: arguments.device.as_deref().map(index_of).transpose()?,
        uris: arguments.uris.map(|UriList(uris)| uris).unwrap_or_default(),
        connections: usize::from(arguments.connections),
        timeout: arguments.timeout,
        dead_timeout: arguments.dead_timeout,
        read_only: arguments.read_only,
    };
    let attached = kernel::attach(Path::new(DIRECTORY), &wishes)?;
    let keeper = if arguments.foreground {
        kernel::name_keeper(Path::new(DIRECTORY), attached.index, std::process::id()).map_err(anyhow::Error::from)
    } else {
        start_keeper(attached.index)
    };
    keeper.with_context(|| format!("{} is attached, but nobody keeps it", attached.record.device))?;
    tell(&attached, arguments.json)?;
    if arguments.foreground { keep_in_foreground(&attached) } else { Ok(()) }
}

pub(super) fn detach(arguments: Detach) -> anyhow::Result<()> {
    Ok(kernel::detach(Path::new(DIRECTORY), index_of(&arguments.device)?)?)
}

/// The number of a device.
pub(in crate::cli) fn index_of(device: &Path) -> anyhow::Result<u32> {
    kernel::index_of(device).with_context(|| format!("{} is not a device such as /dev/nbd0", device.display()))
}

fn tell(attached: &Attached, json: bool) -> anyhow::Result<()> {
    let record = &attached.record;
    if json {
        let told = Told {
            device: &record.device,
            uri: record.uris.first().map_or("", String::as_str),
            size: record.size,
            block_size: record.block_size,
            connections: record.connections.len(),
            identity: record.identity.as_deref(),
            backend: record.backend.as_deref(),
            notes: &attached.notes,
        };
        return output::print(&format!("{}\n", serde_json::to_string_pretty(&told)?));
    }
    attached.notes.iter().for_each(|note| tracing::warn!(device = record.device, "{note}"));
    output::print(&format!("{}\n", record.device))
}

/// Starts the keeper, which waits until the record names it.
fn start_keeper(index: u32) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("this program")?;
    let mut keeper = Command::new(program);
    keeper.arg("attach").arg("--keeper").arg(format!("/dev/nbd{index}"));
    // Nothing of the terminal's is kept open; what troubles it is in the record.
    keeper.current_dir("/").stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut keeper = keeper.spawn().context("the keeper")?;
    kernel::name_keeper(Path::new(DIRECTORY), index, keeper.id())?;
    drop(keeper.stdin.take());
    Ok(())
}

fn keep_in_background(index: u32) -> anyhow::Result<()> {
    // One that leads a session already needs no other.
    let _ = rustix::process::setsid();
    // Its end says that the record names us, or that whoever started us is gone.
    std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink())?;
    Ok(kernel::keep(Path::new(DIRECTORY), index)?)
}

/// Keeps the device until it is detached or a signal comes, which leaves it attached.
fn keep_in_foreground(attached: &Attached) -> anyhow::Result<()> {
    let index = attached.index;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::Builder::new().name("keeper".into()).spawn(move || {
        // Nobody waits for it after a signal.
        let _ = ended.send(kernel::keep(Path::new(DIRECTORY), index));
    })?;
    runtime.block_on(async {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            ended = end => return Ok(ended.context("the keeper has stopped")??),
            _ = terminate.recv() => {}
            interrupt = tokio::signal::ctrl_c() => interrupt?,
        }
        let device = &attached.record.device;
        tracing::warn!(device, "nobody keeps it any more, and it stays attached: headwater detach {device} ends it");
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::{Arguments, Command as Typed};
    use clap::Parser;

    #[test]
    fn the_device_comes_behind_the_list_of_servers() {
        let typed = Arguments::try_parse_from(["headwater", "attach", "nbd://a/x,nbd://b/x", "/dev/nbd1"]).unwrap();
        let Typed::Attach(attach) = typed.command else { panic!("another command") };
        let uris = attach.uris.map_or(0, |UriList(uris)| uris.len());
        assert_eq!((uris, attach.device.as_deref()), (2, Some(Path::new("/dev/nbd1"))));
        assert!(Arguments::try_parse_from(["headwater", "attach"]).is_err());
    }
}
