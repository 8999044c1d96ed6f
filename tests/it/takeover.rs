//! A server is replaced while its clients stay connected: nobody gets an error or wrong bytes, and a successor that fails
//! changes nothing.

use std::fs;
use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use headwater::nbd::request::Header;
use headwater::nbd::wire::command;

use crate::support::cache::{assert_holds, status};
use crate::support::certificates::{Authority, Kind, secured};
use crate::support::client::Client;
use crate::support::guest::{HOST, run_in_guest_of};
use crate::support::link::Link;
use crate::support::readers::Readers;
use crate::support::{
    Daemon, ON_DEMAND, Scratch, append, eventually, headwater, mirror_command, nbdsh_command, noise, run,
};

const SIZE: usize = 8 << 20;

/// A server of an image on a unix socket, not started yet.
fn serve(scratch: &Scratch, image: &Path) -> Command {
    let mut command = headwater(&scratch.path("serve.log"));
    command.arg("serve").arg(image).arg("--unix").arg(scratch.path("serve.sock"));
    command
}

/// Starts `command` as the successor of `old`, which must end well.
fn replace(scratch: &Scratch, mut old: Daemon, mut command: Command, log: &str) -> Daemon {
    command.arg(format!("--takeover={}", old.pid()));
    let new = Daemon::start(command, old.uris().len(), &scratch.path(log));
    assert_eq!(new.uris(), old.uris());
    assert!(old.wait().success(), "{}", old.log_text());
    new
}

