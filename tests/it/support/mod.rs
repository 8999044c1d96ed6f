//! The program under test, and what is put around it.

pub(crate) mod browser;
pub(crate) mod cables;
pub(crate) mod cache;
pub(crate) mod certificates;
pub(crate) mod client;
pub(crate) mod group;
pub(crate) mod guest;
pub(crate) mod liar;
pub(crate) mod link;
pub(crate) mod peers;
pub(crate) mod readers;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use headwater::export::conformance::Random;

/// How long anything may take that ought to be done at once; only a failing test waits so long.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// A directory that goes away with the test.
pub(crate) struct Scratch(tempfile::TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::Builder::new().prefix("headwater-test-").tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file with these bytes.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, bytes).unwrap();
        path
    }

    /// A sparse file with data in some places.
    pub(crate) fn sparse(&self, name: &str, size: u64, data: &[(u64, &[u8])]) -> PathBuf {
        use std::os::unix::fs::FileExt;
        let path = self.path(name);
        let file = fs::File::create(&path).unwrap();
        file.set_len(size).unwrap();
        data.iter().for_each(|(offset, bytes)| file.write_all_at(bytes, *offset).unwrap());
        path
    }
}

/// Bytes without zero blocks, the same for the same seed. An even seed gives those of the next odd one.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend((random.number() | 1).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Has a mirror fetch what clients ask for, and nothing else: for tests that count what is here or what came over.
pub(crate) const ON_DEMAND: &str = "--fill=none";

/// A running `headwater`. Killed when it is dropped.
pub(crate) struct Daemon {
    child: Child,
    /// Kept open, so that the program can go on writing.
    _stdout: BufReader<ChildStdout>,
    uris: Vec<String>,
    log: PathBuf,
}

/// The program with its log going to a file, not started yet. All whose logs are in one directory have one runtime
/// directory and one directory for state there, and know of no others.
pub(crate) fn headwater(log: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.env("RUNTIME_DIRECTORY", log.with_file_name("run")).env("STATE_DIRECTORY", log.with_file_name("state"));
    let log = fs::File::options().create(true).append(true).open(log).unwrap();
    command.args(["--log-format=json", "--log-level=debug"]).stdout(Stdio::piped()).stderr(log);
    command
}

/// A mirror on a unix socket in `scratch`, with its cache there, not started yet; and where its log goes.
pub(crate) fn mirror_command(scratch: &Scratch, name: &str, upstream: &str) -> (PathBuf, Command) {
    let (log, socket) = (scratch.path(&format!("{name}.log")), scratch.path(&format!("{name}.sock")));
    let cache = scratch.path(&format!("{name}.cache"));
    let mut command = headwater(&log);
    command.args(["mirror", upstream]).arg("--cache").arg(cache).arg("--unix").arg(socket);
    (log, command)
}

/// Puts `program`, with its environment, at the end of the command line of `outer`, which is to start it.
pub(crate) fn append<'a>(outer: &'a mut Command, program: &Command) -> &'a mut Command {
    let variables = program.get_envs().filter_map(|(name, value)| Some((name, value?)));
    outer.arg(program.get_program()).args(program.get_args()).envs(variables)
}

impl Daemon {
    /// Starts the program and waits until it has printed the URIs of `exports` exports.
    pub(crate) fn start(mut command: Command, exports: usize, log: &Path) -> Self {
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let mut stdout = BufReader::new(child.stdout.take().unwrap());
        let mut uris = Vec::new();
        for _ in 0..exports {
            let mut line = String::new();
            stdout.read_line(&mut line).unwrap();
            if line.is_empty() {
                let status = child.wait().unwrap();
                panic!("{command:?} ended with {status}: {}", fs::read_to_string(log).unwrap_or_default());
            }
            uris.push(line.trim_end().to_owned());
        }
        Self { child, _stdout: stdout, uris, log: log.to_owned() }
    }

    /// Serves one image on a unix socket in `scratch`.
    pub(crate) fn serve(scratch: &Scratch, image: &Path, arguments: &[&str]) -> Self {
        let (log, socket) = (scratch.path("serve.log"), scratch.path("serve.sock"));
        let mut command = headwater(&log);
        command.arg("serve").arg(image).arg("--unix").arg(socket).args(arguments);
        Self::start(command, 1, &log)
    }

