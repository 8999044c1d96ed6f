//! The transmission phase, request by request.

use std::io::{Read, Write};

use headwater::error::ErrorKind;
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::request::Header;
use headwater::nbd::wire::{CommandFlags, MAX_PAYLOAD_BYTES, chunk, command};

use crate::support::client::Client;
use crate::support::{Daemon, Scratch, bytes_of, eventually, noise};

const MIB: u64 = 1 << 20;

fn of_every_age(uri: &str) -> [Client; 3] {
    [Client::open(uri), Client::open_structured(uri), Client::open_simple(uri)]
}

#[test]
fn single_bytes_and_the_largest_requests_work_at_odd_offsets() {
    let scratch = Scratch::new();
    let size = 40 * MIB + 13;
    let mut bytes = noise(usize::try_from(size).unwrap(), 3);
    let image = scratch.file("image.raw", &bytes);
    let server = Daemon::serve(&scratch, &image, &[]);
    for (turn, mut client) in of_every_age(server.uri()).into_iter().enumerate() {
        for offset in [0, 1, 511, 4095, 65_535, size - 1] {
            assert_eq!(client.read(offset, 1), bytes[usize::try_from(offset).unwrap()..][..1]);
        }
        assert!(client.read(7, MAX_PAYLOAD_BYTES) == bytes[7..][..32 << 20]);
        let large = noise(32 << 20, 100 + turn as u64);
        let start = 3 + turn;
        assert_eq!(client.write(start as u64, &large), None);
        bytes[start..start + large.len()].copy_from_slice(&large);
        assert_eq!(client.write(size - 1, b"!"), None);
        let last = bytes.len() - 1;
        bytes[last] = b'!';
        assert!(client.read(0, MAX_PAYLOAD_BYTES) == bytes[..32 << 20]);
        assert!(client.read(8 * MIB + 13, MAX_PAYLOAD_BYTES) == bytes[(8 << 20) + 13..]);
    }
    server.stop();
    assert!(std::fs::read(&image).unwrap() == bytes);
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_connection_lives() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &noise(100_000, 1)), &[]);
    for mut client in of_every_age(server.uri()) {
        let all = u64::from(u32::MAX);
        for (number, offset, length, kind) in [
            (command::READ, 0, all, ErrorKind::Invalid),
            (command::READ, 99_999, 2, ErrorKind::Invalid),
            (command::READ, u64::MAX, 1, ErrorKind::Invalid),
            (command::TRIM, 100_000, 1, ErrorKind::Invalid),
            (command::CACHE, 0, 100_001, ErrorKind::Invalid),
            (command::WRITE_ZEROES, 1, 100_000, ErrorKind::NoSpace),
            (command::FLUSH, 1, 0, ErrorKind::Invalid),
            (8, 0, 0, ErrorKind::Invalid),
            (0xffff, 0, 1, ErrorKind::Invalid),
        ] {
            assert_eq!(client.ask(number, offset, length).error, Some(kind), "command {number} at {offset}");
        }
        for bit in [6, 10, 15] {
            let flags = CommandFlags::from_bits_retain(1 << bit);
            assert_eq!(client.ask_with(command::READ, flags, 0, 1, &[]).error, Some(ErrorKind::Invalid));
        }
        assert_eq!(client.write(99_999, b"xy"), Some(ErrorKind::NoSpace));
        assert!(client.read(5, 1000) == noise(100_000, 1)[5..1005], "it still works");
    }
}

#[test]
fn a_payload_that_is_too_long_is_skipped_or_ends_the_connection() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 100 * MIB, &[]);
    let server = Daemon::serve(&scratch, &image, &[]);
    let long = vec![7; (33 << 20) + 5];
    for mut client in [Client::open_structured(server.uri()), Client::open_simple(server.uri())] {
        assert_eq!(client.write(0, &long), Some(ErrorKind::Invalid));
        assert_eq!(client.read(0, 10), [0; 10]);
    }
    // With 64 bits there would be no end of skipping.
    let mut client = Client::open(server.uri());
    let header = Header { flags: 0, command: command::WRITE, cookie: 1, offset: 0, length: 1 << 40 };
    client.send_raw(header, &[]);
    assert!(client.socket.is_closed_by_peer());
}

