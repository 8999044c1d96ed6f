//! `headwater drain`.

use std::process::ExitCode;

use anyhow::bail;
use clap::Args;

use super::args::RunningServer;
use crate::nbd::Uri;

/// Take a running server, or one of its exports, out of service.
///
/// Newcomers are sent away. With --to, all clients are moved there first. Ends when nobody is connected any more.
#[derive(Debug, Clone, Args)]
pub(super) struct Drain {
    /// The export. [default: all of them]
    pub(super) export: Option<String>,
    /// Where the clients go: the same image on another server.
    #[arg(long, value_name = "URI", value_delimiter = ',')]
    pub(super) to: Vec<Uri>,
    /// Also when the other server does not say what it holds, or would lose something: the refusal says what.
    #[arg(long)]
    pub(super) force: bool,
    /// Let newcomers in again; clients that were moved stay where they are.
    #[arg(long, conflicts_with_all = ["to", "force"])]
    pub(super) cancel: bool,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

pub(super) fn run(arguments: Drain) -> anyhow::Result<ExitCode> {
    bail!("not built yet: {arguments:?}")
}
