//! The `headwater` program; see the library for everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    headwater::cli::run()
}
