//! Ten thousand hostile connections, and clients that are served meanwhile.
//!
//! What takes how long is measured by `lab hostile`; here is what must hold whatever it takes.

#[path = "../../tools/lab/src/attack.rs"]
mod attack;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use headwater::export::conformance::Random;

use self::attack::{Outcome, Victim};
use crate::support::client::Client;
use crate::support::{Daemon, Scratch, eventually, noise, run};

const SIZE: usize = 40 << 20;
const CONNECTIONS: u64 = 10_000;
const AT_ONCE: u64 = 50;
/// Memory that an attack may cost, in KiB: what all connections may have in flight together, and a little for each.
const MOST_MEMORY: u64 = 640 << 10;

/// Reads here and there and checks all of it, over one connection for a while and then over the next.
fn read_until(uri: &str, bytes: &[u8], stop: &AtomicBool, reads: &AtomicU64) {
    let mut random = Random::new(7);
    while !stop.load(Ordering::Relaxed) {
        let mut client = Client::open(uri);
        for _ in 0..50 {
            let length = 1 + random.number() % 100_000;
            let offset = random.number() % (SIZE as u64 - length);
            assert!(client.read(offset, length) == bytes[offset as usize..(offset + length) as usize], "wrong bytes");
            reads.fetch_add(1, Ordering::Relaxed);
        }
        client.disconnect();
    }
}

/// The seconds of the log's lines above `debug`, by message.
fn seconds_of_lines(log: &str) -> BTreeMap<String, Vec<f64>> {
    let mut kinds = BTreeMap::<String, Vec<f64>>::new();
    for line in log.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"));
        assert!(line.to_string().len() < 1000, "{line}");
        let time: jiff::Timestamp = line["timestamp"].as_str().unwrap().parse().unwrap();
        kinds.entry(line["message"].as_str().unwrap().to_owned()).or_default().push(time.as_microsecond() as f64 / 1e6);
    }
    kinds
}

#[test]
fn ten_thousand_hostile_connections_disturb_nobody() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let bytes = noise(SIZE, 1);
    let (open, shut) = (scratch.file("open.raw", &bytes), scratch.file("shut.raw", &noise(4096, 3)));
    let token = scratch.file("token", b"a-token-that-nobody-guesses");
    std::fs::set_permissions(&token, std::fs::Permissions::from_mode(0o600)).unwrap();
    let probe = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let admin = probe.local_addr().unwrap();
    drop(probe);
    let log = scratch.path("serve.log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.args(["--log-format=json", "serve", "--read-only", "--listen=127.0.0.1:0", "--max-connections=200"]);
    command.args(["--allow=shut=192.0.2.1", "--handshake-timeout=5"]).arg(open).arg(shut);
    command.arg(format!("--admin={admin}")).arg("--admin-token").arg(&token);
    command.env("STATE_DIRECTORY", scratch.path("state")).stdout(Stdio::piped());
    command.stderr(std::fs::File::create(&log).unwrap());
    let server = Daemon::start(command, 2, &log);
    let uri = server.uri().to_owned();
    let nbd: SocketAddr = uri.trim_start_matches("nbd://").split('/').next().unwrap().parse().unwrap();
    let victim = Victim { nbd, admin: Some(admin), open: "open".to_owned(), shut: "shut".to_owned() };
    let (stop, reads, outcome) = (AtomicBool::new(false), AtomicU64::new(0), Outcome::default());
    // It knows all of the image, so what comes after is of the attack.
    assert!(Client::open(&uri).read(0, SIZE as u64) == bytes);
    let (before, most) = (server.resident_kib(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| read_until(&uri, &bytes, &stop, &reads));
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(server.resident_kib(), Ordering::Relaxed);
                std::thread::yield_now();
            }
        });
        eventually("first reads", || reads.load(Ordering::Relaxed) > 100);
        attack::run(&victim, CONNECTIONS, AT_ONCE, &AtomicBool::new(false), &outcome);
        let so_far = reads.load(Ordering::Relaxed);
        eventually("reads after the attack", || reads.load(Ordering::Relaxed) > so_far + 100);
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(outcome.total() + outcome.refused.load(Ordering::Relaxed), CONNECTIONS);
    assert_eq!(outcome.refused.load(Ordering::Relaxed), 0, "somebody had no connection at all");
    assert_eq!((outcome.leaks.into_inner(), outcome.guessed.into_inner()), (0, 0));
    let most = most.into_inner();
    assert!(most < before + MOST_MEMORY, "{most} KiB after {before} KiB");
    // All of it is over, and the operator gets in.
    let mut status = Command::new(env!("CARGO_BIN_EXE_headwater"));
    status.args(["status", "--json", "--at", &admin.to_string(), "--token"]).arg(&token);
    eventually("end of all connections", || {
        let status: serde_json::Value = serde_json::from_str(&run(&mut status)).unwrap();
        status["clients"].as_array().unwrap().is_empty()
    });
    let kinds = seconds_of_lines(&server.log_text());
    for (message, seconds) in &kinds {
        // Those of the start are one for each image or socket.
        if matches!(message.as_str(), "serving" | "listening") {
            continue;
        }
        let closest = seconds.windows(2).map(|pair| pair[1] - pair[0]).fold(f64::INFINITY, f64::min);
        assert!(closest > 0.9, "{message:?} was logged {} times, {closest} s apart", seconds.len());
    }
    for message in
        ["client connected", "an export was denied to a client", "a request to the admin API had a wrong token"]
    {
        assert!(kinds.contains_key(message), "{message:?} is not in the log");
    }
}
