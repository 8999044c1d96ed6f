//! Wrong bytes: from upstreams, and from the cache's own files. None of them reaches a client.

use std::path::Path;
use std::process::{Command, Stdio};

use headwater::error::ErrorKind;
use headwater::export::conformance::Random;
use headwater::nbd::wire::command;
use serde_json::Value;

use crate::support::cache::{assert_holds, flip_bits, image_status, index, order, renamed};
use crate::support::client::Client;
use crate::support::liar::{Liar, Lie};
use crate::support::{Daemon, Scratch, headwater, noise, run, run_failing};

const MIB: u64 = 1 << 20;
const CHUNK: usize = 65_536;

const LIES: [Lie; 5] = [Lie::Flip, Lie::Zeros, Lie::Hole, Lie::Other, Lie::Truncate];

/// An image with zeroes in it, and the honest server of it, which has its manifest.
fn origin(scratch: &Scratch, mebibytes: usize, arguments: &[&str]) -> (Daemon, Vec<u8>, String) {
    let mut bytes = noise(mebibytes << 20, 21);
    bytes[3 << 20..5 << 20].fill(0);
    let image = scratch.file("image.raw", &bytes);
    let identity = index(scratch, &image, arguments);
    (Daemon::serve(scratch, &image, &["--read-only"]), bytes, identity)
}

/// The manifest of an image as others get it.
fn manifest(bytes: &[u8], chunk_size: u32) -> Vec<u8> {
    headwater::manifest::of_bytes(bytes, chunk_size).1
}

fn number(image: &Value, field: &str) -> u64 {
    image["mirror"][field].as_u64().unwrap()
}

fn copy_and_compare(scratch: &Scratch, mirror: &Daemon) {
    let copy = scratch.path("copy.raw");
    run(Command::new("nbdcopy").arg(mirror.uri()).arg(&copy));
    run(Command::new("cmp").arg(scratch.path("image.raw")).arg(&copy));
}

#[test]
fn a_liar_beside_an_honest_server_fails_nothing() {
    let scratch = Scratch::new();
    let (server, bytes, identity) = origin(&scratch, 12, &[]);
    for (number, lie) in LIES.into_iter().enumerate() {
        for is_first in [true, false] {
            let name = format!("{number}-{is_first}");
            let known = Some((identity.clone(), manifest(&bytes, CHUNK as u32)));
            let liar = Liar::start(&scratch, &name, &bytes, known, (1, lie));
            let uris = if is_first { [liar.uri(), server.uri()] } else { [server.uri(), liar.uri()] }.join(",");
            let mirror = Daemon::mirror_named(&scratch, &format!("{name}.mirror"), &uris, &[]);
            copy_and_compare(&scratch, &mirror);
            assert_holds(mirror.uri(), &bytes);
            let image = image_status(&scratch, &mirror, "image");
            let of_liar = &image["mirror"]["upstreams"][usize::from(!is_first)];
            assert_eq!(of_liar["uri"], liar.uri());
            assert_eq!(image["mirror"]["verified"], true);
            if !is_first {
                assert_eq!(liar.lies(), 0, "nobody asks it as long as the first one answers");
            } else if lie == Lie::Truncate {
                assert!(liar.lies() > 0);
            } else {
                assert!(of_liar["wrong_replies"].as_u64().unwrap() >= 3, "{lie:?}: {image}");
                assert!(of_liar["set_aside_seconds"].as_f64().unwrap() > 200.0, "{lie:?}: {image}");
                assert!(mirror.log_text().contains(liar.uri()), "the log names it");
            }
            assert_eq!(mirror.stop().sum("client left", "errors"), 0, "{lie:?}");
        }
    }
}

#[test]
fn a_server_that_flips_a_bit_now_and_then_is_enough_where_there_is_a_manifest() {
    let scratch = Scratch::new();
    let mut bytes = noise(8 << 20, 22);
    bytes[1 << 20..2 << 20].fill(0);
    scratch.file("image.raw", &bytes);
    let (header, manifest) = headwater::manifest::of_bytes(&bytes, 4096);
    let known = Some((header.id.to_string(), manifest));
    let liar = Liar::start(&scratch, "liar", &bytes, known, (200, Lie::Flip));
    let mirror = Daemon::mirror(&scratch, liar.uri(), &["--upstream-connections=2"]);
    // Each chunk by a request of its own: what is asked for far apart does not travel together.
    let mut client = Client::open(mirror.uri());
    for step in 0..2048u64 {
        let at = step * 797 % 2048 * 4096;
        assert!(client.read(at, 4096) == bytes[at as usize..at as usize + 4096], "wrong bytes at {at}");
    }
    copy_and_compare(&scratch, &mirror);
    let image = image_status(&scratch, &mirror, "image");
    let lies = liar.lies();
    assert!(lies >= 8, "{lies} lies are no trial");
    assert_eq!(image["mirror"]["upstreams"][0]["wrong_replies"], lies);
    assert_eq!(number(&image, "verify_failures"), lies, "each counts once: {image}");
    drop(client);
    assert_eq!(mirror.stop().sum("client left", "errors"), 0);
}

