//! `headwater redirect --qmp`, with the real qemu: what it moves, what it refuses, and what it leaves behind.
//!
//! Most machines here never run: qemu itself reads their disks, through all nodes, when its monitor is told to.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use serde_json::{Value, json};

use crate::support::cache::index;
use crate::support::peers::Peer;
use crate::support::{Daemon, Scratch, eventually, headwater, noise, run};

const SIZE: usize = 4 << 20;

/// Two servers of one image, which has a pattern at 1 MiB, and a directory for what else there is.
struct Ground {
    scratch: Scratch,
    servers: [Daemon; 2],
}

fn image() -> Vec<u8> {
    let mut bytes = noise(SIZE, 5);
    bytes[1 << 20..(1 << 20) + 65_536].fill(0x5a);
    bytes
}

fn serve(scratch: &Scratch, name: &str, image: &Path, arguments: &[&str]) -> Daemon {
    let log = scratch.path(&format!("{name}.log"));
    let mut command = headwater(&log);
    command.arg("serve").arg(format!("disk={}", image.display())).args(arguments);
    command.arg("--unix").arg(scratch.path(&format!("{name}.sock")));
    Daemon::start(command, 1, &log)
}

impl Ground {
    fn new() -> Self {
        let scratch = Scratch::new();
        let servers = ["a", "b"].map(|name| {
            let path = scratch.file(&format!("{name}.raw"), &image());
            index(&scratch, &path, &[]);
            serve(&scratch, name, &path, &["--read-only"])
        });
        Self { scratch, servers }
    }

    fn uri(&self, server: usize) -> &str {
        self.servers[server].uri()
    }

    /// The socket of the first server, as a member `server` of the options of an nbd node.
    fn nbd(&self, name: &str) -> String {
        let path = self.scratch.path("a.sock");
        format!("nbd,node-name={name},server.type=unix,server.path={},export=disk,read-only=on", path.display())
    }

    fn overlay(&self, name: &str, format: &str, backing: &str) -> String {
        let path = self.scratch.path(name);
        run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", "-F", format, "-b", backing]).arg(&path));
        path.display().to_string()
    }

    fn machine(&self, arguments: &[&str]) -> Machine {
        Machine::start(&self.scratch, "vm", arguments)
    }

    fn redirect(&self, arguments: &[&str]) -> Told {
        let log = self.scratch.path("redirect.log");
        let mut command = headwater(&log);
        command.args(["redirect", "--json"]).args(arguments).stderr(Stdio::piped());
        let output = command.output().unwrap();
        Told { output }
    }

    /// Moves all disks of the machine, and gives back what is told of them.
    fn move_all(&self, machine: &Machine, to: &str) -> Vec<Value> {
        let told = self.redirect(&["--qmp", machine.socket(), "--to", to]);
        let disks = told.disks(0);
        assert!(disks.iter().all(|disk| disk["state"] == "moved"), "{disks:#?}");
        disks
    }
}

/// What the command said.
struct Told {
    output: Output,
}

impl Told {
    /// The disks of the only machine, when it ended with this status.
    fn disks(&self, status: i32) -> Vec<Value> {
        let machines = self.machines(status);
        assert_eq!(machines.len(), 1, "{machines:?}");
        machines[0]["disks"].as_array().unwrap().clone()
    }

    fn machines(&self, status: i32) -> Vec<Value> {
        let text = String::from_utf8_lossy(&self.output.stdout);
        let errors = String::from_utf8_lossy(&self.output.stderr);
        assert_eq!(self.output.status.code(), Some(status), "{text}{errors}");
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{text}{errors}"))
    }

    /// That the only disk stays, for a reason with these words.
    fn stays(&self, state: &str, why: &str) {
        let machines = self.machines(1);
        assert_eq!(machines[0]["disks"].as_array().map(Vec::len), Some(1), "{machines:#?}");
        let disks = self.disks(1);
        assert_eq!(disks[0]["state"], state, "{disks:#?}");
        assert!(disks[0]["why"].as_str().unwrap().contains(why), "{disks:#?}");
    }
}

/// A machine of qemu that stands still. Killed when it is dropped.
struct Machine {
    child: Child,
    socket: PathBuf,
    said: PathBuf,
}

