//! What `headwater mirror` fetches ahead of demand.

use clap::{Args, ValueEnum};

use super::{positive_size, size};
use crate::fill::engine::Rates;
use crate::fill::{DEFAULT_READAHEAD, Mode, Settings};
use crate::units::ByteSize;

#[derive(Debug, Args)]
#[command(next_help_heading = "Filling ahead of demand")]
pub(in crate::cli) struct Fill {
    /// What is fetched before a client asks for it.
    #[arg(long, value_enum, default_value = "ahead")]
    fill: FillMode,
    /// How far ahead of a client that reads in order chunks are fetched, at most; 0: not at all.
    #[arg(long, value_name = "SIZE", default_value_t = ByteSize(DEFAULT_READAHEAD), value_parser = byte_size)]
    readahead: ByteSize,
    /// Bytes per second of all that is fetched ahead of demand. What clients wait for is never slowed down.
    /// [default: what the link takes]
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    fill_rate: Option<u64>,
    /// The same for each image. [default: no limit of its own]
    #[arg(long, value_name = "SIZE", value_parser = positive_size)]
    image_fill_rate: Option<u64>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum FillMode {
    /// Nothing but what is ordered with headwater prefetch
    None,
    /// What clients are about to read: readahead, and what clients read before when they started
    Ahead,
    /// That, and then the rest of each image, when clients leave the link to it
    Background,
}

impl Fill {
    pub(in crate::cli) fn settings(&self) -> Settings {
        let mode = match self.fill {
            FillMode::None => Mode::None,
            FillMode::Ahead => Mode::Ahead,
            FillMode::Background => Mode::Background,
        };
        let rates = Rates { server: self.fill_rate, image: self.image_fill_rate };
        Settings { mode, readahead: self.readahead.0, rates }
    }
}

fn byte_size(text: &str) -> Result<ByteSize, String> {
    size(text).map(ByteSize)
}
