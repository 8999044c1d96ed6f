//! What an image holds changes: it is replaced under the upstream, it gets a manifest, it is named by its content.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use headwater::error::ErrorKind;
use headwater::export::conformance::Random;
use headwater::nbd::wire::command;
use serde_json::Value;

use crate::support::cache::{assert_holds, image_status, index, renamed};
use crate::support::client::Client;
use crate::support::{Daemon, ON_DEMAND, Scratch, eventually, mirror_command, noise, run};

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 65_536;
const SIZE: usize = 8 << 20;

/// An upstream whose image is replaced now and then.
struct Ground {
    scratch: Scratch,
    path: PathBuf,
}

impl Ground {
    fn new() -> Self {
        let scratch = Scratch::new();
        let path = scratch.path("image.raw");
        Self { scratch, path }
    }

    /// Puts an image there, with its manifest, and serves it. Gives its identity.
    fn serve(&self, bytes: &[u8]) -> (Daemon, String) {
        fs::rename(self.scratch.file("image.new", bytes), &self.path).unwrap();
        let identity = index(&self.scratch, &self.path, &[]);
        (Daemon::serve(&self.scratch, &self.path, &["--read-only"]), identity)
    }

    /// A mirror that looks at its upstream often.
    fn mirror(&self, upstream: &str) -> Daemon {
        self.mirror_with(upstream, &[])
    }

    fn mirror_with(&self, upstream: &str, arguments: &[&str]) -> Daemon {
        let (log, mut command) = mirror_command(&self.scratch, "mirror", upstream);
        command.args(arguments).env("HEADWATER_WATCH_SECONDS", "0.2");
        Daemon::start(command, 1, &log)
    }

    fn status(&self, mirror: &Daemon, name: &str) -> Value {
        image_status(&self.scratch, mirror, name)["mirror"].clone()
    }
}

fn identity(uri: &str) -> Option<String> {
    let text = run(Command::new(env!("CARGO_BIN_EXE_headwater")).args(["info", "--json", uri]));
    serde_json::from_str::<Value>(&text).unwrap()["image"].as_str().map(str::to_owned)
}

/// Reads a range of which nothing is in the cache and nobody has it any more.
#[track_caller]
fn assert_gone(client: &mut Client, offset: u64) {
    let before = Instant::now();
    assert_eq!(client.ask(command::READ, offset, 4096).error, Some(ErrorKind::Io));
    assert!(before.elapsed() < Duration::from_secs(10), "an error that takes {:?}", before.elapsed());
}

#[test]
fn a_replaced_image_becomes_a_new_cache_and_the_old_one_is_kept() {
    let ground = Ground::new();
    let (old, mut new) = (noise(SIZE, 1), noise(SIZE, 3));
    // A part has not changed.
    new[..1 << 20].copy_from_slice(&old[..1 << 20]);
    let (server, old_id) = ground.serve(&old);
    let mirror = ground.mirror_with(server.uri(), &[ON_DEMAND]);
    let mut staying = Client::open(mirror.uri());
    assert!(staying.read(0, 4 * MIB) == old[..4 << 20]);
    eventually("resident chunks", || ground.status(&mirror, "image")["resident_bytes"] == 4 * MIB);

    server.stop();
    let (server, new_id) = ground.serve(&new);
    assert!(staying.read(0, 4 * MIB) == old[..4 << 20], "what is here is served");
    assert_gone(&mut staying, 5 * MIB);
    mirror.wait_for_log("the upstream's image has been replaced");
    assert_holds(mirror.uri(), &new);
    assert_eq!(identity(mirror.uri()), Some(new_id.clone()));
    assert!(staying.read(0, 4 * MIB) == old[..4 << 20], "and goes on being served");
    assert_gone(&mut staying, 6 * MIB);
    let old_uri = renamed(mirror.uri(), &format!("@{old_id}"));
    let mut by_content = Client::open(&old_uri);
    assert!(by_content.read(MIB, 3 * MIB) == old[1 << 20..4 << 20]);
    assert_gone(&mut by_content, 7 * MIB);
    assert_holds(&renamed(mirror.uri(), &format!("@{new_id}")), &new);
    let status = ground.status(&mirror, "image");
    assert_eq!(status["upstream_bytes"], 7 * MIB, "what both have was copied: {status}");
    assert_eq!(ground.status(&mirror, &format!("image@{old_id}"))["resident_bytes"], 4 * MIB);
    drop((staying, by_content));

    mirror.stop();
    let mirror = ground.mirror_with(server.uri(), &[ON_DEMAND]);
    assert_holds(mirror.uri(), &new);
    assert!(Client::open(&old_uri).read(0, 4 * MIB) == old[..4 << 20]);
    assert_eq!(ground.status(&mirror, "image")["upstream_bytes"], 0);

    // Back again, first under a mirror that runs, then under one that is started.
    server.stop();
    let (server, _) = ground.serve(&old);
    eventually("the old image", || identity(mirror.uri()) == Some(old_id.clone()));
    assert_holds(mirror.uri(), &old);
    assert_holds(&renamed(mirror.uri(), &format!("@{new_id}")), &new);
    let status = ground.status(&mirror, "image");
    assert_eq!(status["upstream_bytes"], 4 * MIB, "its cache is used again: {status}");
    mirror.stop();
    let mirror = ground.mirror_with(server.uri(), &[ON_DEMAND]);
    assert_holds(mirror.uri(), &old);
    assert_eq!(ground.status(&mirror, "image")["upstream_bytes"], 0);
}

