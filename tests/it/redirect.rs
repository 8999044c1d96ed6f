//! `headwater redirect` and `headwater drain` at servers: running clients, moved between two of them while they read.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use headwater::export::conformance::Random;
use headwater::ranges::ByteRange;
use serde_json::{Value, json};

use crate::admin::{ask, ends_with, socket_of};
use crate::support::cache::{index, order, status};
use crate::support::client::Client;
use crate::support::link::Link;
use crate::support::{Daemon, ON_DEMAND, SOON, Scratch, eventually, headwater, mirror_command, noise, run};

const SIZE: usize = 4 << 20;

/// Serves images under the name of the first on a socket of its own.
fn serve(scratch: &Scratch, name: &str, image: &Path, arguments: &[&str]) -> Daemon {
    let log = scratch.path(&format!("{name}.log"));
    let mut command = headwater(&log);
    let image = format!("image={}", image.display());
    command.args(["serve", &image]).arg("--unix").arg(scratch.path(&format!("{name}.sock"))).args(arguments);
    Daemon::start(command, 1, &log)
}

/// An image with an identity, and two servers that have it, for reading.
struct Pair {
    scratch: Scratch,
    bytes: Arc<Vec<u8>>,
    image: PathBuf,
    first: Daemon,
    second: Daemon,
}

impl Pair {
    fn new() -> Self {
        let scratch = Scratch::new();
        let bytes = Arc::new(noise(SIZE, 7));
        let image = scratch.file("image.raw", &bytes);
        index(&scratch, &image, &[]);
        let first = serve(&scratch, "first", &image, &["--read-only"]);
        let second = serve(&scratch, "second", &image, &["--read-only"]);
        Self { scratch, bytes, image, first, second }
    }

    fn reader(&self, seed: u64) -> Reader {
        Reader::start(self.first.uri(), &self.bytes, seed)
    }

    /// Has clients of the first server moved, and gives the report.
    #[track_caller]
    fn redirect(&self, to: &str, arguments: &[&str], code: i32) -> Value {
        let mut command = self.command(to, &["--wait", "--json"]);
        let text = ends_with(code, command.args(arguments));
        // Warnings come behind it.
        serde_json::Deserializer::from_str(&text)
            .into_iter::<Value>()
            .next()
            .unwrap()
            .unwrap_or_else(|_| panic!("{text}"))
    }

    fn command(&self, to: &str, arguments: &[&str]) -> std::process::Command {
        let mut command = order(&self.scratch, &self.first, &["redirect", "image", "--to", to]);
        command.args(arguments);
        command
    }

    fn socket(&self) -> PathBuf {
        socket_of(&self.scratch, &self.first)
    }

    fn clients(&self) -> Vec<Value> {
        status(&self.scratch, &self.first)["clients"].as_array().unwrap().clone()
    }
}

/// A client that reads at random, and holds every byte against what it should be.
struct Reader {
    stop: Arc<AtomicBool>,
    reads: Arc<AtomicU64>,
    thread: JoinHandle<Duration>,
}

impl Reader {
    fn start(uri: &str, bytes: &Arc<Vec<u8>>, seed: u64) -> Self {
        let (stop, reads) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted, bytes) = (Arc::clone(&stop), Arc::clone(&reads), Arc::clone(bytes));
        let mut client = Client::open(uri);
        let thread = std::thread::spawn(move || {
            let (mut random, mut longest) = (Random::new(seed), Duration::ZERO);
            while !stopped.load(Ordering::SeqCst) {
                let start = random.below(bytes.len() as u64 - 1);
                let end = (start + 1 + random.below(200_000)).min(bytes.len() as u64);
                let range = ByteRange::between(start, end);
                let began = Instant::now();
                let read =
                    client.try_read(range.start(), range.length()).unwrap_or_else(|error| panic!("{range:?}: {error}"));
                longest = longest.max(began.elapsed());
                assert!(read == bytes[range.start() as usize..range.end() as usize], "wrong bytes in {range:?}");
                counted.fetch_add(1, Ordering::SeqCst);
            }
            longest
        });
        Self { stop, reads, thread }
    }

    /// Waits until so many reads more have been answered.
    fn go_on(&self, count: u64) {
        let from = self.reads.load(Ordering::SeqCst);
        eventually("reads", || self.reads.load(Ordering::SeqCst) >= from + count || self.thread.is_finished());
        assert!(!self.thread.is_finished() || self.stop.load(Ordering::SeqCst), "the reader has failed");
    }

    /// The longest that a read took.
    fn end(self) -> Duration {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap()
    }
}

