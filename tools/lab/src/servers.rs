//! The origin, mirrors, and clients: how they are started, and what they say.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use headwater::clock;
use load::children::{self, Cpus, Guard};
use load::report::Report;
use replay::stall::Stall;
use rustix::process::{Pid, Signal};
use serde::Deserialize;
use serde_json::Value;

use crate::bed::{Bed, Host, output};
use crate::{Lab, beside};

/// The name of the image everywhere.
pub(crate) const IMAGE: &str = "image";
/// How long a server may take to come up, or to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often is looked whether something has happened.
const GLANCE: Duration = Duration::from_millis(5);

const SERVER_PORT: u16 = 10809;
const DELAYED_PORT: u16 = 10810;

/// The server of the image.
#[derive(Debug)]
pub(crate) struct Origin {
    /// Where its clients on other hosts find it, over the latency.
    pub(crate) uri: String,
    headwater: PathBuf,
    admin: PathBuf,
    _delay: Option<Guard>,
    server: Guard,
}

impl Origin {
    /// Serves an image on the origin's host.
    pub(crate) fn start(lab: &Lab, bed: &Bed, image: &Path) -> anyhow::Result<Self> {
        let address = bed.origin.address;
        let mut command = bed.origin.command(&lab.headwater);
        command.args(["--log-format=json", "serve", "--read-only"]);
        command.arg(format!("--listen={address}:{SERVER_PORT}"));
        let admin = lab.scratch().join("origin.admin");
        command.arg(format!("--admin={}", admin.display()));
        command.arg(format!("{IMAGE}={}", image.display()));
        let log = lab.scratch().join("origin.log");
        let mut server = Guard::spawn(command, &log)?;
        wait_for_line(&mut server, &log, |line| line.starts_with("nbd"))?;
        let delay = if bed.link.latency.is_zero() { None } else { Some(delay(lab, bed)?) };
        let port = if delay.is_some() { DELAYED_PORT } else { SERVER_PORT };
        let uri = format!("nbd://{address}:{port}/{IMAGE}");
        Ok(Self { uri, headwater: lab.headwater.clone(), admin, _delay: delay, server })
    }
}

impl Origin {
    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// Where its operator finds it.
    pub(crate) fn admin(&self) -> &Path {
        &self.admin
    }

    /// Waits until a mirror has handed it a profile.
    pub(crate) fn wait_for_profile(&self) -> anyhow::Result<()> {
        let deadline = clock::now() + PATIENCE;
        let known = || {
            let mut command = Command::new(&self.headwater);
            output(command.args(["profile", "show", "--json", IMAGE, "--at"]).arg(&self.admin))
        };
        loop {
            let answer = known();
            // An image without profiles has an empty list, or an error that says so.
            if answer.as_ref().is_ok_and(|text| text.contains("\"boot\"")) {
                return Ok(());
            }
            ensure!(clock::now() < deadline, "the origin was handed no profile: {answer:?}");
            std::thread::sleep(GLANCE * 20);
        }
    }
}

/// The proxy in front of the origin.
fn delay(lab: &Lab, bed: &Bed) -> anyhow::Result<Guard> {
    let address = bed.origin.address;
    let mut command = bed.origin.command(&std::env::current_exe()?);
    command.arg("delay").arg(format!("--listen={address}:{DELAYED_PORT}"));
    command.arg(format!("--to={address}:{SERVER_PORT}"));
    let each_way = bed.link.latency / 2;
    command.arg(format!("--each-way={}us", each_way.as_micros()));
    command.arg(format!("--buffer={}", held(bed.link.rate.0, each_way)));
    let mut guard = Guard::spawn(command, &lab.scratch().join("delay.log"))?;
    let deadline = clock::now() + PATIENCE;
    let probe = || {
        let mut command = bed.origin.command(&lab.headwater);
        command.arg("info").arg(format!("nbd://{address}:{DELAYED_PORT}/{IMAGE}"));
        output(&mut command)
    };
    while let Err(error) = probe() {
        ensure!(guard.ended()?.is_none() && clock::now() < deadline, "the delay does not start: {error:#}");
        std::thread::sleep(GLANCE);
    }
    Ok(guard)
}

