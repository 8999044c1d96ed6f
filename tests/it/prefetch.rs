//! `headwater prefetch`: what is ordered, refused, waited for, and what becomes of orders when things go wrong.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use headwater::export::conformance::Random;
use serde_json::{Value, json};

use crate::admin::{ask, ends_with, socket_of};
use crate::support::cache::{assert_holds, image_status, index, order, status};
use crate::support::client::Client;
use crate::support::{Daemon, Scratch, eventually, headwater, mirror_command, noise, run};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 16 * MIB;

/// An image with zeroes in it, and its server.
struct Ground {
    scratch: Scratch,
    bytes: Vec<u8>,
    server: Daemon,
}

impl Ground {
    fn new() -> Self {
        Self::with(|_, _| {})
    }

    /// With a manifest, and so with an identity.
    fn indexed() -> Self {
        Self::with(|scratch, image| drop(index(scratch, image, &[])))
    }

    fn with(prepare: impl FnOnce(&Scratch, &Path)) -> Self {
        let scratch = Scratch::new();
        let mut bytes = noise(SIZE as usize, 1);
        bytes[(7 * MIB) as usize..(8 * MIB) as usize].fill(0);
        let image = scratch.file("image.raw", &bytes);
        prepare(&scratch, &image);
        let server = Daemon::serve(&scratch, &image, &["--read-only"]);
        Self { scratch, bytes, server }
    }

    fn mirror(&self, arguments: &[&str]) -> Daemon {
        Daemon::mirror(&self.scratch, self.server.uri(), arguments)
    }

    /// `headwater prefetch` with `--at` a mirror.
    fn prefetch(&self, mirror: &Daemon, arguments: &[&str]) -> Command {
        order(&self.scratch, mirror, &[&["prefetch"], arguments].concat())
    }

    fn json(&self, mirror: &Daemon, arguments: &[&str]) -> Value {
        serde_json::from_str(&run(&mut self.prefetch(mirror, &[arguments, &["--json"]].concat()))).unwrap()
    }

    /// What a mirror says of one order.
    fn order(&self, mirror: &Daemon, id: u64) -> Value {
        let (code, answer) = ask(&socket_of(&self.scratch, mirror), &format!("GET /v1/orders/{id}"), "");
        assert_eq!(code, 200, "{answer}");
        answer
    }

    fn until_done(&self, mirror: &Daemon, id: u64) -> Value {
        eventually("end of the order", || self.order(mirror, id)["state"] != "active");
        let order = self.order(mirror, id);
        assert_eq!(order["state"], "done", "{order}");
        order
    }
}

fn number(value: &Value, field: &str) -> u64 {
    value[field].as_u64().unwrap_or_else(|| panic!("no {field}: {value}"))
}

/// Bytes that are here or zero, as the map of an export draws it.
fn mapped(uri: &str) -> u64 {
    let map = run(Command::new("nbdinfo").args(["--map=x-headwater:residency", "--json", uri]));
    let extents: Vec<Value> = serde_json::from_str(&map).unwrap();
    // Resident or zero.
    let here = extents.iter().filter(|extent| number(extent, "type") & 3 != 0);
    here.map(|extent| number(extent, "length")).sum()
}

#[test]
fn what_was_waited_for_is_here_and_nothing_else() {
    let ground = Ground::new();
    let mirror = ground.mirror(&[]);
    let ranges = ["image", "--range=..1M", "--range=3M..4M", "--range=512K..2M", "--wait"];
    let done = ground.json(&mirror, &ranges);
    assert_eq!((&done["order"], &done["state"], &done["what"]), (&json!(1), &json!("done"), &json!("ranges")));
    assert_eq!((number(&done, "total_bytes"), number(&done, "here_bytes")), (3 * MIB, 3 * MIB));
    let image = image_status(&ground.scratch, &mirror, "image");
    assert_eq!(number(&image["mirror"], "resident_bytes"), 3 * MIB, "{image}");
    let text = run(&mut ground.prefetch(&mirror, &["image", "--wait"]));
    assert!(text.contains("order 2: image, ") && text.contains("order 2: image is here\n"), "{text}");
    let order = ground.order(&mirror, 2);
    assert_eq!((number(&order, "total_bytes"), number(&order, "here_bytes")), (SIZE, SIZE));
    assert_eq!((order["what"].as_str(), order["ended"].is_f64()), (Some("all"), true));
    assert_eq!(mapped(mirror.uri()), SIZE);
    let Ground { bytes, server, .. } = ground;
    assert_eq!(server.stop().sum("client left", "read_bytes"), SIZE, "something was fetched twice");
    assert_holds(mirror.uri(), &bytes);
}