/// Bytes that the newest client of a server has read.
fn newest_reads(scratch: &Scratch, server: &Daemon) -> u64 {
    let clients = status(scratch, server)["clients"].as_array().unwrap().clone();
    clients.last().map_or(0, |client| client["read_bytes"].as_u64().unwrap())
}

#[test]
fn a_reader_is_moved_there_and_back_and_notices_nothing() {
    let pair = Pair::new();
    let reader = pair.reader(3);
    let (first, second) = (pair.first.uri().to_owned(), pair.second.uri().to_owned());
    for _ in 0..20 {
        let report = pair.redirect(&second, &[], 0);
        let client = &report["clients"][0];
        assert_eq!(
            (&report["state"], &client["state"], &client["way"]),
            (&json!("done"), &json!("moved"), &json!("relay"))
        );
        assert_eq!((&client["errors"], &report["durable"]), (&json!(0), &json!(true)));
        assert!(client["pause_ms"].as_f64().unwrap() < 100.0, "{client}");
        assert_eq!(pair.clients()[0]["relayed_to"], second);
        reader.go_on(5);
        eventually("reads there", || newest_reads(&pair.scratch, &pair.second) > 0);
        let report = pair.redirect(&first, &[], 0);
        assert_eq!(report["counts"]["moved"], 1);
        assert_eq!(pair.clients()[0]["relayed_to"], Value::Null);
        reader.go_on(5);
    }
    assert!(reader.end() < SOON);
    let complaint = ends_with(1, &mut pair.command(&first, &[]));
    assert!(complaint.contains("nobody to bring back"), "{complaint}");
    let text = run(&mut order(&pair.scratch, &pair.first, &["redirect", "--list"]));
    assert_eq!(text.lines().count(), 41, "{text}");
}

#[test]
fn a_client_that_was_moved_is_moved_on() {
    let pair = Pair::new();
    let third = serve(&pair.scratch, "third", &pair.image, &["--read-only"]);
    let reader = pair.reader(4);
    pair.redirect(pair.second.uri(), &[], 0);
    reader.go_on(3);
    pair.redirect(third.uri(), &[], 0);
    reader.go_on(3);
    pair.second.stop();
    reader.go_on(20);
    assert_eq!(status(&pair.scratch, &pair.first)["clients"][0]["relayed_to"], third.uri());
    assert!(reader.end() < Duration::from_secs(2), "it was a chain");
}

#[test]
fn other_images_are_refused_before_anybody_is_touched() {
    let pair = Pair::new();
    let _client = Client::open(pair.first.uri());
    let other = pair.scratch.file("other.raw", &noise(SIZE, 9));
    index(&pair.scratch, &other, &[]);
    let larger = pair.scratch.file("larger.raw", &noise(SIZE + 4096, 7));
    let nameless = pair.scratch.file("nameless.raw", &pair.bytes);
    let other = serve(&pair.scratch, "other", &other, &["--read-only"]);
    let larger = serve(&pair.scratch, "larger", &larger, &["--read-only"]);
    let nameless = serve(&pair.scratch, "nameless", &nameless, &["--read-only"]);
    for (target, reason, also_by_force) in [
        (other.uri(), "it holds blake3-", true),
        (larger.uri(), "4198400 bytes", true),
        (nameless.uri(), "does not say what it holds", false),
        ("nbd+unix:///image?socket=/nobody/there", "cannot connect", true),
        ("nbds://localhost/image", "TLS", true),
    ] {
        let complaint = ends_with(1, &mut pair.command(target, &["--wait"]));
        assert!(complaint.contains(reason), "{complaint}");
        if also_by_force {
            let complaint = ends_with(1, &mut pair.command(target, &["--wait", "--force"]));
            assert!(complaint.contains(reason), "{complaint}");
        }
    }
    assert_eq!(status(&pair.scratch, &pair.first)["clients"][0]["relayed_to"], Value::Null);
    let report = pair.redirect(nameless.uri(), &["--force"], 0);
    assert!(report["warnings"][0].as_str().unwrap().contains("does not say"), "{report}");
    // One of two may be away; one that has another image may not.
    pair.redirect(&format!("nbd+unix:///image?socket=/nobody/there,{}", pair.second.uri()), &[], 0);
    let complaint = ends_with(1, &mut pair.command(&format!("{},{}", pair.second.uri(), other.uri()), &[]));
    assert!(complaint.contains("it holds blake3-"), "{complaint}");
}

