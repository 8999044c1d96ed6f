//! What is measured: the list of cases, and how one sample of each is taken.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use load::children::{Cpus, Guard};

use crate::clients::{self, Fio, Unit, load};
use crate::servers::{Mirror, Place, Programs, Running, Server, Transport, upstream};
use crate::table::Sample;

/// The part of the image that mirrors are measured with.
const RESIDENT: &str = "0+128M";
/// How long a mirror takes to have on its disk what it has fetched; after it, nothing is still being stored.
const SETTLED: Duration = Duration::from_secs(2);

/// One line of a table.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    /// Its number in the list of docs/benchmarking.md.
    pub(crate) group: u8,
    pub(crate) name: &'static str,
    pub(crate) unit: Unit,
    work: Work,
    /// Whether it is one of the few of a quick run.
    pub(crate) quick: bool,
}

#[derive(Debug, Clone, Copy)]
enum Work {
    /// A raw file with a warm page cache.
    Serve { client: Client, transport: Transport, cpus: Cpus, image: Image },
    /// The same through a mirror that has all of it, held against ours without a mirror.
    Resident { load: &'static [&'static str], transport: Transport },
    /// A mirror that has nothing, with everything on one CPU.
    Cold { ours: Mirror, load: &'static [&'static str], delay: Option<&'static str> },
    /// Hits of a mirror beside misses, held against hits alone.
    Beside,
}

#[derive(Debug, Clone, Copy)]
enum Client {
    Load(&'static [&'static str]),
    Fio(Fio),
    Nbdcopy,
}

/// Which file a server has: one for reads, and one that may be written to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Image {
    Read,
    Write,
}

/// What takes part in a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Subject {
    Server(Server),
    Mirror(Mirror),
    /// Hits of our mirror, alone or beside misses.
    Hits {
        beside_misses: bool,
    },
}

/// What a subject is in its case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Ours.
    Ours,
    /// What ours is held against.
    Peer,
    /// What marks how much is possible.
    Mark,
}

impl Subject {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Server(server) => server.name(),
            Self::Mirror(mirror) => mirror.name(),
            Self::Hits { beside_misses: false } => "hits alone",
            Self::Hits { beside_misses: true } => "hits beside misses",
        }
    }
}

/// What all cases share.
#[derive(Debug)]
pub(crate) struct Bench {
    pub(crate) programs: Programs,
    pub(crate) peers: Vec<Server>,
    pub(crate) scratch: PathBuf,
    pub(crate) image: PathBuf,
    pub(crate) write_image: PathBuf,
    /// How long a client runs.
    pub(crate) time: Duration,
    /// For names of directories.
    pub(crate) started: std::cell::Cell<u32>,
}

/// All cases, in the order of their numbers.
pub(crate) fn all() -> Vec<Case> {
    let mut cases = reads();
    cases.extend(writes());
    cases.extend(mirrors());
    cases.extend(protected());
    cases
}

const RANDOM_4K: &[&str] = &["--depth", "32"];

const fn serve(group: u8, name: &'static str, unit: Unit, client: Client, transport: Transport) -> Case {
    let work = Work::Serve { client, transport, cpus: Cpus::One, image: Image::Read };
    Case { group, name, unit, work, quick: false }
}

impl Case {
    const fn quick(mut self) -> Self {
        self.quick = true;
        self
    }

    fn on(mut self, new_cpus: Cpus, new_image: Image) -> Self {
        if let Work::Serve { cpus, image, .. } = &mut self.work {
            (*cpus, *image) = (new_cpus, new_image);
        }
        self
    }
}

fn reads() -> Vec<Case> {
    use Transport::{Tcp, Unix};
    use Unit::{Megabytes, Requests};
    let random = Client::Fio(Fio { rw: "randread", size: 4096, depth: 32 });
    let single = Client::Fio(Fio { rw: "randread", size: 4096, depth: 1 });
    let long = Client::Fio(Fio { rw: "read", size: 1 << 20, depth: 8 });
    let many = |words| Client::Load(words);
    vec![
        serve(1, "random 4K reads, depth 32, load, unix", Requests, Client::Load(RANDOM_4K), Unix).quick(),
        serve(1, "random 4K reads, depth 32, load, tcp", Requests, Client::Load(RANDOM_4K), Tcp),
        serve(1, "random 4K reads, depth 32, fio, unix", Requests, random, Unix),
        serve(2, "random 4K reads, depth 1, fio, unix", Requests, single, Unix).quick(),
        serve(2, "random 4K reads, depth 1, fio, tcp", Requests, single, Tcp),
        serve(2, "random 4K reads, depth 1, load, unix", Requests, Client::Load(&["--depth", "1"]), Unix),
        serve(3, "the same, depth 32 on 4 connections", Requests, many(&["--connections", "4"]), Unix)
            .on(Cpus::Free, Image::Read),
        serve(3, "the same, depth 32 on 64 connections", Requests, many(&["--connections", "64"]), Unix)
            .on(Cpus::Free, Image::Read),
        serve(4, "sequential 1M reads, depth 8, fio, unix", Megabytes, long, Unix).quick(),
        serve(4, "sequential 1M reads, depth 8, fio, tcp", Megabytes, long, Tcp),
        serve(4, "nbdcopy to null:, unix", Megabytes, Client::Nbdcopy, Unix),
    ]
}