#[test]
fn nothing_is_a_length_too() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &noise(10_000, 1)), &[]);
    for mut client in of_every_age(server.uri()) {
        assert_eq!(client.ask(command::READ, 10_000, 0).error, None);
        assert_eq!(client.write(5, b""), None);
        assert_eq!(client.ask(command::TRIM, 5, 0).error, None);
        assert_eq!(client.ask(command::WRITE_ZEROES, 5, 0).error, None);
        assert_eq!(client.ask(command::CACHE, 5, 0).error, None);
        assert!(client.read(0, 10_000) == noise(10_000, 1));
    }
}

#[test]
fn a_read_only_export_refuses_every_write() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(10_000, 1));
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    for mut client in of_every_age(server.uri()) {
        assert_eq!(client.write(0, &[1; 5000]), Some(ErrorKind::Permission));
        for number in [command::TRIM, command::WRITE_ZEROES] {
            assert_eq!(client.ask(number, 0, 100).error, Some(ErrorKind::Permission));
        }
        assert_eq!(client.flush(), None);
        assert!(client.read(0, 10_000) == noise(10_000, 1));
    }
    assert!(std::fs::read(image).unwrap() == noise(10_000, 1));
}

#[test]
fn holes_travel_as_holes_unless_that_is_forbidden() {
    let scratch = Scratch::new();
    let data = noise(65_536, 2);
    let image = scratch.sparse("image.raw", 20 * MIB, &[(10 * MIB, &data)]);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let expected = [vec![0; 5 << 20], data, vec![0; 100]].concat();
    for mut client in [Client::open(server.uri()), Client::open_structured(server.uri())] {
        let reply = client.ask(command::READ, 5 * MIB, 5 * MIB + 65_636);
        let carried: usize = reply.content.iter().filter_map(|(_, piece)| piece.as_ref().ok()).map(Vec::len).sum();
        assert_eq!(carried, 65_536, "zeroes were carried");
        assert!(reply.bytes() == expected);
        // A short one, answered inline.
        let reply = client.ask(command::READ, 4096, 4096);
        assert_eq!(reply.content, [(4096, Err(4096))]);
        // One chunk, zeroes spelled out; short, whole and streamed.
        for length in [4096, 300_000, 5 * MIB + 65_636] {
            let reply = client.ask_with(command::READ, CommandFlags::DF, 5 * MIB, length, &[]);
            assert_eq!(reply.content.len(), 1);
            assert!(reply.content[0].1.as_ref().unwrap()[..] == expected[..usize::try_from(length).unwrap()]);
        }
    }
}

#[test]
fn block_status_tells_data_from_holes() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 20 * MIB, &[(10 * MIB, &noise(65_536, 2))]);
    let server = Daemon::serve(&scratch, &image, &[]);
    let extents = |mut client: Client, flags, offset, length| {
        let reply = client.ask_with(command::BLOCK_STATUS, flags, offset, length, &[]);
        assert_eq!(reply.other.len(), 1);
        let (kind, payload) = &reply.other[0];
        let wide = client.mode() == ReplyMode::Extended;
        assert_eq!(*kind, if wide { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS });
        headwater::nbd::reply::decode_block_status(*kind, payload).unwrap().1
    };
    let pairs = |extents: Vec<headwater::nbd::Extent>| {
        extents.into_iter().map(|extent| (extent.length, extent.status)).collect::<Vec<_>>()
    };
    for open in [Client::open, Client::open_structured] {
        let all = extents(open(server.uri()), CommandFlags::empty(), 0, 20 * MIB);
        assert_eq!(pairs(all), [(10 * MIB, 3), (65_536, 0), (10 * MIB - 65_536, 3)]);
        let one = extents(open(server.uri()), CommandFlags::REQ_ONE, 10 * MIB + 1, 100);
        assert_eq!(pairs(one), [(100, 0)]);
        let mut client = open(server.uri());
        assert_eq!(client.ask(command::BLOCK_STATUS, 0, 0).error, Some(ErrorKind::Invalid));
    }
    // Without structured replies there are no contexts.
    let mut simple = Client::open_simple(server.uri());
    assert_eq!(simple.ask(command::BLOCK_STATUS, 0, 100).error, Some(ErrorKind::Invalid));
}

