//! `headwater cast`: one sending that fills many mirrors, and what becomes of them when things go wrong.

use std::net::SocketAddrV4;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use headwater::cast::form::{Datagram, Need, Phase, Report, Run, Standing, Word};
use headwater::export::conformance::Random;
use headwater::manifest::ImageId;
use serde_json::{Value, json};

use crate::admin::ends_with;
use crate::support::cables::{CABLE, Cables};
use crate::support::cache::{Sampler, assert_holds, image_status, index, order, status};
use crate::support::client::Client;
use crate::support::group::{Member, NOBODY, own_group, tagged};
use crate::support::readers::Readers;
use crate::support::{Daemon, Scratch, eventually, headwater, mirror_command, noise, resident_kib, run};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 24 * MIB;
/// Of these, so many are zero.
const ZEROES: u64 = 3 * MIB;
const DATA: u64 = SIZE - ZEROES;
/// So slow that what is done meanwhile is done in time.
const SLOWLY: &str = "--rate=2M";

/// An image with zeroes in it, its manifest, a server of it, and a group.
struct Ground {
    scratch: Scratch,
    bytes: Arc<Vec<u8>>,
    server: Daemon,
    image: ImageId,
    group: SocketAddrV4,
}

/// An image like no other of another seed.
fn content(seed: u64) -> Vec<u8> {
    let mut bytes = noise(SIZE as usize, seed);
    bytes[(7 * MIB) as usize..][..ZEROES as usize].fill(0);
    bytes
}

/// A server of an image on a unix socket, one of several.
fn serve(scratch: &Scratch, name: &str, image: &Path) -> Daemon {
    let log = scratch.path(&format!("{name}.log"));
    let mut command = headwater(&log);
    command.arg("serve").arg(format!("image={}", image.display())).arg("--read-only");
    command.arg("--unix").arg(scratch.path(&format!("{name}.sock")));
    Daemon::start(command, 1, &log)
}

impl Ground {
    fn new() -> Self {
        let scratch = Scratch::new();
        let bytes = content(1);
        let image = scratch.file("image.raw", &bytes);
        let identity = index(&scratch, &image, &[]);
        let server = serve(&scratch, "serve", &image);
        Self { scratch, bytes: Arc::new(bytes), server, image: identity.parse().unwrap(), group: own_group() }
    }

    /// A mirror of the server that has joined the group.
    fn mirror(&self, name: &str, words: &[&str]) -> Daemon {
        self.mirror_of(name, self.server.uri(), words)
    }

    fn mirror_of(&self, name: &str, upstream: &str, words: &[&str]) -> Daemon {
        let join = format!("--join={}", self.group);
        let all = [&["--fill=none", "--interface=lo", join.as_str()], words].concat();
        Daemon::mirror_named(&self.scratch, name, upstream, &all)
    }

    fn mirrors(&self, count: usize) -> Vec<Daemon> {
        (0..count).map(|number| self.mirror(&format!("mirror{number}"), &[])).collect()
    }

    /// `headwater cast` at a server.
    fn cast_at(&self, server: &Daemon, words: &[&str]) -> Command {
        let group = format!("--group={}", self.group);
        order(&self.scratch, server, &[&["cast", "image", &group, "--interface=lo", "--json"], words].concat())
    }

    fn cast(&self, words: &[&str]) -> Command {
        self.cast_at(&self.server, words)
    }

    /// Begins a session, and waits until it is sending.
    fn begin(&self, words: &[&str]) -> Casting {
        let casting = Casting::start(self.cast(words));
        self.until_sending(&self.server);
        casting
    }

    fn until_sending(&self, server: &Daemon) {
        eventually("sending", || status(&self.scratch, server)["casts"][0]["state"] == "sending");
    }

    fn session(&self) -> Value {
        status(&self.scratch, &self.server)["casts"][0].clone()
    }

    /// What a mirror has heard of the only session of its only group.
    fn heard(&self, mirror: &Daemon) -> Value {
        status(&self.scratch, mirror)["receptions"][0]["sessions"][0].clone()
    }

