//! What is said of servers, of moves, and of what came of them.

use std::fmt::Write;

use serde_json::{Value, json};

use super::ask::Asked;
use super::carry::Outcome;
use crate::cli::table::{Table, printable};
use crate::control::balance::fleet::{Measure, Move};
use crate::control::balance::standby::Call;
use crate::control::balance::steady::{Look, Verdict};
use crate::units::{ByteSize, to_u64};

/// One look.
pub(super) struct Shown<'a> {
    pub(super) asked: &'a Asked,
    pub(super) look: &'a Look,
    pub(super) call: Option<Call>,
    /// The number of the step that it would be.
    pub(super) step: u32,
    pub(super) measure: Measure,
    pub(super) is_dry: bool,
}

impl Shown<'_> {
    /// The verdict in a word.
    pub(super) fn kind(&self) -> &'static str {
        match self.look.verdict {
            Verdict::Within => "within",
            Verdict::Waiting(0) => "starting",
            Verdict::Waiting(_) => "waiting",
            Verdict::Settling => "settling",
            Verdict::Stuck => "stuck",
            Verdict::Move(_) => "move",
        }
    }

    /// Whether a standby comes or goes.
    pub(super) fn has_news(&self) -> bool {
        matches!(self.call, Some(Call::BringIn | Call::StandDown))
    }

    pub(super) fn text(&self) -> String {
        let mut text = self.servers().to_string();
        if let Some(call) = self.call.and_then(said) {
            text.push_str(&format!("{call}\n"));
        }
        for error in self.asked.errors.iter().flatten() {
            text.push_str(&format!("  takes no part: {}\n", printable(error)));
        }
        let line = match &self.look.verdict {
            Verdict::Within => "all servers are within tolerance",
            Verdict::Waiting(0) => "a server has been running too short to have rates",
            Verdict::Waiting(_) => "out of tolerance: that may pass",
            Verdict::Settling => "waiting for rates of after the moves",
            Verdict::Stuck => {
                "out of tolerance, and no move is worth it now: clients are too large, rest, or may not go"
            }
            Verdict::Move(moves) => {
                let step = if self.is_dry { "would be moved".to_owned() } else { format!("step {}", self.step) };
                text.push_str(&format!("{step}: {} clients\n{}", moves.len(), self.moves(moves)));
                return text;
            }
        };
        text.push_str(&format!("{line}\n"));
        text
    }

    fn load(&self, server: usize) -> f64 {
        let fleet = &self.asked.fleet;
        match self.measure {
            Measure::Clients => to_f64(fleet.count(server)),
            measure => measure.of(fleet.work(server)),
        }
    }

    fn total(&self) -> f64 {
        (0..self.asked.fleet.servers.len()).map(|server| self.load(server)).sum()
    }

    fn off(&self, server: usize) -> Option<f64> {
        self.look.off.get(server).copied().flatten()
    }

    fn state(&self, server: usize) -> &'static str {
        let server = &self.asked.fleet.servers[server];
        match (server.is_reachable, server.is_draining, server.is_standby, server.is_idle) {
            (false, ..) => "unreachable",
            (_, true, ..) => "draining",
            (_, _, _, true) => "standby",
            (_, _, true, false) => "standby, in",
            _ => "",
        }
    }

    fn servers(&self) -> Table {
        let headings = ["SERVER", "", ">LOAD", ">SHARE", ">OFF", ">CLIENTS", ">REQUESTS/S", ">BYTES/S", ">P99"];
        let mut table = Table::new(&headings);
        let (fleet, total) = (&self.asked.fleet, self.total());
        for (index, server) in fleet.servers.iter().enumerate() {
            let work = fleet.work(index);
            let load = self.load(index);
            table.row(vec![
                server.name.clone(),
                self.state(index).to_owned(),
                shown_load(self.measure, load),
                if total > 0.0 { percent(load / total) } else { "-".to_owned() },
                self.off(index).map_or_else(|| "-".to_owned(), |off| format!("{:+.0} %", off * 100.0)),
                fleet.count(index).to_string(),
                format!("{:.0}", work.requests),
                size(work.bytes),
                server.p99_ms.map_or_else(|| "-".to_owned(), |p99| format!("{p99:.1} ms")),
            ]);
        }
        table
    }

    fn moves(&self, moves: &[Move]) -> Table {
        let mut table = Table::new(&[">CLIENT", "EXPORT", "FROM", "TO", ">LOAD", "WHY"]);
        for each in moves {
            table.row(vec![
                each.id.to_string(),
                each.export.clone(),
                self.name(each.from),
                self.name(each.to),
                shown_load(self.measure, self.load_of(each)),
                self.why(each),
            ]);
        }
        table
    }

    fn load_of(&self, each: &Move) -> f64 {
        let clients = &self.asked.fleet.clients;
        let client = clients.iter().find(|client| client.key == each.key && client.connected == each.at);
        client.map_or(0.0, |client| self.measure.of(client.work))
    }

    fn name(&self, server: usize) -> String {
        self.asked.fleet.servers[server].name.clone()
    }

    fn why(&self, each: &Move) -> String {
        let off = |server: usize| self.off(server).map_or_else(String::new, |off| format!("{:+.0} %", off * 100.0));
        if self.asked.fleet.servers[each.from].is_idle {
            return format!("{} is stood down", self.name(each.from));
        }
        let back = if each.to == each.at { ", and it comes back" } else { "" };
        format!("{} there, {} here{back}", off(each.from), off(each.to))
    }

    pub(super) fn json(&self) -> Value {
        let total = self.total();
        let fleet = &self.asked.fleet;
        let server = |index: usize| {
            let (work, server) = (fleet.work(index), &fleet.servers[index]);
            json!({
                "name": server.name, "reachable": server.is_reachable, "draining": server.is_draining,
                "standby": server.is_standby, "in": server.is_reachable && !server.is_idle, "sample": server.sample,
                "load": self.load(index), "share": if total > 0.0 { self.load(index) / total } else { 0.0 },
                "off": self.off(index), "clients": fleet.count(index), "requests_per_second": work.requests,
                "bytes_per_second": work.bytes, "p99_ms": server.p99_ms, "error": self.asked.errors[index],
            })
        };
        let one = |each: &Move| {
            let mut value = of_move(self.asked, each);
            value["load"] = json!(self.load_of(each));
            value["why"] = json!(self.why(each));
            value
        };
        let moves: Vec<Value> = match &self.look.verdict {
            Verdict::Move(moves) => moves.iter().map(one).collect(),
            _ => Vec::new(),
        };
        json!({
            "verdict": self.kind(), "step": self.step, "standbys": self.call.map(word),
            "servers": (0..fleet.servers.len()).map(server).collect::<Vec<_>>(), "moves": moves,
        })
    }
}

