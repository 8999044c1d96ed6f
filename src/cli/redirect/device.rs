//! `headwater redirect` at a device of the kernel.

use std::process::ExitCode;

use anyhow::bail;

use super::args::Redirect;

pub(super) fn run(arguments: Redirect) -> anyhow::Result<ExitCode> {
    bail!("not built yet: {arguments:?}")
}
