//! `/metrics`: accepted by Prometheus' own checker, and agreeing with what clients have counted, to the last request.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use headwater::error::ErrorKind;
use headwater::export::conformance::Random;
use headwater::nbd::wire::{CommandFlags, command};

use crate::admin::socket_of;
use crate::support::cache::order;
use crate::support::client::Client;
use crate::support::{Daemon, ON_DEMAND, Scratch, eventually, headwater, noise, run};

const MIB: u64 = 1 << 20;

/// What a server says of itself.
struct Scrape(String);

impl Scrape {
    #[track_caller]
    fn of(scratch: &Scratch, server: &Daemon) -> Self {
        Self::at(&socket_of(scratch, server))
    }

    #[track_caller]
    fn at(socket: &Path) -> Self {
        let mut socket = UnixStream::connect(socket).unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(head.to_lowercase().contains("content-type: text/plain; version=0.0.4"), "{head}");
        Self(body.to_owned())
    }

    /// Samples by their names with labels.
    fn samples(&self) -> BTreeMap<&str, f64> {
        let lines = self.0.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| line.rsplit_once(' ').map(|(name, value)| (name, value.parse().unwrap())).unwrap()).collect()
    }

    #[track_caller]
    fn value(&self, sample: &str) -> f64 {
        *self.samples().get(sample).unwrap_or_else(|| panic!("there is no {sample}: {}", self.0))
    }

    /// A value that may not be there before it is needed.
    fn value_or_zero(&self, sample: &str) -> f64 {
        self.samples().get(sample).copied().unwrap_or_default()
    }

    /// All samples that only grow.
    fn counters(&self) -> BTreeMap<&str, f64> {
        let types = self.0.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.rsplit_once(' '));
        let growing: Vec<_> = types.filter(|(_, kind)| *kind != "gauge").map(|(name, _)| name).collect();
        let of = |sample: &str| growing.iter().any(|name| sample.starts_with(name));
        self.samples().into_iter().filter(|(sample, _)| of(sample)).collect()
    }

    /// Has it checked by the program that comes with Prometheus.
    #[track_caller]
    fn check(&self) {
        let mut command = Command::new("promtool");
        command.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("promtool is installed by tools/test");
        child.stdin.take().unwrap().write_all(self.0.as_bytes()).unwrap();
        let output = child.wait_with_output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        assert!(output.status.success() && said.is_empty(), "{}\n{}", String::from_utf8_lossy(&said), self.0);
    }
}

/// What a client has asked for and got.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct Tally {
    requests: f64,
    bytes: f64,
    errors: f64,
}

impl Tally {
    fn note(&mut self, bytes: u64, error: Option<ErrorKind>) {
        self.requests += 1.0;
        match error {
            None => self.bytes += bytes as f64,
            Some(_) => self.errors += 1.0,
        }
    }

    /// What the server says of an operation, errors of one kind counted.
    fn told(scrape: &Scrape, export: &str, operation: &str, errno: &str) -> Self {
        let of = |metric: &str| {
            scrape.value_or_zero(&format!("headwater_{metric}{{export=\"{export}\",operation=\"{operation}\"}}"))
        };
        let errors = format!("request_errors_total{{export=\"{export}\",operation=\"{operation}\",errno=\"{errno}\"}}");
        let told = Self {
            requests: of("requests_total"),
            bytes: of("request_bytes_total"),
            errors: scrape.value_or_zero(&format!("headwater_{errors}")),
        };
        assert_eq!(of("request_duration_seconds_count"), told.requests, "each is timed");
        told
    }
}

fn writable(scratch: &Scratch) -> Daemon {
    let image = scratch.file("image.raw", &noise(8 << 20, 3));
    Daemon::serve(scratch, &image, &[])
}