fn writes() -> Vec<Case> {
    use Unit::{Megabytes, Requests};
    let case = |name, unit, client| serve(5, name, unit, client, Transport::Unix).on(Cpus::One, Image::Write);
    let random = Fio { rw: "randwrite", size: 4096, depth: 32 };
    let long = Fio { rw: "write", size: 1 << 20, depth: 8 };
    vec![
        case("random 4K writes, depth 32, load", Requests, Client::Load(&["--rw", "write"])).quick(),
        case("random 4K writes, depth 32, fio", Requests, Client::Fio(random)),
        case("sequential 1M writes, depth 8, fio", Megabytes, Client::Fio(long)),
        case("random 4K writes with FUA, depth 32, load", Requests, Client::Load(&["--rw", "write", "--fua"])),
        case(
            "random 4K writes, flush after every 32, load",
            Requests,
            Client::Load(&["--rw", "write", "--flush-every", "32"]),
        ),
    ]
}

/// The same by TLS. The client is libnbd, whose TLS is GnuTLS, and costs more than any server's.
fn protected() -> Vec<Case> {
    use Unit::{Megabytes, Requests};
    let case = |name, unit, client| serve(9, name, unit, client, Transport::Tls);
    let reads = |size, depth| Client::Fio(Fio { rw: "randread", size, depth });
    vec![
        case("TLS: 4K reads, depth 1, fio", Requests, reads(4096, 1)),
        case("TLS: 4K reads, depth 32, fio", Requests, reads(4096, 32)).quick(),
        case("TLS: 64K reads, depth 8, fio", Megabytes, reads(65_536, 8)),
        case("TLS: 1M reads, depth 8, fio", Megabytes, reads(1 << 20, 8)),
        case("TLS: nbdcopy to null:", Megabytes, Client::Nbdcopy),
        case("TLS: nbdcopy to null:, both CPUs", Megabytes, Client::Nbdcopy).on(Cpus::Free, Image::Read),
    ]
}

fn mirrors() -> Vec<Case> {
    use Transport::{Tcp, Unix};
    use Unit::{Megabytes, Requests};
    const SEQUENTIAL: &[&str] = &["--once", "--pattern", "sequential", "--size", "64K", "--depth", "16"];
    const RANDOM: &[&str] = &["--requests", "4096", "--depth", "64"];
    const LONG: &[&str] = &["--size", "1M", "--depth", "8", "--pattern", "sequential"];
    let resident = |name, unit, load, transport| {
        let work = Work::Resident { load, transport };
        Case { group: 6, name, unit, work, quick: false }
    };
    let cold = |name, unit, ours, load, delay| {
        let work = Work::Cold { ours, load, delay };
        Case { group: 7, name, unit, work, quick: false }
    };
    let (large, small) = (Mirror::Headwater, Mirror::HeadwaterSmall);
    vec![
        resident("resident: random 4K reads, depth 32, load, unix", Requests, RANDOM_4K, Unix).quick(),
        resident("resident: random 4K reads, depth 32, load, tcp", Requests, RANDOM_4K, Tcp),
        resident("resident: random 4K reads, depth 1, load, unix", Requests, &["--depth", "1"], Unix),
        resident("resident: sequential 1M reads, depth 8, load, unix", Megabytes, LONG, Unix),
        cold("cold: sequential 128 MiB", Megabytes, large, SEQUENTIAL, None),
        cold("cold: 4096 random 4K reads", Requests, large, RANDOM, None).quick(),
        cold("cold: 4096 random 4K reads, 4K chunks", Requests, small, RANDOM, None),
        cold("cold: 4096 random 4K reads, upstream 1 ms away", Requests, large, RANDOM, Some("1ms")),
        cold("cold: the same, 4K chunks", Requests, small, RANDOM, Some("1ms")),
        Case { group: 8, name: "hits beside misses", unit: Requests, work: Work::Beside, quick: true },
    ]
}