/// What the proxy may hold: twice what comes in while it holds it. Without a rate, enough for the fastest loopback.
fn held(rate: u64, each_way: Duration) -> u64 {
    const LEAST: u64 = 256 << 10;
    const FASTEST: u64 = 8 << 30;
    let bytes_per_second = if rate == 0 { FASTEST } else { rate / 8 };
    let during = u128::from(bytes_per_second) * each_way.as_micros() / 1_000_000;
    u64::try_from(2 * during).unwrap_or(u64::MAX).max(LEAST)
}

/// A mirror with a cache of its own, which is removed with it.
#[derive(Debug)]
pub(crate) struct Mirror {
    lab: PathBuf,
    server: Guard,
    place: tempfile::TempDir,
}

impl Mirror {
    /// Starts a mirror with an empty cache on a host.
    pub(crate) fn start(lab: &Lab, host: &Host, upstream: &str, words: &[&str]) -> anyhow::Result<Self> {
        let place = tempfile::Builder::new().prefix("mirror-").tempdir_in(lab.scratch())?;
        let at = |name: &str| place.path().join(name);
        let mut command = host.command(&lab.headwater);
        command.args(["--log-format=json", "mirror"]).arg(format!("{IMAGE}={upstream}"));
        command.arg(format!("--cache={}", at("cache").display()));
        command.arg(format!("--unix={}", at("socket").display()));
        command.arg(format!("--listen={}:{SERVER_PORT}", host.address));
        command.arg(format!("--admin={}", at("admin").display()));
        command.args(words).args(&lab.common.mirror_option);
        let log = at("log");
        let mut server = Guard::spawn(command, &log)?;
        wait_for_line(&mut server, &log, |line| line.starts_with("nbd"))?;
        Ok(Self { lab: lab.headwater.clone(), server, place })
    }

    /// Where clients on this machine find it: a socket knows no namespaces.
    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///{IMAGE}?socket={}", self.place.path().join("socket").display())
    }

    /// Where its operator finds it.
    pub(crate) fn admin(&self) -> PathBuf {
        self.place.path().join("admin")
    }

    /// Runs `headwater` with some words, for this mirror.
    pub(crate) fn order(&self, words: &[&str]) -> anyhow::Result<String> {
        output(Command::new(&self.lab).args(words).arg("--at").arg(self.admin()))
    }

    /// What it says of its image: `images[0].mirror` of `headwater status --json`.
    pub(crate) fn status(&self) -> anyhow::Result<Value> {
        let mut status: Value = serde_json::from_str(&self.order(&["status", "--json"])?)?;
        Ok(status["images"][0]["mirror"].take())
    }

    /// Its number.
    pub(crate) fn pid(&self) -> u32 {
        self.server.pid()
    }

    /// All that it says, asked without a process of its own: for those who ask often.
    pub(crate) fn look(&self) -> anyhow::Result<Value> {
        let mut socket = UnixStream::connect(self.admin())?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.write_all(b"GET /v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let (_, body) = answer.split_once("\r\n\r\n").context("an answer has a body")?;
        Ok(serde_json::from_str(body)?)
    }

    /// Whether all of its image is here.
    pub(crate) fn is_whole(&self) -> anyhow::Result<bool> {
        let status = self.look()?;
        let (image, mirror) = (&status["images"][0], &status["images"][0]["mirror"]);
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let here = number(&mirror["resident_bytes"]) + number(&mirror["zero_bytes"]);
        Ok(number(&image["size"]) > 0 && here >= number(&image["size"]))
    }

    /// Reads all of it and holds it against the image.
    pub(crate) fn verify(&self, image: &Path) -> anyhow::Result<()> {
        let image = image.display().to_string();
        let words = ["--pattern=sequential", "--once", "--size=1M", "--depth=4", "--verify", "--image", image.as_str()];
        let report = load(None, &self.uri(), &words)?;
        let verified = report.verified.context("nothing was verified")?;
        ensure!(verified.wrong == 0 && verified.blocks > 0, "wrong bytes: {verified:?}");
        Ok(())
    }

    /// Ends it properly.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        let pid = i32::try_from(self.server.pid()).ok().and_then(Pid::from_raw).context("a process has a number")?;
        rustix::process::kill_process(pid, Signal::TERM)?;
        let deadline = clock::now() + PATIENCE;
        while self.server.ended()?.is_none() {
            ensure!(clock::now() < deadline, "the mirror does not end");
            std::thread::sleep(GLANCE);
        }
        Ok(())
    }
}

