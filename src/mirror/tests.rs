//! Mirrors over exports in memory, on both disk engines. What reached the export below is what counts.

mod ahead;
mod offer;
mod review;
mod room;
mod trusted;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;

use bytes::Bytes;
use futures_util::{future::join_all, poll};
use std::pin::pin;
use tokio::runtime::{Builder, LocalOptions};

use super::*;
use crate::disk::{Preference, attach};
use crate::error::{Error, ErrorKind};
use crate::export::assemble;
use crate::export::conformance::{self, Random, sample_contents};
use crate::export::memory::Memory;
use crate::export::wrappers::{Fault, Gate, Record, Recorded};
use crate::units::{KIB, to_u64, to_usize};

const CHUNK: u64 = 16 * KIB;

fn run(preference: Preference, test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async {
        let _attached = attach(preference).unwrap();
        test.await;
    });
}

fn on_both<F: Future<Output = ()>>(test: impl Fn() -> F) {
    run(Preference::Uring, test());
    run(Preference::Threads, test());
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn open(&self, lower: SharedExport) -> Mirror {
        self.try_open(lower, Some(16 << 10)).unwrap()
    }

    fn try_open(&self, lower: SharedExport, chunk_size: Option<u32>) -> Result<Mirror, CacheError> {
        let settings = Settings { chunk_size, ..Settings::default() };
        Mirror::open("x", Cache::open(self.0.path(), "x")?, lower, None, &self.space(), &settings)
    }

    fn space(&self) -> Arc<Space> {
        Space::new(self.0.path(), SpaceSettings::default())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join("x").join(name)
    }
}

/// An export below that remembers what was asked of it.
fn recorded(contents: &[u8]) -> Arc<Record> {
    Arc::new(Record::new(Arc::new(Memory::holding(contents).read_only())))
}

async fn read(mirror: &Mirror, start: u64, end: u64) -> Result<Vec<u8>> {
    mirror.read(ByteRange::between(start, end)).await.map(|pieces| assemble(&pieces))
}

/// Contents without zero chunks.
fn solid(length: usize) -> Vec<u8> {
    let mut random = Random::new(99);
    (0..length).map(|_| random.number().to_le_bytes()[0] | 1).collect()
}

fn total(reads: &[ByteRange]) -> u64 {
    reads.iter().map(|range| range.length()).sum()
}

#[test]
fn mirrors_conform_whatever_their_chunks() {
    on_both(|| async {
        for chunk_size in [4096, 64 << 10, 1 << 20] {
            let contents = sample_contents(1_500_001, 21);
            let mirror =
                Scratch::new().try_open(Arc::new(Memory::holding(contents.clone()).read_only()), Some(chunk_size));
            conformance::check(&mirror.unwrap(), contents).await;
        }
    });
}

#[test]
fn a_mirror_of_a_mirror_conforms_and_brings_each_byte_once() {
    on_both(|| async {
        let contents = sample_contents(700_000, 22);
        let lower = recorded(&contents);
        let (near, far) = (Scratch::new(), Scratch::new());
        let middle = far.open(lower.clone());
        let top = near.try_open(Arc::new(middle.clone()), Some(64 << 10)).unwrap();
        conformance::check(&top, contents).await;
        assert!(total(&lower.take_reads()) <= 700_000);
        assert_eq!(top.facts().path, [top.node(), middle.node()]);
    });
}

