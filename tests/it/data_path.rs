//! Long reads, which go in parts and on unix sockets without a copy, and writes that are made together.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{IoSlice, Write};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt;
use headwater::disk::{Preference, attach};
use headwater::error::{ErrorKind, Result};
use headwater::export::memory::Memory;
use headwater::export::wrappers::{Record, Recorded};
use headwater::export::{Export, Facts, LocalFuture, Piece, Registry, TryRead, TryWrite};
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::reply::Last;
use headwater::nbd::request::{self, Durability, Header};
use headwater::nbd::wire::{CommandFlags, MAX_PAYLOAD_BYTES, command};
use headwater::net::{ListenAddress, Listener};
use headwater::ranges::ByteRange;
use headwater::server::{Server, Settings};
use headwater::worker::Workers;
use rustix::fs::{Advice, fadvise};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, LocalOptions};
use tokio::sync::oneshot;

use crate::support::client::{Client, Socket};
use crate::support::{Daemon, Scratch, eventually, headwater, noise};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// Two servers of one image: one on a unix socket, one on TCP.
struct Both([Daemon; 2]);

impl Both {
    fn serve(scratch: &Scratch, image: &Path) -> Self {
        let unix = Daemon::serve(scratch, image, &["--read-only"]);
        let log = scratch.path("tcp.log");
        let mut program = headwater(&log);
        program.args(["serve", "--read-only", "--listen=127.0.0.1:0"]).arg(image);
        let tcp = Daemon::start(program, 1, &log);
        assert!(unix.uri().starts_with("nbd+unix:") && tcp.uri().starts_with("nbd:"));
        Self([unix, tcp])
    }

    fn uris(&self) -> [&str; 2] {
        self.0.each_ref().map(Daemon::uri)
    }

    /// Clients of every age and family, and whether they forbid fragments.
    fn clients(&self) -> Vec<(Client, CommandFlags)> {
        let mut clients = Vec::new();
        for uri in self.uris() {
            clients.push((Client::open(uri), CommandFlags::empty()));
            clients.push((Client::open(uri), CommandFlags::DF));
            clients.push((Client::open_structured(uri), CommandFlags::empty()));
            clients.push((Client::open_structured(uri), CommandFlags::DF));
            clients.push((Client::open_simple(uri), CommandFlags::empty()));
        }
        clients
    }
}

fn part(bytes: &[u8], offset: u64, length: u64) -> &[u8] {
    &bytes[usize::try_from(offset).unwrap()..][..usize::try_from(length).unwrap()]
}

fn read(cookie: u64, offset: u64, length: u64, flags: CommandFlags) -> Header {
    Header { flags: flags.bits(), command: command::READ, cookie, offset, length }
}

/// Drops what the system keeps of a file in memory, as far as nobody holds on to it.
fn evict(image: &Path) {
    let file = File::options().write(true).open(image).unwrap();
    file.sync_all().unwrap();
    fadvise(&file, 0, None, Advice::DontNeed).unwrap();
}

/// Waits until there is something to receive.
fn wait_for_input(client: &Client) {
    let queued = || match &client.socket {
        Socket::Tcp(socket) => rustix::io::ioctl_fionread(socket).unwrap(),
        Socket::Unix(socket) => rustix::io::ioctl_fionread(socket).unwrap(),
    };
    eventually("reply", || queued() > 0);
}

