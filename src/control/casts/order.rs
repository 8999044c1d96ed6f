//! What is said of casts over the admin API, as types that the server writes and the command line reads.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::control::status::Range;

/// `POST /v1/images/NAME/cast`. Of `ranges`, `profile` and `all` at most one; none of them means all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CastOrder {
    /// Where to: `GROUP:PORT`; `null` for one that is made of the identity of the image.
    pub group: Option<String>,
    /// The interface that it leaves by: its name, or an address of it.
    pub interface: Option<String>,
    /// Routers that may forward it; `null` for 1: none does.
    pub ttl: Option<u8>,
    /// Bytes of the longest packet that the path takes; `null`: what the interface takes.
    pub mtu: Option<u16>,
    /// Which parts.
    pub ranges: Option<Vec<Range>>,
    /// What earlier runs read: the tag of a profile.
    pub profile: Option<String>,
    /// All of it.
    pub all: bool,
    /// Bytes per second of datagrams, at most; `null` for 12 MiB.
    pub rate: Option<u64>,
    /// A receiver that cannot take so many is dropped; `null` for a quarter of `rate`.
    pub min_rate: Option<u64>,
    /// Parity that is sent before anybody asks for it, in per cent of the data; `null`: as losses make sensible.
    pub repair_percent: Option<f64>,
    /// Receivers to wait for; `null`: as many as are told, one at least.
    pub wait_for: Option<u32>,
    /// How long; `null` for 5 s, or 300 s if `wait_for` is given.
    pub patience_seconds: Option<f64>,
    /// Whether it goes on until it is called off, for late receivers.
    pub carousel: bool,
    /// The time of day when it is to be everywhere: seconds since 1970.
    pub deadline: Option<f64>,
    /// Or how long from now.
    pub deadline_seconds: Option<f64>,
    /// Whether mirrors are left untold: then only those receive it that hear the group already.
    pub no_tell: bool,
}

/// The answer to it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CastTaken {
    /// The number of the cast.
    pub cast: u64,
    /// The session, as receivers know it.
    pub session: String,
    /// Where to.
    pub group: String,
    /// Bytes of the image that are to be sent.
    pub total_bytes: u64,
    /// Receivers that it waits for.
    pub wait_for: u32,
    /// Bytes of datagrams per second, at most.
    pub rate: u64,
    /// By how much it will miss its deadline at that rate, if it will.
    pub late_by_seconds: Option<f64>,
}

/// `GET /v1/casts`: those at work and the last that ended, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CastList {
    /// Each of them.
    pub casts: Vec<CastStatus>,
}

/// `GET /v1/casts/N`: one cast.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CastStatus {
    /// Its number.
    pub cast: u64,
    /// The session, as receivers know it.
    pub session: String,
    /// The image.
    pub image: String,
    /// Where to.
    pub group: String,
    /// How far it is.
    pub state: CastState,
    /// Bytes of the image that it is for.
    pub total_bytes: u64,
    /// Bytes of all datagrams so far.
    pub sent_bytes: u64,
    /// Symbols of data sent, the first time.
    pub data_symbols: u64,
    /// Parity symbols sent before anybody asked.
    pub parity_symbols: u64,
    /// Symbols sent because a receiver asked.
    pub repair_symbols: u64,
    /// Bytes of a symbol.
    pub symbol_bytes: u64,
    /// Bytes of datagrams per second, now.
    pub rate: u64,
    /// Blocks of the image, and those that were sent once.
    pub blocks: u32,
    /// Blocks that were sent once.
    pub passed_blocks: u32,
    /// How long it has lasted.
    pub seconds: f64,
    /// When it is to be everywhere: seconds since 1970.
    pub deadline: Option<f64>,
    /// By how much it has missed that.
    pub late_by_seconds: Option<f64>,
    /// Reports that could not be believed.
    pub malformed: u64,
    /// Who receives it, as far as the sender has heard.
    pub receivers: Vec<ReceiverStatus>,
    /// Why it failed.
    pub error: Option<String>,
}

impl CastStatus {
    /// Whether nothing more will come of it.
    pub const fn is_over(&self) -> bool {
        matches!(self.state, CastState::Done | CastState::Cancelled | CastState::Failed)
    }

    /// Whether everybody who took part has everything.
    pub fn is_complete(&self) -> bool {
        self.state == CastState::Done
            && !self.receivers.is_empty()
            && self.receivers.iter().all(|receiver| receiver.state == ReceiverState::Complete)
    }
}

/// How far a cast is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum CastState {
    /// It waits for receivers.
    #[default]
    Waiting,
    /// Blocks are sent.
    Sending,
    /// Everything was sent; what was lost is sent again.
    Ending,
    /// It is over.
    Done,
    /// It was called off.
    Cancelled,
    /// It could not go on.
    Failed,
}

impl CastState {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Sending => "sending",
            Self::Ending => "ending",
            Self::Done => "done",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
        }
    }
}

/// One receiver of a cast.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ReceiverStatus {
    /// The name of the mirror's cache.
    pub receiver: String,
    /// Where its reports come from.
    pub address: String,
    /// What it is about.
    pub state: ReceiverState,
    /// Blocks that it has.
    pub done_blocks: u32,
    /// The part of the datagrams that did not reach it, lately.
    pub loss: f64,
    /// When it was heard last.
    pub heard_seconds_ago: f64,
}

/// What a receiver is about.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReceiverState {
    /// It takes part.
    #[default]
    Receiving,
    /// It has everything.
    Complete,
    /// It has left, and fetches the rest from its upstream.
    Left,
    /// The sender has dropped it, because it was too slow; it fetches the rest from its upstream.
    Dropped,
    /// It has not been heard for long.
    Silent,
}

impl ReceiverState {
    /// The word for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Receiving => "receiving",
            Self::Complete => "complete",
            Self::Left => "left",
            Self::Dropped => "dropped",
            Self::Silent => "silent",
        }
    }
}

/// A group that a mirror hears.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ReceptionStatus {
    /// The group.
    pub group: String,
    /// The interface by which it is heard; `null`: that of the route to the group.
    pub interface: Option<String>,
    /// Bytes of all datagrams.
    pub bytes: u64,
    /// Datagrams that are none of ours, or of images that are not mirrored here.
    pub foreign: u64,
    /// Those with a wrong tag.
    pub forged: u64,
    /// Those that were malformed.
    pub broken: u64,
    /// Those that the system threw away because they were not taken in time.
    pub overflowed: u64,
    /// What came of the sessions that were heard.
    pub sessions: Vec<HeardStatus>,
}

/// A session that a mirror has heard.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct HeardStatus {
    /// The session.
    pub session: String,
    /// The image, by its name here.
    pub image: String,
    /// `receiving`, `complete`, `lacking` (the rest is fetched from the upstream), or `abandoned` (the same, because
    /// nothing was heard any more).
    pub state: String,
    /// Blocks that are here.
    pub done_blocks: u32,
    /// All blocks.
    pub blocks: u32,
    /// Bytes of symbols that were kept.
    pub kept_bytes: u64,
    /// Symbols that were here already.
    pub skipped: u64,
    /// Blocks in which something was lost and that were made whole.
    pub mended: u64,
    /// Blocks whose bytes were not those of the image.
    pub wrong: u64,
}
