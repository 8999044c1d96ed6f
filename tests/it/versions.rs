//! Images that are versions of each other: the second one costs what is new in it.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use headwater::export::conformance::Random;

use crate::support::cache::{assert_holds, image_status, index, status};
use crate::support::{Daemon, Scratch, headwater, mirror_command, noise, run};

/// Makes a file system with some 40 MB of files, and one in which an upgrade has replaced some of them.
fn versions(scratch: &Scratch) -> (std::path::PathBuf, std::path::PathBuf) {
    let tree = scratch.path("tree");
    let mut random = Random::new(61);
    for number in 0..400u64 {
        let directory = tree.join(format!("usr/lib/package{}", number / 20));
        fs::create_dir_all(&directory).unwrap();
        let length = 1000 + random.below(200_000) as usize;
        fs::write(directory.join(format!("file{number}")), noise(length, 1001 + 2 * number)).unwrap();
    }
    let (old, new) = (scratch.path("old.raw"), scratch.path("new.raw"));
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&old).arg("64M"));
    fs::copy(&old, &new).unwrap();
    // As dpkg does it: the new file is written beside the old one, and takes its name.
    let mut orders = String::new();
    for number in (40..60).chain([133, 277]) {
        let name = format!("/usr/lib/package{}/file{number}", number / 20);
        let length = 1000 + random.below(200_000) as usize;
        let file = scratch.file(&format!("new{number}"), &noise(length, 5001 + 2 * number));
        orders.push_str(&format!("write {} {name}.dpkg-new\nrm {name}\nln {name}.dpkg-new {name}\n", file.display()));
        orders.push_str(&format!("unlink {name}.dpkg-new\n"));
    }
    let orders = scratch.file("orders", orders.as_bytes());
    run(Command::new("debugfs").arg("-w").arg("-f").arg(orders).arg(&new));
    (old, new)
}

/// The digests of an image that are not those of zeroes.
fn digests(image: &Path) -> Vec<Vec<u8>> {
    let bytes = fs::read(headwater::image::manifest_path(image)).unwrap();
    let digests = bytes[4096..].chunks(32).map(<[u8]>::to_vec);
    digests.filter(|digest| digest.iter().any(|byte| *byte != 0)).collect()
}

#[test]
fn the_second_version_of_an_image_costs_its_new_chunks_only() {
    let scratch = Scratch::new();
    let (old, new) = versions(&scratch);
    for image in [&old, &new] {
        index(&scratch, image, &[]);
    }
    let known: HashSet<_> = digests(&old).into_iter().collect();
    let (shared, fresh): (Vec<_>, Vec<_>) = digests(&new).into_iter().partition(|digest| known.contains(digest));
    let expected = 65_536 * fresh.iter().collect::<HashSet<_>>().len() as u64;
    assert!(fresh.len() > 20 && shared.len() > 5 * fresh.len(), "{} new, {} shared", fresh.len(), shared.len());

    let log = scratch.path("serve.log");
    let mut command = headwater(&log);
    command.arg("serve").args([&old, &new]).args(["--read-only", "--unix"]).arg(scratch.path("serve.sock"));
    let server = Daemon::start(command, 2, &log);
    let (log, mut command) = mirror_command(&scratch, "mirror", &server.uris()[0]);
    command.arg(&server.uris()[1]);
    let mirror = Daemon::start(command, 2, &log);
    // They are printed by name.
    assert_holds(&mirror.uris()[1], &fs::read(&old).unwrap());
    assert_holds(&mirror.uris()[0], &fs::read(&new).unwrap());
    let second = image_status(&scratch, &mirror, "new")["mirror"].clone();
    let fetched = second["upstream_bytes"].as_u64().unwrap();
    eprintln!("the second version: {fetched} bytes fetched, {expected} are new");
    assert!(fetched >= expected && fetched as f64 <= 1.05 * expected as f64, "{fetched} bytes for {expected} new ones");
    let saved = second["deduplicated_bytes"].as_u64().unwrap();
    assert!(saved as f64 >= 0.95 * (65_536 * shared.len()) as f64, "{saved} bytes saved");
    let first = image_status(&scratch, &mirror, "old")["mirror"]["deduplicated_bytes"].as_u64().unwrap();
    assert_eq!(status(&scratch, &mirror)["cache"]["deduplicated_bytes"], first + saved);
    server.stop();
}
