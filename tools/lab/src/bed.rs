//! Hosts that are network namespaces, and the links between them.
//!
//! ```text
//!   origin 10.211.0.1 ──┐
//!   mirror 10.211.0.10 ─┤ switch: a bridge, in a namespace of its own
//!   mirror 10.211.0.11 ─┘
//! ```
//!
//! A host sends no more than the link's rate: a token bucket (`tc-tbf(8)`) is on its end of the cable. The latency is a
//! proxy in front of the origin ([`crate::delay`]): the kernels of small machines often have no `netem`. Losses are made by
//! `nft(8)` where packets come in. Groups are reached over the cable, and the switch hands what is for them to everybody.
//!
//! Namespaces have this process's number in their names. They are removed when the bed is dropped, and those of processes
//! that were killed when the next bed is made.

use std::fmt::{self, Write};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, ensure};
use load::children::{self, Cpus};
use serde::Serialize;

/// What the names of all namespaces begin with.
const PREFIX: &str = "headwater-lab-";
/// A packet may wait so long in the bucket's queue before it is dropped. The sockets of the host itself do not let more
/// wait than some packets each, so this is hardly reached.
const QUEUE: &str = "50ms";
/// What may go at once: one packet as the kernel hands it over, before it is cut up.
const BURST: &str = "64kb";

/// Bits per second; 0 is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Rate(pub(crate) u64);

impl FromStr for Rate {
    type Err = String;

    /// As in `200M`, which is 200 000 000 bits per second.
    fn from_str(text: &str) -> Result<Self, String> {
        let (digits, factor) = match text.chars().last() {
            Some('K' | 'k') => (&text[..text.len() - 1], 1000),
            Some('M') => (&text[..text.len() - 1], 1_000_000),
            Some('G') => (&text[..text.len() - 1], 1_000_000_000),
            _ => (text, 1),
        };
        let number = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        number.map(Self).ok_or_else(|| format!("`{text}` is no rate such as 200M or 1G"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            0 => f.write_str("no limit"),
            bits if bits % 1_000_000 == 0 => write!(f, "{} Mbit/s", bits / 1_000_000),
            bits => write!(f, "{bits} bit/s"),
        }
    }
}

/// What a cable is like.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Link {
    /// What a host can send.
    pub(crate) rate: Rate,
    /// Both ways together, between the origin and the others.
    pub(crate) latency: Duration,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {:?}", self.rate, self.latency)
    }
}

/// A network namespace with an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host {
    namespace: String,
    pub(crate) address: Ipv4Addr,
}

impl Host {
    /// A command that runs here, and ends with us.
    pub(crate) fn command(&self, program: &Path) -> Command {
        let mut command = children::command(Cpus::Free, "nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace)).arg("--").arg(program);
        command
    }

    /// Bytes that it has sent over its cable, headers included.
    pub(crate) fn sent_bytes(&self) -> anyhow::Result<u64> {
        let text = output(self.command(Path::new("cat")).arg("/proc/net/dev"))?;
        sent(&text, CABLE).context("/proc/net/dev has no line for the cable")
    }

    /// From now on it sends so much at most, with a queue of 400 ms.
    pub(crate) fn limit(&self, rate: Rate) -> anyhow::Result<()> {
        if rate.0 == 0 {
            // There may be none.
            let _ = output(Command::new("tc").args(["-n", &self.namespace, "qdisc", "del", "dev", CABLE, "root"]));
            return Ok(());
        }
        tbf(&self.namespace, "replace", rate, "16kb", "400ms")
    }

    /// Large packets are cut up before they are on the cable, as a network card does it. Cables between namespaces carry
    /// them whole otherwise, and a loss would take many datagrams at once.
    pub(crate) fn cut_packets(&self) -> anyhow::Result<()> {
        ip(&self.namespace, &format!("link set dev {CABLE} gso_max_segs 1"))
    }

    /// From now on it loses what comes in, at random.
    pub(crate) fn lose(&self, loss: Loss) -> anyhow::Result<()> {
        let mut rules = String::from("add table inet lab; delete table inet lab");
        if loss.permille > 0 {
            let which = if loss.everything { "" } else { "meta l4proto udp ip daddr 224.0.0.0/4 " };
            write!(
                rules,
                "; add table inet lab; add chain inet lab input {{ type filter hook input priority 0; }}; \
                 add rule inet lab input iifname {CABLE} {which}numgen random mod 1000 < {} drop",
                loss.permille
            )?;
        }
        output(self.command(Path::new("nft")).arg(rules)).map(drop)
    }
}

/// What a host loses of what comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Loss {
    /// Packets of a thousand.
    pub(crate) permille: u32,
    /// All kinds of packets, and not only those to groups.
    pub(crate) everything: bool,
}

/// The end of the cable in each host.
pub(crate) const CABLE: &str = "cable";

/// The bytes sent by a device, of the text of `/proc/net/dev`: the ninth figure.
fn sent(text: &str, device: &str) -> Option<u64> {
    let figures = text.lines().find_map(|line| line.trim_start().strip_prefix(device)?.strip_prefix(':'))?;
    figures.split_whitespace().nth(8)?.parse().ok()
}

