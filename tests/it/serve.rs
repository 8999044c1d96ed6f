//! Real images: what clients see of each other, what reaches the disk, what is served.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Command;

use headwater::error::ErrorKind;
use headwater::nbd::wire::{CommandFlags, command};

use crate::support::client::Client;
use crate::support::peers::convert;
use crate::support::{Daemon, Scratch, append, headwater, nbdsh, nbdsh_command, noise, run, run_failing};

const MIB: u64 = 1 << 20;

#[test]
fn all_connections_see_one_view_of_what_was_written() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 16 * MIB, &[]);
    // On one worker and on several.
    for workers in ["--workers=1", "--workers=4"] {
        let server = Daemon::serve(&scratch, &image, &[workers]);
        let mut clients: Vec<_> = (0..8).map(|_| Client::open(server.uri())).collect();
        assert!(clients[0].agreed.flags.contains(headwater::nbd::wire::TransmissionFlags::CAN_MULTI_CONN));
        for round in 0..200u64 {
            let writer = usize::try_from(round % 8).unwrap();
            let (offset, data) = (round * 4099 % (15 * MIB), noise(5000, round));
            assert_eq!(clients[writer].write(offset, &data), None);
            assert_eq!(clients[writer].flush(), None);
            for (reader, client) in clients.iter_mut().enumerate() {
                assert!(client.read(offset, 5000) == data, "{reader} does not see what {writer} wrote");
            }
        }
    }
}

#[test]
fn what_was_flushed_or_written_through_survives_a_kill() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 16 * MIB, &[]);
    let server = Daemon::serve(&scratch, &image, &[]);
    let mut client = Client::open(server.uri());
    let data = noise(1 << 20, 1);
    assert_eq!(client.write(MIB, &data), None);
    assert_eq!(client.flush(), None);
    assert_eq!(client.ask_with(command::WRITE, CommandFlags::FUA, 3 * MIB, MIB, &data).error, None);
    server.kill();
    let bytes = fs::read(&image).unwrap();
    assert!(bytes[1 << 20..2 << 20] == data && bytes[3 << 20..4 << 20] == data);
}

#[test]
fn fua_and_flush_reach_the_disk() {
    // Seen from outside: which system calls, and io_uring operations, a request leads to.
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", MIB, &[]);
    let log = scratch.path("strace");
    let mut program = headwater(&scratch.path("serve.log"));
    program.arg("serve").arg(&image).arg("--unix").arg(scratch.path("s")).arg("--disk-io=threads");
    // In a PID namespace that ends with its first process: a tracer that is killed leaves its program behind.
    let mut traced = Command::new("unshare");
    traced.args(["--pid", "--fork", "--kill-child", "strace"]);
    traced.args(["-f", "-e", "trace=pwritev2,fdatasync,fallocate", "-o"]).arg(&log);
    append(&mut traced, &program).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::null());
    let server = Daemon::start(traced, 1, &scratch.path("serve.log"));
    let mut client = Client::open(server.uri());
    let calls = |name: &str| fs::read_to_string(&log).unwrap().matches(name).count();
    assert_eq!(client.write(0, b"plain"), None);
    assert_eq!(calls("fdatasync("), 0);
    assert_eq!(client.ask_with(command::WRITE, CommandFlags::FUA, 0, 3, b"fua").error, None);
    assert_eq!(calls("fdatasync("), 1, "it was answered before it was durable");
    let order = fs::read_to_string(&log).unwrap();
    assert!(order.rfind("pwritev2(") < order.find("fdatasync("), "the bytes came after the flush: {order}");
    assert_eq!(client.flush(), None);
    assert_eq!(calls("fdatasync("), 2);
    for number in [command::TRIM, command::WRITE_ZEROES] {
        let synced = calls("fdatasync(");
        assert_eq!(client.ask_with(number, CommandFlags::FUA, 0, 65_536, &[]).error, None);
        assert_eq!(calls("fdatasync("), synced + 1);
    }
    assert!(calls("FALLOC_FL_PUNCH_HOLE") > 0);
}

