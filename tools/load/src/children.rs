//! Processes that end with us, however we end.
//!
//! A child is killed with all its descendants when its guard is dropped, and by the kernel when this process dies
//! (`setpriv --pdeathsig`). Ctrl-C and SIGTERM kill whatever descends from us, and the main thread tidies up.

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::process::family;
use anyhow::Context;
use rustix::process::{Pid, Signal};
use tokio::signal::unix::{SignalKind, signal};

/// Which CPUs a child may use, as `taskset` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cpus {
    /// The last one: what server and client need together decides.
    One,
    /// All of them.
    Free,
}

impl Cpus {
    fn list(self) -> String {
        let last = std::thread::available_parallelism().map_or(0, |count| count.get() - 1);
        match self {
            Self::One => last.to_string(),
            Self::Free => format!("0-{last}"),
        }
    }
}

/// A command that ends with us, on some CPUs.
pub fn command(cpus: Cpus, program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "taskset", "-c", &cpus.list()]).arg(program).stdin(Stdio::null());
    command
}

/// A running child.
#[derive(Debug)]
pub struct Guard {
    child: Child,
}

impl Guard {
    /// Starts a child whose messages go to the file `log`.
    pub fn spawn(mut command: Command, log: &Path) -> anyhow::Result<Self> {
        let log = File::options().create(true).append(true).open(log)?;
        command.stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        Ok(Self { child })
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit status, if it has ended.
    pub fn ended(&mut self) -> anyhow::Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        kill(&family(self.child.id()));
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kill(processes: &[u32]) {
    for pid in processes {
        if let Some(pid) = i32::try_from(*pid).ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// Whether somebody wants us to stop.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// From now on, Ctrl-C and SIGTERM kill all children, so that whoever waits for one wakes up and looks here.
    pub fn on_signals() -> anyhow::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut interrupt, mut terminate) = {
            let _guard = runtime.enter();
            (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
        };
        let stop = Self::default();
        let told = stop.clone();
        let wait = move || loop {
            runtime.block_on(async {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            });
            told.0.store(true, Ordering::Relaxed);
            let own = std::process::id();
            kill(&family(own).into_iter().filter(|pid| *pid != own).collect::<Vec<_>>());
        };
        std::thread::Builder::new().name("signals".into()).spawn(wait).context("starting a thread")?;
        Ok(stop)
    }

    /// Whether somebody does.
    pub fn is_wanted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_child_and_its_children_end_with_their_guard() {
        let directory = tempfile::tempdir().unwrap();
        let mut command = command(Cpus::Free, "sh");
        command.args(["-c", "sleep 300 & sleep 300"]);
        let guard = Guard::spawn(command, &directory.path().join("log")).unwrap();
        let deadline = headwater::clock::now() + Duration::from_secs(20);
        while family(guard.pid()).len() < 3 {
            assert!(headwater::clock::now() < deadline, "the children do not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        let grandchildren = family(guard.pid());
        drop(guard);
        for pid in grandchildren {
            // Killed is not ended yet, and what nobody has waited for is a zombie.
            let state = || std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            while !(state().is_empty() || state().contains(") Z ") || state().contains(") X ")) {
                assert!(headwater::clock::now() < deadline, "{}", state());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}
