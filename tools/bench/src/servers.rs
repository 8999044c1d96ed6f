//! Servers and mirrors: how each is started, and when it is ready.

use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::ValueEnum;
use headwater::clock;
use load::children::{self, Cpus, Guard};

/// How long a server may take to listen.
const READY: Duration = Duration::from_secs(15);

/// A server of a raw file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Server {
    /// Ours.
    #[value(skip)]
    Headwater,
    /// Ours, built from something else: `--before`.
    #[value(skip)]
    Before,
    /// nbdkit with the file plugin.
    Nbdkit,
    /// The same with one thread.
    #[value(name = "nbdkit-t1")]
    NbdkitOneThread,
    /// qemu-nbd with io_uring.
    QemuNbd,
    /// The same with threads.
    QemuNbdThreads,
    /// nbd-server, the oldest.
    #[value(name = "nbd-server")]
    Classic,
    /// The same with splice.
    #[value(name = "nbd-server-splice")]
    ClassicSplice,
    /// The bare one, which is no peer.
    #[value(skip)]
    Limit,
    /// The bare one, with sendfile.
    #[value(skip)]
    LimitSendfile,
}

/// A server of what it fetches from another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mirror {
    /// Ours, with chunks of the default size.
    Headwater,
    /// Ours, with chunks as small as the requests.
    HeadwaterSmall,
    /// nbdkit with the cache filter.
    NbdkitCache,
    /// nbdkit with the copy-on-write filter, told to keep what is read.
    NbdkitCow,
    /// qemu-nbd with copy-on-read.
    QemuCopyOnRead,
    /// nbdkit that passes requests on and keeps nothing: no peer.
    Relay,
    /// The upstream itself: no peer.
    Direct,
}

/// How clients reach a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    Unix,
    Tcp,
    /// TCP, and TLS in it.
    Tls,
}

/// Programs that are needed beside the servers, with their Debian packages.
pub(crate) const TOOLS: [(&str, &str); 6] = [
    ("certtool", "gnutls-bin"),
    ("qemu-img", "qemu-utils"),
    ("fio", "fio"),
    ("nbdcopy", "libnbd-bin"),
    ("setpriv", "util-linux"),
    ("taskset", "util-linux"),
];

impl Server {
    /// All that are no part of this project.
    pub(crate) const PEERS: [Self; 6] =
        [Self::Nbdkit, Self::NbdkitOneThread, Self::QemuNbd, Self::QemuNbdThreads, Self::Classic, Self::ClassicSplice];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Headwater => "headwater",
            Self::Before => "headwater before",
            Self::Nbdkit => "nbdkit",
            Self::NbdkitOneThread => "nbdkit-t1",
            Self::QemuNbd => "qemu-nbd",
            Self::QemuNbdThreads => "qemu-nbd-threads",
            Self::Classic => "nbd-server",
            Self::ClassicSplice => "nbd-server-splice",
            Self::Limit => "limit",
            Self::LimitSendfile => "limit-sendfile",
        }
    }

    /// The program and its Debian package, of a peer.
    pub(crate) const fn program(self) -> Option<(&'static str, &'static str)> {
        match self {
            Self::Headwater | Self::Before | Self::Limit | Self::LimitSendfile => None,
            Self::Nbdkit | Self::NbdkitOneThread => Some(("nbdkit", "nbdkit")),
            Self::QemuNbd | Self::QemuNbdThreads => Some(("qemu-nbd", "qemu-utils")),
            Self::Classic | Self::ClassicSplice => Some(("nbd-server", "nbd-server")),
        }
    }

    /// Starts it on `image`.
    pub(crate) fn start(self, programs: &Programs, place: Place, cpus: Cpus, image: &Path) -> anyhow::Result<Running> {
        let command = match self {
            Self::Headwater | Self::Before => {
                let program = if self == Self::Before { &programs.before } else { &programs.headwater };
                let mut command = children::command(cpus, program);
                command.args(["--log-level", "warn", "serve"]).arg(named(image));
                place.listen(command, ["--unix", "--listen"])
            }
            Self::Nbdkit => place.nbdkit(cpus, &[]).args(["file"]).arg(image),
            Self::NbdkitOneThread => place.nbdkit(cpus, &["-t", "1"]).args(["file"]).arg(image),
            Self::QemuNbd => place.qemu_nbd(cpus).args(["-f", "raw", "--aio=io_uring"]).arg(image),
            Self::QemuNbdThreads => place.qemu_nbd(cpus).args(["-f", "raw", "--aio=threads"]).arg(image),
            Self::Classic => place.nbd_server(cpus, image, "")?,
            Self::ClassicSplice => place.nbd_server(cpus, image, "splice = true\n")?,
            Self::Limit => place.limit(programs, cpus, image),
            Self::LimitSendfile => place.limit(programs, cpus, image).arg("--sendfile"),
        };
        Running::wait_for(command, place, self.name())
    }
}

