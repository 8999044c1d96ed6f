//! `headwater balance`: asking servers, deciding, moving clients, and saying so.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the loop |
//! | `args` | what was typed |
//! | `ask` | what servers say of themselves |
//! | `carry` | orders to move clients, and what came of them |
//! | `show` | tables and JSON |
//!
//! Decides nothing itself: `control::balance` does.

pub(super) mod args;
mod ask;
mod carry;
mod show;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{bail, ensure};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::output;
use super::running::block_on;
use crate::clock;
use crate::control::balance::fleet::{Content, Fleet, Measure};
use crate::control::balance::standby::{self, Call, Manager};
use crate::control::balance::steady::{Balancer, Look, Settings, Verdict};
pub(super) use args::Balance;
use ask::{Asked, Crew};
use show::Shown;

/// Servers are not within tolerance.
const OFF: u8 = 3;
/// Looks in a row out of tolerance, or above the target, before something is done.
const SAMPLES: u32 = 3;
/// Looks in a row without need for a standby before it is stood down.
const IDLE_SAMPLES: u32 = 12;
/// A client rests so many intervals after it was moved, the first time.
const REST: u32 = 12;
/// Intervals between two changes of standbys.
const DWELL: u32 = 8;
/// How often servers are asked that have no rates yet, because they were started just now.
const TRIES: u32 = 10;
/// What a sample is late at most.
const SAMPLE: Duration = Duration::from_secs(1);

/// Does it.
pub(super) fn run(arguments: Balance) -> anyhow::Result<ExitCode> {
    block_on(async {
        // Before there is anything that it could be mistaken about.
        let interrupt = signal(SignalKind::interrupt())?;
        let crew = Crew::gather(&arguments).await?;
        let mut session = Session::new(arguments, crew, interrupt);
        if session.arguments.watch { session.watch().await } else { session.once().await }
    })
}

struct Session {
    arguments: Balance,
    crew: Crew,
    interrupt: Signal,
    balancer: Balancer,
    manager: Option<Manager>,
    /// Steps so far: looks that moved somebody.
    step: u32,
    /// Moves that have failed.
    failed: usize,
    /// What was shown last, so that nothing is shown twice.
    shown: Option<&'static str>,
}

impl Session {
    fn new(arguments: Balance, crew: Crew, interrupt: Signal) -> Self {
        let Balance { interval, tolerance, by, watch, target_latency, .. } = arguments;
        let settings = Settings {
            tolerance,
            measure: by.measure(),
            samples: if watch { SAMPLES } else { 1 },
            // Rates are those of after a move when all of the window is.
            settle: if watch { interval + SAMPLE } else { Duration::ZERO },
            rest: interval * REST,
        };
        let of_standbys = |target_ms| standby::Settings {
            target_ms,
            samples: SAMPLES,
            idle_samples: IDLE_SAMPLES,
            dwell: interval * DWELL,
        };
        let manager = target_latency.map(|target| Manager::new(of_standbys(target)));
        let balancer = Balancer::new(settings);
        Self { arguments, crew, interrupt, balancer, manager, step: 0, failed: 0, shown: None }
    }

    /// One plan, carried out.
    async fn once(&mut self) -> anyhow::Result<ExitCode> {
        let asked = self.ask_in_earnest().await?;
        let (look, _) = self.look(&asked);
        self.show(&asked, &look, None)?;
        let Verdict::Move(_) = look.verdict else { return Ok(code(&look, self.failed)) };
        if self.arguments.dry_run {
            return Ok(OFF.into());
        }
        self.carry_out(&asked, &look).await?;
        tokio::select! {
            () = tokio::time::sleep(self.arguments.interval + SAMPLE) => {}
            _ = self.interrupt.recv() => return Ok(if self.failed > 0 { ExitCode::FAILURE } else { OFF.into() }),
        }
        let asked = self.ask_in_earnest().await?;
        let (look, _) = self.look(&asked);
        self.show(&asked, &look, None)?;
        Ok(code(&look, self.failed))
    }

