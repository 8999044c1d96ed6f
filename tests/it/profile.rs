//! Profiles between processes: written by clients, kept beside images, shown and moved by operators, exchanged between
//! servers.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use headwater::clock;
use headwater::error::ErrorKind;
use headwater::export::ImageId;
use headwater::fill::profile::{
    Exchange, LARGEST, PAGE, Profiles, Recording, Run, Settings, Store, Tag, fetch_profile, hand_up,
};
use headwater::ranges::ByteRange;
use headwater::upstream::{self, Expectation, Remote};
use serde_json::Value;
use tokio::runtime::{Builder, LocalOptions};

use crate::admin::{ends_with, operator, socket_of};
use crate::support::client::Client;
use crate::support::peers::Peer;
use crate::support::{Daemon, Log, SOON, Scratch, headwater, nbdsh, noise, run};

const SIZE: u64 = 4 << 20;

fn image(scratch: &Scratch, name: &str) -> PathBuf {
    scratch.file(name, &noise(usize::try_from(SIZE).unwrap(), 1))
}

/// The URI of what is beside the only image.
fn beside(uri: &str, side: &str) -> String {
    let (head, tail) = uri.split_once("?socket=").unwrap();
    format!("{head}@{side}?socket={tail}")
}

fn tag(text: &str) -> Tag {
    text.parse().unwrap()
}

/// A client that reads so many pages from `start` on and leaves.
fn read_pages(recording: &Recording, start: u64, pages: u64) {
    let now = clock::now();
    let mut part = recording.join(now).unwrap();
    part.note(now, ByteRange::between(start * PAGE, (start + pages) * PAGE));
}

fn run_of(start: u64, pages: u64) -> Run {
    let recording = Recording::new(Settings::default());
    read_pages(&recording, start, pages);
    recording.finish().remove(0)
}

/// What a mirror below writes.
fn message(size: u64, identity: Option<ImageId>, text: &str, start: u64, pages: u64) -> Vec<u8> {
    Profiles::of_run(size, identity, tag(text), &run_of(start, pages)).encode()
}

fn show(scratch: &Scratch, arguments: &[&str]) -> Value {
    let mut command = operator(scratch, &["profile", "show", "--json"]);
    serde_json::from_str(&run(command.args(arguments))).unwrap()
}

/// Runs a remote of `uri` through a test, on a runtime like that of a worker.
fn with_remote<F: Future<Output = ()>>(uri: &str, test: impl FnOnce(Arc<Remote>) -> F) {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async {
        let settings = upstream::Settings { patience: Duration::from_secs(10), ..upstream::Settings::default() };
        let remote = Remote::open(vec![uri.parse().unwrap()], Expectation::default(), settings).await.unwrap();
        test(Arc::new(remote)).await;
    });
}

#[test]
fn runs_that_are_written_are_learnt_and_outlive_the_server() {
    let scratch = Scratch::new();
    let image = image(&scratch, "image.raw");
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    assert!(Client::try_open(&beside(server.uri(), "profile"), &[]).is_err(), "nothing is known");
    let mut inbox = Client::open(&beside(server.uri(), "profile-inbox"));
    assert_eq!(inbox.flush(), None, "nothing is nothing wrong");
    for start in [0, 0, 10] {
        let message = message(SIZE, None, "boot", start, 100);
        let (one, other) = message.split_at(20);
        assert_eq!((inbox.write(20, other), inbox.write(0, one)), (None, None));
        assert_eq!(inbox.read(0, message.len() as u64), message);
        assert_eq!(inbox.flush(), None);
    }
    let known = show(&scratch, &["image"]);
    assert_eq!((&known["image_size"], &known["identity"]), (&SIZE.into(), &Value::Null));
    let boot = &known["tags"][0];
    let figures = ["runs", "sure_bytes", "likely_bytes", "unlikely_bytes"].map(|field| boot[field].as_u64().unwrap());
    assert_eq!((&boot["tag"], figures), (&"boot".into(), [3, 90 * PAGE, 20 * PAGE, 0]));
    // What is in the file is what others are told.
    let file = scratch.path("image.raw.profile");
    let bytes = fs::read(&file).unwrap();
    let mut side = Client::open(&beside(server.uri(), "profile"));
    assert_eq!(side.agreed.size, bytes.len() as u64);
    assert_eq!(side.read(0, bytes.len() as u64), bytes);
    assert_eq!(show(&scratch, &[server.uri()]), known);
    server.kill();
    assert_eq!(show(&scratch, &[file.to_str().unwrap()]), known, "without any server");
    let _server = Daemon::serve(&scratch, &image, &["--read-only"]);
    assert_eq!(show(&scratch, &["image"]), known);
    let text = run(&mut operator(&scratch, &["profile", "show", "image"]));
    let line: Vec<_> = text.lines().last().unwrap().split_whitespace().collect();
    assert_eq!(line[..5], ["boot", "3", "360K", "80K", "0"], "{text}");
}

