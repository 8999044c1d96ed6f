//! Races and corners that a review found: manifests that come while chunks are on their way, pins whose cost changes,
//! evictions that meet something that cannot go.

use std::sync::atomic::Ordering;

use tokio::sync::Notify;

use super::trusted::{Bounded, memory, truth_of};
use super::*;
use crate::mirror::policy::Kind;
use crate::nbd::wire::Allocation;
use crate::units::MIB;

/// The first reads see one image, later ones another.
#[derive(Debug)]
struct Changing {
    first: SharedExport,
    then: SharedExport,
    has_changed: std::sync::atomic::AtomicBool,
}

impl Changing {
    fn new(first: &[u8], then: &[u8]) -> Arc<Self> {
        Arc::new(Self { first: memory(first), then: memory(then), has_changed: false.into() })
    }
}

impl Export for Changing {
    fn facts(&self) -> Facts {
        Facts::read_only(self.first.facts().size, "")
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        if self.has_changed.load(Ordering::Relaxed) { self.then.read(range) } else { self.first.read(range) }
    }
}

#[test]
fn what_a_later_manifest_says_is_zero_is_not_read_from_what_is_here() {
    on_both(|| async {
        let wrong = solid(4 * to_usize(CHUNK));
        let mut contents = wrong.clone();
        contents[to_usize(CHUNK)..2 * to_usize(CHUNK)].fill(0);
        let here = Bounded::new(None, Kind::Lru);
        let lower = Changing::new(&wrong, &contents);
        let mirror = here.open("x", lower.clone(), None).await;
        read(&mirror, 0, 4 * CHUNK).await.unwrap();
        mirror.settle().await;
        lower.has_changed.store(true, Ordering::Relaxed);
        mirror.adopt(truth_of(&contents, 16 << 10, mirror.directory()).await).unwrap();
        assert!(read(&mirror, 0, 4 * CHUNK).await.unwrap() == contents);
        mirror.settle().await;
        here.check_bound();
    });
}

#[test]
fn what_arrived_before_a_manifest_and_is_stored_after_it_is_not_believed() {
    on_both(|| async {
        let contents = solid(4 * to_usize(CHUNK));
        let mut wrong = contents.clone();
        wrong[5] ^= 2;
        // A whole chunk that is zero, wrongly.
        wrong[to_usize(CHUNK)..2 * to_usize(CHUNK)].fill(0);
        let here = Bounded::new(None, Kind::Lru);
        let lower = Changing::new(&wrong, &contents);
        let mirror = here.open("x", lower.clone(), None).await;
        let scratch = tempfile::tempdir().unwrap();
        let truth = truth_of(&contents, 16 << 10, scratch.path()).await;
        // Answered before it is stored.
        read(&mirror, 0, 4 * CHUNK).await.unwrap();
        assert_eq!(mirror.0.states.get(mirror.0.geometry.chunk(0).unwrap()), State::Absent, "not stored yet");
        lower.has_changed.store(true, Ordering::Relaxed);
        mirror.adopt(truth).unwrap();
        mirror.0.stored().await;
        assert!(read(&mirror, 0, 4 * CHUNK).await.unwrap() == contents, "before a flush");
        mirror.settle().await;
        assert!(read(&mirror, 0, 4 * CHUNK).await.unwrap() == contents, "after it");
        here.check_bound();
    });
}

#[test]
fn what_is_not_durable_when_a_manifest_comes_is_held_against_it_too() {
    on_both(|| async {
        let contents = solid(4 * to_usize(CHUNK));
        let mut wrong = contents.clone();
        wrong[5] ^= 2;
        let here = Bounded::new(None, Kind::Lru);
        let lower = Changing::new(&wrong, &contents);
        let mirror = here.open("x", lower.clone(), None).await;
        read(&mirror, 0, 4 * CHUNK).await.unwrap();
        mirror.0.stored().await;
        lower.has_changed.store(true, Ordering::Relaxed);
        mirror.adopt(truth_of(&contents, 16 << 10, mirror.directory()).await).unwrap();
        assert!(read(&mirror, 0, 4 * CHUNK).await.unwrap() == contents);
    });
}

