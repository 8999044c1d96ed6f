//! What a server's processes cost, as the kernel counts it.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use headwater::clock;
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

/// A process and its descendants: nbd-server has one for each client.
pub fn family(root: u32) -> Vec<u32> {
    let parents: Vec<(u32, u32)> = numbers(Path::new("/proc"))
        .into_iter()
        .filter_map(|pid| Some((pid, fields(pid).ok()?.get(PARENT)?.parse().ok()?)))
        .collect();
    let mut family = vec![root];
    let mut at = 0;
    while let Some(&parent) = family.get(at) {
        family.extend(parents.iter().filter(|(_, of)| *of == parent).map(|(pid, _)| *pid));
        at += 1;
    }
    family
}

// Positions in /proc/PID/stat behind the command's name, which may have blanks in it.
const PARENT: usize = 1;
const USER: usize = 11;
const SYSTEM: usize = 12;
const USER_OF_CHILDREN: usize = 13;
const SYSTEM_OF_CHILDREN: usize = 14;

fn fields(pid: u32) -> anyhow::Result<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("there is no process {pid}"))?;
    let (_, rest) = text.rsplit_once(')').context("/proc/PID/stat has no command")?;
    Ok(rest.split_whitespace().map(str::to_owned).collect())
}

/// The entries of a directory that are numbers.
fn numbers(directory: &Path) -> Vec<u32> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()).collect()
}

/// What a server has used until now.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    /// Clock ticks in user and in kernel mode, with those of children that have ended.
    user: u64,
    system: u64,
    tasks: BTreeMap<u32, Task>,
}

#[derive(Debug, Clone, Copy)]
struct Task {
    /// Where the kernel keeps schedstat; finer than ticks.
    nanoseconds: Option<u64>,
    voluntary: u64,
    involuntary: u64,
}

impl Sample {
    /// Looks at a process and its descendants.
    pub fn take(root: u32) -> anyhow::Result<Self> {
        let mut sample = Self::default();
        // The root must be there; its children may be on their way out.
        fields(root)?;
        for pid in family(root) {
            if let Ok(fields) = fields(pid) {
                let ticks = |index: usize| fields.get(index).and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
                sample.user += ticks(USER) + ticks(USER_OF_CHILDREN);
                sample.system += ticks(SYSTEM) + ticks(SYSTEM_OF_CHILDREN);
            }
            let directory = format!("/proc/{pid}/task");
            for task in numbers(Path::new(&directory)) {
                sample.tasks.insert(task, Task::take(&format!("{directory}/{task}")));
            }
        }
        Ok(sample)
    }

    /// What was used between `earlier` and this.
    pub fn since(&self, earlier: &Self) -> Usage {
        let per_second = rustix::param::clock_ticks_per_second();
        let seconds = |ticks: u64| to_f64(ticks) / to_f64(per_second);
        let (user, system) =
            (seconds(self.user.saturating_sub(earlier.user)), seconds(self.system.saturating_sub(earlier.system)));
        let mut usage = Usage { cpu_seconds: user + system, user_share: share(user, system), ..Usage::default() };
        let mut nanoseconds = Some(0);
        for (id, task) in &self.tasks {
            let before = earlier.tasks.get(id).copied().unwrap_or(Task::NEW);
            usage.voluntary_switches += task.voluntary.saturating_sub(before.voluntary);
            usage.involuntary_switches += task.involuntary.saturating_sub(before.involuntary);
            let used = task.nanoseconds.zip(before.nanoseconds).map(|(now, before)| now.saturating_sub(before));
            nanoseconds = nanoseconds.zip(used).map(|(sum, used)| sum + used);
        }
        // A thread that has ended took its nanoseconds with it, but its ticks are still in the process's: then these
        // say clearly more. (Both may be a tick off.)
        let clearly_more = seconds(2);
        if let Some(precise) = nanoseconds.map(|sum| to_f64(sum) / 1e9)
            && precise + clearly_more >= usage.cpu_seconds
        {
            usage.cpu_seconds = precise;
        }
        usage
    }
}

impl Task {
    /// One that has used nothing yet.
    const NEW: Self = Self { nanoseconds: Some(0), voluntary: 0, involuntary: 0 };

    fn take(directory: &str) -> Self {
        let status = fs::read_to_string(format!("{directory}/status")).unwrap_or_default();
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key));
            line.and_then(|rest| rest.trim().parse().ok()).unwrap_or(0)
        };
        let schedstat = fs::read_to_string(format!("{directory}/schedstat")).ok();
        Self {
            nanoseconds: schedstat.and_then(|text| text.split_whitespace().next()?.parse().ok()),
            voluntary: number("voluntary_ctxt_switches:"),
            involuntary: number("nonvoluntary_ctxt_switches:"),
        }
    }
}

