//! Mirrors over real servers and real links. What reached the upstream is counted there.

use std::process::Command;

use headwater::error::ErrorKind;
use headwater::nbd::wire::{CommandFlags, command};

use crate::support::client::Client;
use crate::support::link::Link;
use crate::support::{Daemon, ON_DEMAND, Scratch, eventually, headwater, noise, run, run_failing};

const MIB: u64 = 1 << 20;

/// A server with an image of noise, and the image.
fn origin(scratch: &Scratch, mebibytes: usize) -> (Daemon, Vec<u8>) {
    let bytes = noise(mebibytes << 20, 9);
    let server = Daemon::serve(scratch, &scratch.file("image.raw", &bytes), &["--read-only"]);
    (server, bytes)
}

/// Bytes of its image that a server has sent, from its log. Ends it.
fn sent(server: Daemon) -> u64 {
    server.stop().sent()
}

/// What a mirror says of itself.
fn info(uri: &str) -> serde_json::Value {
    serde_json::from_str(&run(Command::new(env!("CARGO_BIN_EXE_headwater")).args(["info", "--json", uri]))).unwrap()
}

fn resident(uri: &str) -> u64 {
    info(uri)["mirror"]["resident"].as_u64().unwrap()
}

#[test]
fn what_is_read_twice_comes_over_once() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 16);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[ON_DEMAND]);
    let mut client = Client::open(mirror.uri());
    for _ in 0..2 {
        assert!(client.read(MIB + 5, 5 * MIB) == bytes[(1 << 20) + 5..(6 << 20) + 5]);
    }
    drop(client);
    mirror.stop();
    // Whole chunks of 64 KiB: one more than what was asked for.
    assert_eq!(sent(server), 5 * MIB + 65_536);
}

#[test]
fn eight_clients_at_once_bring_each_byte_once() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 64);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--workers=2"]);
    let uri = mirror.uri().to_owned();
    std::thread::scope(|scope| {
        for client in 0..8usize {
            let (uri, bytes) = (&uri, &bytes);
            scope.spawn(move || {
                let mut connection = Client::open(uri);
                // In step, in disorder, and with different sizes.
                let length = [4096usize, 65_536, 1 << 20, 100_000][client % 4];
                for start in (0..bytes.len()).step_by(length) {
                    let end = (start + length).min(bytes.len());
                    assert!(connection.read(start as u64, (end - start) as u64) == bytes[start..end]);
                }
            });
        }
    });
    let log = mirror.stop();
    assert_eq!(log.sum("mirror closed", "fetched_bytes"), 64 * MIB);
    assert_eq!(sent(server), 64 * MIB);
}

#[test]
fn a_recorded_boot_costs_little_more_than_it_reads_and_nothing_the_second_time() {
    let scratch = Scratch::new();
    let trace = include_str!("../data/boot-debian12-web.csv");
    let reads: Vec<(u64, u64)> = trace
        .lines()
        .skip(1)
        .map(|line| line.split(',').collect::<Vec<_>>())
        .filter(|fields| fields[1] == "read")
        .map(|fields| (fields[2].parse().unwrap(), fields[3].parse().unwrap()))
        .collect();
    // A sparse image with data wherever the machine read, so that the test need not write 2 GiB.
    let data = noise(1 << 20, 3);
    let chunks: std::collections::BTreeSet<_> =
        reads.iter().flat_map(|(o, n)| o / 65_536..(o + n).div_ceil(65_536)).collect();
    let places: Vec<_> = chunks.iter().map(|chunk| (chunk * 65_536, &data[..65_536])).collect();
    let server = Daemon::serve(&scratch, &scratch.sparse("image.raw", 2 << 30, &places), &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    for _ in 0..2 {
        let mut client = Client::open(mirror.uri());
        for (offset, length) in &reads {
            let bytes = client.read(*offset, *length);
            assert!((0..bytes.len()).all(|at| bytes[at] == data[(usize::try_from(*offset).unwrap() + at) % 65_536]));
        }
        client.disconnect();
    }
    let asked: u64 = reads.iter().map(|(_, length)| length).sum();
    mirror.stop();
    let sent = sent(server);
    assert!(sent as f64 <= 1.35 * asked as f64, "{sent} bytes came over for {asked}");
}

#[test]
fn a_restarted_mirror_serves_without_its_upstream_what_it_has() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 8);
    let upstream = server.uri().to_owned();
    let mirror = Daemon::mirror(&scratch, &upstream, &[ON_DEMAND]);
    assert!(Client::open(mirror.uri()).read(0, 4 * MIB) == bytes[..4 << 20]);
    mirror.stop();
    server.stop();
    let mirror = Daemon::mirror(&scratch, &upstream, &[ON_DEMAND, "--upstream-timeout=0.5"]);
    mirror.wait_for_log("the upstream is away");
    assert_eq!(resident(mirror.uri()), 4 * MIB);
    let mut client = Client::open(mirror.uri());
    assert!(client.read(100, 4 * MIB - 100) == bytes[100..4 << 20]);
    // What it lacks is waited for, and then it is an error and nothing else.
    assert_eq!(client.ask(command::READ, 4 * MIB, 10).error, Some(ErrorKind::Io));
    assert_eq!(client.ask(command::READ, 4 * MIB - 10, 20).error, Some(ErrorKind::Io));
    assert!(client.read(0, MIB) == bytes[..1 << 20]);
    // The upstream comes back.
    let _server = Daemon::serve(&scratch, &scratch.path("image.raw"), &["--read-only"]);
    eventually("upstream", || client.ask(command::READ, 4 * MIB, 10).error.is_none());
    assert!(client.read(4 * MIB, 4 * MIB) == bytes[4 << 20..]);
}

