//! Manifests of real files, held against those of their bytes in memory.

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::AtomicUsize;
use std::time::SystemTime;

use proptest::prelude::*;
use tokio::runtime::{Builder, LocalOptions};

use super::*;
use crate::disk::{Preference, attach};
use crate::export::conformance::{self, Random, sample_contents};
use crate::image::{Image, manifest_path, open_image};
use crate::manifest::{ImageId, of_bytes};
use crate::units::{MIB, to_u64, to_usize};

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("image.raw")
    }

    /// The image, with these bytes at these places and holes elsewhere; and all of its bytes.
    fn sparse(&self, size: u64, data: &[(u64, Vec<u8>)]) -> Vec<u8> {
        let file = fs::File::create(self.path()).unwrap();
        file.set_len(size).unwrap();
        let mut contents = vec![0; to_usize(size)];
        for (offset, bytes) in data {
            file.write_all_at(bytes, *offset).unwrap();
            contents[to_usize(*offset)..][..bytes.len()].copy_from_slice(bytes);
        }
        contents
    }

    fn manifest(&self) -> Vec<u8> {
        fs::read(manifest_path(&self.path())).unwrap()
    }

    fn image(&self) -> Image {
        open_image(&self.path(), &Options { read_only: true, format: Format::Raw, ..Options::default() }).unwrap()
    }

    fn id(&self) -> Option<ImageId> {
        self.image().export.facts().identity
    }
}

fn settings(chunk_size: u32, threads: usize) -> Settings {
    Settings { chunk_size, threads, checkpoint: Duration::ZERO, ..Settings::default() }
}

fn index(scratch: &Scratch, settings: &Settings) -> Result<Made, IndexError> {
    make(&scratch.path(), Format::Raw, settings, &AtomicBool::new(false), &|_| {})
}

