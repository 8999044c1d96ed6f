//! Filling ahead of demand between real processes: what is brought, why, how often, and how fast at most.

use std::path::Path;
use std::time::Instant;

use headwater::nbd::wire::{CommandFlags, command};
use serde_json::Value;

use crate::support::cache::{assert_holds, image_status, index, order, status};
use crate::support::client::Client;
use crate::support::link::Link;
use crate::support::{Daemon, Scratch, eventually, noise, run};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;
/// What a boot reads here: a piece of this size out of each part of the image.
const PIECE: u64 = 32 * KIB;
const PART: u64 = 512 * KIB;

/// A server of an image of noise.
fn ground() -> (Scratch, Vec<u8>, Daemon) {
    let (scratch, bytes) = (Scratch::new(), noise(SIZE as usize, 1));
    let image = scratch.file("image.raw", &bytes);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    (scratch, bytes, server)
}

/// A figure of what came to a mirror because of `cause`.
fn figure(scratch: &Scratch, mirror: &Daemon, cause: &str, field: &str) -> u64 {
    let image = image_status(scratch, mirror, "image");
    image["mirror"]["fill"][cause][field].as_u64().unwrap_or_else(|| panic!("no {field} of {cause}: {image}"))
}

/// Bytes that a mirror has had from its upstream.
fn received(scratch: &Scratch, mirror: &Daemon) -> u64 {
    image_status(scratch, mirror, "image")["mirror"]["upstreams"][0]["received_bytes"].as_u64().unwrap()
}

/// Bytes of a mirror in this state.
fn mapped(uri: &str, is_meant: impl Fn(u64) -> bool) -> u64 {
    let map = run(std::process::Command::new("nbdinfo").args(["--map=x-headwater:residency", "--json", uri]));
    let extents: Vec<Value> = serde_json::from_str(&map).unwrap();
    let meant = extents.iter().filter(|extent| is_meant(extent["type"].as_u64().unwrap()));
    meant.map(|extent| extent["length"].as_u64().unwrap()).sum()
}

/// Resident or zero.
const fn is_here(status: u64) -> bool {
    status & 3 != 0
}

/// Has a first mirror's client read some of the image, and waits until the server has learnt from it.
fn record(scratch: &Scratch, server: &Daemon) {
    let first = Daemon::mirror_named(scratch, "first", server.uri(), &["--chunk-size=16K", "--readahead=0"]);
    let mut client = Client::open(first.uri());
    (0..SIZE / PART).for_each(|part| drop(client.read(part * PART, PIECE)));
    client.disconnect();
    eventually("profile at the server", || {
        let mut show = order(scratch, server, &["profile", "show", "--json", "image"]);
        show.output().unwrap().status.success()
    });
    first.stop();
}

#[test]
fn the_first_boot_on_a_second_host_is_fetched_because_of_the_first_hosts() {
    let (scratch, bytes, server) = ground();
    record(&scratch, &server);
    let mirror = Daemon::mirror_named(&scratch, "second", server.uri(), &["--chunk-size=256K", "--readahead=0"]);
    let mut client = Client::open(mirror.uri());
    client.read(0, 4096);
    let chunk = 256 * KIB;
    let rest = (SIZE / PART - 1) * chunk;
    // Bit 3: brought, and read by nobody.
    eventually("rest of the boot", || mapped(mirror.uri(), |status| is_here(status) && status & 8 != 0) == rest);
    let brought =
        ["demand", "profile", "readahead", "background"].map(|cause| figure(&scratch, &mirror, cause, "brought_bytes"));
    assert_eq!(brought, [chunk, rest, 0, 0]);
    let before = received(&scratch, &mirror);
    for part in 0..SIZE / PART {
        let at = (part * PART) as usize;
        assert_eq!(client.read(part * PART, PIECE), bytes[at..at + PIECE as usize]);
    }
    assert_eq!(received(&scratch, &mirror), before, "reading it cost the upstream something");
    assert_eq!(figure(&scratch, &mirror, "profile", "used_bytes"), rest);
}

#[test]
fn without_filling_nothing_comes_but_what_is_asked_for() {
    let (scratch, bytes, server) = ground();
    record(&scratch, &server);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--fill=none", "--chunk-size=64K"]);
    let mut client = Client::open(mirror.uri());
    for at in (0..2 * MIB).step_by(64 << 10) {
        assert_eq!(client.read(at, 64 * KIB), bytes[at as usize..][..64 << 10]);
    }
    client.disconnect();
    assert_eq!(received(&scratch, &mirror), 2 * MIB);
    for cause in ["readahead", "profile", "prefetch", "background"] {
        assert_eq!(figure(&scratch, &mirror, cause, "brought_bytes"), 0, "{cause}");
    }
    let log = mirror.stop();
    assert_eq!(log.sum("mirror closed", "fetched_bytes"), 2 * MIB, "something came afterwards");
}

