//! When to move clients, and whom: what keeps balancing from doing harm.
//!
//! Pure: time is told. Owns: patience, rest, what was moved before. Does not own: the best moves (`plan`).
//!
//! Nothing is moved unless all of this holds:
//!
//! | what | why |
//! | --- | --- |
//! | a server was out of tolerance in [`Settings::samples`] looks in a row | a burst is over before anything is moved |
//! | nothing was moved in the last [`Settings::settle`] | until then rates are partly those from before |
//! | the move brings servers nearer to *three quarters* of the tolerance, by a tenth of the tolerance | what comes to rest within it does not leave it again by a little noise |
//! | the client was not moved in its rest: [`Settings::rest`] at first, twice as long after each move, a day at most | whatever loads and measurements do, a client is moved a number of times that grows as the logarithm of time |
//!
//! A rest is forgotten when it has been over for a day, or the client has left. A client that could not be moved rests, too.
//!
//! **Why it does not oscillate.** While loads stand still and are measured exactly, each move lessens the excess by
//! [`plan::COST`](super::plan::COST), so moves end. With noise and delay rests bound them: a client that is moved at
//! all times it may be is moved `log2(t / rest)` times in the time `t`.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::fleet::{Client, Fleet, Measure, Move, Task};

/// A client rests so long at most.
const LONGEST_REST: Duration = Duration::from_secs(24 * 60 * 60);
/// What a server's p99 weighs against those of earlier looks.
const NEWEST: f64 = 0.3;
/// A server whose p99 is shorter is not told apart from others by it, in milliseconds.
const QUICK_MS: f64 = 0.5;
/// The most that the weight of a server may differ from that of others, because of its p99.
const MOST_WEIGHT: f64 = 4.0;

/// How balancing is done.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// How far from its share a server may be, as a part of the mean.
    pub tolerance: f64,
    /// What is shared.
    pub measure: Measure,
    /// Looks in a row out of tolerance before anything is moved; 1 at least.
    pub samples: u32,
    /// After moves, looks do not count so long.
    pub settle: Duration,
    /// How long a client stays where it was moved to, the first time.
    pub rest: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        let settle = Duration::from_secs(10);
        Self { tolerance: 0.2, measure: Measure::Mix, samples: 3, settle, rest: Duration::from_secs(60) }
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Servers share their load.
    Within,
    /// They do not, for so many looks now: that may pass.
    Waiting(u32),
    /// What was moved is not to be seen in the rates yet.
    Settling,
    /// They do not, and no move that is possible now would be worth it.
    Stuck,
    /// These are to be moved.
    Move(Vec<Move>),
}

/// What one look came to.
#[derive(Debug, Clone, PartialEq)]
pub struct Look {
    /// What is to be done.
    pub verdict: Verdict,
    /// Of each server in the order of the fleet, by what it misses its fair share, as a part of it: 0.1 is a tenth too
    /// much. `None` for servers that take no part.
    pub off: Vec<Option<f64>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Rest {
    until: Instant,
    length: Duration,
}

/// Remembers what was moved and seen.
#[derive(Debug)]
pub struct Balancer {
    settings: Settings,
    /// Looks in a row that were out of tolerance.
    out: u32,
    settled: Option<Instant>,
    rests: BTreeMap<String, Rest>,
    /// The p99 of each server in milliseconds, by its name, without jumps.
    p99: BTreeMap<String, f64>,
}

impl Balancer {
    /// Remembers nothing.
    pub fn new(settings: Settings) -> Self {
        Self { settings, out: 0, settled: None, rests: BTreeMap::new(), p99: BTreeMap::new() }
    }

    /// Looks at servers and decides. What is moved is to be told to [`Self::tried`].
    pub fn look(&mut self, now: Instant, fleet: &Fleet) -> Look {
        self.forget(now, fleet);
        self.learn(fleet);
        let rests = |client: &Client| self.rests.get(&client.key).is_some_and(|rest| now < rest.until);
        let Settings { measure, tolerance, .. } = self.settings;
        let tasks = fleet.tasks(measure, tolerance, rests, |server| self.weight(fleet, server));
        let off = off(fleet, &tasks);
        let leaving = leave(fleet, measure, &tasks);
        let is_out = tasks.iter().any(|task| task.problem.excess() > 0.0);
        let verdict = self.verdict(now, fleet, &tasks, is_out, leaving);
        Look { verdict, off }
    }