/// Says that all is zero, when it is let.
#[derive(Debug)]
struct LateToSayZero {
    below: SharedExport,
    asked: Notify,
    may_answer: Notify,
}

impl Export for LateToSayZero {
    fn facts(&self) -> Facts {
        let mut facts = self.below.facts();
        facts.contexts = vec![Context::Allocation];
        facts
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        self.below.read(range)
    }

    fn extents(&self, range: ByteRange, _: Context, _: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(async move {
            self.asked.notify_one();
            self.may_answer.notified().await;
            Ok(vec![Extent { length: range.length(), status: u64::from(Allocation::all().bits()) }])
        })
    }
}

#[test]
fn what_the_upstream_said_was_zero_is_not_believed_once_there_is_a_manifest() {
    on_both(|| async {
        let contents = solid(4 * to_usize(CHUNK));
        let lower =
            Arc::new(LateToSayZero { below: memory(&contents), asked: Notify::new(), may_answer: Notify::new() });
        let here = Bounded::new(None, Kind::Lru);
        let mirror = here.open("x", lower.clone(), None).await;
        let truth = truth_of(&contents, 16 << 10, mirror.directory()).await;
        let reader = mirror.clone();
        let reading = tokio::task::spawn_local(async move { read(&reader, 0, CHUNK).await });
        lower.asked.notified().await;
        mirror.adopt(truth).unwrap();
        lower.may_answer.notify_one();
        assert!(reading.await.unwrap().unwrap() == contents[..to_usize(CHUNK)]);
        assert!(read(&mirror, 0, 4 * CHUNK).await.unwrap() == contents);
        assert_eq!(mirror.share().zero, 0);
    });
}

#[test]
fn a_manifest_that_comes_later_is_charged() {
    on_both(|| async {
        let contents = vec![0; 64 * to_usize(MIB)];
        let here = Bounded::new(Some(64 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), None).await;
        here.check_bound();
        mirror.adopt(truth_of(&contents, 4096, mirror.directory()).await).unwrap();
        here.check_bound();
        drop(mirror);
        assert_eq!(here.space.usage().used, 4096, "and given back");
    });
}

#[test]
fn pins_give_back_what_they_took_whatever_has_become_zero() {
    on_both(|| async {
        let mut contents = solid(8 * to_usize(CHUNK));
        contents[..4 * to_usize(CHUNK)].fill(0);
        let here = Bounded::new(Some(4 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), None).await;
        let all = ByteRange::between(0, 8 * CHUNK);
        mirror.pin(&[all]).await.unwrap();
        read(&mirror, 0, 8 * CHUNK).await.unwrap();
        assert_eq!(mirror.share().zero, 4 * CHUNK);
        mirror.unpin(&[all]).await.unwrap();
        assert_eq!(here.space.usage().pinned, 0);
        mirror.pin(&[all]).await.unwrap();
        mirror.settle().await;
        drop(mirror);
        assert_eq!(here.space.usage().pinned, 0, "nor does what is closed keep anything");
    });
}

#[test]
fn pins_of_a_larger_cache_can_be_taken_back_in_a_smaller_one() {
    on_both(|| async {
        let contents = solid(8 * to_usize(MIB));
        let here = Bounded::new(Some(16 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), None).await;
        let all = ByteRange::between(0, 8 * MIB);
        mirror.pin(&[all]).await.unwrap();
        drop(mirror);
        let here = here.restarted(Some(4 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), None).await;
        assert_eq!(mirror.pins(), [all]);
        assert!(here.space.usage().pinned >= 8 * MIB, "granted once, and counted");
        mirror.unpin(&[all]).await.unwrap();
        assert_eq!(here.space.usage().pinned, 0);
    });
}

