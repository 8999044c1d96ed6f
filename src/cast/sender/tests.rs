//! The sender by hand. How it does among many receivers and losses is simulated in `tools/castsim`.

use super::super::SessionId;
use super::super::form::Need;
use super::*;
use crate::manifest::{ImageId, Shape};
use crate::units::MIB;

fn terms(blocks: u64) -> Terms {
    Terms {
        session: SessionId(1),
        image: ImageId([1; 32]),
        shape: Shape { image_size: blocks * MIB / 2, chunk_size: 64 * 1024 },
        block: 512 * 1024,
        symbol: 8 * 1024,
        parity: 16,
        pages: 3,
        plan: 0,
        rest: true,
        deadline: None,
    }
}

fn settings(wait_for: u32) -> Settings {
    Settings {
        rate: 1_000_000,
        min_rate: 1000,
        repair: Repair::Auto,
        wait_for,
        patience: Duration::from_secs(5),
        carousel: false,
    }
}

fn sender(blocks: u64, wait_for: u32) -> Sender {
    let terms = terms(blocks);
    let layout = Layout::new(&terms, Vec::new(), |_| false).unwrap();
    Sender::new(Arc::new(layout), terms, settings(wait_for), 1)
}

fn report(who: u8, standing: Standing, heard: u32, needs: &[(u32, u16)]) -> Report {
    let need = |(first, symbols): &(u32, u16)| Need { first: *first, count: 1, symbols: *symbols };
    let needs = needs.iter().map(need).collect();
    Report { receiver: ReceiverId([who; 16]), standing, done: 0, seen: 0, lost: 0, overflowed: 0, heard, needs }
}

/// Everything that is sent without waiting.
fn burst(sender: &mut Sender, now: Duration) -> (Vec<Packet>, Step) {
    let mut packets = Vec::new();
    loop {
        match sender.step(now) {
            Step::Send(packet) => packets.push(packet),
            other => return (packets, other),
        }
    }
}

fn symbols(packets: &[Packet]) -> Vec<(u32, u16)> {
    let symbol = |packet: &Packet| match packet {
        Packet::Symbol { block, index } => Some((*block, *index)),
        _ => None,
    };
    packets.iter().filter_map(symbol).collect()
}