#[test]
fn each_request_is_counted_before_its_answer_is_there() {
    let scratch = Scratch::new();
    let server = writable(&scratch);
    let mut tallies: BTreeMap<&str, Tally> = BTreeMap::new();
    let (mut modern, mut simple) = (Client::open(server.uri()), Client::open_simple(server.uri()));
    let requests: [(&str, u16, CommandFlags, u64, u64); 14] = [
        ("read", command::READ, CommandFlags::empty(), 4096, 4096),
        ("read", command::READ, CommandFlags::empty(), 0, 0),
        ("read", command::READ, CommandFlags::empty(), 12345, 100_000),
        ("read", command::READ, CommandFlags::empty(), MIB, 5 * MIB),
        ("read", command::READ, CommandFlags::empty(), 8 * MIB, 1),
        ("write", command::WRITE, CommandFlags::empty(), 512, 512),
        ("write", command::WRITE, CommandFlags::FUA, 8192, 4096),
        ("write", command::WRITE, CommandFlags::empty(), 12345, 3 * MIB),
        ("write", command::WRITE, CommandFlags::empty(), 8 * MIB - 1, 2),
        ("flush", command::FLUSH, CommandFlags::empty(), 0, 0),
        ("trim", command::TRIM, CommandFlags::empty(), 65536, 65536),
        ("write_zeroes", command::WRITE_ZEROES, CommandFlags::empty(), 0, 300_000),
        ("cache", command::CACHE, CommandFlags::empty(), 0, 65536),
        ("unknown", 4711, CommandFlags::empty(), 0, 0),
    ];
    for (operation, number, flags, offset, length) in requests {
        for client in [&mut modern, &mut simple] {
            let data = if number == command::WRITE { noise(length as usize, 5) } else { Vec::new() };
            let error = client.ask_with(number, flags, offset, length, &data).error;
            let errno = match error {
                None => "none",
                Some(ErrorKind::NoSpace) => "ENOSPC",
                Some(ErrorKind::Invalid) => "EINVAL",
                Some(other) => panic!("{operation}: {other:?}"),
            };
            let tally = tallies.entry(operation).or_default();
            tally.note(length, error);
            let scrape = Scrape::of(&scratch, &server);
            let told = Tally::told(
                &scrape,
                "image",
                operation,
                if tally.errors > 0.0 && errno == "none" { "EIO" } else { errno },
            );
            assert_eq!((told.requests, told.bytes), (tally.requests, tally.bytes), "{operation} at {offset}, {length}");
            assert!(error.is_none() || told.errors == tally.errors, "{operation}: {told:?}");
        }
    }
    let status = modern.ask(command::BLOCK_STATUS, 0, MIB);
    assert_eq!((status.error, status.other.len()), (None, 1));
    let scrape = Scrape::of(&scratch, &server);
    scrape.check();
    assert_eq!(Tally::told(&scrape, "image", "block_status", "EIO"), Tally { requests: 1.0, ..Tally::default() });
    assert_eq!(scrape.value("headwater_clients{export=\"image\"}"), 2.0);
    let before: BTreeMap<_, _> = scrape.counters().into_iter().filter(|(name, _)| name.contains("request")).collect();
    modern.disconnect();
    simple.disconnect();
    let scrape = Scrape::of(&scratch, &server);
    let after: BTreeMap<_, _> = scrape.counters().into_iter().filter(|(name, _)| name.contains("request")).collect();
    assert_eq!(before, after, "clients leave what they have done");
    assert_eq!(scrape.value("headwater_connections_accepted_total"), 2.0);
}

#[test]
fn counters_agree_with_many_clients_and_never_fall() {
    const CLIENTS: u64 = 6;
    let scratch = Scratch::new();
    let server = writable(&scratch);
    let (uri, socket, stop) = (server.uri(), socket_of(&scratch, &server), AtomicBool::new(false));
    let work = |seed: u64| {
        let (mut client, mut random) = (Client::open(uri), Random::new(2 * seed + 1));
        let [mut reads, mut writes] = [Tally::default(); 2];
        let data = noise(200_000, seed);
        for _ in 0..400 {
            // Some go beyond the end.
            let (offset, length) = (random.below(8 * MIB), 1 + random.below(200_000));
            if random.below(3) == 0 {
                writes.note(length, client.write(offset, &data[..length as usize]));
            } else {
                reads.note(length, client.ask(command::READ, offset, length).error);
            }
        }
        (reads, writes)
    };
    let watch = || {
        let mut seen: BTreeMap<String, f64> = BTreeMap::new();
        let mut looks = 0;
        while !stop.load(Ordering::SeqCst) || looks < 2 {
            let scrape = Scrape::at(&socket);
            for (name, value) in scrape.counters() {
                let before = seen.insert(name.to_owned(), value).unwrap_or_default();
                assert!(value >= before, "{name} fell from {before} to {value}");
            }
            assert!(seen.keys().all(|name| scrape.0.contains(name)), "a counter is gone");
            looks += 1;
        }
        looks
    };
    let (reads, writes, looks) = std::thread::scope(|scope| {
        let watching = scope.spawn(watch);
        let working: Vec<_> = (1..=CLIENTS).map(|seed| scope.spawn(move || work(seed))).collect();
        let done: Vec<_> = working.into_iter().map(|thread| thread.join().unwrap()).collect();
        stop.store(true, Ordering::SeqCst);
        let add = |one: Tally, other: &Tally| Tally {
            requests: one.requests + other.requests,
            bytes: one.bytes + other.bytes,
            errors: one.errors + other.errors,
        };
        let reads = done.iter().map(|(reads, _)| reads).fold(Tally::default(), add);
        let writes = done.iter().map(|(_, writes)| writes).fold(Tally::default(), add);
        (reads, writes, watching.join().unwrap())
    });
    let scrape = Scrape::of(&scratch, &server);
    assert_eq!(Tally::told(&scrape, "image", "read", "EINVAL"), reads);
    assert_eq!(Tally::told(&scrape, "image", "write", "ENOSPC"), writes);
    assert_eq!(reads.requests + writes.requests, 400.0 * CLIENTS as f64);
    assert!(reads.errors > 0.0 && writes.errors > 0.0 && looks > 1);
    scrape.check();
}