/// Stops after `blocks` blocks.
fn index_a_part(scratch: &Scratch, settings: &Settings, blocks: usize) -> Result<Made, IndexError> {
    let (cancel, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let count = |_| {
        if done.fetch_add(1, Ordering::Relaxed) + 1 == blocks {
            cancel.store(true, Ordering::Relaxed);
        }
    };
    make(&scratch.path(), Format::Raw, settings, &cancel, &count)
}

/// Changes a file and nothing else of its state than the time of modification.
fn touch(path: &Path) {
    let file = fs::File::options().write(true).open(path).unwrap();
    let later = file.metadata().unwrap().modified().unwrap() + Duration::from_secs(1);
    file.set_modified(later).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn the_manifest_of_a_file_is_that_of_its_bytes(
        size in prop_oneof![0u64..20_000, 0u64..24 * MIB],
        chunk_size in prop_oneof![Just(4096u32), Just(65_536), Just(1 << 19), Just(4 << 20)],
        threads in 1usize..5,
        seed in any::<u64>(),
    ) {
        let scratch = Scratch::new();
        let mut random = Random::new(seed);
        let data: Vec<_> = (0..random.below(12))
            .map(|number| {
                let range = random.range(size, 3 * MIB);
                (range.start(), sample_contents(to_usize(range.length()), seed ^ number))
            })
            .collect();
        let contents = scratch.sparse(size, &data);
        let made = index(&scratch, &settings(chunk_size, threads)).unwrap();
        let (expected, bytes) = of_bytes(&contents, chunk_size);
        prop_assert_eq!((made.header.shape, made.header.id), (expected.shape, expected.id));
        prop_assert!(scratch.manifest()[crate::manifest::BLOCK..] == bytes[crate::manifest::BLOCK..]);
        prop_assert!(!part_path(&scratch.path()).exists());
        prop_assert_eq!(scratch.id(), Some(expected.id));
    }

    #[test]
    fn an_interrupted_run_is_gone_on_with(
        stops in prop::collection::vec(1usize..6, 1..4),
        threads in 1usize..4,
        chunk_size in prop_oneof![Just(4096u32), Just(65_536), Just(4 << 20)],
        seed in any::<u64>(),
    ) {
        let scratch = Scratch::new();
        // Eleven blocks, the last one short: three of data, a hole, five of data, a hole, some data at the end.
        let (size, is_data) = (10 * BLOCK + 12_345, |block: &u64| ![3, 9, 10].contains(block));
        let noise = sample_contents(to_usize(BLOCK), seed);
        let mut places: Vec<_> = (0..11).filter(is_data).map(|block| (block * BLOCK, noise.clone())).collect();
        places.push((size - 5000, vec![1; 5000]));
        let contents = scratch.sparse(size, &places);
        let (expected, bytes) = of_bytes(&contents, chunk_size);
        let settings = settings(chunk_size, threads);
        let whole = {
            let reference = Scratch::new();
            reference.sparse(size, &places);
            index(&reference, &settings).unwrap().read_bytes
        };
        let mut marked = 0;
        for stop in stops {
            match index_a_part(&scratch, &settings, stop) {
                Ok(made) => {
                    prop_assert_eq!(made.header.id, expected.id);
                    marked = 0;
                }
                Err(IndexError::Cancelled) => prop_assert!(part_path(&scratch.path()).exists()),
                Err(error) => prop_assert!(false, "{}", error),
            }
            // What a crash leaves behind the mark is never believed.
            if let Ok(part) = fs::File::options().read(true).write(true).open(part_path(&scratch.path())) {
                let mut done = [0; 8];
                part.read_exact_at(&mut done, 24).unwrap();
                let done = u64::from_le_bytes(done);
                prop_assert!(done * u64::from(chunk_size) >= marked, "it went back");
                marked = done * u64::from(chunk_size);
                let behind = crate::manifest::digest_at(done);
                part.write_all_at(&vec![0xee; to_usize(expected.shape.manifest_length() - behind)], behind).unwrap();
            }
        }
        let made = index(&scratch, &settings).unwrap();
        prop_assert!(made.header.id == expected.id);
        prop_assert!(scratch.manifest()[crate::manifest::BLOCK..] == bytes[crate::manifest::BLOCK..]);
        prop_assert_eq!(made.resumed_bytes, marked.min(size));
        // All that was read is what was not done, and holes are not read at all.
        let done = u64::try_from((0..marked / BLOCK).filter(is_data).count()).unwrap() * BLOCK;
        prop_assert_eq!(made.read_bytes + done, whole);
    }
}

#[test]
fn work_on_something_else_is_not_gone_on_with() {
    let scratch = Scratch::new();
    let contents = scratch.sparse(6 * BLOCK, &[(0, sample_contents(to_usize(6 * BLOCK), 1))]);
    let stop = || index_a_part(&scratch, &settings(65_536, 1), 3).unwrap_err();
    assert!(matches!(stop(), IndexError::Cancelled));
    // Another chunk size.
    let made = index(&scratch, &settings(4096, 1)).unwrap();
    assert_eq!((made.resumed_bytes, made.header.id), (0, of_bytes(&contents, 4096).0.id));
    // Another state of the file.
    assert!(matches!(stop(), IndexError::Cancelled));
    touch(&scratch.path());
    let made = index(&scratch, &settings(65_536, 1)).unwrap();
    assert_eq!((made.resumed_bytes, made.header.id), (0, of_bytes(&contents, 65_536).0.id));
    // And the same one.
    assert!(matches!(stop(), IndexError::Cancelled));
    assert_eq!(index(&scratch, &settings(65_536, 1)).unwrap().resumed_bytes, 3 * BLOCK);
}

#[test]
fn a_change_while_it_is_read_leaves_no_manifest() {
    let scratch = Scratch::new();
    scratch.sparse(3 * BLOCK, &[(0, sample_contents(to_usize(3 * BLOCK), 1))]);
    let file = fs::File::options().write(true).open(scratch.path()).unwrap();
    // The last change is behind the last read.
    for block in 1..=3 {
        let write = |Progress { done, total }| {
            assert_eq!(total, 3 * BLOCK);
            if done == block * BLOCK {
                file.write_all_at(b"new", 5).unwrap();
            }
        };
        let result = make(&scratch.path(), Format::Raw, &settings(4096, 1), &AtomicBool::new(false), &write);
        let text = result.unwrap_err().to_string();
        assert!(text.contains("was changed while it was read (other time of modification)"), "{text}");
        assert!(!manifest_path(&scratch.path()).exists() && !part_path(&scratch.path()).exists());
    }
    let replace = |_| {
        fs::rename(scratch.path(), scratch.0.path().join("old")).unwrap_or_default();
        fs::write(scratch.path(), b"another").unwrap();
    };
    let result = make(&scratch.path(), Format::Raw, &settings(4096, 1), &AtomicBool::new(false), &replace);
    assert!(result.unwrap_err().to_string().contains("inode"));
}

#[test]
fn a_file_that_was_just_written_is_told_from_one_that_is_written_again() {
    // As fast as it goes: the second write may be in the same tick of the clock as the first.
    for round in 0..20u8 {
        let scratch = Scratch::new();
        scratch.sparse(8192, &[(0, vec![round + 1; 8192])]);
        index(&scratch, &settings(4096, 1)).unwrap();
        fs::File::options().write(true).open(scratch.path()).unwrap().write_all_at(&[99], 0).unwrap();
        assert_eq!(scratch.id(), None, "{round}");
    }
}

#[test]
fn two_runs_do_not_disturb_each_other() {
    let scratch = Scratch::new();
    scratch.sparse(BLOCK, &[(0, vec![1; 10_000])]);
    let second = |_| {
        let error = index(&scratch, &settings(4096, 1)).unwrap_err();
        assert!(matches!(error, IndexError::InUse(_)), "{error}");
    };
    make(&scratch.path(), Format::Raw, &settings(4096, 1), &AtomicBool::new(false), &second).unwrap();
}

#[test]
fn what_cannot_have_a_manifest_says_why() {
    let scratch = Scratch::new();
    assert!(matches!(index(&scratch, &settings(4096, 1)), Err(IndexError::Open(_))));
    scratch.sparse(10_000, &[]);
    let writable = open_image(&scratch.path(), &Options::default()).unwrap();
    assert_eq!(writable.seal.unwrap_err(), CannotSeal::Writable);
}

#[test]
fn a_manifest_counts_as_long_as_the_file_is_as_it_was() {
    let scratch = Scratch::new();
    let contents = scratch.sparse(MIB, &[(0, vec![7; 70_000])]);
    let id = of_bytes(&contents, 4096).0.id;
    let unfit = || scratch.image().seal.unwrap().load().unwrap_err().to_string();
    assert_eq!(scratch.id(), None);
    index(&scratch, &settings(4096, 2)).unwrap();
    assert_eq!(scratch.id(), Some(id));
    let served = scratch.image();
    assert!(served.export.manifest().is_some());
    // Changed while it is served: once gone it is gone, also if somebody sets the time back.
    let before = fs::metadata(scratch.path()).unwrap().modified().unwrap();
    touch(&scratch.path());
    assert_eq!(served.export.facts().identity, None);
    assert!(served.export.manifest().is_none());
    let set_back = |time: SystemTime| {
        fs::File::options().write(true).open(scratch.path()).unwrap().set_modified(time).unwrap();
    };
    set_back(before);
    assert_eq!((served.export.facts().identity, scratch.id()), (None, Some(id)));
    touch(&scratch.path());
    assert_eq!((scratch.id(), unfit()), (None, "the image has changed since: other time of modification".into()));
    set_back(before);
    // Another file with the same bytes, and one of another length.
    let copy = scratch.0.path().join("copy");
    fs::copy(scratch.path(), &copy).unwrap();
    fs::rename(&copy, scratch.path()).unwrap();
    set_back(before);
    assert_eq!(unfit(), "the image has changed since: other inode");
    fs::write(scratch.path(), b"short").unwrap();
    assert_eq!(unfit(), "the image has changed since: other size, time of modification, inode");
    // Made anew it counts again.
    index(&scratch, &settings(4096, 2)).unwrap();
    assert_eq!(scratch.id(), Some(of_bytes(b"short", 4096).0.id));
}

#[test]
fn a_damaged_manifest_is_refused() {
    let scratch = Scratch::new();
    scratch.sparse(MIB, &[(0, vec![7; 70_000])]);
    index(&scratch, &settings(4096, 1)).unwrap();
    let good = scratch.manifest();
    let unfit = |bytes: &[u8]| {
        fs::write(manifest_path(&scratch.path()), bytes).unwrap();
        assert_eq!(scratch.id(), None);
        scratch.image().seal.unwrap().load().unwrap_err().to_string()
    };
    let mut random = Random::new(1);
    for _ in 0..100 {
        let mut bad = good.clone();
        let bit = to_usize(random.below(to_u64(8 * good.len())));
        bad[bit / 8] ^= 1 << (bit % 8);
        unfit(&bad);
    }
    let cut = &good[..good.len() - 1];
    let header = Header::decode(&good).unwrap();
    let anonymous = Header { source: None, ..header }.encode();
    let shape = Shape { image_size: MIB - 1, ..header.shape };
    let smaller = Header { shape, ..header }.encode();
    for (bytes, reason) in [
        (&b""[..], "it is damaged"),
        (&vec![1; 10_000], "it is not a Headwater manifest"),
        (cut, "it is damaged"),
        (&[&good[..], &[0; 32]].concat(), "it is damaged"),
        (&anonymous, "it does not say which file it was made from"),
        (&smaller, "it is of an image of 1048575 bytes, and this one has 1048576"),
    ] {
        assert_eq!(unfit(bytes), reason);
    }
    fs::write(manifest_path(&scratch.path()), good).unwrap();
    assert!(scratch.id().is_some());
}

#[test]
fn manifests_are_served_as_exports() {
    for preference in [Preference::Uring, Preference::Threads] {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let _attached = attach(preference).unwrap();
            let scratch = Scratch::new();
            let contents = scratch.sparse(40 * MIB, &[(5 * MIB, sample_contents(2 << 20, 1))]);
            index(&scratch, &settings(4096, 2)).unwrap();
            let manifest = scratch.image().export.manifest().unwrap();
            conformance::check(&*manifest, of_bytes(&contents, 4096).1).await;
        });
    }
}