#[test]
fn a_part_of_the_clients_is_moved_the_oldest_first() {
    let pair = Pair::new();
    let mut clients: Vec<_> = (0..5).map(|_| Client::open(pair.first.uri())).collect();
    let relayed = || -> Vec<u64> {
        let is_relayed = |client: &&Value| client["relayed_to"].is_string();
        pair.clients().iter().filter(is_relayed).map(|client| client["id"].as_u64().unwrap()).collect()
    };
    let second = pair.second.uri().to_owned();
    let complaint = ends_with(1, &mut pair.command(&second, &["--clients", "2,77"]));
    assert!(complaint.contains("no client 77") && relayed().is_empty(), "{complaint}");
    for (arguments, wanted) in [
        (["--fraction", "50%"], vec![1, 2, 3]),
        (["--fraction", "0.01"], vec![1]),
        (["--count", "2"], vec![1, 2]),
        (["--count", "99"], vec![1, 2, 3, 4, 5]),
        (["--clients", "5,2"], vec![2, 5]),
    ] {
        let report = pair.redirect(&second, &arguments, 0);
        assert_eq!(report["counts"]["total"], wanted.len(), "{arguments:?}");
        assert_eq!(relayed(), wanted, "{arguments:?}");
        pair.redirect(pair.first.uri(), &[], 0);
        assert!(relayed().is_empty());
    }
    for client in &mut clients {
        assert!(client.read(4096, 8192) == pair.bytes[4096..12_288]);
    }
    // Nobody is there: nothing is done, and that is no failure.
    drop(clients);
    eventually("nobody", || pair.clients().is_empty());
    assert_eq!(pair.redirect(&second, &[], 0)["counts"]["total"], 0);
}

#[test]
fn a_target_that_dies_costs_a_bounded_wait_and_is_told() {
    let pair = Pair::new();
    let readers: Vec<_> = (0..3).map(|seed| pair.reader(seed)).collect();
    let report = pair.redirect(pair.second.uri(), &[], 0);
    readers.iter().for_each(|reader| reader.go_on(5));
    pair.second.kill();
    let id = report["order"].as_u64().unwrap();
    let socket = socket_of(&pair.scratch, &pair.first);
    eventually("it went back", || {
        let report = ask(&socket, &format!("GET /v1/redirects/{id}"), "").1;
        let clients = report["clients"].as_array().unwrap().clone();
        clients
            .iter()
            .all(|client| client["state"] == "stayed" && client["why"].as_str().unwrap().contains("went back"))
    });
    readers.iter().for_each(|reader| reader.go_on(5));
    for reader in readers {
        let longest = reader.end();
        assert!(longest < Duration::from_secs(8), "{longest:?}");
    }
    let clients = status(&pair.scratch, &pair.first)["clients"].as_array().unwrap().clone();
    assert!(clients.is_empty() || clients.iter().all(|client| client["relayed_to"].is_null() && client["errors"] == 0));
}

