//! The command line: what was typed, and what is done with it.
//!
//! | file | holds |
//! | --- | --- |
//! | `args` | commands, flags, and the help that teaches them |
//! | `daemon` | what `serve` and `mirror` have in common: listening, serving, ending |
//! | `serve`, `mirror`, `index`, `info`, `status`, `pin`, `verify`, `profile` | one command each; `pin` has `unpin` too |
//! | `prefetch` | ordering, waiting, deploying to many mirrors |
//! | `cast` | sending an image to a group |
//! | `config` | the configuration file: read, checked, read again |
//! | `redirect` | moving clients: at a server, at a virtual machine, at a device of the kernel |
//! | `drain` | taking a server out of service |
//! | `top` | watching servers |
//! | `balance` | moving clients until servers share their load |
//! | `settings` | what may be changed while a server runs |
//! | `attach` | binding an export to a device of the kernel, and giving it back |
//! | `manual` | pages of the manual and completions for shells, made from `args` |
//! | `verify_file` | `verify` for files, which needs no server |
//! | `running` | finding the running server that a command is for |
//! | `long_work` | calling long work off, and showing how it gets on |
//! | `table` | columns for people |
//! | `output` | the standard output stream |
//!
//! Exit status: 0 when all went well, 1 on a failure, 2 when the command line makes no sense; `verify`, `prefetch`, `redirect` and `cast`
//! have more.

mod args;
mod attach;
mod balance;
mod cast;
mod config;
mod daemon;
#[cfg(test)]
mod documents;
mod drain;
mod index;
mod info;
mod long_work;
mod manual;
mod mirror;
mod output;
mod pin;
mod prefetch;
mod profile;
mod redirect;
mod running;
mod serve;
mod settings;
mod status;
mod table;
#[cfg(feature = "tui")]
mod top;
mod verify;
mod verify_file;

use std::process::ExitCode;

use args::{Arguments, Command};

/// Does what the command line says.
pub fn run() -> ExitCode {
    let (Arguments { command, logging }, reloader) = match config::parse() {
        Ok(parsed) => parsed,
        Err(error) => {
            output::complain(&error);
            // The same as a command line that makes no sense.
            return ExitCode::from(2);
        }
    };
    crate::telemetry::start_logging(logging.level(), logging.format());
    let result = match command {
        Command::Serve(arguments) => serve::run(arguments, reloader).map(|()| ExitCode::SUCCESS),
        Command::Mirror(arguments) => mirror::run(arguments, reloader).map(|()| ExitCode::SUCCESS),
        Command::Index(arguments) => index::run(arguments).map(|()| ExitCode::SUCCESS),
        Command::Info(arguments) => info::run(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Status(arguments) => status::run(arguments).map(|()| ExitCode::SUCCESS),
        Command::Pin(arguments) => pin::pin(arguments).map(|()| ExitCode::SUCCESS),
        Command::Unpin(arguments) => pin::unpin(arguments).map(|()| ExitCode::SUCCESS),
        Command::Verify(arguments) => verify::run(arguments),
        Command::Profile(arguments) => profile::run(arguments).map(|()| ExitCode::SUCCESS),
        Command::Prefetch(arguments) => prefetch::run(*arguments),
        Command::Cast(arguments) => cast::run(*arguments),
        Command::Redirect(arguments) => redirect::run(*arguments),
        Command::Drain(arguments) => drain::run(arguments),
        Command::Attach(arguments) => attach::attach(arguments).map(|()| ExitCode::SUCCESS),
        Command::CheckConfig(arguments) => config::check(&arguments),
        Command::Settings(arguments) => settings::run(arguments),
        #[cfg(feature = "tui")]
        Command::Top(arguments) => top::run(arguments),
        Command::Balance(arguments) => balance::run(arguments),
        Command::Detach(arguments) => attach::detach(arguments).map(|()| ExitCode::SUCCESS),
        Command::Man(arguments) => manual::write_pages(&arguments).map(|()| ExitCode::SUCCESS),
        Command::Completions(arguments) => manual::print_completions(&arguments).map(|()| ExitCode::SUCCESS),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            output::complain(&error);
            ExitCode::FAILURE
        }
    }
}
