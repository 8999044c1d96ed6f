//! Who may have which export, and every way around it, with the real program.

use std::process::Command;

use headwater::nbd::wire::NOTICE;

use crate::support::cache::index;
use crate::support::client::{Client, Socket};
use crate::support::{Daemon, Scratch, eventually, headwater, noise, run, run_failing};

const SIZE: usize = 200_000;

/// A server of two images, `open` and `shut`, by TCP and by a unix socket.
pub(crate) struct Ground {
    pub(crate) scratch: Scratch,
    pub(crate) server: Daemon,
}

impl Ground {
    fn new(arguments: &[&str]) -> Self {
        let scratch = Scratch::new();
        for (name, seed) in [("open.raw", 1), ("shut.raw", 3)] {
            let image = scratch.file(name, &noise(SIZE, seed));
            index(&scratch, &image, &[]);
        }
        let log = scratch.path("serve.log");
        let mut command = headwater(&log);
        command.arg("serve").args([scratch.path("open.raw"), scratch.path("shut.raw")]);
        command.args(["--read-only", "--listen=127.0.0.1:0"]).arg("--unix").arg(scratch.path("s.sock"));
        command.arg("--admin").arg(scratch.path("admin.sock")).args(arguments);
        let server = Daemon::start(command, 2, &log);
        Self { scratch, server }
    }

    /// The URI of an export by TCP.
    fn tcp(&self, export: &str) -> String {
        let (base, _) = self.server.uri().rsplit_once('/').unwrap();
        format!("{base}/{export}")
    }

    /// By the unix socket.
    fn unix(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.scratch.path("s.sock").display())
    }

    /// A command for operators.
    fn operate(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
        command.args(arguments).arg("--at").arg(self.scratch.path("admin.sock"));
        command
    }

    /// Whether an export can be had, as libnbd finds.
    fn can_be_had(uri: &str) -> bool {
        let output = Command::new("nbdinfo").args(["--size", uri]).output().unwrap();
        let complaint = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || complaint.contains("no such export"), "{complaint}");
        output.status.success()
    }
}

#[test]
fn addresses_decide_and_unix_sockets_are_open() {
    let ground = Ground::new(&["--allow=shut=192.0.2.0/24,2001:db8::1"]);
    for name in ["open", "open@manifest"] {
        assert!(Ground::can_be_had(&ground.tcp(name)) && Ground::can_be_had(&ground.unix(name)), "{name}");
    }
    for name in ["shut", "shut@profile", "shut@manifest", "shut@profile-inbox"] {
        assert!(!Ground::can_be_had(&ground.tcp(name)), "{name}");
    }
    assert!(Ground::can_be_had(&ground.unix("shut")) && Ground::can_be_had(&ground.unix("shut@manifest")));
    let listed = run(Command::new("nbdinfo").args(["--list", &ground.tcp("")]));
    assert!(listed.contains("open") && !listed.contains("shut"), "{listed}");
    let qemu = run_failing(Command::new("qemu-img").args(["info", &ground.tcp("shut")]));
    assert!(qemu.contains("no such export"), "{qemu}");
    let log = ground.server.stop();
    let denied: Vec<_> = log.lines("an export was denied to a client").collect();
    assert!(denied.iter().any(|line| line["reason"].as_str().unwrap().contains("--allow")), "{denied:?}");
    assert!(denied.iter().all(|line| line["address"] == "127.0.0.1"), "{denied:?}");
}

#[test]
fn the_empty_name_leads_around_no_rule() {
    let scratch = Scratch::new();
    let image = scratch.file("shut.raw", &noise(SIZE, 1));
    let server = Daemon::serve(&scratch, &image, &["--listen=127.0.0.1:0", "--allow=192.0.2.1"]);
    let address = server.uri().trim_end_matches("shut");
    for name in ["", "shut", "@profile", "shut@profile"] {
        assert!(!Ground::can_be_had(&format!("{address}{name}")), "{name:?}");
    }
    let unix = format!("nbd+unix:///?socket={}", scratch.path("serve.sock").display());
    assert!(Ground::can_be_had(&unix));
}

#[test]
fn a_rule_for_an_export_that_is_not_there_is_a_mistake() {
    let scratch = Scratch::new();
    let image = scratch.file("a.raw", &noise(SIZE, 1));
    for rule in ["--allow=b=::1", "--allow-client=b=x", "--require-tls=b", "--require-tls=a@manifest"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
        command.arg("serve").arg(&image).args(["--listen=127.0.0.1:0", "--admin=none", rule]);
        let complaint = run_failing(&mut command);
        assert!(complaint.contains("no such export"), "{rule}: {complaint}");
    }
}

#[test]
fn an_export_that_wants_tls_says_so() {
    let ground = Ground::new(&["--require-tls=shut", "--allow-client=open=host1"]);
    for uri in [ground.tcp("shut"), ground.unix("shut"), ground.tcp("open")] {
        let complaint = run_failing(Command::new("nbdinfo").args(["--size", &uri]));
        assert!(complaint.contains("TLS"), "{uri}: {complaint}");
    }
    let listed = Command::new("nbdinfo").args(["--list", &ground.tcp("")]).output().unwrap();
    let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
    assert!(!listed.contains("export="), "{listed}");
}