impl Mirror {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Headwater => "headwater mirror",
            Self::HeadwaterSmall => "headwater mirror, 4K chunks",
            Self::NbdkitCache => "nbdkit-cache",
            Self::NbdkitCow => "nbdkit-cow",
            Self::QemuCopyOnRead => "qemu-nbd copy-on-read",
            Self::Relay => "relay",
            Self::Direct => "direct",
        }
    }

    /// Starts it with an empty cache above `upstream`; `None` for the upstream itself.
    pub(crate) fn start(
        self,
        programs: &Programs,
        place: Place,
        cpus: Cpus,
        upstream: &str,
    ) -> anyhow::Result<Option<Running>> {
        let from = format!("uri={upstream}");
        let command = match self {
            Self::Headwater => place.mirror(programs, cpus, upstream, &[]),
            Self::HeadwaterSmall => place.mirror(programs, cpus, upstream, &["--chunk-size", "4K"]),
            Self::NbdkitCache => {
                place.nbdkit(cpus, &["--filter=cache"]).args(["nbd", &from, "shared=true", "cache-on-read=true"])
            }
            Self::NbdkitCow => {
                place.nbdkit(cpus, &["--filter=cow"]).args(["nbd", &from, "shared=true", "cow-on-read=true"])
            }
            Self::QemuCopyOnRead => place.copy_on_read(cpus, upstream)?,
            Self::Relay => place.nbdkit(cpus, &[]).args(["nbd", &from, "shared=true"]),
            Self::Direct => return Ok(None),
        };
        Running::wait_for(command, place, self.name()).map(Some)
    }
}

/// An upstream whose reads take `delay` longer than they must, as nbdkit writes it.
pub(crate) fn upstream(place: Place, cpus: Cpus, image: &Path, delay: Option<&str>) -> anyhow::Result<Running> {
    let filter: &[&str] = if delay.is_some() { &["-r", "--filter=delay"] } else { &["-r"] };
    // As many requests at a time as a delay needs in order not to be a bound on throughput.
    let threads: &[&str] = if delay.is_some() { &["-t", "256"] } else { &[] };
    let mut command = place.nbdkit(cpus, &[filter, threads].concat()).args(["file"]).arg(image);
    if let Some(delay) = delay {
        command = command.arg(format!("rdelay={delay}"));
    }
    Running::wait_for(command, place, "nbdkit as an upstream")
}

/// The programs that are ours.
#[derive(Debug)]
pub(crate) struct Programs {
    pub(crate) headwater: PathBuf,
    /// The one of [`Server::Before`]; the same if none was named.
    pub(crate) before: PathBuf,
    /// This one, which is also the load generator and the bare server.
    pub(crate) own: PathBuf,
}

/// The name that each server gives the image, where it can.
const EXPORT: &str = "image";

fn named(image: &Path) -> String {
    format!("{EXPORT}={}", image.display())
}

/// Where a server listens and may keep files.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    directory: PathBuf,
    transport: Transport,
    port: u16,
}

/// [`Command`] with builder methods that take it by value.
struct Words(Command);

impl Words {
    fn arg(mut self, word: impl AsRef<std::ffi::OsStr>) -> Self {
        self.0.arg(word);
        self
    }

    fn args<const N: usize>(mut self, words: [&str; N]) -> Self {
        self.0.args(words);
        self
    }
}