    fn verdict(&mut self, now: Instant, fleet: &Fleet, tasks: &[Task], is_out: bool, leaving: Vec<Move>) -> Verdict {
        if self.settled.is_some_and(|settled| now < settled) {
            self.out = 0;
            return Verdict::Settling;
        }
        if !leaving.is_empty() {
            return Verdict::Move(leaving);
        }
        if !is_out {
            self.out = 0;
            return Verdict::Within;
        }
        self.out = self.out.saturating_add(1);
        if self.out < self.settings.samples {
            return Verdict::Waiting(self.out);
        }
        let moves: Vec<Move> = tasks.iter().flat_map(|task| moves(fleet, task)).collect();
        if moves.is_empty() { Verdict::Stuck } else { Verdict::Move(moves) }
    }

    /// Notes that it was tried to move a client: it rests, whatever came of it.
    pub fn tried(&mut self, now: Instant, key: &str) {
        let before = self.rests.get(key).map(|rest| rest.length);
        let length = before.map_or(self.settings.rest, |length| (length * 2).min(LONGEST_REST));
        self.rests.insert(key.to_owned(), Rest { until: now + length, length });
        self.settled = Some(now + self.settings.settle);
        self.out = 0;
    }

    /// Notes that something else has changed that rates do not show yet.
    pub fn unsettle(&mut self, now: Instant) {
        self.settled = Some(now + self.settings.settle);
        self.out = 0;
    }

    /// Forgets the rests of clients that have left, and of those that have stayed where they are for a day.
    fn forget(&mut self, now: Instant, fleet: &Fleet) {
        let here: BTreeSet<&str> = fleet.clients.iter().map(|client| &*client.key).collect();
        let is_remembered = |key: &str| here.contains(key);
        self.rests.retain(|key, rest| now < rest.until || (is_remembered(key) && now < rest.until + LONGEST_REST));
    }

    /// Takes in how long requests took.
    fn learn(&mut self, fleet: &Fleet) {
        self.p99.retain(|name, _| fleet.servers.iter().any(|server| server.name == *name));
        for server in &fleet.servers {
            let Some(p99) = server.p99_ms.map(|p99| p99.max(QUICK_MS)) else { continue };
            let known = self.p99.entry(server.name.clone()).or_insert(p99);
            *known += NEWEST * (p99 - *known);
        }
    }

    /// What a server's share is in relation to that of others: more where requests take less time.
    fn weight(&self, fleet: &Fleet, index: usize) -> f64 {
        let server = &fleet.servers[index];
        let (true, Some(p99)) = (self.settings.measure == Measure::P99, self.p99.get(&server.name)) else { return 1.0 };
        // Requests per millisecond of p99: without requests nothing is known of the server.
        let requests = fleet.work(index).requests;
        let mean = self.mean_pace(fleet);
        if requests <= 0.0 || mean <= 0.0 {
            return 1.0;
        }
        (requests / p99 / mean).clamp(1.0 / MOST_WEIGHT, MOST_WEIGHT)
    }

