//! The program against a server of somebody else, which can be made to be slow, to fail and to be wrong.

#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::{Duration, Instant};

use headwater::clock;
use load::report::Report;
use tempfile::TempDir;

/// nbdkit on a unix socket. Killed when it is dropped.
struct Server {
    child: Child,
    directory: TempDir,
}

impl Server {
    fn start(arguments: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), arguments)
    }

    fn start_in(directory: TempDir, arguments: &[&str]) -> Self {
        let (socket, pid) = (directory.path().join("socket"), directory.path().join("pid"));
        let mut command = Command::new("nbdkit");
        command.args(["-f", "--exit-with-parent", "-U"]).arg(socket).arg("-P").arg(&pid).args(arguments);
        let child = command.spawn().expect("nbdkit is installed by tools/test");
        let mut server = Self { child, directory };
        // It writes its number once it listens.
        let deadline = clock::now() + Duration::from_secs(20);
        while !std::fs::read_to_string(&pid).is_ok_and(|text| text.ends_with('\n')) {
            assert!(server.child.try_wait().unwrap().is_none() && clock::now() < deadline, "nbdkit does not come up");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    /// With a file of random-looking bytes, whose path is given too.
    fn with_image(bytes: u64, arguments: &[&str]) -> (Self, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        let words = (0..bytes / 8).map(|index| index.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        std::fs::write(&image, words.flatten().collect::<Vec<u8>>()).unwrap();
        let mut all = arguments.to_vec();
        all.extend(["file", image.to_str().unwrap()]);
        (Self::start_in(directory, &all), image)
    }

    fn load(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
        command.arg(format!("nbd+unix:///?socket={}", self.directory.path().join("socket").display()));
        command.args(arguments).output().unwrap()
    }

    /// Runs without a fault.
    fn report(&self, arguments: &[&str]) -> Report {
        let output = self.load(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{arguments:?}: {}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Runs with a fault that is reported.
    fn faulty_report(&self, arguments: &[&str]) -> Report {
        let output = self.load(&[arguments, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", text(&output));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

fn change(image: &Path, offset: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().write(true).open(image).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn reads_are_counted_in_each_form_of_replies() {
    let server = Server::start(&["memory", "64M"]);
    for replies in ["simple", "structured"] {
        let report = server.report(&["--requests", "1000", "--connections", "3", "--replies", replies]);
        assert_eq!((report.reads, report.writes, report.replies.as_str()), (1000, 0, replies));
        assert!(report.requests_per_second > 0.0 && report.latency.p50 > 0.0);
        assert!(report.latency.p50 <= report.latency.p99 && report.latency.p99 <= report.latency.maximum);
        assert!(report.fairness.smallest_share > 0.99, "{:?}", report.fairness);
    }
    let output = server.load(&["--requests", "1", "--replies", "extended"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output).contains("no Extended replies"), "{}", text(&output));
}

#[test]
fn a_run_by_time_ends_and_tells_what_the_server_used() {
    let server = Server::start(&["memory", "64M"]);
    let pid = server.child.id().to_string();
    let started = clock::now();
    let report = server.report(&["--time", "300ms", "--ramp", "100ms", "--pid", &pid]);
    assert!(started.elapsed() >= Duration::from_millis(400));
    assert!((report.seconds - 0.3).abs() < 1e-9, "{}", report.seconds);
    let cost = report.server.unwrap();
    assert!(cost.cpu_per_request > 0.0 && cost.usage.cpu_seconds > 0.0, "{cost:?}");
    let output = server.load(&["--time", "100ms"]);
    assert!(text(&output).contains("requests/s") && output.status.success(), "{}", text(&output));
}

#[test]
fn once_asks_for_every_byte_and_compares_it() {
    let (server, image) = Server::with_image(5 << 20, &["-r"]);
    let image = image.to_str().unwrap();
    for pattern in ["random", "sequential"] {
        for (size, blocks) in [("4K", 1280), ("1M", 5)] {
            let arguments = ["--once", "--pattern", pattern, "--size", size, "--connections", "3"];
            let report = server.report(&[&arguments[..], &["--verify", "--image", image]].concat());
            assert_eq!((report.reads, report.verified.unwrap().blocks), (blocks, blocks), "{pattern} {size}");
        }
    }
}

#[test]
fn holes_are_compared_too() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    change(&image, 300_000, b"data");
    let path = image.to_str().unwrap().to_owned();
    let server = Server::start_in(directory, &["-r", "file", &path]);
    let report = server.report(&["--once", "--size", "64K", "--verify", "--image", &path]);
    assert_eq!(report.verified.unwrap().blocks, 16);
}

#[test]
fn a_wrong_byte_is_found_and_its_offset_told() {
    let (server, image) = Server::with_image(1 << 20, &["-r"]);
    let copy = server.directory.path().join("copy");
    std::fs::copy(&image, &copy).unwrap();
    change(&copy, 700_001, b"\xff\xfe");
    let arguments = ["--once", "--verify", "--image", copy.to_str().unwrap()];
    let found = server.faulty_report(&arguments).verified.unwrap();
    assert_eq!((found.blocks, found.wrong, found.first_wrong[0].offset), (256, 1, 700_001));
    let output = server.load(&arguments);
    assert!(text(&output).contains("at 700001: data that are not the image's"), "{}", text(&output));
}

#[test]
fn writes_are_read_back_and_a_later_run_finds_them() {
    let (server, image) = Server::with_image(4 << 20, &[]);
    for pattern in ["random", "sequential"] {
        let write = ["--rw", "write", "--requests", "5000", "--pattern", pattern, "--connections", "2", "--verify"];
        let report = server.report(&write);
        assert_eq!((report.writes, report.reads), (5000, 0));
        assert!(report.verified.unwrap().blocks > 500);
    }
    server.report(&["--rw", "write", "--once", "--verify", "--fua", "--flush-every", "100"]);
    let report = server.report(&["--once", "--verify"]);
    assert_eq!(report.verified.unwrap().blocks, 1024);
    // A unit that says another offset, and one of zeroes.
    let mut unit = [0; 512];
    std::fs::File::open(&image).unwrap().read_exact_at(&mut unit, 8192).unwrap();
    change(&image, 1 << 20, &unit);
    change(&image, 2 << 20, &[0; 512]);
    let found = server.faulty_report(&["--once", "--verify"]).verified.unwrap();
    let told: Vec<_> = found.first_wrong.iter().map(|wrong| (wrong.offset, wrong.what.as_str())).collect();
    assert_eq!(told, [(1 << 20, "data that belong at offset 8192"), (2 << 20, "zeroes")]);
    let found = server.faulty_report(&["--once", "--verify", "--seed", "9"]).verified.unwrap();
    assert_eq!((found.blocks, found.wrong), (1024, 1024));
}

#[test]
fn a_server_that_forgets_writes_is_found_out() {
    // What is written goes nowhere, and all reads are zeroes.
    let server = Server::start(&["null", "1M"]);
    let report = server.faulty_report(&["--rw", "write", "--once", "--verify"]);
    let found = report.verified.unwrap();
    assert_eq!((report.writes, found.wrong, found.first_wrong[0].what.as_str()), (256, 256, "zeroes"));
}

#[test]
fn mixed_requests_keep_their_share_and_see_each_other() {
    let server = Server::start(&["memory", "16M"]);
    let report = server.report(&["--rw", "mixed", "--mix", "25", "--requests", "4000", "--fill", "--verify"]);
    assert_eq!(report.reads + report.writes, 4000);
    // Four standard deviations of 4000 throws.
    assert!(report.reads.abs_diff(1000) < 110, "{}", report.reads);
    assert!(report.verified.unwrap().blocks > report.reads);
}

#[test]
fn flushes_are_sent_and_counted() {
    let server = Server::start(&["memory", "16M"]);
    let report = server.report(&["--rw", "write", "--requests", "1000", "--flush-every", "10", "--size", "64K"]);
    // The last ten writes may end the run.
    assert!((99..=100).contains(&report.flushes), "{}", report.flushes);
    assert!(report.flush_latency.p50 > 0.0);
}

#[test]
fn an_open_loop_counts_from_when_a_request_was_due() {
    // One request takes 20 ms or more and one is due each millisecond: the one in the middle of 50 is due after 25 ms
    // and answered after 500 ms at the earliest, on any machine.
    let server = Server::start(&["--filter=delay", "memory", "1M", "rdelay=20ms"]);
    let closed = server.report(&["--requests", "50", "--depth", "1"]);
    let open = server.report(&["--requests", "50", "--depth", "1", "--rate", "1000"]);
    assert_eq!((closed.reads, open.reads), (50, 50), "no request is left out");
    assert!(open.latency.p50 > 400_000.0, "{:?}", open.latency);
    assert!(closed.latency.p50 < open.latency.p50 / 2.0, "{:?} {:?}", closed.latency, open.latency);
    let cut_short = server.report(&["--time", "200ms", "--depth", "1", "--rate", "1000"]);
    assert!(cut_short.behind > 150, "{}", cut_short.behind);
}

#[test]
fn an_open_loop_does_not_run_ahead() {
    let server = Server::start(&["memory", "1M"]);
    let started: Instant = clock::now();
    let report = server.report(&["--requests", "40", "--rate", "100", "--connections", "2"]);
    assert_eq!(report.reads, 40);
    // The last of 40 is due after 390 ms.
    assert!(started.elapsed() > Duration::from_millis(390));
}

#[test]
fn failed_requests_are_counted_by_their_error() {
    let server = Server::start(&["--filter=error", "memory", "1M", "error=ENOSPC", "error-rate=100%"]);
    let report = server.faulty_report(&["--requests", "20"]);
    assert_eq!((report.reads, report.errors.get("ENOSPC")), (0, Some(&20)));
    let output = server.load(&["--requests", "20"]);
    assert!(text(&output).contains("20 requests failed with ENOSPC"), "{}", text(&output));
}

#[test]
fn a_lost_connection_is_told_by_its_number() {
    let mut server = Server::start(&["--filter=delay", "memory", "1M", "rdelay=60"]);
    let mut command = Command::new(env!("CARGO_BIN_EXE_load"));
    command.arg(format!("nbd+unix:///?socket={}", server.directory.path().join("socket").display()));
    let load = command.args(["--requests", "1", "--json"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    // Its thread exists once it is connected.
    let deadline = clock::now() + Duration::from_secs(20);
    let threads = format!("/proc/{}/task", load.id());
    while std::fs::read_dir(&threads).unwrap().count() < 2 {
        assert!(clock::now() < deadline, "the program does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    server.child.kill().unwrap();
    let output = load.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let report: Report = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report.lost[0].starts_with("connection 0: "), "{:?}", report.lost);
}

#[test]
fn what_the_server_does_not_take_is_said_before_anything_is_sent() {
    let (server, _) = Server::with_image(1 << 20, &["-r"]);
    for (arguments, complaint) in [
        (&["--rw", "write"][..], "the export is read-only"),
        (&["--region", "1M+4K"], "the region ends at"),
        (&["--size", "2M"], "smaller than one request"),
        (&["--verify", "--size", "100"], "multiple of 32"),
        (&["--pid", "4000000"], "there is no process"),
    ] {
        let output = server.load(&[arguments, &["--time", "100ms"]].concat());
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(text(&output).contains(complaint), "{arguments:?}: {}", text(&output));
    }
}