#[test]
fn trim_and_zeroes_do_what_they_say_to_the_file() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(8 << 20, 2));
    let blocks = || fs::metadata(&image).unwrap().blocks() * 512;
    let server = Daemon::serve(&scratch, &image, &[]);
    let mut client = Client::open(server.uri());
    let full = blocks();
    assert_eq!(client.ask(command::TRIM, 0, 2 * MIB).error, None);
    assert!(blocks() <= full - 2 * MIB + 65_536, "trim gave nothing back");
    assert_eq!(client.ask(command::WRITE_ZEROES, 2 * MIB, 2 * MIB).error, None);
    assert!(blocks() <= full - 4 * MIB + 65_536, "zeroes gave nothing back");
    let before = blocks();
    let no_hole = CommandFlags::NO_HOLE;
    assert_eq!(client.ask_with(command::WRITE_ZEROES, no_hole, 4 * MIB, 2 * MIB, &[]).error, None);
    assert_eq!(blocks(), before, "NO_HOLE changed the allocation");
    let fast = CommandFlags::FAST_ZERO;
    assert_eq!(client.ask_with(command::WRITE_ZEROES, fast, 6 * MIB, 100, &[]).error, None);
    assert_eq!(client.flush(), None);
    let bytes = fs::read(&image).unwrap();
    assert!(bytes[..6 << 20].iter().all(|byte| *byte == 0));
    assert!(bytes[(6 << 20) + 100..] == noise(8 << 20, 2)[(6 << 20) + 100..]);
}

#[test]
fn several_images_are_served_by_their_names() {
    let scratch = Scratch::new();
    let (first, second) = (scratch.file("one.raw", &noise(5000, 1)), scratch.file("two.img", &noise(6000, 2)));
    let (log, socket) = (scratch.path("log"), scratch.path("s"));
    let mut command = headwater(&log);
    command.arg("serve").arg(&first).arg(format!("named/two={}", second.display())).arg("--unix").arg(&socket);
    let server = Daemon::start(command, 2, &log);
    let [one, two] = [&server.uris()[1], &server.uris()[0]];
    assert!(one.starts_with("nbd+unix:///one?socket=") && two.starts_with("nbd+unix:///named/two?socket="));
    assert!(Client::open(one).read(0, 5000) == noise(5000, 1));
    assert!(Client::open(two).read(0, 6000) == noise(6000, 2));
    let default = format!("nbd+unix:///?socket={}", socket.display());
    assert!(Client::try_open(&default, &[]).is_err(), "there is no only export");
    let list = run(Command::new("nbdinfo").args(["--list", "--json", &default]));
    assert!(list.contains("\"one\"") && list.contains("\"named/two\""), "{list}");
}

#[test]
fn two_images_with_one_name_are_refused() {
    let scratch = Scratch::new();
    let image = scratch.file("same.raw", b"x");
    let mut command = headwater(&scratch.path("log"));
    command.arg("serve").arg(&image).arg(&image).arg("--unix").arg(scratch.path("s"));
    command.stderr(std::process::Stdio::piped());
    let complaint = run_failing(&mut command);
    assert!(complaint.contains("two exports are called \"same\""), "{complaint}");
}

#[test]
fn an_image_that_cannot_be_written_is_refused_with_advice() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &[0; 4096]);
    // Root may write to anything, so the file system has to refuse.
    run(Command::new("chattr").arg("+i").arg(&image));
    let mut command = headwater(&scratch.path("log"));
    command.arg("serve").arg(&image).arg("--unix").arg(scratch.path("s")).stderr(std::process::Stdio::piped());
    let complaint = run_failing(&mut command);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    assert_eq!(Client::open(server.uri()).read(0, 4096), [0; 4096]);
    run(Command::new("chattr").arg("-i").arg(&image));
    assert!(complaint.contains("serve it with --read-only"), "{complaint}");
}

