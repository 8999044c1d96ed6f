//! `headwater balance`: clients of uneven load, moved between real servers while they read.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use headwater::export::conformance::Random;
use serde_json::Value;

use crate::admin::socket_of;
use crate::support::cache::{index, status};
use crate::support::client::Client;
use crate::support::{Daemon, Scratch, eventually, headwater, noise, run};

const SIZE: usize = 4 << 20;
/// Bytes of a read.
const BLOCK: u64 = 32 << 10;
/// How long a balancer may take to do anything; only a failing test waits so long.
const PATIENCE: Duration = Duration::from_secs(120);

/// Servers of one image.
struct Ground {
    scratch: Scratch,
    bytes: Arc<Vec<u8>>,
    servers: Vec<Daemon>,
}

impl Ground {
    fn new(servers: usize) -> Self {
        let scratch = Scratch::new();
        let bytes = Arc::new(noise(SIZE, 5));
        let image = scratch.file("image.raw", &bytes);
        index(&scratch, &image, &[]);
        let serve = |number: usize| {
            let log = scratch.path(&format!("s{number}.log"));
            let mut command = headwater(&log);
            command.arg("serve").arg(&image).arg("--read-only");
            command.arg("--unix").arg(scratch.path(&format!("s{number}.sock")));
            Daemon::start(command, 1, &log)
        };
        let servers = (0..servers).map(serve).collect();
        Self { scratch, bytes, servers }
    }

    fn admin(&self, server: &Daemon) -> String {
        socket_of(&self.scratch, server).display().to_string()
    }

    fn command(&self, words: &[&str]) -> Command {
        let servers: Vec<_> = self.servers.iter().map(|server| self.admin(server)).collect();
        let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
        command.args(["balance", "--json", "--interval=1s", "--servers", &servers.join(",")]).args(words);
        command
    }

    /// Clients of the first server.
    fn crowd(&self, weights: &[u64]) -> Crowd {
        Crowd::start(self.servers[0].uri(), &self.bytes, weights)
    }

    /// Where each client of the first server is served, and what it has read in all: that is its weight, for all have gone
    /// the same number of rounds.
    fn places(&self) -> Vec<(Option<String>, u64)> {
        let status = status(&self.scratch, &self.servers[0]);
        let clients = status["clients"].as_array().unwrap().iter();
        let ours = clients.filter(|client| client["is_relay"] != true && client["mirror"].is_null());
        let place =
            |client: &Value| (client["relayed_to"].as_str().map(str::to_owned), client["read_bytes"].as_u64().unwrap());
        ours.map(place).collect()
    }
}

/// Clients that go in rounds: in each, every one reads as many blocks as is its weight. So their rates are in the relation
/// of their weights, however fast servers are.
struct Crowd {
    stop: Arc<AtomicBool>,
    idle: Arc<AtomicBool>,
    rounds: Arc<AtomicU64>,
    failure: Arc<Mutex<Option<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Crowd {
    fn start(uri: &str, bytes: &Arc<Vec<u8>>, weights: &[u64]) -> Self {
        let this = Self {
            stop: Arc::default(),
            idle: Arc::default(),
            rounds: Arc::default(),
            failure: Arc::default(),
            threads: Vec::new(),
        };
        let (barrier, is_last) = (Arc::new(Barrier::new(weights.len())), Arc::new(AtomicBool::new(false)));
        let mut threads = Vec::new();
        for (number, weight) in weights.iter().copied().enumerate() {
            let mut client = Client::open(uri);
            let (barrier, is_last, bytes) = (Arc::clone(&barrier), Arc::clone(&is_last), Arc::clone(bytes));
            let (stop, idle, rounds) = (Arc::clone(&this.stop), Arc::clone(&this.idle), Arc::clone(&this.rounds));
            let failure = Arc::clone(&this.failure);
            threads.push(std::thread::spawn(move || {
                let mut random = Random::new(number as u64 * 2 + 1);
                loop {
                    if barrier.wait().is_leader() {
                        is_last.store(stop.load(Ordering::SeqCst), Ordering::SeqCst);
                        rounds.fetch_add(1, Ordering::SeqCst);
                    }
                    barrier.wait();
                    if is_last.load(Ordering::SeqCst) {
                        return;
                    }
                    if idle.load(Ordering::SeqCst) {
                        std::thread::yield_now();
                        continue;
                    }
                    // Who has failed goes on with the rounds, so that the others do not wait for ever.
                    if failure.lock().unwrap().is_some() {
                        continue;
                    }
                    for _ in 0..weight {
                        if let Err(why) = read(&mut client, &mut random, &bytes) {
                            *failure.lock().unwrap() = Some(format!("client {number}: {why}"));
                            break;
                        }
                    }
                }
            }));
        }
        Self { threads, ..this }
    }

    fn check(&self) {
        assert_eq!(*self.failure.lock().unwrap(), None);
    }

    /// Waits until all have read so many times more.
    fn go_on(&self, count: u64) {
        let from = self.rounds.load(Ordering::SeqCst);
        eventually("rounds", || {
            self.check();
            self.rounds.load(Ordering::SeqCst) >= from + count
        });
    }

    /// Nobody reads any more, and all stay connected.
    fn rest(&self) {
        self.idle.store(true, Ordering::SeqCst);
    }

    fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(*self.failure.lock().unwrap(), None);
    }
}

