//! `headwater verify` of files, of served images and of mirrors; and what `headwater status` counts, held against what
//! was done.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::admin::{ends_with, operator, status};
use crate::support::client::Client;
use crate::support::{Daemon, ON_DEMAND, Scratch, eventually, headwater, noise, run};

const CHUNK: u64 = 65_536;
const MIB: u64 = 1 << 20;

/// An image of noise with a manifest.
fn indexed(scratch: &Scratch, name: &str, bytes: &[u8]) -> PathBuf {
    let path = scratch.file(name, bytes);
    run(Command::new(env!("CARGO_BIN_EXE_headwater")).arg("index").arg(&path).stderr(Stdio::null()));
    path
}

/// Changes bytes without moving the time of modification, as a bad disk does.
fn rot(path: &Path, offset: u64) {
    let file = fs::File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.write_all_at(&[0; 100], offset).unwrap();
    file.set_modified(modified).unwrap();
    file.sync_all().unwrap();
}

/// What `verify --json` says that must end with `code`.
#[track_caller]
fn verify(scratch: &Scratch, code: i32, arguments: &[&str]) -> Value {
    let mut command = operator(scratch, &["verify", "--json"]);
    let output = command.args(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(code), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Chunks that were checked, damaged, repaired, and not repaired.
fn counts(job: &Value) -> [u64; 4] {
    ["checked_chunks", "damaged_chunks", "repaired_chunks", "unrepaired_chunks"]
        .map(|field| job[field].as_u64().unwrap())
}

#[test]
fn a_file_is_held_against_its_manifest() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let path = image.to_str().unwrap();
    let complaint = ends_with(1, &mut operator(&scratch, &["verify", path]));
    assert!(complaint.contains("no manifest") && complaint.contains("headwater index"), "{complaint}");
    indexed(&scratch, "image.raw", &noise(1 << 20, 1));
    assert!(run(&mut operator(&scratch, &["verify", path])).contains("16 chunks checked, 0 damaged"));
    [CHUNK + 5, 2 * CHUNK, 15 * CHUNK].iter().for_each(|offset| rot(&image, *offset));
    let text = ends_with(4, &mut operator(&scratch, &["verify", path, "--threads=2"]));
    assert!(text.contains("3 damaged\n  65536..196608  128K, other bytes\n  983040..1048576  64K"), "{text}");
    let found = verify(&scratch, 4, &[path]);
    assert_eq!(found["damaged"][0], json!({"start": CHUNK, "length": 2 * CHUNK, "readable": true}));
    assert_eq!((&found["damaged_chunks"], &found["differences"]), (&json!(3), &json!([])));
    // A copy is another file with the same bytes.
    let copy = scratch.file("copy.raw", &noise(1 << 20, 1));
    fs::copy(scratch.path("image.raw.manifest"), scratch.path("copy.raw.manifest")).unwrap();
    let text = run(&mut operator(&scratch, &["verify", copy.to_str().unwrap()]));
    assert!(text.contains(" 0 damaged") && text.contains("other time of modification, inode"), "{text}");
    // What is behind the end of what was indexed is not what was indexed.
    fs::File::options().append(true).open(&copy).unwrap().set_len(MIB + 1).unwrap();
    let text = ends_with(4, &mut operator(&scratch, &["verify", copy.to_str().unwrap()]));
    assert!(text.contains(" 0 damaged") && text.contains("other size"), "{text}");
}

#[test]
fn a_served_image_is_held_against_its_manifest() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let complaint = ends_with(1, &mut operator(&scratch, &["verify", "image"]));
    assert!(complaint.contains("headwater index"), "{complaint}");
    server.stop();
    let image = indexed(&scratch, "image.raw", &noise(1 << 20, 1));
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let told = &status(&scratch)["images"][0];
    assert_eq!(told["chunk_size"], 65_536);
    assert!(told["identity"].as_str().unwrap().starts_with("blake3-"));
    assert_eq!(counts(&verify(&scratch, 0, &["image"])), [16, 0, 0, 0]);
    rot(&image, 3 * CHUNK);
    assert_eq!(counts(&verify(&scratch, 4, &["image"])), [16, 1, 0, 1]);
    server.wait_for_log("a chunk of a real image is damaged");
    // A quarter of it at once, and the next one after 16 s.
    let mut slow = operator(&scratch, &["verify", "image", "--rate=16K"]);
    let child = slow.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    interrupt_when_running(&scratch, &child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("called off"), "{output:?}");
    server.stop();
    let _server = Daemon::serve(&scratch, &image, &[]);
    let complaint = ends_with(1, &mut operator(&scratch, &["verify", "image"]));
    assert!(complaint.contains("--read-only"), "{complaint}");
}

