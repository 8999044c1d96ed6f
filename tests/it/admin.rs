//! The admin API and the commands that use it: real servers for what is said of them, and for orders a server made
//! here, which does as it is told.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::{Arc, Mutex};

use headwater::control::casts::Casts;
use headwater::control::redirect::Redirects;
use headwater::control::status::{CacheStatus, ImageStatus, Kind, LinkStatus, PinReport, Role, VerifyOrder};
use headwater::control::{Admin, AdminAddress, AdminListener, Answer, Jobs, Operated, Outcome, Refusal, Site};
use headwater::disk::Preference;
use headwater::export::Registry;
use headwater::fill::profile::Store;
use headwater::nbd::wire::{CommandFlags, command};
use headwater::ranges::ByteRange;
use headwater::server::Steering;
use headwater::worker::Workers;
use serde_json::{Value, json};

use crate::support::client::Client;
use crate::support::{Daemon, SOON, Scratch, eventually, headwater, noise, run};

/// A command of an operator, who finds the servers of `scratch` and no others.
pub(crate) fn operator(scratch: &Scratch, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.args(arguments).env("RUNTIME_DIRECTORY", scratch.path("run")).stdin(Stdio::null());
    command
}

pub(crate) fn status(scratch: &Scratch) -> Value {
    serde_json::from_str(&run(&mut operator(scratch, &["status", "--json"]))).unwrap()
}

/// Runs a command that must end with `code`, and gives back what it said on both streams.
#[track_caller]
pub(crate) fn ends_with(code: i32, command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert_eq!(status.code(), Some(code), "{command:?}: {text}");
    text
}

/// The socket of a server of `scratch` that was not told where to have it.
pub(crate) fn socket_of(scratch: &Scratch, server: &Daemon) -> PathBuf {
    scratch.path(&format!("run/{}.sock", server.pid()))
}

pub(crate) fn image(scratch: &Scratch) -> PathBuf {
    scratch.file("image.raw", &noise(1 << 20, 1))
}

/// Sends `request` as it is and gives back the status code and the JSON of the answer.
#[track_caller]
pub(crate) fn raw(mut socket: impl Read + Write, request: &[u8]) -> (u16, Value) {
    // A server that has heard enough may hang up before it has heard all.
    let _ = socket.write_all(request);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no answer: {answer:?}"));
    let code = head.split(' ').nth(1).unwrap().parse().unwrap();
    (code, serde_json::from_str(body).unwrap_or_else(|_| panic!("no JSON: {answer:?}")))
}

#[track_caller]
pub(crate) fn ask(socket: &Path, line: &str, body: &str) -> (u16, Value) {
    let length = body.len();
    let request = format!("{line} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}");
    raw(connect(socket), request.as_bytes())
}

pub(crate) fn connect(socket: &Path) -> UnixStream {
    let socket = UnixStream::connect(socket).unwrap();
    socket.set_read_timeout(Some(SOON)).unwrap();
    socket
}

#[test]
fn what_clients_did_is_told_exactly() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &[]);
    let mut reader = Client::open(server.uri());
    for at in 0..5 {
        reader.read(at * 4096, 4096);
    }
    let mut writer = Client::open(server.uri());
    assert_eq!(writer.write(8192, &[7; 8192]), None);
    assert!(writer.ask(command::TRIM, 1 << 20, 4096).error.is_some(), "it is behind the end");
    let status = status(&scratch);
    assert_eq!((&status["role"], &status["pid"]), (&json!("serve"), &json!(server.pid())));
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    let image = json!({
        "name": "image", "kind": "real", "size": 1 << 20, "writable": true, "chunk_size": null, "identity": null,
        "path": scratch.path("image.raw"), "clients": 2, "mirror": null
    });
    assert_eq!(status["images"], json!([image]));
    assert_eq!(status["cache"], Value::Null);
    let of_client = |index: usize| {
        let client = &status["clients"][index];
        ["id", "requests", "read_bytes", "written_bytes", "errors", "requests_in_flight", "bytes_in_flight"]
            .map(|field| client[field].as_u64().unwrap())
    };
    assert_eq!(of_client(0), [1, 5, 5 * 4096, 0, 0, 0, 0]);
    assert_eq!(of_client(1), [2, 2, 0, 8192, 1, 0, 0]);
    let peer = format!("unix:pid={}", std::process::id());
    assert_eq!((&status["clients"][0]["peer"], &status["clients"][0]["export"]), (&json!(peer), &json!("image")));
    let text = run(&mut operator(&scratch, &["status"]));
    let line = text.lines().find(|line| line.contains(&peer)).unwrap();
    assert_eq!(line.split_whitespace().skip(1).take(2).collect::<Vec<_>>(), ["1", "image"], "{text}");
    assert!(line.contains("20K"), "{text}");
    drop(reader);
    eventually("one client less", || self::status(&scratch)["clients"].as_array().unwrap().len() == 1);
    assert_eq!(self::status(&scratch)["clients"][0]["id"], 2);
}

