//! Which running servers a command is for, and what they want to see.

use std::path::PathBuf;

use clap::Args;

use crate::control::AdminAddress;

/// Which server is meant.
#[derive(Debug, Clone, Args)]
pub(in crate::cli) struct RunningServer {
    /// The server's --admin address, a path or HOST:PORT. [default: the only server that runs here]
    #[arg(long, value_name = "ADDR")]
    pub(in crate::cli) at: Option<AdminAddress>,
    #[command(flatten)]
    pub(in crate::cli) token: TokenFile,
}

/// What servers on TCP want to see.
#[derive(Debug, Clone, Default, Args)]
pub(in crate::cli) struct TokenFile {
    /// The file with the --admin-token of servers that are reached by TCP. [default: $HEADWATER_TOKEN_FILE]
    #[arg(id = "token", long, value_name = "FILE")]
    pub(in crate::cli) file: Option<PathBuf>,
}

/// Which servers are meant.
#[derive(Debug, Clone, Args)]
pub(in crate::cli) struct Servers {
    /// The servers' --admin addresses, with commas between them. [default: all servers that run here]
    #[arg(long, value_name = "ADDR,...", value_delimiter = ',')]
    pub(in crate::cli) servers: Vec<AdminAddress>,
    #[command(flatten)]
    pub(in crate::cli) token: TokenFile,
}
