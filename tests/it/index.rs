//! Manifests: made by the program, announced by servers, taken by their names.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use headwater::manifest::{self, ImageId};

use crate::serve::LoopDevice;
use crate::support::client::Client;
use crate::support::peers::convert;
use crate::support::{Daemon, Scratch, eventually, headwater, noise, run, run_failing};

const MIB: u64 = 1 << 20;

fn index(scratch: &Scratch, arguments: &[&str]) -> Command {
    let mut command = headwater(&scratch.path("index.log"));
    command.arg("index").args(arguments);
    command
}

/// Indexes one image and gives back its identity as it was printed.
fn identity_of(scratch: &Scratch, image: &Path) -> String {
    let line = run(index(scratch, &[]).arg(image));
    let (identity, path) = line.trim_end().split_once("  ").unwrap();
    assert_eq!(Path::new(path), image);
    assert!(identity.parse::<ImageId>().is_ok(), "{line}");
    identity.to_owned()
}

fn manifest_of(image: &Path) -> PathBuf {
    headwater::image::manifest_path(image)
}

/// What a server says the image is.
fn announced(uri: &str) -> Option<String> {
    let text = run(Command::new(env!("CARGO_BIN_EXE_headwater")).args(["info", "--json", uri]));
    let info: serde_json::Value = serde_json::from_str(&text).unwrap();
    info["image"].as_str().map(str::to_owned)
}

/// The same export with something behind its name.
fn renamed(uri: &str, suffix: &str) -> String {
    uri.replace("?socket=", &format!("{suffix}?socket="))
}

fn touch(path: &Path) {
    let file = fs::File::options().write(true).open(path).unwrap();
    file.set_modified(file.metadata().unwrap().modified().unwrap() + Duration::from_secs(1)).unwrap();
}

/// An image with holes, and all of its bytes.
fn sample(scratch: &Scratch) -> (PathBuf, Vec<u8>) {
    let image = scratch.sparse("image.raw", 40 * MIB, &[(0, &noise(5 << 20, 1)), (30 * MIB, &noise(100_000, 2))]);
    let bytes = fs::read(&image).unwrap();
    (image, bytes)
}

#[test]
fn an_indexed_image_is_announced_and_its_manifest_can_be_copied() {
    let scratch = Scratch::new();
    let (image, bytes) = sample(&scratch);
    let identity = identity_of(&scratch, &image);
    let (header, manifest) = manifest::of_bytes(&bytes, manifest::DEFAULT_CHUNK_SIZE);
    assert_eq!(identity, header.id.to_string());
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    assert_eq!(announced(server.uri()), Some(identity.clone()));
    let info = run(Command::new(env!("CARGO_BIN_EXE_headwater")).args(["info", server.uri()]));
    assert!(info.contains(&format!("image        {identity}")), "{info}");
    // To clients of others it is an export like any.
    let copy = scratch.path("copy");
    for name in ["@manifest".to_owned(), format!("@{identity}@manifest")] {
        run(Command::new("nbdcopy").arg(renamed(server.uri(), &name)).arg(&copy));
        assert!(fs::read(&copy).unwrap() == manifest, "{name}");
    }
    run(Command::new("nbdcopy").arg(renamed(server.uri(), &format!("@{identity}"))).arg(&copy));
    assert!(fs::read(&copy).unwrap() == bytes);
    let listed = run(Command::new("nbdinfo").args(["--list", server.uri()]));
    assert!(!listed.contains("@manifest") && !listed.contains(&format!("@{identity}")), "{listed}");
    // Contents that are not here are not here, whatever the name.
    let wrong = format!("@blake3-{}", "0".repeat(64));
    for suffix in [wrong.clone(), format!("{wrong}@manifest"), "@blake3-00".to_owned()] {
        let complaint = run_failing(Command::new("nbdinfo").arg(renamed(server.uri(), &suffix)));
        assert!(complaint.contains("No such file or directory"), "{complaint}");
    }
    let log = server.stop();
    assert_eq!(log.lines("the image has a manifest").count(), 1);
}

