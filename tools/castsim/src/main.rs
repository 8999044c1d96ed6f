//! Simulates multicast fills: many receivers, many kinds of loss.
//!
//! | file | holds |
//! | --- | --- |
//! | `speed` | how fast a block is encoded and mended, on one core |

mod speed;

use clap::{Parser, Subcommand};

/// Simulates multicast fills.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// How fast a block is encoded and mended, on one core.
    Speed(speed::Speed),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Speed(speed) => speed.run(),
    }
}