/// A loop device, detached when it is dropped.
pub(crate) struct LoopDevice(pub(crate) String);

impl LoopDevice {
    pub(crate) fn on(image: &std::path::Path) -> Self {
        Self(run(Command::new("losetup").args(["--find", "--show"]).arg(image)).trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run(Command::new("losetup").args(["--detach", &self.0]));
    }
}

#[test]
fn block_devices_are_served() {
    let scratch = Scratch::new();
    let bytes = noise(8 << 20, 3);
    let image = scratch.file("image.raw", &bytes);
    let device = LoopDevice::on(&image);
    let server = Daemon::serve(&scratch, std::path::Path::new(&device.0), &[]);
    let mut client = Client::open(server.uri());
    assert_eq!(client.agreed.size, 8 * MIB);
    assert!(client.read(12_345, 100_000) == bytes[12_345..112_345]);
    assert_eq!(client.write(777, b"odd"), None);
    for (offset, length) in [(MIB, MIB), (2 * MIB + 7, 10_000), (3 * MIB + 1, 100)] {
        assert_eq!(client.ask(command::WRITE_ZEROES, offset, length).error, None);
        let no_hole = CommandFlags::NO_HOLE;
        assert_eq!(client.ask_with(command::WRITE_ZEROES, no_hole, offset + 4 * MIB, length, &[]).error, None);
        let zeroes = vec![0; usize::try_from(length).unwrap()];
        assert!(client.read(offset, length) == zeroes && client.read(offset + 4 * MIB, length) == zeroes);
    }
    assert_eq!(client.ask(command::TRIM, 7 * MIB + 9, 500_000).error, None);
    assert_eq!(client.flush(), None);
    drop(client);
    server.stop();
    let mut expected = bytes;
    expected[777..780].copy_from_slice(b"odd");
    let after = fs::read(&image).unwrap();
    assert!(after[..1 << 20] == expected[..1 << 20]);
}

#[test]
fn qcow2_files_are_served_as_their_contents() {
    let scratch = Scratch::new();
    let data = noise(3 << 20, 4);
    let text = b"compressible ".repeat(100_000);
    let raw = scratch.sparse("image.raw", 300 * MIB + 512, &[(5 * MIB + 4096, &data), (290 * MIB, &text)]);
    let variants = [
        convert(&scratch, &raw, "plain.qcow2", &["-O", "qcow2"]),
        convert(&scratch, &raw, "compressed.qcow2", &["-O", "qcow2", "-c"]),
        convert(&scratch, &raw, "old.qcow2", &["-O", "qcow2", "-o", "compat=0.10"]),
        convert(&scratch, &raw, "clusters.qcow2", &["-O", "qcow2", "-o", "cluster_size=2M"]),
    ];
    for image in &variants {
        let server = Daemon::serve(&scratch, image, &[]);
        run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&raw).arg(server.uri()));
        let mut client = Client::open(server.uri());
        assert!(client.read(5 * MIB + 4000, 200_000)[96..] == data[..199_904]);
        assert!(client.read(290 * MIB + 13, 1000) == text[13..1013]);
        let hole = client.ask(command::READ, 100 * MIB, MIB);
        assert!(hole.content.iter().all(|(_, piece)| piece.is_err()), "a hole was carried");
        assert_eq!(client.write(0, b"x"), Some(ErrorKind::Permission));
        let map = run(Command::new("nbdinfo").args(["--map", "--totals", server.uri()]));
        assert!(map.contains("hole,zero"), "{map}");
    }
}

