//! Why a chunk is fetched.

use std::fmt;

/// Why a chunk is fetched. All but [`Cause::Demand`] are *ahead of demand*.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Cause {
    /// A client waits for it.
    Demand = 0,
    /// A client reads in a way that leads there.
    Readahead = 1,
    /// Clients read it in earlier runs.
    Profile = 2,
    /// An operator, or a client, ordered it.
    Prefetch = 3,
    /// The image is being completed.
    Background = 4,
    /// It was sent to all who hear.
    Multicast = 5,
}

impl Cause {
    /// All of them, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Demand, Self::Readahead, Self::Profile, Self::Prefetch, Self::Background, Self::Multicast];

    /// All but demand.
    pub const AHEAD: [Self; 5] = [Self::Readahead, Self::Profile, Self::Prefetch, Self::Background, Self::Multicast];

    /// Its name in figures: lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Readahead => "readahead",
            Self::Profile => "profile",
            Self::Prefetch => "prefetch",
            Self::Background => "background",
            Self::Multicast => "multicast",
        }
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