    /// Mirrors one URI on a unix socket in `scratch`, with its cache there.
    pub(crate) fn mirror(scratch: &Scratch, upstream: &str, arguments: &[&str]) -> Self {
        Self::mirror_named(scratch, "mirror", upstream, arguments)
    }

    /// As [`Self::mirror`], for several in one directory.
    pub(crate) fn mirror_named(scratch: &Scratch, name: &str, upstream: &str, arguments: &[&str]) -> Self {
        let (log, mut command) = mirror_command(scratch, name, upstream);
        command.args(arguments);
        Self::start(command, 1, &log)
    }

    pub(crate) fn uri(&self) -> &str {
        &self.uris[0]
    }

    pub(crate) fn uris(&self) -> &[String] {
        &self.uris
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, name: &str) {
        run(Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()));
    }

    /// Ends the program as an operator would, and gives back its log.
    pub(crate) fn stop(mut self) -> Log {
        self.signal("TERM");
        let status = self.wait();
        assert!(status.success(), "it ended with {status}: {}", self.log_text());
        Log::read(&self.log)
    }

    /// Ends the program as a power cut would, as far as a program can tell.
    pub(crate) fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end: {}", self.log_text());
            std::thread::yield_now();
        }
    }

    pub(crate) fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until the log has a line with `text` in it.
    pub(crate) fn wait_for_log(&self, text: &str) {
        eventually(&format!("{text:?} in the log"), || self.log_text().contains(text));
    }

    /// Memory that the program has now, in KiB.
    pub(crate) fn resident_kib(&self) -> u64 {
        resident_kib(self.pid())
    }
}

/// Memory that a process has now, in KiB; none if it has ended.
pub(crate) fn resident_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.map_or(0, |rest| rest.split_whitespace().next().unwrap().parse().unwrap())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- {}\n{}", self.log.display(), self.log_text());
        }
    }
}

/// What a program has logged.
pub(crate) struct Log(Vec<serde_json::Value>);

impl Log {
    pub(crate) fn read(path: &Path) -> Self {
        let text = fs::read_to_string(path).unwrap();
        Self(text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("{line}"))).collect())
    }

    /// The sum of a field over all lines with this message.
    pub(crate) fn sum(&self, message: &str, field: &str) -> u64 {
        self.lines(message).map(|line| line[field].as_u64().unwrap()).sum()
    }

    /// Bytes of images that clients were sent under their names. Manifests and profiles, which lie beside them, do not
    /// count.
    pub(crate) fn sent(&self) -> u64 {
        let is_image = |line: &&serde_json::Value| !line["export"].as_str().unwrap().contains('@');
        self.lines("client left").filter(is_image).map(|line| line["read_bytes"].as_u64().unwrap()).sum()
    }

    pub(crate) fn lines(&self, message: &str) -> impl Iterator<Item = &serde_json::Value> {
        self.0.iter().filter(move |line| line["message"] == message)
    }
}

/// Runs a command that must succeed and gives back its output. A program that is not there fails the test.
pub(crate) fn run(command: &mut Command) -> String {
    let output = output(command);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Runs a command that must fail and gives back what it complained.
pub(crate) fn run_failing(command: &mut Command) -> String {
    let output = output(command);
    assert!(!output.status.success(), "{command:?} succeeded");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn output(command: &mut Command) -> Output {
    command.stdin(Stdio::null());
    command.output().unwrap_or_else(|error| panic!("{command:?}: {error}: is it installed? tools/test does that"))
}

/// libnbd's shell, which needs the system's own Python.
pub(crate) fn nbdsh_command() -> Command {
    let mut command = Command::new("nbdsh");
    command.env("PATH", "/usr/bin:/bin");
    command
}

/// Runs a script of libnbd's shell against an export that it finds as `h`, and gives back what it prints.
pub(crate) fn nbdsh(uri: &str, script: &str) -> String {
    run(nbdsh_command().args(["-u", uri, "-c", script]))
}

/// Asks again and again until it is so.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < deadline, "no {what}");
        std::thread::yield_now();
    }
}

/// Reads a file's bytes in a range.
pub(crate) fn bytes_of(path: &Path, start: u64, length: usize) -> Vec<u8> {
    use std::io::Seek;
    let mut file = fs::File::open(path).unwrap();
    file.seek(std::io::SeekFrom::Start(start)).unwrap();
    let mut bytes = vec![0; length];
    file.read_exact(&mut bytes).unwrap();
    bytes
}
