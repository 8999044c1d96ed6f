//! Which clients to move so that servers share their load: the fewest that will do.
//!
//! Pure. Owns: each server's fair share, and the search. Does not own: what is a load (`fleet`), and whether it is time
//! to act on it (`steady`).
//!
//! To put loads of different sizes on servers with few moves is bin packing, and NP-hard, so this is a beam search
//! (Lowerre 1976): of all ways to make one move more, the best are kept; from each a move goes from a server above its
//! share to one below it. The first number of moves that is enough is the answer. Where no number is enough, each move
//! must still be worth its [`COST`].
//!
//! A *giant* is a client that is more than a server's share and the tolerance together. Its server can never be within
//! tolerance of what all would have without it, so giants are put aside, each with a server for itself as long as there
//! are enough, and the share of the others is computed from what is left.
//!
//! **Bounds.** 64 servers; [`MOST_MOVES`] moves in a plan; 48 plans at once, or 8 where there are many ways to go on.

use std::collections::{BTreeMap, BTreeSet};

/// Servers of a problem at most: sets of them are bits.
pub const MOST_SERVERS: usize = 64;
/// Moves of one plan at most. What is more is left to the next.
pub const MOST_MOVES: usize = 64;
/// What plans are to reach, as a part of the tolerance: less, so that a small change does not call for the next plan.
pub const AIM: f64 = 0.75;
/// What a move must be worth: this part of the tolerance, nearer to it; or, of a client so small that it cannot bring that
/// much, [`SMALL`] of its load.
pub const COST: f64 = 0.1;
/// See [`COST`]. A move that helps both servers is worth twice its load.
pub const SMALL: f64 = 0.25;
/// Up to so many clients all of them are candidates in each move; of more, those whose size fits.
const FEW: usize = 64;

/// One server, as the search sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Slot {
    /// Load that stays.
    pub fixed: f64,
    /// What its fair share is in relation to that of others; above 0.
    pub weight: f64,
}

/// One client that may be moved.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Its load.
    pub load: f64,
    /// The server that serves it, by index.
    pub at: usize,
    /// The servers that may, as bits; its own need not be among them.
    pub may: u64,
}

/// Servers among which clients can be moved.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Problem {
    /// [`MOST_SERVERS`] at most.
    pub servers: Vec<Slot>,
    /// The clients.
    pub clients: Vec<Item>,
    /// How far from its share a server may be, as a part of it.
    pub tolerance: f64,
    /// A difference that is too small to matter, in the unit of loads.
    pub floor: f64,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Plan {
    /// The client and the server that it goes to, by index. No client is moved twice.
    pub moves: Vec<(usize, usize)>,
    /// Each server's load after that.
    pub loads: Vec<f64>,
    /// By how much servers are further from their shares than the tolerance then, together; in shares of a server of
    /// weight 1.
    pub excess: f64,
}

/// What servers ought to have.
#[derive(Debug, Clone, PartialEq)]
pub struct Shares {
    /// Each server's share of what can be shared.
    pub fair: Vec<f64>,
    /// How far each may be from it.
    pub slack: Vec<f64>,
    /// Clients that are too large for any share.
    giants: Vec<usize>,
    /// The share of a server of weight 1.
    unit: f64,
}

impl Problem {
    /// What servers ought to have.
    pub fn shares(&self) -> Shares {
        let (giants, level) = self.giants();
        let fair = self.servers.iter().map(|server| level * server.weight).collect();
        let slack = self.servers.iter().map(|server| self.slack(level, server)).collect();
        Shares { fair, slack, giants, unit: if level > 0.0 { level } else { 1.0 } }
    }

    fn slack(&self, level: f64, server: &Slot) -> f64 {
        (self.tolerance * level * server.weight).max(self.floor)
    }