    fn of_mirror(&self, mirror: &Daemon) -> Value {
        image_status(&self.scratch, mirror, "image")["mirror"].clone()
    }

    fn here(&self, mirror: &Daemon) -> u64 {
        let told = self.of_mirror(mirror);
        number(&told, "resident_bytes") + number(&told, "zero_bytes")
    }

    /// Waits until everything is there, and compares it.
    fn until_whole(&self, mirrors: &[Daemon]) {
        for mirror in mirrors {
            eventually("whole image", || self.here(mirror) == SIZE);
            assert_holds(mirror.uri(), &self.bytes);
        }
    }
}

fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no {field}: {value}"))
}

/// What is waited for. Killed when it is dropped; the session goes on then.
struct Casting(Option<Child>);

impl Casting {
    fn start(mut command: Command) -> Self {
        Self(Some(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()))
    }

    /// Waits for the end, which has this exit status, and gives back what was said of it.
    fn ends_with(mut self, code: i32) -> Value {
        let output = self.0.take().unwrap().wait_with_output().unwrap();
        let (text, complaint) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{complaint}{text}");
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"))
    }
}

impl Drop for Casting {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// How many receivers of a session are in a state.
fn count(session: &Value, state: &str) -> usize {
    session["receivers"].as_array().unwrap().iter().filter(|receiver| receiver["state"] == state).count()
}

#[test]
fn one_sending_fills_three_mirrors() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(3);
    let told = Casting::start(ground.cast(&["--all", "--wait-for=3"])).ends_with(0);
    assert_eq!((&told["state"], &told["image"], &told["error"]), (&json!("done"), &json!("image"), &Value::Null));
    assert_eq!((count(&told, "complete"), told["receivers"].as_array().unwrap().len()), (3, 3), "{told}");
    assert_eq!((number(&told, "total_bytes"), number(&told, "cast")), (DATA, 1), "{told}");
    assert_eq!(number(&told, "passed_blocks"), number(&told, "blocks"), "{told}");
    // Complete is not yet durable, which is what the status tells.
    ground.until_whole(&mirrors);
    for mirror in &mirrors {
        assert_eq!(ground.heard(mirror)["state"], "complete");
        assert_eq!(number(&ground.of_mirror(mirror)["fill"]["multicast"], "brought_bytes"), DATA);
    }
    let Ground { server, .. } = ground;
    // Somebody may have had no time to listen; hardly more.
    let sent = server.stop().sent();
    assert!(sent <= DATA / 20, "{sent} bytes were fetched by unicast");
}

#[test]
fn what_is_there_is_not_taken_and_zeroes_are_not_sent() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(1);
    run(&mut order(&ground.scratch, &mirrors[0], &["prefetch", "image", "--range=12M..", "--wait"]));
    let before = number(&ground.of_mirror(&mirrors[0]), "upstream_bytes");
    let told = Casting::start(ground.cast(&["--all", "--wait-for=1"])).ends_with(0);
    let symbol = number(&told, "symbol_bytes");
    let sent = number(&told, "data_symbols") * symbol;
    // Each block is filled up to whole symbols.
    assert!((DATA..DATA + symbol * number(&told, "blocks")).contains(&sent), "{told}");
    let heard = ground.heard(&mirrors[0]);
    assert!(number(&heard, "skipped") > 0, "{heard}");
    // A block may be there in part.
    assert!(number(&heard, "kept_bytes") <= 12 * MIB - ZEROES + 2 * MIB, "{heard}");
    let told = ground.of_mirror(&mirrors[0]);
    assert_eq!(number(&told["fill"]["multicast"], "brought_bytes"), 12 * MIB - ZEROES, "{told}");
    assert_eq!(number(&told, "upstream_bytes"), before);
    ground.until_whole(&mirrors);
}

