//! Fetching ahead of demand: it stands behind clients, fails nobody, and is counted by what came of it.

use super::*;
use crate::export::Residency;
use crate::mirror::ahead::{Ahead, Brought, Observer, Pace};
use std::sync::Mutex;
use tokio::sync::Semaphore;

/// Lets requests of `part` bytes leave, as many as there are permits, and remembers them.
#[derive(Debug)]
struct Steps {
    part: u64,
    permits: Semaphore,
    left: Mutex<Vec<(&'static str, u64)>>,
}

impl Steps {
    fn new(part: u64, permits: usize) -> Arc<Self> {
        Arc::new(Self { part, permits: Semaphore::new(permits), left: Mutex::default() })
    }

    fn note(&self, what: &'static str, bytes: u64) {
        self.left.lock().unwrap().push((what, bytes));
    }

    fn take(&self) -> Vec<(&'static str, u64)> {
        std::mem::take(&mut self.left.lock().unwrap())
    }
}

impl Pace for Steps {
    fn part(&self) -> u64 {
        self.part
    }

    fn turn(&self, bytes: u64) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            self.permits.acquire().await.unwrap().forget();
            self.note("turn", bytes);
        })
    }

    fn hurried(&self, bytes: u64) {
        self.note("hurried", bytes);
    }

    fn ended(&self, bytes: u64, latency: Option<Duration>) {
        self.note(if latency.is_some() { "ended" } else { "failed" }, bytes);
    }
}

/// Counts the requests that clients wait for.
#[derive(Debug, Default)]
struct Demand {
    began: AtomicU64,
    ended: AtomicU64,
}

impl Observer for Demand {
    fn began(&self) {
        self.began.fetch_add(1, Ordering::Relaxed);
    }

    fn ended(&self, _: u64, latency: Option<Duration>) {
        assert!(latency.is_some());
        self.ended.fetch_add(1, Ordering::Relaxed);
    }
}

fn profile(pace: &Arc<Steps>) -> Ahead {
    Ahead::paced(Cause::Profile, Arc::clone(pace) as Arc<dyn Pace>, None)
}

fn figures(mirror: &Mirror, cause: Cause) -> [u64; 4] {
    let Tally { brought_bytes, used_bytes, unused_bytes, late_bytes } = mirror.tally(cause);
    [brought_bytes, used_bytes, unused_bytes, late_bytes].map(Counter::value)
}

#[test]
fn what_is_brought_is_here_and_unread_until_a_client_reads_it() {
    on_both(|| async {
        let contents = solid(to_usize(CHUNK * 8));
        let (lower, scratch) = (recorded(&contents), Scratch::new());
        let mirror = scratch.open(lower.clone());
        let pace = Steps::new(CHUNK / 2, usize::MAX >> 4);
        let range = ByteRange::between(CHUNK, CHUNK * 4);
        let brought = mirror.bring(range, profile(&pace)).await;
        assert_eq!(brought, Brought { bytes: CHUNK * 3, missed: 0 });
        assert_eq!(lower.take_reads().len(), 6, "in requests of half a chunk");
        assert_eq!(pace.take(), [("turn", CHUNK / 2), ("ended", CHUNK / 2)].repeat(6));
        assert_eq!(figures(&mirror, Cause::Profile), [CHUNK * 3, 0, 0, 0]);
        mirror.settle().await;
        let unread = Residency::UNREAD | Residency::RESIDENT;
        let status = mirror.0.residency(ByteRange::between(0, CHUNK * 8), 9);
        assert_eq!(status[1].status, u64::from(unread.bits()));

        assert_eq!(
            read(&mirror, CHUNK + 5, CHUNK * 2 + 9).await.unwrap(),
            contents[to_usize(CHUNK + 5)..][..to_usize(CHUNK) + 4]
        );
        assert!(lower.take_reads().is_empty(), "nothing is fetched twice");
        assert_eq!(figures(&mirror, Cause::Profile), [CHUNK * 3, CHUNK * 2, 0, 0]);
        assert_eq!(mirror.bring(range, profile(&pace)).await, Brought::default(), "nothing is missing");

        // A picture of it, in cells of two chunks.
        mirror.pin(&[ByteRange::between(CHUNK + 1, CHUNK * 2 + 5)]).await.unwrap();
        let Cells { length, resident, zero, pinned, unread, fetching, .. } = mirror.cells(4);
        assert_eq!((length, mirror.share().pinned), (CHUNK * 2, CHUNK + 4));
        assert_eq!(resident, [CHUNK, CHUNK * 2, 0, 0]);
        assert_eq!((unread, pinned), (vec![0, CHUNK, 0, 0], vec![CHUNK - 1, 5, 0, 0]));
        assert_eq!((zero, fetching), (vec![0; 4], vec![0; 4]));
    });
}

