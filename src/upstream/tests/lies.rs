//! Servers that send wrong bytes: no wrong byte is let through, and no read fails while one server is honest.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::telemetry::latency::Spread;
use crate::upstream::trust::Rules;

const SIZE: usize = 100_000;
/// Everything that a server can do instead of answering rightly, in well-formed replies.
const LIES: [Act; 4] = [Act::Flip, Act::Zeros, Act::Hole, Act::Other];

fn start() -> Rc<Fake> {
    Fake::start(sample_contents(SIZE, 1))
}

/// A server that does so with each so many-th read.
fn start_with_habit(every: usize, act: Act) -> Rc<Fake> {
    let fake = start();
    fake.habit.set((every, act));
    fake
}

/// Reads what must be the bytes of `start`'s image.
async fn read_right(remote: &Remote, start: u64, end: u64) -> Result<()> {
    let right = &sample_contents(SIZE, 1)[to_usize(start)..to_usize(end)];
    let check = |pieces: &[Piece]| assemble(pieces) == right;
    let pieces = remote.read_verified(ByteRange::between(start, end), &check).await?;
    assert!(check(&pieces), "wrong bytes were let through");
    Ok(())
}

fn reads(fakes: &[&Rc<Fake>]) -> Vec<usize> {
    fakes.iter().map(|fake| fake.reads.borrow().len()).collect()
}

#[test]
fn one_honest_server_anywhere_in_the_list_is_enough() {
    run(async {
        for lie in LIES {
            for honest in 0..3 {
                let fakes: Vec<_> =
                    (0..3).map(|index| if index == honest { start() } else { start_with_habit(1, lie) }).collect();
                let fakes: Vec<_> = fakes.iter().collect();
                let remote = open(&fakes).await;
                for step in 0..20 {
                    read_right(&remote, step * 1000, step * 1000 + 4096).await.unwrap();
                }
                assert_eq!(remote.current(), fakes[honest].uri(), "{lie:?}");
                // Each liar before it in the list was set aside at its third lie, and was not asked again.
                let asked = (0..3).map(|index| if index == honest { 20 } else { 3 * usize::from(index < honest) });
                assert_eq!(reads(&fakes), asked.collect::<Vec<_>>(), "{lie:?}");
                let wrong: Vec<_> = remote.servers().iter().map(|server| server.wrong_replies).collect();
                assert_eq!(remote.stats().wrong_replies.value(), wrong.iter().sum::<u64>());
                assert_eq!(wrong.iter().sum::<u64>(), 3 * to_u64(honest));
            }
        }
    });
}

#[test]
fn a_server_that_truncates_is_left_for_the_next() {
    run(async {
        let (first, second) = (start_with_habit(1, Act::Truncate), start());
        let remote = open(&[&first, &second]).await;
        for step in 0..10 {
            read_right(&remote, step, step + 4096).await.unwrap();
        }
        assert_eq!(reads(&[&first, &second]), [1, 10]);
        assert_eq!(remote.stats().wrong_replies.value(), 0, "half a reply is not a wrong one");
    });
}

#[test]
fn a_bit_that_flips_now_and_then_fails_nothing() {
    run(async {
        let fake = start_with_habit(200, Act::Flip);
        let remote = open(&[&fake]).await;
        for step in 0..100 {
            let reads = (0..50).map(|index| read_right(&remote, step * 900 + index, step * 900 + index + 512));
            join_all(reads).await.into_iter().for_each(Result::unwrap);
        }
        assert_eq!(remote.stats().wrong_replies.value(), 25);
        assert_eq!(fake.reads.borrow().len(), 5025);
        assert_eq!(fake.connections.get(), 1, "a wrong reply costs no connection");
    });
}

#[test]
fn servers_that_all_lie_fail_the_read_soon_and_are_named() {
    run(async {
        for count in [1, 2, 3] {
            let fakes: Vec<_> = (0..count).map(|_| start_with_habit(1, Act::Flip)).collect();
            let remote = open(&fakes.iter().collect::<Vec<_>>()).await;
            let before = Instant::now();
            let error = read_right(&remote, 100, 600).await.unwrap_err();
            assert!(before.elapsed() < remote.patience / 4);
            assert_eq!(error.kind(), ErrorKind::Io);
            assert!(error.to_string().starts_with("500 bytes at 100 are not those of the image; "), "{error}");
            for fake in &fakes {
                assert!(error.to_string().contains(&format!("{} sent others 4 times", fake.uri())), "{error}");
                assert_eq!(fake.reads.borrow().len(), 4);
            }
            // They may have been repaired, and still are all there is.
            fakes.iter().for_each(|fake| fake.habit.set((1, Act::Answer)));
            read_right(&remote, 100, 600).await.unwrap();
        }
    });
}

