//! The process, as the kernel sees it, by the names that the client libraries of Prometheus give it.
//!
//! Owns: reading `/proc`. What cannot be read is left out.

use std::fs;

use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

use super::names;
use super::text::Text;
use crate::units::to_u64;

/// What `/proc/self/stat` says.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    /// Of all threads, in ticks, in user mode and in the kernel.
    cpu: u64,
    threads: u64,
    /// In ticks since the machine started.
    started: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    /// Reads the form of proc_pid_stat(5).
    fn parse(text: &str) -> Option<Self> {
        // The name of the program stands in brackets, and may have spaces and brackets in it.
        let fields: Vec<_> = text[text.rfind(')')? + 1..].split_ascii_whitespace().collect();
        // The first of these is the third field.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu: field(14)?.checked_add(field(15)?)?,
            threads: field(20)?,
            started: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

/// When the machine started, in seconds since 1970, out of `/proc/stat`.
fn boot_time(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
}

/// Adds what is to be said of this process. Blocks.
pub(super) fn write(text: &mut Text) {
    let ticks = clock_ticks_per_second();
    let seconds = |count: u64| count as f64 / ticks as f64;
    let read = |path| fs::read_to_string(path).ok();
    if let Some(stat) = read("/proc/self/stat").and_then(|text| Stat::parse(&text)) {
        text.add(&names::PROCESS_CPU, &[], seconds(stat.cpu));
        text.add(&names::PROCESS_RESIDENT, &[], stat.resident_pages * to_u64(page_size()));
        text.add(&names::PROCESS_VIRTUAL, &[], stat.virtual_bytes);
        text.add(&names::PROCESS_THREADS, &[], stat.threads);
        if let Some(boot) = read("/proc/stat").and_then(|text| boot_time(&text)) {
            text.add(&names::PROCESS_START, &[], seconds(boot * ticks + stat.started));
        }
    }
    if let Ok(entries) = fs::read_dir("/proc/self/fd") {
        // One of them is the directory that is being read.
        text.add(&names::PROCESS_FDS, &[], to_u64(entries.count()).saturating_sub(1));
    }
    // Without a limit the kernel's own holds.
    if let Some(limit) = getrlimit(Resource::Nofile).current {
        text.add(&names::PROCESS_MAX_FDS, &[], limit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_confuses_nobody() {
        let text = "42 (a) b (c) S 1 42 42 0 -1 4194560 10 0 0 0 700 50 0 0 20 0 9 0 123456 4096000 250 184467\n";
        let stat = Stat { cpu: 750, threads: 9, started: 123_456, virtual_bytes: 4_096_000, resident_pages: 250 };
        assert_eq!(Stat::parse(text), Some(stat));
        assert_eq!(Stat::parse("42 (a) S 1"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn the_start_of_the_machine_is_found() {
        assert_eq!(boot_time("cpu 1 2 3\nbtime 1700000000\nprocesses 7\n"), Some(1_700_000_000));
        assert_eq!(boot_time("cpu 1 2 3\n"), None);
    }

    #[test]
    fn this_process_is_described() {
        let mut text = Text::default();
        write(&mut text);
        let text = text.into_string();
        for name in ["process_cpu_seconds_total ", "process_resident_memory_bytes ", "process_open_fds "] {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}: {text}"));
            assert!(line[name.len()..].parse::<f64>().unwrap() >= 0.0);
        }
    }
}