/// Bytes that came from upstreams, of a mirror's status.
pub(crate) fn fetched(status: &Value) -> f64 {
    status["upstream_bytes"].as_f64().unwrap_or(0.0)
}

/// Bytes that were fetched ahead of demand and that nobody has read, of a mirror's status.
pub(crate) fn idle(status: &Value) -> f64 {
    let causes = status["fill"].as_object().into_iter().flatten().filter(|(cause, _)| *cause != "demand");
    let of = |cause: &Value, name: &str| cause[name].as_f64().unwrap_or(0.0);
    causes.map(|(_, cause)| of(cause, "unused_bytes") + of(cause, "unread_bytes")).sum()
}

/// Whether the program knows an option of `headwater mirror`; an older one can be measured without it.
pub(crate) fn knows(lab: &Lab, option: &str) -> anyhow::Result<bool> {
    Ok(output(Command::new(&lab.headwater).args(["mirror", "--help"]))?.contains(option))
}

/// The words for a mirror that fetches what it is asked for and nothing else.
pub(crate) fn demand_only(lab: &Lab) -> anyhow::Result<Vec<&'static str>> {
    Ok(if knows(lab, "--fill")? { vec!["--fill=none"] } else { Vec::new() })
}

/// What a replay says.
#[derive(Debug, Deserialize)]
pub(crate) struct Replayed {
    pub(crate) stall: Stall,
}

/// Replays a trace on this machine.
pub(crate) fn replay(trace: &Path, image: &Path, uri: &str, words: &[&str]) -> anyhow::Result<Replayed> {
    let mut command = children::command(Cpus::Free, beside("replay")?);
    command.arg(trace).arg(uri).arg("--image").arg(image).arg("--json").args(words);
    Ok(serde_json::from_str(&output(&mut command)?)?)
}

/// Makes load on this machine, or on a host of the bed.
pub(crate) fn load(host: Option<&Host>, uri: &str, words: &[&str]) -> anyhow::Result<Report> {
    let program = beside("load")?;
    let mut command = host.map_or_else(|| children::command(Cpus::Free, &program), |host| host.command(&program));
    command.arg(uri).arg("--json").args(words);
    let report: Report = serde_json::from_str(&output(&mut command)?)?;
    ensure!(
        report.errors.is_empty() && report.lost.is_empty(),
        "requests failed: {:?} {:?}",
        report.errors,
        report.lost
    );
    Ok(report)
}

/// Waits until a child has written a line into its log.
pub(crate) fn wait_for_line(child: &mut Guard, log: &Path, is: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    let deadline = clock::now() + PATIENCE * 5;
    loop {
        let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
        if text.lines().any(&is) {
            return Ok(());
        }
        if let Some(status) = child.ended()? {
            bail!("{status}: {text}");
        }
        ensure!(clock::now() < deadline, "nothing happens: {text}");
        std::thread::sleep(GLANCE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_nobody_has_read_is_what_was_not_demanded() {
        let cause = |bytes| serde_json::json!({ "brought_bytes": 9, "unused_bytes": bytes, "unread_bytes": 1 });
        let status =
            serde_json::json!({ "fill": { "demand": cause(100), "readahead": cause(2), "profile": cause(3) } });
        assert_eq!(idle(&status), 7.0);
        assert_eq!(idle(&Value::Null), 0.0);
    }

    #[test]
    fn the_proxy_holds_what_a_long_link_would() {
        assert_eq!(held(200_000_000, Duration::from_millis(1)), 256 << 10);
        assert_eq!(held(200_000_000, Duration::from_millis(50)), 2_500_000);
        assert_eq!(held(0, Duration::from_millis(1)), 17_179_868);
    }
}