#[test]
fn a_server_of_another_image_under_the_name_is_not_used() {
    let scratch = Scratch::new();
    let (server, bytes, identity) = origin(&scratch, 8, &[]);
    let other = noise(bytes.len(), 99);
    // One that says so, and one that says nothing.
    let (header, manifest) = headwater::manifest::of_bytes(&other, CHUNK as u32);
    let known = Some((header.id.to_string(), manifest));
    let frank = Liar::start(&scratch, "frank", &other, known, (u64::MAX, Lie::Flip));
    let mute = Liar::start(&scratch, "mute", &other, None, (u64::MAX, Lie::Flip));
    for (number, uris) in [
        [server.uri(), frank.uri()].join(","),
        [server.uri(), mute.uri()].join(","),
        [mute.uri(), server.uri()].join(","),
        [frank.uri(), &renamed(server.uri(), &format!("@{identity}"))].join(","),
    ]
    .into_iter()
    .enumerate()
    {
        let mirror = Daemon::mirror_named(&scratch, &format!("mirror{number}"), &format!("image={uris}"), &[]);
        copy_and_compare(&scratch, &mirror);
        let image = image_status(&scratch, &mirror, "image");
        assert_eq!((&image["identity"], &image["mirror"]["verified"]), (&identity.as_str().into(), &true.into()));
        assert_eq!(mirror.stop().sum("client left", "errors"), 0, "{uris}");
    }
}

#[test]
fn servers_that_all_send_another_image_give_errors_and_nothing_else() {
    let scratch = Scratch::new();
    let bytes = noise(4 << 20, 25);
    let known =
        Some((headwater::manifest::of_bytes(&bytes, CHUNK as u32).0.id.to_string(), manifest(&bytes, CHUNK as u32)));
    let liar = Liar::start(&scratch, "liar", &noise(4 << 20, 23), known, (u64::MAX, Lie::Flip));
    let mirror = Daemon::mirror(&scratch, liar.uri(), &[]);
    let mut client = Client::open(mirror.uri());
    for at in 0..4 {
        assert_eq!(client.ask(command::READ, at * MIB, 100_000).error, Some(ErrorKind::Io));
    }
    let complaint = "are not those of the image";
    mirror.wait_for_log(complaint);
    assert_eq!(number(&image_status(&scratch, &mirror, "image"), "resident_bytes"), 0, "nothing of it was kept");
}

/// A stopped mirror with all of an image in its cache, a pin, and what is hot.
struct Stopped {
    scratch: Scratch,
    server: Daemon,
    bytes: Vec<u8>,
}

impl Stopped {
    fn new(is_indexed: bool) -> Self {
        let scratch = Scratch::new();
        let (server, bytes) = if is_indexed {
            let (server, bytes, _) = origin(&scratch, 8, &[]);
            (server, bytes)
        } else {
            let bytes = noise(8 << 20, 31);
            (Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &["--read-only"]), bytes)
        };
        let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
        run(&mut order(&scratch, &mirror, &["pin", "image", "--range", "1M..2M"]));
        assert_holds(mirror.uri(), &bytes);
        mirror.stop();
        Self { scratch, server, bytes }
    }

    fn file(&self, name: &str) -> std::path::PathBuf {
        self.scratch.path(&format!("mirror.cache/image/{name}"))
    }

    /// Starts it, reads everything, twice. Gives what its status says then, and ends it.
    fn read_all(&self) -> Value {
        let _ = std::fs::remove_file(self.scratch.path("mirror.log"));
        let mirror = Daemon::mirror(&self.scratch, self.server.uri(), &[]);
        for _ in 0..2 {
            assert_holds(mirror.uri(), &self.bytes);
        }
        let image = image_status(&self.scratch, &mirror, "image");
        mirror.stop();
        image
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.scratch.path("mirror.log")).unwrap()
    }
}

#[test]
fn bits_flipped_in_the_data_are_found_counted_and_mended() {
    for is_indexed in [true, false] {
        let stopped = Stopped::new(is_indexed);
        let mut random = Random::new(41);
        for count in [1, 5, 40] {
            let hit = flip_bits(&stopped.file("data"), &mut random, count);
            // There is a hole in one of the images; what is written to it nobody reads.
            let is_stored = |place: &&u64| !is_indexed || !(3 * MIB..5 * MIB).contains(*place);
            let chunks: std::collections::BTreeSet<_> =
                hit.iter().filter(is_stored).map(|place| place / CHUNK as u64).collect();
            let image = stopped.read_all();
            assert_eq!(number(&image, "verify_failures"), chunks.len() as u64, "{hit:?}");
            assert_eq!(
                number(&image, "upstream_bytes"),
                (chunks.len() * CHUNK) as u64,
                "only what is damaged comes again"
            );
        }
        assert_eq!(number(&stopped.read_all(), "verify_failures"), 0, "it stays mended");
    }
}

