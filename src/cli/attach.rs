//! `headwater attach` and `headwater detach`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::bail;
use clap::Args;

use super::prefetch::when::length_of_time;
use crate::nbd::Uri;

/// Bind an export to a block device of the kernel.
///
/// Ends when the device is there. A keeper stays in the background until the device is detached: it connects anew what
/// was lost, to the same servers, so that readers see a pause and no error.
#[derive(Debug, Clone, Args)]
pub(super) struct Attach {
    /// What to attach. With several, the next is used when one fails.
    #[arg(required = true, value_name = "URI", value_delimiter = ',')]
    pub(super) uris: Vec<Uri>,
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
}

/// Give a block device back.
#[derive(Debug, Clone, Args)]
pub(super) struct Detach {
    /// The device, as /dev/nbd0.
    #[arg(value_name = "DEVICE")]
    pub(super) device: PathBuf,
}

pub(super) fn attach(arguments: Attach) -> anyhow::Result<()> {
    bail!("not built yet: {arguments:?}")
}

pub(super) fn detach(arguments: Detach) -> anyhow::Result<()> {
    bail!("not built yet: {arguments:?}")
}