    /// The giants, and the level up to which servers are filled with all the others.
    fn giants(&self) -> (Vec<usize>, f64) {
        let movable: f64 = self.clients.iter().map(|client| client.load).sum();
        let mut bases: Vec<f64> = self.servers.iter().map(|server| server.fixed).collect();
        let mut largest: Vec<usize> = (0..self.clients.len()).collect();
        largest.sort_by(|one, other| self.clients[*other].load.total_cmp(&self.clients[*one].load));
        let (mut giants, mut taken, mut rest) = (Vec::new(), BTreeSet::new(), movable);
        for index in largest {
            let level = self.level(&bases, rest);
            let client = &self.clients[index];
            let fits = |server: &Slot| client.load <= level * server.weight + self.slack(level, server);
            if self.servers.iter().any(fits) || taken.len() == self.servers.len() {
                break;
            }
            // Where it is, unless another giant is there already.
            let least = |one: &usize, other: &usize| bases[*one].total_cmp(&bases[*other]);
            let free = (0..self.servers.len()).filter(|server| !taken.contains(server)).min_by(least);
            let place = if taken.contains(&client.at) { free.unwrap_or(client.at) } else { client.at };
            taken.insert(place);
            bases[place] += client.load;
            rest -= client.load;
            giants.push(index);
        }
        (giants, self.level(&bases, rest.max(0.0)))
    }

    /// How high all servers stand when `amount` is poured onto what they have: those that stand higher get nothing.
    fn level(&self, bases: &[f64], amount: f64) -> f64 {
        let mut heights: Vec<(f64, f64)> =
            bases.iter().zip(&self.servers).map(|(base, server)| (base / server.weight, server.weight)).collect();
        heights.sort_by(|one, other| one.0.total_cmp(&other.0));
        let (mut weight, mut volume, mut level) = (0.0, amount, 0.0);
        for (height, its_weight) in heights {
            if weight > 0.0 && height >= level {
                break;
            }
            weight += its_weight;
            volume += height * its_weight;
            level = volume / weight;
        }
        level
    }

    /// Each server's load now.
    pub fn loads(&self) -> Vec<f64> {
        let mut loads: Vec<f64> = self.servers.iter().map(|server| server.fixed).collect();
        for client in &self.clients {
            loads[client.at] += client.load;
        }
        loads
    }

    /// By how much servers are further from their shares than the tolerance, together; in shares of a server of weight 1.
    pub fn excess(&self) -> f64 {
        let shares = self.shares();
        let search = Search { problem: self, shares: &shares, aim: 1.0 };
        search.excess(&self.loads(), &[])
    }

    /// The fewest moves that bring all servers within [`AIM`] of the tolerance, or as near as is worth it.
    pub fn solve(&self) -> Plan {
        let shares = self.shares();
        let search = Search { problem: self, shares: &shares, aim: AIM };
        search.run()
    }
}

/// Moves that were tried.
#[derive(Debug, Clone)]
struct State {
    moves: Vec<(usize, usize)>,
    loads: Vec<f64>,
    excess: f64,
    /// What the moves must be worth.
    cost: f64,
    /// The sum of the squares of what shares are missed by: tells states apart that are alike otherwise.
    roughness: f64,
}

struct Search<'a> {
    problem: &'a Problem,
    shares: &'a Shares,
    /// The part of the tolerance that is to be reached.
    aim: f64,
}