#[test]
fn an_order_to_pin_that_nobody_waits_for_is_carried_out_whole() {
    on_both(|| async {
        let contents = solid(64 * to_usize(CHUNK));
        let here = Bounded::new(Some(8 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), None).await;
        for chunk in 0u64..32 {
            let range = |chunk: u64| [ByteRange::between(2 * chunk * CHUNK, (2 * chunk + 1) * CHUNK)];
            if chunk % 2 == 0 {
                let order = range(chunk);
                let mut left = Box::pin(mirror.pin(&order));
                assert!(poll!(&mut left).is_pending());
            } else {
                mirror.pin(&range(chunk)).await.unwrap();
            }
        }
        assert_eq!(mirror.pins().len(), 32, "none has pushed out another");
        assert_eq!(here.space.usage().pinned, mirror.0.pinned_cost(&mirror.pins()));
    });
}

#[test]
fn one_page_in_use_does_not_keep_all_its_neighbours_on_the_disk() {
    use std::io::Write as _;
    use std::os::fd::AsFd;
    run(Preference::Uring, async {
        let contents = solid(16 * to_usize(MIB));
        let here = Bounded::new(Some(64 * MIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), Some(&contents)).await;
        read(&mirror, 0, 16 * MIB).await.unwrap();
        mirror.settle().await;
        let (mut sender, _receiver) = std::os::unix::net::UnixStream::pair().unwrap();
        sender.write_all(b"!").unwrap();
        let file = fs::File::open(here.root.path().join("x/data")).unwrap();
        rustix::fs::sendfile(sender.as_fd(), file.as_fd(), None, 60_000).unwrap();
        let all: Vec<_> = (0..16).collect();
        let freed = mirror.0.evict(&all).await;
        assert!(freed >= 12 * MIB, "{freed} bytes are free of what one client has not taken yet");
    });
}

#[test]
fn what_is_pinned_does_not_keep_the_rest_from_going() {
    for policy in Kind::ALL {
        on_both(|| async move {
            let contents = solid(12 * to_usize(MIB));
            let here = Bounded::new(Some(64 * MIB), policy);
            let mirror = here.open("x", memory(&contents), Some(&contents)).await;
            read(&mirror, 0, 12 * MIB).await.unwrap();
            mirror.settle().await;
            mirror.pin(&[ByteRange::between(0, 8 * MIB)]).await.unwrap();
            here.space.asked.store(MIB, Ordering::Relaxed);
            here.space.make_room().await;
            assert!(here.space.stats().evicted_bytes.value() >= MIB, "{policy}");
        });
    }
}

#[test]
fn what_comes_back_during_a_read_that_began_without_it_is_not_taken_for_what_was_read() {
    run(Preference::Threads, async {
        let contents = solid(4 * to_usize(CHUNK));
        let here = Bounded::new(None, Kind::Lru);
        let mirror = here.open("x", memory(&contents), Some(&contents)).await;
        read(&mirror, 0, 4 * CHUNK).await.unwrap();
        mirror.settle().await;
        let inner = &mirror.0;
        let whole = ByteRange::between(0, CHUNK);
        assert!(inner.evict(&[0]).await > 0);
        // The chunk was found resident before, is read while it is away, and is back when the read has ended.
        let mut reading = pin!(inner.read_resident(whole));
        let early = match poll!(&mut reading) {
            std::task::Poll::Ready(bytes) => bytes,
            std::task::Poll::Pending => {
                inner.states.set(inner.geometry.chunk(0).unwrap(), State::Resident);
                reading.await
            }
        };
        assert!(early.is_none_or(|bytes| bytes == contents[..to_usize(CHUNK)]));
    });
}

#[test]
fn what_was_being_made_is_gone_after_a_restart() {
    on_both(|| async {
        let contents = solid(4 * to_usize(CHUNK));
        let here = Bounded::new(Some(64 * MIB), Kind::Lru);
        drop(here.open("x", memory(&contents), None).await);
        for name in ["manifest.new", "pins.new", "heat.new", "map.new"] {
            fs::write(here.root.path().join("x").join(name), vec![1; 100_000]).unwrap();
        }
        let here = here.restarted(Some(64 * MIB), Kind::Lru);
        let _mirror = here.open("x", memory(&contents), None).await;
        here.check_bound();
    });
}
