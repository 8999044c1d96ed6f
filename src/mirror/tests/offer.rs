//! Bytes that nobody asked for: the manifest decides, clients win, and without space nothing is kept.

use super::*;
use crate::mirror::offer::Offered;
use crate::mirror::policy::Kind;
use trusted::{Bounded, memory, truth_of};

const IMAGE: usize = 40 << 14;

/// What the middle of the image is; some of it zero.
fn image() -> Vec<u8> {
    let mut contents = solid(IMAGE);
    contents[3 << 14..4 << 14].fill(0);
    contents
}

/// A mirror of `lower`, in `scratch`, with the manifest of `contents`.
async fn mirror_of(scratch: &Scratch, lower: SharedExport, contents: &[u8]) -> Mirror {
    let cache = Cache::open(scratch.0.path(), "x").unwrap();
    let truth = truth_of(contents, 16 << 10, cache.directory()).await;
    let settings = Settings { chunk_size: Some(16 << 10), ..Settings::default() };
    Mirror::open("x", cache, lower, Some(truth), &scratch.space(), &settings).unwrap()
}

fn piece(contents: &[u8], first: u64, end: u64) -> (ByteRange, Bytes) {
    let range = ByteRange::between(first * CHUNK, end * CHUNK);
    (range, Bytes::copy_from_slice(&contents[to_usize(range.start())..to_usize(range.end())]))
}

#[test]
fn right_bytes_are_stored_and_durable_and_nobody_is_asked() {
    on_both(|| async {
        let (contents, scratch) = (image(), Scratch::new());
        let lower = recorded(&contents);
        let mirror = mirror_of(&scratch, lower.clone(), &contents).await;
        let pieces = vec![piece(&contents, 30, 40), piece(&contents, 0, 25)];
        let offered = mirror.offer(Cause::Multicast, pieces).await;
        assert_eq!(offered, Offered { stored: CHUNK * 34, unwanted: CHUNK, ..Offered::default() }, "one is zero");
        assert!(mirror.holds(ByteRange::between(0, CHUNK * 25)) && !mirror.holds(ByteRange::between(0, CHUNK * 26)));
        let again = mirror.offer(Cause::Multicast, vec![piece(&contents, 0, 25)]).await;
        assert_eq!(again, Offered { unwanted: CHUNK * 25, ..Offered::default() });
        assert_eq!(mirror.tally(Cause::Multicast).brought_bytes.value(), CHUNK * 34);
        assert!(read(&mirror, 0, CHUNK * 25).await.unwrap() == contents[..25 << 14]);
        assert_eq!(mirror.tally(Cause::Multicast).used_bytes.value(), CHUNK * 24);
        mirror.settle().await;
        drop(mirror);
        let mirror = mirror_of(&scratch, lower.clone(), &contents).await;
        assert!(read(&mirror, CHUNK * 30, CHUNK * 40).await.unwrap() == contents[30 << 14..]);
        assert_eq!(lower.take_reads(), []);
    });
}

#[test]
fn wrong_bytes_are_not_kept_and_their_neighbours_are() {
    on_both(|| async {
        let (contents, scratch) = (image(), Scratch::new());
        let lower = recorded(&contents);
        let mirror = mirror_of(&scratch, lower.clone(), &contents).await;
        let mut forged = contents.clone();
        forged[(5 << 14) + 77] ^= 1;
        // Of the last one, bytes are missing.
        let (range, bytes) = piece(&forged, 4, 8);
        let offered = mirror.offer(Cause::Multicast, vec![(range, bytes.slice(..bytes.len() - 1))]).await;
        assert_eq!(offered, Offered { stored: CHUNK * 2, wrong: CHUNK * 2, ..Offered::default() });
        // Half a chunk is none.
        let part = ByteRange::between(CHUNK * 10, CHUNK * 10 + 5);
        let offered = mirror.offer(Cause::Multicast, vec![(part, Bytes::from_static(b"12345"))]).await;
        assert_eq!(offered, Offered::default());
        assert_eq!(lower.take_reads(), [], "nothing is fetched in their place");
        assert!(read(&mirror, CHUNK * 4, CHUNK * 8).await.unwrap() == contents[4 << 14..8 << 14]);
        let fetched = lower.take_reads();
        assert_eq!(fetched, [ByteRange::between(CHUNK * 5, CHUNK * 6), ByteRange::between(CHUNK * 7, CHUNK * 8)]);
    });
}