impl Machine {
    fn start(scratch: &Scratch, name: &str, arguments: &[&str]) -> Self {
        // Whatever qemu-io says of what it does goes to the standard output, at once when it is told so.
        let said = scratch.path(&format!("{name}.out"));
        let output = File::create(&said).unwrap();
        Self::spawn(scratch, name, &[&["-m", "64", "-S"], arguments].concat(), output.into())
    }

    fn spawn(scratch: &Scratch, name: &str, arguments: &[&str], output: Stdio) -> Self {
        let (socket, said) = (scratch.path(&format!("{name}.qmp")), scratch.path(&format!("{name}.out")));
        let mut command = Command::new("stdbuf");
        command.args(["-oL", "qemu-system-x86_64", "-accel", "tcg", "-display", "none", "-nodefaults", "-qmp"]);
        command.arg(format!("unix:{},server=on,wait=off", socket.display())).args(arguments).stdout(output);
        let child = command.spawn().expect("qemu is installed by tools/test");
        let mut machine = Self { child, socket, said };
        eventually("monitor", || {
            assert!(machine.child.try_wait().unwrap().is_none(), "qemu has ended: {arguments:?}");
            UnixStream::connect(&machine.socket).is_ok()
        });
        // It listens before it opens its disks, and answers afterwards.
        drop(machine.monitor());
        machine
    }

    fn socket(&self) -> &str {
        self.socket.to_str().unwrap()
    }

    /// A client of the monitor, for as long as it is kept.
    fn monitor(&self) -> Monitor {
        let stream = UnixStream::connect(&self.socket).unwrap();
        let mut monitor = Monitor { lines: BufReader::new(stream) };
        assert!(monitor.line()["QMP"].is_object());
        monitor.call("qmp_capabilities", json!({}));
        monitor
    }

    /// Has qemu-io do something with a disk or a node, and gives back what it said of it.
    fn qemu_io(&self, disk: &str, command: &str) -> String {
        let before = std::fs::read(&self.said).unwrap().len();
        let line = format!("qemu-io {disk} \"{command}\"");
        let complaint = self.monitor().call("human-monitor-command", json!({ "command-line": line }));
        assert_eq!(complaint.as_str(), Some(""), "{disk}: {command}");
        String::from_utf8_lossy(&std::fs::read(&self.said).unwrap()[before..]).into_owned()
    }

    /// That these bytes are read.
    fn assert_finds(&self, disk: &str, pattern: &str, place: &str) {
        let said = self.qemu_io(disk, &format!("read -P {pattern} {place}"));
        assert!(said.starts_with("read 65536/65536"), "{disk}: {said}");
    }

    fn assert_reads(&self, disk: &str) {
        self.assert_finds(disk, "0x5a", "1M 64k");
    }

    /// The nodes, with the server of each nbd node.
    fn nodes(&self) -> Vec<(String, String)> {
        let nodes = self.monitor().call("query-named-block-nodes", json!({ "flat": true }));
        let of = |node: &Value, name: &str| node[name].as_str().unwrap().to_owned();
        nodes.as_array().unwrap().iter().map(|node| (of(node, "drv"), of(node, "file"))).collect()
    }

    /// That all nbd nodes are clients of the server with this socket, and how many nodes there are.
    fn assert_clients_of(&self, socket: &Path) -> usize {
        let nodes = self.nodes();
        for (_, file) in nodes.iter().filter(|(driver, _)| driver == "nbd") {
            assert!(file.contains(socket.to_str().unwrap()), "{nodes:#?}");
        }
        nodes.len()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Monitor {
    lines: BufReader<UnixStream>,
}

impl Monitor {
    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|_| panic!("{line:?}"))
    }

    fn call(&mut self, command: &str, arguments: Value) -> Value {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.lines.get_mut().write_all(line.as_bytes()).unwrap();
        loop {
            let mut reply = self.line();
            match reply.get_mut("return") {
                Some(value) => return value.take(),
                None => assert!(reply["event"].is_string(), "{reply}"),
            }
        }
    }
}