#[test]
fn orders_that_make_no_sense_are_refused_with_a_reason() {
    let ground = Ground::new();
    let mirror = ground.mirror(&[]);
    let socket = socket_of(&ground.scratch, &mirror);
    for (body, code, reason) in [
        ("{\"al\": true}", 400, "unknown field `al`"),
        ("{\"rate\": 0}", 400, "never end"),
        ("{\"all\": true, \"profile\": \"boot\"}", 400, "only one"),
        ("{\"ranges\": []}", 400, "1 to 10000 ranges"),
        ("{\"ranges\": [{\"start\": 0, \"length\": 0}]}", 400, "empty"),
        ("{\"ranges\": [{\"start\": 1, \"length\": 18446744073709551615}]}", 400, "2^64"),
        ("{\"ranges\": [{\"start\": 0, \"length\": 16777217}]}", 400, "16777216 bytes"),
        ("{\"deadline\": 1.0}", 400, "has passed"),
        ("{\"deadline\": 1.0, \"deadline_seconds\": 1.0}", 400, "named twice"),
        ("{\"deadline_seconds\": 1e300}", 400, "no time"),
        ("{\"strategy\": \"fast\"}", 400, "\"fast\""),
        ("{\"source\": [\"http://a\"]}", 400, "\"http://a\""),
        ("{\"source\": [\"nbd://a/b\"]}", 409, "no manifest"),
        ("{\"profile\": \"never\"}", 409, "no profile never of \"image\" here"),
    ] {
        let (answered, answer) = ask(&socket, "POST /v1/images/image/prefetch", body);
        let error = answer["error"].as_str().unwrap();
        assert!(answered == code && error.contains(reason), "{body}: {answered} {error}");
    }
    for line in ["GET /v1/orders/1", "DELETE /v1/orders/1"] {
        let (code, answer) = ask(&socket, line, "");
        assert!(code == 404 && answer["error"].as_str().unwrap().contains("no such order"), "{answer}");
    }
    assert_eq!(ask(&socket, "POST /v1/images/other/prefetch", "").0, 404);
    assert_eq!(ask(&socket, "GET /v1/orders", "").1, json!({"orders": []}));
    let real = socket_of(&ground.scratch, &ground.server);
    let (code, answer) = ask(&real, "POST /v1/images/image/prefetch", "");
    assert!(code == 400 && answer["error"].as_str().unwrap().contains("real image: all of it is here"), "{answer}");
    assert_eq!(ask(&real, "GET /v1/orders", "").1, json!({"orders": []}));
    let complaint = ends_with(1, &mut ground.prefetch(&mirror, &["other"]));
    assert!(complaint.contains("try one of \"image\""), "{complaint}");
    let complaint = ends_with(1, &mut ground.prefetch(&mirror, &["image", "--by", "2020-01-01T00:00"]));
    assert!(complaint.contains("has passed"), "{complaint}");
    for arguments in [
        &["image", "--all", "--range=..1M"][..],
        &["image", "--by=9am"],
        &["image", "--by=09:00", "--in=5m"],
        &["image", "--in=5"],
        &["image", "--strategy=fast"],
        &["image", "--rate=0"],
        &["image", "--list"],
        &["--cancel=1", "--wait"],
        &[],
    ] {
        ends_with(2, &mut ground.prefetch(&mirror, arguments));
    }
}

