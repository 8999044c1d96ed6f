//! A small Linux in a virtual machine, for the kernel's own client.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Scratch, run};

/// Where the host's loopback is, seen from the guest.
pub(crate) const HOST: &str = "10.0.2.2";

/// Boots Debian's kernel with busybox and nbd-client, runs a shell script there, and gives back what it printed.
///
/// The script runs with `set -eu`; it must end well.
pub(crate) fn run_in_guest(scratch: &Scratch, script: &str) -> String {
    fs::create_dir(scratch.path("guest")).unwrap();
    boot(scratch, script, &[])
}

/// The same, with more arguments for qemu.
pub(crate) fn run_in_guest_of(scratch: &Scratch, script: &str, arguments: &[&str]) -> String {
    fs::create_dir(scratch.path("guest")).unwrap();
    boot(scratch, script, arguments)
}

/// The same, with the program under test in the guest as `headwater`.
pub(crate) fn run_with_headwater(scratch: &Scratch, script: &str) -> String {
    let root = scratch.path("guest");
    fs::create_dir_all(root.join("bin")).unwrap();
    let program = root.join("bin/headwater");
    // Unpacking is slow in there, and nobody debugs there.
    run(Command::new("strip").arg("-o").arg(&program).arg(env!("CARGO_BIN_EXE_headwater")));
    for library in run(Command::new("ldd").arg(&program)).split_whitespace().filter(|word| word.starts_with('/')) {
        let copy = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(library, copy).unwrap();
    }
    // The kernel's client has no more queues than there are processors.
    boot(scratch, script, &["-smp", "2"])
}

fn boot(scratch: &Scratch, script: &str, arguments: &[&str]) -> String {
    let guest = parts();
    let initrd = with_script(scratch, &guest.join("initrd"), script);
    // KVM is not there on many machines, and where it is inside a VM it is not to be trusted.
    let mut machine = Command::new("qemu-system-x86_64");
    machine.args(["-accel", "tcg", "-m", "512", "-nographic", "-nodefaults", "-no-reboot", "-serial", "stdio"]);
    machine.args(arguments);
    machine.args(["-nic", "user,model=virtio-net-pci", "-append", "console=ttyS0 quiet panic=-1"]);
    machine.arg("-kernel").arg(guest.join("vmlinuz")).arg("-initrd").arg(initrd);
    let printed = run(&mut machine).replace('\r', "");
    assert!(printed.contains("guest: ended with 0"), "the script failed in the guest:\n{printed}");
    printed
}

/// The kernel and the initial file system, made once.
fn parts() -> PathBuf {
    let guest = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
    run(Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/make")).arg(&guest));
    guest
}

/// The kernel unpacks one archive behind another, so the script and what is beside it go in without packing the rest
/// again.
fn with_script(scratch: &Scratch, initrd: &Path, script: &str) -> PathBuf {
    let root = scratch.path("guest");
    fs::write(root.join("script"), script).unwrap();
    let files = run(Command::new("find").arg(".").current_dir(&root));
    let mut packer = Command::new("busybox");
    packer.args(["cpio", "-o", "-H", "newc"]).current_dir(root).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut packer = packer.spawn().expect("busybox is installed by tools/test");
    packer.stdin.take().unwrap().write_all(files.as_bytes()).unwrap();
    let archive = packer.wait_with_output().unwrap().stdout;
    let path = scratch.path("initrd");
    let mut whole = fs::read(initrd).unwrap();
    // It looks for the next one at multiples of four.
    whole.resize(whole.len().next_multiple_of(4), 0);
    whole.extend(archive);
    fs::write(&path, whole).unwrap();
    path
}
