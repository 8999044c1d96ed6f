//! `headwater redirect`: at a server, at the monitor of a virtual machine, or at a device of the kernel.

pub(super) mod args;
mod device;
mod qmp;
mod server;

use std::process::ExitCode;

use args::Redirect;
pub(super) use server::{in_words, table};

pub(super) fn run(arguments: Redirect) -> anyhow::Result<ExitCode> {
    if !arguments.qmp.is_empty() {
        qmp::run(arguments)
    } else if !arguments.device.is_empty() {
        device::run(arguments)
    } else {
        server::run(arguments)
    }
}