#[test]
fn a_new_mirror_without_any_upstream_is_refused() {
    let scratch = Scratch::new();
    let mut command = headwater(&scratch.path("log"));
    command.args(["mirror", "d=nbd+unix:///x?socket=/nonexistent/s,nbd://127.0.0.1:1/x", "--cache"]);
    command.arg(scratch.path("cache")).arg("--unix").arg(scratch.path("s")).stderr(std::process::Stdio::piped());
    let complaint = run_failing(&mut command);
    assert!(
        complaint.contains("cannot mirror \"d\": nbd+unix:///x?socket=/nonexistent/s: cannot connect"),
        "{complaint}"
    );
    assert!(complaint.contains("nbd://127.0.0.1:1/x: cannot connect"), "{complaint}");
}

#[test]
fn a_cut_link_is_mended_without_an_error() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 32);
    let link = Link::to(server.uri());
    let mirror = Daemon::mirror(&scratch, &link.uri(), &[]);
    let mut client = Client::open(mirror.uri());
    for round in 0..16 {
        // Requests are on their way, and their replies do not arrive.
        link.hold();
        let start = round * 2 * MIB;
        for cookie in 0..8 {
            client.send(command::READ, CommandFlags::empty(), cookie, start + cookie * 262_144, 262_144, &[]);
        }
        link.cut();
        link.release();
        link.mend();
        for _ in 0..8 {
            let reply = client.receive();
            let at = usize::try_from(start + reply.cookie * 262_144).unwrap();
            assert!(reply.bytes() == bytes[at..at + 262_144]);
        }
    }
    let log = mirror.stop();
    assert_eq!(log.sum("client left", "errors"), 0);
}

#[test]
fn an_upstream_that_falls_silent_is_left_for_another() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 4);
    let (first, second) = (Link::to(server.uri()), Link::to(server.uri()));
    let both = format!("{},{}", first.uri(), second.uri());
    let mirror = Daemon::mirror(&scratch, &both, &["--upstream-timeout=4"]);
    let mut client = Client::open(mirror.uri());
    assert!(client.read(0, 1000) == bytes[..1000]);
    first.hold();
    // The connection looks alive; only its silence gives it away.
    let came = second.received();
    let reading = std::thread::spawn({
        let uri = mirror.uri().to_owned();
        move || Client::open(&uri).read(MIB, MIB)
    });
    mirror.wait_for_log("turning to another server");
    assert!(reading.join().unwrap() == bytes[1 << 20..2 << 20]);
    assert!(second.received() > came, "the second server was not asked");
    drop(client);
    assert_eq!(mirror.stop().sum("client left", "errors"), 0);
}

#[test]
fn hits_do_not_wait_for_misses() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 16);
    let link = Link::to(server.uri());
    let mirror = Daemon::mirror(&scratch, &link.uri(), &[ON_DEMAND, "--workers=1"]);
    let mut hits = Client::open(mirror.uri());
    assert!(hits.read(0, 4 * MIB) == bytes[..4 << 20]);
    let mut misses = Client::open(mirror.uri());
    link.hold();
    for cookie in 0..200 {
        misses.send(command::READ, CommandFlags::empty(), cookie, 4 * MIB + cookie * 50_000, 4096, &[]);
    }
    for round in 0..1000u64 {
        let at = usize::try_from(round * 4099 % (4 * MIB - 4096)).unwrap();
        assert!(hits.read(at as u64, 4096) == bytes[at..at + 4096]);
    }
    // On the connection that waits, too.
    misses.send(command::READ, CommandFlags::empty(), 1000, 5, 4096, &[]);
    let reply = misses.receive();
    assert_eq!(reply.cookie, 1000, "a hit waited behind misses of its own connection");
    link.release();
    for _ in 0..200 {
        let reply = misses.receive();
        let at = usize::try_from(4 * MIB + reply.cookie * 50_000).unwrap();
        assert!(reply.bytes() == bytes[at..at + 4096]);
    }
}