#[test]
fn qcow2_that_cannot_be_served_is_refused_with_advice() {
    let scratch = Scratch::new();
    let raw = scratch.file("base.raw", &noise(1 << 20, 5));
    let overlay = scratch.path("overlay.qcow2");
    let base = raw.to_str().unwrap();
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", base]).arg(&overlay));
    run(Command::new("qemu-io").args(["-c", "write -P 7 65536 4096"]).arg(&overlay));
    let attempt = |image: &std::path::Path| {
        let mut command = headwater(&scratch.path("log"));
        command.arg("serve").arg(image).arg("--unix").arg(scratch.path("s")).stderr(std::process::Stdio::piped());
        run_failing(&mut command)
    };
    let complaint = attempt(&overlay);
    assert!(complaint.contains("base.raw: allow that with --format qcow2 --backing DIRECTORY"), "{complaint}");
    let directory = raw.parent().unwrap().to_str().unwrap().to_owned();
    let server = Daemon::serve(&scratch, &overlay, &["--format=qcow2", "--backing", &directory]);
    let mut client = Client::open(server.uri());
    assert!(client.read(0, 65_536) == noise(1 << 20, 5)[..65_536]);
    assert_eq!(client.read(65_536, 4096), [7; 4096]);
    let sound = fs::read(convert(&scratch, &raw, "sound.qcow2", &["-O", "qcow2"])).unwrap();
    for (at, bytes, reason) in [
        (32, &[0u8, 0, 0, 1][..], "the image is encrypted"),
        (24, &[0x40, 0, 0, 0, 0, 0, 0, 0], "the size of the image and of its first table do not go together"),
        (40, &[0, 0, 0, 1, 0, 0, 0, 0], "the file is truncated"),
    ] {
        let mut lie = sound.clone();
        lie[at..at + bytes.len()].copy_from_slice(bytes);
        let complaint = attempt(&scratch.file("lie.qcow2", &lie));
        assert!(complaint.contains(reason), "{complaint}");
    }
    let cut = scratch.file("cut.qcow2", &sound[..sound.len() - (512 << 10)]);
    let fresh = Scratch::new();
    let server = Daemon::serve(&fresh, &cut, &[]);
    let mut client = Client::open(server.uri());
    assert_eq!(client.ask(command::READ, 1000 << 10, 4096).error, Some(ErrorKind::Io), "not zeroes");
    drop(server);
    let zstd = convert(&scratch, &raw, "zstd.qcow2", &["-O", "qcow2", "-c", "-o", "compression_type=zstd"]);
    let complaint = attempt(&zstd);
    assert!(complaint.contains("convert it (qemu-img convert -O raw)"), "{complaint}");
}

#[test]
fn integrity_holds_under_a_random_load_of_several_clients() {
    // What nbd's integrity test does: many requests in flight, every block's last writer known.
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 50 * MIB, &[]);
    let server = Daemon::serve(&scratch, &image, &[]);
    let uri = server.uri().to_owned();
    std::thread::scope(|scope| {
        for part in 0..4u64 {
            let uri = &uri;
            scope.spawn(move || {
                let open = [Client::open, Client::open_structured, Client::open_simple, Client::open];
                let mut client = open[usize::try_from(part).unwrap()](uri);
                integrity(&mut client, part * 12 * MIB, part + 1);
            });
        }
    });
    server.stop();
}

/// Random writes, reads and flushes in 12 MiB from `base`, up to 16 in flight, none of them overlapping.
fn integrity(client: &mut Client, base: u64, seed: u64) {
    const BLOCK: u64 = 4096;
    let mut random = headwater::export::conformance::Random::new(seed);
    let mut blocks = vec![0u64; 3000];
    for batch in 0..150 {
        let mut expected = std::collections::HashMap::new();
        let mut touched = std::collections::HashSet::new();
        for cookie in 0..16u64 {
            let first = random.below(2990);
            let count = 1 + random.below(8);
            let range = first..first + count;
            if range.clone().any(|block| !touched.insert(block)) {
                continue;
            }
            let (offset, length) = (base + first * BLOCK, count * BLOCK);
            let indices = || range.clone().map(|block| usize::try_from(block).unwrap());
            if random.below(2) == 0 {
                let stamp = seed << 32 | batch << 8 | cookie;
                indices().for_each(|block| blocks[block] = stamp);
                let data: Vec<u8> = range.clone().flat_map(|block| noise(4096, stamp ^ block << 40)).collect();
                let flags = if cookie == 3 { CommandFlags::FUA } else { CommandFlags::empty() };
                client.send(command::WRITE, flags, cookie, offset, length, &data);
                expected.insert(cookie, None);
            } else {
                let block_bytes = |block: usize| match blocks[block] {
                    0 => vec![0; 4096],
                    stamp => noise(4096, stamp ^ (block as u64) << 40),
                };
                expected.insert(cookie, Some(indices().flat_map(block_bytes).collect::<Vec<u8>>()));
                client.send(command::READ, CommandFlags::empty(), cookie, offset, length, &[]);
            }
        }
        while !expected.is_empty() {
            let reply = client.receive();
            let wanted = expected.remove(&reply.cookie).expect("a reply to a request that is in flight");
            assert_eq!(reply.error, None);
            if let Some(bytes) = wanted {
                assert!(reply.bytes() == bytes, "batch {batch}");
            }
        }
        if batch % 10 == 0 {
            assert_eq!(client.flush(), None);
        }
    }
}

