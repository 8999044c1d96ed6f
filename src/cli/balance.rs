//! STUB (part B). `headwater balance`: moving clients until servers share their load.

use std::process::ExitCode;

use clap::Args;

use super::args::Servers;

/// Move clients between servers until they share their load.
#[derive(Debug, Args)]
pub(super) struct Balance {
    #[command(flatten)]
    pub(super) servers: Servers,
}

/// Does it.
pub(super) fn run(arguments: Balance) -> anyhow::Result<ExitCode> {
    let _ = arguments.servers;
    unimplemented!()
}
