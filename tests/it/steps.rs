//! A crash at each step of the order of writing, and at any moment under load: the bytes that the next start serves, the
//! pins that it finds, and what the cache takes on the disk all the while.

use std::os::unix::process::ExitStatusExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use headwater::export::conformance::Random;

use crate::support::cache::{Sampler, allocated, assert_holds, image_status, index, order};
use crate::support::client::Client;
use crate::support::{Daemon, ON_DEMAND, SOON, Scratch, eventually, mirror_command, noise, run};

const MIB: u64 = 1 << 20;
const CHUNK: u64 = 65_536;
const SIZE: u64 = 16 * MIB;
const LIMIT: u64 = 6 * MIB;
const LIMITED: &[&str] = &["--cache-size=6M"];

/// Whether the upstream has a manifest of its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Manifest {
    Yes,
    No,
}

/// An image with zeroes in the middle, its server, and what watches the cache of its mirror.
struct Ground {
    scratch: Scratch,
    bytes: Vec<u8>,
    server: Daemon,
    sampler: Sampler,
}

impl Ground {
    fn new(manifest: Manifest) -> Self {
        let scratch = Scratch::new();
        let mut bytes = noise(SIZE as usize, 1);
        bytes[(7 * MIB) as usize..(8 * MIB) as usize].fill(0);
        let image = scratch.file("image.raw", &bytes);
        if manifest == Manifest::Yes {
            index(&scratch, &image, &[]);
        }
        let server = Daemon::serve(&scratch, &image, &["--read-only"]);
        let sampler = Sampler::of(scratch.path("mirror.cache"));
        Self { scratch, bytes, server, sampler }
    }

    fn mirror(&self) -> Daemon {
        Daemon::mirror(&self.scratch, self.server.uri(), LIMITED)
    }

    /// A mirror that brings no more than is asked for, so that the next one need not evict before it has begun.
    fn mirror_on_demand(&self) -> Daemon {
        Daemon::mirror(&self.scratch, self.server.uri(), &[LIMITED, &[ON_DEMAND]].concat())
    }

    /// A mirror that ends when it comes to `point`.
    fn mirror_until(&self, point: &str) -> Daemon {
        let (log, mut command) = mirror_command(&self.scratch, "mirror", self.server.uri());
        command.args(LIMITED).env("HEADWATER_CRASH_AT", point);
        Daemon::start(command, 1, &log)
    }

    /// Bytes that are pinned, as the mirror says.
    fn pinned(&self, mirror: &Daemon) -> u64 {
        image_status(&self.scratch, mirror, "image")["mirror"]["pinned_bytes"].as_u64().unwrap()
    }

    fn pin(&self, mirror: &Daemon, range: &str) {
        run(&mut order(&self.scratch, mirror, &["pin", "image", "--range", range]));
    }

    /// Reads anywhere until the mirror is gone. Gives the number of reads that were answered.
    fn read_until_its_end(&self, uri: &str, seed: u64, answered: &AtomicU64) {
        let (mut random, mut client) = (Random::new(seed), Client::open(uri));
        let deadline = Instant::now() + SOON;
        loop {
            let length = 1 + random.below(3 * CHUNK);
            let offset = random.below(SIZE - length);
            let Ok(read) = client.try_read(offset, length) else { return };
            assert!(read == self.bytes[offset as usize..(offset + length) as usize], "wrong bytes at {offset}");
            answered.fetch_add(1, Ordering::SeqCst);
            assert!(Instant::now() < deadline, "it does not come to that point");
        }
    }

    /// Ends all, and holds what was seen of the disk against the limit.
    fn end(self, what: &str) {
        let most = self.sampler.most();
        assert!(most <= LIMIT, "{what}: the cache took {most} bytes");
        assert!(most > LIMIT / 2, "{what}: {most} bytes: the limit was not tried");
    }
}