#[test]
fn what_can_never_fit_is_refused_with_figures() {
    let ground = Ground::new();
    let mirror = ground.mirror(&["--cache-size=8M"]);
    let complaint = ends_with(1, &mut ground.prefetch(&mirror, &["image"]));
    assert!(complaint.contains("of the 8M of --cache-size") && complaint.contains("too much"), "{complaint}");
    let (code, _) = ask(&socket_of(&ground.scratch, &mirror), "POST /v1/images/image/prefetch", "");
    assert_eq!(code, 409);
    assert_eq!(ground.json(&mirror, &["image", "--range=..4M", "--wait"])["state"], "done");
    // Pins of something else leave too little; those of the same bytes do not.
    run(&mut order(&ground.scratch, &mirror, &["pin", "image", "--range=..4M"]));
    ends_with(1, &mut ground.prefetch(&mirror, &["image", "--range=8M..12M"]));
    run(&mut ground.prefetch(&mirror, &["image", "--range=..5M", "--wait"]));
}

#[test]
fn progress_falls_when_something_is_evicted() {
    let ground = Ground::new();
    let mirror = ground.mirror(&["--cache-size=6M", "--policy=lru"]);
    let done = ground.json(&mirror, &["image", "--range=..4M", "--wait"]);
    assert_eq!(number(&done, "here_bytes"), 4 * MIB);
    let mut client = Client::open(mirror.uri());
    eventually("eviction", || {
        client.read(8 * MIB, 4 * MIB);
        client.read(12 * MIB, 4 * MIB);
        number(&ground.order(&mirror, 1), "here_bytes") < 4 * MIB
    });
    let (told, truth) = (ground.order(&mirror, 1), ground.json(&mirror, &["--list"]));
    assert_eq!((&told["state"], number(&told, "total_bytes")), (&json!("done"), 4 * MIB));
    assert!(number(&truth["orders"][0], "here_bytes") < 4 * MIB);
}

#[test]
fn orders_are_shown_and_called_off() {
    let ground = Ground::new();
    let mirror = ground.mirror(&[]);
    assert_eq!(run(&mut ground.prefetch(&mirror, &["--list"])), "no orders\n");
    // So slow that it is still at work whatever happens.
    let text = run(&mut ground.prefetch(&mirror, &["image", "--rate=64K", "--strategy=jit", "--range=8M.."]));
    assert!(text.starts_with("order 1: image, 8M of 8M to fetch"), "{text}");
    let list = ground.json(&mirror, &["--list"]);
    let order = &list["orders"][0];
    assert_eq!(
        (&order["state"], &order["rate"], &order["strategy"]),
        (&json!("active"), &json!(65_536), &json!("jit"))
    );
    assert_eq!(status(&ground.scratch, &mirror)["orders"][0]["order"], 1);
    let text = run(&mut crate::support::cache::order(&ground.scratch, &mirror, &["status"]));
    assert!(text.contains("orders to prefetch\n") && text.contains("64K/s"), "{text}");
    let text = run(&mut ground.prefetch(&mirror, &["--list"]));
    assert!(text.contains("active") && text.contains("ranges"), "{text}");
    let text = run(&mut ground.prefetch(&mirror, &["--cancel=1"]));
    assert!(text.contains("order 1: image was called off"), "{text}");
    assert_eq!(ground.json(&mirror, &["--cancel=1"])["state"], "cancelled", "once more changes nothing");
    assert_eq!(status(&ground.scratch, &mirror)["orders"], json!([]));
    assert!(ends_with(1, &mut ground.prefetch(&mirror, &["--cancel=2"])).contains("no such order"));
    // The next one is not kept waiting.
    run(&mut ground.prefetch(&mirror, &["image", "--range=..1M", "--wait"]));
}

#[test]
fn whoever_stops_waiting_leaves_the_order() {
    let ground = Ground::new();
    let mirror = ground.mirror(&[]);
    let mut waiting = ground.prefetch(&mirror, &["image", "--rate=64K", "--wait"]);
    let waiting = waiting.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    eventually("order", || ask(&socket_of(&ground.scratch, &mirror), "GET /v1/orders/1", "").0 == 200);
    run(Command::new("kill").args(["-INT", &waiting.id().to_string()]));
    let output = waiting.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(5), "{text}");
    assert!(text.contains("goes on without us"), "{text}");
    assert!(output.stderr.is_empty(), "no bars where nobody sees them: {:?}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(ground.order(&mirror, 1)["state"], "active");
    // Whoever waits for one that is called off hears that.
    let mut waiting = ground.prefetch(&mirror, &["image", "--rate=64K", "--wait"]);
    let waiting = waiting.stdout(Stdio::piped()).spawn().unwrap();
    eventually("order", || ask(&socket_of(&ground.scratch, &mirror), "GET /v1/orders/2", "").0 == 200);
    run(&mut ground.prefetch(&mirror, &["--cancel=2"]));
    assert_eq!(waiting.wait_with_output().unwrap().status.code(), Some(4));
}