impl Place {
    /// In an empty `directory`, for one server.
    pub(crate) fn new(directory: PathBuf, transport: Transport) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        let port = match transport {
            Transport::Unix => 0,
            // Free now, which is the best that can be had for servers that cannot choose one themselves.
            Transport::Tcp | Transport::Tls => std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port(),
        };
        if transport == Transport::Tls {
            make_certificates(&directory)?;
        }
        Ok(Self { directory, transport, port })
    }

    /// Where the certificates are, of clients too.
    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn uri(&self) -> String {
        match self.transport {
            Transport::Unix => format!("nbd+unix:///{EXPORT}?socket={}", self.file("socket").display()),
            Transport::Tcp => format!("nbd://127.0.0.1:{}/{EXPORT}", self.port),
            Transport::Tls => {
                let certificates = self.directory.display();
                format!("nbds://localhost:{}/{EXPORT}?tls-certificates={certificates}", self.port)
            }
        }
    }

    fn is_up(&self) -> bool {
        match self.transport {
            Transport::Unix => UnixStream::connect(self.file("socket")).is_ok(),
            Transport::Tcp | Transport::Tls => TcpStream::connect(("127.0.0.1", self.port)).is_ok(),
        }
    }

    fn listen(&self, command: Command, [unix, tcp]: [&str; 2]) -> Words {
        let words = Words(command);
        match self.transport {
            Transport::Unix => words.arg(unix).arg(self.file("socket")),
            // Only our bare server's option takes a port alone.
            Transport::Tcp if tcp == "--tcp" => words.arg(tcp).arg(self.port.to_string()),
            Transport::Tcp => words.arg(tcp).arg(format!("127.0.0.1:{}", self.port)),
            Transport::Tls => words
                .arg(tcp)
                .arg(format!("127.0.0.1:{}", self.port))
                .arg("--tls-certificates")
                .arg(&self.directory)
                .arg("--tls-verify-peer"),
        }
    }

    fn limit(&self, programs: &Programs, cpus: Cpus, image: &Path) -> Words {
        let mut command = children::command(cpus, &programs.own);
        command.arg("limit").arg(image);
        self.listen(command, ["--unix", "--tcp"])
    }

    fn nbdkit(&self, cpus: Cpus, options: &[&str]) -> Words {
        let mut command = children::command(cpus, "nbdkit");
        // Its caches are temporary files.
        command.env("TMPDIR", &self.directory).arg("-f").args(options);
        let words = Words(command);
        match self.transport {
            Transport::Unix => words.arg("-U").arg(self.file("socket")),
            Transport::Tcp => words.args(["-i", "127.0.0.1", "-p"]).arg(self.port.to_string()),
            Transport::Tls => words
                .args(["-i", "127.0.0.1", "--tls=require", "--tls-verify-peer", "-p"])
                .arg(self.port.to_string())
                .arg(format!("--tls-certificates={}", self.directory.display())),
        }
    }

    fn qemu_nbd(&self, cpus: Cpus) -> Words {
        let words = Words(children::command(cpus, "qemu-nbd")).args(["-t", "-e", "128", "-x", EXPORT]);
        match self.transport {
            Transport::Unix => words.arg("-k").arg(self.file("socket")),
            Transport::Tcp => words.args(["-b", "127.0.0.1", "-p"]).arg(self.port.to_string()),
            Transport::Tls => {
                let options = "endpoint=server,verify-peer=on";
                let credentials = format!("tls-creds-x509,id=t,{options},dir={}", self.directory.display());
                words
                    .args(["-b", "127.0.0.1", "--tls-creds", "t", "--object"])
                    .arg(credentials)
                    .arg("-p")
                    .arg(self.port.to_string())
            }
        }
    }

    /// nbd-server serves several clients only as a daemon. A namespace of processes keeps it with us.
    fn nbd_server(&self, cpus: Cpus, image: &Path, extra: &str) -> anyhow::Result<Words> {
        let listen = match self.transport {
            Transport::Unix => format!("unixsock = {}", self.file("socket").display()),
            Transport::Tcp | Transport::Tls => format!("listenaddr = 127.0.0.1\nport = {}", self.port),
        };
        let image = image.display();
        let text = format!("[generic]\n{listen}\nallowlist = true\n[{EXPORT}]\nexportname = {image}\n{extra}");
        std::fs::write(self.file("nbd-server.conf"), text)?;
        let words = Words(children::command(cpus, "unshare")).args(["--pid", "--fork", "--kill-child", "sh", "-c"]);
        let words = words.args(["nbd-server -C \"$1\" -p \"$2\"; exec tail -f /dev/null", "sh"]);
        Ok(words.arg(self.file("nbd-server.conf")).arg(self.file("nbd-server.pid")))
    }

    fn mirror(&self, programs: &Programs, cpus: Cpus, upstream: &str, options: &[&str]) -> Words {
        let mut command = children::command(cpus, &programs.headwater);
        command.args(["--log-level", "warn", "mirror"]).arg(format!("{EXPORT}={upstream}"));
        command.arg("--cache").arg(self.file("cache")).args(options);
        self.listen(command, ["--unix", "--listen"])
    }

    fn copy_on_read(&self, cpus: Cpus, upstream: &str) -> anyhow::Result<Words> {
        let overlay = self.file("overlay.qcow2");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", upstream]).arg(&overlay);
        ensure!(create.status().context("starting qemu-img")?.success(), "qemu-img cannot make an overlay");
        let options = "driver=copy-on-read,file.driver=qcow2,file.file.driver=file,file.file.aio=io_uring";
        let words = self.qemu_nbd(cpus).arg("--image-opts");
        Ok(words.arg(format!("{options},file.file.filename={}", overlay.display())))
    }
}

