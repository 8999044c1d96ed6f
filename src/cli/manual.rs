//! `headwater man` and `headwater completions`: what is made from the command line itself.
//!
//! One page of the manual for each command and each of its subcommands, in roff for man(1), and completions for shells. The
//! package brings both; whoever installs the program alone makes them with these commands. Nothing is written by hand, so that
//! they cannot say less than `--help` does.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, Command, CommandFactory};
use clap_complete::Shell;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::args::Arguments;
use super::output;

const MAN_EXAMPLES: &str = "\
Examples:
  headwater man ~/.local/share/man/man1
  headwater man /tmp/pages && man -l /tmp/pages/headwater-serve.1";

const COMPLETIONS_EXAMPLES: &str = "\
Examples:
  headwater completions bash >~/.local/share/bash-completion/completions/headwater
  headwater completions zsh >~/.zfunc/_headwater
  headwater completions fish >~/.config/fish/completions/headwater.fish";

/// Write the pages of the manual, one for each command, into a directory.
///
/// The Debian package brings them along. The directory is made if it is missing; pages that are there are replaced.
#[derive(Debug, Args)]
#[command(after_help = MAN_EXAMPLES)]
pub(super) struct Pages {
    /// Where to.
    directory: PathBuf,
}

/// Print completions for a shell.
///
/// The Debian package brings those of bash, zsh and fish along.
#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS_EXAMPLES)]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

/// The command line as a whole.
fn whole() -> Command {
    let mut command = Arguments::command().disable_help_subcommand(true);
    // Names of subcommands are known in full after that: headwater-profile-show.
    command.build();
    command
}

/// Writes the manual.
pub(super) fn write_pages(arguments: &Pages) -> anyhow::Result<()> {
    let directory = &arguments.directory;
    fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    write_page(&whole(), None, directory)
}

/// Prints completions.
pub(super) fn print_completions(arguments: &Completions) -> anyhow::Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(arguments.shell, &mut Arguments::command(), "headwater", &mut text);
    output::print_bytes(&text)
}

/// The page of a command, and those of its subcommands.
fn write_page(command: &Command, above: Option<&str>, directory: &Path) -> anyhow::Result<()> {
    for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
        write_page(subcommand, Some(name(command)), directory)?;
    }
    let path = directory.join(format!("{}.1", name(command)));
    let text = page(command, above).with_context(|| format!("cannot make the page of {}", name(command)))?;
    fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn name(command: &Command) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

/// What man(1) shows of a command. `above` is the page of which this one is a part.
fn page(command: &Command, above: Option<&str>) -> io::Result<Vec<u8>> {
    let source = concat!("Headwater ", env!("CARGO_PKG_VERSION"));
    // A date would make each build another; but without any, what comes behind it would stand in its place.
    let man = Man::new(command.clone()).date(" ").source(source).manual("Headwater");
    let mut text = Vec::new();
    man.render_title(&mut text)?;
    man.render_name_section(&mut text)?;
    man.render_synopsis_section(&mut text)?;
    man.render_description_section(&mut text)?;
    if command.get_arguments().any(|argument| !argument.is_hide_set()) {
        man.render_options_section(&mut text)?;
    }
    if command.get_subcommands().any(|subcommand| !subcommand.is_hide_set()) {
        man.render_subcommands_section(&mut text)?;
    }
    let help = command.get_after_long_help().or_else(|| command.get_after_help());
    if let Some(help) = help {
        put_help(&help.to_string()).to_writer(&mut text)?;
    }
    put_elsewhere(above).to_writer(&mut text)?;
    Ok(text)
}

