//! The clients that people use, against `serve` and against a mirror.

use std::path::Path;
use std::process::Command;

use crate::support::peers::Peer;
use crate::support::{Daemon, Scratch, nbdsh, noise, run};

const MIB: u64 = 1 << 20;

fn qemu_io(uri: &str, commands: &[&str]) -> String {
    let mut program = Command::new("qemu-io");
    program.args(["-f", "raw"]);
    for command in commands {
        program.args(["-c", command]);
    }
    run(program.arg(uri))
}

fn compare(left: &Path, right: &str) {
    run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(left).arg(right));
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 3 * MIB, &[(MIB, &noise(4096, 1))]);
    let server = Daemon::serve(&scratch, &image, &[]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    for (uri, writable) in [(server.uri(), true), (mirror.uri(), false)] {
        let json: serde_json::Value =
            serde_json::from_str(&run(Command::new("nbdinfo").args(["--json", uri]))).unwrap();
        let export = &json["exports"][0];
        assert_eq!(json["protocol"], "newstyle-fixed");
        assert_eq!(json["structured"], true);
        assert_eq!(export["export-size"], 3 * MIB);
        assert_eq!(export["is_read_only"], !writable);
        for (feature, offered) in [
            ("can_flush", true),
            ("can_fua", true),
            ("can_df", true),
            ("can_multi_conn", true),
            ("can_cache", true),
            ("can_trim", writable),
            ("can_zero", writable),
            ("can_fast_zero", writable),
        ] {
            assert_eq!(export[feature], offered, "{feature} of {uri}");
        }
        assert_eq!(export["block_size_minimum"], 1);
        assert_eq!(export["block_size_maximum"], 32 * MIB);
        let is_there = |name: &str| export["contexts"].as_array().unwrap().iter().any(|context| context == name);
        assert!(is_there("base:allocation"));
        assert_eq!(is_there("x-headwater:residency"), !writable);
        let map = run(Command::new("nbdinfo").args(["--map", uri]));
        assert_eq!(map.lines().filter(|line| line.contains("hole,zero")).count(), 2, "{map}");
        // Facts for other servers are not for strangers.
        assert!(!export.to_string().contains("x-headwater:path"));
    }
}

#[test]
fn nbdcopy_copies_in_both_directions() {
    let scratch = Scratch::new();
    let bytes = noise(20 << 20, 2);
    let source = scratch.sparse("source.raw", 64 * MIB, &[(7 * MIB, &bytes)]);
    let target = scratch.sparse("target.raw", 64 * MIB, &[]);
    let server = Daemon::serve(&scratch, &source, &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    let writable = Scratch::new();
    let receiver = Daemon::serve(&writable, &target, &[]);
    run(Command::new("nbdcopy").args(["--connections=4", "--requests=64", mirror.uri(), receiver.uri()]));
    run(Command::new("nbdcopy").args(["--flush", "--allocated"]).arg(&source).arg(receiver.uri()));
    run(Command::new("cmp").arg(&source).arg(&target));
    let back = scratch.path("back.raw");
    run(Command::new("nbdcopy").arg("--synchronous").arg(receiver.uri()).arg(&back));
    run(Command::new("cmp").arg(&source).arg(&back));
    run(Command::new("nbdcopy").args([mirror.uri(), "null:"]));
}

#[test]
fn qemu_img_reads_compares_maps_and_converts() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 64 * MIB + 512, &[(9 * MIB, &noise(3 << 20, 3)), (64 * MIB, &[5; 512])]);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    for uri in [server.uri(), mirror.uri()] {
        compare(&image, uri);
        let info = run(Command::new("qemu-img").args(["info", "--output=json", uri]));
        assert!(info.contains("\"virtual-size\": 67109376"), "{info}");
        let map = run(Command::new("qemu-img").args(["map", "--output=json", uri]));
        assert!(map.contains("\"zero\": true"), "{map}");
        let copy = scratch.path("copy.qcow2");
        run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2", uri]).arg(&copy));
        run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "qcow2"]).arg(&image).arg(&copy));
    }
    let measured = run(Command::new("qemu-img").args(["measure", "-f", "raw", "-O", "qcow2", mirror.uri()]));
    assert!(measured.contains("required size"), "{measured}");
}

#[test]
fn qemu_io_writes_zeroes_discards_and_flushes() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 16 * MIB, &[]);
    let server = Daemon::serve(&scratch, &image, &[]);
    qemu_io(
        server.uri(),
        &[
            "write -P 1 0 1M",
            "write -f -P 2 1M 1M",
            "aio_write -P 3 2M 1M",
            "aio_write -P 4 3M 1M",
            "aio_flush",
            "write -z 512k 256k",
            "write -z -u 1M 64k",
            "discard 2M 64k",
            "flush",
        ],
    );
    qemu_io(
        server.uri(),
        &[
            "read -P 1 0 512k",
            "read -P 0 512k 256k",
            "read -P 1 768k 256k",
            "read -P 0 1M 64k",
            "read -P 2 1088k 960k",
            "read -P 0 2M 64k",
            "read -P 3 2112k 960k",
            "read -P 4 3M 1M",
            "read -P 0 4M 12M",
        ],
    );
    let status = qemu_io(server.uri(), &["map"]);
    assert!(status.contains("allocated"), "{status}");
}

