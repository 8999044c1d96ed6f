//! Mirrors with a manifest, pins and a bound. What is on the disk is measured, not believed.

use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::export::{Check, wrong_bytes};
use crate::manifest::of_bytes;
use crate::mirror::chunks::checksum;
use crate::mirror::policy::{Admission, Kind};
use crate::units::MIB;

/// Gives wrong bytes for reads whose number is a multiple of `every`, like a server that lies now and then.
#[derive(Debug)]
struct Liar {
    below: SharedExport,
    reads: AtomicU64,
    every: u64,
}

impl Export for Liar {
    fn facts(&self) -> Facts {
        self.below.facts()
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(async move {
            let number = self.reads.fetch_add(1, Ordering::Relaxed) + 1;
            let mut bytes = assemble(&self.below.read(range).await?);
            if number.is_multiple_of(self.every) {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
            }
            Ok(vec![Piece::Data(bytes.into())])
        })
    }

    /// Asks again, as an export with a second source would.
    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        Box::pin(async move {
            for _ in 0..3 {
                let pieces = self.read(range).await?;
                if check(&pieces) {
                    return Ok(pieces);
                }
            }
            Err(wrong_bytes(range))
        })
    }
}

/// The manifest of `contents`, as it would be after it was fetched into `directory`.
pub(super) async fn truth_of(contents: &[u8], chunk_size: u32, directory: &Path) -> Truth {
    let (header, bytes) = of_bytes(contents, chunk_size);
    Truth::fetch(&Memory::holding(bytes).read_only(), header.id, directory).await.unwrap()
}

pub(super) struct Bounded {
    pub(super) root: tempfile::TempDir,
    pub(super) space: Arc<Space>,
}

impl Bounded {
    pub(super) fn new(limit: Option<u64>, policy: Kind) -> Self {
        let root = tempfile::tempdir().unwrap();
        let space = Space::new(root.path(), SpaceSettings { limit, reserve: 0, policy, admission: Admission::Always });
        Self { root, space }
    }

    /// Another process, with the same directory.
    pub(super) fn restarted(self, limit: Option<u64>, policy: Kind) -> Self {
        let Self { root, .. } = self;
        let space = Space::new(root.path(), SpaceSettings { limit, reserve: 0, policy, admission: Admission::Always });
        Self { root, space }
    }

    pub(super) async fn open(&self, name: &str, lower: SharedExport, contents: Option<&[u8]>) -> Mirror {
        let cache = Cache::open(self.root.path(), name).unwrap();
        let truth = match contents {
            Some(contents) => Some(truth_of(contents, 16 << 10, cache.directory()).await),
            None => None,
        };
        let settings = Settings { chunk_size: Some(16 << 10), ..Settings::default() };
        Mirror::open(name, cache, lower, truth, &self.space, &settings).unwrap()
    }

    /// What `du` says.
    fn on_disk(&self) -> u64 {
        fn walk(path: &Path) -> u64 {
            let own = fs::symlink_metadata(path).unwrap().blocks() * 512;
            let inside =
                if path.is_dir() { fs::read_dir(path).unwrap().map(|e| walk(&e.unwrap().path())).sum() } else { 0 };
            own + inside
        }
        walk(self.root.path())
    }

    pub(super) fn check_bound(&self) {
        let (disk, used) = (self.on_disk(), self.space.usage().used);
        assert!(disk <= used, "{disk} bytes are on the disk, and only {used} in the account");
        assert!(used <= self.space.limit(), "{used} bytes of {}", self.space.limit());
    }
}

pub(super) fn memory(contents: &[u8]) -> SharedExport {
    Arc::new(Memory::holding(contents).read_only())
}