#[test]
fn every_shape_moves_back_and_forth_and_leaves_nothing() {
    let ground = Ground::new();
    let a = ground.uri(0);
    let chain = ground.overlay("chain2", "qcow2", &ground.overlay("chain1", "raw", a));
    let named = ground.overlay("named", "raw", a);
    let machine = ground.machine(&[
        "-drive",
        &format!("id=plain,file={a},format=raw,if=none,readonly=on,iops=1000,cache=none"),
        "-device",
        "virtio-blk-pci,drive=plain,id=v1",
        "-drive",
        &format!("id=temporary,file={a},format=raw,if=virtio,snapshot=on"),
        "-drive",
        &format!("id=chain,file={chain},format=qcow2,if=virtio"),
        "-blockdev",
        &ground.nbd("n4"),
        "-blockdev",
        "raw,node-name=part,file=n4,offset=1048576,size=65536,read-only=on",
        "-device",
        "virtio-blk-pci,drive=part,id=v4",
        "-object",
        "iothread,id=thread",
        "-blockdev",
        &ground.nbd("n5"),
        "-blockdev",
        &format!("qcow2,node-name=overlay,file.driver=file,file.filename={named},backing=n5"),
        "-device",
        "virtio-blk-pci,drive=overlay,id=v5,iothread=thread",
        "-blockdev",
        &ground.nbd("n6"),
        "-device",
        "virtio-scsi-pci,id=scsi",
        "-device",
        "scsi-hd,drive=n6,id=v6",
        "-blockdev",
        &ground.nbd("n7"),
        "-device",
        "virtio-blk-pci,drive=n7,id=v7,iothread=thread",
        "-blockdev",
        &ground.nbd("n8"),
        "-object",
        "throttle-group,id=slow",
        "-blockdev",
        "throttle,node-name=throttled,throttle-group=slow,file=n8,read-only=on",
        "-device",
        "virtio-blk-pci,drive=throttled,id=v8",
    ]);
    machine.qemu_io("chain", "write -P 1 0 64k");
    let nodes = machine.assert_clients_of(&ground.scratch.path("a.sock"));
    for round in 0..4 {
        let to = 1 - round % 2;
        let disks = ground.move_all(&machine, ground.uri(to));
        let ways: Vec<_> = disks.iter().map(|disk| disk["way"].as_str().unwrap()).collect();
        assert_eq!((ways.len(), ways.iter().filter(|way| **way == "device").count()), (8, 2), "{disks:#?}");
        assert!(disks.iter().all(|disk| disk["errors"] == 0 && disk.get("why").is_none()), "{disks:#?}");
        let socket = ground.scratch.path(["a.sock", "b.sock"][to]);
        assert_eq!(machine.assert_clients_of(&socket), nodes, "{:#?}", machine.nodes());
        for disk in ["plain", "temporary", "chain", "overlay", "throttled"] {
            machine.assert_reads(disk);
        }
        // Whole disks are called as their nodes are, and those have other names now.
        for device in ["/machine/peripheral/v7", "/machine/peripheral/v6"] {
            let said = machine.monitor().call("qom-get", json!({ "path": device, "property": "drive" }));
            machine.assert_reads(said.as_str().unwrap());
        }
        // An offset that is not told again is kept all the same.
        machine.assert_finds("part", "0x5a", "0 64k");
        machine.assert_finds("chain", "1", "0 64k");
        let again = ground.redirect(&["--qmp", machine.socket(), "--to", ground.uri(to)]).disks(0);
        assert!(again.iter().all(|disk| disk["state"] == "already"), "{again:#?}");
    }
}

#[test]
fn a_node_under_two_disks_moves_once() {
    let ground = Ground::new();
    let overlays = ["one", "two"].map(|name| ground.overlay(name, "raw", ground.uri(0)));
    let overlay = |index: usize| {
        format!("qcow2,node-name=o{index},file.driver=file,file.filename={},backing=base", overlays[index])
    };
    let machine = ground.machine(&[
        "-blockdev",
        &ground.nbd("base"),
        "-blockdev",
        &overlay(0),
        "-blockdev",
        &overlay(1),
        "-device",
        "virtio-blk-pci,drive=o0,id=v0",
        "-device",
        "virtio-blk-pci,drive=o1,id=v1",
    ]);
    let disks = ground.move_all(&machine, ground.uri(1));
    assert_eq!((disks.len(), &disks[0]["disks"]), (1, &json!(["v0", "v1"])), "{disks:#?}");
    assert_eq!(machine.assert_clients_of(&ground.scratch.path("b.sock")), 5);
    machine.assert_reads("o0");
    machine.assert_reads("o1");
}