/// What a server has used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// CPU time.
    pub cpu_seconds: f64,
    /// The part of it in user mode, from 0 to 1.
    pub user_share: f64,
    /// Times that a thread waited.
    pub voluntary_switches: u64,
    /// Times that a thread had to let others run.
    pub involuntary_switches: u64,
}

fn share(part: f64, rest: f64) -> f64 {
    if part + rest > 0.0 { part / (part + rest) } else { 0.0 }
}

/// A count as a figure to divide by.
#[expect(clippy::cast_precision_loss, reason = "2^53 of anything is more than is counted here")]
pub fn to_f64(number: u64) -> f64 {
    number as f64
}

/// perf, counting the system calls of a server.
#[derive(Debug)]
pub(crate) struct SystemCalls {
    perf: Child,
}

const EVENT: &str = "raw_syscalls:sys_enter";
/// How long perf may take to attach.
const ATTACH: Duration = Duration::from_secs(5);

impl SystemCalls {
    /// Begins to count, also in threads and children that are yet to come.
    pub(crate) fn start(root: u32) -> anyhow::Result<Self> {
        let family = family(root);
        let threads: usize = family.iter().map(|pid| numbers(Path::new(&format!("/proc/{pid}/task"))).len()).sum();
        let list = family.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut command = Command::new("perf");
        command.args(["stat", "-x", ",", "-e", EVENT, "-p", &list]);
        let perf = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let mut counter = Self { perf: perf.context("perf cannot be run")? };
        let deadline = clock::now() + ATTACH;
        while counter.attached() < threads {
            if counter.perf.try_wait()?.is_some() {
                bail!("perf: {}", counter.rest()?.lines().next().unwrap_or("ended without a word"));
            }
            if clock::now() > deadline {
                bail!("perf does not attach");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(counter)
    }

    /// Threads that are counted: perf has a descriptor for each.
    fn attached(&self) -> usize {
        let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", self.perf.id())) else { return 0 };
        let links = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.filter(|link| link.to_string_lossy().contains("perf_event")).count()
    }

    fn rest(&mut self) -> anyhow::Result<String> {
        let stderr = self.perf.stderr.take().context("perf's messages were read already")?;
        Ok(std::io::read_to_string(stderr)?)
    }

    /// Ends, and gives the count.
    pub(crate) fn finish(mut self) -> anyhow::Result<u64> {
        rustix::process::kill_process(Pid::from_child(&self.perf), Signal::INT)?;
        let text = self.rest()?;
        self.perf.wait()?;
        parse_perf(&text).with_context(|| format!("perf: {}", text.trim()))
    }
}

impl Drop for SystemCalls {
    fn drop(&mut self) {
        // It has ended already, unless something else failed.
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}

/// The count in perf's lines of comma separated values.
fn parse_perf(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains(EVENT))?;
    line.split(',').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_that_works_is_seen_to() {
        let me = std::process::id();
        let before = Sample::take(me).unwrap();
        let mut sum = 0u64;
        let start = clock::now();
        while start.elapsed() < Duration::from_millis(100) {
            sum = sum.wrapping_add(crate::pattern::mix(sum));
        }
        assert_ne!(sum, 1);
        let usage = Sample::take(me).unwrap().since(&before);
        assert!(usage.cpu_seconds > 0.0, "{usage:?}");
        assert!((0.0..=1.0).contains(&usage.user_share), "{usage:?}");
    }

    #[test]
    fn threads_that_have_ended_count_too() {
        let sample = |user, nanoseconds: &[u64]| {
            let task = |nanoseconds: &u64| Task { nanoseconds: Some(*nanoseconds), ..Task::NEW };
            Sample { user, system: 0, tasks: (0..).zip(nanoseconds.iter().map(task)).collect() }
        };
        let per_second = rustix::param::clock_ticks_per_second();
        let begin = sample(0, &[0]);
        let fine = sample(per_second, &[1_003_000_000]).since(&begin).cpu_seconds;
        assert!((fine - 1.003).abs() < 1e-9, "{fine}");
        let with_an_ended_one = sample(per_second, &[3_000_000]).since(&begin).cpu_seconds;
        assert!((with_an_ended_one - 1.0).abs() < 1e-9, "{with_an_ended_one}");
    }

    #[test]
    fn children_belong_to_the_family() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let family = family(std::process::id());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(family.contains(&child.id()));
    }

    #[test]
    fn a_process_that_is_not_there_is_an_error() {
        let error = Sample::take(u32::MAX / 2).unwrap_err();
        assert!(error.to_string().starts_with("there is no process"), "{error}");
    }

    #[test]
    fn what_perf_says_is_understood() {
        assert_eq!(parse_perf("1234,,raw_syscalls:sys_enter,5,100.00,,\n"), Some(1234));
        assert_eq!(parse_perf("<not supported>,,raw_syscalls:sys_enter,0,0.00,,\n"), None);
        assert_eq!(parse_perf("Error: no access"), None);
    }
}