#[test]
fn a_chunk_is_fetched_once_for_all_who_want_it() {
    on_both(|| async {
        let contents = solid(10 << 14);
        let lower = recorded(&contents);
        let gate = Arc::new(Gate::new(lower.clone()));
        let mirror = Scratch::new().open(gate.clone());
        let reads = (0..50u64).map(|reader| {
            let start = reader % 3 * 1000;
            let mirror = &mirror;
            async move { (start, read(mirror, start, start + 2 * CHUNK).await.unwrap()) }
        });
        let together = join_all(reads);
        let mut together = pin!(together);
        assert!(poll!(&mut together).is_pending());
        gate.arrived(1).await;
        gate.open();
        for (start, bytes) in together.await {
            assert!(bytes == contents[to_usize(start)..][..2 << 14]);
        }
        // Three chunks were wanted, all at once: one request.
        assert_eq!(lower.take_reads(), [ByteRange::between(0, 3 * CHUNK)]);
        // 17 readers wanted two chunks and 33 three, and three of these parts began a fetch.
        assert_eq!((mirror.stats().misses.value(), mirror.stats().joins.value()), (133, 130));
    });
}

#[test]
fn neighbours_missed_in_one_turn_travel_together() {
    on_both(|| async {
        let contents = solid(64 << 14);
        let lower = recorded(&contents);
        let mirror = Scratch::new().open(lower.clone());
        // In disorder, with a gap at chunk 5.
        let order = [3u64, 1, 8, 0, 2, 7, 4, 6];
        let reads = order.map(|chunk| read(&mirror, chunk * CHUNK + 100, chunk * CHUNK + 200));
        for (result, chunk) in join_all(reads).await.into_iter().zip(order) {
            let start = to_usize(chunk * CHUNK) + 100;
            assert!(result.unwrap() == contents[start..start + 100]);
        }
        let mut reads = lower.take_reads();
        reads.sort_unstable_by_key(|range| range.start());
        assert_eq!(reads, [ByteRange::between(0, 5 * CHUNK), ByteRange::between(6 * CHUNK, 9 * CHUNK)]);
    });
}

#[test]
fn what_came_over_in_one_piece_is_answered_in_one_piece() {
    on_both(|| async {
        let mut contents = solid(9 << 14);
        contents[4 << 14..5 << 14].fill(0);
        let mirror = Scratch::new().open(recorded(&contents));
        let lengths: Vec<_> =
            mirror.read(ByteRange::between(100, 9 * CHUNK - 1)).await.unwrap().iter().map(Piece::length).collect();
        assert_eq!(lengths, [4 * CHUNK - 100, CHUNK, 4 * CHUNK - 1]);
    });
}

#[test]
fn the_answer_does_not_wait_for_the_disk_and_nothing_is_fetched_twice_meanwhile() {
    on_both(|| async {
        let contents = solid(4 << 14);
        let lower = recorded(&contents);
        let scratch = Scratch::new();
        let mirror = scratch.open(lower.clone());
        assert!(read(&mirror, 0, 4 * CHUNK).await.unwrap() == contents);
        assert_eq!(fs::metadata(scratch.file("data")).unwrap().blocks(), 0, "stored before it was answered");
        assert!(read(&mirror, 5, 4 * CHUNK).await.unwrap() == contents[5..]);
        mirror.0.stored().await;
        assert!(fs::read(scratch.file("data")).unwrap() == contents);
        assert!(read(&mirror, 7, 4 * CHUNK).await.unwrap() == contents[7..]);
        assert_eq!(lower.take_reads(), [ByteRange::between(0, 4 * CHUNK)]);
    });
}

#[test]
fn who_leaves_neither_stops_a_fetch_nor_fails_others() {
    on_both(|| async {
        let contents = solid(4 << 14);
        let lower = recorded(&contents);
        let gate = Arc::new(Gate::new(lower.clone()));
        let mirror = Scratch::new().open(gate.clone());
        let mut stays = pin!(read(&mirror, 10, 20));
        {
            let mut leader = pin!(read(&mirror, 0, CHUNK));
            assert!(poll!(&mut leader).is_pending());
            assert!(poll!(&mut stays).is_pending());
            gate.arrived(1).await;
        }
        gate.open();
        assert!(stays.await.unwrap() == contents[10..20]);
        // And with nobody left at all.
        {
            let mut only = pin!(read(&mirror, CHUNK, 2 * CHUNK));
            assert!(poll!(&mut only).is_pending());
        }
        assert!(read(&mirror, CHUNK, 2 * CHUNK).await.unwrap() == contents[1 << 14..2 << 14]);
        assert_eq!(lower.take_reads().len(), 2);
    });
}