#[test]
fn nobody_is_blamed_for_bytes_of_several_servers() {
    run(async {
        let small = |listing: &mut Listing| listing.block_sizes = BlockSizes { maximum: 4096, ..BlockSizes::DEFAULT };
        let first = Fake::start_with(sample_contents(SIZE, 1), small);
        let second = Fake::start_with(sample_contents(SIZE, 1), small);
        let remote = open(&[&first, &second]).await;
        first.plan([Act::Flip, Act::HangUp]);
        read_right(&remote, 0, 8192).await.unwrap();
        // One half of each, and then both of the second.
        assert_eq!(reads(&[&first, &second]), [2, 3]);
        assert_eq!(remote.stats().wrong_replies.value(), 0);
    });
}

#[test]
fn a_server_that_is_away_is_waited_for_while_the_other_lies() {
    run(async {
        let (liar, away) = (start_with_habit(1, Act::Flip), start());
        let remote = open(&[&liar, &away]).await;
        away.is_down.set(true);
        let coming_back = async {
            // It is tried, in vain, until it is back.
            while away.connections.get() < 4 {
                tokio::task::yield_now().await;
            }
            away.is_down.set(false);
        };
        let (result, ()) = tokio::join!(read_right(&remote, 0, 4096), coming_back);
        result.unwrap();
        assert_eq!(reads(&[&liar, &away]), [4, 1]);

        let remote = Remote { patience: Duration::from_millis(300), ..open(&[&liar, &away]).await };
        away.is_down.set(true);
        let error = read_right(&remote, 0, 4096).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains(&away.uri().to_string()), "{error}");
    });
}

#[test]
fn a_server_that_is_set_aside_is_used_again_after_its_time() {
    run(async {
        let (liar, other) = (start(), start());
        let remote = open(&[&liar, &other]).await;
        let first = Duration::from_millis(300);
        remote.common.change_terms(|terms| terms.rules = Rules { first, ..Rules::default() });
        liar.plan([Act::Flip; 3]);
        for _ in 0..3 {
            read_right(&remote, 0, 4096).await.unwrap();
        }
        assert!(remote.servers()[0].set_aside_for.unwrap() <= first);
        // It is passed over as long as it is set aside: here for all of that time.
        while remote.servers()[0].set_aside_for.is_some() {
            read_right(&remote, 0, 4096).await.unwrap();
        }
        assert_eq!(liar.reads.borrow().len(), 3);

        // Now it is a server like any other.
        other.plan([Act::HangUp]);
        read_right(&remote, 0, 4096).await.unwrap();
        assert_eq!((liar.reads.borrow().len(), remote.current()), (4, liar.uri()));
        liar.plan([Act::Zeros; 3]);
        for _ in 0..3 {
            read_right(&remote, 0, 4096).await.unwrap();
        }
        assert!(remote.servers()[0].set_aside_for.unwrap() > first, "twice the time");
        assert_eq!((liar.reads.borrow().len(), remote.current()), (7, other.uri()));
    });
}

#[test]
fn a_server_that_is_set_aside_is_better_than_none_and_left_for_any_other() {
    run(async {
        let (liar, other) = (start(), start());
        let remote = open(&[&liar, &other]).await;
        liar.plan([Act::Flip; 3]);
        other.is_down.set(true);
        // Every lie is made good by the liar itself, as there is nobody else.
        read_right(&remote, 0, 4096).await.unwrap();
        assert!(remote.servers()[0].set_aside_for.is_some());
        assert_eq!(remote.current(), other.uri(), "it will be tried first");
        read_right(&remote, 0, 4096).await.unwrap();
        assert_eq!((remote.current(), reads(&[&liar, &other])), (liar.uri(), vec![5, 0]));

        other.is_down.set(false);
        // A connection to the other is opened beside the reads, which do not wait for it.
        while remote.current() != other.uri() {
            read_right(&remote, 0, 4096).await.unwrap();
        }
        let asked = liar.reads.borrow().len();
        for _ in 0..20 {
            read_right(&remote, 0, 4096).await.unwrap();
        }
        assert_eq!(liar.reads.borrow().len(), asked);
        assert_eq!(remote.servers()[0].connections, 0);
    });
}

