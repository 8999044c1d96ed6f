//! Orders to cast: what is refused, what mirrors are told, and the order behind each session.

use std::process::Command;

use headwater::server::MOST_GROUPS;
use serde_json::{Value, json};

use crate::admin::{ask, ends_with, socket_of};
use crate::support::cache::{assert_holds, image_status, index, order, status};
use crate::support::{Daemon, ON_DEMAND, Scratch, eventually, headwater, noise, run};

const SIZE: usize = 4 << 20;

/// A server of an image with a manifest.
fn serve(scratch: &Scratch) -> (Daemon, Vec<u8>) {
    let bytes = noise(SIZE, 11);
    let image = scratch.file("image.raw", &bytes);
    index(scratch, &image, &[]);
    (Daemon::serve(scratch, &image, &["--read-only"]), bytes)
}

/// A group that no other test uses: they run in processes of their own.
fn group(number: u8) -> String {
    let [.., high, low] = std::process::id().to_be_bytes();
    format!("239.{}.{high}.{low}:7000", 200 + number)
}

/// A cast that waits for more receivers than there are.
fn waiting(scratch: &Scratch, server: &Daemon, group: &str) -> Command {
    let group = format!("--group={group}");
    let words = ["cast", "image", &group, "--interface=lo", "--wait-for=100", "--patience=10m", "--no-wait", "--json"];
    order(scratch, server, &words)
}

/// The groups that a mirror hears.
fn heard(scratch: &Scratch, mirror: &Daemon) -> Vec<String> {
    let status = status(scratch, mirror);
    let group = |group: &Value| group["group"].as_str().unwrap().to_owned();
    status["receptions"].as_array().unwrap().iter().map(group).collect()
}

#[test]
fn what_cannot_be_sent_is_refused_with_a_reason() {
    let scratch = Scratch::new();
    let (server, _) = serve(&scratch);
    let socket = socket_of(&scratch, &server);
    for (body, code, reason) in [
        (json!({"group": "10.0.0.1:7"}), 400, "no multicast group"),
        (json!({"group": "239.1.2.3"}), 400, "no multicast group"),
        (json!({"interface": "no-such-one"}), 409, "cannot send to 239."),
        (json!({"rate": 1}), 400, "too slow"),
        (json!({"rate": 100_000, "min_rate": 200_000}), 400, "more than the rate"),
        (json!({"all": true, "profile": "boot"}), 400, "only one"),
        (json!({"profile": "boot"}), 409, "no profile boot"),
        (json!({"ranges": [{"start": 0, "length": SIZE + 1}]}), 400, "ends at"),
        (json!({"repair_percent": 101.0}), 400, "per cent"),
        (json!({"patience_seconds": -1.0}), 400, "patient"),
        (json!({"deadline": 1.0}), 400, "has passed"),
        (json!({"deadline": 1.0, "deadline_seconds": 1.0}), 400, "twice"),
        (json!({"gruop": "239.1.2.3:7"}), 400, "unknown field"),
    ] {
        let mut order = body.clone();
        order.as_object_mut().unwrap().entry("interface").or_insert(json!("lo"));
        let (answered, answer) = ask(&socket, "POST /v1/images/image/cast", &order.to_string());
        let error = answer["error"].as_str().unwrap_or_else(|| panic!("{body}: {answer}"));
        assert!(answered == code && error.contains(reason), "{body}: {answered} {error}");
    }
    assert_eq!(ask(&socket, "GET /v1/casts", "").1, json!({"casts": []}), "none has begun");
    let complaint = ends_with(1, &mut order(&scratch, &server, &["cast", "other"]));
    assert!(complaint.contains("no image \"other\""), "{complaint}");
    for words in [&["cast"][..], &["cast", "image", "--group", "10.0.0.1:7"], &["cast", "image", "--list"]] {
        ends_with(2, &mut order(&scratch, &server, words));
    }
}

#[test]
fn a_mirror_sends_what_it_has_only() {
    let scratch = Scratch::new();
    let (server, _) = serve(&scratch);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[ON_DEMAND]);
    let group = group(1);
    let complaint = ends_with(1, &mut waiting(&scratch, &mirror, &group));
    assert!(complaint.contains("4M of \"image\" are not here") && complaint.contains("prefetch"), "{complaint}");
    run(&mut order(&scratch, &mirror, &["prefetch", "image", "--wait"]));
    let taken: Value = serde_json::from_str(&run(&mut waiting(&scratch, &mirror, &group))).unwrap();
    assert_eq!(taken["total_bytes"], SIZE);
}

