//! What the program prints, refuses and returns.

use std::process::{Command, Stdio};

use crate::support::{Daemon, Scratch, append, headwater, noise, run, run_failing};

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_headwater"))
}

fn exit_code(command: &mut Command) -> i32 {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().code().unwrap()
}

#[test]
fn help_teaches_by_examples() {
    let help = run(program().arg("--help"));
    for word in [
        "serve",
        "mirror",
        "index",
        "info",
        "status",
        "pin",
        "unpin",
        "verify",
        "Example",
        "qemu-system-x86_64 -drive file=nbd://",
    ] {
        assert!(help.contains(word), "{help}");
    }
    for command in ["serve", "mirror", "index", "info", "status", "pin", "unpin", "verify"] {
        let help = run(program().args([command, "--help"]));
        assert!(help.contains("Examples:") && help.lines().all(|line| line.len() <= 100), "{help}");
    }
    assert_eq!(run(program().arg("--version")), format!("headwater {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn a_command_line_without_sense_ends_with_2_and_a_failure_with_1() {
    for arguments in [
        &["serve"][..],
        &["mirror", "nbd://h/x"],
        &["mirror", "not a uri", "--cache", "/tmp/x"],
        &["serve", "x", "--listen", "nonsense:port"],
        &["mirror", "nbd://h/x", "--cache", "/tmp/x", "--chunk-size", "3K"],
        &["index"],
        &["index", "x", "--chunk-size", "3K"],
        &["index", "x", "--rate", "0"],
        &["info", "http://h/x"],
        &["serve", "x", "--admin", "server2:9"],
        &["serve", "x", "--admin", "nowhere"],
        &["status", "--at", "nowhere"],
        &["pin", "x", "--range", "2G..1G"],
        &["verify", "x", "--rate", "0"],
        &["dance"],
    ] {
        assert_eq!(exit_code(program().args(arguments)), 2, "{arguments:?}");
    }
    assert_eq!(exit_code(program().args(["serve", "/nonexistent.raw", "--listen", "127.0.0.1:0"])), 1);
    assert_eq!(exit_code(program().args(["index", "/nonexistent.raw"])), 1);
    assert_eq!(exit_code(program().args(["info", "nbd://127.0.0.1:1/x"])), 1);
}

#[test]
fn one_uri_for_each_export_is_printed_and_nothing_else() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(10_000, 1));
    let mut command = program();
    command.arg("serve").arg(&image).arg(format!("second={}", image.display()));
    let mut child = command
        .args(["--listen", "127.0.0.1:0", "--listen", "[::1]:0", "--log-format=text", "--admin=none"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let uris = [lines.next().unwrap().unwrap(), lines.next().unwrap().unwrap()];
    assert!(uris[0].starts_with("nbd://127.0.0.1:") && uris[0].ends_with("/image"), "{uris:?}");
    assert!(uris[1].ends_with("/second"), "{uris:?}");
    run(Command::new("kill").args(["-INT", &child.id().to_string()]));
    assert!(lines.next().is_none());
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_default_address_is_nbds_own_port_on_loopback() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(10_000, 1));
    // In a network of its own, so that nobody else has the port.
    let log = scratch.path("log");
    let mut inner = headwater(&log);
    inner.arg("serve").arg(&image);
    let mut command = Command::new("unshare");
    command.args(["--net", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]);
    append(&mut command, &inner).stdout(Stdio::piped()).stderr(Stdio::null());
    let server = Daemon::start(command, 1, &log);
    assert_eq!(server.uri(), "nbd://127.0.0.1/image");
}

#[test]
fn what_the_service_manager_gave_to_another_process_means_nothing() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(10_000, 1));
    let log = scratch.path("log");
    let mut command = headwater(&log);
    command.arg("serve").arg(&image).args(["--listen", "127.0.0.1:0"]).stdout(Stdio::piped()).stderr(Stdio::null());
    // Process 1 is not this one.
    command.env("LISTEN_PID", "1").env("LISTEN_FDS", "2").env("LISTEN_FDNAMES", "headwater:headwater");
    let server = Daemon::start(command, 1, &log);
    assert!(server.uri().starts_with("nbd://127.0.0.1:"), "{}", server.uri());
}

#[test]
fn a_unix_socket_goes_away_with_its_server_and_a_dead_ones_is_taken_over() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(10_000, 1));
    let socket = scratch.path("serve.sock");
    Daemon::serve(&scratch, &image, &[]).kill();
    assert!(socket.exists());
    let server = Daemon::serve(&scratch, &image, &[]);
    let mut second = headwater(&scratch.path("log"));
    second.arg("serve").arg(&image).arg("--unix").arg(&socket).stderr(Stdio::piped());
    let complaint = run_failing(&mut second);
    assert!(complaint.contains("another server answers there"), "{complaint}");
    server.stop();
    assert!(!socket.exists());
}

#[test]
fn info_tells_people_and_programs() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 2 << 30, &[(0, &noise(1 << 20, 1))]);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    let text = run(program().args(["info", server.uri()]));
    assert!(text.contains("size         2G (2147483648 bytes)"), "{text}");
    assert!(
        text.contains("access       read-only") && text.contains("contexts     base:allocation, x-headwater:notice\n"),
        "{text}"
    );
    run(Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "read 0 512k", mirror.uri()]));
    crate::support::eventually("half of the data", || {
        let text = run(program().args(["info", mirror.uri()]));
        text.contains("resident     512K of 1M (50.0 %), 2047M zero")
    });
    let json: serde_json::Value = serde_json::from_str(&run(program().args(["info", "--json", mirror.uri()]))).unwrap();
    assert_eq!(json["size"], 2u64 << 30);
    assert_eq!(json["mirror"]["resident"], 512 << 10);
    assert_eq!(json["mirror"]["tiers"], 1);
    let wrong = server.uri().replace("/image?", "/nope?");
    let complaint = run_failing(program().args(["info", &wrong]));
    assert!(complaint.contains("try one of \"image\"") && complaint.contains("no export \"nope\""), "{complaint}");
}

#[test]
fn info_understands_other_servers() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let peer = crate::support::peers::Peer::nbdkit(&scratch, &["--no-sr", "file", image.to_str().unwrap()]);
    let text = run(program().args(["info", peer.uri()]));
    assert!(text.contains("replies      simple") && text.contains("contexts     none"), "{text}");
}