#[test]
fn what_is_no_run_of_this_image_is_refused() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch, "image.raw"), &["--read-only"]);
    let uri = beside(server.uri(), "profile-inbox");
    let right = message(SIZE, None, "boot", 0, 100);
    let mut damaged = right.clone();
    damaged[40] ^= 1;
    for wrong in [
        message(SIZE + 1, None, "boot", 0, 100),
        message(SIZE, Some(ImageId([1; 32])), "boot", 0, 100),
        damaged,
        right[..right.len() - 1].to_vec(),
        noise(1 << 20, 3),
    ] {
        let mut inbox = Client::open(&uri);
        assert_eq!(inbox.write(0, &wrong), None);
        assert_eq!(inbox.flush(), Some(ErrorKind::Invalid));
    }
    // Another's half a message is not mine.
    let mut other = Client::open(&uri);
    assert_eq!(other.write(0, &right[..30]), None);
    let path = scratch.file("message", &right);
    let script = format!(
        "h.pwrite(open({path:?}, 'rb').read(), 0)\nh.flush()\nprint(h.get_size(), h.can_multi_conn())\n\
         try:\n  h.pwrite(b'nonsense', 0)\n  h.flush()\nexcept nbd.Error as e:\n  print(e.errno)"
    );
    assert_eq!(nbdsh(&uri, &script), format!("{LARGEST} False\nEINVAL\n"));
    assert_eq!(other.flush(), Some(ErrorKind::Invalid));
    assert_eq!(show(&scratch, &["image"])["tags"][0]["runs"], 1);
}

#[test]
fn operators_carry_profiles_from_image_to_image() {
    let scratch = Scratch::new();
    let [one, same, indexed, longer] = ["one.raw", "same.raw", "indexed.raw", "longer.raw"]
        .map(|name| if name == "longer.raw" { scratch.file(name, &noise(5 << 20, 1)) } else { image(&scratch, name) });
    run(headwater(&scratch.path("index.log")).arg("index").arg(&indexed));
    let log = scratch.path("serve.log");
    let mut command = headwater(&log);
    command.args(["serve", "--read-only"]).args([one, same, indexed, longer]).arg("--unix").arg(scratch.path("s"));
    let server = Daemon::start(command, 4, &log);
    let at = socket_of(&scratch, &server);
    let at = format!("--at={}", at.display());
    let file = scratch.path("kept.profile");
    let file = file.to_str().unwrap();
    let order = |arguments: &[&str]| operator(&scratch, &[&["profile"], arguments, &[at.as_str()]].concat());
    let nothing = ends_with(1, &mut order(&["export", "one", "-o", file]));
    assert!(nothing.contains("no profile yet"), "{nothing}");
    assert!(ends_with(1, &mut order(&["show", "other"])).contains("no image"));
    for text in ["boot", "web"] {
        let uri = server.uris().iter().find(|uri| uri.contains("/one?")).unwrap();
        let mut inbox = Client::open(&beside(uri, "profile-inbox"));
        inbox.write(0, &message(SIZE, None, text, 7, 30));
        assert_eq!(inbox.flush(), None);
    }
    run(&mut order(&["export", "one", "-o", file]));
    let printed = order(&["export", "one"]).output().unwrap().stdout;
    assert_eq!(printed, fs::read(file).unwrap());
    assert_eq!(run(&mut order(&["import", "same", file])), "same: imported boot, web\n");
    assert_eq!(show(&scratch, &["same", &at]), show(&scratch, &["one", &at]));
    let foreign = ends_with(1, &mut order(&["import", "indexed", file]));
    assert!(foreign.contains("unknown identity") && foreign.contains("blake3-"), "{foreign}");
    run(&mut order(&["import", "indexed", file, "--force"]));
    let of_indexed = show(&scratch, &["indexed", &at]);
    assert!(of_indexed["identity"].as_str().unwrap().starts_with("blake3-"));
    assert_eq!(of_indexed["tags"], show(&scratch, &["one", &at])["tags"]);
    assert!(ends_with(1, &mut order(&["import", "longer", file, "--force"])).contains("of an image of 4194304 bytes"));
    let broken = scratch.file("broken", b"HEADPROF");
    assert!(ends_with(1, &mut order(&["import", "one", broken.to_str().unwrap()])).contains("no profile"));
    assert_eq!(run(&mut order(&["forget", "one", "--tag", "web"])), "one: forgot web\n");
    assert!(ends_with(1, &mut order(&["forget", "one", "--tag", "web"])).contains("no profile \"web\""));
    assert_eq!(run(&mut order(&["forget", "one"])), "one: forgot 1 profile\n");
    assert_eq!(run(&mut order(&["forget", "one"])), "one: there was nothing to forget\n");
    assert!(!scratch.path("one.raw.profile").exists() && scratch.path("same.raw.profile").exists());
}

