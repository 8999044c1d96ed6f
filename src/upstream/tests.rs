//! A server that misbehaves on command, and what a [`Remote`] makes of it.

mod changes;
mod lies;
mod redirect;

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::path::PathBuf;
use std::rc::Rc;

use bytes::{Buf, BytesMut};
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime::{Builder, LocalOptions};

use super::*;
use crate::export::assemble;
use crate::export::conformance::sample_contents;
use crate::nbd::handshake::server::{Directory, Progress, ServerHandshake};
use crate::nbd::reply::{self, Last, ReplyTo};
use crate::nbd::uri::Address;
use crate::nbd::wire::TransmissionFlags;
use crate::nbd::{BlockSizes, Listing, request};

/// What the fake server does with a read.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Act {
    Answer,
    Fail(ErrorKind),
    /// Closes the connection.
    HangUp,
    /// Says nothing, for ever.
    Ignore,
    /// Sends bytes that are not a reply.
    Babble,
    /// Answers with one bit wrong.
    Flip,
    /// Answers with zeroes in place of data.
    Zeros,
    /// Answers with a hole in place of data.
    Hole,
    /// Answers with the bytes of another image.
    Other,
    /// Closes the connection in the middle of an answer.
    Truncate,
}

struct Fake {
    path: PathBuf,
    contents: Vec<u8>,
    listing: RefCell<Listing>,
    /// What is under the export's name with `@manifest` behind it.
    manifest: RefCell<Option<Vec<u8>>>,
    /// What to do with the next reads; afterwards each so many-th is treated like this, and the others are answered.
    acts: RefCell<VecDeque<Act>>,
    habit: Cell<(usize, Act)>,
    /// Whether it closes each connection that comes.
    is_down: Cell<bool>,
    /// Whether it hangs up when it is asked for extents.
    hates_status: Cell<bool>,
    reads: RefCell<Vec<ByteRange>>,
    connections: Cell<usize>,
    /// Those that are there now, and those that ended with a goodbye.
    open: Cell<usize>,
    farewells: Cell<usize>,
    /// From which read on, counted from 1, it keeps its answers to itself until it is told otherwise.
    held_from: Cell<usize>,
    released: tokio::sync::Notify,
    _directory: tempfile::TempDir,
}

impl Directory for Fake {
    type Export = Vec<u8>;
    fn find(&self, name: &str) -> Option<(Vec<u8>, Listing)> {
        let listing = self.listing.borrow().clone();
        if name == listing.name {
            return Some((self.contents.clone(), listing));
        }
        let manifest = self.manifest.borrow().clone().filter(|_| name == format!("{}@manifest", listing.name))?;
        let size = to_u64(manifest.len());
        Some((manifest, Listing { name: name.into(), size, facts: vec![], ..listing }))
    }
    fn list(&self) -> Vec<(String, String)> {
        vec![(self.listing.borrow().name.clone(), String::new())]
    }
    fn is_draining(&self) -> bool {
        false
    }
}

impl Fake {
    fn start(contents: Vec<u8>) -> Rc<Self> {
        Self::start_with(contents, |_| {})
    }