#[test]
fn a_lying_upstream_is_caught_and_asked_again() {
    on_both(|| async {
        let contents = sample_contents(3_000_000, 7);
        let here = Bounded::new(None, Kind::Lru);
        let liar = Arc::new(Liar { below: memory(&contents), reads: AtomicU64::new(0), every: 3 });
        let mirror = here.open("x", liar, Some(&contents)).await;
        for window in ByteRange::between(0, 3_000_000).pieces(50_000) {
            assert_eq!(
                read(&mirror, window.start(), window.end()).await.unwrap(),
                contents[to_usize(window.start())..to_usize(window.end())]
            );
        }
        assert!(mirror.stats().wrong_replies.value() > 5);
        mirror.settle().await;
        let always = Arc::new(Liar { below: memory(&contents), reads: AtomicU64::new(0), every: 1 });
        let mirror = Bounded::new(None, Kind::Lru).open("y", always, Some(&contents)).await;
        assert_eq!(read(&mirror, 0, 10).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(mirror.share().resident, 0);
    });
}

#[test]
fn an_upstream_that_says_zero_is_not_believed() {
    on_both(|| async {
        let contents = solid(200_000);
        let zeroes: SharedExport = Arc::new(Memory::zeroed(200_000).read_only());
        let mirror = Bounded::new(None, Kind::Lru).open("x", zeroes, Some(&contents)).await;
        assert_eq!(read(&mirror, 100, 200).await.unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(mirror.share().zero, 0);
    });
}

#[test]
fn what_the_manifest_says_is_zero_is_not_asked_for() {
    on_both(|| async {
        let mut contents = solid(10 * to_usize(CHUNK));
        contents[3 * to_usize(CHUNK)..7 * to_usize(CHUNK)].fill(0);
        let record = recorded(&contents);
        let mirror = Bounded::new(None, Kind::Lru).open("x", record.clone(), Some(&contents)).await;
        assert_eq!(mirror.share().zero, 4 * CHUNK);
        assert_eq!(read(&mirror, 0, 10 * CHUNK).await.unwrap(), contents);
        let (mut asked, mut fetched) = (0, 0);
        for entry in record.take() {
            match entry {
                Recorded::Extents(_) => asked += 1,
                Recorded::Read(range) => fetched += range.length(),
                _ => {}
            }
        }
        assert_eq!((asked, fetched), (0, 6 * CHUNK), "extents are not asked for where the manifest knows");
    });
}

#[test]
fn flipped_bits_on_the_disk_never_reach_a_client_and_are_counted() {
    on_both(|| async {
        for with_manifest in [false, true] {
            let contents = solid(40 * to_usize(CHUNK));
            let truth = with_manifest.then_some(&contents[..]);
            let here = Bounded::new(None, Kind::Lru);
            let mirror = here.open("x", memory(&contents), truth).await;
            read(&mirror, 0, 40 * CHUNK).await.unwrap();
            mirror.settle().await;
            drop(mirror);
            let mut random = Random::new(3);
            for (name, flips) in [("data", 5), ("map", 2), ("manifest", u64::from(with_manifest))] {
                let path = here.root.path().join("x").join(name);
                let Ok(mut bytes) = fs::read(&path) else { continue };
                for _ in 0..flips {
                    // In the first slots of the map, which are in use.
                    let at =
                        to_usize(random.below(to_u64(bytes.len()).min(if name == "map" { 12_288 } else { u64::MAX })));
                    bytes[at] ^= 1 << random.below(8);
                }
                fs::write(&path, bytes).unwrap();
            }
            let here = here.restarted(None, Kind::Lru);
            let cache = Cache::open(here.root.path(), "x").unwrap();
            let truth = match with_manifest {
                // What is fetched again when the one here cannot be used.
                true => Some(truth_of(&contents, 16 << 10, cache.directory()).await),
                false => None,
            };
            let mirror = Mirror::open(
                "x",
                cache,
                memory(&contents),
                truth,
                &here.space,
                &Settings { chunk_size: Some(16 << 10), ..Settings::default() },
            )
            .unwrap();
            for window in ByteRange::between(0, 40 * CHUNK).pieces(5000) {
                let bytes = read(&mirror, window.start(), window.end()).await.unwrap();
                assert!(bytes == contents[to_usize(window.start())..to_usize(window.end())], "{window:?}");
            }
        }
    });
}

#[test]
fn a_manifest_that_comes_later_is_held_against_what_is_here() {
    on_both(|| async {
        let contents = solid(8 * to_usize(CHUNK));
        let mut wrong = contents.clone();
        wrong[to_usize(2 * CHUNK) + 5] ^= 1;
        wrong[to_usize(6 * CHUNK)] ^= 1;
        let here = Bounded::new(None, Kind::Lru);
        let liar: SharedExport =
            Arc::new(Once { first: memory(&wrong), then: memory(&contents), reads: AtomicU64::new(0), count: 2 });
        let mirror = here.open("x", liar, None).await;
        // Durable, and then not durable yet.
        read(&mirror, 0, 4 * CHUNK).await.unwrap();
        mirror.settle().await;
        read(&mirror, 4 * CHUNK, 8 * CHUNK).await.unwrap();
        mirror.adopt(truth_of(&contents, 16 << 10, mirror.directory()).await).unwrap();
        assert_eq!(mirror.image(), Some(of_bytes(&contents, 16 << 10).0.id));
        mirror.settle().await;
        assert!(read(&mirror, 0, 8 * CHUNK).await.unwrap() == contents);
        assert_eq!(mirror.stats().damaged_chunks.value(), 1, "the durable one; the others were fetched again");
        let small = Settings { chunk_size: Some(4096), ..Settings::default() };
        let cache = Cache::open(here.root.path(), "small").unwrap();
        let mirror = Mirror::open("small", cache, memory(&contents), None, &here.space, &small).unwrap();
        let truth = truth_of(&contents, 16 << 10, mirror.directory()).await;
        assert!(matches!(mirror.adopt(truth), Err(ManifestError::ChunkSize { .. })));
    });
}

/// Another image for the first reads.
#[derive(Debug)]
struct Once {
    first: SharedExport,
    then: SharedExport,
    reads: AtomicU64,
    count: u64,
}

impl Export for Once {
    fn facts(&self) -> Facts {
        self.then.facts()
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        let is_first = self.reads.fetch_add(1, Ordering::Relaxed) < self.count;
        if is_first { self.first.read(range) } else { self.then.read(range) }
    }
}

#[test]
fn a_second_version_costs_only_what_is_new_in_it() {
    on_both(|| async {
        let old = solid(64 * to_usize(CHUNK));
        let mut new = old.clone();
        new[to_usize(10 * CHUNK)] ^= 1;
        // Moved by whole chunks.
        new.rotate_right(3 * to_usize(CHUNK));
        let here = Bounded::new(None, Kind::Lru);
        let first = here.open("old", memory(&old), Some(&old)).await;
        read(&first, 0, 64 * CHUNK).await.unwrap();
        let record = recorded(&new);
        let second = here.open("new", record.clone(), Some(&new)).await;
        assert!(read(&second, 0, 64 * CHUNK).await.unwrap() == new);
        assert_eq!(total(&record.take_reads()), CHUNK);
        assert_eq!(second.stats().deduplicated_bytes.value(), 63 * CHUNK);
        first.settle().await;
        second.settle().await;
        assert_eq!(second.share().resident, 64 * CHUNK);
        drop((first, second));
        // After a restart too, and the copies are its own.
        let here = here.restarted(None, Kind::Lru);
        fs::remove_dir_all(here.root.path().join("old")).unwrap();
        let record = recorded(&new);
        let second = here.open("new", record.clone(), Some(&new)).await;
        let third = here.open("third", recorded(&old), Some(&old)).await;
        assert!(read(&third, 0, 64 * CHUNK).await.unwrap() == old);
        assert_eq!(third.stats().deduplicated_bytes.value(), 63 * CHUNK);
        assert!(read(&second, 0, 64 * CHUNK).await.unwrap() == new);
        assert!(record.take_reads().is_empty());
    });
}

#[test]
fn a_twin_that_is_damaged_is_no_source() {
    on_both(|| async {
        let contents = solid(4 * to_usize(CHUNK));
        let here = Bounded::new(None, Kind::Lru);
        let first = here.open("a", memory(&contents), Some(&contents)).await;
        read(&first, 0, 4 * CHUNK).await.unwrap();
        first.settle().await;
        let file = fs::File::options().write(true).open(here.root.path().join("a/data")).unwrap();
        file.write_all_at(b"noise", CHUNK + 7).unwrap();
        let record = recorded(&contents);
        let second = here.open("b", record.clone(), Some(&contents)).await;
        assert!(read(&second, 0, 4 * CHUNK).await.unwrap() == contents);
        assert_eq!(total(&record.take_reads()), CHUNK);
    });
}

#[test]
fn the_bound_holds_at_every_moment_and_reads_are_right() {
    for policy in Kind::ALL {
        on_both(|| async move {
            let contents = solid(12 * to_usize(MIB));
            let here = Bounded::new(Some(5 * MIB), policy);
            let mirror = here.open("x", memory(&contents), Some(&contents)).await;
            let evictor = tokio::task::spawn_local(Arc::clone(&here.space).run_evictor());
            let mut random = Random::new(5);
            for round in 0..400 {
                let start = random.below(12 * MIB - 100_000);
                let end = start + 1 + random.below(100_000);
                assert!(
                    read(&mirror, start, end).await.unwrap() == contents[to_usize(start)..to_usize(end)],
                    "{start}"
                );
                if round % 10 == 0 {
                    here.check_bound();
                }
            }
            // No read waits for space, so all of them together may be done before the disk has synced once.
            while here.space.stats().evicted_chunks.value() == 0 {
                here.space.freed.notified().await;
            }
            mirror.settle().await;
            here.check_bound();
            evictor.abort();
            // Until it has let go.
            assert!(evictor.await.unwrap_err().is_cancelled());
            drop(mirror);
            assert_eq!(here.space.usage().used, 4096, "nothing is charged for what is closed");
            // A smaller limit counts from the start.
            let here = here.restarted(Some(3 * MIB), policy);
            let mirror = here.open("x", memory(&contents), Some(&contents)).await;
            here.space.make_room().await;
            here.check_bound();
            assert!(read(&mirror, 0, 300_000).await.unwrap() == contents[..300_000]);
        });
    }
}

#[test]
fn what_is_not_durable_yet_can_be_evicted_after_a_flush() {
    on_both(|| async {
        let contents = solid(4 * to_usize(MIB));
        let here = Bounded::new(Some(2 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), Some(&contents)).await;
        // Nobody flushes; the space itself must see to it.
        let evictor = tokio::task::spawn_local(Arc::clone(&here.space).run_evictor());
        for window in ByteRange::between(0, 4 * MIB).pieces(100_000) {
            assert!(
                read(&mirror, window.start(), window.end()).await.unwrap()
                    == contents[to_usize(window.start())..to_usize(window.end())]
            );
            // The answer does not wait for room; what was stored does.
            mirror.0.stored().await;
            here.check_bound();
        }
        assert!(here.space.stats().evicted_chunks.value() > 0);
        evictor.abort();
    });
}

#[test]
fn pins_stay_and_more_than_fits_is_refused_with_the_arithmetic() {
    on_both(|| async {
        let contents = solid(8 * to_usize(MIB));
        let here = Bounded::new(Some(4 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), Some(&contents)).await;
        let evictor = tokio::task::spawn_local(Arc::clone(&here.space).run_evictor());
        let pinned = ByteRange::between(MIB, 3 * MIB);
        assert_eq!(mirror.pin(&[pinned]).await.unwrap(), Pinned { bytes: 2 * MIB, here: 0 });
        let error = mirror.pin(&[ByteRange::between(3 * MIB, 6 * MIB)]).await.unwrap_err().to_string();
        assert!(error.contains("x: pinning this keeps 3") && error.contains("too much"), "{error}");
        assert_eq!(mirror.pins(), [pinned], "what is refused changes nothing");
        read(&mirror, MIB, 3 * MIB).await.unwrap();
        mirror.settle().await;
        for _ in 0..3 {
            read(&mirror, 3 * MIB, 8 * MIB).await.unwrap();
            here.check_bound();
        }
        let states = mirror.0.geometry.chunks(pinned).map(|chunk| mirror.0.states.get(chunk));
        assert!(states.into_iter().all(|state| state == State::Resident));
        evictor.abort();
        mirror.settle().await;
        drop(mirror);
        let here = here.restarted(Some(4 * MIB), Kind::Lru);
        let record = recorded(&contents);
        let mirror = here.open("x", record.clone(), Some(&contents)).await;
        assert_eq!(mirror.pins(), [pinned], "pins are durable");
        assert!(read(&mirror, MIB, 3 * MIB).await.unwrap() == contents[to_usize(MIB)..3 * to_usize(MIB)]);
        assert!(record.take_reads().is_empty());
        let status = mirror.extents(pinned, Context::Residency, 10).await.unwrap();
        assert_eq!(status[0].status & 4, 4, "{status:?}");
        assert_eq!(mirror.unpin(&[ByteRange::between(0, 2 * MIB)]).await.unwrap().bytes, MIB);
        assert_eq!(here.space.usage().pinned, mirror.0.pinned_cost(&mirror.pins()));
    });
}

#[test]
fn what_somebody_still_sends_is_not_punched_out() {
    run(Preference::Uring, async {
        let contents = solid(2 * to_usize(MIB));
        let here = Bounded::new(Some(64 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), Some(&contents)).await;
        read(&mirror, 0, 2 * MIB).await.unwrap();
        mirror.settle().await;
        let place = mirror.in_file(ByteRange::between(0, 100_000)).unwrap();
        assert_eq!(mirror.0.evict(&[0, 1]).await, 64 * (CHUNK + 32), "the other segment goes");
        assert_eq!(mirror.share().resident, MIB);
        let bytes = place.file.read_exact_at(BytesMut::new(), 100_000, 0).await.unwrap();
        assert!(bytes == contents[..100_000]);
        drop(place);
        assert_eq!(mirror.0.evict(&[0]).await, 64 * (CHUNK + 32));
        assert_eq!(mirror.share().resident, 0);
        assert!(read(&mirror, 0, 2 * MIB).await.unwrap() == contents);
    });
}

#[test]
fn pages_that_a_socket_refers_to_are_not_punched_out() {
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd;
    run(Preference::Uring, async {
        let contents = solid(to_usize(MIB));
        let here = Bounded::new(Some(64 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), Some(&contents)).await;
        read(&mirror, 0, MIB).await.unwrap();
        mirror.settle().await;
        let (mut sender, mut receiver) = std::os::unix::net::UnixStream::pair().unwrap();
        sender.write_all(b"!").unwrap();
        let file = fs::File::open(here.root.path().join("x/data")).unwrap();
        let sent = rustix::fs::sendfile(sender.as_fd(), file.as_fd(), None, 60_000).unwrap();
        mirror.0.evict(&[0]).await;
        let mut bytes = vec![0; sent + 1];
        receiver.read_exact(&mut bytes).unwrap();
        assert!(bytes[1..] == contents[..sent], "the peer gets what was sent");
        // Now that they have been taken, all of it can go.
        mirror.0.evict(&[0]).await;
        assert_eq!(mirror.share().resident, 0);
        assert_eq!(mirror.0.segments.count(0), 0);
    });
}

#[test]
fn a_scrub_finds_what_is_damaged_and_mends_it() {
    on_both(|| async {
        let contents = solid(20 * to_usize(CHUNK));
        let here = Bounded::new(None, Kind::Lru);
        let mirror = here.open("x", memory(&contents), Some(&contents)).await;
        read(&mirror, 0, 20 * CHUNK).await.unwrap();
        mirror.settle().await;
        let file = fs::File::options().write(true).open(here.root.path().join("x/data")).unwrap();
        for chunk in [3, 17] {
            file.write_all_at(b"noise", chunk * CHUNK + 9).unwrap();
        }
        let scrub = async |repair| {
            let findings = Findings::default();
            mirror.scrub(Scrub { rate: None, repair }, &findings).await;
            [&findings.checked_chunks, &findings.damaged_chunks, &findings.repaired_chunks, &findings.unrepaired_chunks]
                .map(Counter::value)
        };
        assert_eq!(scrub(false).await, [20, 2, 0, 2]);
        assert_eq!(scrub(true).await, [20, 2, 2, 0]);
        mirror.settle().await;
        assert_eq!(scrub(true).await, [20, 0, 0, 0]);
        assert!(read(&mirror, 0, 20 * CHUNK).await.unwrap() == contents);
    });
}

#[derive(Debug, Clone)]
enum Step {
    Read(u64, u64),
    Evict(u32),
    Settle,
    Flip(u64),
    Pin(u64, u64),
    Unpin(u64, u64),
    Restart,
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..6 * MIB, 1..200_000_u64);
    prop_oneof![
        8 => range().prop_map(|(start, length)| Step::Read(start, length)),
        3 => (0..6_u32).prop_map(Step::Evict),
        2 => Just(Step::Settle),
        2 => (0..6 * MIB).prop_map(Step::Flip),
        1 => range().prop_map(|(start, length)| Step::Pin(start, length)),
        1 => range().prop_map(|(start, length)| Step::Unpin(start, length)),
        1 => Just(Step::Restart),
    ]
}

/// What must always hold between the states, the charges and the disk.
async fn check_states(here: &Bounded, mirror: &Mirror, damaged: &BTreeSet<u64>) {
    let inner = &mirror.0;
    // What was answered is stored afterwards.
    inner.stored().await;
    let data = fs::read(here.root.path().join("x/data")).unwrap();
    let mut cost = inner.fixed_bytes() + 4096;
    for chunk in inner.geometry.chunks(ByteRange::between(0, inner.geometry.size())) {
        let state = inner.states.get(chunk);
        let is_here = matches!(state, State::Volatile | State::Resident | State::Unverified | State::Leaving);
        assert!(!is_here || inner.segments.is_charged(chunk), "{chunk:?} is {state:?} and not charged");
        if inner.segments.is_charged(chunk) {
            cost += inner.segments.cost(chunk);
        }
        let range = inner.geometry.range(chunk);
        let bytes = &data[to_usize(range.start())..to_usize(range.end())];
        if is_here && state != State::Leaving && !damaged.contains(&chunk.number()) {
            assert_eq!(checksum(bytes), inner.states.checksum(chunk), "{chunk:?} is {state:?}");
        }
        if matches!(state, State::Absent | State::Zero) && !inner.segments.is_charged(chunk) {
            assert!(bytes.iter().all(|byte| *byte == 0), "{chunk:?} is {state:?}, and its bytes take space");
        }
    }
    assert_eq!(here.space.usage().used, cost, "the account and the charges agree");
    let counts: u32 = (0..inner.segments.count_all()).map(|number| inner.segments.count(number)).sum();
    let charged = inner
        .geometry
        .chunks(ByteRange::between(0, inner.geometry.size()))
        .filter(|chunk| inner.segments.is_charged(*chunk));
    assert_eq!(to_u64(charged.count()), u64::from(counts));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]
    #[test]
    fn whatever_happens_to_a_cache_its_reads_are_right(
        steps in prop::collection::vec(step(), 1..60), with_manifest: bool, seed: u64,
    ) {
        run(Preference::Uring, async {
            let mut contents = solid(to_usize(6 * MIB));
            contents[to_usize(seed % (5 * MIB))..][..300_000].fill(0);
            let truth = with_manifest.then_some(&contents[..]);
            let mut here = Bounded::new(Some(4 * MIB), Kind::S3Fifo);
            let mut mirror = here.open("x", memory(&contents), truth).await;
            let mut damaged = BTreeSet::new();
            for step in steps {
                match step {
                    Step::Read(start, length) => {
                        let end = (start + length).min(6 * MIB);
                        let bytes = read(&mirror, start, end).await.unwrap();
                        let touched = mirror.0.geometry.chunks(ByteRange::between(start, end)).map(|chunk| chunk.number());
                        // What was found and mended; what is still resident was not looked at, and must not be damaged.
                        for number in touched {
                            damaged.remove(&number);
                        }
                        assert!(bytes == contents[to_usize(start)..to_usize(end)]);
                        here.space.make_room().await;
                    }
                    Step::Evict(number) => {
                        mirror.0.evict(&[number]).await;
                    }
                    Step::Settle => mirror.settle().await,
                    Step::Flip(at) => {
                        // Only what is checked before it is used again: a disk that changes what was checked is not found.
                        let chunk = mirror.0.geometry.chunk(at / CHUNK).unwrap();
                        if mirror.0.states.get(chunk) == State::Unverified {
                            let file = fs::File::options().read(true).write(true).open(here.root.path().join("x/data")).unwrap();
                            let mut byte = [0];
                            file.read_exact_at(&mut byte, at).unwrap();
                            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
                            if !damaged.insert(chunk.number()) {
                                // Twice at one place may be right again.
                                damaged.insert(chunk.number());
                            }
                        }
                    }
                    Step::Pin(start, length) => {
                        // Refused or not.
                        let _ = mirror.pin(&[ByteRange::between(start, (start + length).min(6 * MIB))]).await;
                    }
                    Step::Unpin(start, length) => {
                        mirror.unpin(&[ByteRange::between(start, (start + length).min(6 * MIB))]).await.unwrap();
                    }
                    Step::Restart => {
                        mirror.settle().await;
                        let pins = mirror.pins();
                        drop(mirror);
                        here = here.restarted(Some(4 * MIB), Kind::S3Fifo);
                        mirror = here.open("x", memory(&contents), truth).await;
                        assert_eq!(mirror.pins(), pins);
                    }
                }
                check_states(&here, &mirror, &damaged).await;
                here.check_bound();
            }
        });
    }
}
