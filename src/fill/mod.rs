//! What is fetched ahead of demand: which chunks, how urgently, from where, under which budget.
//!
//! | file | holds |
//! | --- | --- |
//! | [`engine`] | what leaves next, for all images of a server |
//! | [`image`] | what is to come of one image |
//! | [`client`] | an image as its clients get it: their reads are watched |
//! | [`peer`] | another mirror as a source |
//! | `tasks` | orders that are being carried out |
//! | `budget` | a byte rate |
//! | `calm` | whether clients leave the link to what can wait |
//! | [`readahead`] | where one client's reads lead to (pure) |
//! | [`window`] | how many bytes may be under way without being felt (pure) |
//! | [`deadline`] | which of several orders goes first, and which will be late (pure) |
//! | [`profile`] | what clients read in earlier runs: recording, merging, keeping, handing on |
//! | [`orders`] | what operators ordered; durable |
//!
//! Owns: planning and pacing. Does not own: fetching, storing, states of chunks (`mirror`); orders' way here
//! (`control`).

mod budget;
mod calm;
pub mod client;
pub mod deadline;
pub mod engine;
pub mod image;
pub mod orders;
pub mod peer;
pub mod profile;
pub mod readahead;
mod tasks;
pub mod window;

/// What is fetched ahead of demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Nothing but what is ordered.
    None,
    /// What clients are likely to read soon: readahead, profiles.
    #[default]
    Ahead,
    /// That, and then the rest of the image.
    Background,
}

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What is fetched.
    pub mode: Mode,
    /// Bytes that one reader's readahead is ahead of it, at most; 0: none.
    pub readahead: u64,
    /// How fast.
    pub rates: engine::Rates,
}

/// Enough for a reader of 10 Gbit/s and a server 10 ms away.
pub const DEFAULT_READAHEAD: u64 = 16 << 20;

impl Default for Settings {
    fn default() -> Self {
        Self { mode: Mode::default(), readahead: DEFAULT_READAHEAD, rates: engine::Rates::default() }
    }
}