    fn start_with(contents: Vec<u8>, change: impl FnOnce(&mut Listing)) -> Rc<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mut listing = Listing {
            name: "x".into(),
            description: String::new(),
            size: to_u64(contents.len()),
            flags: TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN,
            block_sizes: BlockSizes::DEFAULT,
            contexts: vec!["base:allocation".into()],
            facts: vec![],
        };
        change(&mut listing);
        let fake = Rc::new(Self {
            path: directory.path().join("s"),
            contents,
            listing: RefCell::new(listing),
            manifest: RefCell::default(),
            acts: RefCell::default(),
            habit: Cell::new((1, Act::Answer)),
            is_down: Cell::new(false),
            hates_status: Cell::new(false),
            reads: RefCell::default(),
            connections: Cell::new(0),
            open: Cell::new(0),
            farewells: Cell::new(0),
            held_from: Cell::new(usize::MAX),
            released: tokio::sync::Notify::new(),
            _directory: directory,
        });
        let listener = UnixListener::bind(&fake.path).unwrap();
        let serving = Rc::clone(&fake);
        tokio::task::spawn_local(async move {
            while let Ok((socket, _)) = listener.accept().await {
                serving.connections.set(serving.connections.get() + 1);
                if serving.is_down.get() {
                    continue;
                }
                let serving = Rc::clone(&serving);
                tokio::task::spawn_local(async move {
                    serving.open.set(serving.open.get() + 1);
                    Rc::clone(&serving).serve(socket).await;
                    serving.open.set(serving.open.get() - 1);
                });
            }
        });
        fake
    }

    fn plan(&self, acts: impl IntoIterator<Item = Act>) {
        self.acts.borrow_mut().extend(acts);
    }

    /// Gives all answers from now on.
    fn release(&self) {
        self.held_from.set(usize::MAX);
        self.released.notify_waiters();
    }

    fn next_act(&self) -> Act {
        let (every, habit) = self.habit.get();
        let is_turn = self.reads.borrow().len().is_multiple_of(every);
        self.acts.borrow_mut().pop_front().unwrap_or(if is_turn { habit } else { Act::Answer })
    }

    fn uri(&self) -> Uri {
        Uri::plain(Address::Unix(self.path.clone()), "x".into())
    }

    async fn serve(self: Rc<Self>, socket: UnixStream) {
        let stream = crate::net::Detached::from_unix(socket.into_std().unwrap()).unwrap().attach().unwrap();
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        let mut handshake = ServerHandshake::new(&mut output);
        let negotiated = loop {
            let progress = handshake.advance(&mut input, &*self, &mut output).unwrap();
            if stream.write_all(&mut output).await.is_err() {
                return;
            }
            match progress {
                Progress::Continue => {}
                Progress::Finished(negotiated) => break negotiated,
                Progress::Aborted | Progress::StartTls => return,
                Progress::NeedInput => {
                    input.reserve(4096);
                    if stream.read_buf(&mut input).await.unwrap_or(0) == 0 {
                        return;
                    }
                }
            }
        };
        let (mode, contents) = (negotiated.replies, negotiated.export);
        loop {
            while let Some(header) = request::decode(&input, mode).unwrap() {
                input.advance(request::header_length(mode));
                let to = ReplyTo { cookie: header.cookie, offset: header.offset };
                let range = ByteRange::new(header.offset, header.length).unwrap();
                if header.command == command::DISC {
                    self.farewells.set(self.farewells.get() + 1);
                    return;
                }
                if header.command == command::BLOCK_STATUS && self.hates_status.get() {
                    return;
                }
                if header.command == command::BLOCK_STATUS {
                    let halves =
                        [Extent { length: header.length - 512, status: 0 }, Extent { length: 1024, status: 3 }];
                    reply::put_block_status(&mut output, mode, to, 1, &halves, Last::Yes);
                    continue;
                }
                self.reads.borrow_mut().push(range);
                while self.reads.borrow().len() >= self.held_from.get() {
                    self.released.notified().await;
                }
                let mut data = contents[to_usize(range.start())..to_usize(range.end())].to_vec();
                let act = self.next_act();
                match act {
                    Act::Answer | Act::Truncate => {}
                    Act::Flip => *data.last_mut().unwrap() ^= 0x10,
                    Act::Zeros => data.fill(0),
                    Act::Other => data = sample_contents(data.len(), 77),
                    Act::Hole => {
                        let length = u32::try_from(range.length()).unwrap();
                        reply::put_hole(&mut output, mode, to, range.start(), length, Last::Yes);
                        continue;
                    }
                    Act::Fail(kind) => {
                        reply::put_error(&mut output, mode, to, kind, "as planned", None);
                        continue;
                    }
                    Act::HangUp => {
                        // What was answered before gets through.
                        let _ = stream.write_all(&mut output).await;
                        return;
                    }
                    Act::Ignore => continue,
                    Act::Babble => {
                        output.extend_from_slice(b"What was that again?");
                        continue;
                    }
                }
                reply::put_data_header(&mut output, mode, to, range.start(), range.length(), Last::Yes);
                if act == Act::Truncate {
                    output.extend_from_slice(&data[..data.len() / 2]);
                    let _ = stream.write_all(&mut output).await;
                    return;
                }
                output.extend_from_slice(&data);
            }
            if stream.write_all(&mut output).await.is_err() {
                return;
            }
            input.reserve(4096);
            if stream.read_buf(&mut input).await.unwrap_or(0) == 0 {
                return;
            }
        }
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(test);
}