#[test]
fn a_request_that_waits_is_in_flight() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    server.signal("STOP");
    let mut client = Client::open(mirror.uri());
    client.send(command::READ, CommandFlags::empty(), 1, 0, 65_536, &[]);
    let socket = socket_of(&scratch, &mirror);
    eventually("a request in flight", || {
        let (_, status) = ask(&socket, "GET /v1/status", "");
        let client = &status["clients"][0];
        (&client["requests_in_flight"], &client["bytes_in_flight"]) == (&json!(1), &json!(65_536))
    });
    server.signal("CONT");
    client.receive();
    let (_, status) = ask(&socket, "GET /v1/status", "");
    assert_eq!(status["clients"][0]["requests"], 1);
    eventually("nothing in flight", || ask(&socket, "GET /v1/status", "").1["clients"][0]["requests_in_flight"] == 0);
}

#[test]
fn a_mirror_tells_what_is_here_and_where_it_comes_from() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &["--read-only", "--admin=none"]);
    let spare = "nbd://127.0.0.1:1/image";
    let mirror = Daemon::mirror(&scratch, &format!("os/é={},{spare}", server.uri()), &[]);
    Client::open(mirror.uri()).read(0, 131_072);
    eventually("two chunks here", || status(&scratch)["images"][0]["mirror"]["resident_bytes"] == 131_072);
    // Long enough to be sent from the file, and looked for there first.
    Client::open(mirror.uri()).read(0, 131_072);
    let status = status(&scratch);
    let image = &status["images"][0];
    let (hits, misses) = (&image["mirror"]["hit_bytes"], &image["mirror"]["miss_bytes"]);
    assert_eq!((hits, misses), (&json!(131_072), &json!(131_072)));
    assert_eq!(
        (&image["name"], &image["kind"], &image["chunk_size"]),
        (&json!("os/é"), &json!("mirror"), &json!(65_536))
    );
    assert_eq!(image["mirror"]["upstream_bytes"], 131_072);
    let upstreams = &image["mirror"]["upstreams"];
    assert_eq!((&upstreams[0]["current"], &upstreams[0]["reachable"]), (&json!(true), &json!(true)));
    assert_eq!((&upstreams[1]["uri"], &upstreams[1]["current"]), (&json!(spare), &json!(false)));
    assert_eq!(status["cache"]["path"], json!(scratch.path("mirror.cache")));
    assert!(status["cache"]["free_bytes"].as_u64().unwrap() > 0);
    let text = run(&mut operator(&scratch, &["status"]));
    for part in ["12.5 %", "os/é", "in use", "spare", "cache "] {
        assert!(text.contains(part), "{part}: {text}");
    }
}

#[test]
fn of_several_servers_one_must_be_chosen() {
    let scratch = Scratch::new();
    let nobody = ends_with(1, &mut operator(&scratch, &["status"]));
    assert!(nobody.contains("no running server found") && nobody.contains("/run"), "{nobody}");
    let server = Daemon::serve(&scratch, &image(&scratch), &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    let complaint = ends_with(1, &mut operator(&scratch, &["status"]));
    for (server, role) in [(&server, "serve"), (&mirror, "mirror")] {
        let (pid, socket) = (server.pid(), socket_of(&scratch, server));
        let line = format!("--at {}  process {pid}, {role} of \"image\"", socket.display());
        assert!(complaint.contains(&line), "{line}: {complaint}");
        let text = run(&mut operator(&scratch, &["status", "--at", socket.to_str().unwrap()]));
        assert!(text.contains(&format!(" {role}, process {pid}")), "{text}");
    }
    mirror.stop();
    assert_eq!(status(&scratch)["pid"], server.pid());
}

#[test]
fn the_socket_is_its_owners_and_goes_away_with_the_server() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &[]);
    let socket = socket_of(&scratch, &server);
    let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&socket), mode(&scratch.path("run"))), (0o600, 0o700));
    server.stop();
    assert_eq!(fs::read_dir(scratch.path("run")).unwrap().count(), 0);
}

