//! Disks that are full or broken, kernels that refuse.

use std::io::Read;
use std::process::{Command, Stdio};

use headwater::error::ErrorKind;
use headwater::nbd::wire::{CommandFlags, command};

use crate::support::client::Client;
use crate::support::{Daemon, Scratch, append, headwater, noise};

const MIB: u64 = 1 << 20;

/// The program in a mount namespace of its own, where `directory` is a file system of `mebibytes`. It goes away with
/// the program.
fn on_small_disk(program: &Command, directory: &std::path::Path, mebibytes: u32, prepare: &str) -> Command {
    std::fs::create_dir_all(directory).unwrap();
    let script = format!("mount -t tmpfs -o size={mebibytes}m none \"$0\" && {prepare} && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation=private", "sh", "-c", &script]).arg(directory);
    append(&mut command, program).stdout(Stdio::piped()).stderr(Stdio::null());
    command
}

#[test]
fn a_full_disk_is_told_to_the_writer_and_the_rest_goes_on() {
    let scratch = Scratch::new();
    let (log, disk) = (scratch.path("log"), scratch.path("disk"));
    let mut program = headwater(&log);
    program.arg("serve").arg(disk.join("image.raw")).arg("--unix").arg(scratch.path("s"));
    let command = on_small_disk(&program, &disk, 4, "truncate -s 64M \"$0/image.raw\"");
    let server = Daemon::start(command, 1, &log);
    let mut client = Client::open(server.uri());
    let data = noise(1 << 20, 1);
    let results: Vec<_> = (0..6).map(|at| client.write(at * MIB, &data)).collect();
    assert!(results[..3].iter().all(Option::is_none), "{results:?}");
    assert_eq!(results[5], Some(ErrorKind::NoSpace));
    let zeroes = client.ask_with(command::WRITE_ZEROES, CommandFlags::NO_HOLE, 32 * MIB, 16 * MIB, &[]);
    assert_eq!(zeroes.error, Some(ErrorKind::NoSpace));
    assert!(client.read(0, 3 * MIB)[..1 << 20] == data);
    // Room is made by the client itself.
    assert_eq!(client.ask(command::TRIM, 0, 64 * MIB).error, None);
    assert_eq!(client.write(10 * MIB, &data), None);
    assert!(client.read(10 * MIB, MIB) == data);
}

#[test]
fn a_full_cache_disk_never_fails_a_read() {
    let scratch = Scratch::new();
    let bytes = noise(24 << 20, 2);
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &bytes), &["--read-only"]);
    let (log, disk) = (scratch.path("mirror.log"), scratch.path("disk"));
    let mut program = headwater(&log);
    program.args(["mirror", server.uri(), "--cache"]).arg(&disk).arg("--unix").arg(scratch.path("m.sock"));
    let mirror = Daemon::start(on_small_disk(&program, &disk, 8, "true"), 1, &log);
    let mut client = Client::open(mirror.uri());
    for _ in 0..3 {
        for start in (0..24 * MIB).step_by(1 << 20) {
            let at = usize::try_from(start).unwrap();
            assert!(client.read(start, MIB) == bytes[at..at + (1 << 20)]);
        }
    }
    assert_eq!(client.ask(command::CACHE, 0, 24 * MIB).error, None);
    drop(client);
}

/// Runs a program that finds io_uring forbidden, as in many containers: a filter answers its system call with EPERM.
const WITHOUT_IO_URING: &str = r#"
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
instructions = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7fff0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in instructions))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
program = Program(len(instructions), ctypes.addressof(code))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(program)) == 0, os.strerror(ctypes.get_errno())
os.execv(sys.argv[1], sys.argv[1:])
"#;

fn without_io_uring(program: &Command) -> Command {
    let mut command = Command::new("python3");
    command.args(["-c", WITHOUT_IO_URING]);
    append(&mut command, program).stdout(Stdio::piped());
    command
}