fn of_move(asked: &Asked, each: &Move) -> Value {
    let name = |server: usize| asked.fleet.servers[server].name.clone();
    json!({
        "client": each.id, "at": name(each.at), "export": each.export, "from": name(each.from), "to": name(each.to),
        "uri": each.uri, "force": each.force,
    })
}

/// What came of a step, for people: what has failed is named.
pub(super) fn outcomes(asked: &Asked, step: u32, outcomes: &[Outcome]) -> String {
    let moved = outcomes.iter().filter(|outcome| outcome.is_moved).count();
    let mut text = format!("step {step}: {moved} of {} clients moved\n", outcomes.len());
    for outcome in outcomes.iter().filter(|outcome| !outcome.is_moved) {
        let name = &asked.fleet.servers[outcome.of.at].name;
        let why = outcome.why.as_deref().unwrap_or("it stayed");
        // A string takes whatever is written to it.
        let _ = writeln!(text, "  client {} of {} was not: {}", outcome.of.id, printable(name), printable(why));
    }
    text
}

/// The same for programs.
pub(super) fn outcomes_json(asked: &Asked, step: u32, outcomes: &[Outcome]) -> Value {
    let one = |outcome: &Outcome| {
        let mut value = of_move(asked, &outcome.of);
        value["moved"] = json!(outcome.is_moved);
        value["why"] = json!(outcome.why);
        value
    };
    json!({ "verdict": "moved", "step": step, "moves": outcomes.iter().map(one).collect::<Vec<_>>() })
}

fn said(call: Call) -> Option<&'static str> {
    match call {
        Call::Stay => None,
        Call::BringIn => Some("  requests take too long: the next standby is brought in"),
        Call::StandDown => Some("  the load has fallen: the last standby is stood down"),
        Call::Exhausted => Some("  requests take too long, and there is no other standby"),
    }
}

const fn word(call: Call) -> &'static str {
    match call {
        Call::Stay => "stay",
        Call::BringIn => "bring in",
        Call::StandDown => "stand down",
        Call::Exhausted => "exhausted",
    }
}

fn shown_load(measure: Measure, load: f64) -> String {
    match measure {
        Measure::Mix | Measure::Bytes => format!("{}/s", size(load)),
        Measure::Requests | Measure::P99 => format!("{load:.0}/s"),
        Measure::Clients => format!("{load:.0}"),
    }
}

fn percent(part: f64) -> String {
    format!("{:.0} %", part * 100.0)
}

/// Bytes, rounded.
fn size(bytes: f64) -> String {
    let whole = format!("{:.0}", bytes.max(0.0)).parse().unwrap_or(u64::MAX);
    ByteSize(whole).to_string()
}

fn to_f64(count: usize) -> f64 {
    f64::from(u32::try_from(to_u64(count)).unwrap_or(u32::MAX))
}
