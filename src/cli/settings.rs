//! STUB (part P). `headwater settings`: what may be changed while a server runs.

use std::process::ExitCode;

use clap::Args;

use super::args::RunningServer;

/// Show and change the settings of a running server.
#[derive(Debug, Args)]
pub(super) struct Settings {
    #[command(flatten)]
    pub(super) server: RunningServer,
}

/// Shows and changes them.
pub(super) fn run(arguments: Settings) -> anyhow::Result<ExitCode> {
    let _ = arguments.server;
    unimplemented!()
}