/// A machine with one plain disk on the first server.
fn plain(ground: &Ground) -> Machine {
    let drive = format!("id=d0,file={},format=raw,if=virtio,readonly=on", ground.uri(0));
    ground.machine(&["-drive", &drive])
}

/// Tries a redirect that must fail, and looks whether the machine is as before.
fn stays(ground: &Ground, machine: &Machine, arguments: &[&str], state: &str, why: &str) {
    let before = machine.nodes();
    let mut all = vec!["--qmp", machine.socket()];
    all.extend(arguments);
    ground.redirect(&all).stays(state, why);
    assert_eq!(machine.nodes(), before);
    machine.assert_reads("d0");
}

#[test]
fn other_images_are_refused_whatever_is_wanted() {
    let ground = Ground::new();
    let machine = plain(&ground);
    let other = ground.scratch.file("other.raw", &noise(SIZE, 7));
    index(&ground.scratch, &other, &[]);
    let other = serve(&ground.scratch, "other", &other, &["--read-only"]);
    let small =
        serve(&ground.scratch, "small", &ground.scratch.file("small.raw", &image()[..SIZE / 2]), &["--read-only"]);
    for force in [&[][..], &["--force"]] {
        stays(&ground, &machine, &[&["--to", other.uri()], force].concat(), "other", "another image");
        stays(&ground, &machine, &[&["--to", small.uri()], force].concat(), "other", "bytes");
    }
    // A disk that can be moved is, though another one cannot.
    let both = format!("{},{}", other.uri(), ground.uri(1));
    let disks = ground.redirect(&["--qmp", machine.socket(), "--to", &both]).disks(0);
    assert_eq!((&disks[0]["state"], disks[0]["to"].as_str()), (&json!("moved"), Some(ground.uri(1))));
}

/// qemu does not tell which of its disks use TLS, so none is moved to where there is none.
#[test]
fn a_machine_with_tls_credentials_is_not_moved_to_a_server_without() {
    let ground = Ground::new();
    let drive = format!("id=d0,file={},format=raw,if=virtio,readonly=on", ground.uri(0));
    let machine = ground.machine(&["-object", "tls-creds-anon,id=t0,endpoint=client", "-drive", &drive]);
    let image = format!("disk={}", ground.scratch.path("b.raw").display());
    let log = ground.scratch.path("bare.log");
    let mut command = headwater(&log);
    command.args(["serve", &image, "--read-only", "--listen=127.0.0.1:0"]);
    let bare = Daemon::start(command, 1, &log);
    for force in [&[][..], &["--force"]] {
        stays(&ground, &machine, &[&["--to", bare.uri()], force].concat(), "refused", "TLS credentials \"t0\"");
    }
    ground.move_all(&machine, ground.uri(1));
}

#[test]
fn an_image_that_nobody_knows_needs_force() {
    let ground = Ground::new();
    let machine = plain(&ground);
    let file = format!("file={}", ground.scratch.path("b.raw").display());
    let unknown = Peer::nbdkit(&ground.scratch, &["-r", "file", &file]);
    stays(&ground, &machine, &["--to", unknown.uri()], "refused", "does not say what it holds");
    let forced = ground.redirect(&["--qmp", machine.socket(), "--to", unknown.uri(), "--force"]).disks(0);
    assert_eq!(forced[0]["state"], "moved");
    machine.assert_reads("d0");
    // Back from there nobody knows what the disk is.
    stays(&ground, &machine, &["--to", ground.uri(0)], "refused", "does not say what it holds");
}

#[test]
fn a_server_that_is_gone_can_be_left() {
    let Ground { scratch, servers } = Ground::new();
    let [old, new] = servers;
    let ground = Ground { servers: [old, new], scratch };
    let machine = plain(&ground);
    ground.servers[0].signal("KILL");
    let told = ground.redirect(&["--qmp", machine.socket(), "--to", ground.uri(1)]);
    told.stays("refused", "cannot be asked");
    let disks = ground.redirect(&["--qmp", machine.socket(), "--to", ground.uri(1), "--force"]).disks(0);
    assert_eq!(disks[0]["state"], "moved");
    machine.assert_reads("d0");
    assert_eq!(machine.assert_clients_of(&ground.scratch.path("b.sock")), 2);
}