/// Runs a successor that is to fail, and gives what it says.
fn fail_to_replace(old: &Daemon, mut command: Command) -> String {
    command.arg(format!("--takeover={}", old.pid())).stderr(Stdio::piped());
    let output = command.output().unwrap();
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn a(scratch: &Scratch) -> (Vec<u8>, std::path::PathBuf) {
    let bytes = noise(SIZE, 9);
    let image = scratch.file("a.raw", &bytes);
    (bytes, image)
}

#[test]
fn clients_notice_nothing_of_many_successors() {
    let scratch = Scratch::new();
    let (bytes, image) = a(&scratch);
    let bytes = Arc::new(bytes);
    let mut server = Daemon::start(serve(&scratch, &image), 1, &scratch.path("serve.log"));
    let uri = server.uri().to_owned();
    let readers = Readers::start([&*uri, &uri, &uri, &uri], &bytes);
    for _ in 0..5 {
        readers.go_on(20);
        let before = status(&scratch, &server);
        server = replace(&scratch, server, serve(&scratch, &image), "serve.log");
        readers.go_on(20);
        let after = status(&scratch, &server);
        let requests = |status: &serde_json::Value| status["clients"][0]["requests"].as_u64().unwrap();
        assert_eq!(after["clients"].as_array().unwrap().len(), 4);
        assert!(requests(&after) > requests(&before), "what they have done is forgotten");
        assert_holds(&uri, &bytes);
    }
    readers.stop();
    let socket = scratch.path("serve.sock");
    assert!(socket.exists());
    server.stop();
    assert!(!socket.exists(), "the last one removes the socket of the first");
}

/// Everything that a connection can be in the middle of, at once: a write of which a part has come, requests of which
/// only the beginning has come, and long answers that nobody has received yet.
fn in_the_middle(open: fn(&str) -> Client) {
    let scratch = Scratch::new();
    let (mut bytes, image) = a(&scratch);
    let server = Daemon::start(serve(&scratch, &image), 1, &scratch.path("serve.log"));
    let uri = server.uri().to_owned();

    // Answers that the socket does not take: more than any buffer holds.
    let mut slow = open(&uri);
    let read =
        |cookie: u64| Header { flags: 0, command: command::READ, cookie, offset: 4096 * cookie, length: 4 << 20 };
    slow.send_together((0..8).map(read));
    // Half a write.
    let mut writer = open(&uri);
    let data = noise(3 << 20, 17);
    let offset = 5 << 20;
    let header = Header { flags: 0, command: command::WRITE, cookie: 7, offset, length: data.len() as u64 };
    writer.send_raw(header, &data[..(2 << 20) + 12_345]);
    let done = |server: &Daemon| {
        let status = status(&scratch, server);
        status["clients"]
            .as_array()
            .unwrap()
            .iter()
            .map(|client| client["written_bytes"].as_u64().unwrap())
            .sum::<u64>()
    };
    eventually("a part of the write", || done(&server) >= 2 << 20);
    let server = replace(&scratch, server, serve(&scratch, &image), "serve.log");
    let server = replace(&scratch, server, serve(&scratch, &image), "serve.log");

    writer.socket.write_all(&data[(2 << 20) + 12_345..]).unwrap();
    assert_eq!(writer.receive().error, None);
    let before = bytes.clone();
    bytes[offset as usize..][..data.len()].copy_from_slice(&data);
    for reply in slow.receive_mixed(8) {
        let start = 4096 * reply.cookie as usize;
        let (got, range) = (reply.bytes(), start..start + (4 << 20));
        // It was read before the write, or after it.
        assert!(got == before[range.clone()] || got == bytes[range], "wrong bytes in the answer to {}", reply.cookie);
    }
    assert_eq!(slow.read(0, 4096), &bytes[..4096]);
    assert_eq!(writer.flush(), None);
    assert_holds(&uri, &bytes);
    server.stop();
    assert!(fs::read(&image).unwrap() == bytes);
}

#[test]
fn simple_replies_go_on_in_the_middle() {
    in_the_middle(Client::open_simple);
}

#[test]
fn structured_replies_go_on_in_the_middle() {
    in_the_middle(Client::open_structured);
}

#[test]
fn extended_replies_go_on_in_the_middle() {
    in_the_middle(Client::open);
}

#[test]
fn a_successor_that_fails_changes_nothing() {
    let scratch = Scratch::new();
    let (bytes, image) = a(&scratch);
    let bytes = Arc::new(bytes);
    fs::create_dir(scratch.path("b")).unwrap();
    let other = scratch.file("b/a.raw", &noise(SIZE, 10));
    let server = Daemon::start(serve(&scratch, &image), 1, &scratch.path("serve.log"));
    let uri = server.uri().to_owned();
    let readers = Readers::start([&*uri, &uri], &bytes);
    readers.go_on(5);

    let said = fail_to_replace(&server, serve(&scratch, &other));
    assert!(said.contains("another content"), "{said}");
    readers.go_on(5);
    let missing = fail_to_replace(&server, serve(&scratch, &scratch.path("none.raw")));
    assert!(missing.contains("none.raw"), "{missing}");
    readers.go_on(5);
    let mirror = mirror_command(&scratch, "m", "nbd://localhost:1/a").1;
    let said = fail_to_replace(&server, mirror);
    assert!(said.contains("headwater serve"), "{said}");
    readers.go_on(5);

    for point in ["takeover-taken", "takeover-open"] {
        let mut dying = serve(&scratch, &image);
        dying.arg(format!("--takeover={}", server.pid())).env("HEADWATER_CRASH_AT", point);
        assert!(!dying.status().unwrap().success());
        server.wait_for_log("the successor cannot go on: this server does");
        readers.go_on(5);
        assert_holds(&uri, &bytes);
    }

    let server = replace(&scratch, server, serve(&scratch, &image), "serve.log");
    readers.go_on(5);
    readers.stop();
    server.stop();
}

#[test]
fn reads_that_wait_for_an_upstream_are_asked_again() {
    let scratch = Scratch::new();
    let (bytes, image) = a(&scratch);
    let origin = Daemon::serve(&scratch, &image, &["--read-only"]);
    let link = Link::to(origin.uri());
    let command = || {
        let mut command = mirror_command(&scratch, "m", &link.uri()).1;
        command.arg(ON_DEMAND);
        command
    };
    let mirror = Daemon::start(command(), 1, &scratch.path("m.log"));
    let mut client = Client::open(mirror.uri());
    assert_eq!(client.read(0, 65_536), &bytes[..65_536]);
    let received = link.received();
    link.hold();
    let read = |cookie: u64| Header { flags: 0, command: command::READ, cookie, offset: cookie << 20, length: 65_536 };
    client.send_together((1..5).map(read));
    eventually("requests that wait", || status(&scratch, &mirror)["clients"][0]["requests_in_flight"] == 4);
    let mirror = {
        let mut old = mirror;
        let mut successor = command();
        successor.arg(format!("--takeover={}", old.pid()));
        let mut child = successor.spawn().unwrap();
        // The old one ends only when the new one has opened the cache; that needs nobody above.
        assert!(old.wait().success(), "{}", old.log_text());
        link.release();
        let mut replies = client.receive_mixed(4);
        replies.sort_by_key(|reply| reply.cookie);
        for reply in replies {
            let start = (reply.cookie << 20) as usize;
            assert!(reply.bytes() == bytes[start..start + 65_536]);
        }
        assert_eq!(client.read(0, 65_536), &bytes[..65_536]);
        child.kill().unwrap();
        child.wait().unwrap();
        old
    };
    assert!(link.received() < received + (6 << 16) + 65_536, "what was here has been fetched again");
    drop(mirror);
    origin.stop();
}

#[test]
fn a_signal_starts_the_successor() {
    let scratch = Scratch::new();
    let (bytes, image) = a(&scratch);
    let bytes = Arc::new(bytes);
    let mut server = Daemon::start(serve(&scratch, &image), 1, &scratch.path("serve.log"));
    let readers = Readers::start([server.uri()], &bytes);
    readers.go_on(5);
    server.signal("USR2");
    assert!(server.wait().success(), "{}", server.log_text());
    readers.go_on(20);
    readers.stop();
    let run = scratch.path("run");
    let sockets = || fs::read_dir(&run).unwrap().filter_map(|entry| entry.unwrap().path().to_str().map(str::to_owned));
    let place = || sockets().find_map(|path| path.strip_suffix(".takeover")?.rsplit('/').next()?.parse::<u32>().ok());
    eventually("the place of the successor", || place().is_some());
    let pid = place().unwrap().to_string();
    crate::support::run(Command::new("kill").arg(&pid));
    eventually("the end of the successor", || !Path::new(&format!("/proc/{pid}/exe")).exists());
    assert!(!scratch.path("serve.sock").exists());
}

/// The part of a service manager: it takes what is stored, waits for the end, starts the program again with all of it,
/// and hears what is to be forgotten. Told by lines on its standard input.
const MANAGER: &str = r#"
import array, os, signal, socket, subprocess, sys
place, command = sys.argv[1], sys.argv[2:]
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.bind(place)
kept = []
def environment(descriptors):
    told = dict(os.environ, NOTIFY_SOCKET=place, FDSTORE="64")
    if descriptors:
        told.update(LISTEN_FDS=str(len(descriptors)), LISTEN_FDNAMES=":".join(["headwater"] * len(descriptors)))
    return told
def begin(descriptors):
    # The descriptors are to be 3, 4, ...; the shell knows its own number.
    numbers = [os.dup2(d, 100 + i) for i, d in enumerate(descriptors)]
    moves = " ".join(f"{3 + i}<&{n}" for i, n in enumerate(numbers))
    script = f'export LISTEN_PID=$$; exec "$@" {moves}' if descriptors else 'exec "$@"'
    return subprocess.Popen(["bash", "-c", script, "sh"] + command, pass_fds=numbers, env=environment(descriptors), stdout=subprocess.DEVNULL)
def hear():
    data, ancillary, _, _ = notify.recvmsg(65536, socket.CMSG_SPACE(4 * 253))
    for level, kind, payload in ancillary:
        numbers = array.array("i"); numbers.frombytes(payload)
        if b"BARRIER=1" in data:
            for number in numbers: os.close(number)
        elif b"FDSTORE=1" in data:
            kept.extend(numbers)
    if b"FDSTOREREMOVE=1" in data:
        for number in kept: os.close(number)
        kept.clear()
    return data
child = begin([])
while b"READY=1" not in hear(): pass
print("ready", flush=True)
for line in sys.stdin:
    child.send_signal(signal.SIGTERM)
    notify.settimeout(0.2)
    while child.poll() is None:
        try: hear()
        except TimeoutError: pass
    while True:
        try: hear()
        except TimeoutError: break
    notify.settimeout(None)
    if line.strip() == "stop":
        print("stopped", child.returncode, len(kept), flush=True)
        break
    stored = len(kept)
    given = list(kept)
    child = begin(given)
    while b"READY=1" not in hear(): pass
    print("restarted", stored, len(kept), flush=True)
"#;

#[test]
fn a_service_manager_keeps_the_connections_over_a_restart() {
    let scratch = Scratch::new();
    let (bytes, image) = a(&scratch);
    let bytes = Arc::new(bytes);
    let script = scratch.file("manager.py", MANAGER.as_bytes());
    let mut command = Command::new("python3");
    command.arg(&script).arg(scratch.path("notify.sock"));
    append(&mut command, &serve(&scratch, &image));
    let mut manager = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut say, mut hear) = (manager.stdin.take().unwrap(), std::io::BufReader::new(manager.stdout.take().unwrap()));
    let mut line = || {
        let mut line = String::new();
        std::io::BufRead::read_line(&mut hear, &mut line).unwrap();
        line.trim_end().to_owned()
    };
    assert_eq!(line(), "ready");
    let uri = format!("nbd+unix:///a?socket={}", scratch.path("serve.sock").display());
    let readers = Readers::start([&*uri, &uri, &uri], &bytes);
    for _ in 0..3 {
        readers.go_on(10);
        writeln!(say, "restart").unwrap();
        // The account, the listening socket, and the clients; and none of it is left with the manager.
        assert_eq!(line(), "restarted 5 0");
        readers.go_on(10);
    }
    assert_holds(&uri, &bytes);
    readers.stop();
    writeln!(say, "stop").unwrap();
    assert_eq!(line(), "stopped 0 2");
    let mut rest = String::new();
    hear.read_to_string(&mut rest).unwrap();
    assert!(manager.wait().unwrap().success(), "{rest}");
}