#[test]
fn what_is_missing_is_found_in_stretches() {
    on_both(|| async {
        let contents = solid(to_usize(CHUNK * 10 + 100));
        let scratch = Scratch::new();
        let mirror = scratch.open(recorded(&contents));
        read(&mirror, CHUNK * 2, CHUNK * 3).await.unwrap();
        read(&mirror, CHUNK * 9, CHUNK * 9 + 1).await.unwrap();
        // A read is answered before what it brought is stored.
        mirror.0.stored().await;
        let all = ByteRange::between(0, CHUNK * 10 + 100);
        let (mut at, mut found) = (0, Vec::new());
        while at < all.end() {
            let (stretch, rest) = mirror.missing(ByteRange::between(at, all.end()), CHUNK * 4);
            found.extend(stretch.map(|stretch| (stretch.start(), stretch.end())));
            assert!(rest > at);
            at = rest;
        }
        assert_eq!(
            found,
            [(0, CHUNK * 2), (CHUNK * 3, CHUNK * 7), (CHUNK * 7, CHUNK * 9), (CHUNK * 10, CHUNK * 10 + 100)]
        );
        assert!(!mirror.is_complete() && mirror.has_some(ByteRange::between(CHUNK * 2, CHUNK * 3)));
        mirror.cache(all).await.unwrap();
        mirror.settle().await;
        assert!(mirror.is_complete());
        assert_eq!(figures(&mirror, Cause::Prefetch), [CHUNK * 8 + 100, 0, 0, 0]);
    });
}

#[test]
fn a_client_that_comes_late_hurries_it_and_is_answered_by_it() {
    on_both(|| async {
        let contents = solid(to_usize(CHUNK * 4));
        let lower = recorded(&contents);
        let gate = Arc::new(Gate::new(lower.clone()));
        let scratch = Scratch::new();
        let mirror = scratch.open(gate.clone());
        let pace = Steps::new(CHUNK / 4, 1);
        let mut bringing = pin!(mirror.bring(ByteRange::between(0, CHUNK * 2), profile(&pace)));
        assert!(poll!(&mut bringing).is_pending());
        gate.arrived(1).await;
        let mut client = pin!(read(&mirror, CHUNK, CHUNK + 10));
        assert!(poll!(&mut client).is_pending(), "it waits for what is under way");
        gate.open();
        assert_eq!(client.await.unwrap(), contents[to_usize(CHUNK)..][..10]);
        assert_eq!(bringing.await.bytes, CHUNK * 2);
        let (quarter, rest) = (CHUNK / 4, CHUNK * 2 - CHUNK / 4);
        assert_eq!(pace.take(), [("turn", quarter), ("ended", quarter), ("hurried", rest), ("ended", rest)]);
        assert_eq!(total(&lower.take_reads()), CHUNK * 2, "each byte once");
        assert_eq!(figures(&mirror, Cause::Profile), [CHUNK * 2, CHUNK, 0, CHUNK], "one of the two was wanted, late");
    });
}

#[test]
fn a_failure_ahead_of_demand_fails_no_client() {
    on_both(|| async {
        let contents = solid(to_usize(CHUNK * 4));
        let gate = Arc::new(Gate::new(Arc::new(Memory::holding(contents.clone()).read_only())));
        let is_ill = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let fails = Arc::clone(&is_ill);
        let plan = move |_| fails.load(Ordering::Relaxed).then(|| Error::new(ErrorKind::Io, "a bad day"));
        let scratch = Scratch::new();
        let mirror = scratch.open(Arc::new(Fault::new(gate.clone(), plan)));
        let pace = Steps::new(CHUNK, 0);
        let mut bringing = pin!(mirror.bring(ByteRange::between(0, CHUNK), profile(&pace)));
        assert!(poll!(&mut bringing).is_pending());
        gate.open();
        pace.permits.add_permits(1);
        let brought = bringing.await;
        assert_eq!(brought, Brought { bytes: 0, missed: CHUNK });
        assert_eq!(pace.take(), [("turn", CHUNK), ("failed", CHUNK)]);
        is_ill.store(false, Ordering::Relaxed);
        assert_eq!(read(&mirror, 0, CHUNK).await.unwrap(), contents[..to_usize(CHUNK)]);
        assert_eq!(figures(&mirror, Cause::Demand), [CHUNK, CHUNK, 0, 0]);
    });
}