#[test]
fn hits_do_not_wait_for_misses() {
    on_both(|| async {
        let contents = solid(64 << 14);
        let scratch = Scratch::new();
        let mirror = scratch.open(recorded(&contents));
        read(&mirror, 0, 4 * CHUNK).await.unwrap();
        mirror.settle().await;
        drop(mirror);
        // After a restart the hits are checked first; that does not wait either.
        let gate = Arc::new(Gate::new(recorded(&contents)));
        let mirror = scratch.open(gate.clone());
        let mut miss = pin!(read(&mirror, 10 * CHUNK, 60 * CHUNK));
        assert!(poll!(&mut miss).is_pending());
        gate.arrived(1).await;
        assert!(read(&mirror, 5, 4 * CHUNK).await.unwrap() == contents[5..4 << 14]);
        assert!(poll!(&mut miss).is_pending());
        gate.open();
        assert!(miss.await.unwrap() == contents[10 << 14..60 << 14]);
    });
}

#[test]
fn what_is_zero_is_neither_fetched_nor_stored() {
    on_both(|| async {
        // Known by its extents: nothing is read below.
        let scratch = Scratch::new();
        let lower = Arc::new(Record::new(Arc::new(Memory::zeroed(100 * CHUNK).read_only())));
        let mirror = scratch.open(lower.clone());
        assert_eq!(mirror.read(ByteRange::between(0, 100 * CHUNK)).await.unwrap(), [Piece::Hole(100 * CHUNK)]);
        let calls = lower.take();
        assert_eq!(calls, [Recorded::Extents(ByteRange::between(0, 100 * CHUNK))]);
        // Known only once it is here: zeroes that were carried as bytes.
        let lower = Arc::new(Memory::holding(vec![0; 100 << 14]).with_facts(|facts| {
            *facts = Facts { contexts: vec![], ..Facts::read_only(facts.size, "") };
        }));
        let second = Scratch::new();
        let mirror_of_bytes = second.open(lower);
        assert_eq!(read(&mirror_of_bytes, 0, 100 * CHUNK).await.unwrap(), vec![0; 100 << 14]);
        for (mirror, scratch) in [(mirror, scratch), (mirror_of_bytes, second)] {
            let zero = || mirror.here(&[ByteRange::between(0, 100 * CHUNK)]).zero;
            assert_eq!(zero(), 0, "a crash would lose what the map does not tell of");
            mirror.settle().await;
            assert_eq!(zero(), 100 * CHUNK);
            assert_eq!(mirror.share(), Share { size: 100 * CHUNK, resident: 0, zero: 100 * CHUNK, pinned: 0 });
            assert_eq!(fs::metadata(scratch.file("data")).unwrap().blocks(), 0);
            assert_eq!(mirror.try_read(ByteRange::between(7, 9), &mut BytesMut::new()), TryRead::Hole);
            drop(mirror);
            let reopened = scratch.open(recorded(&vec![1; 100 << 14]));
            assert_eq!(read(&reopened, 0, 100 * CHUNK).await.unwrap(), vec![0; 100 << 14]);
        }
    });
}

#[test]
fn a_restart_fetches_nothing_that_was_durable() {
    on_both(|| async {
        let contents = sample_contents(40 << 14, 31);
        let scratch = Scratch::new();
        let mirror = scratch.open(recorded(&contents));
        read(&mirror, 3 * CHUNK, 20 * CHUNK + 1).await.unwrap();
        mirror.settle().await;
        drop(mirror);
        let lower = recorded(&contents);
        let mirror = scratch.open(lower.clone());
        assert!(read(&mirror, 3 * CHUNK, 21 * CHUNK).await.unwrap() == contents[3 << 14..21 << 14]);
        assert_eq!(lower.take_reads(), []);
        // And a second use is a plain hit.
        let mut output = BytesMut::new();
        while mirror.try_read(ByteRange::between(4 * CHUNK, 4 * CHUNK + 10), &mut output) == TryRead::Wait {
            read(&mirror, 4 * CHUNK, 4 * CHUNK + 10).await.unwrap();
        }
        assert_eq!(lower.take_reads(), []);
    });
}

