//! How many machines get all of the time that they were promised, by when their images are fetched: in a simulation
//! with the schedule of the mirror itself, and with real servers.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the command line |
//! | `trace` | what is deployed |
//! | `schedule` | one trace on a link |
//! | `simulate` | the table of many |
//! | `chart` | the plot of it |
//! | `live` | real servers, with a limited link between them |

mod chart;
mod live;
mod schedule;
mod simulate;
mod trace;

use std::process::ExitCode;

use clap::Parser;

/// Says how many deployments get all of the time that they were promised.
///
/// Deployments of 2 to 4 machines are asked for some time before they are to start. Each machine needs its image by
/// then; all images come over one link.
#[derive(Debug, Parser)]
#[command(version)]
enum Command {
    /// Simulates a link, with the schedule of the mirror.
    ///
    /// Exits with 1 if a hybrid schedule was below another one, or left anybody without all where all could have it.
    Sim(simulate::Arguments),
    /// Runs a trace against a real mirror.
    ///
    /// An origin is reached over a link of limited rate, by one mirror with an image for each machine of each
    /// deployment.
    Live(live::Arguments),
}

fn main() -> anyhow::Result<ExitCode> {
    match Command::parse() {
        Command::Sim(arguments) => simulate::run(&arguments),
        Command::Live(arguments) => live::run(&arguments),
    }
}