fn quick() -> Settings {
    Settings {
        connections: 1,
        connect_timeout: Duration::from_secs(2),
        stall_timeout: Duration::from_millis(100),
        patience: Duration::from_secs(20),
        role: Role::Plain,
    }
}

async fn open(fakes: &[&Rc<Fake>]) -> Remote {
    let uris = fakes.iter().map(|fake| fake.uri()).collect();
    Remote::open(uris, Expectation::default(), quick()).await.unwrap()
}

async fn read(remote: &Remote, start: u64, end: u64) -> Result<Vec<u8>> {
    remote.read(ByteRange::between(start, end)).await.map(|pieces| assemble(&pieces))
}

#[test]
fn a_lost_connection_is_replaced_and_the_request_repeated() {
    run(async {
        let fake = Fake::start(sample_contents(10_000, 1));
        let remote = open(&[&fake]).await;
        for act in [Act::HangUp, Act::Ignore, Act::Babble] {
            fake.plan([act]);
            assert!(read(&remote, 10, 9_000).await.unwrap() == fake.contents[10..9_000], "{act:?}");
        }
        // One anew for each loss.
        assert_eq!(fake.connections.get(), 4);
        assert_eq!(remote.stats().retries.value(), 3);
    });
}

#[test]
fn an_error_of_the_disk_is_tried_again_and_then_reported() {
    run(async {
        let fake = Fake::start(sample_contents(10_000, 1));
        let remote = open(&[&fake]).await;
        fake.plan([Act::Fail(ErrorKind::Io), Act::Fail(ErrorKind::Io)]);
        assert!(read(&remote, 0, 10).await.is_ok());
        fake.plan([Act::Fail(ErrorKind::Io); 4]);
        let error = read(&remote, 0, 10).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(error.to_string(), "the server answered EIO: as planned");
        // What is not going to change is not repeated.
        fake.reads.borrow_mut().clear();
        fake.plan([Act::Fail(ErrorKind::Invalid)]);
        assert_eq!(read(&remote, 0, 10).await.unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(fake.reads.borrow().len(), 1);
    });
}

#[test]
fn a_server_that_is_shutting_down_is_left_for_the_next() {
    run(async {
        let (first, second) = (Fake::start(sample_contents(999, 1)), Fake::start(sample_contents(999, 1)));
        let remote = open(&[&first, &second]).await;
        first.plan([Act::Fail(ErrorKind::Shutdown)]);
        assert!(read(&remote, 0, 999).await.is_ok());
        assert_eq!(remote.current(), second.uri());
    });
}

#[test]
fn a_server_that_fails_is_left_for_the_next_and_not_returned_to() {
    run(async {
        let (first, second) = (Fake::start(sample_contents(999, 1)), Fake::start(sample_contents(999, 1)));
        let remote = open(&[&first, &second]).await;
        first.plan([Act::Fail(ErrorKind::Io)]);
        for _ in 0..3 {
            assert!(read(&remote, 0, 999).await.unwrap() == second.contents);
        }
        assert_eq!((first.reads.borrow().len(), second.reads.borrow().len()), (1, 3));
    });
}

#[test]
fn a_server_that_hangs_up_stalls_or_babbles_is_left_for_the_next() {
    run(async {
        for act in [Act::HangUp, Act::Ignore, Act::Babble] {
            let (first, second) = (Fake::start(sample_contents(999, 1)), Fake::start(sample_contents(999, 1)));
            let remote = open(&[&first, &second]).await;
            first.plan([act; 1000]);
            assert!(read(&remote, 0, 999).await.unwrap() == second.contents, "{act:?}");
            assert_eq!(remote.current(), second.uri(), "{act:?}");
            assert_eq!((first.reads.borrow().len(), second.reads.borrow().len()), (1, 1), "{act:?}");
        }
    });
}

#[test]
fn a_server_that_says_nothing_from_the_start_is_passed_over_in_time() {
    run(async {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("silent");
        let _silent = UnixListener::bind(&path).unwrap();
        let fake = Fake::start(sample_contents(999, 1));
        let uris = vec![Uri::plain(Address::Unix(path), "x".into()), fake.uri()];
        let settings = Settings { patience: Duration::from_millis(600), ..quick() };
        let facts = Facts::read_only(999, "");
        let remote = Remote::offline(uris, facts, Expectation::default(), settings);
        assert!(read(&remote, 0, 999).await.unwrap() == fake.contents);
        assert_eq!(remote.current(), fake.uri());
    });
}

#[test]
fn many_requests_that_fail_together_turn_once() {
    run(async {
        let (first, second) = (Fake::start(sample_contents(99_999, 1)), Fake::start(sample_contents(99_999, 1)));
        let remote = open(&[&first, &second]).await;
        first.plan([Act::Fail(ErrorKind::Io); 50]);
        let reads = (0..50).map(|index| read(&remote, index * 1000, index * 1000 + 999));
        for (index, result) in join_all(reads).await.into_iter().enumerate() {
            assert!(result.unwrap() == second.contents[index * 1000..][..999]);
        }
        assert_eq!(remote.current(), second.uri());
        assert_eq!((first.reads.borrow().len(), second.reads.borrow().len()), (50, 50));
    });
}

#[test]
fn a_server_that_cannot_say_what_is_zero_is_not_asked_for_ever() {
    run(async {
        let fake = Fake::start(sample_contents(9999, 1));
        let remote = open(&[&fake]).await;
        fake.hates_status.set(true);
        let error = remote.extents(ByteRange::between(0, 9999), Context::Allocation, 10).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io, "not as if nobody could be reached: {error}");
        assert!(fake.connections.get() <= 3);
        assert!(read(&remote, 0, 9999).await.unwrap() == fake.contents);
    });
}