#[test]
fn a_manifest_of_another_state_is_refused_with_advice() {
    let scratch = Scratch::new();
    let (image, _) = sample(&scratch);
    let identity = identity_of(&scratch, &image);
    touch(&image);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    assert_eq!(announced(server.uri()), None);
    assert!(Client::open(server.uri()).read(0, 1000) == noise(5 << 20, 1)[..1000]);
    run_failing(Command::new("nbdinfo").arg(renamed(server.uri(), "@manifest")));
    run_failing(Command::new("nbdinfo").arg(renamed(server.uri(), &format!("@{identity}"))));
    let log = server.stop();
    let warning = log.lines("the manifest is not used").next().unwrap();
    assert_eq!(warning["unfit"], "the image has changed since: other time of modification");
    assert!(warning["advice"].as_str().unwrap().contains("headwater index"), "{warning}");
    // Indexed anew it is used, and writable it is not.
    fs::remove_file(scratch.path("serve.log")).unwrap();
    assert_eq!(identity_of(&scratch, &image), identity);
    let server = Daemon::serve(&scratch, &image, &[]);
    assert_eq!(announced(server.uri()), None);
    let log = server.stop();
    let line = log.lines("the manifest of the image is not used").next().unwrap();
    assert!(line["reason"].as_str().unwrap().contains("--read-only"), "{line}");
}

#[test]
fn an_image_that_is_changed_while_it_is_served_loses_its_identity() {
    let scratch = Scratch::new();
    let (image, _) = sample(&scratch);
    let identity = identity_of(&scratch, &image);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    assert_eq!(announced(server.uri()), Some(identity));
    fs::File::options().write(true).open(&image).unwrap().write_all_at(b"new", 7).unwrap();
    for _ in 0..2 {
        assert_eq!(announced(server.uri()), None);
        run_failing(Command::new("nbdinfo").arg(renamed(server.uri(), "@manifest")));
    }
    let log = server.stop();
    let told = "the image was changed while it is served: it has no identity any more";
    assert_eq!(log.lines(told).count(), 1, "it is told once");
}

#[test]
fn the_contents_of_qcow2_files_are_indexed() {
    let scratch = Scratch::new();
    let (raw, bytes) = sample(&scratch);
    let identity = manifest::of_bytes(&bytes, manifest::DEFAULT_CHUNK_SIZE).0.id.to_string();
    for (name, options) in [("plain.qcow2", &["-O", "qcow2"][..]), ("packed.qcow2", &["-O", "qcow2", "-c"])] {
        let image = convert(&scratch, &raw, name, options);
        assert_eq!(identity_of(&scratch, &image), identity);
        fs::remove_file(scratch.path("serve.log")).unwrap_or_default();
        let server = Daemon::serve(&scratch, &image, &[]);
        assert_eq!(announced(server.uri()), Some(identity.clone()));
    }
    let overlay = scratch.path("overlay.qcow2");
    let mut create = Command::new("qemu-img");
    run(create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&raw).arg(&overlay));
    let complaint = run_failing(index(&scratch, &[]).arg(&overlay).stderr(Stdio::piped()));
    assert!(complaint.contains("several files"), "{complaint}");
}

#[test]
fn block_devices_are_not_indexed() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let device = LoopDevice::on(&image);
    let complaint = run_failing(index(&scratch, &[&device.0]).stderr(Stdio::piped()));
    assert!(complaint.contains("block device, which has no time of modification"), "{complaint}");
    let mut serve = headwater(&scratch.path("log"));
    serve.args(["serve", "--read-only", "--index", &device.0, "--unix"]).arg(scratch.path("s")).stderr(Stdio::piped());
    let complaint = run_failing(&mut serve);
    assert!(complaint.contains("--index:") && complaint.contains("block device"), "{complaint}");
}

#[test]
fn serving_with_index_makes_what_is_missing_and_announces_it() {
    let scratch = Scratch::new();
    let (image, bytes) = sample(&scratch);
    let identity = manifest::of_bytes(&bytes, manifest::DEFAULT_CHUNK_SIZE).0.id.to_string();
    let server = Daemon::serve(&scratch, &image, &["--read-only", "--index", "--index-rate", "1G"]);
    eventually("identity", || announced(server.uri()) == Some(identity.clone()));
    let copy = scratch.path("copy");
    run(Command::new("nbdcopy").arg(renamed(server.uri(), "@manifest")).arg(&copy));
    assert!(fs::read(&copy).unwrap() == manifest::of_bytes(&bytes, manifest::DEFAULT_CHUNK_SIZE).1);
    server.stop();
    // It is there for the next time.
    let before = fs::metadata(manifest_of(&image)).unwrap().modified().unwrap();
    let server = Daemon::serve(&scratch, &image, &["--read-only", "--index"]);
    assert_eq!(announced(server.uri()), Some(identity));
    server.stop();
    assert_eq!(fs::metadata(manifest_of(&image)).unwrap().modified().unwrap(), before);
    // What clients may write to is not indexed.
    let complaint =
        run_failing(headwater(&scratch.path("log")).args(["serve", "--index"]).arg(&image).stderr(Stdio::piped()));
    assert!(complaint.contains("--read-only"), "{complaint}");
}

