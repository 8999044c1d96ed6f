//! What the program has counted against what the server has counted.
//!
//! The server is the one that the same build has left beside this program: run the tests of the whole workspace.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use load::report::Report;
use tempfile::TempDir;

const LOAD: &str = env!("CARGO_BIN_EXE_load");

/// Headwater with an image of 16 MiB. Killed when it is dropped.
struct Server {
    child: Child,
    _stdout: BufReader<ChildStdout>,
    uri: String,
    directory: TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [image, socket] = ["image", "socket"].map(|name| directory.path().join(name));
        std::fs::write(&image, vec![0x5a; 16 << 20]).unwrap();
        let mut command = Command::new(Path::new(LOAD).with_file_name("headwater"));
        command.arg("serve").arg(image).arg("--unix").arg(socket).arg("--admin").arg(admin(&directory));
        let mut child = command.stdout(Stdio::piped()).spawn().expect("the tests of the whole workspace build it");
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut uri = String::new();
        stdout.read_line(&mut uri).unwrap();
        Self { child, _stdout: stdout, uri: uri.trim_end().to_owned(), directory }
    }

    fn load(&self, words: &[&str]) -> Report {
        let output = Command::new(LOAD).arg(&self.uri).args(words).arg("--json").output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// A counter of an operation; 0 if there was none.
    fn told(&self, metric: &str, operation: &str) -> u64 {
        let mut socket = UnixStream::connect(admin(&self.directory)).unwrap();
        socket.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        let sample = format!("headwater_{metric}{{export=\"image\",operation=\"{operation}\"}} ");
        answer.lines().find_map(|line| line.strip_prefix(&sample)).map_or(0, |value| value.parse().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn admin(directory: &TempDir) -> PathBuf {
    directory.path().join("admin")
}

#[test]
fn both_have_counted_the_same_to_the_last_request() {
    let server = Server::start();
    let [mut reads, mut writes, mut flushes, mut bytes] = [0; 4];
    for words in [
        &["--requests", "20000", "--depth", "32", "--connections", "3"][..],
        &["--requests", "5000", "--rw", "mixed", "--flush-every", "20", "--connections", "2", "--replies", "simple"],
        &["--requests", "3000", "--rw", "write", "--fua", "--depth", "64"],
        &["--requests", "200", "--size", "1M", "--depth", "8"],
        &["--requests", "200", "--rw", "write", "--size", "300K", "--depth", "8", "--replies", "extended"],
        &["--requests", "500", "--depth", "1"],
    ] {
        let report = server.load(words);
        assert_eq!((report.errors.len(), report.lost.len()), (0, 0), "{report:?}");
        (reads, writes, flushes) = (reads + report.reads, writes + report.writes, flushes + report.flushes);
        bytes += (report.reads + report.writes) * u64::from(report.size);
        for (operation, count) in [("read", reads), ("write", writes), ("flush", flushes)] {
            assert_eq!(server.told("requests_total", operation), count, "{words:?}: {operation}");
            assert_eq!(server.told("request_duration_seconds_count", operation), count, "{words:?}: {operation}");
        }
        let moved = ["read", "write"].map(|operation| server.told("request_bytes_total", operation));
        assert_eq!(moved.iter().sum::<u64>(), bytes, "{words:?}");
    }
    assert!(reads > 0 && writes > 0 && flushes > 0);
}