#[test]
fn a_target_that_says_nothing_costs_a_bounded_wait() {
    let pair = Pair::new();
    let link = Link::to(pair.second.uri());
    let reader = pair.reader(5);
    pair.redirect(&link.uri(), &[], 0);
    reader.go_on(5);
    link.hold();
    eventually("it went back", || pair.clients()[0]["relayed_to"].is_null());
    reader.go_on(5);
    assert!(reader.end() < Duration::from_secs(8));
    link.release();
}

#[test]
fn who_cannot_be_served_from_here_any_more_is_served_from_there() {
    let pair = Pair::new();
    let (log, mut command) = mirror_command(&pair.scratch, "mirror", pair.second.uri());
    command.arg(ON_DEMAND);
    let mirror = Daemon::start(command, 1, &log);
    let reader = Reader::start(mirror.uri(), &pair.bytes, 6);
    reader.go_on(1);
    // The upstream says nothing any more; reads of what is not here hang.
    pair.second.signal("STOP");
    let mut redirect = order(&pair.scratch, &mirror, &["redirect", "image", "--wait", "--to", pair.first.uri()]);
    run(&mut redirect);
    reader.go_on(50);
    assert!(reader.end() < SOON);
    pair.second.signal("CONT");
}

#[test]
fn clients_are_closed_when_all_is_answered() {
    let pair = Pair::new();
    let mut client = Client::open(pair.first.uri());
    client.read(0, 4096);
    let report = pair.redirect(pair.second.uri(), &["--way", "close"], 0);
    let said = report["clients"][0]["why"].as_str().unwrap();
    assert!(said.contains("where its own address leads"), "{report}");
    assert!(client.socket.is_closed_by_peer());
}

#[test]
fn ways_that_this_server_cannot_go_are_refused_with_what_to_do() {
    let pair = Pair::new();
    let _client = Client::open(pair.first.uri());
    let second = pair.second.uri().to_owned();
    let complaint = ends_with(1, &mut pair.command(&second, &["--way", "qmp"]));
    assert!(complaint.contains("headwater redirect --qmp SOCKET --to nbd+unix"), "{complaint}");
    let complaint = ends_with(1, &mut pair.command(&second, &["--way", "kernel"]));
    assert!(complaint.contains("headwater redirect --device /dev/nbdN"), "{complaint}");
    let report = pair.redirect(&second, &["--way", "notice"], 3);
    assert!(report["clients"][0]["why"].as_str().unwrap().contains("not a mirror that listens"), "{report}");
}

#[test]
fn what_is_written_is_never_dropped_silently() {
    let scratch = Scratch::new();
    let bytes = noise(1 << 20, 5);
    let (one, two) = (scratch.file("one.raw", &bytes), scratch.file("two.raw", &bytes));
    let (first, second) = (serve(&scratch, "first", &one, &[]), serve(&scratch, "second", &two, &[]));
    let mut client = Client::open(first.uri());
    assert_eq!(client.write(0, &[1; 8192]), None);
    let redirect = ["redirect", "image", "--wait", "--to", second.uri()];
    let complaint = ends_with(1, &mut order(&scratch, &first, &redirect));
    assert!(complaint.contains("--force"), "{complaint}");
    let report = run(order(&scratch, &first, &redirect).args(["--force", "--json"]));
    assert!(report.contains("What would be lost") && report.contains("8K by the clients"), "{report}");
    assert_eq!(client.write(16_384, &[2; 4096]), None);
    assert!(client.read(16_384, 4096) == [2; 4096]);
    assert!(client.read(0, 4096) == bytes[..4096], "it holds what the other server has");
    let mut there = Client::open(second.uri());
    assert!(there.read(16_384, 4096) == [2; 4096]);
    drop(client);
    first.stop();
    second.stop();
    let (one, two) = (std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
    assert!(one[..8192] == [1; 8192] && one[16_384..20_480] == bytes[16_384..20_480], "writes before it are here");
    assert!(two[..8192] == bytes[..8192] && two[16_384..20_480] == [2; 4096], "writes after it are there");
}

/// A command that runs on its own, and what it says.
fn spawn(command: &mut std::process::Command) -> std::process::Child {
    command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn().unwrap()
}

#[test]
fn a_server_out_of_service_takes_nobody_and_is_waited_for() {
    let pair = Pair::new();
    let mut client = Client::open(pair.first.uri());
    let mut drain = spawn(&mut order(&pair.scratch, &pair.first, &["drain"]));
    let socket = pair.socket();
    eventually("the gate", || ask(&socket, "GET /v1/drain", "").1["all"] == true);
    let refusal = Client::try_open(pair.first.uri(), &[]).err().unwrap().to_string();
    assert!(refusal.contains("shutting down"), "{refusal}");
    assert!(client.read(0, 4096) == pair.bytes[..4096], "who is there is served");
    assert_eq!(drain.try_wait().unwrap(), None, "it is not empty");
    let text = run(&mut order(&pair.scratch, &pair.first, &["status"]));
    assert!(text.contains("OUT OF SERVICE"), "{text}");
    run(&mut order(&pair.scratch, &pair.first, &["drain", "--cancel"]));
    let output = drain.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("called the drain off"), "{output:?}");
    let another = Client::open(pair.first.uri());
    let mut drain = spawn(&mut order(&pair.scratch, &pair.first, &["drain", "image"]));
    let mut said = std::io::BufReader::new(drain.stdout.take().unwrap());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "2 connections are left\n");
    drop((client, another));
    let output = drain.wait_with_output().unwrap();
    let said = std::io::read_to_string(said).unwrap();
    assert!(
        output.status.success() && said.contains("has to leave by itself") && said.contains("image is empty"),
        "{said}"
    );
}