#[test]
fn what_is_asked_for_is_what_the_other_server_takes() {
    run(async {
        let liar = start_with_habit(1, Act::Flip);
        let coarse = Fake::start_with(sample_contents(SIZE, 1), |listing| {
            listing.block_sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 4096 };
        });
        let remote = open(&[&liar, &coarse]).await;
        read_right(&remote, 700, 5000).await.unwrap();
        let asked: Vec<_> = coarse.reads.borrow().iter().map(|range| (range.start(), range.end())).collect();
        assert_eq!(asked, [(512, 4608), (4608, 5120)]);
        assert_eq!(liar.reads.borrow()[0], ByteRange::between(700, 5000));
    });
}

#[test]
fn the_status_tells_servers_apart() {
    run(async {
        let (liar, honest) = (start_with_habit(1, Act::Zeros), start());
        let remote = open(&[&liar, &honest]).await;
        read_right(&remote, 0, 4096).await.unwrap();
        let expected = |fake: &Fake, is_current, wrong_replies, last_error: Option<&str>| ServerStatus {
            uri: fake.uri(),
            is_current,
            connections: 1,
            received_bytes: 4096,
            requests: 1,
            in_flight: 0,
            // The honest one was asked because the other had lied.
            retries: u64::from(!is_current),
            latency: Spread::default(),
            wrong_replies,
            set_aside_for: None,
            last_error: last_error.map(str::to_owned),
        };
        let lie = Some("it sent wrong bytes: 4096 at 0");
        let mut servers = remote.servers();
        assert!(servers.iter().all(|server| server.latency.count() == server.requests));
        servers.iter_mut().for_each(|server| server.latency = Spread::default());
        assert_eq!(servers, [expected(&liar, true, 1, lie), expected(&honest, false, 0, None)]);
        assert_eq!(remote.stats().received_bytes.value(), 8192);
        for _ in 0..2 {
            read_right(&remote, 0, 4096).await.unwrap();
        }
        let servers = remote.servers();
        assert!(servers[0].set_aside_for.unwrap() > Duration::from_secs(290));
        assert_eq!(servers.iter().map(|server| server.connections).collect::<Vec<_>>(), [0, 1]);
        assert!(servers[1].is_current && servers[1].last_error.is_none());
    });
}

fn any_act() -> impl Strategy<Value = Act> {
    prop_oneof![
        3 => Just(Act::Answer),
        2 => Just(Act::Flip),
        1 => Just(Act::Zeros),
        1 => Just(Act::Hole),
        1 => Just(Act::Other),
        1 => Just(Act::Truncate),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Any schedule of lies, reads one after the other and at once: never a wrong byte, and no read fails.
    #[test]
    fn no_wrong_byte_and_no_failure_while_one_server_is_honest(
        schedules in prop::collection::vec(prop::collection::vec(any_act(), 0..40), 1..3),
        place in 0usize..3,
        steps in prop::collection::vec((0u64..90_000, 1u64..10_000, 1u64..6), 1..12),
        time_aside in 1u64..50,
    ) {
        let failed = Cell::new(None);
        run(async {
            let mut fakes: Vec<_> = schedules.iter().map(|_| start()).collect();
            for (fake, schedule) in fakes.iter().zip(&schedules) {
                fake.plan(schedule.iter().copied());
                fake.habit.set((3, Act::Flip));
            }
            fakes.insert(place.min(fakes.len()), start());
            let remote = open(&fakes.iter().collect::<Vec<_>>()).await;
            // Short, so that servers come back while it runs.
            let rules = Rules { first: Duration::from_millis(time_aside), ..Rules::default() };
            remote.common.change_terms(|terms| terms.rules = rules);
            for (start, length, at_once) in &steps {
                let reads = (0..*at_once).map(|index| read_right(&remote, start + index, start + index + length - 1));
                if let Some(error) = join_all(reads).await.into_iter().find_map(Result::err) {
                    failed.set(Some(error.chain()));
                }
            }
        });
        prop_assert_eq!(failed.take(), None);
    }
}