#[test]
fn a_successor_of_a_server_with_the_managers_sockets_opens_no_other() {
    let scratch = Scratch::new();
    let (bytes, image) = a(&scratch);
    // libnbd starts the first with LISTEN_FDS, as a service manager would; the second is told nothing but what it serves.
    let script = format!(
        r#"
import glob, os, subprocess
program = ["{program}", "serve", "{image}"]
h.connect_systemd_socket_activation(program)
assert h.pread(512, 5) == open("{image}", "rb").read()[5:517]
while not glob.glob("{run}/*.takeover"): pass
errors = open("{log}", "w")
successor = subprocess.Popen(program + ["--takeover"], stdout=subprocess.PIPE, stderr=errors)
assert successor.stdout.readline()
print(h.pread(512, 5).hex())
successor.kill()
"#,
        program = env!("CARGO_BIN_EXE_headwater"),
        image = image.display(),
        run = scratch.path("run").display(),
        log = scratch.path("serve.log").display(),
    );
    let printed = run(nbdsh_command().env("RUNTIME_DIRECTORY", scratch.path("run")).args(["-c", &script]));
    let expected: String = bytes[5..517].iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(printed.contains(&expected), "{printed}");
    let log = fs::read_to_string(scratch.path("serve.log")).unwrap();
    assert_eq!(log.matches("\"message\":\"listening\"").count(), 1, "{log}");
}

