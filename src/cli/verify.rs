//! `headwater verify`: images of running servers. Files are in `verify_file`.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use indicatif::ProgressBar;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::Verify;
use super::long_work;
use super::output;
use super::running::{block_on, find_image, reach};
use super::verify_file;
use crate::control::Client;
use crate::control::status::{JobState, JobStatus, VerifyOrder};

/// How often a job is looked at.
const LOOK: Duration = Duration::from_millis(200);
/// Damage was found, and all of it is repaired.
const REPAIRED: u8 = 3;
/// Damage was found, and remains.
pub(super) const DAMAGED: u8 = 4;

pub(super) fn run(arguments: Verify) -> anyhow::Result<ExitCode> {
    if arguments.server.at.is_none() && Path::new(&arguments.image).is_file() {
        return verify_file::run(arguments);
    }
    block_on(verify(arguments))
}

async fn verify(arguments: Verify) -> anyhow::Result<ExitCode> {
    let Verify { image, rate, no_repair, json, server, .. } = arguments;
    let client = reach(server).await?;
    // Before there is a job that it could leave behind.
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Says which images there are if this is none of them.
    find_image(&client, &image).await?;
    let job = client.verify(&image, &VerifyOrder { rate, repair: !no_repair }).await?;
    let end = follow(&client, job, &mut interrupt).await?;
    output::print(&if json { format!("{}\n", serde_json::to_string_pretty(&end)?) } else { report(&end) })?;
    match end.state {
        JobState::Done => Ok(exit_code(&end)),
        JobState::Cancelled => bail!("the check was called off before its end"),
        JobState::Failed => bail!("the check could not go on: {}", end.error.unwrap_or_default()),
        JobState::Running => bail!("the check goes on as job {job}"),
    }
}

/// Shows how a job gets on until it has ended, and gives its last status. The first SIGINT calls it off, the second
/// does not wait for that.
async fn follow(client: &Client, job: u64, interrupt: &mut Signal) -> anyhow::Result<JobStatus> {
    let mut interrupts = 0;
    let mut status = client.job(job).await?;
    let bar = bar(status.total_bytes)?;
    while status.state == JobState::Running && interrupts < 2 {
        bar.set_position(status.done_bytes);
        if status.damaged_chunks > 0 {
            bar.set_message(format!("{} damaged", status.damaged_chunks));
        }
        tokio::select! {
            () = tokio::time::sleep(LOOK) => status = client.job(job).await?,
            _ = interrupt.recv() => {
                interrupts += 1;
                status = client.cancel(job).await?;
            }
        }
    }
    bar.finish_and_clear();
    Ok(status)
}

pub(super) fn bar(total: u64) -> anyhow::Result<ProgressBar> {
    let bar = long_work::bar("{wide_bar} {binary_bytes} of {binary_total_bytes}, {eta} left {msg}")?;
    bar.set_length(total);
    Ok(bar)
}

fn report(status: &JobStatus) -> String {
    let JobStatus { image, checked_chunks, damaged_chunks, repaired_chunks, unrepaired_chunks, .. } = status;
    format!(
        "{image}: {checked_chunks} chunks checked, {damaged_chunks} damaged, {repaired_chunks} repaired, \
         {unrepaired_chunks} not repaired\n"
    )
}

fn exit_code(status: &JobStatus) -> ExitCode {
    let remaining = status.damaged_chunks.saturating_sub(status.repaired_chunks).max(status.unrepaired_chunks);
    match (status.damaged_chunks, remaining) {
        (0, 0) => ExitCode::SUCCESS,
        (_, 0) => REPAIRED.into(),
        _ => DAMAGED.into(),
    }
}
