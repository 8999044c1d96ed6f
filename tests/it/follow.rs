//! Mirrors that go where they are told.
//!
//! The servers run within this process, so that a test can tell mirrors what no operator has ordered.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;

use headwater::disk::Preference;
use headwater::export::conformance::Random;
use headwater::export::memory::Memory;
use headwater::export::wrappers::Record;
use headwater::export::{Facts, ImageId, NodeId, Registry, SharedExport};
use headwater::net::{ListenAddress, Listener};
use headwater::server::{News, Server, Settings, Steering};
use headwater::worker::Workers;
use serde_json::Value;
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::oneshot;

use crate::support::cache::image_status;
use crate::support::client::Client;
use crate::support::{Daemon, ON_DEMAND, Scratch, eventually, mirror_command, noise};

const SIZE: usize = 32 << 20;
const CHUNK: u64 = 65_536;

/// A server of one image in memory, `x`. It dies when it is dropped.
struct Teller {
    uri: String,
    steering: Steering,
    record: Arc<Record>,
    reads: AtomicU64,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Teller {
    fn start(scratch: &Scratch, name: &str, bytes: &[u8]) -> Self {
        Self::start_saying(scratch, name, bytes, |_| {})
    }

    fn start_saying(scratch: &Scratch, name: &str, bytes: &[u8], say: impl FnOnce(&mut Facts)) -> Self {
        let memory: SharedExport = Arc::new(Memory::holding(bytes.to_vec()).read_only().with_facts(say));
        let record = Arc::new(Record::new(memory));
        let export: SharedExport = Arc::<Record>::clone(&record);
        let (path, (report, started), (stop, stopped)) = (scratch.path(name), mpsc::channel(), oneshot::channel());
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
            runtime.block_on(async move {
                let listeners = Listener::bind(&ListenAddress::Unix(path)).unwrap();
                let uri = listeners[0].uri("x").unwrap().to_string();
                let registry = Arc::new(Registry::new());
                registry.insert("x", export).unwrap();
                let workers = Arc::new(Workers::start(1, Preference::Threads).unwrap());
                let server = Server::start(registry, listeners, Arc::clone(&workers), Settings::default());
                report.send((uri, server.steering())).unwrap();
                // Also when it is dropped.
                let _ = stopped.await;
                // As a process that is killed: nothing is answered any more.
                drop(server);
                while Arc::strong_count(&workers) > 1 {
                    tokio::task::yield_now().await;
                }
                let workers = Arc::into_inner(workers).expect("the server had the other one");
                tokio::task::spawn_blocking(move || workers.stop()).await.unwrap();
            });
        });
        let (uri, steering) = started.recv().unwrap();
        Self { uri, steering, record, reads: AtomicU64::new(0), stop: Some(stop), thread: Some(thread) }
    }

    /// The mirror whose line for news is here now.
    fn listener(&self) -> Option<NodeId> {
        let clients = self.steering.clients.of_export("x");
        clients.iter().find(|client| client.hears_notices()).and_then(headwater::server::ClientHandle::node)
    }

    fn await_listener(&self) -> NodeId {
        eventually("mirror that listens", || self.listener().is_some());
        self.listener().unwrap()
    }

    fn has_clients(&self) -> bool {
        !self.steering.clients.of_export("x").is_empty()
    }

    /// Tells the mirror that is here to go to these servers.
    fn send_to(&self, uris: &[&str]) {
        let uris = uris.iter().map(|uri| uri.parse().unwrap()).collect();
        self.steering.notices.tell("x", self.await_listener(), News::Moved(uris));
    }

    /// Reads of the image so far.
    fn reads(&self) -> u64 {
        let more = self.record.take_reads().len() as u64;
        self.reads.fetch_add(more, Ordering::SeqCst) + more
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        drop(self.stop.take());
        self.thread.take().map(thread::JoinHandle::join);
    }
}

/// A mirror of `x` that has room for a part of the image only, so that it never stops to fetch.
fn mirror(scratch: &Scratch, uris: &str) -> Daemon {
    let (log, mut command) = mirror_command(scratch, "mirror", uris);
    command.args([ON_DEMAND, "--cache-size=10M"]);
    Daemon::start(command, 1, &log)
}

/// The servers of the mirror, and the one that is used.
fn upstreams(scratch: &Scratch, mirror: &Daemon) -> (Vec<String>, String) {
    let status = image_status(scratch, mirror, "x");
    let servers = status["mirror"]["upstreams"].as_array().unwrap();
    let uri = |server: &Value| server["uri"].as_str().unwrap().to_owned();
    let current = servers.iter().find(|server| server["current"] == true).map(uri).unwrap();
    (servers.iter().map(uri).collect(), current)
}

