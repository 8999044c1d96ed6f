//! Caches from outside: what they take on the disk, what their mirror says of them, what they give.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use headwater::export::conformance::Random;
use serde_json::Value;

use super::client::Client;
use super::{Daemon, Scratch, headwater, run};

/// Bytes that a directory and all that is in it take on the disk: what `du` counts.
pub(crate) fn allocated(path: &Path) -> u64 {
    // What goes away while we look is not there.
    let Ok(metadata) = fs::symlink_metadata(path) else { return 0 };
    let inside = fs::read_dir(path).into_iter().flatten().filter_map(Result::ok);
    metadata.blocks() * 512 + inside.map(|entry| allocated(&entry.path())).sum::<u64>()
}

/// Looks at a figure every few milliseconds.
pub(crate) struct Sampler {
    stop: Sender<()>,
    thread: JoinHandle<(u64, u64)>,
}

impl Sampler {
    /// What a directory takes. Its files are looked at one after the other, so what is given up in one and taken in another
    /// meanwhile counts twice, if this thread has to wait for a CPU in between: too much is what is seen twice running.
    pub(crate) fn of(directory: PathBuf) -> Self {
        Self::with(move || allocated(&directory).min(allocated(&directory)))
    }

    pub(crate) fn with(figure: impl Fn() -> u64 + Send + 'static) -> Self {
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            let (mut most, mut samples) = (0, 0);
            loop {
                most = most.max(figure());
                samples += 1;
                if stopped.recv_timeout(Duration::from_millis(3)) != Err(RecvTimeoutError::Timeout) {
                    return (most, samples);
                }
            }
        });
        Self { stop, thread }
    }

    /// The most that was seen.
    pub(crate) fn most(self) -> u64 {
        drop(self.stop);
        let (most, samples) = self.thread.join().unwrap();
        assert!(samples > 1 && most > 0, "{samples} samples, {most} bytes");
        most
    }
}

/// A command of an operator to one server of `scratch`.
pub(crate) fn order(scratch: &Scratch, server: &Daemon, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.args(arguments).arg("--at").arg(scratch.path(&format!("run/{}.sock", server.pid())));
    command
}

/// All that a server says of itself.
pub(crate) fn status(scratch: &Scratch, server: &Daemon) -> Value {
    serde_json::from_str(&run(&mut order(scratch, server, &["status", "--json"]))).unwrap()
}

/// What a mirror says of one of its images.
pub(crate) fn image_status(scratch: &Scratch, server: &Daemon, name: &str) -> Value {
    let status = status(scratch, server);
    let images = status["images"].as_array().unwrap();
    images.iter().find(|image| image["name"] == name).unwrap_or_else(|| panic!("no {name}: {status}")).clone()
}

/// Makes the manifest of an image and gives back its identity.
pub(crate) fn index(scratch: &Scratch, image: &Path, arguments: &[&str]) -> String {
    let mut command = headwater(&scratch.path("index.log"));
    let line = run(command.arg("index").args(arguments).arg(image));
    line.split_once("  ").unwrap().0.to_owned()
}

/// The same export with something behind its name.
pub(crate) fn renamed(uri: &str, suffix: &str) -> String {
    uri.replace("?socket=", &format!("{suffix}?socket="))
}

/// Reads an export from its beginning to its end, and holds it against what it should be.
#[track_caller]
pub(crate) fn assert_holds(uri: &str, bytes: &[u8]) {
    let mut client = Client::open(uri);
    assert_eq!(client.agreed.size, bytes.len() as u64);
    for (start, part) in (0..).step_by(1 << 20).zip(bytes.chunks(1 << 20)) {
        let read = client.read(start, part.len() as u64);
        let wrong = read.iter().zip(part).position(|(one, other)| one != other);
        assert_eq!(wrong, None, "the first wrong byte in the MiB at {start}");
    }
}

/// Flips so many bits of a file anywhere in it; gives back the bytes that were hit.
pub(crate) fn flip_bits(path: &Path, random: &mut Random, count: u64) -> Vec<u64> {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let mut places = Vec::new();
    for _ in 0..count {
        let place = random.below(length);
        // A bit that is flipped back is no damage.
        if places.contains(&place) {
            continue;
        }
        let mut byte = [0];
        file.read_exact_at(&mut byte, place).unwrap();
        byte[0] ^= 1 << random.below(8);
        file.write_all_at(&byte, place).unwrap();
        places.push(place);
    }
    places
}
