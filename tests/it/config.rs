//! The configuration file: checked, read, and read again while the server runs.

use std::path::Path;
use std::process::Command;

use crate::support::client::Client;
use crate::support::{Daemon, Scratch, headwater, noise, run, run_failing};

fn check(file: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.arg("check-config").arg(file);
    command
}

/// A server with the file `c.toml` in `scratch`.
fn start(scratch: &Scratch, role: &str, typed: &[&str]) -> Daemon {
    let log = scratch.path("server.log");
    let mut command = headwater(&log);
    command.args([role, "--config"]).arg(scratch.path("c.toml")).args(typed);
    Daemon::start(command, 1, &log)
}

fn settings(scratch: &Scratch) -> serde_json::Value {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.args(["settings", "--json", "--at"]).arg(scratch.path("admin.sock"));
    serde_json::from_str(&run(&mut command)).unwrap()
}

/// The configuration of a mirror of `upstream`, with more lines.
fn mirror(scratch: &Scratch, upstream: &str, more: &str) {
    let text = format!(
        "[mirror]\nimages = ['m={upstream}']\ncache = '{}'\nunix = '{}'\nadmin = '{}'\n{more}\n",
        scratch.path("cache").display(),
        scratch.path("m.sock").display(),
        scratch.path("admin.sock").display()
    );
    scratch.file("c.toml", text.as_bytes());
}

#[test]
fn a_sound_file_is_ok_and_a_bad_one_says_where() {
    let scratch = Scratch::new();
    let image = scratch.file("a.raw", &noise(4096, 1));
    let file = scratch.file(
        "good.toml",
        format!("log-level = 'warn'\n[serve]\nimages = {{ a = '{}' }}\nallow = {{ a = '::1' }}\n[mirror]\nimages = ['nbd://h/x']\ncache = '/var/tmp'\n", image.display()).as_bytes(),
    );
    assert_eq!(run(&mut check(&file)), "[serve] ok\n[mirror] ok\n");
    for (text, line, why) in [
        ("[serve]\nimages = ['/nonexistent.raw']", 2, "[serve] images: /nonexistent.raw: No such file"),
        ("[serve]\nlisten = '::1'", 1, "[serve]: the following required arguments were not provided"),
        ("[serve]\nimages = ['/dev/null']\nread-onyl = true", 3, "[serve] read-onyl: there is no such key; read-only?"),
        ("[serve]\nimages = ['/dev/null']\nallow = ['b=::1']", 3, "[serve] allow: there is a rule for [\"b\"]"),
        ("[serve]\nimages = ['/dev/null']\nadmin-token = '/dev/null'", 3, "[serve] admin-token: "),
        ("log-level = 'x'", 1, "log-level: \"x\": one of"),
        ("[serve", 1, ""),
    ] {
        let file = scratch.file("bad.toml", text.as_bytes());
        let complaint = run_failing(&mut check(&file));
        let start = format!("headwater: {}:{line}: {why}", file.display());
        assert!(complaint.starts_with(&start), "{complaint}\nis not\n{start}");
        let mut serve = Command::new(env!("CARGO_BIN_EXE_headwater"));
        if why.contains("there is no such key") {
            assert_eq!(run_failing(serve.args(["serve", "--config"]).arg(&file)), complaint);
        }
    }
    let complaint = run_failing(&mut check(&scratch.path("none.toml")));
    assert!(complaint.contains("none.toml: cannot be read"), "{complaint}");
}

#[test]
fn a_server_runs_from_a_file_and_what_is_typed_comes_first() {
    let scratch = Scratch::new();
    let bytes = noise(100_000, 1);
    let image = scratch.file("a.raw", &bytes);
    let text = format!(
        "[serve]\nlisten = '127.0.0.1:1'\nread-only = true\nadmin = 'none'\n[serve.images]\nb = '{}'\n",
        image.display()
    );
    scratch.file("c.toml", text.as_bytes());
    let server = start(&scratch, "serve", &["--listen=127.0.0.1:0"]);
    assert!(server.uri().ends_with("/b") && !server.uri().contains(":1/"), "{}", server.uri());
    let mut client = Client::open(server.uri());
    assert!(client.read(5, 5000) == bytes[5..5005]);
    assert!(client.agreed.flags.contains(headwater::nbd::wire::TransmissionFlags::READ_ONLY));
}