#[test]
fn long_reads_bring_the_bytes_of_the_file() {
    let scratch = Scratch::new();
    let bytes = noise(40 << 20, 50);
    let image = scratch.file("image.raw", &bytes);
    let both = Both::serve(&scratch, &image);
    for (mut client, flags) in both.clients() {
        for (index, length) in
            [64 * KIB, 64 * KIB - 1, 256 * KIB, 256 * KIB + 1, 512 * KIB + 3, MIB, MIB + 17, 5 * MIB, MAX_PAYLOAD_BYTES]
                .into_iter()
                .enumerate()
        {
            for offset in [1 + index as u64 * 4099, 40 * MIB - length] {
                let reply = client.ask_with(command::READ, flags, offset, length, &[]);
                assert!(reply.bytes() == part(&bytes, offset, length), "{length} bytes at {offset}");
                assert!(!flags.contains(CommandFlags::DF) || reply.content.len() == 1);
                let mut at = if client.mode() == ReplyMode::Simple { 0 } else { offset };
                for (offset, piece) in &reply.content {
                    assert_eq!(*offset, at, "a chunk does not say where it belongs");
                    at += piece.as_ref().unwrap().len() as u64;
                }
            }
        }
        let reply = client.ask_with(command::READ, flags, 0, MAX_PAYLOAD_BYTES + MIB, &[]);
        assert_eq!(reply.error, Some(ErrorKind::Invalid));
        assert!(client.read(3, 100) == bytes[3..103]);
    }
}

#[test]
fn long_and_short_reads_in_flight_together_are_each_answered_once() {
    let scratch = Scratch::new();
    let bytes = noise(24 << 20, 51);
    let image = scratch.file("image.raw", &bytes);
    let both = Both::serve(&scratch, &image);
    let lengths = [4 * KIB, 64 * KIB, 4 * KIB, 256 * KIB + 1, 1, 4 * KIB, MIB, MIB + 17, 4 * KIB, 100 * KIB, 5 * MIB];
    for (mut client, flags) in both.clients() {
        let requests: HashMap<_, _> = (0..110_u64)
            .map(|number| {
                let length = lengths[usize::try_from(number).unwrap() % lengths.len()];
                // Cookies say nothing about order, and offsets are odd.
                (number.wrapping_mul(0x9e37_79b9_7f4a_7c15), (number * 123_457 % (24 * MIB - length), length))
            })
            .collect();
        client.send_together(requests.iter().map(|(cookie, (offset, length))| read(*cookie, *offset, *length, flags)));
        let mut seen = HashSet::new();
        for reply in client.receive_mixed(requests.len()) {
            let (offset, length) = requests[&reply.cookie];
            assert!(seen.insert(reply.cookie), "two replies to one request");
            assert!(reply.bytes() == part(&bytes, offset, length), "{length} bytes at {offset}");
        }
        client.disconnect();
    }
}

/// The cookies of two replies, in the order in which they end.
fn order_of_ends(client: &mut Client) -> [u64; 2] {
    std::array::from_fn(|_| {
        loop {
            let frame = client.try_receive_frame().unwrap();
            if frame.last == Last::Yes {
                return frame.cookie;
            }
        }
    })
}

#[test]
fn a_short_read_overtakes_a_long_one() {
    let scratch = Scratch::new();
    let bytes = noise(33 << 20, 52);
    let image = scratch.file("image.raw", &bytes);
    let both = Both::serve(&scratch, &image);
    for uri in both.uris() {
        for mut client in [Client::open(uri), Client::open_structured(uri)] {
            // Once in the same packet, once when the reply to the long one has begun.
            for is_later in [false, true] {
                let (long, short) = (read(1, 5, MAX_PAYLOAD_BYTES, CommandFlags::empty()), {
                    read(2, 12_345, 4096, CommandFlags::empty())
                });
                if is_later {
                    client.send_raw(long, &[]);
                    wait_for_input(&client);
                    client.send_raw(short, &[]);
                } else {
                    client.send_together([long, short].into_iter());
                }
                assert_eq!(
                    order_of_ends(&mut client),
                    [2, 1],
                    "the short read waited for all of the long one ({uri}, {is_later})"
                );
            }
        }
    }
}

#[test]
fn a_short_read_overtakes_a_long_one_that_never_stalls() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(33 << 20, 57));
    let both = Both::serve(&scratch, &image);
    for uri in both.uris() {
        let mut client = Client::open(uri);
        client.send_raw(read(1, 5, MAX_PAYLOAD_BYTES, CommandFlags::empty()), &[]);
        assert_eq!(client.try_receive_frame().unwrap().cookie, 1);
        client.send_raw(read(2, 12_345, 4096, CommandFlags::empty()), &[]);
        assert_eq!(order_of_ends(&mut client), [2, 1], "the short read waited for all of the long one ({uri})");
    }
}

