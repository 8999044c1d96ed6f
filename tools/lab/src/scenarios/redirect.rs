//! A real virtual machine whose disks are redirected back and forth while it checks all that it reads and writes.
//!
//! The machine's root is an overlay on an image of a server, and the same image is its second disk. It reads that
//! slice by slice and compares sums; on the overlay `fio` writes and verifies. Both go past the caches of the guest. It
//! tells what came of it on its serial line.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use headwater::units::MIB;
use load::children::{self, Cpus, Guard};
use serde_json::{Value, json};

use crate::bed::output;
use crate::machine::Machine;
use crate::servers::{IMAGE, wait_for_line};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image, tell};

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    machine: Machine,
    /// How the machine is moved (repeatable).
    #[arg(long, value_enum, value_delimiter = ',', default_value = "qmp,relay,close")]
    way: Vec<Way>,
    /// So many times, there and back counting as two.
    #[arg(long, value_name = "N", default_value_t = 50)]
    times: u32,
    /// How long the machine works between two of them.
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = load::arguments::duration)]
    every: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    /// qemu is told, by its monitor.
    Qmp,
    /// The first server passes on what the second one has.
    Relay,
    /// Connections are closed, and qemu comes back to whoever is at the address then.
    Close,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Qmp => "qmp",
            Self::Relay => "relay",
            Self::Close => "close",
        }
    }
}

/// Bytes of the image that are read and summed up at once.
const SLICE: u64 = 32 * MIB;
/// Where on the control disk the machine looks whether it is to stop: behind its script.
const STOP: u64 = 64 << 10;

/// What the machine runs in place of `init`. The second disk is the base, the third one has fio and the sums.
const SCRIPT: &str = r#"
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -o ro /dev/vdc /mnt
checker() { /mnt/lib/ld-linux-x86-64.so.2 --library-path /mnt/lib /mnt/fio "$@"; }
stopped() { dd if=/dev/vdd bs=512 skip=128 count=1 iflag=direct 2>/dev/null | grep -q stop; }
wrong() { echo "lab: wrong: $*"; echo x >>/run/wrong; }
: >/run/wrong
echo 0 >/run/passes
(
    passes=0
    until stopped; do
        checker --name=v --filename=/checked --size=16M --rw=randwrite --bsrange=4k-64k --direct=1 --thread \
            --ioengine=psync --verify=crc32c --verify_fatal=1 --do_verify=1 --verify_state_save=0 \
            --randseed=$passes >/run/fio 2>&1 || wrong "fio: $(tail -n 5 /run/fio)"
        passes=$((passes + 1))
        echo $passes >/run/passes
    done
) &
slices=$(wc -l </mnt/sums) slice=0 read=0
echo 'lab: the machine is at work'
until stopped; do
    sum=$(dd if=/dev/vdb bs=1M skip=$((slice * 32)) count=32 iflag=direct 2>/run/dd | md5sum | cut -c -32)
    slice=$((slice + 1)) read=$((read + 1))
    [ "$sum" = "$(sed -n "${slice}p" /mnt/sums)" ] || wrong "slice $slice: $sum: $(cat /run/dd)"
    [ $slice -lt "$slices" ] || slice=0
done
wait
kernel=$(dmesg | grep -ciE 'i/o error|ext4-fs error|remount')
echo "lab: verdict slices=$read passes=$(cat /run/passes) wrong=$(wc -l </run/wrong) kernel=$kernel."
sync
echo o >/proc/sysrq-trigger
sleep 60
exit
"#;

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    image::index(lab, &options.machine.image)?;
    let tools = tools(lab, &options.machine.image)?;
    let runs = lab.in_turns(&options.way, |way| way.name().into(), |way| trial(lab, options, way, &tools))?;
    let rows = options.way.iter().zip(&runs).map(|(way, runs)| {
        let of = |figure: &dyn Fn(&Trial) -> f64| Cell::of(runs.iter().map(figure).collect());
        Row::new(
            way.name(),
            vec![
                of(&|run| run.quantile(0.5)),
                of(&|run| run.quantile(0.99)),
                of(&|run| run.quantile(1.0)),
                of(&|run| run.errors),
                of(&|run| run.verdict.slices),
                of(&|run| run.verdict.passes),
                of(&|run| run.verdict.wrong + run.verdict.kernel),
            ],
        )
    });
    let details = options.way.iter().zip(&runs).flat_map(|(way, runs)| {
        runs.iter().map(|run| json!({ "way": way.name(), "pauses_ms": run.pauses, "verdict": run.line }))
    });
    Ok(Table {
        title: format!("A machine is redirected {} times", options.times),
        columns: vec!["pause ms", "p99", "most", "errors", "slices read", "fio passes", "wrong"],
        rows: rows.collect(),
        details: details.collect(),
        ..Table::default()
    })
}

/// What came of one machine.
#[derive(Debug)]
struct Trial {
    /// In milliseconds, one for each disk and time.
    pauses: Vec<f64>,
    /// Requests that failed, as those say who did the moving.
    errors: f64,
    verdict: Verdict,
    line: String,
}