/// Stops a mirror that holds something and has a pin at one point, starts it again and looks at what it has.
fn stop_at(point: &str, manifest: Manifest) {
    let ground = Ground::new(manifest);
    let before = ground.mirror_on_demand();
    ground.pin(&before, "..1M");
    assert_holds_range(&before, &ground.bytes, 0, 4 * MIB);
    before.stop();

    let mut stopped = ground.mirror_until(point);
    if point == "pins written" {
        let failed = order(&ground.scratch, &stopped, &["pin", "image", "--range", "2M..3M"]).output().unwrap();
        assert!(!failed.status.success(), "the order succeeded");
    } else if point == "profile written" {
        // A run is over, and learnt from, when its client has left.
        assert_holds_range(&stopped, &ground.bytes, 0, 4 * MIB);
    } else {
        ground.read_until_its_end(stopped.uri(), 5, &AtomicU64::new(0));
    }
    assert_eq!(stopped.wait().signal(), Some(6), "{point}, {manifest:?}: {}", stopped.log_text());
    let left = allocated(&ground.scratch.path("mirror.cache"));
    assert!(left <= LIMIT, "{point}, {manifest:?}: a crash left {left} bytes");

    let after = ground.mirror();
    assert_eq!(ground.pinned(&after), MIB, "{point}, {manifest:?}: the pins are those before");
    for _ in 0..2 {
        assert_holds(after.uri(), &ground.bytes);
    }
    ground.pin(&after, "2M..3M");
    let log = after.stop();
    for field in ["damaged_chunks", "wrong_replies"] {
        assert_eq!(log.sum("mirror closed", field), 0, "{point}, {manifest:?}: {field}");
    }
    ground.end(point);
}

fn assert_holds_range(mirror: &Daemon, bytes: &[u8], start: u64, length: u64) {
    let read = Client::open(mirror.uri()).read(start, length);
    assert!(read == bytes[start as usize..(start + length) as usize]);
}

/// Each point is in the program, so that no case passes because its name is not known any more: a mirror that never
/// comes to its point fails the case.
fn stop_at_each(points: &[&str]) {
    for point in points {
        for manifest in [Manifest::Yes, Manifest::No] {
            stop_at(point, manifest);
        }
    }
}

#[test]
fn a_crash_on_the_way_to_the_disk_costs_what_was_on_the_way() {
    stop_at_each(&["arrived", "written, not synced", "synced, not marked", "mark half written"]);
}

#[test]
fn a_crash_while_chunks_are_evicted_leaves_neither_wrong_bytes_nor_more_of_them() {
    stop_at_each(&["map forgot, not punched", "half of it punched"]);
}

#[test]
fn a_crash_while_pins_change_leaves_those_before() {
    stop_at_each(&["pins written"]);
}

#[test]
fn a_crash_while_a_profile_is_replaced_takes_no_more_than_the_limit() {
    stop_at_each(&["profile written"]);
}

#[test]
fn a_mirror_that_evicts_and_pins_can_be_killed_at_any_moment() {
    for manifest in [Manifest::Yes, Manifest::No] {
        let ground = Ground::new(manifest);
        let mut random = Random::new(17);
        let mirror = ground.mirror();
        ground.pin(&mirror, "..1M");
        mirror.kill();
        for round in 0..8 {
            let mirror = ground.mirror();
            assert!([MIB, 2 * MIB].contains(&ground.pinned(&mirror)), "round {round}: half of an order to pin");
            let (answered, moment) = (AtomicU64::new(0), 20 + random.below(300));
            std::thread::scope(|scope| {
                let (ground, answered, uri) = (&ground, &answered, mirror.uri().to_owned());
                for reader in 0..2 {
                    let uri = uri.clone();
                    scope.spawn(move || ground.read_until_its_end(&uri, 100 * round + reader, answered));
                }
                let mut orders =
                    ["pin", "unpin"].map(|verb| order(&ground.scratch, &mirror, &[verb, "image", "--range", "2M..3M"]));
                // Until it is not there any more.
                scope.spawn(move || while orders.iter_mut().all(|order| order.output().unwrap().status.success()) {});
                eventually("moment", || answered.load(Ordering::SeqCst) >= moment);
                mirror.kill();
            });
            let left = allocated(&ground.scratch.path("mirror.cache"));
            assert!(left <= LIMIT, "round {round}: a crash left {left} bytes");
        }
        let after = ground.mirror();
        for _ in 0..2 {
            assert_holds(after.uri(), &ground.bytes);
        }
        let log = after.stop();
        assert_eq!(log.sum("mirror closed", "damaged_chunks"), 0, "something was marked that was not there");
        ground.end("killed");
    }
}
