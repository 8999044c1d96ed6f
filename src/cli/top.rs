//! STUB (part O). `headwater top`: servers, exports and clients, live, those first that hurt.

use std::process::ExitCode;

use clap::Args;

use super::args::Servers;

/// Watch running servers: their exports and clients, those first that hurt.
#[derive(Debug, Args)]
pub(super) struct Top {
    #[command(flatten)]
    pub(super) servers: Servers,
}

/// Shows them until the operator has seen enough.
pub(super) fn run(arguments: Top) -> anyhow::Result<ExitCode> {
    let _ = arguments.servers;
    unimplemented!()
}