impl Trial {
    /// The pause that so large a part does not exceed.
    fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.pauses.clone();
        sorted.sort_by(f64::total_cmp);
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rank"
        )]
        let rank = (part * sorted.len() as f64).ceil() as usize;
        sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
    }
}

/// What the machine says at the end.
#[derive(Debug, Default, PartialEq)]
struct Verdict {
    slices: f64,
    passes: f64,
    wrong: f64,
    kernel: f64,
}

impl Verdict {
    /// Reads the line of [`SCRIPT`].
    fn parse(line: &str) -> Option<Self> {
        let text = line.split("lab: verdict ").nth(1)?.trim_end().strip_suffix('.')?;
        let mut verdict = Self::default();
        for word in text.split(' ') {
            let (name, value) = word.split_once('=')?;
            let field = match name {
                "slices" => &mut verdict.slices,
                "passes" => &mut verdict.passes,
                "wrong" => &mut verdict.wrong,
                "kernel" => &mut verdict.kernel,
                _ => return None,
            };
            *field = value.parse().ok()?;
        }
        Some(verdict)
    }
}

/// A server on a unix socket of its own.
struct Server {
    socket: PathBuf,
    admin: PathBuf,
    _guard: Guard,
}

impl Server {
    fn start(lab: &Lab, place: &Path, name: &str, image: &Path) -> anyhow::Result<Self> {
        let [socket, admin, log] = ["sock", "admin", "log"].map(|kind| place.join(format!("{name}.{kind}")));
        let mut command = children::command(Cpus::Free, &lab.headwater);
        command.args(["--log-format=json", "serve", "--read-only"]).arg(format!("{IMAGE}={}", image.display()));
        command.arg("--unix").arg(&socket).arg(format!("--admin={}", admin.display()));
        let mut guard = Guard::spawn(command, &log)?;
        wait_for_line(&mut guard, &log, |line| line.starts_with("nbd"))?;
        Ok(Self { socket, admin, _guard: guard })
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///{IMAGE}?socket={}", self.socket.display())
    }
}

/// Where a trial takes place.
struct Ground<'a> {
    lab: &'a Lab,
    place: tempfile::TempDir,
    servers: [Server; 2],
}

fn trial(lab: &Lab, options: &Options, way: Way, tools: &Path) -> anyhow::Result<Trial> {
    let place = tempfile::Builder::new().prefix("redirect-").tempdir_in(lab.scratch())?;
    let server = |name| Server::start(lab, place.path(), name, &options.machine.image);
    let ground = Ground { lab, servers: [server("a")?, server("b")?], place };
    ground.lead_to(0)?;
    let (mut guest, log) = ground.boot(&options.machine, tools)?;
    wait_for_line(&mut guest, &log, |line| line.contains("lab: the machine is at work"))?;
    let (mut pauses, mut errors) = (Vec::new(), 0.0);
    for time in 1..=options.times {
        lab.go_on()?;
        std::thread::sleep(options.every);
        let to = usize::from(time % 2 == 1);
        let told = ground.redirect(way, to).with_context(|| format!("time {time}"))?;
        collect(&told, "pause_ms", &mut |pause| pauses.push(pause));
        collect(&told, "errors", &mut |count| errors += count);
        ensure!(guest.ended()?.is_none(), "the machine has ended");
    }
    std::thread::sleep(options.every);
    fs::File::options().write(true).open(ground.path("control"))?.write_all_at(b"stop\n", STOP)?;
    wait_for_line(&mut guest, &log, |line| Verdict::parse(line).is_some())?;
    let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
    text.lines().filter(|line| line.contains("lab: wrong")).for_each(tell);
    let line = text.lines().find(|line| line.contains("lab: verdict")).unwrap_or_default().trim().to_owned();
    let verdict = Verdict::parse(&line).context("there was a verdict")?;
    ensure!(verdict.slices > 0.0 && verdict.passes > 0.0, "the machine has checked nothing: {line}");
    tell(&format!("{}: {line}", way.name()));
    Ok(Trial { pauses, errors, verdict, line })
}

