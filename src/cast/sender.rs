//! Which datagram is next, and what is sent again.
//!
//! STUB

use std::sync::Arc;
use std::time::Duration;

use super::ReceiverId;
use super::form::{Announce, Report, Standing, Terms, Word};
use super::layout::Layout;

/// How much parity is sent before anybody asks for it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Repair {
    /// As the losses that receivers report make sensible.
    Auto,
    /// So many per cent of the data.
    Percent(f64),
}

/// What an operator may set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Bytes of datagrams per second, at most.
    pub rate: u64,
    /// A receiver that cannot take so many is dropped.
    pub min_rate: u64,
    /// Parity.
    pub repair: Repair,
    /// Receivers to wait for before anything is sent.
    pub wait_for: u32,
    /// How long to wait for them at most; then it begins with those that are there, or ends if there are none.
    pub patience: Duration,
    /// Whether it goes on until it is called off, sending what late receivers lack.
    pub carousel: bool,
}

/// What to do next.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Send this now. Whoever paces waits as long as its bytes take at [`Sender::rate`].
    Send(Packet),
    /// Nothing before that time, unless a report comes.
    Wait(Duration),
    /// It is over.
    Ended,
}

/// A datagram to be sent.
#[derive(Debug, Clone, PartialEq)]
pub enum Packet {
    /// Of this session.
    Announce(Announce),
    /// A page of the plan, by its number.
    Page(u16),
    /// A symbol.
    Symbol {
        /// The block.
        block: u32,
        /// The symbol in it.
        index: u16,
    },
    /// For everybody.
    Word(Word),
}

/// One receiver as the sender knows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    /// Who.
    pub receiver: ReceiverId,
    /// What it last said it is about; `None`: it has fallen silent or was dropped.
    pub standing: Option<Standing>,
    /// Whether the sender has dropped it.
    pub dropped: bool,
    /// Blocks that it has.
    pub done: u32,
    /// The part of the datagrams that did not come, lately.
    pub loss: f64,
    /// When it was heard last.
    pub heard: Duration,
}

/// How far a session is.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Blocks of the first pass whose symbols have all been sent.
    pub passed: u32,
    /// Symbols sent, of data the first time.
    pub data: u64,
    /// Parity symbols sent before anybody asked.
    pub parity: u64,
    /// Symbols sent because somebody asked.
    pub repairs: u64,
    /// All receivers ever heard, at most [`MOST_LISTENERS`].
    pub listeners: Vec<Listener>,
    /// Whether all receivers that are left have everything.
    pub is_complete: bool,
}

/// Receivers that are known one by one; more are served, and not waited for.
pub const MOST_LISTENERS: usize = 4096;

/// The sender of one session. Times are since it was made.
#[derive(Debug)]
pub struct Sender;

impl Sender {
    /// A session that sends `layout`. The same `seed` gives the same choices.
    pub fn new(layout: Arc<Layout>, terms: Terms, settings: Settings, seed: u64) -> Self {
        let _ = (layout, terms, settings, seed);
        unimplemented!()
    }

    /// What to do now.
    pub fn step(&mut self, now: Duration) -> Step {
        let _ = now;
        unimplemented!()
    }

    /// A receiver has reported.
    pub fn report(&mut self, now: Duration, report: &Report) {
        let _ = (now, report);
        unimplemented!()
    }

    /// Ends the session: receivers fetch what they lack from their upstreams.
    pub fn cancel(&mut self) {
        unimplemented!()
    }

    /// Bytes of datagrams per second, now.
    pub fn rate(&self) -> u64 {
        unimplemented!()
    }

    /// The blocks whose symbols are sent now or next, soonest first, at most `2 * DEPTH`: to be read ahead. What is not
    /// among them any more can be forgotten.
    pub fn window(&self) -> Vec<u32> {
        unimplemented!()
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        unimplemented!()
    }
}