#[test]
fn the_background_gives_every_image_its_identity_and_stops_when_told() {
    let (first, second) = (Scratch::new(), Scratch::new());
    first.sparse(2 * MIB, &[(0, vec![1; 10_000])]);
    second.sparse(64 * MIB, &[(0, sample_contents(64 << 20, 1))]);
    let (one, two) = (first.image(), second.image());
    // The second image is served by two names.
    let again = second.image();
    let seals = vec![one.seal.unwrap(), two.seal.unwrap(), again.seal.unwrap()];
    // 64 MiB in 64 hours.
    let slow = Settings { rate: Rate::new(Some(300)), ..settings(65_536, 1) };
    let background = Background::start(seals.clone(), Format::Raw, slow).unwrap();
    let began = clock::now();
    while !part_path(&first.path()).exists() && first.id().is_none() {
        assert!(clock::now() - began < Duration::from_secs(30));
        thread::yield_now();
    }
    background.stop();
    assert_eq!(two.export.facts().identity, None);
    let fast = Settings { rate: Rate::new(Some(1 << 40)), ..settings(65_536, 1) };
    let background = Background::start(seals, Format::Raw, fast).unwrap();
    while again.export.facts().identity.is_none() {
        assert!(clock::now() - began < Duration::from_secs(60));
        thread::yield_now();
    }
    background.stop();
    assert_eq!(one.export.facts().identity, first.id());
    assert_eq!(two.export.facts().identity, Some(of_bytes(&fs::read(second.path()).unwrap(), 65_536).0.id));
}