#[test]
fn a_drain_closes_who_cannot_be_told_if_it_may() {
    let pair = Pair::new();
    let mut clients: Vec<_> = (0..3).map(|_| Client::open(pair.first.uri())).collect();
    let text = run(&mut order(&pair.scratch, &pair.first, &["drain", "--close", "--json"]));
    let report: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&report["clients"], &report["reports"][0]["counts"]["moved"]), (&json!([]), &json!(3)), "{report}");
    assert!(clients.iter_mut().all(|client| client.socket.is_closed_by_peer()));
    // To where nothing fits, nothing is begun.
    let other = pair.scratch.file("other.raw", &noise(SIZE, 9));
    let other = serve(&pair.scratch, "other", &other, &["--read-only"]);
    run(&mut order(&pair.scratch, &pair.first, &["drain", "--cancel"]));
    let complaint = ends_with(1, &mut order(&pair.scratch, &pair.first, &["drain", "--to", other.uri()]));
    assert!(complaint.contains("does not say what it holds"), "{complaint}");
    Client::open(pair.first.uri());
}

#[test]
fn reports_are_there_after_a_crash() {
    let pair = Pair::new();
    let _client = Client::open(pair.first.uri());
    let report = pair.redirect(pair.second.uri(), &[], 0);
    let Pair { scratch, image, first, second, .. } = pair;
    first.kill();
    let first = serve(&scratch, "first", &image, &["--read-only"]);
    let socket = socket_of(&scratch, &first);
    let (_, list) = ask(&socket, "GET /v1/redirects", "");
    let kept = &list["redirects"][0];
    assert_eq!(
        (&kept["order"], &kept["state"], &kept["to"]),
        (&report["order"], &json!("done"), &json!([second.uri()]))
    );
    assert_eq!((&kept["clients"][0]["id"], &kept["counts"]["moved"]), (&json!(1), &json!(1)));
    let text = run(&mut order(&scratch, &first, &["redirect", "--list"]));
    assert!(text.contains("done"), "{text}");
}

#[test]
fn orders_that_cannot_be_written_down_are_taken_and_say_so() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let first = serve(&scratch, "first", &image, &["--read-only", "--state", "/proc/no/such"]);
    let second = serve(&scratch, "second", &image, &["--read-only"]);
    let _client = Client::open(first.uri());
    let redirect = ["redirect", "image", "--wait", "--json", "--force", "--to", second.uri()];
    let report = run(&mut order(&scratch, &first, &redirect));
    assert!(report.contains("\"durable\": false") && report.contains("a restart forgets"), "{report}");
}

