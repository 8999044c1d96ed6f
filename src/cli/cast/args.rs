//! What `headwater cast` is told, and what `headwater mirror` is told of casts.

use std::time::Duration;

use clap::Args;

use crate::cli::args::{RunningServer, Span, positive_size};
use crate::cli::prefetch::when::{When, length_of_time};
use crate::control::mirrors::Hear;
use crate::net::multicast::Group;

const EXAMPLES: &str = "\
Examples:
  headwater cast debian12
  headwater cast debian12 --group 239.1.2.3:7000 --interface eth1 --rate 100M
  headwater cast debian12 --profile boot --by 09:00
  headwater cast debian12 --wait-for 40 --patience 10m
  headwater cast debian12 --carousel --no-wait
  headwater cast --list
  headwater cast --cancel 7

Exit status: 0 when all receivers have everything; 1 when it was refused or has failed; 2 when the command line
makes no sense; 3 when some were left to their upstreams, or nobody came; 4 when it was called off; 5 when Ctrl-C ended
the waiting: it goes on.";

/// Send an image to many mirrors at once, by multicast.
///
/// The server sends the image once, however many mirrors listen. Mirrors that fetch it from this server, or from a mirror of it,
/// are told where to listen; others listen where their --join says. They go on serving meanwhile, check every chunk
/// against the manifest, and skip what they have. What is lost on the way is mended by parity, sent again if many lack
/// it, and fetched from the upstream otherwise: in the end every mirror has everything, whatever happens here.
///
/// The image needs a manifest (headwater index). What earlier runs read goes first, zeroes are never sent.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct Cast {
    /// The name of the image, as headwater status has it.
    #[arg(required_unless_present_any = ["list", "cancel"])]
    pub(super) image: Option<String>,
    /// The group to send to, as in 239.1.2.3:7000 or [ff15::7]:7000. [default: one in 239.192.0.0/14, made of the
    /// identity of the image, at port 10809]
    #[arg(long, value_name = "GROUP:PORT")]
    pub(super) group: Option<Group>,
    /// The interface to send by: its name, or an address of it. [default: as the route to the group says]
    #[arg(long, value_name = "IF")]
    pub(super) interface: Option<String>,
    /// Networks that it may cross, the first included: routers forward what has more than 1.
    #[arg(long, value_name = "N", default_value = "1")]
    pub(super) ttl: u8,
    /// Bytes of the longest packet that the way takes. [default: what the interface takes, 1500 at most]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(576..))]
    pub(super) mtu: Option<u16>,
    /// Bytes per second, at most. With a deadline it is as slow as that allows. [default: 12M, about 100 Mbit/s]
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    pub(super) rate: Option<u64>,
    /// It becomes so slow for receivers that cannot keep up, at least; who cannot take that is left to its upstream.
    /// [default: a quarter of the rate]
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    pub(super) min_rate: Option<u64>,
    /// A part of the image (repeatable): A..B, A.. to its end, ..B from its beginning.
    #[arg(long, value_name = "A..B", conflicts_with_all = ["profile", "all"])]
    pub(super) range: Vec<Span>,
    /// What clients read in earlier runs, as the profile with this tag has it, and nothing else.
    #[arg(long, value_name = "TAG", num_args = 0..=1, default_missing_value = "boot", conflicts_with = "all")]
    pub(super) profile: Option<String>,
    /// All of the image, what clients read in earlier runs first. This is what happens without --range and --profile.
    #[arg(long)]
    pub(super) all: bool,
    /// How much parity is sent before anybody asks for it: auto for what the losses make sensible, or N% of the data.
    #[arg(long, value_name = "auto|N%", default_value = "auto", value_parser = repair)]
    pub(super) repair: Repair,
    /// Receivers to wait for before it begins. [default: as many as are told of it, one at least]
    #[arg(long, value_name = "N")]
    pub(super) wait_for: Option<u32>,
    /// How long to wait for them; then it begins with those that came, or ends if nobody did. [default: 5s, with
    /// --wait-for 5m]
    #[arg(long, value_name = "TIME", value_parser = length_of_time)]
    pub(super) patience: Option<Duration>,
    /// Go on until it is called off, sending what receivers lack that come late.
    #[arg(long)]
    pub(super) carousel: bool,
    /// When it is to be everywhere: 09:00 (the next time that it is nine here), 2026-11-22T09:00, or with a zone, as in
    /// 2026-11-22T09:00Z.
    #[arg(long, value_name = "TIME", conflicts_with = "within")]
    pub(super) by: Option<When>,
    /// In what time it is to be everywhere, as in 20s, 10m or 1h30m.
    #[arg(long, value_name = "TIME", value_parser = length_of_time)]
    pub(super) within: Option<Duration>,
    /// Tell no mirror: only those receive it that listen to the group already (headwater mirror --join).
    #[arg(long)]
    pub(super) no_tell: bool,
    /// Do not wait for its end.
    #[arg(long)]
    pub(super) no_wait: bool,
    /// Show the casts of a server: those at work and the last that ended.
    #[arg(long, conflicts_with_all = ["image", "cancel"])]
    pub(super) list: bool,
    /// Call a cast off. Mirrors fetch what they lack from their upstreams.
    #[arg(long, value_name = "CAST", conflicts_with = "image")]
    pub(super) cancel: Option<u64>,
    /// Print JSON.
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    pub(super) server: RunningServer,
}

/// Parity, in per cent of the data; or none is named.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Repair(pub(super) Option<f64>);

fn repair(text: &str) -> Result<Repair, String> {
    if text == "auto" {
        return Ok(Repair(None));
    }
    let percent = text.strip_suffix('%').and_then(|number| number.parse::<f64>().ok());
    let percent = percent.filter(|percent| (0.0..=100.0).contains(percent));
    percent.map(|percent| Repair(Some(percent))).ok_or_else(|| "write auto, or 0% to 100%".to_owned())
}

/// What `headwater mirror` hears.
#[derive(Debug, Args)]
#[command(next_help_heading = "Casts")]
pub(in crate::cli) struct Receive {
    /// Listen to a group for images that are sent there (repeatable), as in 239.1.2.3:7000.
    #[arg(long, value_name = "GROUP:PORT")]
    join: Vec<Group>,
    /// The interface to listen on: its name, or an address of it. [default: as the route to the group says]
    #[arg(long, value_name = "IF")]
    interface: Option<String>,
    /// Do not listen to groups that the upstream names when it sends an image there.
    #[arg(long)]
    no_casts: bool,
}

impl From<Receive> for Hear {
    fn from(receive: Receive) -> Self {
        let Receive { mut join, interface, no_casts } = receive;
        join.sort_unstable();
        join.dedup();
        Self { join, interface, by_word: !no_casts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parity_is_left_to_the_server_or_a_share() {
        assert_eq!(repair("auto"), Ok(Repair(None)));
        assert_eq!(repair("7.5%"), Ok(Repair(Some(7.5))));
        for text in ["", "5", "%", "-1%", "101%", "NaN%", "none"] {
            assert!(repair(text).is_err(), "{text}");
        }
    }

    #[test]
    fn groups_are_joined_once() {
        let group: Group = "239.1.2.3:7".parse().unwrap();
        let hear: Hear = Receive { join: vec![group, group], interface: None, no_casts: true }.into();
        assert_eq!((hear.join, hear.by_word), (vec![group], false));
    }
}