#[test]
fn an_image_is_held_against_its_manifest_chunk_by_chunk() {
    let scratch = Scratch::new();
    let size = 3 * BLOCK + 100_000;
    scratch.sparse(size, &[(0, sample_contents(to_usize(BLOCK), 1)), (2 * BLOCK, sample_contents(150_000, 2))]);
    let check = |threads| {
        let check = Check::open(&scratch.path(), Format::Raw).unwrap();
        let found = Mutex::new((0, 0, Vec::new()));
        let add = |checked: Checked| {
            let mut found = found.lock().unwrap();
            found.0 += checked.range.length();
            found.1 += checked.chunks;
            found.2.extend(checked.damaged.into_iter().map(|damaged| (damaged.range.start(), damaged.damage)));
        };
        check.run(threads, None, &|| false, &add).unwrap();
        let (bytes, chunks, mut damaged) = found.into_inner().unwrap();
        damaged.sort_unstable_by_key(|(start, _)| *start);
        assert_eq!((bytes, chunks), (size, size.div_ceil(65_536)));
        (damaged, check.differences())
    };
    assert!(matches!(Check::open(&scratch.path(), Format::Raw), Err(CheckError::NoManifest(_))));
    index(&scratch, &settings(65_536, 1)).unwrap();
    assert_eq!(check(3), (vec![], vec![]));
    // In data, in a hole, and in the last, short chunk; behind its back.
    let file = fs::File::options().write(true).open(scratch.path()).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    for offset in [65_535, BLOCK + 5 * 65_536, size - 1] {
        file.write_all_at(&[0xa5], offset).unwrap();
    }
    file.set_modified(modified).unwrap();
    let damaged = [0, BLOCK + 5 * 65_536, size - size % 65_536].map(|start| (start, Damage::Wrong)).to_vec();
    assert_eq!(check(1), (damaged.clone(), vec![]));
    assert_eq!(check(3).0, damaged);
    // What lies behind the end cannot be zero, though nothing but zeroes was there.
    file.set_len(3 * BLOCK - 1).unwrap();
    let (found, differences) = check(2);
    assert_eq!(differences, ["size", "time of modification"]);
    let behind = [3 * BLOCK - 65_536, 3 * BLOCK, 3 * BLOCK + 65_536].map(|start| (start, Damage::Unreadable));
    assert_eq!(found, [&damaged[..2], &behind].concat());
}

