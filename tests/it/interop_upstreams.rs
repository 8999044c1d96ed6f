//! The servers that people have, as upstreams of a mirror.

use std::io::{Read, Seek, SeekFrom};
use std::process::Command;

use crate::support::client::Client;
use crate::support::peers::Peer;
use crate::support::{Daemon, Scratch, noise, run};

const MIB: u64 = 1 << 20;

/// Copies everything through a mirror of `upstream`, twice, and compares. The second time without the upstream.
fn mirror_whole(upstream: Peer, image: &std::path::Path) {
    let scratch = Scratch::new();
    let mirror = Daemon::mirror(&scratch, &format!("m={}", upstream.uri()), &[]);
    let copy = scratch.path("copy.raw");
    run(Command::new("nbdcopy").arg(mirror.uri()).arg(&copy));
    run(Command::new("cmp").arg(image).arg(&copy));
    let log = mirror.stop();
    assert_eq!(log.sum("client left", "errors"), 0);
    let uri = upstream.uri().to_owned();
    drop(upstream);
    let mirror = Daemon::mirror(&scratch, &format!("m={uri}"), &["--upstream-timeout=0.3"]);
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(image).arg(mirror.uri()));
}

fn image(scratch: &Scratch) -> std::path::PathBuf {
    scratch.sparse("image.raw", 96 * MIB + 512, &[(3 * MIB + 8192, &noise(20 << 20, 1)), (90 * MIB, &noise(70_000, 2))])
}

#[test]
fn nbdkit_is_an_upstream() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    mirror_whole(Peer::nbdkit(&scratch, &["-r", "file", image.to_str().unwrap()]), &image);
}

#[test]
fn qemu_nbd_is_an_upstream() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    mirror_whole(Peer::qemu_nbd(&scratch, &image, &["--read-only", "--format=raw", "--shared=8"]), &image);
}

#[test]
fn qemu_nbd_that_allows_one_client_is_an_upstream() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    mirror_whole(Peer::qemu_nbd(&scratch, &image, &["--read-only", "--format=raw"]), &image);
}

#[test]
fn nbd_server_is_an_upstream() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    mirror_whole(Peer::nbd_server(&scratch, &image), &image);
}

#[test]
fn nbdkit_without_newer_features_is_an_upstream() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let file = image.to_str().unwrap();
    for arguments in [
        &["-r", "--no-sr", "file", file][..],
        &["-r", "--mask-handshake=0", "file", file],
        &[
            "-r",
            "--filter=noextents",
            "--filter=blocksize-policy",
            "file",
            file,
            "blocksize-minimum=512",
            "blocksize-maximum=64K",
            "blocksize-error-policy=error",
        ],
        &["-r", "--filter=noparallel", "file", file],
    ] {
        mirror_whole(Peer::nbdkit(&scratch, arguments), &image);
    }
}

#[test]
fn a_qcow2_disk_behind_qemu_nbd_is_an_upstream() {
    let scratch = Scratch::new();
    let image = image(&scratch);
    let zstd = crate::support::peers::convert(
        &scratch,
        &image,
        "z.qcow2",
        &["-O", "qcow2", "-c", "-o", "compression_type=zstd"],
    );
    mirror_whole(Peer::qemu_nbd(&scratch, &zstd, &["--read-only", "--format=qcow2"]), &image);
}