#[test]
fn what_has_to_be_checked_is_answered_at_once_if_it_is_right() {
    on_both(|| async {
        let contents = solid((40 << 14) + 5);
        let end = to_u64(contents.len());
        let scratch = Scratch::new();
        let mirror = scratch.open(recorded(&contents));
        read(&mirror, 0, end).await.unwrap();
        mirror.0.stored().await;
        let data = fs::File::options().write(true).open(scratch.file("data")).unwrap();
        let try_all = |mirror: &Mirror, damaged: u64| {
            for (start, end) in [(0, CHUNK), (2 * CHUNK + 7, 5 * CHUNK - 7), (36 * CHUNK + 1, end), (9, 10)] {
                let mut output = BytesMut::from("before");
                let is_right = !(start / CHUNK..end.div_ceil(CHUNK)).contains(&damaged);
                let found = mirror.try_read(ByteRange::between(start, end), &mut output);
                assert_eq!(found, if is_right { TryRead::Data } else { TryRead::Wait }, "{start} {damaged}");
                let expected = if is_right { &contents[to_usize(start)..to_usize(end)] } else { &[] };
                assert!(output.strip_prefix(b"before").unwrap() == expected, "{start} {damaged}");
            }
            // Too much to be checked while others wait.
            let long = ByteRange::between(0, 20 * CHUNK);
            assert_eq!(mirror.try_read(long, &mut BytesMut::new()), TryRead::Wait);
        };
        // Not durable yet.
        try_all(&mirror, u64::MAX);
        data.write_all_at(b"!", 4 * CHUNK).unwrap();
        try_all(&mirror, 4);
        data.write_all_at(&contents[4 << 14..][..1], 4 * CHUNK).unwrap();
        mirror.settle().await;
        drop(mirror);
        // Not read since the start.
        data.write_all_at(b"!", 40 * CHUNK).unwrap();
        try_all(&scratch.open(recorded(&contents)), 40);
    });
}

#[test]
fn what_was_not_settled_is_not_in_the_map() {
    on_both(|| async {
        let contents = solid(8 << 14);
        let scratch = Scratch::new();
        let mirror = scratch.open(recorded(&contents));
        read(&mirror, 0, 8 * CHUNK).await.unwrap();
        mirror.0.stored().await;
        assert_eq!(mirror.share().resident, 0);
        drop(mirror);
        let lower = recorded(&contents);
        let mirror = scratch.open(lower.clone());
        assert!(read(&mirror, 0, 8 * CHUNK).await.unwrap() == contents);
        assert_eq!(total(&lower.take_reads()), 8 * CHUNK);
    });
}

#[test]
fn the_flusher_settles_by_itself() {
    on_both(|| async {
        let contents = solid(8 << 14);
        let scratch = Scratch::new();
        let mirror = scratch.open(recorded(&contents));
        let flusher = tokio::task::spawn_local(mirror.clone().run_flusher());
        read(&mirror, 0, 8 * CHUNK).await.unwrap();
        while mirror.share().resident < 8 * CHUNK {
            tokio::task::yield_now().await;
        }
        flusher.abort();
        let _ = flusher.await;
    });
}