#[test]
fn a_server_that_cannot_be_reached_is_passed_over() {
    run(async {
        let fake = Fake::start(sample_contents(999, 1));
        let nowhere: Uri = "nbd+unix:///x?socket=/nonexistent/socket".parse().unwrap();
        let uris = vec![nowhere.clone(), fake.uri()];
        let remote = Remote::open(uris, Expectation::default(), quick()).await.unwrap();
        assert!(read(&remote, 0, 999).await.unwrap() == fake.contents);
        let error = Remote::open(vec![nowhere], Expectation::default(), quick()).await.unwrap_err();
        assert!(!error.is_final());
        assert!(error.to_string().starts_with("nbd+unix:///x?socket=/nonexistent/socket: cannot connect"), "{error}");
    });
}

#[test]
fn a_server_with_another_image_is_refused() {
    run(async {
        let fake = Fake::start_with(sample_contents(1000, 1), |listing| {
            listing.facts.push(format!("x-headwater:image=blake3-{}", "11".repeat(32)));
            listing.facts.push(format!("x-headwater:path={}", "22".repeat(16)));
        });
        let cases = [
            (Expectation { size: Some(999), ..Expectation::default() }, "has 1000 bytes, and this image has 999"),
            (
                Expectation { identity: Some(ImageId([0x33; 32])), ..Expectation::default() },
                "its export holds blake3-11",
            ),
            (Expectation { not_through: Some(NodeId([0x22; 16])), ..Expectation::default() }, "a loop"),
        ];
        for (expectation, text) in cases {
            let error = Remote::open(vec![fake.uri()], expectation, quick()).await.unwrap_err();
            assert!(error.is_final() && error.to_string().contains(text), "{error}");
        }
        let expectation = Expectation {
            size: Some(1000),
            identity: Some(ImageId([0x11; 32])),
            not_through: Some(NodeId([0x33; 16])),
        };
        let remote = Remote::open(vec![fake.uri()], expectation, quick()).await.unwrap();
        assert_eq!(remote.facts().path, [NodeId([0x22; 16])]);
        remote.expect(None, NodeId([0x22; 16]));
        fake.plan([Act::HangUp]);
        let error = read(&Remote { patience: Duration::from_millis(200), ..remote }, 0, 1).await.unwrap_err();
        assert!(error.to_string().contains("a loop"), "{error}");
    });
}