#[test]
fn a_server_that_ends_leaves_its_work_to_the_next_run() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(12 << 20, 1));
    // A minute for each block.
    let server = Daemon::serve(&scratch, &image, &["--read-only", "--index", "--index-rate", "64K"]);
    let part = headwater::image::index::part_path(&image);
    eventually("unfinished manifest", || part.exists());
    let log = server.stop();
    assert_eq!(log.lines("indexing stopped: the next run goes on from here").count(), 1);
    assert!(part.exists() && !manifest_of(&image).exists());
    identity_of(&scratch, &image);
    assert!(!part.exists());
}

#[test]
fn an_interrupted_run_is_gone_on_with_and_a_finished_one_not_repeated() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(64 << 20, 1));
    let part = headwater::image::index::part_path(&image);
    // Half a second for each block of 4 MiB.
    let mut child =
        index(&scratch, &["--rate", "8M", "--threads", "1"]).arg(&image).stderr(Stdio::piped()).spawn().unwrap();
    eventually("digests of the first block", || {
        part.exists() && fs::read(&part).is_ok_and(|bytes| bytes.get(4096..4100) > Some(&[0; 4]))
    });
    run(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let mut complaint = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut complaint).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(complaint.contains("stopped: the next run goes on from here"), "{complaint}");
    assert!(part.exists());
    let json = |arguments: &[&str]| -> serde_json::Value {
        let text = run(index(&scratch, arguments).arg("--json").arg(&image));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()[0].clone()
    };
    let made = json(&[]);
    assert_eq!((made["made"].as_bool(), made["size"].as_u64()), (Some(true), Some(64 * MIB)));
    assert!(made["read_bytes"].as_u64().unwrap() < 64 * MIB, "{made}");
    assert_eq!(made["identity"], manifest::of_bytes(&noise(64 << 20, 1), 65_536).0.id.to_string());
    let again = json(&[]);
    assert_eq!((again["made"].as_bool(), again["read_bytes"].as_u64()), (Some(false), Some(0)));
    assert_eq!(again["identity"], made["identity"]);
    assert_eq!(json(&["--force"])["read_bytes"], 64 * MIB);
    // A chunk size of one's own makes another manifest, with which whoever asks for none is content.
    let other = json(&["--chunk-size", "1M"]);
    assert_eq!((other["made"].as_bool(), other["chunk_size"].as_u64()), (Some(true), Some(MIB)));
    assert_ne!(other["identity"], made["identity"]);
    assert_eq!(json(&[])["identity"], other["identity"]);
    touch(&image);
    let anew = json(&[]);
    assert_eq!((anew["made"].as_bool(), &anew["identity"]), (Some(true), &made["identity"]));
    let log = fs::read_to_string(scratch.path("index.log")).unwrap();
    assert!(log.contains("the manifest still fits: nothing to do") && log.contains("it is made anew"), "{log}");
}

#[test]
fn memory_does_not_grow_with_the_image() {
    let scratch = Scratch::new();
    // A manifest of 128 MiB, most of it a hole.
    let image = scratch.sparse("image.raw", 16 << 30, &[(0, &noise(64 << 20, 1)), (15 << 30, &noise(1 << 20, 2))]);
    let program = index(&scratch, &["--chunk-size", "4K", "--threads", "16"]);
    let script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True); \
                  print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)";
    let mut measured = Command::new("python3");
    measured.args(["-c", script]).arg(program.get_program()).args(program.get_args()).arg(&image);
    let text = run(&mut measured);
    let peak_kib: u64 = text.lines().last().unwrap().parse().unwrap();
    assert!(peak_kib < 64 << 10, "{peak_kib} KiB");
}