#[test]
fn a_disk_that_is_written_to_needs_force_and_its_writes_follow() {
    let scratch = Scratch::new();
    let servers = ["a", "b"].map(|name| serve(&scratch, name, &scratch.file(&format!("{name}.raw"), &image()), &[]));
    let ground = Ground { scratch, servers };
    let machine = ground.machine(&["-drive", &format!("id=d0,file={},format=raw,if=virtio", ground.uri(0))]);
    stays(&ground, &machine, &["--to", ground.uri(1)], "refused", "written to");
    let read_only = serve(&ground.scratch, "ro", &ground.scratch.path("b.raw"), &["--read-only"]);
    stays(&ground, &machine, &["--to", read_only.uri(), "--force"], "refused", "read-only");
    machine.qemu_io("d0", "write -P 1 0 64k");
    let disks = ground.redirect(&["--qmp", machine.socket(), "--to", ground.uri(1), "--force"]).disks(0);
    assert_eq!(disks[0]["state"], "moved");
    machine.qemu_io("d0", "write -P 2 64k 64k");
    machine.qemu_io("d0", "flush");
    let written = |name: &str| std::fs::read(ground.scratch.path(name)).unwrap()[..131_072].to_vec();
    let start = image()[..131_072].to_vec();
    assert_eq!(written("a.raw"), [&[1; 65_536][..], &start[65_536..]].concat());
    assert_eq!(written("b.raw"), [&start[..65_536], &[2; 65_536][..]].concat());
}

#[test]
fn a_format_inside_an_export_stays_what_it_is() {
    let scratch = Scratch::new();
    let raw = scratch.file("raw", &image());
    // As `qcow2` on the wire: the server must not look into it.
    let inside = scratch.path("inside.qcow2");
    run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).args([&raw, &inside]));
    let servers = ["a", "b"].map(|name| {
        let path = scratch.path(&format!("{name}.bin"));
        std::fs::copy(&inside, &path).unwrap();
        index(&scratch, &path, &["--format=raw"]);
        serve(&scratch, name, &path, &["--read-only", "--format=raw"])
    });
    let ground = Ground { scratch, servers };
    let drive = format!("id=d0,file={},format=qcow2,if=virtio,readonly=on", ground.uri(0));
    let machine = ground.machine(&["-drive", &drive]);
    machine.assert_reads("d0");
    ground.move_all(&machine, ground.uri(1));
    let drivers: Vec<_> = machine.nodes().into_iter().map(|(driver, _)| driver).collect();
    assert_eq!(drivers.len(), 2, "{drivers:?}");
    assert!(drivers.contains(&"qcow2".into()));
    machine.assert_reads("d0");
    machine.assert_clients_of(&ground.scratch.path("b.sock"));
}

#[test]
fn a_disk_can_be_named() {
    let ground = Ground::new();
    let drive = |id: &str| format!("id={id},file={},format=raw,if=virtio,readonly=on", ground.uri(0));
    let machine = ground.machine(&["-drive", &drive("d0"), "-drive", &drive("d1")]);
    let disks = ground.redirect(&["--qmp", machine.socket(), "--device", "d1", "--to", ground.uri(1)]).disks(0);
    assert_eq!((disks.len(), &disks[0]["disks"]), (1, &json!(["d1"])));
    let unknown = ground.redirect(&["--qmp", machine.socket(), "--device", "d2", "--to", ground.uri(1)]);
    let machines = unknown.machines(1);
    assert!(machines[0]["error"].as_str().unwrap().contains("no disk \"d2\""), "{machines:?}");
}

