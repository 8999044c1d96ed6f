//! Simulates multicast fills: many receivers, many kinds of loss.
//!
//! | file | holds |
//! | --- | --- |
//! | `world` | a sender, receivers and the network between them |
//! | `loss` | which datagrams are lost |
//! | `nack` | what the same costs without parity |
//! | `table` | the table of all that |
//! | `scenarios` | what must hold whatever happens: tests |
//! | `demand` | whether misses should be answered by multicast |
//! | `speed` | how fast a block is encoded and mended, on one core |
//! | `chance` | random numbers that repeat |

#![expect(clippy::cast_precision_loss, reason = "figures for people")]

mod chance;
mod demand;
mod loss;
mod nack;
#[cfg(test)]
mod scenarios;
mod speed;
mod table;
mod world;

use std::io::Write;

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
    /// Overhead and time by loss and number of receivers.
    Table(table::Table),
    /// Whether misses of many mirrors should be answered once, by multicast.
    Demand(demand::Demand),
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().command {
        Command::Speed(speed) => speed.run(),
        Command::Table(table) => table.run(),
        Command::Demand(demand) => demand.run(),
    }
}

/// Prints a line.
fn out(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stdout(), "{line}")?)
}
