//! Both engines, the same tests.

use std::fs;
use std::path::PathBuf;

use bytes::{Bytes, BytesMut};
use tokio::runtime::{Builder, LocalOptions};

use super::*;
use crate::ranges::ByteRange;

/// Runs `test` on a thread with a ring and on one without.
fn on_both<F: Future<Output = ()>>(test: impl Fn() -> F) {
    for preference in [Preference::Uring, Preference::Threads] {
        on(preference, test());
    }
}

fn on(preference: Preference, test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async {
        let _attached = attach(preference).expect("io_uring works where these tests run");
        test.await;
    });
}

struct Scratch {
    directory: tempfile::TempDir,
}

impl Scratch {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("file")
    }

    fn holding(&self, bytes: &[u8]) -> File {
        fs::write(self.path(), bytes).unwrap();
        File::open(&self.path(), Access::ReadWrite).unwrap()
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| u8::try_from(index * 7 % 251).unwrap()).collect()
}

#[test]
fn what_is_written_is_read() {
    on_both(|| async {
        let scratch = Scratch::new();
        let file = scratch.holding(&[0; 300_000]);
        let data = pattern(200_001);
        file.write_all_at(Bytes::from(data.clone()), 99, false).await.unwrap();
        file.write_all_at(Bytes::from_static(b"stable"), 3, true).await.unwrap();
        file.sync_data().await.unwrap();
        let read = file.read_exact_at(BytesMut::from(&b"kept"[..]), 200_001, 99).await.unwrap();
        assert_eq!(&read[..4], b"kept");
        assert!(read[4..] == data[..]);
        assert_eq!(&fs::read(scratch.path()).unwrap()[3..9], b"stable");
    });
}

#[test]
fn a_file_that_ends_early_is_an_error() {
    on_both(|| async {
        let file = Scratch::new().holding(&pattern(1000));
        let error = file.read_exact_at(BytesMut::new(), 10, 995).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
    });
}

#[test]
fn many_operations_at_once_each_get_their_own_result() {
    on_both(|| async {
        let data = pattern(2_000_000);
        let file = std::rc::Rc::new(Scratch::new().holding(&data));
        // More than the submission queue has room for.
        let tasks: Vec<_> = (0..1000)
            .map(|index| {
                let file = std::rc::Rc::clone(&file);
                let read = async move { file.read_exact_at(BytesMut::new(), 1999, index * 1000).await };
                tokio::task::spawn_local(read)
            })
            .collect();
        for (index, task) in tasks.into_iter().enumerate() {
            let read = task.await.unwrap().unwrap();
            assert!(read[..] == data[index * 1000..][..1999], "read {index}");
        }
    });
}

#[test]
fn writes_outlive_the_futures_that_waited_for_them() {
    let scratch = Scratch::new();
    let file = scratch.holding(&[0; 50 * 4096]);
    on(Preference::Uring, async {
        for index in 0..50u8 {
            let data = Bytes::from(vec![index + 1; 4096]);
            let mut write = Box::pin(file.write_all_at(data, u64::from(index) * 4096, false));
            assert!(futures_util::poll!(&mut write).is_pending());
            // The buffer was the future's; now it is the ring's alone.
            drop(write);
        }
    });
    // The ring waited for them when it was dropped.
    for (index, block) in fs::read(scratch.path()).unwrap().chunks(4096).enumerate() {
        assert!(block.iter().all(|byte| usize::from(*byte) == index + 1), "block {index}");
    }
}

#[test]
fn detaching_with_operations_in_flight_is_clean() {
    let scratch = Scratch::new();
    let file = scratch.holding(&[1; 1 << 20]);
    on(Preference::Uring, async {
        for _ in 0..100 {
            let mut read = Box::pin(file.read_exact_at(BytesMut::new(), 1 << 20, 0));
            assert!(futures_util::poll!(&mut read).is_pending());
        }
    });
}

