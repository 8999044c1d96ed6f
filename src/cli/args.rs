//! What was typed. Nothing here looks at a file or a socket.

mod access;
mod daemon;
mod fill;
mod servers;
mod tls;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::prefetch::args::Prefetch;
use crate::control::AdminAddress;
use crate::image::Format;
use crate::mirror::CHUNK_SIZES;
use crate::mirror::policy::Kind as Policy;
use crate::nbd::Uri;
use crate::units::ByteSize;
pub(super) use access::AccessRules;
pub(super) use daemon::{Daemon, Logging};
pub(super) use fill::Fill;
pub(super) use servers::{RunningServer, Servers, TokenFile};
pub(super) use tls::Tls;

/// A tiered NBD server for people who start many machines from few disk images.
///
/// One server holds the real image. Mirrors start empty, fetch what their clients read, keep it, and serve it again.
#[derive(Debug, Parser)]
#[command(name = "headwater", version, max_term_width = 100, after_help = EXAMPLE)]
pub(super) struct Arguments {
    #[command(subcommand)]
    pub(super) command: Command,
    #[command(flatten)]
    pub(super) logging: Logging,
}

const EXAMPLE: &str = "\
Example: on the host with the image, on a host with many VMs, and in one of them:
  headwater serve debian12=debian12.raw --listen 0.0.0.0:10809
  headwater mirror debian12=nbd://first/debian12 --cache /var/cache/headwater
  qemu-system-x86_64 -drive file=nbd://localhost/debian12,format=raw,snapshot=on ...

Exit status: 0 when all went well, 1 on a failure, 2 when the command line makes no sense.";

const SERVE_EXAMPLES: &str = "\
Examples:
  headwater serve debian12.raw
  headwater serve root=/dev/vg0/root data=data.qcow2 --listen 0.0.0.0:10809
  headwater serve debian12.raw --read-only --unix /run/headwater.sock";

const MIRROR_EXAMPLES: &str = "\
Examples:
  headwater mirror debian12=nbd://first/debian12 --cache /var/cache/headwater
  headwater mirror nbd://first/debian12,nbd://spare/debian12 --cache /srv/cache
  headwater mirror nbd+unix:///root?socket=/run/a.sock --cache /srv/cache --unix /run/b.sock";