fn await_at(scratch: &Scratch, mirror: &Daemon, uri: &str) {
    eventually(&format!("mirror at {uri}: {}", mirror.log_text()), || upstreams(scratch, mirror).1 == uri);
}

/// Reads all over the image while `work` is done, and holds every byte against what it should be. What comes of the work
/// lives longer than the readers.
fn while_reading<T>(uri: &str, bytes: &[u8], work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for seed in 0..3 {
            let done = &done;
            scope.spawn(move || {
                let (mut client, mut random) = (Client::open(uri), Random::new(seed));
                while !done.load(Ordering::SeqCst) {
                    let at = random.below(SIZE as u64 / CHUNK) * CHUNK + random.below(CHUNK - 4096);
                    let read = client.read(at, 4096);
                    assert!(read == bytes[at as usize..][..4096], "wrong bytes at {at}");
                }
            });
        }
        // Readers end also if this panics.
        let ending = Ending(&done);
        let result = work();
        drop(ending);
        result
    })
}

struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn clients_read_on_while_their_mirror_is_sent_back_and_forth() {
    let scratch = Scratch::new();
    let bytes = noise(SIZE, 1);
    let tellers = ["a", "b"].map(|name| Teller::start(&scratch, name, &bytes));
    let mirror = mirror(&scratch, &tellers[0].uri);
    while_reading(mirror.uri(), &bytes, || {
        for turn in 0..20 {
            let (from, to) = (&tellers[turn % 2], &tellers[(turn + 1) % 2]);
            // What was told before is not taken back: each server still says to go to the other one.
            from.send_to(&[&to.uri]);
            to.await_listener();
            eventually("end of the old connections", || !from.has_clients());
            let (before, other) = (from.reads(), to.reads());
            eventually("reads from the new server", || to.reads() > other + 20);
            assert_eq!(from.reads(), before, "the old server is still read from");
            assert_eq!(upstreams(&scratch, &mirror).1, to.uri);
        }
    });
    let nodes: Vec<_> = tellers[0].steering.clients.of_export("x").iter().map(|client| client.node()).collect();
    assert!(nodes.len() >= 2 && nodes.iter().all(Option::is_some), "{nodes:?}");
    let log = mirror.stop();
    assert_eq!(log.lines("going to another upstream, as told").count(), 20);
    assert_eq!(log.lines("turning to another server").count(), 0);
}

#[test]
fn where_it_was_sent_is_remembered_until_it_is_told_or_configured_otherwise() {
    let scratch = Scratch::new();
    let bytes = noise(SIZE, 1);
    let [a, b] = ["a", "b"].map(|name| Teller::start(&scratch, name, &bytes));
    let file = scratch.path("mirror.cache/x/upstream");
    let both = vec![b.uri.clone(), a.uri.clone()];

    let first = mirror(&scratch, &a.uri);
    assert_eq!(upstreams(&scratch, &first), (vec![a.uri.clone()], a.uri.clone()));
    a.send_to(&[&b.uri]);
    await_at(&scratch, &first, &b.uri);
    eventually("memory", || file.exists());
    first.kill();
    let second = mirror(&scratch, &a.uri);
    assert_eq!(upstreams(&scratch, &second), (both, b.uri.clone()), "after a kill");

    // It never reads what the old server still says: it does not go there.
    let before = a.reads();
    assert!(Client::open(second.uri()).read(0, 1 << 20) == bytes[..1 << 20]);
    assert_eq!(a.reads(), before);
    a.steering.notices.forget("x", b.await_listener());
    b.send_to(&[&a.uri]);
    await_at(&scratch, &second, &a.uri);
    eventually("forgetting what is configured anyway", || !file.exists());
    b.steering.notices.forget("x", a.await_listener());

    // Others are configured: what was told counts no more.
    a.send_to(&[&b.uri]);
    await_at(&scratch, &second, &b.uri);
    eventually("memory", || file.exists());
    a.steering.notices.forget("x", b.await_listener());
    second.stop();
    let spare = format!("nbd+unix:///x?socket={}", scratch.path("nobody").display());
    let third = mirror(&scratch, &format!("{},{spare}", a.uri));
    assert_eq!(upstreams(&scratch, &third), (vec![a.uri.clone(), spare], a.uri.clone()));
    eventually("forgetting", || !file.exists());
    third.stop();

    // What is damaged is put aside.
    fs::write(&file, "damage").unwrap();
    let fourth = mirror(&scratch, &a.uri);
    fourth.wait_for_log("what was remembered of the upstream is damaged");
    assert_eq!(upstreams(&scratch, &fourth).1, a.uri);
    assert!(file.with_extension("damaged").exists() && !file.exists());
}