#[test]
fn an_image_is_sent_to_a_group_once_at_a_time_and_called_off() {
    let scratch = Scratch::new();
    let (server, _) = serve(&scratch);
    let group = group(1);
    let taken: Value = serde_json::from_str(&run(&mut waiting(&scratch, &server, &group))).unwrap();
    assert_eq!((&taken["cast"], &taken["group"], &taken["wait_for"]), (&json!(1), &json!(group), &json!(100)));
    let complaint = ends_with(1, &mut waiting(&scratch, &server, &group));
    assert!(complaint.contains("cast 1 sends \"image\""), "{complaint}");
    let text = run(&mut order(&scratch, &server, &["status"]));
    assert!(text.contains("\ncasts\n") && text.contains(&group), "{text}");
    run(&mut order(&scratch, &server, &["cast", "--cancel=1"]));
    let list: Value = serde_json::from_str(&run(&mut order(&scratch, &server, &["cast", "--list", "--json"]))).unwrap();
    assert_eq!((&list["casts"][0]["state"], &list["casts"][0]["session"]), (&json!("cancelled"), &taken["session"]));
    assert_eq!(status(&scratch, &server)["casts"], json!([]));
    run(&mut waiting(&scratch, &server, &group));
    assert_eq!(server.stop().lines("a cast is over").count(), 2, "the end of the server calls it off");
}

#[test]
fn mirrors_below_mirrors_are_told_and_leave_when_it_is_over() {
    let scratch = Scratch::new();
    let (server, _) = serve(&scratch);
    let start = |name: &str, upstream: &Daemon, words: &[&str]| {
        let words = [&[ON_DEMAND, "--interface=lo"], words].concat();
        Daemon::mirror_named(&scratch, name, upstream.uri(), &words)
    };
    let deaf = start("deaf", &server, &["--no-casts"]);
    let below = start("below", &deaf, &[]);
    let beside = start("beside", &server, &[]);
    let (first, second) = (group(1), group(2));
    run(&mut waiting(&scratch, &server, &first));
    eventually("told", || [&below, &beside].iter().all(|mirror| heard(&scratch, mirror) == [first.clone()]));
    run(&mut waiting(&scratch, &server, &second));
    let both = [first, second.clone()];
    eventually("both", || [&below, &beside].iter().all(|mirror| heard(&scratch, mirror) == both));
    assert!(both.len() <= MOST_GROUPS && heard(&scratch, &deaf).is_empty(), "it hands on what it does not follow");
    run(&mut order(&scratch, &server, &["cast", "--cancel=1"]));
    eventually("one left", || [&below, &beside].iter().all(|mirror| heard(&scratch, mirror) == [second.clone()]));
}

#[test]
fn what_a_cast_does_not_bring_is_fetched() {
    let scratch = Scratch::new();
    let (server, bytes) = serve(&scratch);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[ON_DEMAND, "--interface=lo"]);
    let group = format!("--group={}", group(1));
    let slowly = ["cast", "image", &group, "--interface=lo", "--rate=64K", "--wait-for=1", "--no-wait"];
    run(&mut order(&scratch, &server, &slowly));
    let orders = || status(&scratch, &mirror)["orders"].as_array().unwrap().clone();
    eventually("an order behind the session", || orders().len() == 1);
    let behind = orders()[0].clone();
    let what = format!("cast {}", status(&scratch, &server)["casts"][0]["session"].as_str().unwrap());
    assert_eq!((&behind["what"], &behind["held"], &behind["image"]), (&json!(what), &json!(true), &json!("image")));
    let text = run(&mut order(&scratch, &mirror, &["prefetch", "--list"]));
    assert!(text.contains("held: a cast brings it"), "{text}");
    run(&mut order(&scratch, &server, &["cast", "--cancel=1"]));
    eventually("the rest", || orders().is_empty());
    let told = image_status(&scratch, &mirror, "image")["mirror"].clone();
    assert_eq!(told["resident_bytes"], SIZE, "{told}");
    assert!(told["fill"]["prefetch"]["brought_bytes"].as_u64().unwrap() > 0, "{told}");
    assert_holds(mirror.uri(), &bytes);
}

#[test]
fn a_mirror_that_cannot_join_does_not_start() {
    let scratch = Scratch::new();
    let (server, _) = serve(&scratch);
    let log = scratch.path("mirror.log");
    let mut command = headwater(&log);
    command.args(["mirror", server.uri(), "--join=239.1.2.3:7000", "--interface=no-such-one", "--cache"]);
    command.arg(scratch.path("cache")).arg("--unix").arg(scratch.path("mirror.sock"));
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let complaint = std::fs::read_to_string(&log).unwrap();
    assert!(complaint.contains("cannot join 239.1.2.3:7000"), "{complaint}");
}
