//! The limit of a cache: never exceeded, given to what is pinned first, and made good for when the disk is full or
//! fails.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use headwater::export::conformance::Random;
use headwater::units::ByteSize;
use serde_json::Value;

use crate::support::cache::{Sampler, allocated, assert_holds, image_status, order, status};
use crate::support::client::Client;
use crate::support::{
    Daemon, ON_DEMAND, Scratch, append, eventually, headwater, mirror_command, noise, run, run_failing,
};

const MIB: u64 = 1 << 20;

/// A server with images of so many bytes each: one of noise, one with zeroes in it, one with a manifest.
fn origin(scratch: &Scratch, mebibytes: usize) -> (Daemon, Vec<Vec<u8>>) {
    let mut images: Vec<_> = [71, 73, 75].map(|seed| noise(mebibytes << 20, seed)).into();
    images[1][2 << 20..3 << 20].fill(0);
    let paths: Vec<_> =
        images.iter().zip(["a", "b", "c"]).map(|(bytes, name)| scratch.file(&format!("{name}.raw"), bytes)).collect();
    crate::support::cache::index(scratch, &paths[2], &[]);
    let log = scratch.path("serve.log");
    let mut command = headwater(&log);
    command.arg("serve").args(paths).args(["--read-only", "--unix"]).arg(scratch.path("serve.sock"));
    (Daemon::start(command, 3, &log), images)
}

fn mirror_all(scratch: &Scratch, server: &Daemon, arguments: &[&str]) -> Daemon {
    let (log, mut command) = mirror_command(scratch, "mirror", &server.uris()[0]);
    command.args(&server.uris()[1..]).args(arguments);
    Daemon::start(command, 3, &log)
}

fn read_anywhere(uri: &str, bytes: &[u8], seed: u64, count: usize) {
    let (mut random, mut client) = (Random::new(seed), Client::open(uri));
    for _ in 0..count {
        let length = 1 + random.below(200_000);
        let offset = random.below(bytes.len() as u64 - length);
        let right = &bytes[offset as usize..(offset + length) as usize];
        assert!(client.read(offset, length) == right, "wrong bytes at {offset} of {uri}");
    }
}

#[test]
fn a_cache_never_takes_more_than_its_limit() {
    let scratch = Scratch::new();
    let (server, images) = origin(&scratch, 12);
    for policy in ["lru", "lfu", "s3fifo"] {
        let sampler = Sampler::of(scratch.path("mirror.cache"));
        let mirror = mirror_all(&scratch, &server, &["--cache-size=10M", "--policy", policy]);
        std::thread::scope(|scope| {
            for (uri, bytes) in mirror.uris().iter().zip(&images) {
                scope.spawn(move || assert_holds(uri, bytes));
                scope.spawn(move || read_anywhere(uri, bytes, 81, 150));
            }
        });
        let told = status(&scratch, &mirror)["cache"].clone();
        let number = |field: &str| told[field].as_u64().unwrap();
        assert_eq!((number("limit_bytes"), told["policy"].as_str()), (10 * MIB, Some(policy)));
        assert!(number("evictions") > 20, "{told}");
        assert!(number("allocated_bytes") + number("in_flight_bytes") <= 10 * MIB, "{told}");
        // What was answered last is stored a little later.
        eventually("the account has what is on the disk", || {
            let taken = allocated(&scratch.path("mirror.cache"));
            let told = status(&scratch, &mirror)["cache"].clone();
            taken <= told["allocated_bytes"].as_u64().unwrap()
        });
        assert_eq!(mirror.stop().sum("client left", "errors"), 0);
        let most = sampler.most();
        assert!((7 * MIB..=10 * MIB).contains(&most), "{policy}: {most} bytes");
    }
    // With a smaller limit what is too much goes before anybody is served.
    let mirror = mirror_all(&scratch, &server, &["--cache-size=4M"]);
    let taken = allocated(&scratch.path("mirror.cache"));
    assert!(taken <= 4 * MIB, "{taken} bytes");
    let told = status(&scratch, &mirror);
    let resident = |image: &Value| image["mirror"]["resident_bytes"].as_u64().unwrap();
    let kept: u64 = told["images"].as_array().unwrap().iter().map(resident).sum();
    assert!(kept > MIB, "not everything has to go: {told}");
    assert_holds(mirror.uri(), &images[0]);
}

