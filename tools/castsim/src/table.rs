//! The table: overhead and time by loss and number of receivers, beside plain NACK.

use std::time::Duration;

use clap::Args;
use headwater::units::{ByteSize, MIB};

use crate::loss::{Kind, Loss};
use crate::world::{Oddity, Outcome, Plan, run};
use crate::{nack, out};

/// Overhead and time by loss and number of receivers, beside plain NACK, as a table in Markdown.
#[derive(Debug, Args)]
pub(crate) struct Table {
    /// Bytes of data.
    #[arg(long, default_value_t = ByteSize(64 * MIB))]
    size: ByteSize,
    /// Receivers.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 100, 1000])]
    receivers: Vec<usize>,
    /// Losses, in percent.
    #[arg(long, value_delimiter = ',', default_values_t = [0.0, 0.1, 1.0, 5.0, 10.0])]
    loss: Vec<f64>,
    /// How losses come; all ways unless told.
    #[arg(long, value_enum, value_delimiter = ',')]
    kind: Vec<Kind>,
    /// Bytes per second.
    #[arg(long, default_value_t = 25_000_000)]
    rate: u64,
    /// Other losses for other seeds.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Only the rows of receivers that are late, slow, killed or away.
    #[arg(long)]
    odd: bool,
}

impl Table {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        if !self.odd {
            self.losses()?;
        }
        self.oddities()
    }

    fn losses(&self) -> anyhow::Result<()> {
        out(&format!(
            "| losses | % | receivers | sent / data | time | parity % | again % | reports/s | by unicast | NACK: sent / data | time | reports/s |\n{}",
            "| --- |".to_owned() + " --- |".repeat(11).as_str()
        ))?;
        let kinds =
            if self.kind.is_empty() { &[Kind::Independent, Kind::Shared, Kind::Bursts][..] } else { &self.kind };
        for kind in kinds {
            for loss in &self.loss {
                for receivers in &self.receivers {
                    self.row(*kind, *loss, *receivers)?;
                }
            }
        }
        Ok(())
    }

    fn plan(&self, kind: Kind, loss: f64, receivers: usize) -> Plan {
        let plan = Plan::new(self.size.0, receivers, kind, loss / 100.0);
        Plan { rate: self.rate, seed: self.seed, ..plan }
    }

    fn row(&self, kind: Kind, loss: f64, receivers: usize) -> anyhow::Result<()> {
        let outcome = run(&self.plan(kind, loss, receivers));
        let plain = Loss::new(kind, loss / 100.0, receivers, self.seed + 1);
        let plain = nack::run(outcome.symbols, receivers, self.rate, plain);
        let percent = |count: u64| count as f64 / outcome.symbols as f64 * 100.0;
        out(&format!(
            "| {} | {loss} | {receivers} | {:.3} | {:.3} | {:.2} | {:.2} | {} | {} | {:.3} | {:.3} | {} |",
            kind.name(),
            outcome.overhead(),
            outcome.slowdown(self.rate),
            percent(outcome.parity),
            percent(outcome.repairs),
            outcome.peak,
            outcome.lacking,
            plain.overhead(),
            plain.slowdown(self.rate),
            plain.peak,
        ))
    }

    /// One of eight receivers is odd; all lose one per cent.
    fn oddities(&self) -> anyhow::Result<()> {
        let seconds = Duration::from_secs_f64;
        let copy = self.size.0 as f64 / self.rate as f64;
        let odd = |oddity: Oddity| Plan { oddities: vec![oddity], ..self.plan(Kind::Independent, 1.0, 8) };
        let late = Oddity { joins: seconds(1.0 + copy / 2.0), ..Oddity::default() };
        let two_late = Plan { oddities: vec![late.clone(), late.clone()], ..self.plan(Kind::Independent, 1.0, 8) };
        let slow = Oddity { takes: Some(self.rate as f64 / 2.0), ..Oddity::default() };
        let killed = Oddity { dies: Some(seconds(1.0 + copy / 3.0)), ..Oddity::default() };
        let away = Oddity { down: Some(seconds(1.0)..seconds(11.0)), ..Oddity::default() };
        let rows = [
            ("nothing", odd(Oddity::default())),
            ("one joins in the middle", odd(late.clone())),
            ("two do", two_late),
            ("one does, and a carousel", Plan { carousel: true, cancelled: Some(seconds(60.0)), ..odd(late) }),
            ("one takes half the rate", odd(slow.clone())),
            ("the same, and at least three quarters are wanted", Plan { min_rate: self.rate * 3 / 4, ..odd(slow) }),
            ("one is killed", odd(killed)),
            ("one is away for ten seconds", odd(away)),
            ("the sender is killed", Plan { sender_dies: Some(seconds(1.0 + copy / 2.0)), ..odd(Oddity::default()) }),
        ];
        out(
            "\n| what happens | complete | sent / data | time | blocks by unicast | sender ended after | rate at the end |\n| --- | --- | --- | --- | --- | --- | --- |",
        )?;
        for (name, plan) in rows {
            self.odd_row(name, &run(&plan))?;
        }
        Ok(())
    }

    fn odd_row(&self, name: &str, outcome: &Outcome) -> anyhow::Result<()> {
        let ended = if outcome.has_ended { format!("{:.1} s", outcome.after) } else { "never".to_owned() };
        out(&format!(
            "| {name} | {} of 8 | {:.3} | {:.3} | {} | {ended} | {:.1} MB/s |",
            outcome.whole,
            outcome.overhead(),
            outcome.slowdown(self.rate),
            outcome.lacking,
            outcome.rate as f64 / 1e6,
        ))
    }
}