/// Sends SIGINT once the only server of `scratch` has a third job, which is the one of `child`.
fn interrupt_when_running(scratch: &Scratch, child: &std::process::Child) {
    let mut places = fs::read_dir(scratch.path("run")).unwrap().map(|entry| entry.unwrap().path());
    let socket = places.find(|path| path.extension().is_some_and(|extension| extension == "sock")).unwrap();
    let client =
        || run(Command::new("curl").args(["-s", "--unix-socket"]).arg(&socket).arg("http://localhost/v1/jobs/3"));
    eventually("the job", || client().contains("running"));
    run(Command::new("kill").args(["-INT", &child.id().to_string()]));
}

#[test]
fn damage_of_a_running_mirror_is_found_and_repaired() {
    for has_manifest in [true, false] {
        let scratch = Scratch::new();
        let bytes = noise(1 << 20, 1);
        let image =
            if has_manifest { indexed(&scratch, "image.raw", &bytes) } else { scratch.file("image.raw", &bytes) };
        let server = Daemon::serve(&scratch, &image, &["--read-only", "--admin=none"]);
        let mirror = Daemon::mirror(&scratch, server.uri(), &["--upstream-timeout=0.5"]);
        assert!(Client::open(mirror.uri()).read(0, MIB) == bytes);
        let mirror_status = || status(&scratch)["images"][0]["mirror"].clone();
        eventually("all of it", || mirror_status()["resident_bytes"] == MIB);
        assert_eq!(mirror_status()["verified"], has_manifest);
        let data = scratch.path("mirror.cache/image/data");
        assert_eq!(counts(&verify(&scratch, 0, &["image"])), [16, 0, 0, 0]);
        [5 * CHUNK, 9 * CHUNK + 1].iter().for_each(|offset| rot(&data, *offset));
        assert_eq!(counts(&verify(&scratch, 3, &["image"])), [16, 2, 2, 0]);
        eventually("all of it again", || mirror_status()["resident_bytes"] == MIB);
        // All but the first have to wait until those before them are paid for.
        let job = verify(&scratch, 0, &["image", "--rate=1M"]);
        assert!(job["seconds"].as_f64().unwrap() >= 15.0 / 16.0, "{job}");
        rot(&data, 7 * CHUNK);
        assert_eq!(counts(&verify(&scratch, 4, &["image", "--no-repair"])), [16, 1, 0, 1]);
        // It is known to be damaged, and nobody gets it as it is.
        assert!(Client::open(mirror.uri()).read(0, MIB) == bytes);
        server.stop();
        rot(&data, 11 * CHUNK);
        let job = verify(&scratch, 4, &["image"]);
        assert_eq!((counts(&job)[1], counts(&job)[2]), (1, 0), "{job}");
        let mut client = Client::open(mirror.uri());
        assert!(client.ask(headwater::nbd::wire::command::READ, 11 * CHUNK, CHUNK).error.is_some());
        assert!(client.read(0, 11 * CHUNK) == bytes[..11 << 16]);
    }
}

