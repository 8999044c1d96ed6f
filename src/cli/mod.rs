//! The command line: what was typed, and what is done with it.
//!
//! | file | holds |
//! | --- | --- |
//! | `args` | commands, flags, and the help that teaches them |
//! | `daemon` | what `serve` and `mirror` have in common: listening, serving, ending |
//! | `serve`, `mirror`, `index`, `info` | one command each |
//! | `output` | the standard output stream |
//!
//! Exit status: 0 when all went well, 1 on a failure, 2 when the command line makes no sense.

mod args;
mod daemon;
mod index;
mod info;
mod mirror;
mod output;
mod serve;

use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Command};

/// Does what the command line says.
pub fn run() -> ExitCode {
    let Arguments { command, logging } = Arguments::parse();
    crate::telemetry::start_logging(logging.level(), logging.format());
    let result = match command {
        Command::Serve(arguments) => serve::run(arguments),
        Command::Mirror(arguments) => mirror::run(arguments),
        Command::Index(arguments) => index::run(arguments),
        Command::Info(arguments) => info::run(&arguments),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output::complain(&error);
            ExitCode::FAILURE
        }
    }
}
