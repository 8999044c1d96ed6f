//! The kernel's NBD client, set up by nbd-client, in a virtual machine.

use std::process::Command;

use crate::support::guest::{HOST, run_in_guest};
use crate::support::{Daemon, Scratch, noise, run};

const MIB: u64 = 1 << 20;

fn port(uri: &str) -> &str {
    let address = uri.trim_start_matches("nbd://").split('/').next().unwrap();
    address.rsplit(':').next().unwrap()
}

fn sha256(path: &std::path::Path) -> String {
    run(Command::new("sha256sum").arg(path)).split(' ').next().unwrap().to_owned()
}

#[test]
fn a_file_system_on_a_served_image() {
    let scratch = Scratch::new();
    let tree = scratch.path("tree");
    std::fs::create_dir(&tree).unwrap();
    std::fs::write(tree.join("from-the-host"), noise(9 << 20, 1)).unwrap();
    let image = scratch.sparse("image.raw", 96 * MIB, &[]);
    run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image));
    let server = Daemon::serve(&scratch, &image, &["--listen=127.0.0.1:0"]);
    let printed = run_in_guest(
        &scratch,
        &format!(
            r"
nbd-client -N image {HOST} {port} /dev/nbd0
echo size $(blockdev --getsize64 /dev/nbd0)
mount -t ext4 -o discard /dev/nbd0 /mnt
sha256sum /mnt/from-the-host
dd if=/dev/urandom of=/mnt/from-the-guest bs=1M count=20 conv=fsync
dd if=/dev/urandom of=/mnt/removed bs=1M count=20 conv=fsync
rm /mnt/removed
sync
fstrim -v /mnt
echo sum $(sha256sum </mnt/from-the-guest)
umount /mnt
nbd-client -d /dev/nbd0
",
            port = port(server.uri()),
        ),
    );
    assert!(printed.contains(&format!("size {}", 96 * MIB)), "{printed}");
    assert!(printed.contains(&sha256(&tree.join("from-the-host"))), "{printed}");
    let log = server.stop();
    assert_eq!(log.sum("client left", "errors"), 0);
    assert!(log.sum("client left", "written_bytes") >= 40 * MIB);
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&image));
    let copy = scratch.path("from-the-guest");
    run(Command::new("debugfs").arg("-R").arg(format!("dump /from-the-guest {}", copy.display())).arg(&image));
    assert!(printed.contains(&format!("sum {}", sha256(&copy))), "{printed}");
    // The 20 MiB that were removed hold no storage any more.
    let stored = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&image).unwrap()) * 512;
    assert!(stored < 45 * MIB, "{stored} bytes are stored");
}

#[test]
fn a_mirror_read_over_four_connections_and_again_with_large_blocks() {
    let scratch = Scratch::new();
    // Not a whole number of chunks, and of no block size that the kernel could like but 512.
    let size = 64 * MIB + 5 * 512;
    let image = scratch.sparse("image.raw", size, &[(0, &noise(24 << 20, 2)), (size - 512, &noise(512, 3))]);
    let server = Daemon::serve(&scratch, &image, &["--read-only"]);
    let mirror = Daemon::mirror(&scratch, server.uri(), &["--listen=127.0.0.1:0"]);
    let printed = run_in_guest(
        &scratch,
        &format!(
            r"
nbd-client -N image -C 4 {HOST} {port} /dev/nbd0
nbd-client -N image -b 512 -t 30 {HOST} {port} /dev/nbd1
echo size $(blockdev --getsize64 /dev/nbd0) read-only $(blockdev --getro /dev/nbd0)
for part in 0 1 2 3; do
    dd if=/dev/nbd0 of=/dev/null bs=1M skip=$((part * 16)) count=16 2>/dev/null &
done
wait
echo 3 >/proc/sys/vm/drop_caches
echo sum $(sha256sum </dev/nbd0)
echo sum-again $(sha256sum </dev/nbd1)
if dd if=/dev/zero of=/dev/nbd0 bs=4k count=1 conv=fsync 2>/dev/null; then echo it was written; fi
nbd-client -d /dev/nbd0
nbd-client -d /dev/nbd1
",
            port = port(mirror.uri()),
        ),
    );
    let sum = sha256(&image);
    assert!(printed.contains(&format!("size {size} read-only 1")), "{printed}");
    assert!(printed.contains(&format!("sum {sum}")), "{printed}");
    assert!(printed.contains(&format!("sum-again {sum}")), "{printed}");
    assert!(!printed.contains("it was written"), "{printed}");
    assert_eq!(mirror.stop().sum("client left", "errors"), 0);
    // All of the data came once, and none of the holes.
    let sent = server.stop().sum("client left", "read_bytes");
    assert!(sent <= 25 * MIB, "{sent} bytes were sent");
}