#[test]
fn holes_are_never_carried_as_bytes() {
    let scratch = Scratch::new();
    let data = noise(MIB as usize, 4);
    let image = scratch.sparse("image.raw", 1 << 30, &[(100 * MIB, &data), (900 * MIB, &data)]);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let link = Link::to(server.uri());
    let mirror = Daemon::mirror(&scratch, &link.uri(), &[]);
    let copy = scratch.path("copy.raw");
    run(Command::new("nbdcopy").arg(mirror.uri()).arg(&copy));
    run(Command::new("cmp").arg(&image).arg(&copy));
    assert!(link.received() < 2 * MIB + 200_000, "{} bytes came over", link.received());
    let mut client = Client::open(mirror.uri());
    let hole = client.ask(command::READ, 500 * MIB, 10 * MIB);
    assert!(hole.content.iter().all(|(_, piece)| piece.is_err()), "a hole was carried to the client");
    use std::os::unix::fs::MetadataExt;
    let stored = std::fs::metadata(scratch.path("mirror.cache/image/data")).unwrap();
    assert!(stored.blocks() * 512 <= 2 * MIB + 65_536, "holes were stored");
}

#[test]
fn tiers_of_any_depth_bring_each_byte_once() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 8);
    let mut tiers = vec![server];
    for depth in 1..=4 {
        let upstream = tiers.last().unwrap().uri().to_owned();
        tiers.push(Daemon::mirror_named(&scratch, &format!("tier{depth}"), &upstream, &[]));
    }
    let top = tiers.last().unwrap().uri().to_owned();
    assert!(Client::open(&top).read(77, 8 * MIB - 77) == bytes[77..]);
    assert_eq!(info(&top)["mirror"]["tiers"], 4);
    for tier in tiers.into_iter().rev() {
        let log = tier.stop();
        assert!(log.sum("client left", "read_bytes") <= 8 * MIB);
    }
}

#[test]
fn a_mirror_of_itself_is_refused() {
    let scratch = Scratch::new();
    let mut command = headwater(&scratch.path("log"));
    let port = crate::support::peers::free_port();
    command.args(["mirror", &format!("x=nbd://localhost:{port}/x"), "--listen", &format!(":{port}")]);
    command.arg("--cache").arg(scratch.path("cache")).stderr(std::process::Stdio::piped());
    let complaint = run_failing(&mut command);
    assert!(complaint.contains("is this very server") && complaint.contains("cannot feed from itself"), "{complaint}");
}

#[test]
fn a_loop_over_another_mirror_is_refused() {
    let scratch = Scratch::new();
    let (server, _) = origin(&scratch, 1);
    let first = Daemon::mirror_named(&scratch, "a", server.uri(), &[]);
    Client::open(first.uri()).read(0, 1000);
    let second = Daemon::mirror_named(&scratch, "b", first.uri(), &[]);
    Client::open(second.uri()).read(0, 1000);
    first.stop();
    // The first one's cache, started again with the second as its upstream.
    let mut command = headwater(&scratch.path("log"));
    command.args(["mirror", second.uri(), "--cache"]).arg(scratch.path("a.cache"));
    command.arg("--unix").arg(scratch.path("c.sock")).stderr(std::process::Stdio::piped());
    let complaint = run_failing(&mut command);
    assert!(complaint.contains("from this very mirror: a loop"), "{complaint}");
}

#[test]
fn a_cache_that_cannot_be_used_is_refused_with_its_reason() {
    let scratch = Scratch::new();
    let (server, _) = origin(&scratch, 1);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    let attempt = |upstream: &str, arguments: &[&str]| {
        let mut command = headwater(&scratch.path("log"));
        command.args(["mirror", upstream, "--cache"]).arg(scratch.path("mirror.cache")).args(arguments);
        command.arg("--unix").arg(scratch.path("t.sock")).stderr(std::process::Stdio::piped());
        run_failing(&mut command)
    };
    let complaint = attempt(server.uri(), &[]);
    assert!(complaint.contains("is in use by another process (process "), "{complaint}");
    mirror.stop();
    let complaint = attempt(server.uri(), &["--chunk-size=4K"]);
    assert!(complaint.contains("was made with chunks of 64K, not 4K"), "{complaint}");
    server.stop();
    let other = Daemon::serve(&scratch, &scratch.file("image.raw", &noise(2 << 20, 9)), &["--read-only"]);
    let complaint = attempt(other.uri(), &[]);
    assert!(complaint.contains("holds another image, of 1048576 bytes (1M)"), "{complaint}");
    assert!(complaint.contains("give this mirror another name"), "{complaint}");
}