fn phases(packets: &[Packet]) -> Vec<Phase> {
    let phase = |packet: &Packet| match packet {
        Packet::Announce(announce) => Some(announce.phase),
        _ => None,
    };
    packets.iter().filter_map(phase).collect()
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn it_says_what_it_is_and_then_sends_every_symbol_once_in_turns() {
    let mut sender = sender(3, 0);
    let (packets, _) = burst(&mut sender, Duration::ZERO);
    assert!(matches!(packets[..4], [Packet::Announce(_), Packet::Page(0), Packet::Page(1), Packet::Page(2)]));
    let sent = symbols(&packets);
    assert_eq!(sent[..4], [(0, 0), (1, 0), (2, 0), (0, 1)]);
    let mut sorted = sent.clone();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!((sorted.len(), sent.len()), (3 * 64, 3 * 64));
}

#[test]
fn it_waits_for_receivers_and_no_longer_than_it_was_told() {
    let mut waiting = sender(1, 2);
    waiting.report(Duration::ZERO, &report(1, Standing::Joined, 0, &[]));
    assert_eq!(symbols(&burst(&mut waiting, SECOND).0), []);
    waiting.report(SECOND, &report(2, Standing::Joined, 0, &[]));
    assert_eq!(symbols(&burst(&mut waiting, SECOND).0).len(), 64);

    let mut impatient = sender(1, 2);
    impatient.report(Duration::ZERO, &report(1, Standing::Joined, 0, &[]));
    assert_eq!(symbols(&burst(&mut impatient, SECOND * 6).0).len(), 64);

    let mut alone = sender(1, 2);
    let (packets, _) = burst(&mut alone, SECOND * 6);
    assert_eq!((symbols(&packets).len(), phases(&packets).last()), (0, Some(&Phase::Ended(true))));
}

#[test]
fn what_somebody_lacks_is_sent_as_parity() {
    let mut sender = sender(1, 1);
    sender.report(Duration::ZERO, &report(1, Standing::Joined, 0, &[]));
    let (packets, _) = burst(&mut sender, Duration::ZERO);
    let heard = u32::try_from(packets.len()).unwrap();
    sender.report(SECOND, &report(1, Standing::Joined, heard, &[(0, 3)]));
    let (packets, _) = burst(&mut sender, SECOND);
    assert_eq!(symbols(&packets), [(0, 64), (0, 65), (0, 66)]);
    assert_eq!(sender.progress().repairs, 3);
    sender.report(SECOND, &report(1, Standing::Joined, heard, &[(0, 3)]));
    assert_eq!(symbols(&burst(&mut sender, SECOND).0), [], "the report is older than what was sent for it");
}

#[test]
fn symbols_go_round_when_all_were_sent() {
    let mut sender = sender(1, 2);
    for who in 1..=2 {
        sender.report(Duration::ZERO, &report(who, Standing::Joined, 0, &[]));
    }
    burst(&mut sender, Duration::ZERO);
    for who in 1..=2 {
        sender.report(SECOND, &report(who, Standing::Joined, u32::MAX / 4, &[(0, 64)]));
    }
    let mut sent = symbols(&burst(&mut sender, SECOND * 2).0);
    assert_eq!((sent[0], sent[15], sent[16]), ((0, 64), (0, 79), (0, 0)));
    sent.sort_unstable();
    sent.dedup();
    assert!(sent.len() >= 64, "any 64 that differ make it whole: {}", sent.len());
}

#[test]
fn it_ends_when_all_are_complete_and_says_so_three_times() {
    let mut sender = sender(1, 1);
    sender.report(Duration::ZERO, &report(1, Standing::Joined, 0, &[]));
    burst(&mut sender, Duration::ZERO);
    assert!(!sender.progress().is_complete);
    sender.report(SECOND, &report(1, Standing::Complete, 0, &[]));
    let mut said = Vec::new();
    let mut now = SECOND;
    loop {
        let (packets, step) = burst(&mut sender, now);
        said.extend(phases(&packets));
        match step {
            Step::Wait(until) => now = until,
            _ => break,
        }
    }
    said.retain(|phase| *phase != Phase::Ending);
    assert_eq!(said, [Phase::Ended(true); 3]);
    assert!(sender.progress().is_complete);
}

#[test]
fn who_falls_silent_is_not_waited_for() {
    let mut sender = sender(1, 1);
    sender.report(Duration::ZERO, &report(1, Standing::Joined, 0, &[]));
    let mut now = Duration::ZERO;
    while let Step::Wait(until) = burst(&mut sender, now).1 {
        now = until;
        assert!(now < SECOND * 10);
    }
    assert!(now > SECOND * 5);
    assert_eq!(sender.progress().listeners[0].standing, None);
}

#[test]
fn called_off_it_says_so() {
    let mut sender = sender(1, 0);
    sender.cancel();
    assert_eq!(phases(&burst(&mut sender, Duration::ZERO).0), [Phase::Ended(false)]);
}

#[test]
fn the_window_holds_what_is_sent_next() {
    let mut sender = sender(40, 0);
    assert_eq!(sender.window(), (0..16).collect::<Vec<_>>());
    for _ in 0..64 * DEPTH * 3 {
        let window = sender.window();
        if let Step::Send(Packet::Symbol { block, .. }) = sender.step(Duration::ZERO) {
            assert!(window.contains(&block), "{block} of {window:?}");
        }
    }
    assert!(sender.window().len() <= 2 * DEPTH);
}

#[test]
fn needs_that_make_no_sense_cost_nothing() {
    let mut sender = sender(2, 1);
    sender.report(Duration::ZERO, &report(1, Standing::Joined, 7, &[(u32::MAX, u16::MAX), (0, 9), (1, 0)]));
    let (packets, _) = burst(&mut sender, Duration::ZERO);
    assert_eq!(symbols(&packets).len(), 128, "nothing had been sent when it was asked for");
}