#[test]
fn sighup_changes_what_may_change_and_names_the_rest() {
    let scratch = Scratch::new();
    let image = scratch.file("a.raw", &noise(100_000, 1));
    let upstream = Daemon::serve(&scratch, &image, &["--read-only"]);
    mirror(&scratch, upstream.uri(), "fill-rate = '1M'\nreserve = '1M'");
    let server = start(&scratch, "mirror", &[]);
    assert_eq!(
        (&settings(&scratch)["fill_rate"], &settings(&scratch)["reserve"]),
        (&(1 << 20).into(), &(1 << 20).into())
    );
    let mut client = Client::open(server.uri());
    let told = std::cell::Cell::new(0);
    let reload = |more: &str, wanted: &str| {
        mirror(&scratch, upstream.uri(), more);
        server.signal("HUP");
        told.set(told.get() + 1);
        crate::support::eventually(wanted, || {
            server.log_text().matches("reading the configuration again").count() == told.get()
        });
        server.wait_for_log(wanted);
    };
    reload("fill-rate = '2M'\ncache-size = '1G'\nworkers = 1\nupstream-timeout = 3", "upstream-timeout, workers");
    let now = settings(&scratch);
    assert_eq!(now["fill_rate"], 2 << 20);
    assert_eq!(now["cache_size"], 1 << 30);
    assert_eq!(now["reserve"], 0, "what is not in the file any more is as if it never was");
    reload("fill-rate = '3M'\nreserve = 'much'", "[mirror] reserve: \\\"much\\\"");
    reload("fill-rate = '3M'\nallow = { other = '::1' }", "and no such export");
    assert_eq!(settings(&scratch), now, "a file with a mistake changes nothing");
    run(Command::new(env!("CARGO_BIN_EXE_headwater"))
        .args(["settings", "fill-rate=7M", "--at"])
        .arg(scratch.path("admin.sock")));
    reload(
        "fill-rate = '2M'\ncache-size = '2G'\nworkers = 1\nupstream-timeout = 3",
        "\"setting\":\"cache_size\",\"from\":\"1073741824\"",
    );
    assert_eq!(settings(&scratch)["fill_rate"], 7 << 20, "it did not change in the file");
    assert!(client.read(0, 100) == noise(100_000, 1)[..100], "clients notice nothing");
}

#[test]
fn sighup_takes_a_new_token_also_without_a_file() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new();
    let image = scratch.file("a.raw", &noise(4096, 1));
    let write = |name: &str, text: &str| {
        let path = scratch.file(name, text.as_bytes());
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        path
    };
    let token = write("token", "the-first-token-of-all");
    let (log, probe) = (scratch.path("server.log"), std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let admin = probe.local_addr().unwrap().to_string();
    drop(probe);
    let mut command = headwater(&log);
    command.arg("serve").arg(&image).args(["--listen=127.0.0.1:0", "--admin", &admin, "--admin-token"]).arg(&token);
    let server = Daemon::start(command, 1, &log);
    let status = |token: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
        command.args(["status", "--at", &admin, "--token"]).arg(token);
        command.output().unwrap().status.success()
    };
    let old = write("old", "the-first-token-of-all");
    assert!(status(&token) && status(&old));
    write("token", "short");
    server.signal("HUP");
    server.wait_for_log("nothing is changed");
    assert!(status(&old), "a bad token does not lock anybody out");
    write("token", "the-second-token-of-all");
    server.signal("HUP");
    crate::support::eventually("new token", || status(&token));
    assert!(!status(&old));
}
