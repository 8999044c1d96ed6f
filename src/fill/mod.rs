//! What is fetched ahead of demand: which chunks, how urgently, from where, under which budget.
//!
//! | file | holds |
//! | --- | --- |
//! | [`readahead`] | where one client's reads lead to (pure) |
//! | [`window`] | how many bytes may be under way without being felt (pure) |
//! | [`deadline`] | which of several orders goes first, and which will be late (pure) |
//! | [`profile`] | what clients read in earlier runs: recording, merging, keeping, handing on |
//! | [`orders`] | what operators ordered; durable |
//!
//! Owns: planning and pacing. Does not own: fetching, storing, states of chunks (`mirror`); orders' way here
//! (`control`).

pub mod deadline;
pub mod orders;
pub mod profile;
pub mod readahead;
pub mod window;