#[test]
fn a_limit_that_cannot_be_kept_is_refused_with_the_arithmetic() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 1 << 40, &[]);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let (_, mut command) = mirror_command(&scratch, "mirror", server.uri());
    let complaint = run_failing(command.arg("--cache-size=64M").stderr(Stdio::piped()));
    // 16 Mi chunks: their map has pages of 4 KiB for each 800 of them, twice.
    let map = (1u64 << 24).div_ceil(800) * 8192;
    let told = complaint.split("of the images take ").nth(1).unwrap().split_whitespace().next().unwrap();
    let ByteSize(told) = told.parse().unwrap();
    assert!(told.abs_diff(map) < map / 10, "{complaint}");
    assert!(complaint.contains("--cache-size must be more than that, not 64M"), "{complaint}");
}

#[test]
fn pins_are_kept_whatever_else_is_read() {
    let scratch = Scratch::new();
    let (server, images) = origin(&scratch, 12);
    let sampler = Sampler::of(scratch.path("mirror.cache"));
    let mirror = mirror_all(&scratch, &server, &["--cache-size=10M"]);
    let pin = |mirror: &Daemon, arguments: &[&str]| order(&scratch, mirror, &[&["pin"], arguments].concat());
    let told = run(&mut pin(&mirror, &["a", "--range", "1M..4M"]));
    assert!(told.contains("3M pinned, 0 of it here"), "{told}");
    let refused = run_failing(&mut pin(&mirror, &["b"]));
    for part in [
        "pinning this keeps 12.0M on the disk",
        "3.00M is pinned already",
        "of the 10M of --cache-size",
        "can be pinned",
        "too much",
    ] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    assert_eq!(image_status(&scratch, &mirror, "b")["mirror"]["pinned_bytes"], 0);
    assert!(Client::open(mirror.uri()).read(MIB, 3 * MIB) == images[0][1 << 20..4 << 20]);
    for _ in 0..2 {
        std::thread::scope(|scope| {
            for (uri, bytes) in mirror.uris().iter().zip(&images) {
                scope.spawn(move || assert_holds(uri, bytes));
            }
        });
    }
    assert!(status(&scratch, &mirror)["cache"]["evictions"].as_u64().unwrap() > 20);
    mirror.stop();
    // Without an upstream: what is pinned is here, also after a restart.
    let upstreams = server.uris().to_vec();
    server.stop();
    let (log, mut command) = mirror_command(&scratch, "mirror", &upstreams[0]);
    command.args(&upstreams[1..]).args(["--cache-size=10M", "--upstream-timeout=0.5"]);
    let mirror = Daemon::start(command, 3, &log);
    assert_eq!(image_status(&scratch, &mirror, "a")["mirror"]["pinned_bytes"], 3 * MIB);
    assert!(Client::open(mirror.uri()).read(MIB, 3 * MIB) == images[0][1 << 20..4 << 20]);
    let told = run(&mut order(&scratch, &mirror, &["unpin", "a", "--range", "2M.."]));
    assert!(told.contains("a: 1M pinned"), "{told}");
    mirror.stop();
    assert!(sampler.most() <= 10 * MIB);
}

/// The program in a mount namespace of its own, in which `script` has made `disk`. It goes away with the program.
fn on_disk(program: &Command, disk: &Path, script: &str) -> Command {
    std::fs::create_dir_all(disk).unwrap();
    let script = format!("set -e; {script}; exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation=private", "sh", "-c", &script]).arg(disk);
    append(&mut command, program).stdout(Stdio::piped());
    command
}

/// A mirror of one image whose cache is a file system of its own, and where that is, seen from here.
fn mirror_on(scratch: &Scratch, upstream: &str, disk: &str, arguments: &[&str]) -> (Daemon, PathBuf) {
    let (log, path) = (scratch.path("mirror.log"), scratch.path("disk"));
    let mut program = headwater(&log);
    program.args(["mirror", upstream, "--unix"]).arg(scratch.path("m.sock")).arg("--cache").arg(&path);
    let mut command = on_disk(program.args(arguments), &path, disk);
    command.stderr(File::options().append(true).create(true).open(&log).unwrap());
    let mirror = Daemon::start(command, 1, &log);
    let seen = PathBuf::from(format!("/proc/{}/root{}", mirror.pid(), path.display()));
    (mirror, seen)
}

const TMPFS: &str = "mount -t tmpfs -o size=16m none \"$0\"";
const EXT4: &str = "truncate -s 24M \"$0.raw\"; mke2fs -q -t ext4 -m 0 \"$0.raw\"; mount -o loop \"$0.raw\" \"$0\"";

fn single(scratch: &Scratch, mebibytes: usize) -> (Daemon, Vec<u8>) {
    let bytes = noise(mebibytes << 20, 90);
    (Daemon::serve(scratch, &scratch.file("image.raw", &bytes), &["--read-only"]), bytes)
}