#[test]
fn bytes_that_leave_the_memory_while_they_wait_to_be_sent_are_right() {
    let scratch = Scratch::new();
    let bytes = noise(33 << 20, 53);
    let image = scratch.file("image.raw", &bytes);
    let both = Both::serve(&scratch, &image);
    for (mut client, flags) in both.clients() {
        // So that it goes as fast as it can until it is stopped.
        assert!(std::fs::read(&image).unwrap() == bytes);
        let requests = [(17, MAX_PAYLOAD_BYTES), (MIB, MIB), (9, 4096)];
        let headers = requests.iter().zip(0..).map(|((offset, length), cookie)| read(cookie, *offset, *length, flags));
        client.send_together(headers);
        wait_for_input(&client);
        evict(&image);
        for reply in client.receive_mixed(requests.len()) {
            let (offset, length) = requests[usize::try_from(reply.cookie).unwrap()];
            assert!(reply.bytes() == part(&bytes, offset, length), "{length} bytes at {offset}");
        }
    }
}

#[test]
fn a_write_that_was_answered_is_seen_by_every_later_read() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(8 << 20, 54));
    let server = Daemon::serve(&scratch, &image, &[]);
    let (mut writer, mut reader) = (Client::open(server.uri()), Client::open_structured(server.uri()));
    // A third one has asked for the same bytes and does not take them.
    let mut stalled = Client::open(server.uri());
    stalled.send_raw(read(1, 0, 8 * MIB, CommandFlags::empty()), &[]);
    wait_for_input(&stalled);
    for round in 0..20_u64 {
        let (offset, length) = (round * 4099, 2 * MIB + round * 511);
        let data = noise(usize::try_from(length).unwrap(), 1000 + round);
        assert_eq!(writer.write(offset, &data), None);
        assert!(reader.read(offset, length) == data, "round {round}");
    }
    assert_eq!(stalled.receive().bytes().len(), 8 << 20);
}

#[test]
fn idle_connections_cost_little_memory() {
    const COUNT: usize = 1000;
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
    let scratch = Scratch::new();
    let bytes = noise(1 << 20, 55);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &[]);
    // What the first ones cost is not theirs alone.
    let use_one = |number: usize| {
        let mut client = Client::open(server.uri());
        assert!(client.read(number as u64, 4096) == bytes[number..][..4096]);
        client
    };
    let first: Vec<_> = (0..10).map(use_one).collect();
    let before = server.resident_kib();
    let clients: Vec<_> = (0..COUNT).map(use_one).collect();
    let grown = server.resident_kib().saturating_sub(before);
    assert!(grown < 32 << 10, "{grown} KiB for {} connections", clients.len());
    drop(first);
}

/// Memory that writes inline, as files do, as long as it is not shy.
#[derive(Debug)]
struct Inline {
    memory: Memory,
    /// It writes a part of the first part, and says that it would have to wait.
    is_shy: Arc<AtomicBool>,
}

impl Export for Inline {
    fn facts(&self) -> Facts {
        self.memory.facts()
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        self.memory.try_read(range, output)
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        self.memory.read(range)
    }