#[test]
fn status_counts_what_was_done() {
    let scratch = Scratch::new();
    let bytes = noise(12 << 20, 1);
    let (one, other) = (indexed(&scratch, "one.raw", &bytes), indexed(&scratch, "other.raw", &bytes));
    // It says that it has the image, and has another.
    let liar = indexed(&scratch, "one-liar.raw", &bytes);
    rot(&liar, 0);
    let serve = |name: &str, image: &Path| {
        let mut command = headwater(&scratch.path(&format!("{name}.log")));
        command.args(["serve", "--read-only", "--admin=none"]).arg(image).arg("--unix").arg(scratch.path(name));
        Daemon::start(command, 1, &scratch.path(&format!("{name}.log")))
    };
    let (liar, one, other) = (serve("liar", &liar), serve("one", &one), serve("other", &other));
    let log = scratch.path("mirror.log");
    let mut command = headwater(&log);
    command.arg("mirror").arg(format!("one={},{}", liar.uri(), one.uri())).arg(format!("other={}", other.uri()));
    command
        .arg("--cache")
        .arg(scratch.path("cache"))
        .args([ON_DEMAND, "--cache-size=8M", "--unix"])
        .arg(scratch.path("m.sock"));
    let mirror = Daemon::start(command, 2, &log);
    let of = |index: usize| status(&scratch)["images"][index]["mirror"].clone();
    let number = |value: &Value, field: &str| value[field].as_u64().unwrap_or_else(|| panic!("no {field}: {value}"));
    let numbers = |index: usize, fields: &[&str]| {
        let value = of(index);
        fields.iter().map(|field| number(&value, field)).collect::<Vec<_>>()
    };
    let mut client = Client::open(&mirror.uris()[0]);
    assert!(client.read(0, 4 * CHUNK) == bytes[..4 << 16]);
    eventually("four chunks", || numbers(0, &["resident_bytes"]) == [4 * CHUNK]);
    for chunk in 1..3 {
        assert!(client.read(chunk << 16, 4096) == bytes[usize::try_from(chunk).unwrap() << 16..][..4096]);
    }
    let fields = ["hits", "hit_bytes", "misses", "miss_bytes", "evictions", "pinned_bytes", "deduplicated_bytes"];
    assert_eq!(numbers(0, &fields), [2, 2 * 4096, 4, 4 * CHUNK, 0, 0, 0]);
    let upstreams = of(0)["upstreams"].clone();
    assert!(number(&upstreams[0], "wrong_replies") >= 1, "{upstreams}");
    assert_eq!((number(&upstreams[1], "wrong_replies"), &upstreams[1]["reachable"]), (0, &json!(true)));
    assert!(number(&of(0), "verify_failures") >= 1);
    // The other image has the same chunks.
    assert!(Client::open(&mirror.uris()[1]).read(0, 4 * CHUNK) == bytes[..4 << 16]);
    assert_eq!(numbers(1, &["misses", "deduplicated_bytes", "upstream_bytes"]), [4, 4 * CHUNK, 0]);
    assert_eq!(status(&scratch)["cache"]["deduplicated_bytes"], 4 * CHUNK);
    let text = run(&mut operator(&scratch, &["pin", "other", "--range=..64K"]));
    assert_eq!(text, "other: 64K pinned, all of it here\n");
    assert_eq!(numbers(1, &["pinned_bytes"]), [CHUNK]);
    // More than there is room for.
    assert!(client.read(0, 12 * MIB) == bytes);
    eventually("every chunk kept, evicted or passed through", || {
        let (all, cache) = ([of(0), of(1)], status(&scratch)["cache"].clone());
        let sum = |field| all.iter().map(|image| number(image, field)).sum::<u64>();
        let chunks = sum("resident_bytes") / CHUNK + sum("evictions") + number(&cache, "bypassed");
        sum("misses") == chunks && number(&cache, "evictions") == sum("evictions")
    });
    let cache = status(&scratch)["cache"].clone();
    assert_eq!((&cache["limit_bytes"], &cache["policy"]), (&json!(8 * MIB), &json!("s3fifo")));
    assert!(number(&cache, "allocated_bytes") + number(&cache, "in_flight_bytes") <= 8 * MIB, "{cache}");
    let text = run(&mut operator(&scratch, &["status"]));
    let line = |name: &str| text.lines().filter(|line| line.split_whitespace().next() == Some(name)).nth(1).unwrap();
    assert_eq!(line("other").split_whitespace().nth(1), Some("yes"), "{text}");
    let refused = ends_with(1, &mut operator(&scratch, &["pin", "one"]));
    assert!(refused.contains("--cache-size") && refused.contains("too much"), "{refused}");
    assert_eq!(run(&mut operator(&scratch, &["unpin", "other"])), "other: nothing is pinned\n");
    assert_eq!(numbers(1, &["pinned_bytes"]), [0]);
}