    /// Until Ctrl-C.
    async fn watch(&mut self) -> anyhow::Result<ExitCode> {
        let mut last = ExitCode::from(OFF);
        let mut looks = tokio::time::interval(self.arguments.interval);
        // A step that took long does not make the next looks come at once.
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                _ = self.interrupt.recv() => return Ok(last),
                _ = looks.tick() => {}
            }
            let asked = self.crew.ask(&self.arguments).await;
            if !asked.has_rates() {
                self.show(&asked, &Look { verdict: Verdict::Waiting(0), off: Vec::new() }, None)?;
                continue;
            }
            let (look, call) = self.look(&asked);
            self.show(&asked, &look, call)?;
            last = code(&look, self.failed);
            if matches!(look.verdict, Verdict::Move(_)) && !self.arguments.dry_run {
                self.carry_out(&asked, &look).await?;
            }
        }
    }

    /// Asks until there are rates.
    async fn ask_in_earnest(&self) -> anyhow::Result<Asked> {
        for _ in 0..TRIES {
            let asked = self.crew.ask(&self.arguments).await;
            ensure!(asked.fleet.servers.iter().any(|server| server.is_reachable), "{}", asked.all_errors());
            if asked.has_rates() {
                return Ok(asked);
            }
            tokio::time::sleep(SAMPLE).await;
        }
        bail!("a server says nothing of its load")
    }

    fn look(&mut self, asked: &Asked) -> (Look, Option<Call>) {
        let now = clock::now();
        let call = match &mut self.manager {
            Some(manager) => managed_image(&asked.fleet, self.arguments.export.as_deref()).map(|content| {
                let (work, p99) = asked.fleet.of_image(&content);
                manager.look(now, p99, Measure::Mix.of(work), self.crew.standbys())
            }),
            None => None,
        };
        if let Some(manager) = &self.manager {
            self.crew.activate(manager.active());
        }
        // What was called takes effect with the next look: this one was asked before.
        (self.balancer.look(now, &asked.fleet), call)
    }

    fn show(&mut self, asked: &Asked, look: &Look, call: Option<Call>) -> anyhow::Result<()> {
        let Balance { json, watch, dry_run, by, .. } = self.arguments;
        let shown = Shown { asked, look, call, step: self.step + 1, measure: by.measure(), is_dry: dry_run };
        let kind = shown.kind();
        let is_new = !watch || self.shown != Some(kind) || matches!(look.verdict, Verdict::Move(_)) || shown.has_news();
        self.shown = Some(kind);
        if json {
            return output::print(&format!("{}\n", shown.json()));
        }
        if is_new { output::print(&shown.text()) } else { Ok(()) }
    }

    async fn carry_out(&mut self, asked: &Asked, look: &Look) -> anyhow::Result<()> {
        let Verdict::Move(moves) = &look.verdict else { return Ok(()) };
        self.step += 1;
        let outcomes = carry::out(&self.crew, moves).await;
        let now = clock::now();
        moves.iter().for_each(|each| self.balancer.tried(now, &each.key));
        self.failed += outcomes.iter().filter(|outcome| !outcome.is_moved).count();
        let text = if self.arguments.json {
            format!("{}\n", show::outcomes_json(asked, self.step, &outcomes))
        } else {
            show::outcomes(asked, self.step, &outcomes)
        };
        output::print(&text)
    }
}

/// The image whose standbys are managed: the one that was named, or the only one that all standbys have.
fn managed_image(fleet: &Fleet, export: Option<&str>) -> Option<Content> {
    let mut places = fleet.servers.iter().filter(|server| !server.is_standby).flat_map(|server| &server.places);
    if let Some(export) = export {
        return places.find(|place| place.export == export).map(|place| place.content.clone());
    }
    let has = |server: &crate::control::balance::fleet::Server, content: &Content| {
        server.places.iter().any(|place| place.content == *content)
    };
    let standbys: Vec<_> = fleet.servers.iter().filter(|server| server.is_standby && server.is_reachable).collect();
    let mut shared = places.filter(|place| standbys.iter().all(|standby| has(standby, &place.content)));
    let first = shared.next()?.content.clone();
    // Of several it must be said which.
    shared.all(|place| place.content == first).then_some(first)
}

fn code(look: &Look, failed: usize) -> ExitCode {
    match look.verdict {
        Verdict::Within => ExitCode::SUCCESS,
        _ if failed > 0 => ExitCode::FAILURE,
        _ => OFF.into(),
    }
}