    fn try_write(&self, offset: u64, parts: &[IoSlice<'_>]) -> TryWrite {
        let is_shy = self.is_shy.load(Ordering::Relaxed);
        let data: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        let data = if is_shy { data[..data.len() / 2].to_vec() } else { data };
        self.memory.write(offset, data.into(), Durability::Volatile).now_or_never().unwrap().unwrap();
        if is_shy { TryWrite::Wait } else { TryWrite::Done }
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.memory.write(offset, data, durability)
    }
}

/// A write of a batch.
#[derive(Debug, Clone, Copy)]
struct Planned {
    offset: u64,
    length: u64,
    flags: CommandFlags,
}

const fn write(offset: u64, length: u64) -> Planned {
    Planned { offset, length, flags: CommandFlags::empty() }
}

const fn stable(offset: u64, length: u64) -> Planned {
    Planned { offset, length, flags: CommandFlags::FUA }
}

/// The size of the image that batches are written to.
const SIZE: u64 = 128 * KIB;

/// Sends `batch` so that the server finds all of it at once, but for the last `late` bytes, and gives back what reached
/// the export, in the order of offsets. The contents and the replies are checked.
fn written_by(open: fn(&str) -> Client, batch: &[Planned], is_shy: bool, late: usize) -> Vec<ByteRange> {
    let scratch = Scratch::new();
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default()).unwrap();
    runtime.block_on(async {
        let _attached = attach(Preference::Auto).unwrap();
        let listeners = Listener::bind(&ListenAddress::Unix(scratch.path("s"))).unwrap();
        let uri = listeners[0].uri("x").unwrap().to_string();
        let mut contents = noise(usize::try_from(SIZE).unwrap(), 60);
        let inline = Inline { memory: Memory::holding(contents.clone()), is_shy: Arc::new(is_shy.into()) };
        let record = Arc::new(Record::new(Arc::new(inline)));
        let registry = Arc::new(Registry::new());
        registry.insert("x", Arc::clone(&record) as Arc<dyn Export>).unwrap();
        let workers = Arc::new(Workers::start(1, Preference::Auto).unwrap());
        let server = Server::start(registry, listeners, Arc::clone(&workers), Settings::default());
        let mut client = tokio::task::spawn_blocking(move || open(&uri)).await.unwrap();

        // The only worker does nothing else until the batch is there.
        let (is_held, held) = oneshot::channel();
        let (release, released) = mpsc::sync_channel::<()>(1);
        let hold = move || async move {
            is_held.send(()).unwrap();
            released.recv().unwrap();
        };
        workers.run_on(0, hold).await;
        held.await.unwrap();
        let mut output = BytesMut::new();
        for (cookie, Planned { offset, length, flags }) in (0..).zip(batch.iter().copied()) {
            let header = Header { flags: flags.bits(), command: command::WRITE, cookie, offset, length };
            let data = noise(usize::try_from(length).unwrap(), cookie);
            request::encode(&mut output, client.mode(), header);
            output.extend_from_slice(&data);
            if offset + length <= SIZE {
                contents[usize::try_from(offset).unwrap()..][..data.len()].copy_from_slice(&data);
            }
        }
        let rest = output.split_off(output.len() - late);
        client.socket.write_all(&output).unwrap();
        release.send(()).unwrap();

        let mut seen = HashSet::new();
        let mut receive = |client: &mut Client, count: usize| {
            for reply in client.receive_mixed(count) {
                let Planned { offset, length, .. } = batch[usize::try_from(reply.cookie).unwrap()];
                assert!(seen.insert(reply.cookie), "two replies to one request");
                assert_eq!(reply.error, (offset + length > SIZE).then_some(ErrorKind::NoSpace));
            }
        };
        receive(&mut client, batch.len() - usize::from(late > 0));
        if late > 0 {
            client.socket.write_all(&rest).unwrap();
            receive(&mut client, 1);
        }
        let calls = record.take();
        let mut writes: Vec<_> = calls
            .into_iter()
            .filter_map(|call| if let Recorded::Write(range) = call { Some(range) } else { None })
            .collect();
        writes.sort_by_key(|range| (range.start(), range.end()));
        assert!(client.read(0, SIZE) == contents, "{batch:?}");
        client.disconnect();
        assert!(server.drain().await, "a connection was left over");
        writes
    })
}

fn between(start: u64, end: u64) -> ByteRange {
    ByteRange::between(start * KIB, end * KIB)
}

