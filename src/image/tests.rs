//! Real images on both disk engines. Those of qcow2, which need qemu-img to make them, are in `tests/`.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use tokio::runtime::{Builder, LocalOptions};

use super::*;
use crate::disk::{Preference, attach};
use crate::error::ErrorKind;
use crate::export::conformance::{self, sample_contents};
use crate::export::{Context, Piece, TryRead};
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;

fn on_both<F: Future<Output = ()>>(test: impl Fn() -> F) {
    for preference in [Preference::Uring, Preference::Threads] {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
        runtime.block_on(async {
            let _attached = attach(preference).unwrap();
            test().await;
        });
    }
}

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("image.raw")
    }

    /// A sparse file with data at some places.
    fn sparse(&self, size: u64, data: &[(u64, &[u8])]) -> SharedExport {
        let file = fs::File::create(self.path()).unwrap();
        file.set_len(size).unwrap();
        for (offset, bytes) in data {
            file.write_all_at(bytes, *offset).unwrap();
        }
        writable(&self.path())
    }

    fn blocks(&self) -> u64 {
        fs::metadata(self.path()).unwrap().blocks()
    }
}

fn writable(path: &Path) -> SharedExport {
    open(path, &Options::default()).unwrap()
}

fn read_only(path: &Path) -> SharedExport {
    open(path, &Options { read_only: true, ..Options::default() }).unwrap()
}

const MIB: u64 = 1 << 20;

#[test]
fn raw_images_conform() {
    on_both(|| async {
        for length in [1, 511, 100_001, 3_000_000] {
            let scratch = Scratch::new();
            let contents = sample_contents(length, 5);
            fs::write(scratch.path(), &contents).unwrap();
            conformance::check(&*read_only(&scratch.path()), contents.clone()).await;
            conformance::check(&*writable(&scratch.path()), contents).await;
        }
    });
}

#[test]
fn sparse_images_conform() {
    on_both(|| async {
        let scratch = Scratch::new();
        let (first, second) = (sample_contents(70_000, 3), sample_contents(5000, 4));
        let image = scratch.sparse(4 * MIB, &[(100_000, &first), (3 * MIB, &second)]);
        let mut contents = vec![0; 4 << 20];
        contents[100_000..170_000].copy_from_slice(&first);
        contents[3 << 20..][..5000].copy_from_slice(&second);
        conformance::check(&*image, contents).await;
    });
}

#[test]
fn holes_are_read_as_holes_and_data_as_data() {
    on_both(|| async {
        let image = Scratch::new().sparse(200 * MIB, &[(MIB, &[7; 65_536]), (150 * MIB, &[8; 4096])]);
        let pieces = image.read(ByteRange::between(0, 2 * MIB)).await.unwrap();
        assert_eq!(pieces, [Piece::Hole(MIB), Piece::Data(Bytes::from(vec![7; 65_536])), Piece::Hole(MIB - 65_536)]);
        // Having been looked at once, the same is known inline.
        let mut output = BytesMut::new();
        assert_eq!(image.try_read(ByteRange::between(4096, 8192), &mut output), TryRead::Hole);
        assert_eq!(image.try_read(ByteRange::between(MIB, MIB + 4096), &mut output), TryRead::Data);
        assert_eq!(image.try_read(ByteRange::between(MIB - 1, MIB + 1), &mut output), TryRead::Wait);
        assert_eq!(output, vec![7; 4096]);
        let extents = image.extents(ByteRange::between(0, 200 * MIB), Context::Allocation, 10).await.unwrap();
        let expected = [(MIB, 3), (65_536, 0), (149 * MIB - 65_536, 3), (4096, 0), (50 * MIB - 4096, 3)];
        assert_eq!(extents.iter().map(|extent| (extent.length, extent.status)).collect::<Vec<_>>(), expected);
    });
}

#[test]
fn trim_and_zeroes_give_storage_back_and_no_hole_keeps_it() {
    on_both(|| async {
        let scratch = Scratch::new();
        let image = scratch.sparse(4 * MIB, &[(0, &vec![1; 4 << 20])]);
        let full = scratch.blocks();
        image.trim(ByteRange::between(0, MIB), Durability::Stable).await.unwrap();
        let punch = ZeroMode { may_punch: true, must_be_fast: true };
        image.write_zeroes(ByteRange::between(MIB, 2 * MIB), punch, Durability::Stable).await.unwrap();
        assert!(scratch.blocks() <= full / 2 + 64, "no storage was given back");
        let keep = ZeroMode { may_punch: false, must_be_fast: false };
        let before = scratch.blocks();
        image.write_zeroes(ByteRange::between(2 * MIB, 3 * MIB), keep, Durability::Stable).await.unwrap();
        assert_eq!(scratch.blocks(), before);
        assert_eq!(fs::read(scratch.path()).unwrap()[..3 << 20], vec![0; 3 << 20]);
        assert_eq!(image.read(ByteRange::between(0, MIB)).await.unwrap(), [Piece::Hole(MIB)]);
    });
}

#[test]
fn a_file_that_was_cut_short_gives_errors_and_no_zeroes() {
    on_both(|| async {
        let scratch = Scratch::new();
        let image = scratch.sparse(MIB, &[(0, &vec![1; 1 << 20])]);
        let all = ByteRange::between(0, MIB);
        image.read(ByteRange::between(0, 10)).await.unwrap();
        fs::File::options().write(true).open(scratch.path()).unwrap().set_len(MIB / 2).unwrap();
        let error = image.read(all).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.chain().contains("cannot read 1048576 bytes at 0"), "{}", error.chain());
    });
}

#[test]
fn opening_says_what_is_wrong() {
    let scratch = Scratch::new();
    let text = |path: &Path| open(path, &Options::default()).unwrap_err().to_string();
    assert!(text(&scratch.path()).starts_with("cannot open "));
    assert!(text(scratch.0.path()).starts_with("cannot open "));
    fs::write(scratch.path(), b"QFI\xfbnot really").unwrap();
    assert!(text(&scratch.path()).contains("qcow2"));
    let raw = Options { format: Format::Raw, ..Options::default() };
    assert_eq!(open(&scratch.path(), &raw).unwrap().facts().size, 14);
}

#[test]
fn an_empty_file_is_an_image_of_no_bytes() {
    let scratch = Scratch::new();
    fs::write(scratch.path(), b"").unwrap();
    assert_eq!(writable(&scratch.path()).facts().size, 0);
}