/// A server that takes so many connections and is gone then, except for those.
fn short_lived(scratch: &Scratch, connections: usize, target: PathBuf) -> String {
    let path = scratch.path("short.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let uri = format!("nbd+unix:///disk?socket={}", path.display());
    thread::spawn(move || {
        for _ in 0..connections {
            let (client, _) = listener.accept().unwrap();
            let server = UnixStream::connect(&target).unwrap();
            for (mut from, mut to) in [(client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client)] {
                thread::spawn(move || {
                    // Either may hang up whenever it likes.
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(std::net::Shutdown::Both);
                });
            }
        }
    });
    uri
}

#[test]
fn a_server_that_dies_in_the_middle_changes_nothing() {
    let ground = Ground::new();
    let machine = plain(&ground);
    // Two connections are ours, to compare; the third one is qemu's.
    for (connections, why) in [(0, "cannot connect"), (2, "blockdev-add"), (3, "it went away again")] {
        let _ = std::fs::remove_file(ground.scratch.path("short.sock"));
        let short = short_lived(&ground.scratch, connections, ground.scratch.path("b.sock"));
        stays(&ground, &machine, &["--to", &short], "failed", why);
    }
    let _ = std::fs::remove_file(ground.scratch.path("short.sock"));
    let short = short_lived(&ground.scratch, 3, ground.scratch.path("b.sock"));
    let both = format!("{short},{}", ground.uri(1));
    let disks = ground.redirect(&["--qmp", machine.socket(), "--to", &both]).disks(0);
    assert_eq!(disks[0]["to"].as_str(), Some(ground.uri(1)), "{disks:#?}");
}

#[test]
fn what_an_earlier_run_left_is_removed() {
    let ground = Ground::new();
    let machine = plain(&ground);
    for name in ["hw-redirect-1", "hw-redirect-3", "hw-redirect-mine"] {
        let server = json!({ "type": "unix", "path": ground.scratch.path("b.sock") });
        let options =
            json!({ "driver": "nbd", "node-name": name, "server": server, "export": "disk", "read-only": true });
        machine.monitor().call("blockdev-add", options);
    }
    let told = ground.redirect(&["--qmp", machine.socket(), "--to", ground.uri(1)]).machines(0);
    assert_eq!(told[0]["removed"], json!(["hw-redirect-1", "hw-redirect-3"]));
    assert_eq!(machine.nodes().len(), 3);
}

#[test]
fn a_block_job_on_the_way_is_let_alone() {
    let ground = Ground::new();
    let machine = plain(&ground);
    let root = machine.monitor().call("query-block", json!({}))[0]["inserted"]["node-name"].clone();
    let copy = ground.scratch.sparse("copy", SIZE as u64, &[]);
    let mut monitor = machine.monitor();
    monitor.call("blockdev-add", json!({ "driver": "file", "node-name": "copy", "filename": copy }));
    let job = json!({ "job-id": "j", "device": root, "target": "copy", "sync": "full", "speed": 1 });
    monitor.call("blockdev-backup", job);
    drop(monitor);
    let before = machine.nodes();
    let told = ground.redirect(&["--qmp", machine.socket(), "--to", ground.uri(1)]);
    told.stays("refused", "block-job j is at work");
    assert_eq!(machine.nodes(), before);
}

#[test]
fn a_monitor_that_is_taken_or_is_none_is_told() {
    let ground = Ground::new();
    let machine = plain(&ground);
    let taken = machine.monitor();
    let told = ground.redirect(&["--qmp", machine.socket(), "--to", ground.uri(1)]).machines(1);
    assert!(told[0]["error"].as_str().unwrap().contains("one client at a time"), "{told:?}");
    drop(taken);
    for (path, why) in [("a.sock", "no monitor"), ("nothing", "cannot connect")] {
        let path = ground.scratch.path(path);
        let told = ground.redirect(&["--qmp", path.to_str().unwrap(), "--to", ground.uri(1)]).machines(1);
        assert!(told[0]["error"].as_str().unwrap().contains(why), "{told:?}");
    }
    ground.move_all(&machine, ground.uri(1));
}

#[test]
fn all_machines_of_a_directory_move() {
    let ground = Ground::new();
    let drive = format!("id=d0,file={},format=raw,if=virtio,readonly=on", ground.uri(0));
    std::fs::create_dir_all(ground.scratch.path("machines")).unwrap();
    let machines = ["machines/1", "machines/2", "machines/3"].map(|name| {
        let words: &[&str] = if name == "machines/3" { &[] } else { &["-drive", &drive] };
        Machine::start(&ground.scratch, name, words)
    });
    // Sockets of others are let alone.
    let _other = UnixListener::bind(ground.scratch.path("machines/4")).map(drop);
    let told = ground.redirect(&["--qmp", ground.scratch.path("machines").to_str().unwrap(), "--to", ground.uri(1)]);
    let told = told.machines(0);
    let counts: Vec<_> = told.iter().map(|machine| machine["disks"].as_array().unwrap().len()).collect();
    assert_eq!(counts, [1, 1, 0], "{told:#?}");
    for machine in &machines[..2] {
        machine.assert_reads("d0");
        machine.assert_clients_of(&ground.scratch.path("b.sock"));
    }
}

/// Debian's kernel, and an initial file system that runs this script with the driver of the disks loaded.
fn guest(scratch: &Scratch, script: &str) -> [String; 2] {
    let parts = Path::new(env!("CARGO_TARGET_TMPDIR")).join("guest");
    run(Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guest/make")).arg(&parts));
    let root = scratch.path("root");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(root.join("script"), format!("insmod /virtio_blk.ko\n{script}")).unwrap();
    let driver = run(Command::new("find").arg(parts.join("kernel/lib/modules")).args(["-name", "virtio_blk.ko"]));
    std::fs::copy(driver.trim(), root.join("virtio_blk.ko")).unwrap();
    // The kernel unpacks one archive behind another, and looks for the next one at multiples of four.
    let pack = "cp \"$1/initrd\" \"$2.initrd\"; truncate -s %4 \"$2.initrd\"; cd \"$2\"; \
                find . | busybox cpio -o -H newc >>\"$2.initrd\"";
    run(Command::new("sh").args(["-euc", pack, "sh"]).arg(&parts).arg(&root));
    [parts.join("vmlinuz"), scratch.path("root.initrd")].map(|path| path.display().to_string())
}

/// Reads the second disk and compares its sum, writes to the first one and reads that again, until the third one says
/// stop. All of it past the guest's own cache.
const CHECK: &str = "
sum() { dd if=/dev/vdb bs=64k iflag=direct 2>/dev/null | md5sum | cut -c -32; }
at=0
until dd if=/dev/vdc bs=512 count=1 iflag=direct 2>/dev/null | grep -q stop; do
    [ \"$(sum)\" = SUM ] || echo 'guest: wrong bytes in the base'
    dd if=/dev/urandom of=/data bs=64k count=16 2>/dev/null
    dd if=/data of=/dev/vda bs=64k seek=$at oflag=direct conv=notrunc 2>/dev/null || echo 'guest: wrong write'
    dd if=/dev/vda bs=64k skip=$at count=16 iflag=direct 2>/dev/null | cmp - /data || echo 'guest: wrong bytes written'
    at=$(((at + 16) % 48))
    echo 'guest: pass'
done
dmesg | grep -i 'i/o error' && echo 'guest: wrong requests'
true
";

#[test]
fn a_running_machine_notices_nothing() {
    let ground = Ground::new();
    let sum = run(Command::new("md5sum").arg(ground.scratch.path("a.raw")));
    let [kernel, initrd] = guest(&ground.scratch, &CHECK.replace("SUM", &sum[..32]));
    let overlay = format!("file={},format=qcow2,if=virtio", ground.overlay("overlay", "raw", ground.uri(0)));
    let base = format!("file={},format=raw,if=virtio,readonly=on", ground.uri(0));
    let control = ground.scratch.file("control", &[b'\n'; 4096]);
    let drive = format!("file={},format=raw,if=virtio", control.display());
    let mut words = vec!["-m", "256", "-no-reboot", "-serial", "stdio", "-kernel", &kernel, "-initrd", &initrd];
    words.extend(["-append", "console=ttyS0 quiet panic=-1"]);
    words.extend(["-drive", &overlay, "-drive", &base, "-drive", &drive]);
    let mut machine = Machine::spawn(&ground.scratch, "vm", &words, Stdio::piped());
    let mut serial = BufReader::new(machine.child.stdout.take().unwrap());
    let mut said = String::new();
    let mut wait_for = |text: &str| {
        let before = said.len();
        while !said[before..].contains(text) {
            assert_ne!(serial.read_line(&mut said).unwrap(), 0, "the machine has ended:\n{said}");
        }
        assert!(!said.contains("guest: wrong"), "{said}");
    };
    for time in 1..=10 {
        wait_for("guest: pass");
        let disks = ground.move_all(&machine, ground.uri(time % 2));
        assert!(disks.len() == 2 && disks.iter().all(|disk| disk["errors"] == 0), "{disks:#?}");
    }
    wait_for("guest: pass");
    File::options().write(true).open(control).unwrap().write_all_at(b"stop", 0).unwrap();
    wait_for("guest: ended with 0");
}