#[test]
fn what_makes_no_sense_is_refused_with_its_code_and_a_reason() {
    let pair = Pair::new();
    let socket = pair.socket();
    let to = format!("\"to\": [{:?}]", pair.second.uri());
    let many = format!("{{\"to\": [{}]}}", vec!["\"nbd://a/b\""; 17].join(","));
    for (line, body, code, reason) in [
        ("POST /v1/exports/image/redirect", "{}", 400, "where to"),
        ("POST /v1/exports/image/redirect", "{\"too\": []}", 400, "unknown field `too`"),
        ("POST /v1/exports/image/redirect", "{\"to\": [\"http://a\"]}", 400, "unknown scheme"),
        ("POST /v1/exports/image/redirect", &many, 400, "16 servers"),
        ("POST /v1/exports/other/redirect", &format!("{{{to}}}"), 404, "\"other\""),
        ("POST /v1/exports/image/redirect", &format!("{{{to}, \"fraction\": 2}}"), 400, "at most 1"),
        ("POST /v1/exports/image/redirect", &format!("{{{to}, \"count\": 1, \"all\": true}}"), 400, "only one"),
        ("POST /v1/exports/image/redirect", &format!("{{{to}, \"clients\": [5]}}"), 400, "no client 5"),
        ("POST /v1/exports/image/redirect", &format!("{{{to}, \"way\": \"fly\"}}"), 400, "unknown variant"),
        ("GET /v1/exports/image/redirect", "", 405, "cannot be done"),
        ("GET /v1/redirects/1", "", 404, "no such order"),
        ("DELETE /v1/redirects/1", "", 404, "no such order"),
        ("GET /v1/redirects/x", "", 400, ""),
        ("POST /v1/exports/other/drain", "{}", 404, "\"other\""),
        ("POST /v1/drain", "{\"way\": 1}", 400, "unknown field `way`"),
        ("DELETE /v1/exports/image/drain", "", 409, "not out of service"),
    ] {
        let (answered, answer) = ask(&socket, line, body);
        let error = answer["error"].as_str().unwrap();
        assert!(answered == code && error.contains(reason), "{line} {body:.40}: {answered} {error}");
    }
    assert_eq!(ask(&socket, "GET /v1/redirects", "").1, json!({"redirects": []}));
    assert_eq!(ask(&socket, "GET /v1/drain", "").1["all"], false);
}

/// A mirror of a server of one image.
fn mirror(scratch: &Scratch, name: &str, upstream: &str) -> Daemon {
    let (log, mut command) = mirror_command(scratch, name, upstream);
    command.arg(ON_DEMAND);
    Daemon::start(command, 1, &log)
}

/// Waits until so many mirrors listen for news at a server.
fn await_listeners(scratch: &Scratch, server: &Daemon, count: usize) {
    eventually("mirrors that listen", || {
        let clients = status(scratch, server)["clients"].as_array().unwrap().clone();
        clients.iter().filter(|client| client["hears_notices"] == true).count() == count
    });
}

/// The server that a mirror fetches from.
fn current(scratch: &Scratch, mirror: &Daemon) -> String {
    let status = status(scratch, mirror);
    let upstreams = status["images"][0]["mirror"]["upstreams"].as_array().unwrap().clone();
    let current = upstreams.iter().find(|upstream| upstream["current"] == true);
    current.unwrap_or_else(|| panic!("{status}"))["uri"].as_str().unwrap().to_owned()
}