#[test]
fn what_was_written_before_a_failed_sync_is_fetched_again() {
    on_both(|| async {
        let contents = solid(8 << 14);
        let scratch = Scratch::new();
        let lower = recorded(&contents);
        let mirror = scratch.open(lower.clone());
        read(&mirror, 0, 4 * CHUNK).await.unwrap();
        mirror.0.stored().await;
        // As if the file system had told of a failure while more was written.
        mirror.0.pending.distrust();
        read(&mirror, 4 * CHUNK, 8 * CHUNK).await.unwrap();
        mirror.settle().await;
        assert_eq!(mirror.share().resident, 4 * CHUNK);
        lower.take_reads();
        assert!(read(&mirror, 0, 8 * CHUNK).await.unwrap() == contents);
        assert_eq!(total(&lower.take_reads()), 4 * CHUNK);
        mirror.settle().await;
        assert_eq!(mirror.share().resident, 8 * CHUNK);
    });
}

#[test]
fn pages_that_could_not_be_written_do_not_keep_the_flusher_asleep() {
    on_both(|| async {
        let contents = solid(8 << 14);
        let scratch = Scratch::new();
        let mirror = scratch.open(recorded(&contents));
        // As a failed writing of the map leaves it.
        mirror.0.pending.changed(mirror.0.geometry.chunk(0).unwrap(), mirror.0.geometry.chunk(0).unwrap());
        mirror.0.pending.take_signal().await;
        let flusher = tokio::task::spawn_local(mirror.clone().run_flusher());
        read(&mirror, 0, 8 * CHUNK).await.unwrap();
        while mirror.share().resident < 8 * CHUNK {
            tokio::task::yield_now().await;
        }
        flusher.abort();
    });
}

#[test]
fn misses_that_wait_for_room_fail_no_later_than_the_others() {
    on_both(|| async {
        // Twice as many of the largest chunks as may be fetched at once, and nobody who has them.
        let size = 64 * u64::from(*CHUNK_SIZES.end());
        let silent = Gate::new(Arc::new(Memory::holding(vec![0; to_usize(size)]).read_only()));
        let lower = Arc::new(Record::new(Arc::new(silent)));
        let scratch = Scratch::new();
        let settings = Settings {
            chunk_size: Some(*CHUNK_SIZES.end()),
            patience: Duration::from_millis(300),
            ..Settings::default()
        };
        let cache = Cache::open(scratch.0.path(), "x").unwrap();
        let mirror = Mirror::open("x", cache, lower.clone(), None, &scratch.space(), &settings).unwrap();
        let reads = (0..64).map(|chunk| read(&mirror, chunk << 22, (chunk << 22) + 1));
        for result in join_all(reads).await {
            assert_eq!(result.unwrap_err().kind(), ErrorKind::Unavailable);
        }
        assert_eq!(lower.take_reads().len(), 32, "what comes too late is not even asked for");
    });
}

#[test]
fn damaged_chunks_are_misses_and_never_wrong_bytes() {
    on_both(|| async {
        let contents = solid(32 << 14);
        let scratch = Scratch::new();
        let mirror = scratch.open(recorded(&contents));
        read(&mirror, 0, 32 * CHUNK).await.unwrap();
        mirror.settle().await;
        drop(mirror);
        let data = fs::File::options().write(true).open(scratch.file("data")).unwrap();
        data.write_all_at(b"!", 5 * CHUNK + 77).unwrap();
        data.write_all_at(&[0; 3 << 14], 9 * CHUNK).unwrap();
        data.set_len(31 * CHUNK).unwrap();
        let lower = recorded(&contents);
        let mirror = scratch.open(lower.clone());
        assert!(read(&mirror, 0, 32 * CHUNK).await.unwrap() == contents);
        assert_eq!(mirror.stats().damaged_chunks.value(), 5);
        let mut reads = lower.take_reads();
        reads.sort_unstable_by_key(|range| range.start());
        assert_eq!(
            reads,
            [
                ByteRange::between(5 * CHUNK, 6 * CHUNK),
                ByteRange::between(9 * CHUNK, 12 * CHUNK),
                ByteRange::between(31 * CHUNK, 32 * CHUNK)
            ]
        );
        mirror.settle().await;
        drop(mirror);
        // Mended for good.
        let mirror = scratch.open(lower.clone());
        assert!(read(&mirror, 0, 32 * CHUNK).await.unwrap() == contents);
        assert_eq!(lower.take_reads(), []);
    });
}