#[test]
fn a_qcow2_overlay_over_a_mirror_is_what_a_vm_uses() {
    let scratch = Scratch::new();
    let bytes = noise(8 << 20, 4);
    let image = scratch.file("image.raw", &bytes);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    let overlay = scratch.path("overlay.qcow2");
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", mirror.uri()]).arg(&overlay));
    run(Command::new("qemu-io").args(["-c", "write -P 9 1M 4k"]).arg(&overlay));
    run(Command::new("qemu-io").args(["-c", "read -P 9 1M 4k", "-c", "read 2M 1M"]).arg(&overlay));
    // With the image's own bytes around what was written.
    let copy = scratch.path("copy.raw");
    run(Command::new("qemu-img").args(["convert", "-O", "raw"]).arg(&overlay).arg(&copy));
    let mut expected = bytes;
    expected[1 << 20..(1 << 20) + 4096].fill(9);
    assert!(std::fs::read(copy).unwrap() == expected);
    assert!(std::fs::read(image).unwrap() == noise(8 << 20, 4));
}

#[test]
fn nbdkit_as_a_client_checks_a_sparse_random_disk_from_end_to_end() {
    // Written by nbdcopy from nbdkit's sparse-random plugin, read back through nbdkit's nbd plugin and compared, with
    // no golden file: both ends make the disk from the same seed.
    let (origin, scratch, front) = (Scratch::new(), Scratch::new(), Scratch::new());
    let disk = ["sparse-random", "size=256M", "seed=7", "percent=20", "runlength=65536"];
    let made = Peer::nbdkit(&origin, &disk);
    let image = scratch.sparse("image.raw", 256 * MIB, &[]);
    let server = Daemon::serve(&scratch, &image, &[]);
    run(Command::new("nbdcopy").args([made.uri(), server.uri()]));
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    for uri in [server.uri(), mirror.uri()] {
        let seen = Peer::nbdkit(&front, &["-r", "nbd", &format!("uri={uri}"), "shared=true"]);
        let checking = Scratch::new();
        let check = Peer::nbdkit(&checking, &[&["--filter=checkwrite"][..], &disk].concat());
        // The filter answers every write that differs from the disk with an error.
        run(Command::new("nbdcopy").args([seen.uri(), check.uri()]));
    }
}

#[test]
fn fio_verifies_what_it_writes() {
    let scratch = Scratch::new();
    let image = scratch.sparse("image.raw", 64 * MIB, &[]);
    let server = Daemon::serve(&scratch, &image, &["--listen=127.0.0.1:0"]);
    for (mode, block) in [("randwrite", "4k"), ("randwrite", "bssplit=512/20:5k/30:64k/40:1m/10"), ("write", "1m")] {
        let block = if block.contains('=') { format!("--{block}") } else { format!("--bs={block}") };
        run(Command::new("fio").args([
            "--name=headwater",
            "--ioengine=nbd",
            &format!("--uri={}", server.uri()),
            &format!("--rw={mode}"),
            &block,
            "--size=48m",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            // Otherwise it leaves a file where it was started.
            "--verify_state_save=0",
            "--fsync=64",
        ]));
    }
    let mirror = Daemon::mirror(&scratch, server.uri(), &[]);
    let mut fio = Command::new("fio");
    fio.args(["--name=mirror", "--ioengine=nbd", "--rw=randread", "--bs=4k", "--size=48m", "--iodepth=32"]);
    run(fio.arg(format!("--uri={}", mirror.uri())));
}

#[test]
fn libnbds_negative_cases_get_errors_and_the_connection_lives() {
    // errors-server-oversize, -unadvertised-cmd, -unknown-flags, -zerosize, -invalid-offset of libnbd's tests.
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &noise(1 << 20, 5)), &["--read-only"]);
    let script = r#"
import errno
h.set_strict_mode(0)
def refused(what, *names):
    try:
        what()
    except nbd.Error as e:
        assert e.errnum in [getattr(errno, n) for n in names], (e.errnum, names)
        return
    assert False, "it was not refused"
refused(lambda: h.pread(1, 1 << 20), "EINVAL")
refused(lambda: h.pread(512, -1 + (1 << 63)), "EINVAL")
refused(lambda: h.pwrite(b"x" * 512, 0), "EPERM")
refused(lambda: h.trim(512, 0), "EPERM")
refused(lambda: h.zero(512, 0), "EPERM")
refused(lambda: h.pread(512, 0, 1 << 13), "EINVAL")
refused(lambda: h.pwrite(b"x" * ((33 << 20)), 0), "EPERM", "EINVAL")
assert len(h.pread(512, 0)) == 512
h.flush()
h.cache(512, 0)
print(h.get_size())
"#;
    assert_eq!(nbdsh(server.uri(), script).trim(), "1048576");
}

#[test]
fn exports_are_listed_and_contexts_queried() {
    let scratch = Scratch::new();
    let server = Daemon::serve(&scratch, &scratch.file("image.raw", &noise(1 << 20, 6)), &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--listen=127.0.0.1:0"]);
    let script = |uri: &str| {
        format!(
            r#"
h.set_opt_mode(True)
h.connect_uri("{uri}")
names = []
h.opt_list(lambda name, description: names.append(name))
print(names)
found = []
h.add_meta_context("x-headwater:")
h.opt_list_meta_context(lambda name: found.append(name.split("=")[0]))
print(found)
h.opt_abort()
"#
        )
    };
    let printed = run(crate::support::nbdsh_command().args(["-c", &script(mirror.uri())]));
    assert_eq!(
        printed,
        "['image']\n['x-headwater:residency', 'x-headwater:notice', 'x-headwater:path', 'x-headwater:origin']\n"
    );
    let (host, port) = mirror.uri()["nbd://".len()..].split('/').next().unwrap().split_once(':').unwrap();
    let list = run(Command::new("nbd-client").args(["-l", host, port]));
    assert!(list.contains("image: mirror of image.raw"), "{list}");
    let list = run(Command::new("qemu-nbd").args(["--list", "--bind", host, "--port", port]));
    assert!(list.contains("export: 'image'") && list.contains("x-headwater:residency"), "{list}");
}