#[test]
fn clients_read_what_has_not_come_yet() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(2);
    let casting = ground.begin(&["--all", "--wait-for=2", SLOWLY]);
    // The last bytes come last.
    let last = Client::open(mirrors[0].uri()).read(SIZE - MIB, MIB);
    assert!(last == ground.bytes[(SIZE - MIB) as usize..]);
    let readers = Readers::start(mirrors.iter().map(Daemon::uri), &ground.bytes);
    readers.go_on(50);
    assert_eq!(ground.session()["state"], "sending", "all of that was meanwhile");
    casting.ends_with(0);
    readers.go_on(50);
    readers.stop();
    ground.until_whole(&mirrors);
}

#[test]
fn a_receiver_that_was_killed_completes() {
    let ground = Ground::new();
    let mut mirrors = ground.mirrors(2);
    let casting = ground.begin(&["--all", "--wait-for=2", "--rate=4M"]);
    eventually("blocks", || number(&ground.heard(&mirrors[0]), "done_blocks") >= 3);
    mirrors.remove(0).kill();
    mirrors.insert(0, ground.mirror("mirror0", &[]));
    // Whether it is complete in time or left to its upstream is a matter of time.
    drop(casting);
    ground.until_whole(&mirrors);
}

#[test]
fn mirrors_complete_without_their_sender() {
    let ground = Ground::new();
    let other = serve(&ground.scratch, "other", &ground.scratch.path("image.raw"));
    let mirrors: Vec<_> = (0..2).map(|number| ground.mirror_of(&format!("mirror{number}"), other.uri(), &[])).collect();
    let casting = ground.begin(&["--all", "--wait-for=2", SLOWLY]);
    eventually("blocks", || number(&ground.heard(&mirrors[1]), "done_blocks") >= 2);
    drop(casting);
    let Ground { server, scratch, bytes, image, group } = ground;
    server.kill();
    let ground = Ground { server: other, scratch, bytes, image, group };
    ground.until_whole(&mirrors);
    let brought = |mirror| number(&ground.of_mirror(mirror)["fill"]["multicast"], "brought_bytes");
    assert!(mirrors.iter().all(|mirror| brought(mirror) > 0 && brought(mirror) < DATA));
}

#[test]
fn mirrors_complete_when_their_sender_is_back() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(2);
    let casting = ground.begin(&["--all", "--wait-for=2", SLOWLY]);
    eventually("blocks", || number(&ground.heard(&mirrors[0]), "done_blocks") >= 2);
    drop(casting);
    let Ground { server, scratch, bytes, image, group } = ground;
    server.kill();
    let server = serve(&scratch, "serve", &scratch.path("image.raw"));
    let ground = Ground { server, scratch, bytes, image, group };
    ground.until_whole(&mirrors);
}

/// The receiver's cable is pulled until the sender has noticed, or has long been through.
#[test]
fn a_link_that_was_down_costs_time_only() {
    let ground = Ground::new();
    let cables = Cables::new();
    let [at, _] = Cables::ADDRESSES;
    let (log, image) = (ground.scratch.path("far.log"), ground.scratch.path("image.raw"));
    let mut program = headwater(&log);
    program.arg("serve").arg(format!("image={}", image.display())).args(["--read-only", "--listen"]);
    program.arg(format!("{at}:10809"));
    let mut command = cables.on(0, &program);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let far = Daemon::start(command, 1, &log);
    let (log, mut program) = mirror_command(&ground.scratch, "mirror", &format!("nbd://{at}/image"));
    program.args(["--fill=none", "--interface", CABLE]).arg(format!("--join={}", ground.group));
    let mut command = cables.on(1, &program);
    command.stdout(Stdio::piped()).stderr(Stdio::null());
    let mirrors = vec![Daemon::start(command, 1, &log)];
    let group = format!("--group={}", ground.group);
    let words = ["cast", "image", &group, "--interface", CABLE, "--json", "--all", "--wait-for=1", SLOWLY];
    let _casting = Casting::start(order(&ground.scratch, &far, &words));
    ground.until_sending(&far);
    eventually("blocks", || number(&ground.heard(&mirrors[0]), "done_blocks") >= 2);
    cables.pull(1);
    let blocks = number(&ground.heard(&mirrors[0]), "done_blocks");
    // Much is lost meanwhile.
    eventually("progress without it", || {
        let told = status(&ground.scratch, &far)["casts"][0].clone();
        told["state"] != "sending" || number(&told, "passed_blocks") >= blocks + 6
    });
    cables.plug(1);
    ground.until_whole(&mirrors);
}

