//! `headwater top`: servers, exports and clients, live, those first that hurt.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the command: the terminal, and the loop of drawing and events |
//! | `state` | what is shown, and what keys do to it (pure) |
//! | `rows` | the tables: columns, rows, what hurts (pure) |
//! | `dialog` | the questions that an order is made of (pure) |
//! | `draw` | how it looks |
//! | `watch` | asking servers, giving orders |
//!
//! Owns: the screen. Does not own: rates, which servers compute themselves ([`crate::control::load`]).
//!
//! Servers are asked beside drawing, each by a task of its own: one that hangs holds nobody up. The terminal is given back as
//! it was at the end, on a signal, and when the program panics.

mod dialog;
mod draw;
mod rows;
mod state;
mod watch;

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event as Input, KeyEventKind};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::Notify;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::args::Servers;
use super::running::{block_on, reach_all};
use crate::control::Client;
use draw::Looks;
use state::{Deed, State};
use watch::{Event, carry_out, watch};

/// Events that wait to be shown; whoever has more waits.
const WAITING: usize = 64;
/// How often it is looked whether anybody still wants keys.
const LOOK: Duration = Duration::from_millis(100);

const EXAMPLES: &str = "\
Examples:
  headwater top
  headwater top --servers /run/headwater/a.sock,/run/headwater/b.sock,127.0.0.1:9000

Keys: 1, 2, 3 or Tab choose servers, exports, clients; s sorts, / filters; d drains, r redirects, and both ask first;
? shows all keys, q quits. NO_COLOR in the environment turns colours off.";

/// Watch running servers: their exports and clients, those first that hurt.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Top {
    /// How often servers are asked, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: Duration,
    #[command(flatten)]
    servers: Servers,
}

fn interval(text: &str) -> Result<Duration, String> {
    let number = text.strip_suffix('s').unwrap_or(text).parse().ok().filter(|seconds| (0.2..=60.0).contains(seconds));
    number.map(Duration::from_secs_f64).ok_or_else(|| "from 0.2 to 60 seconds".to_owned())
}

/// Shows them until the operator has seen enough.
pub(super) fn run(arguments: Top) -> anyhow::Result<ExitCode> {
    if !(io::stdin().is_terminal() && io::stdout().is_terminal()) {
        bail!("this is for a terminal: headwater status --json says it to programs");
    }
    block_on(async {
        let signals = Signals::catch()?;
        let clients = reach_all(arguments.servers).await?;
        let terminal = Screen::take()?;
        show(terminal, signals, clients, arguments.interval).await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// What ends the program from outside.
struct Signals([Signal; 3]);

impl Signals {
    fn catch() -> io::Result<Self> {
        let [one, two, three] = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Self([one?, two?, three?]))
    }

    async fn next(&mut self) {
        let [one, two, three] = &mut self.0;
        tokio::select! {
            _ = one.recv() => {}
            _ = two.recv() => {}
            _ = three.recv() => {}
        }
    }
}

/// The terminal, taken over; given back when this is dropped, and before a panic is told.
struct Screen(DefaultTerminal);

impl Screen {
    fn take() -> anyhow::Result<Self> {
        ratatui::try_init().map(Self).context("cannot take the terminal over")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = ratatui::try_restore();
    }
}

async fn show(mut screen: Screen, mut signals: Signals, clients: Vec<Client>, interval: Duration) -> anyhow::Result<()> {
    let mut state = State::new(clients.iter().map(|client| client.address().to_string()).collect());
    let looks = Looks { has_colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()) };
    let (events, mut answers) = channel(WAITING);
    let nudges: Vec<Rc<Notify>> = clients.iter().map(|_| Rc::default()).collect();
    for (index, (client, nudge)) in clients.iter().zip(&nudges).enumerate() {
        let work = watch(index, client.clone(), interval, Rc::clone(nudge), events.clone());
        drop(tokio::task::spawn_local(work));
    }
    let mut inputs = read_inputs();
    loop {
        screen.0.draw(|frame| draw::draw(frame, &state, looks))?;
        let input = tokio::select! {
            Some(event) = answers.recv() => {
                apply(&mut state, event);
                None
            }
            input = inputs.recv() => Some(input.context("the terminal is gone")??),
            () = signals.next() => return Ok(()),
        };
        let Some(Input::Key(key)) = input else { continue };
        if key.kind == KeyEventKind::Release {
            continue;
        }
        match state.handle_key(key) {
            Deed::Nothing => {}
            Deed::Quit => return Ok(()),
            Deed::Carry(order) => {
                let (client, nudge) = (clients[order.server].clone(), Rc::clone(&nudges[order.server]));
                drop(tokio::task::spawn_local(carry_out(client, order, nudge, events.clone())));
            }
        }
    }
}

fn apply(state: &mut State, event: Event) {
    match event {
        Event::Answer(server, answer) => state.handle_answer(server, answer),
        Event::Told(message) => state.message = Some(message),
    }
}

/// Keys, and changes of the terminal's size, from a thread that may wait for them. It ends soon after nobody listens.
fn read_inputs() -> Receiver<io::Result<Input>> {
    let (sender, receiver) = channel(WAITING);
    drop(tokio::task::spawn_blocking(move || {
        while !sender.is_closed() {
            let input = match event::poll(LOOK) {
                Ok(false) => continue,
                Ok(true) => event::read(),
                Err(error) => Err(error),
            };
            let is_over = input.is_err();
            if sender.blocking_send(input).is_err() || is_over {
                return;
            }
        }
    }));
    receiver
}