/// The end of the help: examples as they stand, and what the exit status means. Its paragraphs have an empty line between
/// them, and those that say what they are begin with it and a colon.
fn put_help(help: &str) -> Roff {
    let mut roff = Roff::new();
    for paragraph in help.split("\n\n") {
        match paragraph.split_once(':') {
            Some(("Examples" | "Example", rest)) => {
                roff.control("SH", ["EXAMPLES"]);
                put_lines(&mut roff, rest);
            }
            Some(("Exit status", rest)) => {
                roff.control("SH", ["EXIT STATUS"]);
                roff.text([roman(one_line(rest))]);
            }
            _ => {
                roff.control("PP", []);
                roff.text([roman(one_line(paragraph))]);
            }
        }
    }
    roff
}

/// What is not indented is prose, and the rest is shown as it is.
fn put_lines(roff: &mut Roff, text: &str) {
    let mut is_code = false;
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if line.starts_with("  ") != is_code {
            is_code = !is_code;
            roff.control(if is_code { "RS" } else { "RE" }, if is_code { vec!["4"] } else { vec![] });
            roff.control(if is_code { "nf" } else { "fi" }, []);
        }
        roff.text([roman(line.trim())]);
    }
    if is_code {
        roff.control("fi", []);
        roff.control("RE", []);
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Where there is more to read.
fn put_elsewhere(above: Option<&str>) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SEE ALSO"]);
    match above {
        Some(page) => roff.text([bold(page), roman("(1), and the documents in /usr/share/doc/headwater.")]),
        None => roff.text([roman("The documents in /usr/share/doc/headwater.")]),
    };
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All commands that can be typed, by the names of their pages.
    fn names(command: &Command, all: &mut Vec<String>) {
        all.push(name(command).to_owned());
        for subcommand in command.get_subcommands().filter(|subcommand| !subcommand.is_hide_set()) {
            names(subcommand, all);
        }
    }

    fn rendered(help: &str) -> String {
        put_help(help).to_roff()
    }

    #[test]
    fn every_command_has_a_page_and_every_page_its_flags() {
        let place = tempfile::tempdir().unwrap();
        write_pages(&Pages { directory: place.path().join("man1") }).unwrap();
        let mut expected = Vec::new();
        names(&whole(), &mut expected);
        let mut found: Vec<_> = fs::read_dir(place.path().join("man1"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap().trim_end_matches(".1").to_owned())
            .collect();
        expected.sort();
        found.sort();
        assert_eq!(found, expected);
        assert!(found.contains(&"headwater-profile-show".to_owned()) && found.len() > 20, "{found:?}");
        for command in whole().get_subcommands() {
            let text = fs::read_to_string(place.path().join("man1").join(format!("{}.1", name(command)))).unwrap();
            for flag in command.get_arguments().filter(|argument| !argument.is_hide_set()) {
                let Some(long) = flag.get_long() else { continue };
                let flag = format!("\\-\\-{}", long.replace('-', "\\-"));
                assert!(text.contains(&flag), "{flag} is not in the page of {}", name(command));
            }
        }
    }

    #[test]
    fn examples_stand_as_they_were_typed() {
        let text = rendered("Examples:\n  one 'a'\n  .two\n\nA word.\nAnd more.\n\nExit status: 0 well,\n1 ill.");
        let lines: Vec<_> = text.lines().filter(|line| !line.starts_with(".ie") && !line.starts_with(".el")).collect();
        let at = |wanted: &str| lines.iter().position(|line| *line == wanted).unwrap_or_else(|| panic!("{text}"));
        assert!(at(".SH EXAMPLES") < at(".nf"));
        assert!(at(".nf") < at(".fi") && at(".fi") < at("A word. And more."));
        // A line that begins like a request of roff is none.
        assert!(lines.iter().any(|line| line.ends_with("&.two")), "{text}");
        assert!(at(".SH \"EXIT STATUS\"") < at("0 well, 1 ill."));
    }

    #[test]
    fn completions_know_commands_and_flags() {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "headwater", &mut text);
            let text = String::from_utf8(text).unwrap();
            for word in ["serve", "balance", "cache-size", "profile"] {
                assert!(text.contains(word), "{shell} does not know {word}");
            }
        }
    }
}
