//! What `headwater prefetch` is told.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::when::{When, length_of_time};
use crate::cli::args::{RunningServer, Span, positive_size};
use crate::control::AdminAddress;
use crate::fill::deadline::Strategy;
use crate::nbd::Uri;

const EXAMPLES: &str = "\
Examples:
  headwater prefetch debian12 --wait
  headwater prefetch debian12 --range ..512M --rate 20M
  headwater prefetch debian12 --profile --by 09:00
  headwater prefetch debian12 --in 10m --strategy jit
  headwater prefetch --from tonight.txt --wait
  headwater prefetch debian12 --all --to /run/hw/a.sock,/run/hw/b.sock --wait
  headwater prefetch --list
  headwater prefetch --cancel 7

A file for --from has the arguments of one prefetch on each line; a # begins a comment:
  debian12 --profile --by 09:00 --at /run/hw/a.sock
  'windows 11' --range ..4G --by 09:15 --at /run/hw/b.sock

Exit status: 0 when it is ordered and, with --wait, here; 1 when something was refused or has failed; 2 when the
command line makes no sense; 3 when an order will miss its deadline, or has missed it; 4 when an order that was
waited for has been cancelled; 5 when Ctrl-C ended the waiting: the order goes on.";

/// Have a running mirror fetch an image, or parts of it, before anybody reads it.
///
/// The order is kept by the server: it goes on when this command ends and when the server is restarted, waits while the
/// upstream is away, and always lets clients go first. What was fetched is not pinned: where --cache-size bounds the
/// cache it may leave again (headwater pin keeps it). What can never fit is refused.
///
/// With --by or --in the server orders its work by deadlines, and says at once which orders it expects to be late.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct Prefetch {
    /// The name of the image, as headwater status has it.
    #[arg(required_unless_present_any = ["from", "list", "cancel"])]
    pub(super) image: Option<String>,
    /// A part of the image (repeatable): A..B, A.. to its end, ..B from its beginning.
    #[arg(long, value_name = "A..B", conflicts_with_all = ["profile", "all"])]
    pub(super) range: Vec<Span>,
    /// What clients read in earlier runs, as the profile with this tag has it.
    #[arg(long, value_name = "TAG", num_args = 0..=1, default_missing_value = "boot", conflicts_with = "all")]
    pub(super) profile: Option<String>,
    /// All of the image. This is what happens without --range and --profile.
    #[arg(long)]
    pub(super) all: bool,
    /// Bytes per second at most. [default: what clients and other orders leave]
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    pub(super) rate: Option<u64>,
    /// When it is to be here: 09:00 (the next time that it is nine here), 2026-11-22T09:00, or with a zone, as in
    /// 2026-11-22T09:00Z.
    #[arg(long, value_name = "TIME", conflicts_with = "within")]
    pub(super) by: Option<When>,
    /// In what time it is to be here, as in 20s, 10m or 1h30m.
    #[arg(long = "in", id = "within", value_name = "TIME", value_parser = length_of_time)]
    pub(super) within: Option<Duration>,
    /// How the time until a deadline is used: as late as possible (jit), at once (aggressive), or as others' deadlines
    /// allow (hybrid).
    #[arg(long, value_name = "jit|aggressive|hybrid", value_parser = Strategy::from_str)]
    pub(super) strategy: Option<Strategy>,
    /// Wait until it is here.
    #[arg(long)]
    pub(super) wait: bool,
    /// Deploy to these mirrors instead, each of which fetches from another one of them, so that the image crosses the
    /// way from its origin about once: admin addresses, with the URI of the mirror's export where it cannot be reached
    /// at the place that it names itself. All must have the same image, with a manifest.
    #[arg(long, value_name = "ADDR[=URI]", value_delimiter = ',', conflicts_with = "at")]
    pub(super) to: Vec<Target>,
    /// From which mirror each fetches: from the one before it, or from one above it that serves two.
    #[arg(long, value_enum, default_value = "chain", requires = "to")]
    pub(super) shape: Shape,
    /// Read many orders from a file, - for the standard input. All are given before the first is waited for.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["image", "range", "profile", "all", "rate", "by", "within", "strategy", "to"])]
    pub(super) from: Option<PathBuf>,
    /// Show the orders of a server: those at work and the last that ended.
    #[arg(long, conflicts_with_all = ["image", "from", "range", "profile", "all", "rate", "by", "within", "strategy", "to", "wait", "cancel"])]
    pub(super) list: bool,
    /// Call an order off. What has come stays.
    #[arg(long, value_name = "ORDER", conflicts_with_all = ["image", "from", "range", "profile", "all", "rate", "by", "within", "strategy", "to", "wait"])]
    pub(super) cancel: Option<u64>,
    /// Print JSON: an object for one order, an array for several.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

/// From whom each of several mirrors fetches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Shape {
    /// From the one before it.
    Chain,
    /// From one that serves two.
    Tree,
}

impl Shape {
    /// The mirror that number `index` fetches from; the first has none.
    pub(super) fn parent(self, index: usize) -> Option<usize> {
        let before = index.checked_sub(1)?;
        Some(match self {
            Self::Chain => before,
            Self::Tree => before / 2,
        })
    }
}

/// A mirror to deploy to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::cli) struct Target {
    /// Its admin API.
    pub(in crate::cli) address: AdminAddress,
    /// How other mirrors reach its export.
    pub(in crate::cli) uri: Option<Uri>,
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The `=` of `?socket=PATH` comes behind a scheme, and paths may have one too.
        let scheme = text.find("://").unwrap_or(0);
        let (address, uri) = match text[..scheme].rfind('=') {
            Some(at) => (
                &text[..at],
                Some(text[at + 1..].parse().map_err(|error: crate::nbd::uri::ParseUriError| error.to_string())?),
            ),
            None => (text, None),
        };
        if address.contains("://") {
            return Err("this is the URI of an export: write ADDR=URI, with the admin address in front".to_owned());
        }
        let address = address.parse().map_err(|error: crate::control::place::ParseAdminError| error.to_string())?;
        Ok(Self { address, uri })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_may_say_how_they_are_reached() {
        let of = |text: &str| {
            text.parse::<Target>().map(|target| (target.address.to_string(), target.uri.map(|uri| uri.to_string())))
        };
        let plain = |address: &str| Ok((address.to_owned(), None));
        let with = |address: &str, uri: &str| Ok((address.to_owned(), Some(uri.to_owned())));
        assert_eq!(of("/run/a.sock"), plain("/run/a.sock"));
        assert_eq!(of("/run/a=b.sock"), plain("/run/a=b.sock"));
        assert_eq!(of("127.0.0.1:9"), plain("127.0.0.1:9"));
        assert_eq!(of("/run/a=b.sock=nbd://host/x"), with("/run/a=b.sock", "nbd://host/x"));
        assert_eq!(of("127.0.0.1:9=nbd+unix:///x?socket=/s"), with("127.0.0.1:9", "nbd+unix:///x?socket=/s"));
        for text in ["", "a", "nbd://host/x", "/run/a=http://x"] {
            assert!(of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn each_mirror_has_one_to_fetch_from() {
        let parents = |shape: Shape| (0..7).map(|index| shape.parent(index)).collect::<Vec<_>>();
        assert_eq!(parents(Shape::Chain), [None, Some(0), Some(1), Some(2), Some(3), Some(4), Some(5)]);
        assert_eq!(parents(Shape::Tree), [None, Some(0), Some(0), Some(1), Some(1), Some(2), Some(2)]);
    }
}