#[test]
fn the_socket_of_a_dead_server_is_passed_over_and_removed() {
    let scratch = Scratch::new();
    let dead = Daemon::serve(&scratch, &image(&scratch), &[]);
    let socket = socket_of(&scratch, &dead);
    dead.kill();
    assert!(socket.exists());
    let nobody = ends_with(1, &mut operator(&scratch, &["status"]));
    assert!(nobody.contains("no running server found"), "{nobody}");
    let refused = ends_with(1, &mut operator(&scratch, &["status", "--at", socket.to_str().unwrap()]));
    assert!(refused.contains("cannot connect"), "{refused}");
    let server = Daemon::serve(&scratch, &scratch.path("image.raw"), &[]);
    assert!(!socket.exists());
    assert_eq!(status(&scratch)["pid"], server.pid());
}

#[test]
fn a_place_that_was_asked_for_must_be_had_and_the_default_one_need_not() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let wanted = scratch.path("admin/socket");
    let server = Daemon::serve(&scratch, &image, &["--admin", wanted.to_str().unwrap()]);
    assert_eq!(ask(&wanted, "GET /v1/status", "").1["pid"], server.pid());
    let mut second = headwater(&scratch.path("second.log"));
    second.arg("serve").arg(&image).arg("--unix").arg(scratch.path("second.sock")).arg("--admin").arg(&wanted);
    let complaint = ends_with(1, second.stderr(Stdio::piped()));
    assert!(complaint.contains("another server answers there"), "{complaint}");
    assert_eq!(ask(&wanted, "GET /v1/status", "").1["pid"], server.pid());
    server.stop();
    assert!(!wanted.exists());
    // A directory that cannot be made.
    let log = scratch.path("third.log");
    let mut third = headwater(&log);
    third
        .arg("serve")
        .arg(&image)
        .arg("--unix")
        .arg(scratch.path("third.sock"))
        .env("RUNTIME_DIRECTORY", "/proc/no/run");
    let third = Daemon::start(third, 1, &log);
    assert!(third.log_text().contains("no admin API"), "{}", third.log_text());
    Client::open(third.uri()).read(0, 4096);
}

#[test]
fn what_makes_no_sense_is_refused_with_its_code_and_a_reason() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &[]);
    let socket = socket_of(&scratch, &server);
    let long = "x".repeat(65 << 10);
    for (line, body, code, reason) in [
        ("GET /nothing", "", 404, "no such thing"),
        ("DELETE /v1/status", "", 405, "cannot be done"),
        ("GET /v1/jobs/1", "", 404, "no such job"),
        ("DELETE /v1/jobs/1", "", 404, "no such job"),
        ("GET /v1/jobs/x", "", 400, ""),
        ("POST /v1/images/other/pin", "{}", 404, "\"other\""),
        ("POST /v1/images/image/pin", "{}", 400, "real image"),
        ("POST /v1/images/image/pin", "{\"rnages\": null}", 400, "unknown field `rnages`"),
        ("POST /v1/images/image/pin", "{\"ranges\": [{\"start\": 0, \"length\": 0}]}", 400, "empty"),
        ("POST /v1/images/image/pin", "{\"ranges\": [{\"start\": 1, \"length\": 18446744073709551615}]}", 400, "2^64"),
        ("POST /v1/images/image/pin", "{", 400, "EOF"),
        ("POST /v1/images/image/pin", "[null]", 400, "object"),
        ("POST /v1/images/image/pin", &long, 413, "64 KiB"),
        ("POST /v1/images/image/verify", "{\"rate\": 0}", 400, "never end"),
        ("GET /v1/casts/1", "", 404, "no such cast"),
        ("DELETE /v1/casts/1", "", 404, "no such cast"),
        ("POST /v1/images/other/cast", "{}", 404, "\"other\""),
        ("POST /v1/images/image/cast", "{}", 409, "headwater index"),
        ("POST /v1/images/%ff/verify", "{}", 400, "UTF-8"),
    ] {
        let (answered, answer) = ask(&socket, line, body);
        let error = answer["error"].as_str().unwrap();
        assert!(answered == code && error.contains(reason), "{line} {body:.40}: {answered} {error}");
    }
    assert_eq!(ask(&socket, "GET /v1/status", "").0, 200);
}