impl Case {
    /// Everything that takes part.
    pub(crate) fn subjects(&self, peers: &[Server]) -> Vec<(Subject, Role)> {
        match self.work {
            Work::Serve { transport: Transport::Tls, .. } => {
                // nbd-server has TLS 1.2 only, and the bare server none.
                let is_able = |peer: &&Server| !matches!(peer, Server::Classic | Server::ClassicSplice);
                let peers = peers.iter().filter(is_able).map(|peer| (Subject::Server(*peer), Role::Peer));
                [(Subject::Server(Server::Headwater), Role::Ours)].into_iter().chain(peers).collect()
            }
            Work::Serve { image, .. } => {
                // Only where replies are long does it make a difference how they are sent.
                let long = self.unit == Unit::Megabytes && image == Image::Read;
                let limits = [Server::Limit, Server::LimitSendfile].into_iter().take(if long { 2 } else { 1 });
                let marks = limits.map(|limit| (Subject::Server(limit), Role::Mark));
                let peers = peers.iter().map(|peer| (Subject::Server(*peer), Role::Peer));
                let ours = (Subject::Server(Server::Headwater), Role::Ours);
                [ours].into_iter().chain(peers).chain(marks).collect()
            }
            Work::Resident { .. } => {
                vec![(Subject::Mirror(Mirror::Headwater), Role::Ours), (Subject::Server(Server::Headwater), Role::Peer)]
            }
            Work::Cold { ours, .. } => {
                let has = |one: Server, other: Server| peers.contains(&one) || peers.contains(&other);
                let mut subjects = vec![(ours, Role::Ours), (Mirror::Relay, Role::Mark), (Mirror::Direct, Role::Mark)];
                if has(Server::Nbdkit, Server::NbdkitOneThread) {
                    subjects.extend([(Mirror::NbdkitCache, Role::Peer), (Mirror::NbdkitCow, Role::Peer)]);
                }
                if has(Server::QemuNbd, Server::QemuNbdThreads) {
                    subjects.push((Mirror::QemuCopyOnRead, Role::Peer));
                }
                subjects.into_iter().map(|(mirror, role)| (Subject::Mirror(mirror), role)).collect()
            }
            Work::Beside => vec![
                (Subject::Hits { beside_misses: true }, Role::Ours),
                (Subject::Hits { beside_misses: false }, Role::Peer),
            ],
        }
    }

    /// Takes one sample.
    pub(crate) fn measure(&self, bench: &Bench, subject: Subject) -> anyhow::Result<Sample> {
        match (self.work, subject) {
            (Work::Serve { client, transport, cpus, image }, Subject::Server(server)) => {
                bench.serve(server, client, transport, cpus, image, self.unit)
            }
            (Work::Resident { load, transport }, _) => bench.resident(subject, load, transport, self.unit),
            (Work::Cold { load, delay, .. }, Subject::Mirror(mirror)) => bench.cold(mirror, load, delay, self.unit),
            (Work::Beside, Subject::Hits { beside_misses }) => bench.beside(beside_misses),
            (_, subject) => anyhow::bail!("{} does not take part", subject.name()),
        }
    }
}

impl Bench {
    fn place(&self, transport: Transport) -> anyhow::Result<Place> {
        let number = self.started.get();
        self.started.set(number + 1);
        Place::new(self.scratch.join(number.to_string()), transport)
    }

    /// Reads some of what a server has and holds it against the image: who is wrong is not measured.
    fn check(&self, running: &Running) -> anyhow::Result<()> {
        let image = self.image.to_string_lossy();
        let words = ["--requests", "64", "--verify", "--image", &image];
        load(&self.programs, Cpus::Free, &running.uri(), &words).map(drop)
    }

    fn timed(&self) -> [String; 4] {
        let ramp = self.time / 10;
        ["--time".into(), format!("{}ms", self.time.as_millis()), "--ramp".into(), format!("{}ms", ramp.as_millis())]
    }

    /// Runs the load generator for the usual time.
    fn load_for_a_while(&self, cpus: Cpus, running: &Running, words: &[&str], unit: Unit) -> anyhow::Result<Sample> {
        let (timed, pid) = (self.timed(), running.pid().to_string());
        let timed = timed.iter().map(String::as_str).chain(["--pid", &pid]);
        let words: Vec<_> = words.iter().copied().chain(timed).collect();
        Ok(clients::sample(&load(&self.programs, cpus, &running.uri(), &words)?, unit))
    }