#[test]
fn a_damaged_file_is_told_and_begun_anew() {
    let scratch = Scratch::new();
    let image = image(&scratch, "image.raw");
    let file = scratch.path("image.raw.profile");
    let mut bytes = message(SIZE, None, "boot", 0, 100);
    bytes[30] ^= 4;
    for (content, told) in [
        (bytes, "the profile cannot be used: it begins anew"),
        (message(SIZE * 2, None, "boot", 0, 100), "the profile is of another image: it begins anew"),
    ] {
        fs::write(&file, content).unwrap();
        let server = Daemon::serve(&scratch, &image, &["--read-only"]);
        assert!(ends_with(1, &mut operator(&scratch, &["profile", "show", "image"])).contains("no profile yet"));
        let mut inbox = Client::open(&beside(server.uri(), "profile-inbox"));
        inbox.write(0, &message(SIZE, None, "boot", 0, 50));
        assert_eq!(inbox.flush(), None);
        drop(inbox);
        assert!(server.stop().lines(told).any(|line| line["level"] == "WARN"));
        assert_eq!(show(&scratch, &[file.to_str().unwrap()])["tags"][0]["sure_bytes"], 50 * PAGE);
    }
}

#[test]
fn where_nothing_can_be_written_profiles_are_in_memory() {
    // A directory has the name under which the file is made: nobody can, root neither.
    let scratch = Scratch::new();
    let image = image(&scratch, "image.raw");
    fs::create_dir(scratch.path("image.raw.profile.new")).unwrap();
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let mut inbox = Client::open(&beside(server.uri(), "profile-inbox"));
    for _ in 0..2 {
        inbox.write(0, &message(SIZE, None, "boot", 0, 100));
        assert_eq!(inbox.flush(), None);
    }
    assert_eq!(show(&scratch, &["image"])["tags"][0]["runs"], 2);
    drop(inbox);
    let log: Log = server.stop();
    assert_eq!(log.lines("cannot write the profile: it is kept in memory").count(), 1, "told once");
}

#[test]
fn a_mirror_keeps_its_profile_in_its_cache() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch, "image.raw"), &["--read-only", "--admin=none"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--profile-window=0"]);
    let mut inbox = Client::open(&beside(mirror.uri(), "profile-inbox"));
    inbox.write(0, &message(SIZE, None, "boot", 0, 100));
    assert_eq!(inbox.flush(), None);
    let known = show(&scratch, &["image"]);
    assert_eq!(known["tags"][0]["runs"], 1);
    mirror.kill();
    let file = scratch.path("mirror.cache/image/profile");
    assert_eq!(show(&scratch, &[file.to_str().unwrap()]), known);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--profile-tag=web"]);
    assert_eq!(show(&scratch, &["image"]), known);
    let mut side = Client::open(&beside(mirror.uri(), "profile"));
    assert_eq!(side.read(0, side.agreed.size), fs::read(file).unwrap());
}

#[test]
fn runs_go_up_and_profiles_come_down() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch, "image.raw"), &["--read-only"]);
    with_remote(server.uri(), async |remote| {
        let exchange = |recording: &Recording| {
            let store = Arc::new(Store::open(None, SIZE, None));
            let exchange = Exchange::new(Arc::clone(&store), Arc::clone(&remote), recording.clone());
            let exchange = Arc::new(exchange);
            let running = Arc::clone(&exchange);
            let task = tokio::task::spawn_local(async move { running.run().await });
            (store, exchange, task)
        };
        let recording = Recording::new(Settings { tag: tag("web"), ..Settings::default() });
        let (store, first, task) = exchange(&recording);
        // The first client finds nothing known; what it reads is.
        first.ask_again();
        read_pages(&recording, 3, 200);
        let upstream = until(async || fetch_profile(&remote).await).await;
        assert_eq!(upstream, store.profiles());
        assert_eq!(show(&scratch, &["image"])["tags"][0]["sure_bytes"], 200 * PAGE);
        // A mirror that starts later has it from the upstream.
        let (later, _, later_task) = exchange(&Recording::new(Settings::default()));
        let taken = until(async || {
            tokio::task::yield_now().await;
            Some(later.profiles()).filter(|profiles| !profiles.is_empty())
        });
        assert_eq!(taken.await, store.profiles());
        // What was recorded when the server ends is kept, too.
        task.abort();
        assert!(task.await.unwrap_err().is_cancelled());
        read_pages(&recording, 3, 200);
        first.settle().await;
        assert_eq!(store.get(&tag("web")).unwrap().runs(), 2);
        later_task.abort();
    });
}

/// Asks again and again until there is an answer, while the other tasks of the thread run.
async fn until<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = clock::now() + SOON;
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(clock::now() < deadline, "no answer in time");
    }
}

#[test]
fn a_server_that_has_one_image_under_all_names_is_left_alone() {
    let scratch = Scratch::new();
    for size in [LARGEST, LARGEST - 512, SIZE] {
        let server = Peer::nbdkit(&scratch, &["memory", &size.to_string()]);
        with_remote(server.uri(), async |remote| {
            assert_eq!(fetch_profile(&remote).await, None);
            assert!(!hand_up(&remote, message(size, None, "boot", 0, 100).into()).await);
        });
        let mut client = Client::open(server.uri());
        assert!(client.read(0, LARGEST - 512).iter().all(|byte| *byte == 0), "it was written to");
    }
    let complaint = ends_with(1, &mut operator(&scratch, &["profile", "show", "nbd://127.0.0.1:1/image"]));
    assert!(complaint.contains("127.0.0.1"), "{complaint}");
}
