//! The receiver by hand. How many of them do among losses is simulated in `tools/castsim`.

use proptest::prelude::*;

use super::super::SessionId;
use super::super::form::Terms;
use super::*;
use crate::manifest::{ImageId, Shape};
use crate::units::MIB;

/// Data symbols of a block.
const DATA: u16 = 64;

fn terms(blocks: u64) -> Terms {
    Terms {
        session: SessionId(1),
        image: ImageId([1; 32]),
        shape: Shape { image_size: blocks * MIB / 2, chunk_size: 64 * 1024 },
        block: 512 * 1024,
        symbol: 8 * 1024,
        parity: 16,
        pages: 0,
        plan: 0,
        rest: true,
        deadline: None,
    }
}

fn announce(phase: Phase, passed: u32) -> Announce {
    Announce { terms: terms(1), phase, passed, rate: 1, report_every: REPORT_EVERY, spread: SPREAD }
}

const ME: ReceiverId = ReceiverId([7; 16]);
const SECOND: Duration = Duration::from_secs(1);

fn receiver(blocks: u64) -> Receiver {
    let layout = Layout::new(&terms(blocks), Vec::new(), |_| false).unwrap();
    let mut receiver = Receiver::new(ME, Arc::new(layout), |_| false, 1);
    receiver.heard(Duration::ZERO, 0);
    receiver.announced(Duration::ZERO, &announce(Phase::Sending, 0));
    receiver
}

/// Takes all symbols of a block but the first `but`.
fn take(receiver: &mut Receiver, block: u32, but: u16) {
    for index in but..DATA {
        if receiver.symbol(Duration::ZERO, block, index) == Take::Complete {
            receiver.delivered(Duration::ZERO, block, Delivery::Stored);
        }
    }
}

/// The next report with needs.
fn asked(receiver: &mut Receiver) -> (Duration, Vec<Need>) {
    for _ in 0..100 {
        let now = receiver.next();
        if let Some(report) = receiver.report(now).filter(|report| !report.needs.is_empty()) {
            return (now, report.needs);
        }
        receiver.last_heard = now;
    }
    panic!("it never asks");
}

const fn need(first: u32, count: u16, symbols: u16) -> Need {
    Need { first, count, symbols }
}

#[test]
fn any_so_many_symbols_make_a_block_whole() {
    let mut receiver = receiver(1);
    take(&mut receiver, 0, 1);
    assert_eq!(receiver.symbol(SECOND, 0, 5), Take::Skip, "it is here already");
    assert_eq!(receiver.symbol(SECOND, 0, DATA + 16), Take::Foreign);
    assert_eq!(receiver.symbol(SECOND, 1, 0), Take::Foreign);
    assert_eq!(receiver.symbol(SECOND, 0, DATA + 15), Take::Complete);
    assert_eq!((receiver.state(), receiver.done()), (State::Receiving, (0, 1)));
    receiver.delivered(SECOND, 0, Delivery::Stored);
    assert_eq!((receiver.state(), receiver.done()), (State::Complete, (1, 1)));
    assert!(!receiver.is_over(), "the sender does not know yet");
    receiver.announced(SECOND, &announce(Phase::Ended(true), 1));
    assert!(receiver.is_over());
}

#[test]
fn what_is_lacking_is_asked_for_when_its_batch_has_passed() {
    let mut receiver = receiver(20);
    take(&mut receiver, 0, 3);
    (1..7).for_each(|block| take(&mut receiver, block, 0));
    assert_eq!(receiver.due.needs, None, "its batch is still being sent");
    receiver.symbol(Duration::ZERO, 8, 0);
    let (when, needs) = asked(&mut receiver);
    assert_eq!(needs, [need(0, 1, 3), need(7, 1, DATA)]);
    assert!(when <= SPREAD);
    let (again, needs) = asked(&mut receiver);
    assert_eq!(needs.len(), 2, "the report may have been lost");
    assert!(again >= when + Duration::from_millis(200));
}

#[test]
fn what_comes_is_not_asked_for_unless_it_is_too_little() {
    let mut receiver = receiver(20);
    take(&mut receiver, 0, 3);
    take(&mut receiver, 1, 5);
    (2..8).for_each(|block| take(&mut receiver, block, 0));
    receiver.announced(Duration::ZERO, &announce(Phase::Sending, 8));
    receiver.told(Duration::ZERO, &Word { coming: vec![need(0, 2, 4)], ..Word::default() });
    assert_eq!(asked(&mut receiver).1, [need(1, 1, 5)]);
}