/// Reads at random places, and compares with the file beside it, until there is a file called "stop".
const TLS_READER: &str = r#"
import os, random
h.set_uri_allow_local_file(True)
h.connect_uri(URI)
data = open("a.raw", "rb").read()
rounds = 0
while not os.path.exists("stop"):
    offset = random.randrange(len(data) - 200000)
    length = random.randrange(1, 200000)
    assert h.pread(length, offset) == data[offset:offset + length], "wrong bytes"
    rounds += 1
    open("rounds", "w").write(str(rounds))
print("encrypted", h.get_tls_negotiated(), rounds > 0)
"#;

#[test]
fn tls_goes_on_in_the_successor() {
    let scratch = Scratch::new();
    let (_, image) = a(&scratch);
    let directory = Authority::new().directory(&scratch, "pki", Kind::default());
    let command = || {
        let mut command = serve(&scratch, &image);
        command.arg("--tls-certificates").arg(&directory).arg("--tls-verify-peer");
        command
    };
    let mut server = Daemon::start(command(), 1, &scratch.path("serve.log"));
    let uri = secured(server.uri(), &directory);
    let mut reader = nbdsh_command();
    reader.arg("-c").arg(format!("URI = {uri:?}\n{TLS_READER}")).current_dir(scratch.path("")).stdout(Stdio::piped());
    let reader = reader.spawn().unwrap();
    let rounds = || fs::read_to_string(scratch.path("rounds")).ok().and_then(|text| text.parse::<u64>().ok());
    for _ in 0..4 {
        let before = rounds().unwrap_or(0);
        eventually("reads through TLS", || rounds() > Some(before + 20));
        server = replace(&scratch, server, command(), "serve.log");
        let client = &status(&scratch, &server)["clients"][0];
        assert!(client["tls"] == true && !client["tls_names"].as_array().unwrap().is_empty(), "{client}");
    }
    fs::write(scratch.path("stop"), "").unwrap();
    let output = reader.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "encrypted True True");
    server.stop();
}