#[test]
fn the_primitive_crate_is_an_upstream() {
    // No GO, no structured replies, one connection, one request at a time, no bounds checks.
    struct Image(std::fs::File);
    impl Read for Image {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(buffer)
        }
    }
    impl Seek for Image {
        fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
            self.0.seek(to)
        }
    }
    impl std::io::Write for Image {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::PermissionDenied.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let scratch = Scratch::new();
    let bytes = noise(8 << 20, 3);
    let path = scratch.file("image.raw", &bytes);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::Builder::new()
        .spawn(move || {
            for socket in listener.incoming() {
                let path = path.clone();
                let mut socket = socket.unwrap();
                let serve = move || {
                    let size = std::fs::metadata(&path).unwrap().len();
                    let export = nbd::Export::<()> { size, readonly: true, ..nbd::Export::default() };
                    if nbd::server::handshake(&mut socket, |_| Ok(export)).is_ok() {
                        // It ends with an error when the client leaves.
                        let _ = nbd::server::transmission(&mut socket, Image(std::fs::File::open(path).unwrap()));
                    }
                };
                std::thread::Builder::new().spawn(serve).unwrap();
            }
        })
        .unwrap();
    let mirror = Daemon::mirror(&scratch, &format!("m=nbd://127.0.0.1:{port}/rustnbd"), &[]);
    let mut client = Client::open(mirror.uri());
    assert!(client.read(12_345, 6 * MIB) == bytes[12_345..12_345 + (6 << 20)]);
    assert!(client.read(0, 8 * MIB) == bytes);
}

#[test]
fn an_upstream_that_errs_is_asked_again() {
    let scratch = Scratch::new();
    let bytes = noise(16 << 20, 4);
    let image = scratch.file("image.raw", &bytes);
    let peer = Peer::nbdkit(
        &scratch,
        &["-r", "--filter=error", "file", image.to_str().unwrap(), "error-pread=EIO", "error-pread-rate=10%"],
    );
    let mirror = Daemon::mirror(&scratch, &format!("m={}", peer.uri()), &[]);
    let mut client = Client::open(mirror.uri());
    // One error in ten: four in a row for the same chunk happen once in ten thousand, and then the read fails.
    let mut failed = 0;
    for start in (0..16 * MIB).step_by(65_536) {
        let reply = client.ask(headwater::nbd::wire::command::READ, start, 65_536);
        match reply.error {
            None => assert!(reply.bytes() == bytes[usize::try_from(start).unwrap()..][..65_536]),
            Some(_) => failed += 1,
        }
    }
    assert!(failed <= 2, "{failed} of 256 reads failed");
}

#[test]
fn an_upstream_that_always_errs_gives_errors_and_not_zeroes() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 5));
    let arguments =
        ["-r", "--filter=error", "file", image.to_str().unwrap(), "error-pread=EPERM", "error-pread-rate=1"];
    let peer = Peer::nbdkit(&scratch, &arguments);
    let mirror = Daemon::mirror(&scratch, &format!("m={}", peer.uri()), &[]);
    let mut client = Client::open(mirror.uri());
    for _ in 0..2 {
        let reply = client.ask(headwater::nbd::wire::command::READ, 5, 100);
        assert_eq!(reply.error, Some(headwater::error::ErrorKind::Io));
    }
}

#[test]
fn a_slow_upstream_is_asked_for_many_things_at_once() {
    let scratch = Scratch::new();
    let bytes = noise(16 << 20, 6);
    let image = scratch.file("image.raw", &bytes);
    let arguments = ["-r", "-t", "64", "--filter=delay", "file", image.to_str().unwrap(), "rdelay=200ms"];
    let peer = Peer::nbdkit(&scratch, &arguments);
    let mirror = Daemon::mirror(&scratch, &format!("m={}", peer.uri()), &[]);
    let mut client = Client::open(mirror.uri());
    // 50 chunks that are not neighbours: one after the other they would take ten seconds.
    let began = std::time::Instant::now();
    for cookie in 0..50 {
        let flags = headwater::nbd::wire::CommandFlags::empty();
        client.send(headwater::nbd::wire::command::READ, flags, cookie, cookie * 262_144, 4096, &[]);
    }
    for _ in 0..50 {
        let reply = client.receive();
        let at = usize::try_from(reply.cookie * 262_144).unwrap();
        assert!(reply.bytes() == bytes[at..at + 4096]);
    }
    assert!(began.elapsed() < std::time::Duration::from_secs(5), "the requests waited for each other");
}