#[test]
fn what_is_left_to_the_upstream_is_not_waited_for() {
    let mut receiver = receiver(2);
    take(&mut receiver, 0, 0);
    receiver.announced(Duration::ZERO, &announce(Phase::Ending, 2));
    receiver.told(Duration::ZERO, &Word { unicast: vec![need(0, 2, 0)], ..Word::default() });
    assert_eq!(receiver.state(), State::Receiving);
    let report = receiver.report(receiver.next()).unwrap();
    assert_eq!((report.standing, receiver.state(), receiver.lacking()), (Standing::Leaving, State::Lacking, vec![1]));
}

#[test]
fn who_is_dropped_leaves_and_another_does_not() {
    let mut receiver = receiver(2);
    receiver.told(SECOND, &Word { dropped: vec![ReceiverId([8; 16])], ..Word::default() });
    assert_eq!(receiver.state(), State::Receiving);
    receiver.told(SECOND, &Word { dropped: vec![ME], ..Word::default() });
    assert_eq!(receiver.state(), State::Lacking);
    assert_eq!(receiver.symbol(SECOND, 0, 0), Take::Skip);
}

#[test]
fn a_sender_that_is_not_heard_is_dead() {
    let mut receiver = receiver(2);
    while !receiver.is_over() {
        let now = receiver.next();
        receiver.report(now);
        assert!(now <= SILENCE.1);
    }
    assert_eq!(receiver.state(), State::Abandoned);
}

#[test]
fn wrong_bytes_are_asked_for_once_more_and_then_left() {
    let mut receiver = receiver(1);
    receiver.announced(Duration::ZERO, &announce(Phase::Ending, 1));
    for left in [0, 1] {
        (0..DATA - 1).for_each(|index| assert_eq!(receiver.symbol(SECOND, 0, index), Take::Keep));
        assert_eq!(receiver.symbol(SECOND, 0, DATA), Take::Complete);
        receiver.delivered(SECOND, 0, Delivery::Wrong);
        assert_eq!(receiver.left, left);
    }
    assert_eq!(receiver.symbol(SECOND, 0, 0), Take::Skip);
}

#[test]
fn no_more_blocks_are_open_than_there_is_room_for() {
    let mut receiver = receiver(200);
    let mut kept = std::collections::BTreeSet::new();
    for block in 0..200 {
        match receiver.symbol(Duration::ZERO, block, 0) {
            Take::KeepInstead(gone) => assert!(kept.remove(&gone), "{gone} was not kept"),
            take => assert_eq!(take, Take::Keep),
        }
        kept.insert(block);
        assert!(kept.len() <= MOST_OPEN);
    }
    assert_eq!(receiver.symbol(Duration::ZERO, 0, 0), Take::KeepInstead(*kept.first().unwrap()), "it was forgotten");
}

#[test]
fn who_leaves_says_so() {
    let mut receiver = receiver(1);
    receiver.leave();
    assert_eq!(receiver.report(SECOND).unwrap().standing, Standing::Leaving);
    assert_eq!((receiver.state(), receiver.report(SECOND * 2)), (State::Lacking, None));
}

proptest! {
    /// Against a set of symbols for each block, whatever comes in whatever order.
    #[test]
    fn it_keeps_what_it_says_it_keeps(
        symbols in prop::collection::vec((0_u32..90, 0_u16..DATA + 20), 0..3000),
    ) {
        let mut receiver = receiver(80);
        let mut kept: BTreeMap<u32, std::collections::BTreeSet<u16>> = BTreeMap::new();
        let mut done = std::collections::BTreeSet::new();
        for (block, index) in symbols {
            let is_here = done.contains(&block) || kept.get(&block).is_some_and(|kept| kept.contains(&index));
            let take = receiver.symbol(Duration::ZERO, block, index);
            prop_assert_eq!(take == Take::Foreign, block >= 80 || index >= DATA + 16);
            prop_assert_eq!(take == Take::Skip, is_here && take != Take::Foreign);
            match take {
                Take::Skip | Take::Foreign => continue,
                Take::KeepInstead(gone) => prop_assert!(kept.remove(&gone).is_some()),
                Take::Keep | Take::Complete => {}
            }
            kept.entry(block).or_default().insert(index);
            let is_enough = kept[&block].len() == usize::from(DATA);
            prop_assert_eq!(take == Take::Complete, is_enough);
            if is_enough {
                kept.remove(&block);
                done.insert(block);
                receiver.delivered(Duration::ZERO, block, Delivery::Stored);
            }
            prop_assert!(kept.len() <= MOST_OPEN);
            prop_assert_eq!(receiver.done().0, u32::try_from(done.len()).unwrap());
        }
    }
}