#[test]
fn lengths_beyond_32_bits_work_with_extended_headers() {
    let scratch = Scratch::new();
    let size = 10 << 30;
    let image = scratch.sparse("image.raw", size, &[(0, &[1; 4096]), (6 << 30, &[2; 4096])]);
    let server = Daemon::serve(&scratch, &image, &[]);
    let mut client = Client::open(server.uri());
    let reply = client.ask(command::BLOCK_STATUS, 0, size);
    let (kind, payload) = &reply.other[0];
    let extents = headwater::nbd::reply::decode_block_status(*kind, payload).unwrap().1;
    assert_eq!(extents.iter().map(|extent| extent.length).sum::<u64>(), size);
    assert_eq!(extents[1].length, (6 << 30) - 4096);
    assert_eq!(client.ask(command::CACHE, 0, size).error, None);
    assert_eq!(client.ask(command::WRITE_ZEROES, 0, size).error, None);
    assert_eq!(client.ask(command::TRIM, 0, size).error, None);
    assert_eq!(client.read(6 << 30, 4096), [0; 4096]);
    // A compact client is told as much as its numbers can say.
    let mut compact = Client::open_structured(server.uri());
    let reply = compact.ask(command::BLOCK_STATUS, 0, u64::from(u32::MAX));
    let (kind, payload) = &reply.other[0];
    let extents = headwater::nbd::reply::decode_block_status(*kind, payload).unwrap().1;
    assert!(extents.iter().all(|extent| extent.length > 0 && extent.length < 1 << 32));
}

#[test]
fn many_requests_in_one_packet_are_all_answered() {
    let scratch = Scratch::new();
    let bytes = noise(3 << 20, 4);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &[]);
    for mut client in of_every_age(server.uri()) {
        let read = |cookie| Header { flags: 0, command: command::READ, cookie, offset: cookie * 4096, length: 4096 };
        client.send_together((0..700).map(read));
        let mut seen = [false; 700];
        for _ in 0..700 {
            let reply = client.receive();
            let at = usize::try_from(reply.cookie).unwrap();
            assert!(!std::mem::replace(&mut seen[at], true), "two replies to request {at}");
            assert!(reply.bytes() == bytes[at * 4096..][..4096]);
        }
    }
}

#[test]
fn a_client_that_stops_reading_stalls_itself_only() {
    let scratch = Scratch::new();
    let bytes = noise(64 << 20, 5);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &["--workers=1"]);
    let before = server.resident_kib();
    let mut stalled: Vec<_> = (0..30).map(|_| of_every_age(server.uri())).collect();
    for client in stalled.iter_mut().flatten() {
        for cookie in 0..20 {
            client.send(command::READ, CommandFlags::empty(), cookie, cookie, MAX_PAYLOAD_BYTES, &[]);
        }
    }
    let mut other = Client::open(server.uri());
    for _ in 0..100 {
        assert!(other.read(12_345, 100_000) == bytes[12_345..112_345]);
    }
    // 90 clients have asked for 640 MiB each.
    let grown = server.resident_kib().saturating_sub(before) >> 10;
    assert!(grown < 90 * 4 + 512, "{grown} MiB");
    // And whoever begins to read again gets what it asked for.
    let client = &mut stalled[29][1];
    let reply = client.receive();
    let start = usize::try_from(reply.cookie).unwrap();
    assert!(reply.bytes() == bytes[start..][..32 << 20]);
}