    fn serve(
        &self,
        server: Server,
        client: Client,
        transport: Transport,
        cpus: Cpus,
        image: Image,
        unit: Unit,
    ) -> anyhow::Result<Sample> {
        let path = if image == Image::Read { &self.image } else { &self.write_image };
        if image == Image::Write {
            // Each begins with nothing dirty.
            std::fs::File::open(path)?.sync_all()?;
        }
        let running = server.start(&self.programs, self.place(transport)?, cpus, path)?;
        // The load generator has no TLS; tests/it/tls.rs compares what clients get by it.
        if image == Image::Read && transport != Transport::Tls {
            self.check(&running)?;
        }
        let (uri, pid) = (running.uri(), running.pid());
        let bytes = std::fs::metadata(path)?.len();
        Ok(match client {
            Client::Load(words) => self.load_for_a_while(cpus, &running, words, unit)?,
            Client::Fio(fio) => clients::fio(fio, cpus, &uri, pid, self.time, bytes)?.sample(unit),
            Client::Nbdcopy => clients::nbdcopy(cpus, &uri, pid, bytes)?.sample(unit),
        })
    }

    fn resident(&self, subject: Subject, words: &[&str], transport: Transport, unit: Unit) -> anyhow::Result<Sample> {
        let words: Vec<_> = words.iter().copied().chain(["--region", RESIDENT]).collect();
        let place = self.place(transport)?;
        let Subject::Mirror(mirror) = subject else {
            let running = Server::Headwater.start(&self.programs, place, Cpus::One, &self.image)?;
            return self.load_for_a_while(Cpus::One, &running, &words, unit);
        };
        let above = upstream(self.place(Transport::Unix)?, Cpus::One, &self.image, None)?;
        let running = mirror.start(&self.programs, place, Cpus::One, &above.uri())?.context("a mirror is a server")?;
        self.bring_over(&running, RESIDENT)?;
        self.load_for_a_while(Cpus::One, &running, &words, unit)
    }

    /// Makes a part of the image resident.
    fn bring_over(&self, running: &Running, region: &str) -> anyhow::Result<()> {
        let image = self.image.to_string_lossy();
        let words = ["--once", "--pattern", "sequential", "--size", "1M", "--depth", "64", "--region", region];
        let words: Vec<_> = words.into_iter().chain(["--verify", "--image", &image]).collect();
        load(&self.programs, Cpus::Free, &running.uri(), &words)?;
        std::thread::sleep(SETTLED);
        Ok(())
    }

    fn cold(&self, mirror: Mirror, words: &[&str], delay: Option<&str>, unit: Unit) -> anyhow::Result<Sample> {
        let above = upstream(self.place(Transport::Unix)?, Cpus::One, &self.image, delay)?;
        let running = mirror.start(&self.programs, self.place(Transport::Unix)?, Cpus::One, &above.uri())?;
        let target = running.as_ref().unwrap_or(&above);
        let pid = target.pid().to_string();
        let words: Vec<_> = words.iter().copied().chain(["--region", RESIDENT, "--pid", &pid]).collect();
        Ok(clients::sample(&load(&self.programs, Cpus::One, &target.uri(), &words)?, unit))
    }

    fn beside(&self, beside_misses: bool) -> anyhow::Result<Sample> {
        let above = upstream(self.place(Transport::Unix)?, Cpus::Free, &self.image, Some("500ms"))?;
        let place = self.place(Transport::Unix)?;
        let running = Mirror::Headwater.start(&self.programs, place, Cpus::Free, &above.uri())?;
        let running = running.context("a mirror is a server")?;
        self.bring_over(&running, "0+64M")?;
        let misses = ["--region", "64M+64M", "--once", "--depth", "32"];
        let log = self.scratch.join("misses.log");
        let _misses = beside_misses
            .then(|| Guard::spawn(clients::load_command(&self.programs, Cpus::Free, &running.uri(), &misses), &log))
            .transpose()?;
        self.load_for_a_while(Cpus::Free, &running, &["--region", "0+64M"], Unit::Requests)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::servers::Server;

    #[test]
    fn each_case_has_one_of_ours_and_something_to_hold_it_against() {
        for case in all() {
            let subjects = case.subjects(&Server::PEERS);
            let count = |role| subjects.iter().filter(|(_, of)| *of == role).count();
            assert_eq!(count(Role::Ours), 1, "{}", case.name);
            assert!(count(Role::Peer) > 0, "{}", case.name);
        }
    }

    #[test]
    fn each_number_of_the_list_has_cases_and_no_two_have_one_name() {
        let cases = all();
        for group in 1..=8 {
            assert!(cases.iter().any(|case| case.group == group), "{group}");
        }
        let mut names: Vec<_> = cases.iter().map(|case| case.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), cases.len());
        assert!(cases.is_sorted_by_key(|case| case.group));
    }

    #[test]
    fn peers_that_are_not_chosen_do_not_take_part() {
        for case in all() {
            for (subject, _) in case.subjects(&[Server::Nbdkit]) {
                assert!(!subject.name().contains("qemu") && !subject.name().contains("nbd-server"), "{}", case.name);
            }
        }
    }
}