#[test]
fn flipped_bits_anywhere_in_the_map_cost_a_fetch_at_most() {
    run(Preference::Auto, async {
        let contents = solid(2000 * 4096);
        let scratch = Scratch::new();
        let mirror = scratch.try_open(recorded(&contents), Some(4096)).unwrap();
        read(&mirror, 0, to_u64(contents.len())).await.unwrap();
        mirror.settle().await;
        drop(mirror);
        let map = fs::read(scratch.file("map")).unwrap();
        let mut random = Random::new(17);
        for _ in 0..20 {
            let mut damaged = map.clone();
            for _ in 0..1 + random.below(20) {
                // Behind the header, which is refused as a whole.
                let at = 4096 + to_usize(random.below(to_u64(map.len()) - 4096));
                damaged[at] ^= 1 << random.below(8);
            }
            fs::write(scratch.file("map"), &damaged).unwrap();
            let mirror = scratch.try_open(recorded(&contents), None).unwrap();
            assert!(read(&mirror, 0, to_u64(contents.len())).await.unwrap() == contents);
            // What still writes would keep the cache locked.
            mirror.settle().await;
        }
    });
}

#[test]
fn errors_below_are_errors_here_and_spare_the_neighbours() {
    on_both(|| async {
        let contents = solid(16 << 14);
        let bad = ByteRange::between(7 * CHUNK, 8 * CHUNK);
        let lower = Fault::new(Arc::new(Memory::holding(contents.clone()).read_only()), move |range| {
            (!range.intersect(bad).is_empty()).then(|| Error::new(ErrorKind::Permission, "no such sector"))
        });
        let mirror = Scratch::new().open(Arc::new(lower));
        let reads = (0..16).map(|chunk| read(&mirror, chunk * CHUNK, (chunk + 1) * CHUNK));
        for (chunk, result) in join_all(reads).await.into_iter().enumerate() {
            match result {
                Ok(bytes) => assert!(bytes == contents[chunk << 14..][..1 << 14]),
                Err(error) => {
                    assert_eq!((chunk, error.kind()), (7, ErrorKind::Io));
                    assert!(error.to_string().contains("x: cannot fetch the chunk at 114688: no such sector"));
                }
            }
        }
        // A failure is not remembered: the next read asks again.
        assert!(read(&mirror, 0, 16 * CHUNK).await.is_err());
        assert!(read(&mirror, 8 * CHUNK, 16 * CHUNK).await.is_ok());
    });
}

#[test]
fn a_lower_tier_that_sends_too_little_is_not_believed() {
    #[derive(Debug)]
    struct Short;
    impl Export for Short {
        fn facts(&self) -> Facts {
            Facts { contexts: vec![], ..Facts::read_only(100_000, "") }
        }
        fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
            let data = Bytes::from(vec![1; to_usize(range.length() - 1)]);
            Box::pin(std::future::ready(Ok(vec![Piece::Data(data)])))
        }
    }
    on_both(|| async {
        let mirror = Scratch::new().open(Arc::new(Short));
        assert_eq!(read(&mirror, 0, 10).await.unwrap_err().kind(), ErrorKind::Io);
    });
}

#[test]
fn a_range_can_be_brought_near() {
    on_both(|| async {
        let contents = solid(100 << 14);
        let lower = recorded(&contents);
        let mirror = Scratch::new().open(lower.clone());
        mirror.cache(ByteRange::between(10 * CHUNK + 5, 90 * CHUNK)).await.unwrap();
        assert_eq!(total(&lower.take_reads()), 80 * CHUNK);
        assert!(read(&mirror, 10 * CHUNK, 90 * CHUNK).await.unwrap() == contents[10 << 14..90 << 14]);
        assert_eq!(lower.take_reads(), []);
    });
}