#[test]
fn patience_ends_with_an_error_that_says_why() {
    run(async {
        let fake = Fake::start(sample_contents(1000, 1));
        let settings = Settings { patience: Duration::from_millis(300), ..quick() };
        let remote = Remote::open(vec![fake.uri()], Expectation::default(), settings).await.unwrap();
        fake.plan([Act::HangUp; 1000]);
        let error = read(&remote, 0, 10).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("no answer from nbd+unix:///x?socket="), "{error}");
        // Pauses between attempts: not a busy loop.
        assert!(fake.connections.get() < 10, "{} connections", fake.connections.get());
    });
}

#[test]
fn reads_are_cut_and_widened_to_what_the_server_takes() {
    run(async {
        let fake = Fake::start_with(sample_contents(100_000, 9), |listing| {
            listing.block_sizes = BlockSizes { minimum: 512, preferred: 4096, maximum: 8192 };
        });
        let remote = open(&[&fake]).await;
        assert!(read(&remote, 700, 20_000).await.unwrap() == fake.contents[700..20_000]);
        let mut reads: Vec<_> = fake.reads.borrow().iter().map(|range| (range.start(), range.end())).collect();
        reads.sort_unstable();
        assert_eq!(reads, [(512, 8704), (8704, 16_896), (16_896, 20_480)]);
        // The last block of an odd image ends where the image ends.
        assert!(read(&remote, 99_999, 100_000).await.unwrap() == fake.contents[99_999..]);
        assert!(read(&remote, 5, 5).await.unwrap().is_empty());
    });
}

#[test]
fn extents_beyond_the_question_are_left_out() {
    run(async {
        let fake = Fake::start(sample_contents(10_000, 1));
        let remote = open(&[&fake]).await;
        let range = ByteRange::between(1000, 3000);
        let extents = remote.extents(range, Context::Allocation, 10).await.unwrap();
        assert_eq!(extents, [Extent { length: 1488, status: 0 }, Extent { length: 512, status: 3 }]);
        let extents = remote.extents(range, Context::Allocation, 1).await.unwrap();
        assert_eq!(extents.len(), 1);
        let error = remote.extents(range, Context::Residency, 1).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    });
}

#[test]
fn a_server_without_contexts_is_taken_to_have_everything() {
    run(async {
        let fake = Fake::start_with(sample_contents(10_000, 1), |listing| listing.contexts.clear());
        let remote = open(&[&fake]).await;
        let extents = remote.extents(ByteRange::between(5, 900), Context::Allocation, 1).await.unwrap();
        assert_eq!(extents, [Extent { length: 895, status: 0 }]);
    });
}

#[test]
fn further_connections_are_opened_only_where_they_see_one_view() {
    run(async {
        for (multi, most) in [(true, 3), (false, 1)] {
            let fake = Fake::start_with(sample_contents(100_000, 1), |listing| {
                listing.flags.set(TransmissionFlags::CAN_MULTI_CONN, multi);
            });
            let settings = Settings { connections: 3, ..quick() };
            let remote = Remote::open(vec![fake.uri()], Expectation::default(), settings).await.unwrap();
            for _ in 0..20 {
                let reads = (0..30).map(|index| read(&remote, index * 1000, index * 1000 + 999));
                for (index, result) in join_all(reads).await.into_iter().enumerate() {
                    assert!(result.unwrap() == fake.contents[index * 1000..][..999]);
                }
            }
            assert_eq!(fake.connections.get(), most);
        }
    });
}

#[test]
fn exports_are_listed() {
    run(async {
        let fake = Fake::start(vec![0; 10]);
        let exports = list(&fake.uri(), Duration::from_secs(5)).await.unwrap();
        assert_eq!(exports, [("x".to_owned(), String::new())]);
    });
}