#[test]
fn a_successor_lets_nobody_stay_who_may_not_come() {
    let scratch = Scratch::new();
    let (bytes, image) = a(&scratch);
    let command = |rule: &[&str]| {
        let mut command = serve(&scratch, &image);
        command.args(["--listen", "127.0.0.1:0"]).args(rule);
        command
    };
    let server = Daemon::start(command(&[]), 1, &scratch.path("serve.log"));
    let tcp = server.uri().to_owned();
    let mut far = Client::open(&tcp);
    let mut near = Client::open(&format!("nbd+unix:///a?socket={}", scratch.path("serve.sock").display()));
    assert_eq!(far.read(0, 4096), &bytes[..4096]);
    let server = replace(&scratch, server, command(&["--allow=192.0.2.0/24"]), "serve.log");
    assert!(far.socket.is_closed_by_peer());
    assert_eq!(near.read(0, 4096), &bytes[..4096]);
    assert!(Client::try_open(&tcp, &[]).is_err());
    server.stop();
}

/// Says to whoever connects whether to go on, until it is dropped.
struct GoOn {
    is_over: Arc<AtomicBool>,
    port: u16,
    /// Hears of each who asks.
    asked: std::sync::Mutex<std::sync::mpsc::Receiver<()>>,
}

impl GoOn {
    fn new() -> Self {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let is_over = Arc::<AtomicBool>::default();
        let over = Arc::clone(&is_over);
        let (say, asked) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            for socket in listener.incoming() {
                // Nobody may want to know.
                let _ = say.send(());
                let word = if over.load(Ordering::Relaxed) { "stop" } else { "go" };
                // A guest that is switched off does not listen.
                let _ = socket.and_then(|mut socket| writeln!(socket, "{word}"));
            }
        });
        Self { is_over, port, asked: std::sync::Mutex::new(asked) }
    }

    /// Waits until somebody has asked, which is when a guest has started.
    fn wait(&self) {
        let asked = self.asked.lock().unwrap().recv_timeout(std::time::Duration::from_secs(90));
        assert!(asked.is_ok(), "the guest does not start");
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::Relaxed)
    }
}

/// A guest whose disk is an export, and whose kernel has another one: it writes and reads both, and compares.
fn guest_of_two_disks(scratch: &Scratch, go_on: &GoOn, socket: &Path, port: &str) -> String {
    let script = format!(
        r"
modprobe virtio_blk
nbd-client -N kernel {HOST} {port} /dev/nbd0
mkdir -p /tmp
round=0
while nc {HOST} {go_on} </dev/null | grep -q go; do
    at=$((round % 30))
    dd if=/dev/urandom of=/tmp/piece bs=64k count=16 2>/dev/null
    for disk in vda nbd0; do
        dd if=/tmp/piece of=/dev/$disk bs=1M seek=$at conv=fsync,notrunc 2>/dev/null
        echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/$disk bs=1M skip=$at count=1 2>/dev/null | cmp - /tmp/piece
    done
    round=$((round + 1))
done
echo rounds $round
nbd-client -d /dev/nbd0
",
        go_on = go_on.port
    );
    let disk = format!("file=nbd+unix:///disk?socket={},format=raw,if=virtio,cache=none", socket.display());
    run_in_guest_of(scratch, &script, &["-drive", &disk])
}

/// Copies an export again and again, and compares.
fn copy_and_compare(scratch: &Scratch, uri: &str, number: usize, bytes: &[u8], go_on: &GoOn) -> u64 {
    let copy = scratch.path(&format!("copy{number}"));
    let mut copies = 0;
    while !go_on.is_over() {
        run(Command::new("nbdcopy").arg("--").arg(uri).arg(&copy));
        assert!(fs::read(&copy).unwrap() == bytes, "nbdcopy has got wrong bytes");
        copies += 1;
    }
    copies
}

