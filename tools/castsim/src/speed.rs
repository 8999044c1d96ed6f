//! How fast a block is encoded and mended, on one core.

use clap::Args;

/// How fast a block is encoded and mended, on one core.
#[derive(Debug, Args)]
pub(crate) struct Speed {}

impl Speed {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        unimplemented!()
    }
}
