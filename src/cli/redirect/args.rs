//! What `headwater redirect` is told.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::cli::args::RunningServer;
use crate::nbd::Uri;

const EXAMPLES: &str = "\
Examples: at the server that the clients are to leave, on the host of a virtual machine, and on that of a device:
  headwater redirect debian12 --to nbd://second/debian12 --fraction 50%
  headwater redirect debian12 --to nbd://second/debian12 --clients 3,7 --way relay --wait
  headwater redirect debian12 --to nbd://first/debian12   (at the first: relayed clients are served from there again)
  headwater redirect --qmp /run/vm1.qmp --to nbd://second/debian12
  headwater redirect --device /dev/nbd0 --to nbd://second/debian12
  headwater redirect --list
  headwater redirect --cancel 7

Exit status: 0 when it is ordered and, with --wait, all clients were moved; 1 when it was refused or has failed;
2 when the command line makes no sense; 3 when some clients could not be moved and are served as before;
4 when it was cancelled; 5 when Ctrl-C ended the waiting: the order goes on.";

/// Move connected clients to another server, while they run.
///
/// The other server is asked first: it must have the same image (size, flags, identity). Clients that it cannot take
/// stay where they are.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct Redirect {
    /// The export whose clients are to move, as headwater status has it.
    #[arg(required_unless_present_any = ["list", "cancel", "qmp", "device"], conflicts_with_all = ["list", "cancel", "qmp"])]
    pub(super) export: Option<String>,
    /// Where to: the same image on another server. With several, the next is used when one fails.
    #[arg(long, value_name = "URI", value_delimiter = ',', required_unless_present_any = ["list", "cancel"])]
    pub(super) to: Vec<Uri>,
    /// These clients, by their numbers in headwater status. Any connection of a mirror stands for the mirror.
    #[arg(long, value_name = "ID", value_delimiter = ',', conflicts_with_all = ["fraction", "count", "all"])]
    pub(super) clients: Vec<u64>,
    /// This part of them, as in 50% or 0.5.
    #[arg(long, value_name = "PART", value_parser = fraction, conflicts_with_all = ["count", "all"])]
    pub(super) fraction: Option<f64>,
    /// So many of them.
    #[arg(long, value_name = "N", conflicts_with = "all")]
    pub(super) count: Option<u64>,
    /// All of them. This is what happens without --clients, --fraction and --count.
    #[arg(long)]
    pub(super) all: bool,
    /// How. By itself: mirrors are told (notice), everybody else is served from the new server over this one (relay).
    /// qmp and kernel are ordered on the client's own host, with --qmp and --device.
    #[arg(long, value_enum, default_value = "auto")]
    pub(super) way: Way,
    /// Also when the other server does not say what it holds, or would lose something: the refusal says what.
    #[arg(long)]
    pub(super) force: bool,
    /// Wait until it is done, and tell what came of each client. Ctrl-C ends the waiting, not the order.
    #[arg(long)]
    pub(super) wait: bool,
    /// The monitor of a virtual machine on this host, or a directory of such sockets (repeatable).
    #[arg(long, value_name = "SOCKET", conflicts_with_all = ["clients", "fraction", "count", "all"])]
    pub(super) qmp: Vec<PathBuf>,
    /// With --qmp the disks with these names; without it, a device of the kernel on this host, as /dev/nbd0.
    #[arg(long, value_name = "ID|/dev/nbdN", conflicts_with_all = ["clients", "fraction", "count", "all"])]
    pub(super) device: Vec<String>,
    /// With --device: the server that it is at, if another program than headwater attached it.
    #[arg(long, value_name = "URI", requires = "device", conflicts_with = "qmp")]
    pub(super) from: Option<Uri>,
    /// Show the orders of a server: those at work and the last that ended.
    #[arg(long, conflicts_with_all = ["to", "cancel", "wait"])]
    pub(super) list: bool,
    /// Call an order off. Clients that were moved stay where they are.
    #[arg(long, value_name = "ORDER", conflicts_with_all = ["to", "wait"])]
    pub(super) cancel: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

/// How clients are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Way {
    /// The best that each has.
    Auto,
    /// Mirrors are told.
    Notice,
    /// qemu is told, by its monitor.
    Qmp,
    /// The kernel is told, by netlink.
    Kernel,
    /// They stay connected here, and are served from there.
    Relay,
    /// Their connections are closed when all is answered: for clients that reconnect by themselves.
    Close,
}

fn fraction(text: &str) -> Result<f64, String> {
    let (number, scale) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 100.0));
    let part = number.parse::<f64>().map_err(|_| "write a part as in 50% or 0.5".to_owned())? / scale;
    if part > 0.0 && part <= 1.0 { Ok(part) } else { Err("a part is more than nothing and at most all".to_owned()) }
}