#[test]
fn a_damaged_map_costs_fetching_again_and_is_told() {
    for is_indexed in [true, false] {
        let stopped = Stopped::new(is_indexed);
        let map = stopped.file("map");
        // Both slots of the only page.
        let file = std::fs::File::options().write(true).open(&map).unwrap();
        for slot in [1, 2] {
            std::os::unix::fs::FileExt::write_all_at(&file, b"damage", slot * 4096 + 100).unwrap();
        }
        let image = stopped.read_all();
        assert_eq!(number(&image, "damaged_pages"), 1);
        assert!(stopped.log().contains("parts of the map are damaged"));
        // The header, any bit of it.
        let mut random = Random::new(43);
        for _ in 0..3 {
            let head = stopped.scratch.file("head", &std::fs::read(&map).unwrap()[..4096]);
            flip_bits(&head, &mut random, 1);
            std::os::unix::fs::FileExt::write_all_at(&file_of(&map), &std::fs::read(&head).unwrap(), 0).unwrap();
            let image = stopped.read_all();
            assert!(stopped.log().contains("the header of the map is damaged"));
            assert!(number(&image, "upstream_bytes") > 5 * MIB, "all is fetched again");
        }
        assert_eq!(number(&stopped.read_all(), "upstream_bytes"), 0);
    }
}

fn file_of(path: &Path) -> std::fs::File {
    std::fs::File::options().write(true).open(path).unwrap()
}

#[test]
fn bits_flipped_anywhere_in_a_cache_never_become_wrong_bytes() {
    for is_indexed in [true, false] {
        let stopped = Stopped::new(is_indexed);
        let mut random = Random::new(47);
        let (mut found, mut told) = (0, 0);
        for round in 0..6 {
            for name in ["data", "map", "manifest", "heat", "pins"] {
                if stopped.file(name).exists() && random.below(2) == 0 {
                    let count = 1 + random.below(12);
                    flip_bits(&stopped.file(name), &mut random, count);
                }
            }
            let image = stopped.read_all();
            found += number(&image, "verify_failures") + number(&image, "damaged_pages");
            assert_eq!(image["mirror"]["verified"], is_indexed, "round {round}: the manifest is fetched again");
            told += stopped.log().lines().filter(|line| line.contains("\"WARN\"")).count();
            assert!([0, MIB].contains(&number(&image, "pinned_bytes")), "round {round}: {image}");
        }
        assert!(found > 3 && told > 0, "{found} found, {told} told");
    }
}

#[test]
fn a_manifest_that_was_damaged_without_an_upstream_is_not_believed() {
    let stopped = Stopped::new(true);
    flip_bits(&stopped.file("manifest"), &mut Random::new(53), 1);
    let Stopped { scratch, server, bytes } = stopped;
    let upstream = server.uri().to_owned();
    server.stop();
    let mirror = Daemon::mirror(&scratch, &upstream, &["--upstream-timeout=0.5"]);
    assert_holds(mirror.uri(), &bytes);
    assert_eq!(image_status(&scratch, &mirror, "image")["mirror"]["verified"], false);
    assert!(mirror.log_text().contains("the manifest of the cache cannot be used"));
}

#[test]
fn content_that_the_upstream_does_not_have_is_refused() {
    let scratch = Scratch::new();
    let (server, ..) = origin(&scratch, 6, &[]);
    let wanted = format!("blake3-{}", "0123456789abcdef".repeat(4));
    let mut command = headwater(&scratch.path("log"));
    command.args(["mirror", &renamed(server.uri(), &format!("@{wanted}")), "--cache"]).arg(scratch.path("cache"));
    let complaint = run_failing(command.arg("--unix").arg(scratch.path("s")).stderr(Stdio::piped()));
    assert!(complaint.contains("cannot mirror \"image\"") && complaint.contains(&wanted), "{complaint}");
    // The same where the server does not understand such names, and says what it has.
    let bytes = noise(1 << 20, 3);
    let known = Some(("blake3-".to_owned() + &"1".repeat(64), Vec::new()));
    let liar = Liar::start(&scratch, "liar", &bytes, known, (u64::MAX, Lie::Flip));
    let uris = format!("image={},{}", liar.uri(), renamed(liar.uri(), &format!("@{wanted}")));
    let mut command = headwater(&scratch.path("log"));
    command.args(["mirror", &uris, "--cache"]).arg(scratch.path("cache"));
    let complaint = run_failing(command.arg("--unix").arg(scratch.path("s")).stderr(Stdio::piped()));
    assert!(complaint.contains("blake3-1111") && complaint.contains(&wanted), "{complaint}");
}