#[test]
fn a_file_has_orders_for_many_images_and_many_mirrors() {
    let ground = Ground::new();
    let scratch = &ground.scratch;
    let upstream = format!("one={}", ground.server.uri());
    let (log, mut command) = mirror_command(scratch, "first", &upstream);
    command.arg(format!("two words={}", ground.server.uri()));
    let first = Daemon::start(command, 2, &log);
    let second = Daemon::mirror_named(scratch, "second", ground.server.uri(), &[]);
    let at = |server: &Daemon| socket_of(scratch, server).display().to_string();
    let from = |text: &str, arguments: &[&str]| {
        let path = scratch.file("orders.txt", text.as_bytes());
        let mut command = headwater(&scratch.path("prefetch.log"));
        command.arg("prefetch").arg("--from").arg(path).args(arguments).stderr(Stdio::piped());
        command
    };
    let sound = format!(
        "# tonight\none --range ..1M\n'two words' --range ..2M # both here\nimage --at {} --in 20m\n",
        at(&second)
    );
    // Nothing is ordered when a line makes no sense.
    let complaint = ends_with(1, &mut from(&format!("{sound}one --rat 5\n"), &["--at", &at(&first)]));
    assert!(complaint.contains("orders.txt, line 5: ") && complaint.contains("--rat"), "{complaint}");
    assert_eq!(ground.json(&first, &["--list"])["orders"], json!([]));
    let text = run(&mut from(&sound, &["--at", &at(&first), "--wait", "--json"]));
    let all: Value = serde_json::from_str(&text).unwrap();
    let seen: Vec<_> = all
        .as_array()
        .unwrap()
        .iter()
        .map(|order| (order["image"].as_str().unwrap(), &order["state"], number(order, "total_bytes")))
        .collect();
    let done = json!("done");
    assert_eq!(seen, [("one", &done, MIB), ("two words", &done, 2 * MIB), ("image", &done, SIZE)]);
    assert_eq!(mapped(second.uri()), SIZE);
    // What is refused keeps nothing else from being done.
    let mixed = format!("one --profile never\nimage --at {}\n", at(&second));
    let text = ends_with(1, &mut from(&mixed, &["--at", &at(&first), "--wait"]));
    assert!(text.contains("no profile never") && text.contains("image is here"), "{text}");
}

#[test]
fn an_order_waits_for_its_upstream() {
    let ground = Ground::new();
    let mirror = ground.mirror(&["--upstream-timeout=1"]);
    let Ground { scratch, bytes, server } = ground;
    server.kill();
    let text = run(&mut order(&scratch, &mirror, &["prefetch", "image", "--in=20m"]));
    assert!(text.contains("wanted by "), "{text}");
    // A client finds out that nobody is there.
    assert!(Client::open(mirror.uri()).try_read(0, 4096).is_err());
    let server = Daemon::serve(&scratch, &scratch.path("image.raw"), &["--read-only"]);
    let ground = Ground { scratch, bytes, server };
    ground.until_done(&mirror, 1);
    assert_holds(mirror.uri(), &ground.bytes);
}

#[test]
fn an_order_for_an_image_that_was_replaced_fails() {
    let ground = Ground::indexed();
    let (log, mut command) = mirror_command(&ground.scratch, "mirror", ground.server.uri());
    let mirror = Daemon::start(
        {
            command.env("HEADWATER_WATCH_SECONDS", "0.2");
            command
        },
        1,
        &log,
    );
    run(&mut ground.prefetch(&mirror, &["image", "--rate=64K"]));
    let Ground { scratch, server, .. } = ground;
    server.stop();
    let image = scratch.file("image.raw", &noise(SIZE as usize, 3));
    index(&scratch, &image, &["--force"]);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let socket = socket_of(&scratch, &mirror);
    let state = || ask(&socket, "GET /v1/orders/1", "").1;
    eventually("end", || state()["state"] == "failed");
    assert!(state()["error"].as_str().unwrap().contains("replaced by another one"), "{}", state());
    // A new one is for the new image.
    run(&mut order(&scratch, &mirror, &["prefetch", "image", "--range=..1M", "--wait"]));
    drop(server);
}