#[test]
fn holes_are_punched_and_seen() {
    on_both(|| async {
        let scratch = Scratch::new();
        let file = scratch.holding(&pattern(1 << 20));
        let (first, second) = (ByteRange::between(64 << 10, 128 << 10), ByteRange::between(256 << 10, 300 << 10));
        file.punch(first).await.unwrap();
        let spans = file.spans(ByteRange::between(0, 1 << 20), 100).unwrap();
        let holes: Vec<_> = spans.iter().filter(|span| span.is_hole).map(|span| span.range).collect();
        assert_eq!(holes, [first]);
        assert_eq!(spans.iter().map(|span| span.range.length()).sum::<u64>(), 1 << 20);
        assert_eq!(file.spans(ByteRange::between(0, 1 << 20), 1).unwrap().len(), 1);
        file.zero(second).await.unwrap();
        file.allocate(first).await.unwrap();
        let read = file.read_exact_at(BytesMut::new(), 1 << 20, 0).await.unwrap();
        let mut expected = pattern(1 << 20);
        expected[64 << 10..128 << 10].fill(0);
        expected[256 << 10..300 << 10].fill(0);
        assert!(read[..] == expected[..]);
    });
}

#[test]
fn resident_data_is_read_inline_and_the_rest_is_not_appended() {
    on_both(|| async {
        let data = pattern(100_000);
        let file = Scratch::new().holding(&data);
        let mut output = BytesMut::from(&b"head"[..]);
        // Just written, so in the page cache, on every file system that knows inline reads.
        assert_eq!(file.try_read_at(&mut output, 4096, 5000), Inline::Done);
        assert!(output[4..] == data[5000..9096]);
        assert_eq!(file.try_read_at(&mut output, 4096, 99_999), Inline::WouldBlock);
        assert_eq!(output.len(), 4 + 4096);
    });
}

#[test]
fn a_lock_is_exclusive_until_its_file_is_closed() {
    let scratch = Scratch::new();
    let first = scratch.holding(b"x");
    let second = File::open(&scratch.path(), Access::ReadWrite).unwrap();
    assert!(first.try_lock().unwrap());
    assert!(!second.try_lock().unwrap());
    drop(first);
    assert!(second.try_lock().unwrap());
}

#[test]
fn what_is_neither_file_nor_device_is_refused() {
    let scratch = Scratch::new();
    assert!(File::open(scratch.directory.path(), Access::ReadOnly).is_err());
    rustix::fs::mknodat(
        rustix::fs::CWD,
        scratch.path(),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    assert!(File::open(&scratch.path(), Access::ReadOnly).is_err());
}

#[test]
fn what_is_in_memory_is_known() {
    use rustix::fs::{Advice, fadvise};
    let scratch = Scratch::new();
    let (size, page) = (1 << 20, 4096);
    let file = scratch.holding(&pattern(1 << 20));
    let is_in_memory = |start, end| file.is_in_memory(ByteRange::between(start, end));
    assert!(is_in_memory(0, size), "it has just been written");
    assert!(is_in_memory(5000, 5001) && is_in_memory(size - 1, size));
    fs::File::open(scratch.path()).unwrap().sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
    assert!(!is_in_memory(0, size), "it has been dropped");
    assert!(!is_in_memory(page, page + 1));
    assert!(is_in_memory(page, page), "nothing is always here");
    assert_eq!(fs::read(scratch.path()).unwrap().len(), 1 << 20);
    assert!(is_in_memory(0, size), "it has just been read");
    fadvise(&file, size / 2, None, Advice::DontNeed).unwrap();
    assert!(!is_in_memory(0, size), "the second half has been dropped");
    assert!(is_in_memory(0, size / 2));
    assert!(!is_in_memory(0, size + page), "there is nothing behind the end");
    assert!(!is_in_memory(size, size + 1));
    assert!(!is_in_memory(1 << 40, (1 << 40) + 1));
}