#[test]
fn reads_larger_than_a_mebibyte_at_odd_offsets_work_as_in_nbds_oversized_test() {
    let scratch = Scratch::new();
    let bytes = noise(4 << 20, 6);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &[]);
    let mut client = Client::open_without(
        server.uri(),
        &[
            headwater::nbd::wire::option::EXTENDED_HEADERS,
            headwater::nbd::wire::option::STRUCTURED_REPLY,
            headwater::nbd::wire::option::GO,
        ],
    );
    for (offset, length) in [(0, 1 << 20), (1, (1 << 20) + 14), (2, (2 << 20) + 28)] {
        assert!(
            client.read(offset, length)
                == bytes[usize::try_from(offset).unwrap()..][..usize::try_from(length).unwrap()]
        );
    }
}

#[test]
fn libnbds_shell_writes_and_reads_in_parallel() {
    // What libnbd's aio-parallel does: many commands in flight, data checked, on one connection.
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 32 * MIB, &[]);
    let server = Daemon::serve(&scratch, &image, &[]);
    let script = r#"
import random
random.seed(1)
shadow = bytearray(32 << 20)
for round in range(40):
    busy, reads, cookies = [], [], []
    for i in range(32):
        n = random.choice([1, 512, 4096, 65536, 300000])
        o = random.randrange(0, (32 << 20) - n)
        if any(o < e and s < o + n for s, e in busy): continue
        busy.append((o, o + n))
        if random.random() < 0.5:
            data = random.randbytes(n)
            shadow[o:o + n] = data
            buf = nbd.Buffer.from_bytearray(bytearray(data))
            cookies.append(h.aio_pwrite(buf, o))
            reads.append((buf, None, o, n))
        else:
            buf = nbd.Buffer(n)
            cookies.append(h.aio_pread(buf, o))
            reads.append((buf, bytes(shadow[o:o + n]), o, n))
    for cookie in cookies:
        while not h.aio_command_completed(cookie): h.poll(-1)
    for buf, want, o, n in reads:
        assert want is None or bytes(buf.to_bytearray()) == want, (o, n)
h.flush()
print("right")
"#;
    assert_eq!(nbdsh(server.uri(), script).trim(), "right");
}

#[test]
fn sockets_of_the_service_manager_are_used() {
    // libnbd starts the program with LISTEN_FDS, as systemd would.
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 7));
    let program = env!("CARGO_BIN_EXE_headwater");
    let script = format!(
        "h.connect_systemd_socket_activation(['{program}', 'serve', '{}'])\n\
         assert h.get_size() == 1 << 20\nprint(h.pread(512, 5).hex())\nh.shutdown()",
        image.display()
    );
    let printed = run(nbdsh_command().args(["-c", &script]));
    let expected: String = noise(1 << 20, 7)[5..517].iter().map(|byte| format!("{byte:02x}")).collect();
    // The program prints its URI to the same place.
    assert!(printed.contains(&expected), "{printed}");
}
