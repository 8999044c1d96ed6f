//! The `load` program; see the library for everything.

use std::process::ExitCode;

fn main() -> ExitCode {
    load::main(std::env::args_os())
}