/// Kills a mirror at random moments of an order, and starts it again.
#[test]
fn an_order_goes_on_after_any_crash_and_never_says_too_much() {
    let ground = Ground::new();
    let seed = std::env::var("HEADWATER_SEED").map_or(5, |text| text.parse().unwrap());
    eprintln!("HEADWATER_SEED={seed}");
    let mut random = Random::new(seed);
    let mut mirror = ground.mirror(&[]);
    run(&mut ground.prefetch(&mirror, &["image", "--rate=8M"]));
    let mut told = 0;
    for kill in 0..5 {
        let until = told + random.below(3 * MIB);
        let mut last = 0;
        eventually("progress", || {
            let order = ground.order(&mirror, 1);
            last = number(&order, "here_bytes");
            let truth = mapped(mirror.uri());
            assert!(last <= truth, "it says {last}, and {truth} are here");
            last >= until.min(SIZE - 4 * MIB)
        });
        mirror.kill();
        mirror = ground.mirror(&[]);
        told = number(&ground.order(&mirror, 1), "here_bytes");
        assert!(told >= last, "after kill {kill}: {last} were said to be durable, and {told} are here");
        assert_eq!(ground.order(&mirror, 1)["rate"], 8 * MIB);
    }
    let done = ground.until_done(&mirror, 1);
    assert_eq!(number(&done, "here_bytes"), SIZE);
    assert_eq!(mapped(mirror.uri()), SIZE);
    assert_holds(mirror.uri(), &ground.bytes);
    // It stays done.
    mirror.kill();
    let mirror = ground.mirror(&[]);
    assert_eq!(ground.order(&mirror, 1)["state"], "done");
    let next = ground.json(&mirror, &["image", "--range=..1M", "--wait"]);
    assert_eq!(number(&next, "order"), 2, "no number is given twice");
}

#[test]
fn an_order_that_was_not_answered_does_not_count() {
    let ground = Ground::new();
    let (log, mut command) = mirror_command(&ground.scratch, "mirror", ground.server.uri());
    command.env("HEADWATER_CRASH_AT", "orders written");
    let mut mirror = Daemon::start(command, 1, &log);
    ends_with(1, &mut ground.prefetch(&mirror, &["image"]));
    assert!(!mirror.wait().success());
    assert!(ground.scratch.path("mirror.cache/@orders.new").exists());
    let mirror = ground.mirror(&[]);
    assert_eq!(ground.json(&mirror, &["--list"])["orders"], json!([]));
    assert!(!ground.scratch.path("mirror.cache/@orders.new").exists());
    assert_eq!(mapped(mirror.uri()), 0);
    mirror.stop();
    // A table that is damaged is put aside, and said to be.
    fs::write(ground.scratch.path("mirror.cache/@orders"), "nonsense").unwrap();
    let mirror = ground.mirror(&[]);
    assert!(mirror.log_text().contains("the table of orders is damaged"), "{}", mirror.log_text());
    assert_eq!(fs::read(ground.scratch.path("mirror.cache/@orders.damaged")).unwrap(), b"nonsense");
    run(&mut ground.prefetch(&mirror, &["image", "--wait"]));
}

/// Three mirrors of one upstream, and how their admin sockets are named after `--to`.
fn three(ground: &Ground) -> (Vec<Daemon>, String) {
    let names = ["first", "second", "third"];
    let mirrors: Vec<_> =
        names.iter().map(|name| Daemon::mirror_named(&ground.scratch, name, ground.server.uri(), &[])).collect();
    let sockets = mirrors.iter().map(|mirror| socket_of(&ground.scratch, mirror).display().to_string());
    let to = sockets.collect::<Vec<_>>().join(",");
    (mirrors, to)
}