/// All hosts. Removes them at the end, so it must be dropped after the processes in them.
#[derive(Debug)]
pub(crate) struct Bed {
    /// What its cables are like.
    pub(crate) link: Link,
    /// Where the image is.
    pub(crate) origin: Host,
    /// The others.
    pub(crate) mirrors: Vec<Host>,
    _namespaces: Namespaces,
}

impl Bed {
    /// Makes an origin and so many other hosts.
    pub(crate) fn new(link: Link, mirrors: u8) -> anyhow::Result<Self> {
        remove_leftovers();
        ensure!(mirrors <= 100, "at most 100 mirrors");
        let mut namespaces = Namespaces::default();
        let switch = namespaces.add("switch")?;
        ip(&switch, "link add bridge type bridge mcast_snooping 0")?;
        ip(&switch, "link set bridge up")?;
        let mut host = |name: String, number| -> anyhow::Result<Host> {
            let namespace = namespaces.add(&name)?;
            let host = Host { namespace, address: Ipv4Addr::new(10, 211, 0, number) };
            plug(&switch, &name, &host, link.rate)?;
            Ok(host)
        };
        let origin = host("origin".into(), 1)?;
        let mirrors = (0..mirrors).map(|index| host(format!("mirror{index}"), 10 + index)).collect::<Result<_, _>>()?;
        Ok(Self { link, origin, mirrors, _namespaces: namespaces })
    }
}

/// Puts a cable between a host and a port of the switch.
fn plug(switch: &str, port: &str, host: &Host, rate: Rate) -> anyhow::Result<()> {
    ip(switch, &format!("link add {port} type veth peer name {CABLE} netns {}", host.namespace))?;
    ip(switch, &format!("link set {port} master bridge up"))?;
    ip(&host.namespace, &format!("addr add {}/24 dev {CABLE}", host.address))?;
    ip(&host.namespace, "link set lo up")?;
    ip(&host.namespace, &format!("link set {CABLE} up"))?;
    ip(&host.namespace, &format!("route add 224.0.0.0/4 dev {CABLE}"))?;
    if rate.0 > 0 {
        tbf(&host.namespace, "add", rate, BURST, QUEUE)?;
    }
    Ok(())
}

/// Puts a token bucket before a host's cable.
fn tbf(namespace: &str, verb: &str, rate: Rate, burst: &str, queue: &str) -> anyhow::Result<()> {
    let words = format!("qdisc {verb} dev {CABLE} root tbf rate {}bit burst {burst} latency {queue}", rate.0);
    output(Command::new("tc").args(["-n", namespace]).args(words.split(' '))).map(drop)
}

#[derive(Debug, Default)]
struct Namespaces(Vec<String>);

impl Namespaces {
    fn add(&mut self, name: &str) -> anyhow::Result<String> {
        let name = format!("{PREFIX}{}-{name}", std::process::id());
        output(Command::new("ip").args(["netns", "add", &name]))?;
        self.0.push(name.clone());
        Ok(name)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        self.0.iter().for_each(|name| remove(name));
    }
}

/// What cannot be removed will be tried again by the next bed.
fn remove(namespace: &str) {
    let _ = Command::new("ip").args(["netns", "del", namespace]).output();
}

/// Removes what lab processes left that were killed.
fn remove_leftovers() {
    let Ok(text) = output(Command::new("ip").args(["netns", "list"])) else { return };
    let dead = |pid: u32| !Path::new(&format!("/proc/{pid}")).exists();
    text.lines().filter_map(|line| line.split_whitespace().next()).for_each(|name| {
        if owner(name).is_some_and(dead) {
            remove(name);
        }
    });
}

/// The number of the process that made a namespace, if it is one of ours.
fn owner(namespace: &str) -> Option<u32> {
    namespace.strip_prefix(PREFIX)?.split_once('-')?.0.parse().ok()
}

fn ip(namespace: &str, words: &str) -> anyhow::Result<()> {
    output(Command::new("ip").args(["-n", namespace]).args(words.split(' '))).map(drop)
}

/// Runs a command to its end.
pub(crate) fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("{:?}", command.get_program()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {} {}{text}", output.status, complaint);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_decimal() {
        assert_eq!("200M".parse(), Ok(Rate(200_000_000)));
        assert_eq!("1G".parse(), Ok(Rate(1_000_000_000)));
        assert_eq!(("0".parse(), "64k".parse()), (Ok(Rate(0)), Ok(Rate(64_000))));
        for text in ["", "M", "-1", "2.5G", "200Mbit", "99999999999G"] {
            assert!(text.parse::<Rate>().is_err(), "{text}");
        }
        assert_eq!((Rate(200_000_000).to_string(), Rate(0).to_string()), ("200 Mbit/s".into(), "no limit".into()));
    }

    #[test]
    fn only_our_own_namespaces_have_an_owner() {
        assert_eq!(owner("headwater-lab-4711-mirror0"), Some(4711));
        for name in ["headwater-lab-", "headwater-lab-x-origin", "other-4711-origin", "headwater-lab-4711"] {
            assert_eq!(owner(name), None, "{name}");
        }
    }

    #[test]
    fn what_was_sent_is_the_ninth_figure() {
        let text = "Inter-|   Receive\n face |bytes\n    lo:  1 2 3 4 5 6 7 8 9 10\n cable: 11 2 3 4 5 6 7 8 99 10\n";
        assert_eq!((sent(text, "cable"), sent(text, "lo"), sent(text, "eth0")), (Some(99), Some(9), None));
    }
}