#[test]
fn a_check_says_why_it_found_out_nothing() {
    let scratch = Scratch::new();
    scratch.sparse(2 * BLOCK, &[(0, sample_contents(to_usize(2 * BLOCK), 1))]);
    index(&scratch, &settings(4096, 1)).unwrap();
    let open = || Check::open(&scratch.path(), Format::Raw);
    let run =
        |is_cancelled: bool, found: &(dyn Fn(Checked) + Sync)| open().unwrap().run(1, None, &|| is_cancelled, found);
    assert!(matches!(run(true, &|_| {}), Err(CheckError::Cancelled)));
    let result = run(false, &|_| touch(&scratch.path()));
    assert!(matches!(result, Err(CheckError::Changed { what, .. }) if what == ["time of modification"]));
    // An image that is served is checked against what it has, and nothing else.
    let seal = scratch.image().seal.unwrap();
    let served = || Check::of_served(&seal, Format::Raw);
    assert!(matches!(served(), Err(CheckError::Unfit { source: Unfit::Changed(_), .. })));
    index(&scratch, &settings(4096, 1)).unwrap();
    assert!(served().is_ok());
    let copy = scratch.0.path().join("copy");
    fs::copy(scratch.path(), &copy).unwrap();
    fs::rename(&copy, scratch.path()).unwrap();
    assert!(matches!(served(), Err(CheckError::Replaced { .. })));
    let mut manifest = scratch.manifest();
    *manifest.last_mut().unwrap() ^= 1;
    fs::write(manifest_path(&scratch.path()), manifest).unwrap();
    assert!(matches!(run(false, &|_| {}), Err(CheckError::Unfit { source: Unfit::Damaged, .. })));
}
