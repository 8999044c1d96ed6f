//! The origin and the mirror: processes that end with us.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use headwater::clock;
use headwater::control::status::Status;

/// How long a server may take to listen.
const READY: Duration = Duration::from_secs(15);

/// A running server.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    headwater: PathBuf,
    admin: PathBuf,
}

impl Server {
    /// Starts `headwater` with these arguments, listening at `unix`. To be called by a thread that lives as long as we
    /// do: the kernel ends the server with it.
    pub(super) fn start(headwater: &Path, unix: &Path, arguments: &[String]) -> anyhow::Result<Self> {
        let admin = unix.with_extension("admin");
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(headwater).args(["--log-level", "warn"]).args(arguments);
        command.arg("--unix").arg(unix).arg("--admin").arg(&admin).stdin(Stdio::null()).stdout(Stdio::null());
        let child = command.spawn().context("starting headwater by setpriv (util-linux)")?;
        let mut server = Self { child, headwater: headwater.to_owned(), admin };
        let deadline = clock::now() + READY;
        while UnixStream::connect(unix).and_then(|_| UnixStream::connect(&server.admin)).is_err() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{arguments:?} ended with {status}");
            }
            ensure!(clock::now() < deadline, "{arguments:?} does not listen");
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }

    /// What `headwater status` says.
    pub(super) fn status(&self) -> anyhow::Result<Status> {
        let output = Command::new(&self.headwater).args(["status", "--json", "--at"]).arg(&self.admin).output()?;
        ensure!(output.status.success(), "headwater status: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).context("headwater status")
    }

    /// Seconds of CPU time so far.
    pub(super) fn cpu_seconds(&self) -> anyhow::Result<f64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let ticks: Vec<f64> = fields.skip(11).take(2).map(str::parse).collect::<Result<_, _>>()?;
        // Linux counts in hundredths for everybody but itself.
        Ok(ticks.iter().sum::<f64>() / 100.0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.admin);
    }
}