fn read(client: &mut Client, random: &mut Random, bytes: &[u8]) -> Result<(), String> {
    let start = random.below(bytes.len() as u64 - BLOCK);
    let read = client.try_read(start, BLOCK).map_err(|error| format!("{start}: {error}"))?;
    let is_right = read == bytes[start as usize..][..BLOCK as usize];
    if is_right { Ok(()) } else { Err(format!("wrong bytes at {start}")) }
}

/// A balancer at work.
struct Watch {
    child: Child,
    lines: Receiver<Value>,
}

impl Watch {
    fn start(mut command: Command) -> Self {
        let mut child = command.arg("--watch").stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines() {
                if sender.send(serde_json::from_str(&line.unwrap()).unwrap()).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    /// Waits for a look of this kind, and gives all until then.
    fn until(&self, what: &str, is: impl Fn(&Value) -> bool) -> Vec<Value> {
        let mut seen = Vec::new();
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("no {what}: {}", serde_json::to_string(&seen).unwrap()));
            eprintln!("{line}");
            seen.push(line);
            if is(&seen[seen.len() - 1]) {
                return seen;
            }
        }
    }

    /// Passes over the looks so far and the next two.
    fn fresh(&self) {
        self.lines.try_iter().for_each(drop);
        self.until("a look", |_| true);
        self.until("another", |_| true);
    }