impl Ground<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// Where the machine finds its server when it connects.
    fn lead_to(&self, server: usize) -> anyhow::Result<()> {
        let new = self.path("current.new");
        symlink(&self.servers[server].socket, &new)?;
        Ok(fs::rename(new, self.path("current"))?)
    }

    /// Starts the machine, and gives back where it writes.
    fn boot(&self, machine: &Machine, tools: &Path) -> anyhow::Result<(Guard, PathBuf)> {
        let overlay = self.path("overlay");
        let size = fs::metadata(&machine.image)?.len().to_string();
        output(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&overlay).arg(size))?;
        fs::write(self.path("control"), control())?;
        let server = json!({ "type": "unix", "path": self.path("current") });
        let nbd = json!({ "driver": "nbd", "server": server, "export": IMAGE, "reconnect-delay": 30 });
        let base = json!({ "driver": "raw", "read-only": true, "file": nbd });
        let file = |path: &Path| json!({ "driver": "file", "filename": path });
        let disks = [
            json!({ "driver": "qcow2", "file": file(&overlay), "backing": base }),
            base,
            json!({ "driver": "raw", "read-only": true, "file": file(tools) }),
            json!({ "driver": "raw", "file": file(&self.path("control")) }),
        ];
        let log = self.path("serial.log");
        fs::write(&log, "")?;
        let mut command = machine.command();
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", self.path("qmp").display()));
        for (number, mut disk) in disks.into_iter().enumerate() {
            disk["node-name"] = json!(format!("disk{number}"));
            command.arg("-blockdev").arg(disk.to_string());
            command.arg("-device").arg(format!("virtio-blk-pci,drive=disk{number},id=vd{number}"));
        }
        machine.boot_with(&mut command, "root=/dev/vda rw console=ttyS0 quiet panic=-1 init=/bin/bash -- /dev/vdd");
        Ok((Guard::spawn(command, &log)?, log))
    }

    /// Moves the machine, and gives back what is told of it.
    fn redirect(&self, way: Way, to: usize) -> anyhow::Result<Value> {
        let target = self.servers[to].uri();
        let mut command = Command::new(&self.lab.headwater);
        command.args(["redirect", "--json", "--to", &target]);
        match way {
            Way::Qmp => command.arg("--qmp").arg(self.path("qmp")),
            // The machine stays connected to the first server, whichever one the bytes come from.
            Way::Relay => command.args([IMAGE, "--way=relay", "--wait", "--at"]).arg(&self.servers[0].admin),
            Way::Close => {
                self.lead_to(to)?;
                command.args([IMAGE, "--way=close", "--wait", "--at"]).arg(&self.servers[1 - to].admin)
            }
        };
        let text = output(&mut command)?;
        serde_json::from_str(&text).with_context(|| text)
    }
}

/// The numbers of this name, wherever they are.
fn collect(value: &Value, name: &str, take: &mut dyn FnMut(f64)) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| collect(value, name, take)),
        Value::Object(members) => {
            for (key, value) in members {
                match value.as_f64() {
                    Some(number) if key == name => take(number),
                    _ => collect(value, name, take),
                }
            }
        }
        _ => {}
    }
}

/// The control disk: the script, and nothing yet behind it.
fn control() -> Vec<u8> {
    let mut bytes = SCRIPT.as_bytes().to_vec();
    // A shell takes empty lines, and no zero bytes.
    bytes.resize(2 * headwater::units::to_usize(STOP), b'\n');
    bytes
}

/// A disk with fio, the libraries that it wants, and the sums of the slices of the image.
fn tools(lab: &Lab, image: &Path) -> anyhow::Result<PathBuf> {
    let tree = lab.scratch().join("tools");
    fs::create_dir_all(tree.join("lib"))?;
    let program = output(Command::new("sh").args(["-c", "command -v fio"])).context("fio is not installed")?;
    fs::copy(program.trim(), tree.join("fio"))?;
    let libraries = output(Command::new("ldd").arg(program.trim()))?;
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let library = Path::new(library);
        fs::copy(library, tree.join("lib").join(library.file_name().context("a library has a name")?))?;
    }
    tell("summing up the image");
    let mut sums = Command::new("split");
    sums.args([&format!("--bytes={SLICE}"), "--filter=md5sum | cut -c -32"]).arg(image);
    let sums = output(&mut sums)?;
    ensure!(sums.lines().count() > 0, "{} is empty", image.display());
    fs::File::create(tree.join("sums"))?.write_all(sums.as_bytes())?;
    let disk = lab.scratch().join("tools.raw");
    output(Command::new("mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&disk).arg("256M"))?;
    if !disk.is_file() {
        bail!("mke2fs made nothing");
    }
    Ok(disk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_is_read() {
        let line = "[  1.0] lab: verdict slices=12 passes=3 wrong=0 kernel=1.\r";
        let verdict = Verdict { slices: 12.0, passes: 3.0, wrong: 0.0, kernel: 1.0 };
        assert_eq!(Verdict::parse(line), Some(verdict));
        for broken in ["lab: verdict slices=12", "lab: verdict x=1.", "lab: verdict slices=.", ""] {
            assert_eq!(Verdict::parse(broken), None, "{broken}");
        }
    }

    #[test]
    fn numbers_are_found_anywhere() {
        let told = json!([{ "disks": [{ "pause_ms": 1.5, "errors": 0 }, { "pause_ms": 2 }] }, { "pause_ms": "x" }]);
        let mut pauses = Vec::new();
        collect(&told, "pause_ms", &mut |pause| pauses.push(pause));
        assert_eq!(pauses, [1.5, 2.0]);
        let trial = Trial { pauses, errors: 0.0, verdict: Verdict::default(), line: String::new() };
        assert_eq!([0.5, 0.99, 1.0].map(|part| trial.quantile(part)), [1.5, 2.0, 2.0]);
    }

    #[test]
    fn the_script_fits_before_the_word_that_stops_it() {
        assert!(SCRIPT.len() < headwater::units::to_usize(STOP) && STOP == 128 * 512);
        assert!(!control().contains(&0));
    }
}
