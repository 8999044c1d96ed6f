//! The negotiation, as good, old and hostile clients hold it with the real program.

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::request::{self, Header};
use headwater::nbd::wire::{TransmissionFlags, command, option, option_reply};

use crate::support::client::{Client, FLAGS, Socket, option, reply};
use crate::support::{Daemon, Scratch, noise, run};

fn greeted(uri: &str) -> Socket {
    let mut socket = Socket::connect(uri);
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x03");
    socket
}

fn served(scratch: &Scratch) -> Daemon {
    Daemon::serve(scratch, &scratch.file("image.raw", &noise(100_000, 1)), &["--listen=127.0.0.1:0"])
}

/// Whether the server still does its work.
fn check(server: &Daemon) {
    assert!(Client::open(server.uri()).read(1000, 5000) == noise(100_000, 1)[1000..6000]);
}

#[test]
fn clients_of_every_age_get_in() {
    let scratch = Scratch::new();
    let server = served(&scratch);
    let bytes = noise(100_000, 1);
    for (unknown, mode) in [
        (&[][..], ReplyMode::Extended),
        (&[option::EXTENDED_HEADERS], ReplyMode::Structured),
        (&[option::EXTENDED_HEADERS, option::STRUCTURED_REPLY], ReplyMode::Simple),
        (&[option::EXTENDED_HEADERS, option::STRUCTURED_REPLY, option::GO], ReplyMode::Simple),
    ] {
        let mut client = Client::open_without(server.uri(), unknown);
        assert_eq!(client.mode(), mode);
        assert_eq!(client.agreed.size, 100_000);
        assert_eq!(client.agreed.flags.contains(TransmissionFlags::SEND_DF), mode.has_chunks());
        assert!(client.read(77, 9999) == bytes[77..77 + 9999]);
        client.disconnect();
    }
}

#[test]
fn a_client_from_before_fixed_newstyle_gets_in() {
    let scratch = Scratch::new();
    let server = served(&scratch);
    // No flags at all, EXPORT_NAME, and 124 bytes of padding.
    let mut socket = greeted(server.uri());
    socket.write_all(&[0; 4]).unwrap();
    socket.write_all(&option(option::EXPORT_NAME, b"image")).unwrap();
    let mut answer = [0; 8 + 2 + 124];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..8], 100_000u64.to_be_bytes());
    assert_eq!(answer[10..], [0; 124]);
}

#[test]
fn a_client_that_was_told_no_maximum_may_ask_for_more() {
    // As nbd's own test client does ("integrityhuge"): it never learns of 32 MiB.
    const LONG: usize = 48 << 20;
    let scratch = Scratch::new();
    let bytes = noise(50 << 20, 2);
    let server = Daemon::serve(&scratch, &scratch.file("large.raw", &bytes), &[]);
    let mut socket = greeted(server.uri());
    socket.write_all(&[0; 4]).unwrap();
    socket.write_all(&option(option::EXPORT_NAME, b"large")).unwrap();
    socket.read_exact(&mut [0; 8 + 2 + 124]).unwrap();
    let mut ask = |number: u16, length: usize, payload: &[u8]| {
        let mut output = BytesMut::new();
        let length = u64::try_from(length).unwrap();
        let header = Header { flags: 0, command: number, cookie: 1, offset: 77, length };
        request::encode(&mut output, ReplyMode::Simple, header);
        output.extend_from_slice(payload);
        socket.write_all(&output).unwrap();
        let mut reply = [0; 16];
        socket.read_exact(&mut reply).unwrap();
        let mut data = vec![0; if number == command::READ && reply[4..8] == [0; 4] { LONG } else { 0 }];
        socket.read_exact(&mut data).unwrap();
        (u32::from_be_bytes(reply[4..8].try_into().unwrap()), data)
    };
    assert!(ask(command::READ, LONG, &[]) == (0, bytes[77..77 + LONG].to_vec()));
    let other = noise(LONG, 3);
    assert_eq!(ask(command::WRITE, LONG, &other).0, 0);
    assert!(ask(command::READ, LONG, &[]) == (0, other));
    assert_eq!(ask(command::READ, (64 << 20) + 1, &[]).0, 22);
}

#[test]
fn the_legacy_crate_reads_and_writes() {
    use std::io::{Seek, SeekFrom};
    let scratch = Scratch::new();
    let server = served(&scratch);
    let mut socket = Socket::connect(server.uri());
    let export = nbd::client::handshake(&mut socket, b"image").unwrap();
    assert_eq!(export.size, 100_000);
    let mut client = nbd::client::NbdClient::new(&mut socket, &export);
    client.seek(SeekFrom::Start(500)).unwrap();
    client.write_all(b"written by an old client").unwrap();
    client.seek(SeekFrom::Start(498)).unwrap();
    let mut bytes = [0; 28];
    client.read_exact(&mut bytes).unwrap();
    let before = noise(100_000, 1);
    assert_eq!(bytes[..], [&before[498..500], b"written by an old client", &before[524..526]].concat());
}