/// An authority, a server for `localhost` and a client, made by GnuTLS as operators make them.
fn make_certificates(directory: &Path) -> anyhow::Result<()> {
    const SIGNED: [(&str, &str); 3] = [
        ("ca", "cn = authority\nca\ncert_signing_key\n"),
        (
            "server",
            "cn = server\ndns_name = localhost\nip_address = 127.0.0.1\ntls_www_server\nencryption_key\nsigning_key\n",
        ),
        ("client", "cn = client\ntls_www_client\nencryption_key\nsigning_key\n"),
    ];
    let file = |name: String| directory.join(name);
    let certtool = |words: &mut dyn FnMut(&mut Command)| -> anyhow::Result<()> {
        let mut command = Command::new("certtool");
        words(&mut command);
        let output = command.output().context("starting certtool")?;
        ensure!(output.status.success(), "certtool: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    };
    for (name, template) in SIGNED {
        let (key, info) = (file(format!("{name}-key.pem")), file(format!("{name}.info")));
        std::fs::write(&info, template)?;
        certtool(&mut |command| {
            command.args(["--generate-privkey", "--key-type=rsa", "--bits=2048", "--outfile"]).arg(&key);
        })?;
        certtool(&mut |command| {
            if name == "ca" {
                command.arg("--generate-self-signed");
            } else {
                command.args(["--generate-certificate", "--load-ca-certificate"]).arg(file("ca-cert.pem".into()));
                command.arg("--load-ca-privkey").arg(file("ca-key.pem".into()));
            }
            command.arg("--load-privkey").arg(&key).arg("--template").arg(&info);
            command.arg("--outfile").arg(file(format!("{name}-cert.pem")));
        })?;
    }
    Ok(())
}

/// A server that accepts clients. Killed when it is dropped, and its files removed.
#[derive(Debug)]
pub(crate) struct Running {
    // Dropped in this order: the server ends before its files go.
    guard: Guard,
    place: Place,
    _files: Files,
}

/// A directory that is removed when this is dropped.
#[derive(Debug)]
struct Files(PathBuf);

impl Drop for Files {
    fn drop(&mut self) {
        // What cannot be removed now goes with the scratch directory.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Running {
    fn wait_for(command: Words, place: Place, name: &str) -> anyhow::Result<Self> {
        let log = place.file("log");
        let files = Files(place.directory.clone());
        let mut running = Self { guard: Guard::spawn(command.0, &log)?, place, _files: files };
        let deadline = clock::now() + READY;
        while !running.place.is_up() {
            let ended = running.guard.ended()?;
            if ended.is_some() || clock::now() > deadline {
                let said = std::fs::read_to_string(&log).unwrap_or_default();
                bail!("{name} does not come up: {}", said.trim());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(running)
    }

    pub(crate) fn uri(&self) -> String {
        self.place.uri()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.guard.pid()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(command: &Words) -> String {
        command.0.get_args().map(|word| word.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn servers_listen_where_clients_are_sent() {
        let directory = tempfile::tempdir().unwrap();
        let place = |transport| Place { directory: directory.path().to_owned(), transport, port: 4711 };
        let (unix, tcp) = (place(Transport::Unix), place(Transport::Tcp));
        let socket = directory.path().join("socket").display().to_string();
        assert!(unix.uri().ends_with(&format!("?socket={socket}")));
        assert_eq!(tcp.uri(), "nbd://127.0.0.1:4711/image");
        assert!(words(&unix.nbdkit(Cpus::One, &[])).ends_with(&format!("nbdkit -f -U {socket}")));
        assert!(words(&tcp.nbdkit(Cpus::One, &["-t", "1"])).ends_with("nbdkit -f -t 1 -i 127.0.0.1 -p 4711"));
        let command = || Command::new("x");
        assert_eq!(words(&tcp.listen(command(), ["--unix", "--listen"])), "--listen 127.0.0.1:4711");
        assert_eq!(words(&tcp.listen(command(), ["--unix", "--tcp"])), "--tcp 4711");
    }

    #[test]
    fn a_server_that_does_not_come_up_says_why() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::new(directory.path().join("place"), Transport::Unix).unwrap();
        let command = Words(children::command(Cpus::Free, "sh")).args(["-c", "echo no such disk; exit 3"]);
        let error = Running::wait_for(command, place, "a server").unwrap_err();
        assert_eq!(error.to_string(), "a server does not come up: no such disk");
    }
}