#[test]
fn where_io_uring_is_forbidden_threads_take_over_with_one_warning() {
    let scratch = Scratch::new();
    let bytes = noise(8 << 20, 3);
    let image = scratch.file("image.raw", &bytes);
    let log = scratch.path("log");
    let mut program = headwater(&log);
    program.arg("serve").arg(&image).arg("--unix").arg(scratch.path("s")).arg("--workers=4");
    let mut command = without_io_uring(&program);
    command.stderr(std::fs::File::create(&log).unwrap());
    let server = Daemon::start(command, 1, &log);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--disk-io=threads"]);
    let mut writer = Client::open(server.uri());
    assert_eq!(writer.ask_with(command::WRITE, CommandFlags::FUA, 5, 5, b"hello").error, None);
    assert_eq!(writer.ask(command::TRIM, MIB, MIB).error, None);
    let mut expected = bytes;
    expected[5..10].copy_from_slice(b"hello");
    expected[1 << 20..2 << 20].fill(0);
    assert!(Client::open(mirror.uri()).read(0, 8 * MIB) == expected);
    assert_eq!(server.log_text().matches("io_uring is refused here").count(), 1);

    let mut program = headwater(&scratch.path("log2"));
    program.arg("serve").arg(&image).arg("--unix").arg(scratch.path("s2")).arg("--disk-io=uring");
    let complaint = crate::support::run_failing(&mut without_io_uring(&program));
    assert!(complaint.contains("cannot start the workers"), "{complaint}");
}

/// The header of a simple reply to the request with cookie 1.
const LONG_REPLY: &[u8] = b"\x67\x44\x66\x98\0\0\0\0\0\0\0\0\0\0\0\x01";

#[test]
fn a_disk_that_fails_gives_errors_and_never_zeroes() {
    // A device-mapper target would need a module; a file that loses its end does as well.
    let scratch = Scratch::new();
    let bytes = noise(4 << 20, 4);
    let image = scratch.file("image.raw", &bytes);
    let server = Daemon::serve(&scratch, &image, &[]);
    for mut client in [Client::open(server.uri()), Client::open_simple(server.uri())] {
        std::fs::write(&image, &bytes).unwrap();
        assert!(client.read(0, 4 * MIB) == bytes);
        std::fs::File::options().write(true).open(&image).unwrap().set_len(2 * MIB).unwrap();
        assert_eq!(client.ask(command::READ, 3 * MIB, 100).error, Some(ErrorKind::Io));
        assert_eq!(client.ask(command::READ, 2 * MIB - 10, 20).error, Some(ErrorKind::Io));
        assert!(client.read(0, 2 * MIB) == bytes[..2 << 20], "the connection lives");
    }
    // A long simple reply that fails in the middle cannot say so: the connection ends.
    std::fs::write(&image, &bytes).unwrap();
    let mut client = Client::open_simple(server.uri());
    std::fs::File::options().write(true).open(&image).unwrap().set_len(3 * MIB).unwrap();
    client.send(command::READ, CommandFlags::empty(), 1, 0, 4 * MIB, &[]);
    // What else is asked meanwhile must not be taken for the rest of it.
    for cookie in 2..50 {
        client.send(command::READ, CommandFlags::empty(), cookie, 0, 4096, &[]);
    }
    let mut received = Vec::new();
    if let Err(error) = client.socket.read_to_end(&mut received) {
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    let long = received.windows(16).position(|window| window == LONG_REPLY).expect("the long reply has begun") + 16;
    assert!(received.len() - long <= 3 << 20, "four mebibytes of a file that has three");
    assert!(received[long..] == bytes[..received.len() - long]);
    // A stretch that nobody has read before is no hole when it is gone.
    let sparse = scratch.sparse("sparse.raw", 4 * MIB, &[(0, &bytes[..4096])]);
    let fresh = Scratch::new();
    let other = Daemon::serve(&fresh, &sparse, &[]);
    std::fs::File::options().write(true).open(&sparse).unwrap().set_len(MIB).unwrap();
    let mut late = Client::open(other.uri());
    assert_eq!(late.ask(command::READ, 2 * MIB, 4096).error, Some(ErrorKind::Io));
    assert_eq!(late.ask(command::READ, MIB - 4096, 8192).error, Some(ErrorKind::Io));
    assert_eq!(late.ask(command::BLOCK_STATUS, 2 * MIB, 4096).error, Some(ErrorKind::Io));
    assert!(late.read(0, 8192) == [&bytes[..4096], &[0; 4096][..]].concat());
    // With DF the frame is completed and called an error.
    let mut client = Client::open(server.uri());
    let reply = client.ask_with(command::READ, CommandFlags::DF, 0, 4 * MIB, &[]);
    assert_eq!(reply.error, Some(ErrorKind::Io));
    assert!(client.read(0, 1000) == bytes[..1000]);
}