#[test]
fn whoever_plans_hears_of_what_clients_wait_for_and_of_nothing_else() {
    on_both(|| async {
        let demand = Arc::new(Demand::default());
        let contents = solid(to_usize(CHUNK * 40));
        let scratch = Scratch::new();
        let settings = Settings {
            chunk_size: Some(16 << 10),
            observer: Some(Arc::clone(&demand) as Arc<dyn Observer>),
            ..Settings::default()
        };
        let cache = Cache::open(scratch.0.path(), "x").unwrap();
        let mirror = Mirror::open("x", cache, recorded(&contents), None, &scratch.space(), &settings).unwrap();
        let pace = Steps::new(CHUNK, usize::MAX >> 4);
        mirror.bring(ByteRange::between(0, CHUNK * 4), profile(&pace)).await;
        assert_eq!(demand.began.load(Ordering::Relaxed), 0);
        for number in [10, 20, 30] {
            read(&mirror, CHUNK * number, CHUNK * number + 1).await.unwrap();
        }
        assert_eq!(demand.began.load(Ordering::Relaxed), 3);
        assert_eq!(demand.ended.load(Ordering::Relaxed), 3);
    });
}

#[test]
fn clients_are_served_before_what_nobody_waits_for() {
    on_both(|| async {
        let contents = solid(to_usize(CHUNK * 64));
        let (lower, scratch) = (recorded(&contents), Scratch::new());
        let mirror = scratch.open(lower.clone());
        let pace = Steps::new(CHUNK * 64, usize::MAX >> 4);
        // Both in one turn of the worker, the client's last.
        let ahead = mirror.bring(ByteRange::between(0, CHUNK * 20), profile(&pace));
        let client = read(&mirror, CHUNK * 20, CHUNK * 21);
        let (brought, bytes) = futures_util::future::join(ahead, client).await;
        assert_eq!((brought.bytes, bytes.unwrap().len()), (CHUNK * 20, to_usize(CHUNK)));
        let reads = lower.take_reads();
        assert_eq!(reads[0], ByteRange::between(CHUNK * 20, CHUNK * 21), "neighbours, and yet not one request");
        assert_eq!(total(&reads), CHUNK * 21);
    });
}

#[test]
fn without_space_nothing_is_fetched_ahead() {
    on_both(|| async {
        let contents = solid(to_usize(CHUNK * 1024));
        let (lower, scratch) = (recorded(&contents), Scratch::new());
        let space = Space::new(scratch.0.path(), SpaceSettings { limit: Some(64 * KIB), ..SpaceSettings::default() });
        let settings = Settings { chunk_size: Some(16 << 10), ..Settings::default() };
        let cache = Cache::open(scratch.0.path(), "x").unwrap();
        let mirror = Mirror::open("x", cache, lower.clone(), None, &space, &settings).unwrap();
        assert!(!mirror.has_room(CHUNK));
        let pace = Steps::new(CHUNK, usize::MAX >> 4);
        let brought = mirror.bring(ByteRange::between(0, CHUNK * 8), profile(&pace)).await;
        assert_eq!(brought, Brought { bytes: 0, missed: CHUNK * 8 });
        assert!(lower.take_reads().is_empty() && pace.take().is_empty());
        assert_eq!(figures(&mirror, Cause::Profile), [0; 4]);
        assert_eq!(space.stats().bypassed_chunks.value(), 0, "nobody was served without its being kept");
    });
}

#[test]
fn what_a_peer_does_not_give_comes_from_the_upstream_at_the_same_pace() {
    on_both(|| async {
        let contents = solid(to_usize(CHUNK * 4));
        let (lower, scratch) = (recorded(&contents), Scratch::new());
        let cache = Cache::open(scratch.0.path(), "x").unwrap();
        let truth = trusted::truth_of(&contents, 16 << 10, &scratch.0.path().join("x")).await;
        let demand = Arc::new(Demand::default());
        let observer = Some(Arc::clone(&demand) as Arc<dyn Observer>);
        let settings = Settings { chunk_size: Some(16 << 10), observer, ..Settings::default() };
        let mirror = Mirror::open("x", cache, lower.clone(), Some(truth), &scratch.space(), &settings).unwrap();
        let gone = |_| Some(Error::new(ErrorKind::Unavailable, "the peer is gone"));
        let peer = Arc::new(Fault::new(Arc::new(Memory::holding(contents).read_only()), gone));
        let pace = Steps::new(CHUNK, usize::MAX >> 4);
        let ahead = Ahead::paced(Cause::Prefetch, Arc::clone(&pace) as Arc<dyn Pace>, Some(peer));
        let brought = mirror.bring(ByteRange::between(0, CHUNK * 4), ahead).await;
        assert_eq!(brought, Brought { bytes: CHUNK * 4, missed: 0 });
        assert_eq!(pace.take(), [("turn", CHUNK), ("ended", CHUNK)].repeat(4));
        assert_eq!((lower.take_reads().len(), demand.began.load(Ordering::Relaxed)), (4, 0), "nobody waits for it");
    });
}