#[test]
fn no_connection_ever_sees_a_mixture() {
    let ground = Ground::new();
    let images = [1, 3, 5].map(|seed| noise(SIZE, seed));
    let (mut server, _) = ground.serve(&images[0]);
    let mirror = ground.mirror(server.uri());
    let done = std::sync::atomic::AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let readers: Vec<_> = (0..2)
            .map(|seed| {
                let (images, done, uri) = (&images, &done, mirror.uri());
                scope.spawn(move || {
                    let (mut random, mut seen) = (Random::new(seed), [false; 3]);
                    while !done.load(std::sync::atomic::Ordering::SeqCst) {
                        let mut client = Client::open(uri);
                        let mut mine = None;
                        for _ in 0..30 {
                            let at = random.below(SIZE as u64 / CHUNK) * CHUNK;
                            // It may have gone with the old image.
                            let Ok(read) = client.try_read(at, 4096) else { continue };
                            let which = images.iter().position(|image| image[at as usize..][..4096] == read);
                            assert!(which.is_some(), "wrong bytes at {at}");
                            assert_eq!(*mine.get_or_insert(which), which, "one connection, two images");
                            seen[which.unwrap()] = true;
                        }
                    }
                    seen
                })
            })
            .collect();
        for image in [1, 2, 0, 1] {
            server.stop();
            let (next, id) = ground.serve(&images[image]);
            server = next;
            eventually("the new image", || identity(mirror.uri()).as_ref() == Some(&id));
            assert_holds(mirror.uri(), &images[image]);
        }
        done.store(true, std::sync::atomic::Ordering::SeqCst);
        readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<_>>()
    });
    assert!(seen.iter().all(|seen| seen.iter().filter(|seen| **seen).count() > 1), "{seen:?}");
    assert_eq!(mirror.log_text().matches("the upstream's image has been replaced").count(), 4);
}

#[test]
fn a_mirror_of_a_mirror_passes_identity_and_manifest_on() {
    let ground = Ground::new();
    let bytes = noise(SIZE, 4);
    let (server, id) = ground.serve(&bytes);
    let first = ground.mirror(server.uri());
    let second = Daemon::mirror_named(&ground.scratch, "second", &renamed(first.uri(), &format!("@{id}")), &[]);
    assert_eq!(identity(second.uri()), Some(id.clone()));
    assert_eq!(ground.status(&second, "image")["verified"], true);
    let manifests = [&server, &first, &second].map(|daemon| {
        let copy = ground.scratch.path("copy");
        run(Command::new("nbdcopy").arg(renamed(daemon.uri(), "@manifest")).arg(&copy));
        fs::read(copy).unwrap()
    });
    assert!(manifests[0] == headwater::manifest::of_bytes(&bytes, CHUNK as u32).1);
    assert!(manifests.iter().all(|manifest| *manifest == manifests[0]));
    assert_holds(second.uri(), &bytes);
    assert_holds(&renamed(second.uri(), &format!("@{id}")), &bytes);
}

#[test]
fn a_manifest_that_is_made_while_a_mirror_runs_is_adopted() {
    let ground = Ground::new();
    let bytes = noise(SIZE, 5);
    let path = ground.scratch.file("image.raw", &bytes);
    let slowly = ["--read-only", "--index", "--index-rate=4M"];
    let server = Daemon::serve(&ground.scratch, &path, &slowly);
    let mirror = ground.mirror(server.uri());
    let mut client = Client::open(mirror.uri());
    assert!(client.read(0, 2 * MIB) == bytes[..2 << 20]);
    assert_eq!(ground.status(&mirror, "image")["verified"], false, "it is there before it was tried");
    eventually("manifest", || ground.status(&mirror, "image")["verified"] == true);
    assert!(client.read(0, 8 * MIB) == bytes);
    let id = headwater::manifest::of_bytes(&bytes, CHUNK as u32).0.id.to_string();
    assert_eq!(identity(mirror.uri()), Some(id.clone()));
    assert_holds(&renamed(mirror.uri(), &format!("@{id}")), &bytes);
    assert_eq!(ground.status(&mirror, "image")["upstream_bytes"], 8 * MIB, "what was here is not fetched again");
    drop(client);
    assert_eq!(mirror.stop().sum("client left", "errors"), 0);
}
