//! The program as a whole: its bare server gives the right bytes, and it leaves nothing behind when it is stopped.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use headwater::clock;
use load::process::family;
use load::report::Report;
use rustix::process::{Pid, Signal, kill_process};

const BENCH: &str = env!("CARGO_BIN_EXE_bench");

/// Killed when it is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = clock::now() + Duration::from_secs(60);
    while !holds() {
        assert!(clock::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Loads the bare server; any fault fails the test.
fn load(uri: &str, words: &[&str]) -> Report {
    let output = Command::new(BENCH).args(["load", uri, "--json"]).args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn bytes_come_right_through(uri: &str, image: &Path) {
    let path = image.to_str().unwrap();
    for replies in ["simple", "structured", "extended"] {
        for size in ["4K", "128K"] {
            let words = ["--once", "--size", size, "--replies", replies, "--connections", "2", "--verify"];
            let read = load(uri, &[&words[..], &["--image", path]].concat());
            assert!(read.reads > 0);
            let write = load(uri, &[&words[..], &["--rw", "write", "--fua"]].concat());
            assert_eq!(write.verified.unwrap().blocks, write.writes);
        }
    }
    let mixed = load(uri, &["--rw", "mixed", "--requests", "2000", "--fill", "--verify", "--flush-every", "50"]);
    assert_eq!(mixed.reads + mixed.writes, 2000);
}

#[test]
fn the_bare_server_gives_and_takes_the_right_bytes() {
    let directory = tempfile::tempdir().unwrap();
    let (image, socket) = (directory.path().join("image"), directory.path().join("socket"));
    fs::write(&image, (0..1u32 << 20).flat_map(u32::to_le_bytes).collect::<Vec<_>>()).unwrap();
    let listen = ["--unix", socket.to_str().unwrap(), "--sendfile"];
    let _unix = Running(Command::new(BENCH).arg("limit").arg(&image).args(listen).spawn().unwrap());
    eventually("the bare server listens", || std::os::unix::net::UnixStream::connect(&socket).is_ok());
    bytes_come_right_through(&format!("nbd+unix:///?socket={}", socket.display()), &image);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = ["--tcp", &port.to_string()];
    let _tcp = Running(Command::new(BENCH).arg("limit").arg(&image).args(listen).spawn().unwrap());
    eventually("the bare server listens", || std::net::TcpStream::connect(("127.0.0.1", port)).is_ok());
    bytes_come_right_through(&format!("nbd://127.0.0.1:{port}"), &image);
}

/// A program that is taken for Headwater and never listens.
fn mute(directory: &Path) -> String {
    let script = directory.join("mute");
    fs::write(&script, "#!/bin/sh\nexec sleep 300\n").unwrap();
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    script.to_str().unwrap().to_owned()
}

/// The name of a process; empty when there is none.
fn name(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

#[test]
fn when_it_is_stopped_its_children_end_and_its_files_go() {
    for (signal, code) in [(Signal::INT, Some(130)), (Signal::KILL, None)] {
        let directory = tempfile::tempdir().unwrap();
        let scratch = directory.path().join("scratch");
        fs::create_dir(&scratch).unwrap();
        let mut command = Command::new(BENCH);
        command.args(["--quick", "--cases", "1", "--peers", "nbdkit", "--size", "256M"]);
        command.args(["--headwater", &mute(directory.path()), "--dir", scratch.to_str().unwrap()]);
        let mut bench = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap());
        let mut child = 0;
        eventually("the server starts", || {
            child = family(bench.0.id()).into_iter().find(|pid| name(*pid) == "sleep").unwrap_or(0);
            child != 0
        });
        kill_process(Pid::from_child(&bench.0), signal).unwrap();
        assert_eq!(bench.0.wait().unwrap().code(), code);
        eventually("the child ends", || name(child) != "sleep");
        // Whoever is killed cannot tidy up.
        let left = fs::read_dir(&scratch).unwrap().count();
        assert_eq!(left, usize::from(signal == Signal::KILL));
    }
}

#[test]
fn a_headwater_that_does_not_come_up_is_a_failure_that_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let mut command = Command::new(BENCH);
    command.args(["--quick", "--cases", "1", "--peers", "nbdkit", "--size", "256M", "--rounds", "1"]);
    command.args(["--headwater", "/bin/false"]).arg("--dir").arg(directory.path());
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("not measured") && text.contains("headwater does not come up"), "{text}");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}