#[test]
fn residency_and_allocation_are_told() {
    on_both(|| async {
        let mut contents = solid(8 << 14);
        contents[2 << 14..4 << 14].fill(0);
        let memory = Memory::holding(contents);
        let zeroes = crate::nbd::request::ZeroMode { may_punch: true, must_be_fast: false };
        memory
            .write_zeroes(ByteRange::between(2 * CHUNK, 4 * CHUNK), zeroes, crate::nbd::request::Durability::Volatile)
            .await
            .unwrap();
        let mirror = Scratch::new().open(Arc::new(memory.read_only()));
        let all = ByteRange::between(0, 8 * CHUNK);
        let told = async |context| {
            let extents = mirror.extents(all, context, 100).await.unwrap();
            extents.into_iter().map(|extent| (extent.length / CHUNK, extent.status)).collect::<Vec<_>>()
        };
        assert_eq!(told(Context::Residency).await, [(8, 0)]);
        assert_eq!(told(Context::Allocation).await, [(2, 0), (2, 3), (4, 0)]);
        read(&mirror, 0, 3 * CHUNK).await.unwrap();
        mirror.settle().await;
        assert_eq!(told(Context::Residency).await, [(2, 1), (2, 2), (4, 0)]);
        let first = mirror.extents(ByteRange::between(100, 8 * CHUNK), Context::Residency, 1).await.unwrap();
        assert_eq!(first, [Extent { length: 2 * CHUNK - 100, status: 1 }]);
    });
}

#[test]
fn a_cache_of_another_image_is_refused() {
    on_both(|| async {
        let scratch = Scratch::new();
        let image = |size: usize, id: Option<u8>| -> SharedExport {
            let identity = id.map(|byte| ImageId([byte; 32]));
            Arc::new(Memory::holding(vec![1; size]).read_only().with_facts(|facts| facts.identity = identity))
        };
        drop(scratch.open(image(100_000, Some(1))));
        let text = |lower, chunk| scratch.try_open(lower, chunk).unwrap_err().to_string();
        let other_size = text(image(100_001, Some(1)), None);
        assert!(other_size.contains("holds another image, of 100000 bytes"), "{other_size}");
        let other_image = text(image(100_000, Some(2)), None);
        assert!(other_image.contains("holds another image, blake3-0101"), "{other_image}");
        let other_chunks = text(image(100_000, Some(1)), Some(4096));
        assert!(other_chunks.contains("was made with chunks of 16K, not 4K"), "{other_chunks}");
        // Who does not know its identity cannot contradict.
        let mirror = scratch.try_open(image(100_000, None), None).unwrap();
        assert_eq!(mirror.facts().identity, Some(ImageId([1; 32])));
        let in_use = text(image(100_000, Some(1)), None);
        assert!(in_use.contains("is in use by another process"), "{in_use}");
    });
}

#[test]
fn random_reads_under_random_restarts_are_right() {
    on_both(|| async {
        let contents = sample_contents(900_000, 77);
        let scratch = Scratch::new();
        let mut random = Random::new(5);
        let mut fetched = 0;
        for _ in 0..10 {
            let lower = recorded(&contents);
            let mirror = scratch.try_open(lower.clone(), None).unwrap();
            let ranges: Vec<_> = (0..60).map(|_| random.range(900_000, 50_000)).collect();
            let results = join_all(ranges.iter().map(|range| read(&mirror, range.start(), range.end()))).await;
            for (range, result) in ranges.iter().zip(results) {
                let expected = &contents[to_usize(range.start())..to_usize(range.end())];
                assert!(result.unwrap() == expected, "{range:?}");
            }
            mirror.settle().await;
            fetched += total(&lower.take_reads());
        }
        assert!(fetched <= 900_000, "{fetched} bytes came over for 900000");
    });
}