/// Reads the data at the beginning of an image whose second half is a hole.
fn reads_up_to_a_hole(prepare: impl FnOnce(&Scratch, &Path)) {
    let (scratch, bytes) = (Scratch::new(), noise((SIZE / 2) as usize, 1));
    let image = scratch.sparse("image.raw", SIZE, &[(0, &bytes)]);
    prepare(&scratch, &image);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--chunk-size=64K"]);
    let mut client = Client::open(mirror.uri());
    for at in (0..SIZE / 2).step_by(64 << 10) {
        assert_eq!(client.read(at, 64 * KIB), bytes[at as usize..][..64 << 10]);
    }
    // And on, into the hole.
    assert!(client.read(SIZE / 2, MIB).iter().all(|byte| *byte == 0));
    client.disconnect();
    let used = figure(&scratch, &mirror, "readahead", "used_bytes");
    assert!(used >= SIZE / 4, "of {} only {used} were ahead", SIZE / 2);
    mirror.stop();
    // The bytes of a manifest are beside the image, and counted with another export.
    let log = server.stop();
    let sent: u64 = log
        .lines("client left")
        .filter(|line| line["export"].as_str().is_none_or(|name| !name.contains('@')))
        .map(|line| line["read_bytes"].as_u64().unwrap())
        .sum();
    assert!((SIZE / 2..SIZE / 2 + 64 * KIB).contains(&sent), "{sent} bytes came, of {} that are data", SIZE / 2);
}

#[test]
fn a_sequential_reader_is_read_ahead_of_and_never_into_a_hole() {
    reads_up_to_a_hole(|_, _| {});
}

#[test]
fn a_sequential_reader_is_read_ahead_of_and_never_into_zeroes_of_a_manifest() {
    reads_up_to_a_hole(|scratch, image| drop(index(scratch, image, &[])));
}

#[test]
fn the_background_goes_on_after_a_crash_and_fetches_all_about_once() {
    let (scratch, bytes, server) = ground();
    let arguments = ["--fill=background", "--fill-rate=8M", "--chunk-size=64K"];
    let mirror = Daemon::mirror(&scratch, server.uri(), &arguments);
    eventually("a part of the image", || mapped(mirror.uri(), is_here) >= SIZE / 4);
    mirror.kill();
    let mirror = Daemon::mirror(&scratch, server.uri(), &arguments);
    assert!(mapped(mirror.uri(), is_here) >= SIZE / 4, "what was here was lost");
    eventually("the whole image", || mapped(mirror.uri(), is_here) == SIZE);
    assert_holds(mirror.uri(), &bytes);
    mirror.stop();
    let sent = server.stop().sum("client left", "read_bytes");
    // What was under way or not durable yet when it was killed comes twice.
    assert!(sent <= SIZE + SIZE / 2, "{sent} bytes were sent for an image of {SIZE}");
}

#[test]
fn the_rate_holds_for_all_but_demand() {
    let (scratch, bytes, server) = ground();
    let began = Instant::now();
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--fill=background", "--fill-rate=1M", "--chunk-size=64K"]);
    let mut client = Client::open(mirror.uri());
    // From the end, and far apart: neither readahead nor the background has it.
    for at in (SIZE / 2 / MIB..SIZE / MIB).rev().map(|number| number * MIB) {
        assert_eq!(client.read(at, 64 * KIB), bytes[at as usize..][..64 << 10]);
    }
    client.disconnect();
    eventually("some of the rest", || figure(&scratch, &mirror, "background", "brought_bytes") >= 2 * MIB);
    let demanded = figure(&scratch, &mirror, "demand", "brought_bytes");
    let filled = received(&scratch, &mirror) - demanded;
    // What may be saved up, and one request more.
    let allowed = began.elapsed().as_secs_f64() * 1.05 * MIB as f64 + MIB as f64;
    assert!(filled as f64 <= allowed, "{filled} bytes where {allowed} are allowed");
}

#[test]
fn what_a_client_has_to_wait_for_though_it_was_under_way_is_late() {
    let (scratch, bytes, server) = ground();
    let link = Link::to(server.uri());
    let mirror = Daemon::mirror(&scratch, &link.uri(), &["--chunk-size=64K"]);
    let mut client = Client::open(mirror.uri());
    link.hold();
    run(&mut order(&scratch, &mirror, &["prefetch", "image", "--range=..64K"]));
    eventually("something under way", || {
        status(&scratch, &mirror)["link"]["in_flight_bytes"].as_u64().is_some_and(|bytes| bytes > 0)
    });
    client.send(command::READ, CommandFlags::empty(), 1, 0, 4096, &[]);
    eventually("a late chunk", || figure(&scratch, &mirror, "prefetch", "late_bytes") == 64 * KIB);
    link.release();
    assert_eq!(client.receive().bytes(), bytes[..4096]);
    let of = |field| figure(&scratch, &mirror, "prefetch", field);
    assert_eq!([of("brought_bytes"), of("used_bytes"), of("late_bytes")], [64 * KIB; 3]);
    assert_eq!(figure(&scratch, &mirror, "demand", "brought_bytes"), 0, "one fetch for both");
}