#[test]
fn the_reserve_stays_free() {
    let scratch = Scratch::new();
    let (server, bytes) = single(&scratch, 24);
    let (mirror, seen) = mirror_on(&scratch, server.uri(), TMPFS, &["--reserve=6M"]);
    let sampler = Sampler::with(move || {
        let figures = rustix::fs::statvfs(&seen).unwrap();
        (figures.f_blocks - figures.f_bavail) * figures.f_frsize
    });
    for _ in 0..2 {
        assert_holds(mirror.uri(), &bytes);
    }
    read_anywhere(mirror.uri(), &bytes, 5, 200);
    let cache = status(&scratch, &mirror)["cache"].clone();
    assert!(cache["free_bytes"].as_u64().unwrap() >= 6 * MIB && cache["evictions"].as_u64().unwrap() > 0, "{cache}");
    let most = sampler.most();
    assert!((5 * MIB..=10 * MIB).contains(&most), "{most} of 16 MiB were taken, and 6 are to stay free");
    assert_eq!(mirror.stop().sum("client left", "errors"), 0);
}

#[test]
fn a_full_disk_has_chunks_evicted() {
    for disk in [TMPFS, EXT4] {
        let scratch = Scratch::new();
        let (server, bytes) = single(&scratch, 32);
        let (mirror, _) = mirror_on(&scratch, server.uri(), disk, &[ON_DEMAND]);
        for _ in 0..2 {
            assert_holds(mirror.uri(), &bytes);
        }
        read_anywhere(mirror.uri(), &bytes, 6, 100);
        let told = status(&scratch, &mirror);
        assert!(told["cache"]["evictions"].as_u64().unwrap() > 10, "{disk}: {told}");
        assert_eq!(told["cache"]["failed"], false, "a full disk has not failed");
        assert!(told["cache"]["allocated_bytes"].as_u64().unwrap() > 4 * MIB, "it goes on storing: {disk}: {told}");
        assert_eq!(mirror.stop().sum("client left", "errors"), 0, "{disk}");
    }
}

/// Has the kernel forget what it holds of a file, so that the next read asks the disk.
fn forget_pages(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn what_the_disk_does_not_give_comes_from_the_upstream() {
    let scratch = Scratch::new();
    let (server, bytes) = single(&scratch, 14);
    let (mirror, seen) = mirror_on(&scratch, server.uri(), EXT4, &[]);
    assert_holds(mirror.uri(), &bytes);
    eventually("everything here", || image_status(&scratch, &mirror, "image")["mirror"]["resident_bytes"] == 14 * MIB);
    forget_pages(&seen.join("image/data"));
    // The disk loses its second half: a read of it is an I/O error.
    let backing = File::options().write(true).open(scratch.path("disk.raw")).unwrap();
    backing.set_len(12 * MIB).unwrap();
    for _ in 0..2 {
        assert_holds(mirror.uri(), &bytes);
    }
    let told = image_status(&scratch, &mirror, "image")["mirror"].clone();
    assert!(told["upstream_bytes"].as_u64().unwrap() > 15 * MIB, "nothing was lost: {told}");
    assert!(mirror.log_text().contains("cannot read the cache: fetching instead"));
    let log = {
        backing.set_len(24 * MIB).unwrap();
        mirror.stop()
    };
    assert_eq!(log.sum("client left", "errors"), 0);
}

#[test]
fn a_disk_that_fails_again_and_again_is_not_used_any_more() {
    let scratch = Scratch::new();
    let (server, bytes) = single(&scratch, 32);
    // A disk of 64 MiB that can take a few: what is written beyond is an I/O error.
    let failing = "mount -t tmpfs -o size=14m none /mnt; truncate -s 64M /mnt/disk; mke2fs -q -t ext4 /mnt/disk; \
                   mount -o loop /mnt/disk \"$0\"";
    let (mut mirror, _) = mirror_on(&scratch, server.uri(), failing, &[]);
    let end = std::time::Instant::now() + crate::support::SOON;
    let out = "it is not used any more";
    while !mirror.log_text().contains(out) {
        assert_holds(mirror.uri(), &bytes);
        assert!(std::time::Instant::now() < end, "it goes on being used");
    }
    for _ in 0..2 {
        assert_holds(mirror.uri(), &bytes);
    }
    let told = status(&scratch, &mirror);
    assert_eq!(told["cache"]["failed"], true, "{told}");
    mirror.signal("TERM");
    mirror.wait();
    let log = crate::support::Log::read(&scratch.path("mirror.log"));
    assert_eq!(mirror.log_text().matches(out).count(), 1, "it is told once");
    assert_eq!(mirror.log_text().matches("\"ERROR\"").count(), 1);
    assert_eq!(log.sum("client left", "errors"), 0);
}