/// Writes, flushes and reads back.
fn write_and_compare(uri: &str, go_on: &GoOn) -> u64 {
    let mut client = Client::open(uri);
    let mut round = 0;
    while !go_on.is_over() {
        let (data, offset) = (noise(100_000, round + 1), (round % 64) * 123_456);
        assert_eq!(client.write(offset, &data), None);
        if round % 4 == 0 {
            assert_eq!(client.flush(), None);
        }
        assert!(client.read(offset, 100_000) == data, "wrong bytes at {offset}");
        round += 1;
    }
    round
}

#[test]
fn a_virtual_machine_a_kernel_and_copies_go_on_over_twenty_successors() {
    let scratch = Scratch::new();
    let (bytes, image) = a(&scratch);
    let bytes = Arc::new(bytes);
    for name in ["disk", "kernel", "log"] {
        scratch.sparse(&format!("{name}.raw"), 32 << 20, &[]);
    }
    let command = || {
        let mut command = headwater(&scratch.path("serve.log"));
        command
            .arg("serve")
            .arg(&image)
            .args(["disk", "kernel", "log"].map(|name| scratch.path(&format!("{name}.raw"))));
        command.arg("--unix").arg(scratch.path("serve.sock")).args(["--listen", "127.0.0.1:0"]);
        command
    };
    let mut server = Daemon::start(command(), 4, &scratch.path("serve.log"));
    let socket = scratch.path("serve.sock");
    let tcp = server.uri().to_owned();
    let port = tcp.trim_start_matches("nbd://127.0.0.1:").split('/').next().unwrap().to_owned();
    let uri = format!("nbd+unix:///a?socket={}", socket.display());
    let log = format!("nbd+unix:///log?socket={}", socket.display());
    let go_on = GoOn::new();
    let server = std::thread::scope(|scope| {
        let guest = scope.spawn(|| guest_of_two_disks(&scratch, &go_on, &socket, &port));
        let copies = [(0, &uri), (1, &tcp)].map(|(number, uri)| {
            let (scratch, bytes, go_on) = (&scratch, &bytes, &go_on);
            scope.spawn(move || copy_and_compare(scratch, uri, number, bytes, go_on))
        });
        let writer = scope.spawn(|| write_and_compare(&log, &go_on));
        let readers = Readers::start([&*uri, &tcp, &uri], &bytes);
        go_on.wait();
        eventually("the guest's disks", || {
            assert!(!guest.is_finished(), "the guest has failed");
            let status = status(&scratch, &server);
            let clients = status["clients"].as_array().unwrap();
            ["disk", "kernel"].iter().all(|name| {
                clients.iter().any(|client| client["export"] == *name && client["written_bytes"].as_u64() > Some(0))
            })
        });
        for number in 0..20 {
            if number % 4 == 1 {
                let mut dying = command();
                let point = if number % 8 == 1 { "takeover-taken" } else { "takeover-open" };
                dying.arg(format!("--takeover={}", server.pid())).env("HEADWATER_CRASH_AT", point);
                assert!(!dying.status().unwrap().success());
                readers.go_on(3);
            }
            server = replace(&scratch, server, command(), "serve.log");
            readers.go_on(3);
        }
        go_on.is_over.store(true, Ordering::Relaxed);
        let printed = guest.join().unwrap();
        assert!(printed.contains("rounds ") && !printed.contains("rounds 0\n"), "{printed}");
        assert!(copies.into_iter().all(|copies| copies.join().unwrap() > 0) && writer.join().unwrap() > 0);
        let longest = readers.stop().into_iter().map(|sample| sample.took).max();
        println!("the longest read took {longest:?}");
        server
    });
    let log = server.stop();
    let pauses: Vec<_> = log.lines("another server has taken over").map(|line| line["pause_ms"].clone()).collect();
    println!("pauses in milliseconds: {pauses:?}");
    assert_eq!(pauses.len(), 20);
    assert_eq!(log.lines("the successor cannot go on: this server does").count(), 5);
    assert_eq!(log.sum("client left", "errors"), 0);
}