const INDEX_EXAMPLES: &str = "\
Examples:
  headwater index debian12.raw
  headwater index /srv/images/*.raw --rate 200M
  headwater index --json --threads 4 data.qcow2";

const INFO_EXAMPLES: &str = "\
Examples:
  headwater info nbd://second/debian12
  headwater info --json 'nbd+unix:///?socket=/run/headwater.sock'";

const STATUS_EXAMPLES: &str = "\
Examples:
  headwater status
  headwater status --json --at /run/headwater/4711.sock";

const PIN_EXAMPLES: &str = "\
Examples:
  headwater pin debian12
  headwater pin debian12 --range ..64M --range 1G..1.5G";

const UNPIN_EXAMPLES: &str = "\
Examples:
  headwater unpin debian12
  headwater unpin debian12 --range 1G..";

const VERIFY_EXAMPLES: &str = "\
Examples:
  headwater verify debian12
  headwater verify debian12 --rate 20M --no-repair
  headwater verify /srv/images/debian12.raw

Exit status: 0 when nothing is wrong, 3 when damage was found and all of it is repaired, 4 when damage
remains, 1 when it could not be found out, 2 when the command line makes no sense.";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Serve(Serve),
    Mirror(Mirror),
    Index(Index),
    Info(Info),
    Status(Status),
    Pin(Pin),
    Unpin(Unpin),
    Verify(Verify),
    Profile(super::profile::Profile),
    Prefetch(Box<Prefetch>),
    Cast(Box<super::cast::args::Cast>),
    Redirect(Box<super::redirect::args::Redirect>),
    Drain(super::drain::Drain),
    Attach(super::attach::Attach),
    Detach(super::attach::Detach),
    #[cfg(feature = "tui")]
    Top(super::top::Top),
    Balance(super::balance::Balance),
    Settings(super::settings::Settings),
    CheckConfig(super::config::CheckConfig),
    Man(super::manual::Pages),
    Completions(super::manual::Completions),
}

/// Serve real images: raw files, block devices, qcow2 files.
///
/// Prints one URI for each image once clients can connect, and runs until SIGTERM or SIGINT; then it answers what it
/// has received, flushes, and exits.
#[derive(Debug, Args)]
#[command(after_help = SERVE_EXAMPLES)]
pub(super) struct Serve {
    /// Images to serve. Without NAME, the name is that of the file without its extension. A path with a = in it is
    /// written with ./ or / in front.
    #[arg(required = true, value_name = "[NAME=]PATH")]
    pub(super) images: Vec<NamedPath>,
    /// Let nobody write. qcow2 files are read-only in any case.
    #[arg(short, long)]
    pub(super) read_only: bool,
    /// What the files hold.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) format: FormatArgument,
    /// Allow backing files of qcow2 images in this directory (repeatable); needs --format qcow2. Without it an image
    /// with a backing file is refused, because the name of that file is content of the image.
    #[arg(long, value_name = "DIR")]
    pub(super) backing: Vec<PathBuf>,
    /// Make missing manifests in the background (see headwater index); images announce their identity when theirs is
    /// there. Raw images need --read-only for that.
    #[arg(long)]
    pub(super) index: bool,
    /// How much of the images --index reads per second.
    #[arg(long, value_name = "SIZE", default_value = "100M", value_parser = positive_size)]
    pub(super) index_rate: u64,
    /// Where orders to move clients are written down, so that a restart does not forget them. [default: $STATE_DIRECTORY,
    /// else /var/lib/headwater for root, else headwater in $XDG_STATE_HOME or ~/.local/state]
    #[arg(long, value_name = "DIR")]
    pub(super) state: Option<PathBuf>,
    #[command(flatten)]
    pub(super) daemon: Daemon,
}

/// Serve images that are fetched from other servers as clients read them.
///
/// What was fetched is kept in the cache directory and served again, also after a restart and while the upstream is
/// away. Any NBD server can be the upstream: another mirror, nbdkit, qemu-nbd, nbd-server.
#[derive(Debug, Args)]
#[command(after_help = MIRROR_EXAMPLES)]
pub(super) struct Mirror {
    /// Images to mirror, each from one or more servers that hold it; the next is tried when one fails. Without NAME,
    /// the name is that of the first server's export.
    #[arg(required = true, value_name = "[NAME=]URI[,URI...]")]
    pub(super) images: Vec<NamedUris>,
    /// Where fetched data is kept, in one directory for each image.
    #[arg(long, value_name = "DIR")]
    pub(super) cache: PathBuf,
    /// The unit of fetching and keeping: a power of two from 4K to 4M. An existing cache keeps its own. [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = chunk_size)]
    pub(super) chunk_size: Option<u32>,
    /// Bytes that the cache may take on the disk, whatever happens: chunks, maps, and what is on its way. What does not
    /// fit pushes out what was used least, or is served without being kept. [default: as much as there is]
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    pub(super) cache_size: Option<u64>,
    /// Bytes of the cache's file system that are left free.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = size)]
    pub(super) reserve: u64,
    /// What goes first when the cache is full: the least recently used (lru), the least frequently used (lfu), or what
    /// was used once only (s3fifo).
    #[arg(long, value_name = "lru|lfu|s3fifo", default_value = "s3fifo")]
    pub(super) policy: Policy,
    /// Connections to the upstream of each image, if it allows more than one.
    #[arg(long, value_name = "N", default_value = "4", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) upstream_connections: u16,
    /// How long a read waits for an upstream that does not answer before it fails with an I/O error. Keep it under the
    /// time-out of the clients.
    #[arg(long, value_name = "SECONDS", default_value = "25", value_parser = seconds)]
    pub(super) upstream_timeout: Duration,
    #[command(flatten)]
    pub(super) fill: Fill,
    #[command(flatten)]
    pub(super) profile: super::profile::Recorded,
    #[command(flatten)]
    pub(super) receive: super::cast::args::Receive,
    #[command(flatten)]
    pub(super) daemon: Daemon,
}

/// Make the manifests of images: a digest of every chunk, and one over all, which is the identity of the image.
///
/// The manifest of PATH is PATH.manifest. A server that finds it announces the identity, as long as nobody changes the
/// image, and mirrors hold every chunk against it. Prints the identity and the path of each image. What an interrupted
/// run has done is kept, and the next one goes on from there.
#[derive(Debug, Args)]
#[command(after_help = INDEX_EXAMPLES)]
pub(super) struct Index {
    /// Raw files and qcow2 files without backing files. Nobody may write to them meanwhile.
    #[arg(required = true, value_name = "PATH")]
    pub(super) images: Vec<PathBuf>,
    /// The unit of digests: a power of two from 4K to 4M. Identities differ with it. [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = chunk_size)]
    pub(super) chunk_size: Option<u32>,
    /// Threads that read and hash. [default: one for each CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) threads: Option<u16>,
    /// How much to read per second. [default: all that there is to be had]
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    pub(super) rate: Option<u64>,
    /// Make it also where one is there that fits.
    #[arg(long)]
    pub(super) force: bool,
    /// What the files hold.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) format: FormatArgument,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
}

/// Show what a server offers: size, flags, block sizes, contexts; of a mirror, what is there.
#[derive(Debug, Args)]
#[command(after_help = INFO_EXAMPLES)]
pub(super) struct Info {
    /// The export, as nbd://HOST[:PORT]/NAME or nbd+unix:///NAME?socket=PATH; nbds:// and nbds+unix:// with TLS.
    pub(super) uri: Uri,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// For nbds://: ca-cert.pem to know the server by; client-cert.pem and client-key.pem if it wants to know us.
    #[arg(long, value_name = "DIR")]
    pub(super) tls_certificates: Option<PathBuf>,
    /// How long to wait for the server.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub(super) timeout: Duration,
}

/// Show what a running server does: its images, what is here of them, its upstreams, its clients.
#[derive(Debug, Args)]
#[command(after_help = STATUS_EXAMPLES)]
pub(super) struct Status {
    /// Print the JSON that the server sends.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

/// Keep an image, or parts of it, in the cache of a running mirror whatever happens.
///
/// What is here of it stays, and so does the rest once it was read; nothing is fetched for it now. Chunks are pinned as a
/// whole. Pins hold over restarts. More than the cache can keep (--cache-size, less what else cannot be evicted) is
/// refused.
#[derive(Debug, Args)]
#[command(after_help = PIN_EXAMPLES)]
pub(super) struct Pin {
    #[command(flatten)]
    pub(super) parts: Parts,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

/// Let an image, or parts of it, leave the cache again.
///
/// It stays until its place is needed.
#[derive(Debug, Args)]
#[command(after_help = UNPIN_EXAMPLES)]
pub(super) struct Unpin {
    #[command(flatten)]
    pub(super) parts: Parts,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

/// Check what a running server holds of an image, or the file of an image.
///
/// A mirror fetches again what is damaged. A real image, served or not, is held against the manifest that headwater
/// index has made, and cannot be repaired. Clients are served meanwhile. Ctrl-C ends the check.
#[derive(Debug, Args)]
#[command(after_help = VERIFY_EXAMPLES)]
pub(super) struct Verify {
    /// The name of an image, as headwater status has it; or the path of a file, which is checked without any server
    /// unless there is --at.
    #[arg(value_name = "IMAGE|PATH")]
    pub(super) image: String,
    /// Read so much in a second at most. [default: as fast as the disk allows]
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    pub(super) rate: Option<u64>,
    /// Count damage only. Files are never repaired.
    #[arg(long)]
    pub(super) no_repair: bool,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    /// Threads that read and hash, for a file that is raw. [default: one for each CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) threads: Option<u16>,
    /// What a file holds.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) format: FormatArgument,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

/// An image of a running server, or parts of it.
#[derive(Debug, Args)]
pub(super) struct Parts {
    /// The name of the image, as `headwater status` has it.
    pub(super) image: String,
    /// A part of the image (repeatable): A..B, A.. to its end, ..B from its beginning. [default: all of it]
    #[arg(long, value_name = "A..B")]
    pub(super) range: Vec<Span>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum FormatArgument {
    /// qcow2 if the file begins like one, else raw.
    Auto,
    /// The bytes of the image as they are.
    Raw,
    /// qcow2.
    Qcow2,
}

impl From<FormatArgument> for Format {
    fn from(choice: FormatArgument) -> Self {
        match choice {
            FormatArgument::Auto => Self::Auto,
            FormatArgument::Raw => Self::Raw,
            FormatArgument::Qcow2 => Self::Qcow2,
        }
    }
}

/// An image and its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NamedPath {
    pub(super) name: String,
    pub(super) path: PathBuf,
}

impl std::str::FromStr for NamedPath {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, path) = match text.split_once('=') {
            // What begins like a path is one, also if it has a `=` in it.
            Some((name, path)) if !name.starts_with(['/', '.']) => (Some(name), path),
            _ => (None, text),
        };
        if path.is_empty() {
            return Err("the path is missing".into());
        }
        let path = PathBuf::from(path);
        let name = match name {
            Some(name) => name.to_owned(),
            None => path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
        };
        Ok(Self { name: checked_name(name)?, path })
    }
}

/// Servers with one image, and its name here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NamedUris {
    pub(super) name: String,
    pub(super) uris: Vec<Uri>,
}

impl std::str::FromStr for NamedUris {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, uris) = match text.split_once('=') {
            // The `=` of `?socket=PATH` comes behind a scheme.
            Some((name, uris)) if !name.contains("://") => (Some(name), uris),
            _ => (None, text),
        };
        let uris = Uri::parse_list(uris).map_err(|error| error.to_string())?;
        let name = name.map_or_else(|| uris.first().map_or_else(String::new, |uri| uri.export.clone()), str::to_owned);
        Ok(Self { name: checked_name(name)?, uris })
    }
}

/// Whether and where there is an admin API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum AdminChoice {
    None,
    At(AdminAddress),
}

impl std::str::FromStr for AdminChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "none" {
            return Ok(Self::None);
        }
        let address: AdminAddress =
            text.parse().map_err(|error: crate::control::place::ParseAdminError| error.to_string())?;
        if matches!(address, AdminAddress::Tcp(_)) && address.socket().is_none() {
            return Err("a server listens on an address, as in 0.0.0.0:9000, not on a name".to_owned());
        }
        Ok(Self::At(address))
    }
}

/// A part of an image whose size is not known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Span {
    /// Its first byte.
    pub(super) start: u64,
    /// One past its last byte; the end of the image if there is none.
    pub(super) end: Option<u64>,
}

impl std::str::FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (start, end) = text.split_once("..").ok_or("write A..B, A.. or ..B, with sizes such as 1G")?;
        if start.is_empty() && end.is_empty() {
            return Err("leave --range away for all of the image".into());
        }
        let size = |text: &str| match text.parse() {
            Ok(ByteSize(bytes)) => Ok(bytes),
            Err(error) => Err(format!("{text:?}: {error}")),
        };
        let start = if start.is_empty() { 0 } else { size(start)? };
        let end = if end.is_empty() { None } else { Some(size(end)?) };
        if end.is_some_and(|end| end <= start) {
            return Err("the range is empty: it begins where it ends, or later".into());
        }
        Ok(Self { start, end })
    }
}

/// What the protocol allows as the name of an export.
fn checked_name(name: String) -> Result<String, String> {
    if name.len() > crate::nbd::wire::MAX_STRING {
        return Err("the name has more than 4096 bytes".into());
    }
    Ok(name)
}

fn chunk_size(text: &str) -> Result<u32, String> {
    let ByteSize(bytes) = text.parse().map_err(|error: crate::units::ParseSizeError| error.to_string())?;
    u32::try_from(bytes)
        .ok()
        .filter(|size| size.is_power_of_two() && CHUNK_SIZES.contains(size))
        .ok_or_else(|| "a chunk is a power of two from 4K to 4M".to_owned())
}

fn size(text: &str) -> Result<u64, String> {
    let ByteSize(bytes) = text.parse().map_err(|error: crate::units::ParseSizeError| error.to_string())?;
    Ok(bytes)
}

/// Also a rate, in bytes a second.
pub(super) fn positive_size(text: &str) -> Result<u64, String> {
    size(text).and_then(|bytes| if bytes == 0 { Err("more than nothing".to_owned()) } else { Ok(bytes) })
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "not a number of seconds".to_owned())?;
    Duration::try_from_secs_f64(seconds)
        .ok()
        .filter(|duration| !duration.is_zero() && duration.as_secs() <= 24 * 60 * 60)
        .ok_or_else(|| "more than nothing and at most a day".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn images_are_named_or_take_the_name_of_their_file() {
        for (text, name, path) in [
            ("debian12=images/d.raw", "debian12", "images/d.raw"),
            ("images/d.raw", "d", "images/d.raw"),
            ("/dev/vda", "vda", "/dev/vda"),
            ("./a=b.raw", "a=b", "./a=b.raw"),
            ("/srv/a=b.raw", "a=b", "/srv/a=b.raw"),
            ("os/debian=d.raw", "os/debian", "d.raw"),
            ("=d.raw", "", "d.raw"),
            ("x=a=b", "x", "a=b"),
        ] {
            assert_eq!(text.parse(), Ok(NamedPath { name: name.into(), path: path.into() }), "{text}");
        }
        assert!("x=".parse::<NamedPath>().is_err());
    }

    #[test]
    fn mirrors_are_named_or_take_the_name_of_the_export() {
        for (text, name, count) in [
            ("d=nbd://a/x", "d", 1),
            ("nbd://a/x,nbd://b/y", "x", 2),
            ("nbd+unix:///x?socket=/s", "x", 1),
            ("d=nbd+unix:///x?socket=/s,nbd://b/y", "d", 2),
            ("nbd://a", "", 1),
        ] {
            let parsed: NamedUris = text.parse().unwrap();
            assert_eq!((parsed.name.as_str(), parsed.uris.len()), (name, count), "{text}");
        }
        assert!("d=a.raw".parse::<NamedUris>().is_err());
    }

    #[test]
    fn ranges_may_lack_an_end() {
        let span = |start, end| Ok(Span { start, end });
        for (text, parsed) in [
            ("1G..2G", span(1 << 30, Some(2 << 30))),
            ("0..1", span(0, Some(1))),
            ("64K..", span(65_536, None)),
            ("..1.5M", span(0, Some(3 << 19))),
        ] {
            assert_eq!(text.parse(), parsed, "{text}");
        }
        for text in ["", "..", "1G", "2G..1G", "1..1", "..0", "a..b", "1...2", "1..2..3", "-1..2"] {
            assert!(text.parse::<Span>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_admin_api_is_somewhere_or_nowhere() {
        assert_eq!("none".parse(), Ok(AdminChoice::None));
        assert_eq!("/run/a".parse(), Ok(AdminChoice::At(AdminAddress::Unix("/run/a".into()))));
        assert!("0.0.0.0:1".parse::<AdminChoice>().is_ok() && "localhost:1".parse::<AdminChoice>().is_ok());
        assert!("server2:1".parse::<AdminChoice>().unwrap_err().contains("not on a name"));
        assert_eq!(positive_size("1M"), Ok(1 << 20));
        assert!(positive_size("0").is_err() && positive_size("fast").is_err());
    }

    #[test]
    fn chunk_sizes_and_seconds_are_checked() {
        assert_eq!(chunk_size("64K"), Ok(65_536));
        assert_eq!(chunk_size("4M"), Ok(4 << 20));
        for text in ["2K", "8M", "65000", "64X", ""] {
            assert!(chunk_size(text).is_err(), "{text}");
        }
        assert_eq!(positive_size("100M"), Ok(100 << 20));
        assert!(positive_size("0").is_err() && positive_size("fast").is_err());
        assert_eq!(seconds("0.5"), Ok(Duration::from_millis(500)));
        for text in ["0", "-1", "NaN", "inf", "100000", "x"] {
            assert!(seconds(text).is_err(), "{text}");
        }
    }
}