    /// Ends it as a person would.
    fn end(mut self) -> Option<i32> {
        run(Command::new("kill").arg("-INT").arg(self.child.id().to_string()));
        let mut code = None;
        eventually("end of it", || {
            code = self.child.try_wait().unwrap();
            code.is_some()
        });
        code.unwrap().code()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn steps(looks: &[Value]) -> Vec<&Value> {
    looks.iter().filter(|look| look["verdict"] == "moved").collect()
}

/// 24 clients of six kinds.
fn uneven() -> Vec<u64> {
    (0..24).map(|number| 1 + number * 5 % 6).collect()
}

/// What each place has of the weights.
fn shares(places: &[(Option<String>, u64)]) -> Vec<(Option<String>, u64)> {
    let mut shares = std::collections::BTreeMap::new();
    for (place, weight) in places {
        *shares.entry(place.clone()).or_insert(0) += weight;
    }
    shares.into_iter().collect()
}

/// Whether so many places have about the same.
fn are_even(shares: &[(Option<String>, u64)], count: usize) -> bool {
    let mean = shares.iter().map(|(_, share)| share).sum::<u64>() as f64 / count as f64;
    // The tolerance is 20 %; rates are measured, and weights are not.
    shares.len() == count && shares.iter().all(|(_, share)| (*share as f64 / mean - 1.0).abs() < 0.3)
}

#[test]
fn three_servers_share_24_uneven_clients_and_survive_the_death_of_one() {
    let mut ground = Ground::new(3);
    let weights = uneven();
    let crowd = ground.crowd(&weights);
    crowd.go_on(3);
    let watch = Watch::start(ground.command(&[]));
    let looks = watch.until("balance", |look| look["verdict"] == "within" && look["step"].as_u64() > Some(1));
    let steps = steps(&looks);
    eprintln!("{} steps", steps.len());
    assert!((1..=5).contains(&steps.len()), "{steps:?}");
    for each in steps.iter().flat_map(|step| step["moves"].as_array().unwrap()) {
        assert_eq!(each["moved"], true, "{each}");
    }
    let shared = shares(&ground.places());
    assert!(are_even(&shared, 3), "{shared:?}");
    crowd.go_on(3);
    // The last one dies: its clients are served where they are connected, and are shared again.
    ground.servers.pop().unwrap().kill();
    let is_gone = |look: &Value| look["servers"][2]["reachable"] == false;
    watch.until("news of the death", is_gone);
    eventually("nobody is served by the dead", || shares(&ground.places()).len() == 2);
    // The first look may have been asked before, and the second may have waited for it.
    watch.fresh();
    watch.until("balance of two", |look| look["verdict"] == "within" && is_gone(look));
    crowd.go_on(3);
    let shared = shares(&ground.places());
    assert!(are_even(&shared, 2), "{shared:?}");
    assert!(watch.end().is_some());
    crowd.stop();
}

#[test]
fn a_dry_run_moves_nobody_and_one_plan_is_carried_out() {
    let ground = Ground::new(3);
    let weights = uneven();
    let crowd = ground.crowd(&weights);
    crowd.go_on(3);
    let output = ground.command(&["--dry-run"]).output().unwrap();
    let look: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &look["verdict"]), (Some(3), &"move".into()), "{look}");
    assert!(!look["moves"].as_array().unwrap().is_empty());
    assert!(ground.places().iter().all(|(place, _)| place.is_none()), "a dry run moved somebody");
    let output = ground.command(&[]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let shared = shares(&ground.places());
    assert!(are_even(&shared, 3), "{shared:?}: {text}");
    crowd.stop();
}

#[test]
fn who_is_relayed_is_moved_on_and_back_from_where_it_is_connected() {
    let ground = Ground::new(3);
    // All are relayed to the second server by hand.
    let crowd = ground.crowd(&[2; 6]);
    crowd.go_on(3);
    let to = ground.servers[1].uri().to_owned();
    run(Command::new(env!("CARGO_BIN_EXE_headwater")).args([
        "redirect",
        "image",
        "--all",
        "--wait",
        "--to",
        &to,
        "--at",
        &ground.admin(&ground.servers[0]),
    ]));
    crowd.go_on(3);
    let output = ground.command(&["--by=clients"]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    let moves: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for each in moves[1]["moves"].as_array().unwrap() {
        assert_eq!(each["at"], ground.admin(&ground.servers[0]), "{each}");
        assert_eq!(each["from"], ground.admin(&ground.servers[1]), "{each}");
    }
    let ones: Vec<_> = ground.places().into_iter().map(|(place, _)| (place, 1)).collect();
    let shared = shares(&ones);
    assert_eq!(shared.iter().map(|(_, count)| *count).collect::<Vec<_>>(), [2, 2, 2], "{shared:?}");
    // The third server hears the first one's relay, and nobody is relayed twice.
    for server in &ground.servers[1..] {
        let status = status(&ground.scratch, server);
        let clients = status["clients"].as_array().unwrap();
        assert!(clients.iter().all(|client| client["relayed_to"].is_null() && client["is_relay"] == true), "{status}");
    }
    crowd.go_on(3);
    crowd.stop();
}

#[test]
fn a_standby_comes_when_it_is_slow_and_goes_when_it_is_idle() {
    let ground = Ground::new(1);
    let standby = Daemon::mirror(&ground.scratch, ground.servers[0].uri(), &["--fill=none"]);
    let crowd = ground.crowd(&[1; 8]);
    crowd.go_on(3);
    let admin = ground.admin(&standby);
    // Whoever reads at all is too slow.
    let watch = Watch::start(ground.command(&["--standby", &admin, "--target-latency=1us"]));
    watch.until("call for the standby", |look| look["standbys"] == "bring in");
    watch.until("clients at the standby", |look| look["verdict"] == "moved");
    let relayed = ground.places().iter().filter(|(place, _)| place.is_some()).count();
    assert!((2..=6).contains(&relayed), "{relayed} of 8 were moved");
    crowd.go_on(3);
    crowd.rest();
    watch.until("end of the standby", |look| look["standbys"] == "stand down");
    watch.until("way back", |look| look["verdict"] == "moved");
    assert!(ground.places().iter().all(|(place, _)| place.is_none()), "somebody is still there");
    assert!(watch.end().is_some());
    crowd.stop();
}

#[test]
fn a_server_that_does_not_answer_takes_no_part() {
    let mut ground = Ground::new(2);
    let crowd = ground.crowd(&[1; 4]);
    crowd.go_on(3);
    let command = ground.command(&["--dry-run"]);
    ground.servers.pop().unwrap().kill();
    let mut command = command;
    let output = command.output().unwrap();
    let look: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((output.status.code(), &look["verdict"]), (Some(0), &"within".into()), "{look}");
    assert!(look["servers"][1]["error"].as_str().unwrap().contains("cannot connect"), "{look}");
    crowd.stop();
    // And if nobody answers, that is a failure.
    ground.servers.pop().unwrap().kill();
    assert_eq!(command.output().unwrap().status.code(), Some(1));
}