/// Who was let in and is not on the new list is not there any more; others do not notice.
#[test]
fn new_rules_close_the_connections_of_those_whom_they_keep_out() {
    let scratch = Scratch::new();
    scratch.file("a.raw", &noise(SIZE, 1));
    let config = |allow: &str| {
        let text = format!(
            "[serve]\nimages = ['a={}']\nlisten = '127.0.0.1:0'\nunix = '{}'\nadmin = 'none'\nread-only = true\n{allow}\n",
            scratch.path("a.raw").display(),
            scratch.path("s.sock").display()
        );
        scratch.file("c.toml", text.as_bytes())
    };
    let log = scratch.path("serve.log");
    let mut command = headwater(&log);
    command.args(["serve", "--config"]).arg(config(""));
    let server = Daemon::start(command, 1, &log);
    let unix = format!("nbd+unix:///a?socket={}", scratch.path("s.sock").display());
    let mut far = Client::open(server.uri());
    let mut near = Client::open(&unix);
    assert!(far.read(7, 1000) == noise(SIZE, 1)[7..1007]);
    config("allow = { a = ['192.0.2.1'] }");
    server.signal("HUP");
    server.wait_for_log("there are new rules");
    server.wait_for_log("closing a connection: the rules have changed");
    assert!(far.try_receive().is_err());
    assert!(!Ground::can_be_had(server.uri()));
    assert!(near.read(7, 1000) == noise(SIZE, 1)[7..1007]);
    config("allow = ['127.0.0.0/8']");
    server.signal("HUP");
    eventually("client that is let in again", || Ground::can_be_had(server.uri()));
    assert!(near.read(7, 1000) == noise(SIZE, 1)[7..1007]);
}

/// What is told to mirrors, and the order to close a connection, by a client that could not have the export.
#[test]
fn news_and_the_order_to_close_are_for_those_who_may_have_the_export() {
    let ground = Ground::new(&["--allow=shut=192.0.2.1"]);
    let mut mine = Client::open(&ground.unix("shut"));
    let script = |uri: &str| {
        format!(
            "h.set_opt_mode(True)\nh.connect_uri('{uri}')\n\
            try:\n  h.opt_list_meta_context_queries(['x-headwater:', '{NOTICE}', 'base:'], lambda name: print(name))\n\
            except nbd.Error as error:\n  print('refused', error)\nh.opt_abort()"
        )
    };
    let ask = |uri: &str| run(crate::support::nbdsh_command().args(["-c", &script(uri)]));
    let told = ask(&ground.unix("shut"));
    assert!(told.contains("base:allocation") && told.contains(NOTICE), "{told}");
    let told = ask(&ground.tcp("shut"));
    assert!(told.contains("refused") && !told.contains("base:allocation") && !told.contains("x-headwater:"), "{told}");
    assert!(mine.read(0, 10) == noise(SIZE, 3)[..10]);
    // And a socket that says nothing is none of its clients.
    drop(Socket::connect(&ground.tcp("shut")));
    let clients = run(&mut ground.operate(&["status", "--json"]));
    let status: serde_json::Value = serde_json::from_str(&clients).unwrap();
    assert_eq!(status["clients"].as_array().unwrap().len(), 1, "{clients}");
}

/// Whatever the way and whoever insists: what is served through TLS only is not served without it from elsewhere.
#[test]
fn no_order_gives_tls_up() {
    let ground = Ground::new(&["--require-tls=shut"]);
    let bare = "nbd://127.0.0.1:1/shut";
    for words in [
        &["redirect", "shut", "--to", bare][..],
        &["redirect", "shut", "--to", bare, "--force"],
        &["redirect", "shut", "--to", bare, "--way=relay", "--force"],
        &["redirect", "shut", "--to", bare, "--way=close", "--force"],
        &["redirect", "shut", "--to", bare, "--way=notice", "--force"],
        &["redirect", "shut", "--to", "nbd+unix:///shut?socket=/s,nbd://127.0.0.1:1/shut", "--force"],
        &["drain", "shut", "--to", bare, "--force"],
        &["drain", "--to", "nbd://127.0.0.1:1", "--force"],
    ] {
        let complaint = run_failing(&mut ground.operate(words));
        assert!(complaint.contains("served through TLS only"), "{words:?}: {complaint}");
    }
    // Nobody was sent away for it, and a unix socket is as good as TLS: what is wrong with this one is that it is not there.
    assert!(Ground::can_be_had(&ground.tcp("open")));
    let near = "nbd+unix:///shut?socket=/nonexistent";
    let complaint = run_failing(&mut ground.operate(&["redirect", "shut", "--to", near]));
    assert!(!complaint.contains("TLS"), "{complaint}");
}

#[test]
fn a_group_is_for_everybody() {
    let scratch = Scratch::new();
    let image = scratch.file("a.raw", &noise(SIZE, 1));
    index(&scratch, &image, &[]);
    let config = |allow: &str| {
        let text = format!(
            "[serve]\nimages = ['a={}']\nunix = '{}'\nadmin = '{}'\nread-only = true\n{allow}\n",
            image.display(),
            scratch.path("s.sock").display(),
            scratch.path("admin.sock").display()
        );
        scratch.file("c.toml", text.as_bytes())
    };
    let log = scratch.path("serve.log");
    let mut command = headwater(&log);
    command.args(["serve", "--config"]).arg(config(""));
    let server = Daemon::start(command, 1, &log);
    let group = format!("--group={}", crate::support::group::own_group());
    let cast = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
        command.args(["cast", "a", &group, "--interface=lo", "--wait-for=100", "--patience=10m", "--no-wait", "--at"]);
        command.arg(scratch.path("admin.sock"));
        command
    };
    run(&mut cast());
    config("allow = ['10.0.0.0/8']");
    server.signal("HUP");
    server.wait_for_log("a cast is called off");
    let complaint = run_failing(&mut cast());
    assert!(complaint.contains("not everybody may have it"), "{complaint}");
}