#[test]
fn an_upstream_whose_image_was_replaced_is_not_used() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 2);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[ON_DEMAND, "--upstream-timeout=1"]);
    let mut client = Client::open(mirror.uri());
    assert!(client.read(0, MIB) == bytes[..1 << 20]);
    server.stop();
    let _other = Daemon::serve(&scratch, &scratch.file("image.raw", &noise(3 << 20, 8)), &["--read-only"]);
    assert_eq!(client.ask(command::READ, MIB, 10).error, Some(ErrorKind::Io));
    assert!(client.read(0, MIB) == bytes[..1 << 20]);
    assert!(mirror.log_text().contains("its export has 3145728 bytes, and this image has 2097152"));
}

#[test]
fn a_range_can_be_cached_ahead() {
    let scratch = Scratch::new();
    let (server, bytes) = origin(&scratch, 8);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[ON_DEMAND]);
    let mut client = Client::open(mirror.uri());
    assert_eq!(client.ask(command::CACHE, MIB, 4 * MIB).error, None);
    drop(client);
    eventually("resident chunks", || resident(mirror.uri()) == 4 * MIB);
    let map = || {
        let map = run(Command::new("nbdinfo").args(["--map=x-headwater:residency", mirror.uri()]));
        let fields = |line: &str| line.split_whitespace().take(3).collect::<Vec<_>>().join(" ");
        map.lines().map(fields).collect::<Vec<_>>()
    };
    assert_eq!(map(), ["0 1048576 0", "1048576 4194304 9", "5242880 3145728 0"], "here, and not read yet");
    server.stop();
    assert!(Client::open(mirror.uri()).read(MIB, 4 * MIB) == bytes[1 << 20..5 << 20]);
    assert_eq!(map(), ["0 1048576 0", "1048576 4194304 1", "5242880 3145728 0"], "and read");
}

#[test]
fn every_chunk_size_gives_the_same_bytes() {
    for size in ["4K", "32K", "1M", "4M"] {
        let scratch = Scratch::new();
        let bytes = noise((9 << 20) + 777, 5);
        let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &["--read-only"]);
        let mirror = Daemon::mirror(&scratch, server.uri(), &["--chunk-size", size]);
        let mut client = Client::open(mirror.uri());
        for (start, length) in [(5_000_000, 4097), (bytes.len() - 1, 1), (123, 5_000_000), (0, bytes.len())] {
            assert!(client.read(start as u64, length as u64) == bytes[start..start + length], "{size}");
        }
        drop(client);
        mirror.stop();
        assert_eq!(sent(server), bytes.len() as u64, "{size}");
    }
}

#[test]
fn flags_and_block_sizes_are_those_of_the_real_image() {
    let scratch = Scratch::new();
    let (server, _) = origin(&scratch, 1);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    let (below, here) = (Client::open(server.uri()).agreed, Client::open(mirror.uri()).agreed);
    assert_eq!((below.size, below.flags, below.block_sizes), (here.size, here.flags, here.block_sizes));
}

#[test]
fn an_image_can_be_replaced_again_and_again_and_an_earlier_one_can_come_back() {
    let scratch = Scratch::new();
    let serve = |seed| {
        let bytes = noise(2 << 20, seed);
        let image = scratch.file("image.raw", &bytes);
        run(headwater(&scratch.path("index.log")).arg("index").arg(&image));
        (Daemon::serve(&scratch, &image, &["--read-only"]), bytes)
    };
    let (mut server, bytes) = serve(1);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--upstream-timeout=1"]);
    assert!(Client::open(mirror.uri()).read(0, MIB) == bytes[..1 << 20]);
    for seed in [2, 3, 2] {
        server.stop();
        let bytes;
        (server, bytes) = serve(seed);
        // What is not here yet has to be asked for, and then it is noticed.
        eventually("new image", || {
            let reply = Client::open(mirror.uri()).ask(command::READ, MIB, MIB);
            reply.error.is_none() && reply.bytes() == bytes[1 << 20..]
        });
        assert!(Client::open(mirror.uri()).read(0, MIB) == bytes[..1 << 20]);
    }
}