#[test]
fn two_senders_of_one_image_do_not_confuse_each_other() {
    let ground = Ground::new();
    let other = serve(&ground.scratch, "other", &ground.scratch.path("image.raw"));
    let mirrors = ground.mirrors(2);
    let words = ["--all", "--wait-for=2", "--rate=8M"];
    let both = [&ground.server, &other].map(|server| Casting::start(ground.cast_at(server, &words)));
    ground.until_whole(&mirrors);
    let told = both.map(|casting| casting.ends_with(0));
    assert_ne!(told[0]["session"], told[1]["session"]);
}

#[test]
fn two_images_on_one_group_do_not_mix() {
    let ground = Ground::new();
    let bytes = content(3);
    let image = ground.scratch.file("second.raw", &bytes);
    index(&ground.scratch, &image, &[]);
    let other = serve(&ground.scratch, "other", &image);
    let [one, two] = [&ground.server, &other].map(|server| {
        let name = format!("of{}", server.pid());
        ground.mirror_of(&name, server.uri(), &[])
    });
    let words = ["--all", "--wait-for=1", "--rate=8M"];
    let both = [&ground.server, &other].map(|server| Casting::start(ground.cast_at(server, &words)));
    for told in both.map(|casting| casting.ends_with(0)) {
        assert_eq!(count(&told, "complete"), 1, "{told}");
    }
    eventually("whole image", || ground.here(&two) == SIZE);
    assert_holds(two.uri(), &bytes);
    ground.until_whole(&[one]);
}

#[test]
fn without_a_manifest_nothing_is_cast_and_nobody_takes_part() {
    let ground = Ground::new();
    let bare = ground.scratch.file("bare.raw", &ground.bytes);
    let without = serve(&ground.scratch, "without", &bare);
    let complaint = ends_with(1, &mut ground.cast_at(&without, &["--all"]));
    assert!(complaint.contains("manifest"), "{complaint}");
    let unable = ground.mirror_of("unable", without.uri(), &[]);
    let mirrors = ground.mirrors(1);
    Casting::start(ground.cast(&["--all", "--wait-for=1"])).ends_with(0);
    ground.until_whole(&mirrors);
    eventually("datagrams", || number(&status(&ground.scratch, &unable)["receptions"][0], "foreign") > 0);
    assert_eq!(number(&ground.of_mirror(&unable), "resident_bytes"), 0);
}

#[test]
fn a_session_that_is_called_off_ends_for_everybody() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(1);
    let casting = ground.begin(&["--all", "--wait-for=1", "--rate=256K"]);
    let list = run(&mut order(&ground.scratch, &ground.server, &["cast", "--list", "--json"]));
    assert!(list.contains("sending"), "{list}");
    run(&mut order(&ground.scratch, &ground.server, &["cast", "--cancel=1"]));
    let told = casting.ends_with(4);
    assert_eq!(told["state"], "cancelled", "{told}");
    // What it did not bring was promised all the same.
    ground.until_whole(&mirrors);
    assert!(number(&ground.of_mirror(&mirrors[0])["fill"]["multicast"], "brought_bytes") < DATA);
    let complaint = ends_with(1, &mut order(&ground.scratch, &ground.server, &["cast", "--cancel=7"]));
    assert!(complaint.contains("no such"), "{complaint}");
}

#[test]
fn a_mirror_that_cannot_hold_it_all_says_so() {
    let ground = Ground::new();
    let small = ground.mirror("small", &["--cache-size=6M"]);
    let told = Casting::start(ground.cast(&["--all", "--wait-for=1", "--patience=3s"])).ends_with(3);
    assert_eq!(count(&told, "complete"), 0, "{told}");
    assert!(ground.here(&small) < SIZE);
    assert_holds(small.uri(), &ground.bytes);
}