    fn mean_pace(&self, fleet: &Fleet) -> f64 {
        let pace = |index: usize| Some(fleet.work(index).requests / self.p99.get(&fleet.servers[index].name)?);
        let paces: Vec<f64> = (0..fleet.servers.len()).filter_map(pace).filter(|pace| *pace > 0.0).collect();
        paces.iter().sum::<f64>() / f64::from(u32::try_from(paces.len()).unwrap_or(u32::MAX)).max(1.0)
    }
}

/// By what each server misses its share.
fn off(fleet: &Fleet, tasks: &[Task]) -> Vec<Option<f64>> {
    let mut off = vec![None; fleet.servers.len()];
    for task in tasks {
        let (shares, loads) = (task.problem.shares(), task.problem.loads());
        for ((server, fair), load) in task.slots.iter().zip(&shares.fair).zip(&loads) {
            off[*server] = Some(if *fair > 0.0 { load / fair - 1.0 } else { 0.0 });
        }
    }
    off
}

fn moves(fleet: &Fleet, task: &Task) -> Vec<Move> {
    let moves = task.problem.solve().moves.into_iter();
    moves.filter_map(|(item, slot)| fleet.order(task.items[item], task.slots[slot])).collect()
}

/// Where clients of standbys go that were stood down: each to the server that has least then.
fn leave(fleet: &Fleet, measure: Measure, tasks: &[Task]) -> Vec<Move> {
    let mut found = Vec::new();
    for task in tasks {
        let mut loads = task.problem.loads();
        for client in &task.leaving {
            let load = measure.of(fleet.clients[*client].work);
            let height = |slot: &usize| (loads[*slot] + load) / task.problem.servers[*slot].weight;
            let mut able: Vec<usize> =
                (0..loads.len()).filter(|slot| fleet.order(*client, task.slots[*slot]).is_some()).collect();
            able.sort_by(|one, other| height(one).total_cmp(&height(other)));
            let Some(slot) = able.first() else { continue };
            loads[*slot] += load;
            found.extend(fleet.order(*client, task.slots[*slot]));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const LOOK: Duration = Duration::from_secs(5);

    /// Clients with loads, and what a balancer does to them.
    struct World {
        servers: usize,
        /// Of each client: its load, where it came to, who serves it.
        clients: Vec<(f64, usize, usize)>,
        balancer: Balancer,
        now: Instant,
        /// What was measured, newest last.
        measured: VecDeque<Vec<f64>>,
        moves: Vec<(Instant, String, usize, usize)>,
    }

    impl World {
        fn new(servers: usize, clients: &[(f64, usize)], settings: Settings) -> Self {
            let clients = clients.iter().map(|(load, at)| (*load, at % servers, at % servers)).collect();
            let (balancer, now) = (Balancer::new(settings), clock::now());
            Self { servers, clients, balancer, now, measured: VecDeque::new(), moves: Vec::new() }
        }

        fn fleet(&self, loads: &[f64]) -> Fleet {
            let add = |fleet: Fleet, (load, (_, came, served)): (&f64, &(f64, usize, usize))| {
                fleet.with(*came, *served, *load)
            };
            loads.iter().zip(&self.clients).fold(super::super::fleet::samples::fleet(self.servers), add)
        }

        /// One look, at loads that are off by a factor each and that were measured so many looks ago.
        fn look(&mut self, factors: &[f64], delay: usize) -> Verdict {
            self.now += LOOK;
            let factor = |index: usize| factors.get(index % factors.len().max(1)).copied().unwrap_or(1.0);
            let now = self.clients.iter().enumerate().map(|(index, client)| client.0 * factor(index)).collect();
            self.measured.push_back(now);
            if self.measured.len() > delay + 1 {
                self.measured.pop_front();
            }
            let fleet = self.fleet(&self.measured[0].clone());
            let look = self.balancer.look(self.now, &fleet);
            if let Verdict::Move(moves) = &look.verdict {
                for each in moves {
                    let client = fleet.clients.iter().position(|client| client.key == each.key).unwrap();
                    assert_eq!((each.at, each.from), (self.clients[client].1, self.clients[client].2));
                    self.clients[client].2 = each.to;
                    self.balancer.tried(self.now, &each.key);
                    self.moves.push((self.now, each.key.clone(), each.from, each.to));
                }
            }
            look.verdict
        }

        /// What it is like in truth.
        fn truth(&self) -> Fleet {
            self.fleet(&self.clients.iter().map(|client| client.0).collect::<Vec<_>>())
        }
    }

    fn settings() -> Settings {
        Settings { measure: Measure::Requests, ..Settings::default() }
    }

    #[test]
    fn a_burst_moves_nobody() {
        let mut world = World::new(2, &[(100.0, 0), (100.0, 0), (100.0, 1), (100.0, 1)], settings());
        for _ in 0..10 {
            assert_eq!(world.look(&[3.0, 3.0, 1.0, 1.0], 0), Verdict::Waiting(1));
            assert_eq!(world.look(&[3.0, 3.0, 1.0, 1.0], 0), Verdict::Waiting(2));
            assert_eq!(world.look(&[1.0], 0), Verdict::Within);
        }
        assert!(world.moves.is_empty());
    }

    #[test]
    fn three_servers_and_24_uneven_clients_are_even_after_one_step() {
        let clients: Vec<(f64, usize)> = (0..24).map(|number| (f64::from(10 + number * 7 % 50), 0)).collect();
        let mut world = World::new(3, &clients, settings());
        let verdicts: Vec<_> = (0..6).map(|_| world.look(&[1.0], 0)).collect();
        assert_eq!(verdicts[..2], [Verdict::Waiting(1), Verdict::Waiting(2)]);
        assert!(matches!(&verdicts[2], Verdict::Move(moves) if moves.len() < 20), "{verdicts:?}");
        assert_eq!(verdicts[3..], [Verdict::Settling, Verdict::Within, Verdict::Within]);
    }

    #[test]
    fn who_was_moved_rests_ever_longer() {
        let mut world = World::new(2, &[(100.0, 0), (100.0, 0)], Settings { samples: 1, ..settings() });
        // It alone is busy whenever it is on the first server.
        for _ in 0..2000 {
            let busy: Vec<f64> =
                world.clients.iter().map(|(_, _, served)| if *served == 0 { 1.0 } else { 0.01 }).collect();
            world.look(&busy, 0);
        }
        let most = |key: &str| world.moves.iter().filter(|(_, moved, ..)| moved == key).count();
        // 10000 s hold rests of 60 s, 120 s, ... 3840 s, and a part of the next.
        assert!(most("c0") <= 9 && most("c1") <= 9, "{:?}", world.moves.len());
    }

    #[test]
    fn slow_servers_are_given_less() {
        let settings = Settings { measure: Measure::P99, samples: 1, ..Settings::default() };
        let mut balancer = Balancer::new(settings);
        let mut fleet = super::super::fleet::samples::fleet(2);
        for client in 0..8 {
            fleet = fleet.with(client % 2, client % 2, 100.0);
        }
        (fleet.servers[0].p99_ms, fleet.servers[1].p99_ms) = (Some(30.0), Some(10.0));
        let Look { verdict: Verdict::Move(moves), .. } = balancer.look(clock::now(), &fleet) else { panic!() };
        assert_eq!(moves.iter().map(|each| (each.from, each.to)).collect::<Vec<_>>(), [(0, 1), (0, 1)]);
        fleet.servers[0].p99_ms = Some(10.5);
        let mut balancer = Balancer::new(settings);
        assert_eq!(balancer.look(clock::now(), &fleet).verdict, Verdict::Within);
    }

    #[test]
    fn clients_leave_a_standby_that_goes_at_once() {
        let mut fleet = super::super::fleet::samples::fleet(3).with(0, 2, 50.0).with(2, 2, 20.0).with(0, 0, 30.0);
        (fleet.servers[2].is_standby, fleet.servers[2].is_idle) = (true, true);
        let look = Balancer::new(settings()).look(clock::now(), &fleet);
        let Verdict::Move(moves) = look.verdict else { panic!("{look:?}") };
        assert_eq!(moves.iter().map(|each| (each.id, each.to)).collect::<Vec<_>>(), [(0, 1), (1, 0)]);
        assert_eq!(look.off[2], None);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        /// Loads jump about for a while and then stand still, and are measured exactly: few moves, and an end.
        #[test]
        fn once_loads_stand_still_so_do_clients(
            servers in 2usize..5,
            clients in prop::collection::vec((1.0f64..200.0, 0usize..5), 0..30),
            unrest in prop::collection::vec(prop::collection::vec(0.0f64..3.0, 7), 0..20),
            delay in 0usize..2,
        ) {
            let mut world = World::new(servers, &clients, settings());
            for factors in &unrest {
                world.look(factors, delay);
            }
            let before = world.moves.len();
            let verdicts: Vec<_> = (0..400).map(|_| world.look(&[1.0], delay)).collect();
            let moves = world.moves.len() - before;
            // The fewest that do, and once more what rested at first.
            prop_assert!(moves <= clients.len() + clients.len() / 2, "{moves} moves of {} clients", clients.len());
            prop_assert!(verdicts[200..].iter().all(|verdict| matches!(verdict, Verdict::Within | Verdict::Stuck)));
            let truth = world.truth();
            let tasks = truth.tasks(Measure::Requests, 0.2, |_| false, |_| 1.0);
            let is_done = tasks.iter().all(|task| task.problem.excess() == 0.0 || task.problem.solve().moves.is_empty());
            prop_assert!(is_done, "neither within tolerance nor at a fixed point");
        }

        /// As much noise as half the tolerance, and measurements that are late: nobody goes back and forth.
        #[test]
        fn noise_and_delay_move_nobody_back_and_forth(
            servers in 2usize..5,
            clients in prop::collection::vec((20.0f64..200.0, 0usize..5), 8..30),
            noise in prop::collection::vec(prop::collection::vec(0.9f64..1.1, 13), 50),
            delay in 0usize..3,
        ) {
            let mut world = World::new(servers, &clients, settings());
            for look in 0..2000 {
                world.look(&noise[look % noise.len()], delay);
            }
            for index in 0..clients.len() {
                let moves: Vec<_> = world.moves.iter().filter(|(_, key, ..)| *key == format!("c{index}")).collect();
                // 10000 s: the logarithm, as the head of the file has it.
                prop_assert!(moves.len() <= 8, "{moves:?}");
                for pair in moves.windows(2) {
                    prop_assert!(pair[1].0 - pair[0].0 >= Duration::from_secs(60));
                }
            }
            let late = world.moves.iter().filter(|(at, ..)| world.now - *at < Duration::from_secs(5000)).count();
            prop_assert!(late <= clients.len() / 2, "{late} moves in the second half");
            let excess = world.truth().tasks(Measure::Requests, 0.5, |_| false, |_| 1.0);
            let is_near = excess.iter().all(|task| task.problem.excess() == 0.0 || task.problem.solve().moves.is_empty());
            prop_assert!(is_near);
        }
    }
}
