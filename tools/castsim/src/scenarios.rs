//! What must hold whatever happens.

use std::time::Duration;

use headwater::cast::receiver::State;
use headwater::cast::sender::Repair;
use headwater::units::MIB;

use crate::loss::Kind;
use crate::world::{Oddity, Outcome, Plan, run};

const fn plan(receivers: usize, kind: Kind, loss: f64) -> Plan {
    Plan::new(24 * MIB, receivers, kind, loss)
}

fn with(oddities: Vec<Oddity>) -> Plan {
    Plan { oddities, ..plan(8, Kind::Independent, 0.01) }
}

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// What a receiver that takes part from the start must have come to.
fn all_but_first_are_complete(outcome: &Outcome) {
    assert!(outcome.states[1..].iter().all(|state| *state == State::Complete), "{:?}", outcome.states);
    assert!(outcome.has_ended);
}

#[test]
fn without_loss_nothing_is_sent_twice() {
    for receivers in [1, 8, 100] {
        let outcome = run(&plan(receivers, Kind::Independent, 0.0));
        assert_eq!((outcome.whole, outcome.lacking, outcome.parity, outcome.repairs), (receivers, 0, 0, 0));
        assert!(outcome.overhead() < 1.06, "{}", outcome.overhead());
        assert!(outcome.slowdown(25_000_000) < 1.02 && outcome.has_ended);
    }
}

#[test]
fn whatever_is_lost_by_chance_all_become_complete() {
    for kind in [Kind::Independent, Kind::Shared, Kind::Bursts] {
        for (receivers, loss, most) in [(1, 0.01, 1.15), (8, 0.01, 1.2), (8, 0.05, 1.35), (50, 0.1, 2.0)] {
            for seed in 1..=3 {
                let outcome = run(&Plan { seed, size: 64 * MIB, ..plan(receivers, kind, loss) });
                assert_eq!((outcome.whole, outcome.lacking), (receivers, 0), "{kind:?} {loss} {seed}");
                let time = outcome.slowdown(25_000_000);
                assert!(time < most, "{receivers} {kind:?} {loss} {seed}: {time}");
                assert!(outcome.has_ended);
            }
        }
    }
}

#[test]
fn chance_does_not_lower_the_rate() {
    for kind in [Kind::Independent, Kind::Shared, Kind::Bursts] {
        let outcome = run(&plan(8, kind, 0.05));
        assert_eq!(outcome.rate, 25_000_000, "{kind:?}");
    }
}

#[test]
fn there_is_no_implosion() {
    let outcome = run(&plan(300, Kind::Independent, 0.02));
    assert_eq!(outcome.whole, 300);
    assert!(outcome.peak < 100, "{} reports in a second", outcome.peak);
    assert!(outcome.joining < 100, "{} reports in a second while they join", outcome.joining);
}

#[test]
fn parity_may_be_fixed() {
    let outcome = run(&Plan { repair: Repair::Percent(10.0), ..plan(8, Kind::Independent, 0.01) });
    assert_eq!((outcome.whole, outcome.repairs), (8, 0));
    assert!((outcome.overhead() - 1.15).abs() < 0.02, "{}", outcome.overhead());
}

#[test]
fn one_that_is_late_is_left_to_its_upstream_and_two_are_served() {
    let late = Oddity { joins: Duration::from_millis(1200), ..Oddity::default() };
    let one = run(&with(vec![late.clone()]));
    all_but_first_are_complete(&one);
    assert_eq!(one.states[0], State::Lacking);
    assert!(one.overhead() < 1.3 && one.lacking > 0);
    let two = run(&with(vec![late.clone(), late]));
    assert_eq!((two.whole, two.lacking), (8, 0));
}

#[test]
fn a_carousel_serves_whoever_comes_until_it_is_called_off() {
    let late = Oddity { joins: seconds(20), ..Oddity::default() };
    let outcome = run(&Plan { carousel: true, cancelled: Some(seconds(60)), ..with(vec![late]) });
    assert_eq!((outcome.whole, outcome.lacking), (8, 0));
}

#[test]
fn one_that_is_slow_slows_all_down_unless_it_is_too_slow() {
    let slow = Oddity { takes: Some(12_500_000.0), ..Oddity::default() };
    let patient = run(&Plan { size: 128 * MIB, ..with(vec![slow.clone()]) });
    all_but_first_are_complete(&patient);
    assert!(patient.rate < 20_000_000, "{}", patient.rate);
    let strict = run(&Plan { size: 128 * MIB, min_rate: 20_000_000, ..with(vec![slow]) });
    all_but_first_are_complete(&strict);
    assert_eq!(strict.states[0], State::Lacking);
    assert!(strict.slowdown(25_000_000) < patient.slowdown(25_000_000));
    let dropped = strict.progress.unwrap().listeners.into_iter().filter(|listener| listener.dropped).count();
    assert_eq!(dropped, 1);
}

#[test]
fn one_that_is_killed_is_not_waited_for_long() {
    let outcome = run(&with(vec![Oddity { dies: Some(Duration::from_millis(1000)), ..Oddity::default() }]));
    all_but_first_are_complete(&outcome);
    assert!(outcome.after < 10.0, "{}", outcome.after);
}

#[test]
fn one_that_was_away_gets_what_is_still_sent_and_leaves_the_rest() {
    let away = Oddity { down: Some(seconds(1)..seconds(11)), ..Oddity::default() };
    let long = run(&Plan { size: 512 * MIB, ..with(vec![away]) });
    all_but_first_are_complete(&long);
    assert_eq!(long.states[0], State::Lacking);
    assert!((200..400).contains(&long.lacking), "it was away for 250 MB of 512 MiB: {}", long.lacking);
    assert_eq!(long.rate, 25_000_000);
}

#[test]
fn a_dead_sender_is_noticed() {
    let outcome = run(&Plan { sender_dies: Some(seconds(1)), ..with(Vec::new()) });
    assert!(outcome.states.iter().all(|state| *state == State::Abandoned), "{:?}", outcome.states);
}

#[test]
fn who_has_everything_already_is_complete_at_once() {
    let outcome = run(&with(vec![Oddity { has_all: true, ..Oddity::default() }; 8]));
    assert_eq!(outcome.whole, 8);
}

#[test]
fn a_session_that_is_called_off_ends_for_all() {
    let outcome = run(&Plan { cancelled: Some(seconds(1)), ..with(Vec::new()) });
    assert!(outcome.has_ended);
    assert!(outcome.states.iter().all(|state| *state == State::Lacking), "{:?}", outcome.states);
}

#[test]
fn nobody_there_is_an_end_too() {
    let outcome = run(&Plan { wait_for: Some(0), ..plan(0, Kind::Independent, 0.0) });
    assert!(outcome.has_ended && outcome.overhead() < 1.06);
    let waited = run(&Plan { wait_for: Some(1), ..plan(0, Kind::Independent, 0.0) });
    assert!(waited.has_ended && waited.overhead() < 0.5, "it waits in vain, and sends nothing: {}", waited.overhead());
}