#[test]
fn an_unknown_option_and_an_abort_are_answered() {
    // What nbd's own test client tries with -h.
    let scratch = Scratch::new();
    let server = served(&scratch);
    let mut socket = greeted(server.uri());
    socket.write_all(&FLAGS).unwrap();
    socket.write_all(&option(0x765_4321, &4u32.to_be_bytes())).unwrap();
    assert_eq!(reply(&mut socket).0, option_reply::ERR_UNSUP);
    socket.write_all(&option(option::STARTTLS, b"")).unwrap();
    assert_eq!(reply(&mut socket).0, option_reply::ERR_POLICY);
    socket.write_all(&option(option::ABORT, b"")).unwrap();
    assert_eq!(reply(&mut socket).0, option_reply::ACK);
    assert!(socket.is_closed_by_peer());
    check(&server);
}

#[test]
fn options_that_arrive_byte_by_byte_or_all_at_once_are_taken() {
    let scratch = Scratch::new();
    let server = served(&scratch);
    let list = option(option::LIST, b"");
    let mut socket = greeted(server.uri());
    for byte in FLAGS.iter().chain(&list) {
        socket.write_all(&[*byte]).unwrap();
    }
    assert_eq!(reply(&mut socket).0, option_reply::SERVER);
    assert_eq!(reply(&mut socket).0, option_reply::ACK);
    socket.write_all(&[list.clone(), list.clone(), list].concat()).unwrap();
    for _ in 0..3 {
        let (kind, data) = reply(&mut socket);
        assert_eq!((kind, &data[..9]), (option_reply::SERVER, &b"\0\0\0\x05image"[..]));
        assert_eq!(reply(&mut socket).0, option_reply::ACK);
    }
}

#[test]
fn garbage_closes_its_own_connection_only() {
    let scratch = Scratch::new();
    let server = served(&scratch);
    let mut steady = Client::open(server.uri());
    for garbage in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 a TLS hello",
        &[0xff; 100_000],
        &[[0, 0, 0, 3].to_vec(), vec![0x55; 64]].concat(),
        // An option of 4 GiB.
        &[&FLAGS[..], b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"].concat(),
        // EXPORT_NAME of an export that is not there, and one that is no name.
        &[&FLAGS[..], &option(option::EXPORT_NAME, b"nope")].concat(),
        &[&FLAGS[..], &option(option::EXPORT_NAME, b"\xff\xfe")].concat(),
    ] {
        let mut socket = greeted(server.uri());
        // It may hang up before it has heard all of it.
        let _ = socket.write_all(garbage);
        assert!(socket.is_closed_by_peer(), "{:?}", &garbage[..garbage.len().min(20)]);
    }
    // Garbage behind a good negotiation.
    let mut client = Client::open(server.uri());
    client.socket.write_all(&[0x99; 64]).unwrap();
    assert!(client.socket.is_closed_by_peer());
    assert!(steady.read(0, 100) == noise(100_000, 1)[..100]);
    check(&server);
}

#[test]
fn a_client_that_starts_and_waits_is_sent_away() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(100_000, 1));
    let server = Daemon::serve(&scratch, &image, &["--handshake-timeout=0.3"]);
    let began = Instant::now();
    for beginning in [&b""[..], &[0, 0], &FLAGS, &[&FLAGS[..], b"IHAVEOPT\0\0"].concat()] {
        let mut socket = greeted(server.uri());
        socket.write_all(beginning).unwrap();
        assert!(socket.is_closed_by_peer());
    }
    assert!(began.elapsed() >= Duration::from_millis(1200));
    // Once in, a client may be silent as long as it likes.
    let mut patient = Client::open(server.uri());
    let mut other = greeted(server.uri());
    assert!(other.is_closed_by_peer());
    assert_eq!(patient.read(0, 10).len(), 10);
}

#[test]
fn a_thousand_connections_at_once_are_all_served() {
    let scratch = Scratch::new();
    let server = served(&scratch);
    let bytes = noise(100_000, 1);
    let before = server.resident_kib();
    let mut clients: Vec<_> = (0..1000).map(|_| Client::open(server.uri())).collect();
    for (index, client) in clients.iter_mut().enumerate() {
        assert!(client.read(index as u64 * 90, 4096) == bytes[index * 90..index * 90 + 4096]);
    }
    let after = server.resident_kib();
    assert!(after < before + (64 << 10), "{} KiB for a thousand idle clients", after - before);
    drop(clients);
    check(&server);
}

#[test]
fn clients_over_the_limit_wait_for_their_turn() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(100_000, 1));
    let server = Daemon::serve(&scratch, &image, &["--max-connections=2"]);
    let (first, mut second) = (Client::open(server.uri()), Client::open(server.uri()));
    // The third is in the queue of the socket: it hears nothing yet.
    let mut third = Socket::connect(server.uri());
    server.wait_for_log("too many connections");
    assert_eq!(second.read(0, 10).len(), 10);
    first.disconnect();
    let mut greeting = [0; 18];
    third.read_exact(&mut greeting).unwrap();
    assert!(greeting.starts_with(b"NBDMAGIC"));
}

#[test]
fn every_family_of_address_works() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(100_000, 1));
    for listen in ["127.0.0.1:0", "[::1]:0", ":0", "localhost:0"] {
        let log = scratch.path("log");
        let mut command = crate::support::headwater(&log);
        command.arg("serve").arg(format!("a b:ü={}", image.display())).args(["--listen", listen]);
        let server = Daemon::start(command, 1, &log);
        assert!(Client::open(server.uri()).read(5, 50) == noise(100_000, 1)[5..55], "{}", server.uri());
        run(std::process::Command::new("nbdinfo").arg(server.uri()));
        run(std::process::Command::new("qemu-img").arg("info").arg(server.uri()));
    }
}