#[test]
fn adjacent_writes_that_arrive_together_are_made_together() {
    let adjacent: Vec<_> = (0..16).map(|number| write(number * 4 * KIB, 4 * KIB)).collect();
    for open in [Client::open, Client::open_structured, Client::open_simple] {
        assert_eq!(written_by(open, &adjacent, false, 0), [between(0, 64)]);
    }
    let uneven = [write(1, 511), write(512, 1), write(513, 9000), write(9513, 0), write(9513, 7)];
    assert_eq!(written_by(Client::open, &uneven, false, 0), [ByteRange::between(1, 9520)]);
    // However many there are.
    let many: Vec<_> = (0..200).map(|number| write(number * 512, 512)).collect();
    let writes = written_by(Client::open, &many, false, 0);
    assert!(writes.len() < 10, "{} writes", writes.len());
    assert_eq!(writes.first().unwrap().start(), 0);
    assert!(writes.windows(2).all(|pair| pair[0].end() == pair[1].start()), "{writes:?}");
    assert_eq!(writes.last().unwrap().end(), 200 * 512);
}

#[test]
fn writes_that_do_not_belong_together_are_made_by_themselves() {
    let open = Client::open;
    let (a, b, c) = (write(0, 4 * KIB), write(4 * KIB, 4 * KIB), write(12 * KIB, 4 * KIB));
    let gap = [a, b, c, write(16 * KIB, 4 * KIB)];
    assert_eq!(written_by(open, &gap, false, 0), [between(0, 8), between(12, 20)]);
    let backwards = [c, b, a];
    assert_eq!(written_by(open, &backwards, false, 0), [between(0, 4), between(4, 8), between(12, 16)]);
    let twice = [a, a, b];
    assert_eq!(written_by(open, &twice, false, 0), [between(0, 4), between(0, 8)]);
    let durable = [a, b, stable(8 * KIB, 4 * KIB), c, write(16 * KIB, 4 * KIB)];
    assert_eq!(written_by(open, &durable, false, 0), [between(0, 8), between(8, 12), between(12, 20)]);
    let first_durable = [stable(0, 4 * KIB), b, write(8 * KIB, 4 * KIB)];
    assert_eq!(written_by(open, &first_durable, false, 0), [between(0, 4), between(4, 12)]);
    // The third one is refused, and its payload skipped.
    let beyond = [write(120 * KIB, 4 * KIB), write(124 * KIB, 2 * KIB), write(126 * KIB, 4 * KIB), a, b];
    for open in [Client::open, Client::open_structured, Client::open_simple] {
        assert_eq!(written_by(open, &beyond, false, 0), [between(0, 8), between(120, 126)]);
    }
    let up_to_the_end =
        [write(120 * KIB, 4 * KIB), write(124 * KIB, 4 * KIB), write(128 * KIB, 1), write(128 * KIB, 0)];
    let writes = written_by(open, &up_to_the_end, false, 0);
    assert_eq!(writes[0], between(120, 128));
}

#[test]
fn a_write_whose_payload_is_late_does_not_keep_others_waiting() {
    let batch: Vec<_> = (0..4).map(|number| write(number * 4 * KIB, 4 * KIB)).collect();
    for late in [1, 4096, 4096 + 10] {
        let writes = written_by(Client::open, &batch, false, late);
        assert_eq!(writes[0], between(0, 12), "{late} bytes were late");
        assert_eq!(writes.last().unwrap().end(), 16 * KIB);
    }
}

#[test]
fn writes_that_have_to_wait_after_all_are_made_one_by_one() {
    let adjacent: Vec<_> = (0..16).map(|number| write(number * 4 * KIB, 4 * KIB)).collect();
    let expected: Vec<_> = (0..16).map(|number| between(number * 4, number * 4 + 4)).collect();
    for open in [Client::open, Client::open_simple] {
        assert_eq!(written_by(open, &adjacent, true, 0), expected);
        let last = written_by(open, &adjacent, true, 100);
        assert_eq!(last[..15], expected[..15]);
    }
}
