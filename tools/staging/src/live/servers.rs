//! The origin and the mirror: processes that end with us.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use headwater::clock;

/// How long a server may take to listen.
const READY: Duration = Duration::from_secs(15);

/// A running server.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
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
        let mut server = Self { child, admin };
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

    /// Where it takes orders.
    pub(super) fn admin(&self) -> &Path {
        &self.admin
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