#[test]
fn a_client_that_announces_and_does_not_deliver_stalls_itself_only() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &noise(64 << 20, 5)), &["--workers=1"]);
    let before = server.resident_kib();
    let mut stalled: Vec<_> = (0..100).map(|_| Client::open_simple(server.uri())).collect();
    for client in &mut stalled {
        let header = Header { flags: 0, command: command::WRITE, cookie: 1, offset: 0, length: MAX_PAYLOAD_BYTES };
        client.send_raw(header, &[9; 1000]);
    }
    // Half a header, too.
    let mut half = Client::open(server.uri());
    half.socket.write_all(b"\x21\xe4\x1c").unwrap();
    assert_eq!(Client::open(server.uri()).write(40 << 20, b"from another client"), None);
    let grown = server.resident_kib().saturating_sub(before) >> 10;
    assert!(grown < 100, "{grown} MiB for 100 KB of payload");
    half.socket.write_all(b"\x71").unwrap();
    half.socket.half_close();
    assert!(half.socket.is_closed_by_peer());
}

#[test]
fn a_client_that_vanishes_with_requests_in_flight_leaves_nothing_behind() {
    let scratch = Scratch::new();
    let bytes = noise(64 << 20, 6);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &[]);
    for round in 0..20 {
        let mut client = if round % 2 == 0 { Client::open(server.uri()) } else { Client::open_simple(server.uri()) };
        for cookie in 0..100 {
            client.send(command::READ, CommandFlags::empty(), cookie, cookie * 1000, 500_000, &[]);
        }
        client.send(command::WRITE, CommandFlags::empty(), 1000, 0, 4096, &bytes[..4096]);
        drop(client);
    }
    eventually("end of all clients", || server.log_text().matches("client left").count() == 20);
    assert_eq!(Client::open(server.uri()).read(63 << 20, 10).len(), 10);
}

#[test]
fn what_was_received_is_answered_before_the_end() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 64 * MIB, &[]);
    let server = Daemon::serve(&scratch, &image, &[]);
    let mut client = Client::open(server.uri());
    let mut idle = Client::open(server.uri());
    // The requests and the signal are there together when the server wakes up.
    server.signal("STOP");
    let data = noise(512, 8);
    for cookie in 0..60 {
        client.send(command::WRITE, CommandFlags::empty(), cookie, cookie * 512, 512, &data);
    }
    client.send(command::READ, CommandFlags::empty(), 1000, 0, 8 * MIB, &[]);
    server.signal("TERM");
    server.signal("CONT");
    // Replies to the short ones may come between the chunks of the long one.
    let mut cookies: Vec<_> = client
        .receive_mixed(61)
        .into_iter()
        .map(|reply| {
            assert_eq!(reply.error, None);
            reply.cookie
        })
        .collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..60).chain([1000]).collect::<Vec<_>>());
    let mut rest = Vec::new();
    assert_eq!(client.socket.read_to_end(&mut rest).unwrap(), 0);
    assert!(idle.socket.is_closed_by_peer());
    drop((client, idle));
    let log = server.stop();
    assert_eq!(log.sum("client left", "errors"), 0);
    assert!(bytes_of(&image, 59 * 512, 512) == data);
}

#[test]
fn a_half_closed_client_gets_its_replies() {
    let scratch = Scratch::new();
    let bytes = noise(10 << 20, 9);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &[]);
    let mut client = Client::open_simple(server.uri());
    for cookie in 0..10 {
        client.send(command::READ, CommandFlags::empty(), cookie, cookie << 20, MIB, &[]);
    }
    client.socket.half_close();
    for _ in 0..10 {
        let reply = client.receive();
        assert!(reply.bytes() == bytes[usize::try_from(reply.cookie).unwrap() << 20..][..1 << 20]);
    }
    assert!(client.socket.is_closed_by_peer());
}

#[test]
fn replies_that_fill_the_outbox_and_leave_at_once_do_not_stall_the_connection() {
    // A reply of 1 MiB makes the connection pause; if the socket took all of it at once, nothing woke it again.
    let scratch = Scratch::new();
    let bytes = noise(8 << 20, 10);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &[]);
    for mut client in of_every_age(server.uri()) {
        for round in 0..300u64 {
            let start = usize::try_from(round % 7).unwrap() << 20;
            assert!(client.read(start as u64, MIB) == bytes[start..start + (1 << 20)]);
        }
    }
}
