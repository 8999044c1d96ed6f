//! Work that takes long, on this machine: calling it off, and showing how it gets on.

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{SignalKind, signal};

use super::running::block_on;

/// Runs `work` on a thread of its own, and tells it when SIGINT or SIGTERM has come: from then on what it is given is
/// true. Its end is waited for.
pub(super) fn run<T: Send + 'static>(
    work: impl FnOnce(&AtomicBool) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let cancel = Arc::new(AtomicBool::new(false));
    block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let told = Arc::clone(&cancel);
        let mut work = tokio::task::spawn_blocking(move || work(&told));
        loop {
            tokio::select! {
                result = &mut work => return result.context("the thread that worked has died")?,
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            cancel.store(true, Ordering::Relaxed);
        }
    })
}

/// Whether somebody sees progress bars.
pub(super) fn is_seen() -> bool {
    io::stderr().is_terminal()
}

/// A progress bar in this form, on the standard error stream. Invisible where nobody is there to see it.
pub(super) fn bar(template: &str) -> anyhow::Result<ProgressBar> {
    if !is_seen() {
        return Ok(ProgressBar::hidden());
    }
    Ok(ProgressBar::no_length().with_style(ProgressStyle::with_template(template)?))
}
