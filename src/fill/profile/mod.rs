//! What clients of an image read in earlier runs, so that the next one need not wait for it.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Settings`], [`Tag`], the words |
//! | `spans` | maps from pages to values, as runs of pages (pure) |
//! | `weights` | [`Profile`]: what is learnt from runs, and what to fetch for the next (pure) |
//! | `form` | [`Profiles`] of one image, as bytes: in files and on the wire |
//! | `recording` | [`Recording`]: which pages clients touch, and when, in their first minute |
//! | `store` | [`Store`]: the profiles of one image in memory and in one file |
//! | `file` | that file, and what it takes of the disk |
//! | `inbox` | the export that takes runs from mirrors below |
//! | `kept` | [`Kept`]: an export with profile and inbox |
//! | `exchange` | [`Exchange`]: profiles from the upstream, runs to it |
//!
//! A *run* is what clients read from the moment they connected on, until nothing more was read for a while or the window
//! was over. Runs are told in pages of 4 KiB, whatever the chunks of the mirror that recorded them: whoever plays a
//! profile may have others. A *profile* is a weighted set of pages with the time of their first touch. The set counts;
//! the order is a hint: clones of one machine read the same, but not in the same order.
//!
//! Profiles are hints from strangers. A wrong one costs bytes that nobody needed, and nothing else: what is fetched
//! because of it is checked like anything else.
//!
//! Owns: recording, merging, keeping, handing on. Does not own: fetching what a profile wishes, and when.

mod exchange;
mod file;
mod form;
mod inbox;
mod kept;
mod recording;
mod spans;
mod store;
mod weights;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;

pub use exchange::{Exchange, fetch_profile, hand_up};
#[doc(hidden)]
pub use form::fuzz;
pub use form::{Foreign, FormatError, LARGEST, MOST_SPANS_IN_ALL, MOST_TAGS, Profiles, TooManyTags};
pub use kept::Kept;
pub use recording::{MOST_TOUCHES, Part, Recording, Run};
pub use store::{Refused, Store, profile_path};
pub use weights::{Merged, Profile, Tally, Weight};

/// Bytes of a page: the unit of profiles.
pub const PAGE: u64 = 4096;
/// Pages of one profile or one run: 4 GiB of the image. What was touched later is left out.
pub const MOST_PAGES: u64 = 1 << 20;
/// Runs of neighbouring pages of one profile or run; what was touched later is left out.
pub const MOST_SPANS: usize = 1 << 16;

/// The latest first touch that is told, in milliseconds: some 74 hours.
pub const LATEST_MS: u32 = (1 << 28) - 1;

/// How profiles are recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// How long after it has connected a client is watched; zero: nothing is recorded.
    pub window: Duration,
    /// A client that has read nothing for so long is not watched any further.
    pub idle: Duration,
    /// What runs are recorded as.
    pub tag: Tag,
}

impl Default for Settings {
    /// A minute covers the boot of a machine; who reads nothing for 15 s has booted.
    fn default() -> Self {
        Self { window: Duration::from_secs(60), idle: Duration::from_secs(15), tag: Tag::default() }
    }
}

/// Names a workload: 1 to 64 of the characters `A-Z a-z 0-9 . _ -`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(Box<str>);

/// Bytes of the longest tag.
pub const LONGEST_TAG: usize = 64;

/// Why a text is no tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("a tag has 1 to 64 letters, digits, dots, dashes and underscores")]
pub struct ParseTagError;

impl FromStr for Tag {
    type Err = ParseTagError;

    fn from_str(text: &str) -> Result<Self, ParseTagError> {
        let is_fine = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_tag = (1..=LONGEST_TAG).contains(&text.len()) && text.bytes().all(is_fine);
        if is_tag { Ok(Self(text.into())) } else { Err(ParseTagError) }
    }
}

impl Default for Tag {
    fn default() -> Self {
        Self("boot".into())
    }
}

impl Tag {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}
