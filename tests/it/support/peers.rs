//! Servers that others have written.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use super::{Scratch, eventually, run};

/// A server of somebody else. Killed when it is dropped.
pub(crate) struct Peer {
    uri: String,
    child: Child,
}

impl Peer {
    pub(crate) fn uri(&self) -> &str {
        &self.uri
    }

    /// nbdkit with any plugin and filters, in the foreground, on a unix socket.
    pub(crate) fn nbdkit(scratch: &Scratch, arguments: &[&str]) -> Self {
        let (socket, pid) = (scratch.path("nbdkit.sock"), scratch.path("nbdkit.pid"));
        forget(&[&socket, &pid]);
        let mut command = Command::new("nbdkit");
        command.args(["-f", "--exit-with-parent", "-U"]).arg(&socket).arg("-P").arg(&pid).args(arguments);
        let child = command.spawn().expect("nbdkit is installed by tools/test");
        // It writes its number once it listens.
        eventually("nbdkit", || fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n')));
        Self { uri: unix_uri(&socket, ""), child }
    }

    /// qemu-nbd on a unix socket, for any number of clients.
    pub(crate) fn qemu_nbd(scratch: &Scratch, image: &Path, arguments: &[&str]) -> Self {
        let (socket, pid) = (scratch.path("qemu.sock"), scratch.path("qemu.pid"));
        forget(&[&socket, &pid]);
        let mut command = Command::new("qemu-nbd");
        command.args(["--persistent", "--pid-file"]).arg(&pid).arg("-k").arg(&socket).args(arguments).arg(image);
        let child = command.spawn().expect("qemu-nbd is installed by tools/test");
        eventually("qemu-nbd", || fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n')));
        Self { uri: unix_uri(&socket, ""), child }
    }

    /// nbd-server on a TCP port, read-only.
    pub(crate) fn nbd_server(scratch: &Scratch, image: &Path) -> Self {
        let port = free_port();
        let config = format!(
            "[generic]\nlistenaddr = 127.0.0.1\nport = {port}\nallowlist = true\n\
             [image]\nexportname = {}\nreadonly = true\nmulticonn = true\n",
            image.display()
        );
        let config = scratch.file("nbd-server.conf", config.as_bytes());
        // It serves more than one client only as a daemon. A PID namespace takes all of it down with this process.
        let mut command = Command::new("unshare");
        command.args([
            "--pid",
            "--fork",
            "--kill-child",
            "sh",
            "-c",
            "nbd-server -C \"$1\" -p \"$2\"; exec tail -f /dev/null",
        ]);
        command.arg("sh").arg(config).arg(scratch.path("nbd-server.pid"));
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let child = child.expect("unshare is part of Debian");
        let address = format!("127.0.0.1:{port}");
        eventually("nbd-server", || std::net::TcpStream::connect(&address).is_ok());
        Self { uri: format!("nbd://{address}/image"), child }
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Removes what an earlier peer in the same directory may have left.
fn forget(files: &[&Path]) {
    for file in files {
        if let Err(error) = fs::remove_file(file) {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{}", file.display());
        }
    }
}

fn unix_uri(socket: &Path, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

/// A port that nobody listens on now. Only for programs that cannot pick one themselves.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// An image in another format, made by qemu-img.
pub(crate) fn convert(scratch: &Scratch, from: &Path, name: &str, arguments: &[&str]) -> PathBuf {
    let to = scratch.path(name);
    run(Command::new("qemu-img").arg("convert").args(["-f", "raw"]).args(arguments).arg(from).arg(&to));
    to
}
