//! What was typed for a server, whatever it serves, and for the log.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tracing::level_filters::LevelFilter;

use super::{AccessRules, AdminChoice, Tls, seconds};
use crate::control::AdminAddress;
use crate::disk::Preference;
use crate::net::ListenAddress;
use crate::telemetry::LogFormat;

/// What all servers have.
#[derive(Debug, Args)]
pub(in crate::cli) struct Daemon {
    /// Listen on a TCP address (repeatable): ADDR, ADDR:PORT, [IPV6]:PORT, or :PORT for all addresses. Without --listen,
    /// --unix and sockets from systemd it is 127.0.0.1:10809.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(in crate::cli) listen: Vec<ListenAddress>,
    /// Listen on a unix socket (repeatable).
    #[arg(long, value_name = "PATH")]
    pub(in crate::cli) unix: Vec<PathBuf>,
    /// Threads that serve clients. [default: one for each CPU]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub(in crate::cli) workers: Option<u16>,
    /// Clients at the same time; more wait until one leaves.
    #[arg(long, value_name = "N", default_value = "16384", value_parser = clap::value_parser!(u32).range(1..))]
    pub(in crate::cli) max_connections: u32,
    /// How long a client may take to negotiate.
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub(in crate::cli) handshake_timeout: Duration,
    /// Where `headwater status` and the like reach this server: the path of a unix socket, ADDR:PORT with --admin-token,
    /// or none. [default: PID.sock in the runtime directory, such as /run/headwater]
    #[arg(long, value_name = "ADDR")]
    pub(in crate::cli) admin: Option<AdminChoice>,
    /// What whoever reaches --admin ADDR:PORT must show: a file with 16 bytes or more that only its owner may read.
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) admin_token: Option<PathBuf>,
    /// Other servers of the same tree, which the status page shows beside this one: their --admin addresses, with commas
    /// between them.
    #[arg(long, value_name = "ADMIN,...", value_delimiter = ',')]
    pub(in crate::cli) neighbours: Vec<AdminAddress>,
    /// What the neighbours with TCP addresses are shown. [default: the file of --admin-token]
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) neighbours_token: Option<PathBuf>,
    /// Take over from a running server, whose clients stay connected: they notice a pause. It is named by the number of
    /// its process or the path of its socket; left out, it is the only one that runs. If this server cannot start, that
    /// one goes on.
    #[arg(long, value_name = "PID|PATH", num_args = 0..=1, require_equals = true)]
    pub(in crate::cli) takeover: Option<Option<PathBuf>>,
    /// How files are read and written: io_uring where the kernel allows it, or threads.
    #[arg(long, value_enum, default_value = "auto")]
    pub(in crate::cli) disk_io: DiskIo,
    #[command(flatten)]
    pub(in crate::cli) tls: Tls,
    /// Take what is not typed from a file: TOML, with the names of these flags as keys (headwater check-config).
    /// SIGHUP has it read again.
    #[arg(long, value_name = "FILE")]
    pub(in crate::cli) config: Option<PathBuf>,
    #[command(flatten)]
    pub(in crate::cli) access: AccessRules,
}

#[derive(Debug, Args)]
pub(in crate::cli) struct Logging {
    /// How much to log, to the standard error stream.
    #[arg(long, global = true, value_enum, default_value = "info", help_heading = "Logging")]
    log_level: Level,
    /// How log lines look. [default: text on a terminal, else json]
    #[arg(long, global = true, value_enum, help_heading = "Logging")]
    log_format: Option<LogFormatArgument>,
}

impl Logging {
    pub(in crate::cli) fn level(&self) -> LevelFilter {
        match self.log_level {
            Level::Off => LevelFilter::OFF,
            Level::Error => LevelFilter::ERROR,
            Level::Warn => LevelFilter::WARN,
            Level::Info => LevelFilter::INFO,
            Level::Debug => LevelFilter::DEBUG,
        }
    }

    pub(in crate::cli) fn format(&self) -> Option<LogFormat> {
        self.log_format.map(|format| match format {
            LogFormatArgument::Text => LogFormat::Text,
            LogFormatArgument::Json => LogFormat::Json,
        })
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Level {
    Off,
    Error,
    Warn,
    Info,
    Debug,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormatArgument {
    Text,
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(in crate::cli) enum DiskIo {
    /// io_uring, or threads with a warning.
    Auto,
    /// io_uring or nothing.
    Uring,
    /// Threads.
    Threads,
}

impl From<DiskIo> for Preference {
    fn from(choice: DiskIo) -> Self {
        match choice {
            DiskIo::Auto => Self::Auto,
            DiskIo::Uring => Self::Uring,
            DiskIo::Threads => Self::Threads,
        }
    }
}