#[test]
fn nobody_came() {
    let ground = Ground::new();
    let told = Casting::start(ground.cast(&["--all", "--wait-for=1", "--patience=1s"])).ends_with(3);
    assert_eq!((told["receivers"].as_array().unwrap().len(), number(&told, "data_symbols")), (0, 0), "{told}");
}

#[test]
fn mirrors_are_told_to_join_and_need_not() {
    let ground = Ground::new();
    let start = |name: &str, words: &[&str]| {
        let all = [&["--fill=none", "--interface=lo"], words].concat();
        Daemon::mirror_named(&ground.scratch, name, ground.server.uri(), &all)
    };
    let mirrors: Vec<_> = ["first", "second"].iter().map(|name| start(name, &[])).collect();
    let deaf = start("deaf", &["--no-casts"]);
    eventually("clients", || status(&ground.scratch, &ground.server)["clients"].as_array().unwrap().len() >= 3);
    let told = Casting::start(ground.cast(&["--all", "--wait-for=2"])).ends_with(0);
    assert_eq!((count(&told, "complete"), told["receivers"].as_array().unwrap().len()), (2, 2), "{told}");
    ground.until_whole(&mirrors);
    assert_eq!(number(&ground.of_mirror(&deaf), "resident_bytes"), 0);
    // Nobody listens any longer than there is something to hear.
    for mirror in &mirrors {
        eventually("silence", || status(&ground.scratch, mirror)["receptions"].as_array().is_none_or(Vec::is_empty));
    }
    // Who is not told does not come.
    let told = Casting::start(ground.cast(&["--all", "--wait-for=1", "--patience=1s", "--no-tell"])).ends_with(3);
    assert_eq!(told["receivers"], json!([]), "{told}");
}

#[test]
fn a_part_is_cast_in_the_order_of_a_range() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(1);
    let told = Casting::start(ground.cast(&["--range=16M..20M", "--range=1M..2M", "--wait-for=1"])).ends_with(0);
    assert_eq!(number(&told, "total_bytes"), 5 * MIB, "{told}");
    eventually("durable part", || number(&ground.of_mirror(&mirrors[0]), "resident_bytes") == 5 * MIB);
    assert_eq!(number(&ground.of_mirror(&mirrors[0])["fill"]["multicast"], "brought_bytes"), 5 * MIB);
}

/// Says wrong things in a group until it is dropped.
struct Liar {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<u64>>,
}

impl Liar {
    fn start(work: impl Fn(&AtomicBool) -> u64 + Send + 'static) -> Self {
        let stop = Arc::<AtomicBool>::default();
        let told = Arc::clone(&stop);
        Self { stop, thread: Some(std::thread::spawn(move || work(&told))) }
    }

    /// How often it said something.
    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Datagrams that are sent at once before others have a turn.
const BURST: u64 = 64;
/// And the pause after them: some 30 000 a second, more than the session has.
const PAUSE: Duration = Duration::from_millis(2);
/// What a mirror's memory may grow by, in KiB: its blocks in part, and what is on its way to the disk.
const MOST_GROWTH_KIB: u64 = 256 << 10;

/// Sends what `make` makes until it is told to stop, at least so often.
fn lie(member: &Member, least: u64, stop: &AtomicBool, mut make: impl FnMut(u64) -> Vec<u8>) -> u64 {
    let mut count = 0;
    while count < least || !stop.load(Ordering::Relaxed) {
        member.send(&make(count));
        count += 1;
        if count % BURST == 0 {
            std::thread::park_timeout(PAUSE);
        }
    }
    count
}

/// Who does not know the image: garbage, and what others said, cut off, changed, and said again.
#[test]
fn strangers_cost_counters_only() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(1);
    let group = ground.group;
    let before = mirrors[0].resident_kib();
    let casting = ground.begin(&["--all", "--wait-for=1", "--rate=4M"]);
    let liar = Liar::start(move |stop| {
        let (member, mut random) = (Member::join(group), Random::new(5));
        let heard: Vec<Vec<u8>> = std::iter::repeat_with(|| member.try_hear()).take(400).flatten().collect();
        assert!(!heard.is_empty(), "nothing to repeat");
        lie(&member, 60_000, stop, |count| {
            let mut bytes = heard[random.below(heard.len() as u64) as usize].clone();
            match count % 4 {
                0 => bytes = noise(random.below(1600) as usize, count),
                1 => bytes.truncate(random.below(bytes.len() as u64 + 1) as usize),
                2 => {
                    let bit = random.below(bytes.len() as u64 * 8) as usize;
                    bytes[bit / 8] ^= 1 << (bit % 8);
                }
                _ => {}
            }
            bytes
        })
    });
    let pid = mirrors[0].pid();
    let sampler = Sampler::with(move || resident_kib(pid));
    // Its queue may have had no room for the truth, which then comes from the upstream.
    drop(casting);
    assert!(liar.stop() >= 60_000);
    let most = sampler.most();
    assert!(most <= before + MOST_GROWTH_KIB, "{before} KiB before, {most} KiB at most");
    ground.until_whole(&mirrors);
    let told = status(&ground.scratch, &mirrors[0])["receptions"][0].clone();
    for counter in ["foreign", "forged", "broken"] {
        assert!(number(&told, counter) > 0, "no {counter}: {told}");
    }
}