#[test]
fn a_mirror_tells_where_its_bytes_came_from() {
    let scratch = Scratch::new();
    let bytes = noise(4 << 20, 9);
    let image = scratch.file("image.raw", &bytes);
    let upstream = Daemon::serve(&scratch, &image, &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, upstream.uri(), &[ON_DEMAND]);
    let mut client = Client::open(mirror.uri());
    assert!(client.read(0, MIB) == bytes[..1 << 20]);
    // What was answered is stored afterwards; until then it is a miss for the next one, too.
    let brought = "headwater_fill_bytes_total{image=\"image\",cause=\"demand\"}";
    eventually("everything is stored", || Scrape::of(&scratch, &mirror).value(brought) == MIB as f64);
    assert!(client.read(0, MIB) == bytes[..1 << 20]);
    let scrape = Scrape::of(&scratch, &mirror);
    scrape.check();
    let of = |metric: &str| scrape.value(&format!("headwater_mirror_{metric}{{image=\"image\"}}"));
    assert_eq!((of("misses_total"), of("miss_bytes_total")), (16.0, MIB as f64));
    assert_eq!((of("hits_total"), of("hit_bytes_total")), (16.0, MIB as f64));
    assert_eq!((of("joins_total"), of("evicted_chunks_total")), (0.0, 0.0));
    let labels = format!("image=\"image\",upstream=\"{}\"", upstream.uri());
    let from = |metric: &str| scrape.value(&format!("headwater_upstream_{metric}{{{labels}}}"));
    assert_eq!((from("up"), from("current"), from("set_aside")), (1.0, 1.0, 0.0));
    assert_eq!(from("received_bytes_total"), MIB as f64);
    assert_eq!(from("request_duration_seconds_count"), from("requests_total"));
    assert!(from("request_duration_seconds_sum") > 0.0 && from("connections") >= 1.0);
    assert!(scrape.value("headwater_cache_allocated_bytes") >= MIB as f64);
    assert!(scrape.value("process_resident_memory_bytes") > MIB as f64);
    // What the upstream has answered is what the mirror has got.
    let above = Scrape::of(&scratch, &upstream);
    assert_eq!(above.value("headwater_request_bytes_total{export=\"image\",operation=\"read\"}"), MIB as f64);
    drop(upstream);
    assert_eq!(client.ask(command::READ, 0, 4096).error, None, "what is here is here");
}

#[test]
fn orders_to_move_clients_are_counted_by_result() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 11));
    let [first, second] = ["first", "second"].map(|name| {
        let (log, socket) = (scratch.path(&format!("{name}.log")), scratch.path(&format!("{name}.sock")));
        let mut command = headwater(&log);
        command.arg("serve").arg(format!("image={}", image.display())).arg("--read-only").arg("--unix").arg(socket);
        Daemon::start(command, 1, &log)
    });
    let mut client = Client::open(first.uri());
    client.read(0, 4096);
    run(&mut order(&scratch, &first, &["redirect", "image", "--to", second.uri(), "--wait", "--force"]));
    client.read(0, 4096);
    let scrape = Scrape::of(&scratch, &first);
    scrape.check();
    assert_eq!(scrape.value("headwater_redirects_ended_total{result=\"done\"}"), 1.0);
    assert_eq!(scrape.value("headwater_redirect_clients_total{result=\"moved\"}"), 1.0);
    assert_eq!(scrape.value("headwater_redirects_active"), 0.0);
    assert_eq!(scrape.value("headwater_clients_relayed{export=\"image\"}"), 1.0);
    let reads = "headwater_requests_total{export=\"image\",operation=\"read\"}";
    assert_eq!(scrape.value(reads), 2.0, "who is served from elsewhere is a client all the same");
}
