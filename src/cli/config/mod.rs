//! The configuration file of `serve` and `mirror`.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | command line and file together |
//! | `file` | what stands in a file, with its lines |
//! | `arguments` | from keys to what could have been typed |
//! | `check` | `headwater check-config` |
//! | `reload` | SIGHUP |
//!
//! What was typed takes the place of what stands in the file.

mod arguments;
mod check;
mod file;
mod reload;

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::anyhow;
use clap::{CommandFactory, Parser};

use super::args::{Arguments, Command};
use arguments::{Added, added, join, relaxed};
pub(super) use check::{CheckConfig, run as check};
use file::{ConfigFile, Fault};
pub(super) use reload::{Live, Reloader, refuse_strangers};

/// How the command line of this process came to be.
#[derive(Debug, Clone)]
struct Origin {
    /// As typed, with the name of the program.
    typed: Vec<OsString>,
    /// `serve` or `mirror`.
    command: String,
    path: PathBuf,
    /// What the file added.
    added: Added,
}

/// What was typed, with what the file says that it names. A command line that makes no sense ends the process.
pub(super) fn parse() -> anyhow::Result<(Arguments, Reloader)> {
    let typed: Vec<_> = std::env::args_os().collect();
    let Some((command, path)) = file_of(&typed) else { return Ok((Arguments::parse_from(typed), Reloader::new(None))) };
    let origin = Origin { typed, command, path, added: Added::new() };
    let (added, line) = origin.read().map_err(|faults| anyhow!(tell(&faults)))?;
    let arguments = Arguments::parse_from(line);
    Ok((arguments, Reloader::new(Some(Origin { added, ..origin }))))
}

/// The command that was typed and its `--config`, if that is one that may have it and makes any sense.
fn file_of(typed: &[OsString]) -> Option<(String, PathBuf)> {
    let matches = relaxed(Arguments::command()).try_get_matches_from(typed).ok()?;
    let (name, own) = matches.subcommand()?;
    let path = own.try_get_one::<PathBuf>("config").ok()??;
    Some((name.to_owned(), path.clone()))
}

impl Origin {
    /// Reads the file, again perhaps: what it adds, and the whole command line.
    fn read(&self) -> Result<(Added, Vec<OsString>), Vec<Fault>> {
        let file = ConfigFile::read(&self.path).map_err(|fault| vec![fault])?;
        let command = relaxed(Arguments::command());
        // It made sense before.
        let matches = command.clone().try_get_matches_from(&self.typed).ok();
        let own = matches.as_ref().and_then(|matches| matches.subcommand()).map(|(_, own)| own);
        let added = added(&file, &command, &self.command, own)?;
        let line = join(&self.typed, &self.command, &added);
        Ok((added, line))
    }
}

/// The name of the key of an argument, if it has one.
#[cfg(test)]
pub(super) use arguments::key;
/// Whether SIGHUP changes what is behind a key.
#[cfg(test)]
pub(super) use reload::is_live;

/// Whether all keys and values of a file make sense, for documents.
#[cfg(test)]
pub(super) fn read_example(text: &str) -> Result<(), String> {
    let file = ConfigFile::parse(std::path::Path::new("example"), text).map_err(|fault| fault.to_string())?;
    let command = relaxed(Arguments::command());
    for name in ["serve", "mirror"] {
        added(&file, &command, name, None).map_err(|faults| tell(&faults))?;
    }
    Ok(())
}

/// All faults, a line for each.
fn tell(faults: &[Fault]) -> String {
    faults.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// What clap says of a whole command line, in one line.
fn whole_line(error: &clap::Error) -> String {
    let text = error.to_string();
    let told =
        text.lines().take_while(|line| !line.starts_with("Usage:")).map(str::trim).filter(|line| !line.is_empty());
    let told = told.collect::<Vec<_>>().join(" ");
    told.strip_prefix("error: ").unwrap_or(&told).to_owned()
}

/// The part of a command line that servers have in common.
const fn daemon_of(command: &Command) -> Option<&super::args::Daemon> {
    match command {
        Command::Serve(serve) => Some(&serve.daemon),
        Command::Mirror(mirror) => Some(&mirror.daemon),
        _ => None,
    }
}