#[test]
fn a_mirror_stays_where_it_is_when_it_is_sent_to_the_wrong_place() {
    let scratch = Scratch::new();
    let (bytes, id) = (noise(SIZE, 1), |byte| Some(ImageId([byte; 32])));
    let a = Teller::start_saying(&scratch, "a", &bytes, |facts| facts.identity = id(1));
    let mirror = mirror(&scratch, &a.uri);
    let node = a.await_listener();
    let smaller = Teller::start_saying(&scratch, "smaller", &bytes[1..], |facts| facts.identity = id(1));
    let other = Teller::start_saying(&scratch, "other", &bytes, |facts| facts.identity = id(2));
    let back = Teller::start_saying(&scratch, "back", &bytes, |facts| {
        (facts.identity, facts.path) = (id(1), vec![NodeId([9; 16]), node]);
    });
    let nowhere = format!("nbd+unix:///x?socket={}", scratch.path("later").display());
    let places = [
        (&*smaller.uri, "33554431 bytes"),
        (&other.uri, "blake3-02"),
        (&back.uri, "a loop"),
        (mirror.uri(), "a loop"),
        (&nowhere, "cannot connect"),
    ];
    for (count, (uri, reason)) in (1..).zip(places) {
        a.send_to(&[uri]);
        eventually("refusal", || mirror.log_text().matches("which cannot be used: staying").count() == count);
        let log = mirror.log_text();
        let refusal = log.lines().rfind(|line| line.contains("which cannot be used: staying")).unwrap();
        assert!(refusal.contains(reason) && refusal.contains(uri), "{refusal}");
        assert_eq!(upstreams(&scratch, &mirror), (vec![a.uri.clone()], a.uri.clone()));
        assert!(Client::open(mirror.uri()).read(0, 4096) == bytes[..4096]);
    }
    for teller in [&smaller, &other, &back] {
        assert_eq!(teller.reads(), 0);
    }
    // The last one comes up in the end, and is gone to without being told again.
    let later = Teller::start_saying(&scratch, "later", &bytes, |facts| facts.identity = id(1));
    await_at(&scratch, &mirror, &later.uri);
    assert_eq!(mirror.stop().lines("told to go to another upstream, which cannot be used: staying").count(), 5);
}

#[test]
fn a_server_that_dies_on_either_side_of_the_way_costs_no_reader_anything() {
    let scratch = Scratch::new();
    let bytes = noise(SIZE, 1);
    let (a, b) = (Teller::start(&scratch, "a", &bytes), Teller::start(&scratch, "b", &bytes));
    let mirror = mirror(&scratch, &a.uri);
    let servers = while_reading(mirror.uri(), &bytes, || {
        // The old one dies as soon as it is left.
        let uri = a.uri.clone();
        a.send_to(&[&b.uri]);
        b.await_listener();
        drop(a);
        await_at(&scratch, &mirror, &b.uri);
        // The new one dies: what is configured is there again, and is gone back to.
        let a = Teller::start(&scratch, "a", &bytes);
        assert_eq!(a.uri, uri);
        drop(b);
        let node = a.await_listener();
        await_at(&scratch, &mirror, &a.uri);
        // It still says to go to the new one; that is gone to when it lives again.
        let there = format!("nbd+unix:///x?socket={}", scratch.path("b").display());
        a.steering.notices.tell("x", node, News::Moved(vec![there.parse().unwrap()]));
        mirror.wait_for_log("staying");
        let b = Teller::start(&scratch, "b", &bytes);
        await_at(&scratch, &mirror, &b.uri);
        eventually("end of the old connections", || !a.has_clients());
        let before = b.reads();
        eventually("reads from the new server", || b.reads() > before + 20);
        (a, b)
    });
    drop(servers);
}

#[test]
fn other_servers_are_named_without_leaving_the_present_one() {
    let scratch = Scratch::new();
    let bytes = noise(SIZE, 1);
    let [a, b, c] = ["a", "b", "c"].map(|name| Teller::start(&scratch, name, &bytes));
    let mirror = mirror(&scratch, &a.uri);
    let uris = |tellers: &[&Teller]| tellers.iter().map(|teller| teller.uri.parse().unwrap()).collect();
    a.steering.notices.tell("x", a.await_listener(), News::Upstreams(uris(&[&b, &a])));
    eventually("another list", || upstreams(&scratch, &mirror).0 == [b.uri.clone(), a.uri.clone()]);
    assert_eq!(upstreams(&scratch, &mirror).1, a.uri);
    assert!(!b.has_clients());
    a.steering.notices.tell("x", a.await_listener(), News::Upstreams(uris(&[&c])));
    await_at(&scratch, &mirror, &c.uri);
    assert!(Client::open(mirror.uri()).read(0, 4096) == bytes[..4096]);
    assert_eq!((c.reads() > 0, a.reads()), (true, 0));
}