#[test]
fn a_client_that_fetches_wins_and_is_answered_right() {
    on_both(|| async {
        let (contents, scratch) = (image(), Scratch::new());
        let lower = recorded(&contents);
        let gate = Arc::new(Gate::new(lower.clone()));
        let mirror = mirror_of(&scratch, gate.clone(), &contents).await;
        let mut client = pin!(read(&mirror, CHUNK * 11, CHUNK * 12));
        assert!(poll!(&mut client).is_pending());
        gate.arrived(1).await;
        let offered = mirror.offer(Cause::Multicast, vec![piece(&contents, 10, 13)]).await;
        assert_eq!(offered, Offered { stored: CHUNK * 2, unwanted: CHUNK, ..Offered::default() });
        gate.open();
        assert!(client.await.unwrap() == contents[11 << 14..12 << 14]);
        assert_eq!(lower.take_reads(), [ByteRange::between(CHUNK * 11, CHUNK * 12)]);
        assert_eq!(mirror.tally(Cause::Demand).brought_bytes.value(), CHUNK);
    });
}

#[test]
fn clients_that_read_while_it_is_offered_get_the_bytes_of_the_image() {
    on_both(|| async {
        let (contents, scratch) = (image(), Scratch::new());
        let mirror = mirror_of(&scratch, recorded(&contents), &contents).await;
        let mut forged = contents.clone();
        (0..40).step_by(3).for_each(|chunk| forged[chunk << 14] ^= 1);
        let reads = (0..40u64).rev().map(|chunk| read(&mirror, chunk * CHUNK, (chunk + 1) * CHUNK));
        let offer = mirror.offer(Cause::Multicast, vec![piece(&forged, 0, 20), piece(&forged, 20, 40)]);
        let (offered, reads) = futures_util::future::join(offer, join_all(reads)).await;
        for (chunk, bytes) in (0..40).rev().zip(reads) {
            assert!(bytes.unwrap() == contents[chunk << 14..(chunk + 1) << 14], "chunk {chunk}");
        }
        let Offered { stored, unwanted, wrong, unkept } = offered;
        assert_eq!((stored + unwanted + wrong, unkept), (CHUNK * 40, 0));
    });
}

#[test]
fn without_a_manifest_or_space_nothing_is_kept() {
    on_both(|| async {
        let contents = image();
        let scratch = Scratch::new();
        let mirror = scratch.open(memory(&contents));
        let unkept = Offered { unkept: CHUNK * 2, ..Offered::default() };
        assert_eq!(mirror.offer(Cause::Multicast, vec![piece(&contents, 0, 2)]).await, unkept);
        assert_eq!((mirror.manifest_shape(), mirror.is_known_zero(3)), (None, false));

        let here = Bounded::new(Some(64 * KIB), Kind::Lru);
        let mirror = here.open("x", memory(&contents), Some(&contents)).await;
        assert_eq!(mirror.offer(Cause::Multicast, vec![piece(&contents, 0, 2)]).await, unkept);
        assert!(!mirror.has_some(ByteRange::between(0, CHUNK * 2)));
        assert_eq!(mirror.manifest_shape().unwrap().count(), 40);
        assert!((0..41).all(|chunk| mirror.is_known_zero(chunk) == (chunk == 3)));
        let wrong = vec![(ByteRange::between(0, CHUNK), piece(&contents, 1, 2).1)];
        assert_eq!(mirror.offer(Cause::Multicast, wrong).await.wrong, CHUNK, "that is found first");
    });
}
