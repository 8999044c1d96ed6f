//! Real virtual machines, emulated by qemu: how long one takes to boot, and what it reads.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use headwater::clock;
use load::children::{self, Cpus, Guard};

use crate::servers::wait_for_line;
use crate::{Lab, tell};

/// What is booted. By default the small Debian that `tools/try` makes.
#[derive(Debug, Clone, Args)]
pub(crate) struct Machine {
    /// The image.
    #[arg(long, value_name = "FILE", default_value = "target/try/image.raw")]
    pub(crate) image: PathBuf,
    /// A kernel to boot directly; `none` for an image that boots by itself.
    #[arg(long, value_name = "FILE", default_value = "target/try/vmlinuz")]
    kernel: PathBuf,
    /// Its initial file system.
    #[arg(long, value_name = "FILE", default_value = "target/try/initrd")]
    initrd: PathBuf,
    /// Its command line.
    #[arg(long, default_value = "root=/dev/vda rw console=ttyS0 quiet panic=-1 systemd.random_seed=0")]
    append: String,
    /// What the machine says on its serial line when it is up.
    #[arg(long, value_name = "TEXT", default_value = "try: the machine is up")]
    up: String,
    /// Memory in MiB.
    #[arg(long, default_value_t = 512)]
    memory: u32,
}

impl Machine {
    /// Boots from a file or an NBD server. Gives back the seconds until it says that it is up; then it is switched off.
    ///
    /// Writes go to a temporary file, as they do for each machine that is started from a shared image.
    pub(crate) fn boot(&self, lab: &Lab, drive: &str) -> anyhow::Result<f64> {
        let log = lab.scratch().join("serial.log");
        std::fs::write(&log, "")?;
        let mut command = self.command();
        self.boot_with(&mut command, &self.append);
        command.arg("-drive").arg(format!("file={drive},format=raw,snapshot=on,if=virtio"));
        let start = clock::now();
        let mut guest = Guard::spawn(command, &log)?;
        wait_for_line(&mut guest, &log, |line| line.contains(&self.up)).context("the machine does not come up")?;
        Ok(clock::now().duration_since(start).as_secs_f64())
    }

    /// A machine without disks that writes what it says on its serial line to where the command does.
    pub(crate) fn command(&self) -> Command {
        let mut command = children::command(Cpus::Free, "qemu-system-x86_64");
        let memory = self.memory.to_string();
        command.args(["-accel", "tcg", "-m", &memory, "-display", "none", "-nodefaults", "-no-reboot"]);
        command.args(["-serial", "stdio"]);
        command
    }

    /// Adds what is booted, with words for the kernel.
    pub(crate) fn boot_with(&self, command: &mut Command, append: &str) {
        if self.kernel != Path::new("none") {
            command.arg("-kernel").arg(&self.kernel).arg("-initrd").arg(&self.initrd).args(["-append", append]);
        }
    }
}

/// The command line of `lab record`.
#[derive(Debug, Args)]
pub(crate) struct Record {
    #[command(flatten)]
    machine: Machine,
    /// Where the trace goes.
    #[arg(long, value_name = "FILE")]
    to: PathBuf,
}

/// Boots a machine over nbdkit, which writes down what it reads.
pub(crate) fn record(lab: &Lab, options: &Record) -> anyhow::Result<()> {
    let socket = lab.scratch().join("socket");
    let log = lab.scratch().join("nbdkit.requests");
    let mut command = children::command(Cpus::Free, "nbdkit");
    command.args(["-f", "-r", "-U"]).arg(&socket).args(["--filter=log", "file"]);
    command.arg(&options.machine.image).arg(format!("logfile={}", log.display()));
    let mut server = Guard::spawn(command, &lab.scratch().join("nbdkit.log"))?;
    wait_for_line(&mut server, &log, |line| line.contains("Ready")).context("nbdkit does not come up")?;
    tell("booting");
    let seconds = options.machine.boot(lab, &format!("nbd+unix:///?socket={}", socket.display()))?;
    let text = std::fs::read_to_string(&log)?;
    let csv = convert(&text)?;
    tell(&format!("up after {seconds:.1} s; {} requests", csv.lines().count() - 1));
    std::fs::write(&options.to, csv).with_context(|| options.to.display().to_string())
}

