//! Two hosts that are network namespaces, with a cable between them that can be pulled.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use super::{append, run};

/// The end of the cable in each.
pub(crate) const CABLE: &str = "cable";

/// Two hosts. They go away with the test; the processes in them must go before.
pub(crate) struct Cables {
    names: [String; 2],
}

impl Cables {
    pub(crate) const ADDRESSES: [&str; 2] = ["10.212.0.1", "10.212.0.2"];

    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let names = ["a", "b"].map(|end| format!("headwater-test-{}-{count}{end}", std::process::id()));
        let cables = Self { names };
        for name in &cables.names {
            run(Command::new("ip").args(["netns", "add", name]));
        }
        let [one, other] = &cables.names;
        cables.ip(0, &format!("link add {CABLE} type veth peer name {CABLE} netns {other}"));
        for (end, address) in Self::ADDRESSES.iter().enumerate() {
            cables.ip(end, "link set lo up");
            cables.ip(end, &format!("addr add {address}/24 dev {CABLE}"));
            cables.ip(end, &format!("link set {CABLE} up"));
        }
        assert_ne!(one, other);
        cables
    }

    /// The same program on one of the hosts.
    pub(crate) fn on(&self, host: usize, program: &Command) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.names[host])).arg("--");
        append(&mut command, program);
        command
    }

    /// Pulls the cable out of a host.
    pub(crate) fn pull(&self, host: usize) {
        self.ip(host, &format!("link set {CABLE} down"));
    }

    /// Puts it back.
    pub(crate) fn plug(&self, host: usize) {
        self.ip(host, &format!("link set {CABLE} up"));
    }

    fn ip(&self, host: usize, words: &str) {
        run(Command::new("ip").args(["-n", &self.names[host]]).args(words.split(' ')));
    }
}

impl Drop for Cables {
    fn drop(&mut self) {
        for name in &self.names {
            // It may not have been made.
            let _ = Command::new("ip").args(["netns", "del", name]).output();
        }
    }
}