fn deploy(ground: &Ground, arguments: &[&str]) -> Command {
    let mut command = headwater(&ground.scratch.path("prefetch.log"));
    command.args(["prefetch", "image", "--all"]).args(arguments).stderr(Stdio::piped());
    command
}

#[test]
fn mirrors_are_told_whom_to_ask_first() {
    let ground = Ground::indexed();
    let (mirrors, to) = three(&ground);
    let text = run(&mut deploy(&ground, &["--to", &to, "--wait", "--json"]));
    let all: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(all.as_array().unwrap().len(), 3);
    for (index, mirror) in mirrors.iter().enumerate() {
        let source: Vec<_> = index.checked_sub(1).map(|before| mirrors[before].uri()).into_iter().collect();
        assert_eq!((&all[index]["source"], &all[index]["state"]), (&json!(source), &json!("done")));
        assert_eq!(all[index]["server"], json!(socket_of(&ground.scratch, mirror)));
        assert_holds(mirror.uri(), &ground.bytes);
    }
    run(&mut deploy(&ground, &["--to", &to, "--shape=tree", "--wait"]));
    for child in [1, 2] {
        assert_eq!(ground.order(&mirrors[child], 2)["source"], json!([mirrors[0].uri()]));
    }
    let named = format!("{}=nbd://host,{}", to.split(',').next().unwrap(), to.split(',').nth(1).unwrap());
    run(&mut deploy(&ground, &["--to", &named]));
    assert_eq!(ground.order(&mirrors[1], 3)["source"], json!(["nbd://host/image"]));
    let twice = format!("{to},{}", to.split(',').next().unwrap());
    assert!(ends_with(1, &mut deploy(&ground, &["--to", &twice])).contains("named twice"));
    let real = format!("{to},{}", socket_of(&ground.scratch, &ground.server).display());
    assert!(ends_with(1, &mut deploy(&ground, &["--to", &real])).contains("real image"));
    assert_eq!(ask(&socket_of(&ground.scratch, &mirrors[0]), "GET /v1/orders/4", "").0, 404, "all or nothing");
}

#[test]
fn mirrors_that_could_not_verify_are_not_deployed_to() {
    let ground = Ground::new();
    let (_mirrors, to) = three(&ground);
    let complaint = ends_with(1, &mut deploy(&ground, &["--to", &to]));
    assert!(complaint.contains("no manifest"), "{complaint}");
}

/// Needs whoever fetches to ask the sources of an order.
#[test]
fn the_origin_sends_about_once_whatever_the_number_of_mirrors() {
    for shape in ["--shape=chain", "--shape=tree"] {
        let ground = Ground::indexed();
        let (mirrors, to) = three(&ground);
        run(&mut deploy(&ground, &["--to", &to, "--wait", shape]));
        let total = SIZE - MIB;
        let from_origin = |mirror: &Daemon| {
            let image = image_status(&ground.scratch, mirror, "image");
            number(&image["mirror"]["upstreams"][0], "received_bytes")
        };
        let sent: u64 = mirrors.iter().map(from_origin).sum();
        assert!(sent <= total + total / 10, "{shape}: the origin sent {sent} for {total}");
        mirrors.iter().for_each(|mirror| assert_holds(mirror.uri(), &ground.bytes));
    }
}

/// Needs whoever fetches to know how fast it gets on.
#[test]
fn a_deadline_that_cannot_be_met_is_told_at_once() {
    let ground = Ground::new();
    let mirror = ground.mirror(&[]);
    let text = ends_with(3, &mut ground.prefetch(&mirror, &["image", "--rate=64K", "--in=20s"]));
    assert!(text.contains("LATE: order 1 (image)"), "{text}");
    let order = ground.order(&mirror, 1);
    let late = order["late_by_seconds"].as_f64().unwrap();
    // 15 MiB at 64 KiB/s take 240 s.
    assert!((180.0..=260.0).contains(&late), "{order}");
    // Whatever is ordered next says so too.
    let text = ends_with(3, &mut ground.prefetch(&mirror, &["image", "--range=..64K", "--in=10m"]));
    assert!(text.contains("order 2: image") && text.contains("LATE: order 1 (image)"), "{text}");
}