impl Search<'_> {
    fn run(&self) -> Plan {
        let first = self.state(Vec::new(), self.problem.loads());
        let value = |state: &State| state.excess + state.cost;
        let sorted = self.sorted();
        let mut best = first.clone();
        let mut beam = vec![first];
        for _ in 0..MOST_MOVES {
            // No number of moves more could be worth it.
            if best.excess <= 0.0 || beam.is_empty() {
                break;
            }
            beam = self.next(&beam, &sorted);
            if let Some(state) = beam.first().filter(|state| value(state) < value(&best)) {
                best = state.clone();
            }
        }
        Plan { excess: self.excess(&best.loads, &best.moves), moves: best.moves, loads: best.loads }
    }

    /// How many states are kept: fewer where each has many ways to go on.
    fn width(&self) -> usize {
        if self.problem.servers.len() <= 8 && self.problem.clients.len() <= 256 { 48 } else { 8 }
    }

    /// The clients of each server, largest first.
    fn sorted(&self) -> Vec<Vec<usize>> {
        let mut sorted = vec![Vec::new(); self.problem.servers.len()];
        for (index, client) in self.problem.clients.iter().enumerate() {
            sorted[client.at].push(index);
        }
        for list in &mut sorted {
            list.sort_by(|one, other| self.load(*other).total_cmp(&self.load(*one)));
        }
        sorted
    }

    fn load(&self, client: usize) -> f64 {
        self.problem.clients[client].load
    }

    /// The best states with one move more.
    fn next(&self, beam: &[State], sorted: &[Vec<usize>]) -> Vec<State> {
        let mut found: BTreeMap<Vec<(usize, usize)>, State> = BTreeMap::new();
        for state in beam {
            for (from, clients) in sorted.iter().enumerate() {
                if state.loads[from] <= self.shares.fair[from] {
                    continue;
                }
                for to in (0..state.loads.len()).filter(|to| self.takes(state, from, *to)) {
                    for client in self.candidates(state, clients, from, to) {
                        let next = self.with(state, client, to);
                        let mut key = next.moves.clone();
                        key.sort_unstable();
                        found.entry(key).or_insert(next);
                    }
                }
            }
        }
        let mut next: Vec<State> = found.into_values().collect();
        let order = |one: &State, other: &State| {
            let first = one.excess.total_cmp(&other.excess).then(one.cost.total_cmp(&other.cost));
            first.then(one.roughness.total_cmp(&other.roughness))
        };
        next.sort_by(order);
        next.truncate(self.width());
        next
    }

    /// Whether a client of `from` might do better on `to`.
    fn takes(&self, state: &State, from: usize, to: usize) -> bool {
        let height = |server: usize| state.loads[server] / self.problem.servers[server].weight;
        let is_few = self.problem.servers.len() <= 8 || !self.shares.giants.is_empty();
        state.loads[to] < self.shares.fair[to] || (is_few && height(to) < height(from))
    }

    /// Clients of `from` that might go to `to`: one of each size, and of many those whose size fits.
    fn candidates(&self, state: &State, clients: &[usize], from: usize, to: usize) -> Vec<usize> {
        let may = |client: &&usize| {
            self.problem.clients[**client].may & (1 << to) != 0
                && !state.moves.iter().any(|(moved, _)| moved == *client)
                && self.load(**client) > 0.0
        };
        let mut able: Vec<usize> = clients.iter().filter(may).copied().collect();
        let alike = |one: &usize, other: &usize| {
            let (one, other) = (&self.problem.clients[*one], &self.problem.clients[*other]);
            one.load.total_cmp(&other.load).is_eq() && one.may == other.may
        };
        able.dedup_by(|other, one| alike(one, other));
        if able.len() <= FEW {
            return able;
        }
        let (above, below) = (state.loads[from] - self.shares.fair[from], self.shares.fair[to] - state.loads[to]);
        let slack = self.shares.slack[to] * self.aim;
        let mut fitting = BTreeSet::from([able[0]]);
        for size in [above, below, above - slack, below + slack, above / 2.0] {
            let at = able.partition_point(|client| self.load(*client) > size);
            let near = at.saturating_sub(1)..(at + 2).min(able.len());
            fitting.extend(&able[near]);
        }
        fitting.into_iter().collect()
    }

    fn with(&self, state: &State, client: usize, to: usize) -> State {
        let (mut moves, mut loads) = (state.moves.clone(), state.loads.clone());
        let Item { load, at, .. } = self.problem.clients[client];
        loads[at] -= load;
        loads[to] += load;
        moves.push((client, to));
        self.state(moves, loads)
    }

    fn state(&self, moves: Vec<(usize, usize)>, loads: Vec<f64>) -> State {
        let excess = self.excess(&loads, &moves);
        let square = |(load, fair): (&f64, &f64)| (load - fair).powi(2);
        let roughness = loads.iter().zip(&self.shares.fair).map(square).sum();
        let cost = moves.iter().map(|(client, _)| self.cost(*client)).sum();
        State { moves, loads, excess, cost, roughness }
    }

    /// What a move of this client must be worth. Giants are better left where they are.
    fn cost(&self, client: usize) -> f64 {
        let scale = if self.shares.giants.contains(&client) { 2.0 } else { 1.0 };
        scale * (COST * self.problem.tolerance).min(SMALL * self.load(client) / self.shares.unit)
    }

    /// The giants that are on a server after these moves.
    fn giants_at(&self, server: usize, moves: &[(usize, usize)]) -> Vec<usize> {
        let place = |giant: usize| {
            let moved = moves.iter().find(|(client, _)| *client == giant).map(|(_, to)| *to);
            moved.unwrap_or(self.problem.clients[giant].at)
        };
        self.shares.giants.iter().copied().filter(|giant| place(*giant) == server).collect()
    }

    /// How much more than its share a server may have: all of the largest giant that is there, or what cannot be moved.
    fn allowed(&self, server: usize, moves: &[(usize, usize)]) -> f64 {
        let here = self.giants_at(server, moves).into_iter();
        let largest = here.map(|giant| self.load(giant)).fold(0.0, f64::max);
        self.shares.fair[server].max(self.problem.servers[server].fixed).max(largest)
    }

    fn excess(&self, loads: &[f64], moves: &[(usize, usize)]) -> f64 {
        let of = |server: usize| {
            let slack = self.shares.slack[server] * self.aim;
            let above = loads[server] - self.allowed(server, moves) - slack;
            let below = self.shares.fair[server] - slack - loads[server];
            // What is left over by adding and subtracting is no excess.
            let excess = above.max(below);
            if excess > 1e-9 * self.shares.unit { excess } else { 0.0 }
        };
        (0..loads.len()).map(of).sum::<f64>() / self.shares.unit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Servers of weight 1, each with clients of these loads, who may go anywhere.
    fn problem(servers: &[&[f64]]) -> Problem {
        let clients = servers
            .iter()
            .enumerate()
            .flat_map(|(at, loads)| loads.iter().map(move |load| Item { load: *load, at, may: u64::MAX }));
        Problem {
            servers: servers.iter().map(|_| Slot { fixed: 0.0, weight: 1.0 }).collect(),
            clients: clients.collect(),
            tolerance: 0.2,
            floor: 0.0,
        }
    }

    #[test]
    fn what_is_even_is_left_alone() {
        let even = problem(&[&[1.0, 2.0], &[3.0], &[2.5, 0.4]]);
        assert_eq!((even.excess(), even.solve().moves), (0.0, Vec::new()));
        assert_eq!(problem(&[&[], &[]]).solve(), Plan { loads: vec![0.0, 0.0], ..Plan::default() });
        assert_eq!(Problem::default().solve(), Plan::default());
    }

    #[test]
    fn the_fewest_clients_are_moved() {
        // Half of six small ones would do, and so does one large one.
        let plan = problem(&[&[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 6.0], &[]]).solve();
        assert_eq!((plan.moves, plan.excess), (vec![(6, 1)], 0.0));
        let plan = problem(&[&[4.0, 4.0, 2.0, 2.0], &[], &[]]).solve();
        assert_eq!((plan.moves.len(), plan.excess), (2, 0.0));
    }

    #[test]
    fn a_giant_stays_and_the_others_leave_it() {
        let plan = problem(&[&[100.0, 5.0, 5.0], &[5.0], &[5.0]]).solve();
        let moved: Vec<_> = plan.moves.iter().map(|(client, _)| *client).collect();
        assert_eq!((moved.len(), moved.contains(&0), plan.excess), (2, false, 0.0));
        // Of two on one server one leaves.
        let plan = problem(&[&[100.0, 90.0], &[], &[]]).solve();
        assert_eq!((plan.moves.len(), plan.excess), (1, 0.0));
    }

    #[test]
    fn nobody_goes_where_it_may_not() {
        let mut tied = problem(&[&[5.0, 5.0], &[], &[]]);
        for client in &mut tied.clients {
            client.may = 1 << 2;
        }
        assert_eq!(tied.solve().moves, [(0, 2)]);
    }

    #[test]
    fn servers_share_by_weight_and_keep_what_cannot_be_moved() {
        let mut uneven = problem(&[&[1.0; 8], &[]]);
        uneven.servers[1].weight = 3.0;
        assert_eq!(uneven.shares().fair, [2.0, 6.0]);
        let plan = uneven.solve();
        assert!(plan.loads[1] >= 5.1 && plan.excess == 0.0, "{plan:?}");
        let mut full = problem(&[&[1.0; 4], &[]]);
        full.servers[1].fixed = 50.0;
        assert_eq!((full.excess(), full.solve().moves), (0.0, Vec::new()), "it has more than enough of its own");
    }

    #[test]
    fn thousands_of_clients_are_planned_for() {
        let loads: Vec<f64> = (0..2000).map(|number| 1.0 + f64::from(number % 7)).collect();
        let many = problem(&[&loads, &[], &[], &[], &[], &[]]);
        let plan = many.solve();
        assert_eq!(plan.moves.len(), MOST_MOVES, "the rest is left to the next");
        assert!(plan.excess < many.excess());
    }

    /// The fewest moves after which nothing is in excess, by trying all; `None` if there is no way.
    fn fewest(problem: &Problem) -> Option<usize> {
        let count = problem.servers.len().pow(u32::try_from(problem.clients.len()).unwrap());
        let shares = problem.shares();
        let search = Search { problem, shares: &shares, aim: AIM };
        let moves_of = |mut number: usize| {
            let mut moves = Vec::new();
            for (index, client) in problem.clients.iter().enumerate() {
                let to = number % problem.servers.len();
                number /= problem.servers.len();
                if to != client.at {
                    moves.push((index, to));
                }
            }
            moves
        };
        let is_allowed = |moves: &Vec<(usize, usize)>| {
            moves.iter().all(|(client, to)| problem.clients[*client].may & (1 << to) != 0)
        };
        let ends_well = |moves: &Vec<(usize, usize)>| {
            let mut loads = problem.loads();
            for (client, to) in moves {
                loads[problem.clients[*client].at] -= problem.clients[*client].load;
                loads[*to] += problem.clients[*client].load;
            }
            search.excess(&loads, moves) == 0.0
        };
        (0..count).map(moves_of).filter(is_allowed).filter(ends_well).map(|moves| moves.len()).min()
    }

    prop_compose! {
        fn small()(servers in 2usize..4)(
            fixed in prop::collection::vec(prop_oneof![3 => Just(0.0), 1 => 0.0f64..20.0], servers),
            weights in prop::collection::vec(prop_oneof![3 => Just(1.0), 1 => 0.5f64..2.0], servers),
            clients in prop::collection::vec((prop_oneof![0.1f64..10.0, 1.0f64..2.0, Just(3.0)], 0..servers, 1u64..16), 0..8),
            tolerance in 0.05f64..0.5,
        ) -> Problem {
            let servers = fixed.iter().zip(&weights).map(|(fixed, weight)| Slot { fixed: *fixed, weight: *weight });
            // Most may go everywhere.
            let may = |bits: u64| if bits > 4 { u64::MAX } else { bits };
            let clients = clients.into_iter().map(|(load, at, bits)| Item { load, at, may: may(bits) });
            Problem { servers: servers.collect(), clients: clients.collect(), tolerance, floor: 0.0 }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn a_plan_is_sound_and_worth_its_moves(problem in small()) {
            let plan = problem.solve();
            let mut loads = problem.loads();
            let mut seen = BTreeSet::new();
            for (client, to) in &plan.moves {
                let item = &problem.clients[*client];
                prop_assert!(seen.insert(*client) && item.at != *to && item.may & (1 << to) != 0);
                loads[item.at] -= item.load;
                loads[*to] += item.load;
            }
            for (one, other) in loads.iter().zip(&plan.loads) {
                prop_assert!((one - other).abs() < 1e-6);
            }
            let shares = problem.shares();
            let search = Search { problem: &problem, shares: &shares, aim: AIM };
            let before = search.excess(&problem.loads(), &[]);
            let after = search.excess(&plan.loads, &plan.moves);
            let cost: f64 = plan.moves.iter().map(|(client, _)| search.cost(*client)).sum();
            prop_assert!(plan.moves.is_empty() || after + cost < before);
        }

        #[test]
        fn the_number_of_moves_is_near_the_least(problem in small()) {
            if let Some(fewest) = fewest(&problem) {
                let plan = problem.solve();
                prop_assert!(plan.moves.len() <= fewest + 1, "{} moves, and {fewest} are enough", plan.moves.len());
            }
        }
    }
}