#[test]
fn clients_that_say_nothing_keep_nobody_from_being_served() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &image(&scratch), &[]);
    let socket = socket_of(&scratch, &server);
    // More than there are places for connections.
    let mut silent: Vec<_> = (0..80).map(|_| connect(&socket)).collect();
    silent.iter_mut().for_each(|socket| socket.write_all(b"GET /v1/status HTTP/1.1\r\nHost: lo").unwrap());
    let mut body = connect(&socket);
    body.write_all(b"POST /v1/images/image/pin HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{").unwrap();
    assert_eq!(status(&scratch)["pid"], server.pid());
    for mut socket in silent {
        // Cut off, with an answer or without one.
        let _ = socket.read_to_end(&mut Vec::new());
    }
    let mut answer = String::new();
    body.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 408 "), "{answer}");
}

/// A server of two images that does what their names say, and remembers its orders.
#[derive(Debug, Clone, Default)]
struct Desk {
    jobs: Jobs,
    orders: Arc<Mutex<Vec<String>>>,
}

const NAMES: [&str; 7] = ["sound", "mended", "broken", "endless", "dying", "a b/é%?#", ""];

impl Desk {
    /// Has it operated at a socket of `scratch`, until the test ends.
    fn start(scratch: &Scratch) -> (Self, PathBuf) {
        let desk = Self::default();
        let socket = scratch.path("desk.sock");
        let (operated, address) = (desk.clone(), AdminAddress::Unix(socket.clone()));
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let mut builder = tokio::runtime::Builder::new_current_thread();
            let runtime = builder.enable_all().build_local(tokio::runtime::LocalOptions::default()).unwrap();
            runtime.block_on(async {
                let listener = AdminListener::bind(&address, None).unwrap();
                let workers = Arc::new(Workers::start(1, Preference::Threads).unwrap());
                let (steering, registry) = (Steering::default(), Arc::new(Registry::new()));
                let operated: Arc<dyn Operated> = Arc::new(operated);
                let casts = Casts::start(steering.clone(), Arc::clone(&registry), Arc::clone(&operated), &workers);
                let redirects = Redirects::start(steering.clone(), registry, &workers, None).await;
                let (listen, neighbours) = (Vec::new(), Vec::new());
                let _admin = Admin::start(listener, Site { operated, steering, redirects, casts, listen, neighbours });
                ready.send(()).unwrap();
                std::future::pending::<()>().await;
            });
        });
        started.recv().unwrap();
        (desk, socket)
    }

    fn note(&self, order: String) {
        self.orders.lock().unwrap().push(order);
    }

    fn orders(&self) -> Vec<String> {
        std::mem::take(&mut self.orders.lock().unwrap())
    }

    fn check(&self, image: &str) -> Result<u64, Refusal> {
        let job = self.jobs.begin(image, 1 << 20)?;
        let id = job.id();
        job.progress().checked_chunks.add(16);
        let found = |damaged, repaired| {
            job.progress().damaged_chunks.add(damaged);
            job.progress().repaired_chunks.add(repaired);
            job.progress().unrepaired_chunks.add(damaged - repaired);
        };
        match image {
            "sound" => job.end(Outcome::Done),
            "mended" => {
                found(2, 2);
                job.end(Outcome::Done);
            }
            "broken" => {
                found(3, 1);
                job.end(Outcome::Done);
            }
            "endless" => drop(std::thread::spawn(move || {
                tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(job.cancelled());
                job.end(Outcome::Cancelled);
            })),
            _ => drop(job),
        }
        Ok(id)
    }
}

impl Operated for Desk {
    fn role(&self) -> Role {
        Role::Mirror
    }

    fn images(&self) -> Vec<ImageStatus> {
        let image = |name: &&str| ImageStatus {
            name: (*name).to_owned(),
            kind: Kind::Real,
            size: 1 << 20,
            writable: false,
            chunk_size: None,
            identity: None,
            path: String::new(),
            clients: 0,
            mirror: None,
        };
        NAMES.iter().map(image).collect()
    }

    fn link(&self) -> Option<LinkStatus> {
        None
    }

    fn cache(&self) -> Option<CacheStatus> {
        None
    }

    fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    fn pin(&self, image: String, ranges: Option<Vec<ByteRange>>) -> Answer<'_, PinReport> {
        let ranges = ranges.map(|ranges| ranges.iter().map(|range| (range.start(), range.end())).collect::<Vec<_>>());
        self.note(format!("pin {image:?} {ranges:?}"));
        Box::pin(async { Ok(PinReport { pinned_bytes: 1 << 20, missing_bytes: 1 << 16 }) })
    }

    fn unpin(&self, image: String, _: Option<Vec<ByteRange>>) -> Answer<'_, PinReport> {
        self.note(format!("unpin {image:?}"));
        Box::pin(async { Err(Refusal::Conflict("it is stuck".into())) })
    }

    fn profiles(&self, image: &str) -> Result<Arc<Store>, Refusal> {
        Err(Refusal::UnknownImage(image.to_owned()))
    }

    fn verify(&self, image: String, order: VerifyOrder) -> Answer<'_, u64> {
        self.note(format!("verify {image:?} {:?} {}", order.rate, order.repair));
        Box::pin(async move { self.check(&image) })
    }
}

#[test]
fn pins_arrive_with_any_name_and_any_range() {
    let scratch = Scratch::new();
    let (desk, socket) = Desk::start(&scratch);
    let at = format!("--at={}", socket.display());
    for name in NAMES {
        assert_eq!(
            run(&mut operator(&scratch, &["pin", &at, name])),
            format!("{name}: 1M pinned, 960K of it here; the other 64K stay once they are read\n")
        );
        assert_eq!(desk.orders(), [format!("pin {name:?} None")]);
    }
    run(&mut operator(&scratch, &["pin", &at, "sound", "--range=..64K", "--range=512K..1M", "--range=1023K.."]));
    assert_eq!(desk.orders(), ["pin \"sound\" Some([(0, 65536), (524288, 1048576), (1047552, 1048576)])"]);
    let complaint = ends_with(1, &mut operator(&scratch, &["pin", &at, "sound", "--range=1M..2M"]));
    assert!(complaint.contains("the image ends at 1M"), "{complaint}");
    let complaint = ends_with(1, &mut operator(&scratch, &["pin", &at, "unknown"]));
    assert!(complaint.contains("try one of \"sound\""), "{complaint}");
    assert_eq!(desk.orders(), [""; 0]);
    let complaint = ends_with(1, &mut operator(&scratch, &["unpin", &at, "sound"]));
    assert!(complaint.contains("it is stuck"), "{complaint}");
    assert_eq!(ask(&socket, "POST /v1/images/sound/unpin", "").0, 409);
}

#[test]
fn a_check_ends_with_what_it_found() {
    let scratch = Scratch::new();
    let (desk, socket) = Desk::start(&scratch);
    let at = format!("--at={}", socket.display());
    for (name, code, counts) in [
        ("sound", 0, "16 chunks checked, 0 damaged, 0 repaired, 0 not repaired"),
        ("mended", 3, "16 chunks checked, 2 damaged, 2 repaired, 0 not repaired"),
        ("broken", 4, "16 chunks checked, 3 damaged, 1 repaired, 2 not repaired"),
        ("dying", 1, "whoever did it is gone"),
    ] {
        let text = ends_with(code, &mut operator(&scratch, &["verify", &at, name]));
        assert!(text.contains(counts), "{text}");
    }
    desk.orders();
    run(&mut operator(&scratch, &["verify", &at, "sound", "--rate=1.5M", "--no-repair"]));
    assert_eq!(desk.orders(), ["verify \"sound\" Some(1572864) false"]);
    let json: Value = serde_json::from_str(&run(&mut operator(&scratch, &["verify", &at, "sound", "--json"]))).unwrap();
    assert_eq!((&json["state"], &json["checked_chunks"]), (&json!("done"), &json!(16)));
    let json: Value = serde_json::from_str(&run(&mut operator(&scratch, &["pin", &at, "sound", "--json"]))).unwrap();
    assert_eq!(json, json!({"pinned_bytes": 1 << 20, "missing_bytes": 1 << 16}));
}

#[test]
fn an_interrupted_check_is_called_off() {
    let scratch = Scratch::new();
    let (desk, socket) = Desk::start(&scratch);
    let mut command = operator(&scratch, &["verify", &format!("--at={}", socket.display()), "endless"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("the order", || !desk.orders().is_empty());
    eventually("the job", || desk.jobs.status(1).is_some());
    let (code, complaint) = ask(&socket, "POST /v1/images/endless/verify", "");
    assert!(code == 409 && complaint["error"].as_str().unwrap().contains("job 1 works on"), "{complaint}");
    assert_eq!(ask(&socket, "GET /v1/jobs/1", "").1["state"], "running");
    run(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("called off"), "{output:?}");
    assert_eq!(ask(&socket, "GET /v1/jobs/1", "").1["state"], "cancelled");
}