/// Makes a trace of the log of nbdkit's log filter.
///
/// The first connections of qemu only look at the size; what counts is whatever is read, by anybody, from the first
/// request on.
fn convert(log: &str) -> anyhow::Result<String> {
    let mut csv = String::from("seconds,op,offset,bytes\n");
    let mut first = None;
    for line in log.lines() {
        let Some((at, operation, offset, bytes)) = request(line) else { continue };
        // A clock that went past midnight.
        let since = at.saturating_sub(*first.get_or_insert(at));
        csv.push_str(&format!("{:.6},{operation},{offset},{bytes}\n", since.as_secs_f64()));
    }
    ensure!(first.is_some(), "nothing was read");
    Ok(csv)
}

/// A line that begins a request: `DATE TIME connection=N Read id=1 offset=0x0 count=0x200 ...`.
fn request(line: &str) -> Option<(Duration, &'static str, u64, u64)> {
    let mut words = line.split_whitespace();
    let at = time_of_day(words.nth(1)?)?;
    let operation = match words.nth(1)? {
        "Read" => "read",
        "Write" => "write",
        "Flush" => "flush",
        _ => return None,
    };
    let fields: BTreeMap<&str, &str> = words.filter_map(|word| word.split_once('=')).collect();
    let number = |name| {
        let text = fields.get(name)?;
        u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
    };
    Some((at, operation, number("offset").unwrap_or(0), number("count").unwrap_or(0)))
}

/// `19:01:23.979467`, since midnight.
fn time_of_day(text: &str) -> Option<Duration> {
    let mut parts = text.split(':');
    let (hours, minutes) = (parts.next()?.parse::<u64>().ok()?, parts.next()?.parse::<u64>().ok()?);
    let (seconds, micros) = parts.next()?.split_once('.')?;
    let seconds = (hours.checked_mul(60)?.checked_add(minutes)?).checked_mul(60)?.checked_add(seconds.parse().ok()?)?;
    Some(Duration::from_secs(seconds) + Duration::from_micros(micros.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_of_nbdkit_becomes_a_trace() {
        let log = "\
2026-11-21 19:01:23.325512 Ready thread_model=3
2026-11-21 19:01:23.978470 connection=1 Connect export=\"\" tls=0 size=0x100000 write=1
2026-11-21 19:01:23.979467 connection=1 Read id=1 offset=0x0 count=0x200 ...
2026-11-21 19:01:23.979499 connection=1 ...Read id=1 return=0
2026-11-21 19:01:23.980096 connection=1 Extents id=2 offset=0x0 count=0x100000 req_one=1 ...
2026-11-21 19:02:23.979468 connection=2 Read id=1 offset=0x1f000 count=0x1000 ...
2026-11-21 19:02:24.000000 connection=2 Flush id=2 ...
";
        let expected =
            "seconds,op,offset,bytes\n0.000000,read,0,512\n60.000001,read,126976,4096\n60.020533,flush,0,0\n";
        assert_eq!(convert(log).unwrap(), expected);
        let trace = replay::trace::Trace::parse(expected).unwrap();
        assert_eq!((trace.reads.len(), trace.others), (2, 1));
    }

    #[test]
    fn what_is_no_request_is_no_line() {
        for line in
            ["", "x", "2026-11-21 19:01:23.1 connection=1", "a b c Read", "2026-11-21 99 connection=1 Read id=1"]
        {
            assert_eq!(request(line), None, "{line}");
        }
        assert!(convert("").is_err());
    }
}