/// Who knows the image can say anything with a tag that is right: wrong symbols of the session, needs of receivers that
/// there are not, words and ends that the sender never said.
#[test]
fn who_knows_the_image_can_lie_and_no_wrong_byte_is_believed() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(1);
    let (group, image) = (ground.group, ground.image);
    let before = mirrors[0].resident_kib();
    let member = Member::join(group);
    let casting = ground.begin(&["--all", "--wait-for=1", "--rate=4M"]);
    let liar = Liar::start(move |stop| {
        let (key, session, announce) = member.hear_announcement(image);
        let mut random = Random::new(7);
        lie(&member, 60_000, stop, |count| {
            let wrong = noise(announce.terms.symbol.into(), count);
            let block = random.below(DATA / MIB) as u32;
            let need = Need { first: block, count: 9, symbols: 200 };
            let datagram = match count % 500 {
                0 => Datagram::Word(Word { coming: vec![need], unicast: vec![need], dropped: vec![NOBODY] }),
                1 => Datagram::Report(Report {
                    receiver: NOBODY,
                    standing: Standing::Joined,
                    done: 0,
                    seen: 1,
                    lost: 9,
                    overflowed: 0,
                    heard: 0,
                    needs: vec![need],
                }),
                2 => Datagram::Page(headwater::cast::form::Page { page: 0, runs: vec![Run { first: 3, count: 1 }] }),
                3 => Datagram::Announce(headwater::cast::form::Announce { phase: Phase::Waiting, ..announce }),
                _ => Datagram::Symbol { block, index: random.below(1000) as u16, bytes: &wrong },
            };
            tagged(session, count as u32, &datagram, &key)
        })
    });
    let pid = mirrors[0].pid();
    let sampler = Sampler::with(move || resident_kib(pid));
    eventually("wrong blocks", || number(&ground.heard(&mirrors[0]), "wrong") > 0);
    assert!(liar.stop() >= 60_000);
    // It may be through, or have left what it could not believe to its upstream.
    drop(casting);
    ground.until_whole(&mirrors);
    let most = sampler.most();
    assert!(most <= before + MOST_GROWTH_KIB, "{before} KiB before, {most} KiB at most");
}

/// The end of a session by somebody who knows the image: mirrors fetch what they lack.
#[test]
fn an_end_that_nobody_said_costs_unicast_only() {
    let ground = Ground::new();
    let mirrors = ground.mirrors(1);
    let member = Member::join(ground.group);
    let _casting = ground.begin(&["--all", "--wait-for=1", "--rate=1M"]);
    let (key, session, mut announce) = member.hear_announcement(ground.image);
    announce.phase = Phase::Ended(true);
    let began = Instant::now();
    member.send(&tagged(session, u32::MAX / 2, &Datagram::Announce(announce), &key));
    ground.until_whole(&mirrors);
    eprintln!("whole {:?} after an end that was a lie", began.elapsed());
}
