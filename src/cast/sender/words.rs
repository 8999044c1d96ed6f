//! What a sender is told, and what it says to whoever moves its datagrams.

use std::time::Duration;

use super::super::ReceiverId;
use super::super::form::{Announce, Standing, Word};

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
    /// Send this now. Whoever paces waits as long as its bytes take at [`Sender::rate`](super::Sender::rate). Datagrams are numbered from 0 on
    /// in the order of these steps: reports say by their numbers what had been heard.
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