#[test]
fn mirrors_are_told_and_those_below_them_notice_nothing() {
    let pair = Pair::new();
    let one = mirror(&pair.scratch, "one", pair.first.uri());
    let two = mirror(&pair.scratch, "two", pair.first.uri());
    let below = mirror(&pair.scratch, "below", one.uri());
    let readers: Vec<_> = (0..4).map(|seed| Reader::start(below.uri(), &pair.bytes, seed)).collect();
    let (first, second) = (pair.first.uri(), pair.second.uri());
    for (from, to) in [(&pair.first, second), (&pair.second, first), (&pair.first, second)] {
        await_listeners(&pair.scratch, from, 2);
        let text = run(&mut order(&pair.scratch, from, &["redirect", "image", "--to", to, "--wait", "--json"]));
        let report: Value = serde_json::from_str(&text).unwrap();
        let clients = report["clients"].as_array().unwrap();
        let is_moved =
            |client: &Value| client["way"] == "notice" && client["state"] == "moved" && client["mirror"].is_string();
        assert!(clients.len() == 2 && clients.iter().all(is_moved), "{report}");
        // What is beside the image is read over connections of its own.
        eventually("nobody", || status(&pair.scratch, from)["clients"] == json!([]));
        eventually("both there", || [&one, &two].iter().all(|mirror| current(&pair.scratch, mirror) == to));
        readers.iter().for_each(|reader| reader.go_on(5));
    }
    for reader in readers {
        assert!(reader.end() < SOON);
    }
}

#[test]
fn a_mirror_is_never_sent_to_itself() {
    let pair = Pair::new();
    let mirror = mirror(&pair.scratch, "mirror", pair.first.uri());
    await_listeners(&pair.scratch, &pair.first, 1);
    let reader = pair.reader(2);
    let complaint = ends_with(1, &mut pair.command(mirror.uri(), &[]));
    assert!(complaint.contains("still cost this server"), "{complaint}");
    let report = pair.redirect(mirror.uri(), &["--force"], 0);
    assert_eq!(report["counts"]["total"], 1, "{report}");
    assert_eq!((&report["clients"][0]["way"], &report["clients"][0]["mirror"]), (&json!("relay"), &Value::Null));
    reader.go_on(20);
    assert_eq!(current(&pair.scratch, &mirror), pair.first.uri());
    reader.end();
}

#[test]
fn a_drain_moves_mirrors_and_waits_for_everybody_else() {
    let pair = Pair::new();
    let mirror = mirror(&pair.scratch, "mirror", pair.first.uri());
    await_listeners(&pair.scratch, &pair.first, 1);
    let mut client = Client::open(pair.first.uri());
    // Without the name of an export.
    let to = pair.second.uri().replace("/image?", "/?");
    let drain = spawn(&mut order(&pair.scratch, &pair.first, &["drain", "--to", &to]));
    eventually("the mirror there", || current(&pair.scratch, &mirror) == pair.second.uri());
    eventually("the client alone", || pair.clients().len() == 1);
    assert!(client.read(0, 4096) == pair.bytes[..4096]);
    drop(client);
    let output = drain.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
}

#[test]
fn an_order_to_a_mirror_goes_on_after_a_crash() {
    let pair = Pair::new();
    let mirror = mirror(&pair.scratch, "mirror", pair.first.uri());
    await_listeners(&pair.scratch, &pair.first, 1);
    // It hears nothing while the order is given.
    mirror.signal("STOP");
    let _client = Client::open(pair.first.uri());
    let said = run(&mut pair.command(pair.second.uri(), &["--json"]));
    let taken: Value = serde_json::from_str(&said).unwrap();
    let id = taken["order"].as_u64().unwrap();
    let Pair { scratch, image, first, second, .. } = pair;
    first.kill();
    let first = serve(&scratch, "first", &image, &["--read-only"]);
    let socket = socket_of(&scratch, &first);
    let report = || ask(&socket, &format!("GET /v1/redirects/{id}"), "").1;
    assert_eq!(report()["state"], "active");
    let is_lost = |client: &Value| client["way"] == "relay" && client["state"] != "waiting";
    assert!(report()["clients"].as_array().unwrap().iter().any(is_lost), "{}", report());
    mirror.signal("CONT");
    eventually("its end", || report()["state"] == "done");
    let told = report()["clients"].as_array().unwrap().iter().find(|client| client["way"] == "notice").unwrap().clone();
    assert_eq!(told["state"], "moved", "{told}");
    assert_eq!(current(&scratch, &mirror), second.uri());
}
