//! TLS: other people's clients against us, us against other people's servers, and whoever is not who he should be.

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use headwater::nbd::Uri;
use headwater::nbd::uri::Address;
use headwater::nbd::wire::{option, option_reply};

use crate::support::certificates::{Authority, Kind, secured};
use crate::support::client::{Client, FLAGS, Socket, option, reply};
use crate::support::peers::Peer;
use crate::support::{Daemon, Scratch, eventually, headwater, nbdsh_command, noise, run, run_failing};

const MIB: u64 = 1 << 20;

fn greeted(uri: &str) -> Socket {
    let mut socket = Socket::connect(&uri.replacen("nbds", "nbd", 1));
    socket.read_exact(&mut [0; 18]).unwrap();
    socket
}

/// Serves `image` with these certificates.
fn served(scratch: &Scratch, image: &Path, directory: &Path, more: &[&str]) -> Daemon {
    let directory = format!("--tls-certificates={}", directory.display());
    Daemon::serve(scratch, image, &[&[directory.as_str()], more].concat())
}

fn info(uri: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_headwater"));
    command.args(["info", uri]);
    command
}

/// qemu's way to name an export with TLS.
fn qemu(command: &str, uri: &str, directory: &Path, name: &str) -> Command {
    let server = match uri.parse::<Uri>().unwrap().address {
        Address::Unix(path) => format!("server.type=unix,server.path={}", path.display()),
        Address::Tcp { host, port } => format!("server.type=inet,server.host={host},server.port={port}"),
    };
    let mut program = Command::new(command);
    let (credentials, image) = (
        format!("tls-creds-x509,id=t,dir={},endpoint=client", directory.display()),
        format!("driver=nbd,{server},export=image,tls-creds=t,tls-hostname={name}"),
    );
    match command {
        "qemu-img" => program.args(["info", "--object", &credentials, "--image-opts", &image]),
        _ => program.args(["--object", &credentials, "--image-opts", &image]),
    };
    program
}

#[test]
fn libnbd_and_qemu_read_and_write() {
    let scratch = Scratch::new();
    let bytes = noise(40 << 20, 1);
    let image = scratch.file("image.raw", &bytes);
    let directory = Authority::new().directory(&scratch, "pki", Kind::default());
    let server = served(&scratch, &image, &directory, &["--tls-verify-peer"]);
    assert!(server.uri().starts_with("nbds+unix:"), "{}", server.uri());
    let uri = secured(server.uri(), &directory);
    let shown = run(Command::new("nbdinfo").arg(&uri));
    assert!(shown.contains("with TLS, using structured packets"), "{shown}");
    let copy = scratch.path("copy.raw");
    run(Command::new("nbdcopy").args(["--connections=4", "--requests=64", &uri]).arg(&copy));
    run(Command::new("cmp").arg(&image).arg(&copy));
    // Back over it, from elsewhere: longer writes than fit a record, or a buffer.
    let other = scratch.file("other.raw", &noise(40 << 20, 9));
    run(Command::new("nbdcopy").args(["--request-size=33554432", "--flush"]).arg(&other).arg(&uri));
    run(Command::new("cmp").arg(&image).arg(&other));
    let shown = run(&mut qemu("qemu-img", server.uri(), &directory, "localhost"));
    assert!(shown.contains("virtual size: 40 MiB"), "{shown}");
    run(qemu("qemu-io", server.uri(), &directory, "localhost").args([
        "-c",
        "write -P 7 1k 33M",
        "-c",
        "read -P 7 1k 33M",
        "-c",
        "aio_write -P 8 5M 1M",
        "-c",
        "aio_flush",
        "-c",
        "read -P 8 5M 1M",
        "-c",
        "discard 6M 1M",
        "-c",
        "flush",
    ]));
    // As long as a request may be.
    let script = format!(
        "h.set_uri_allow_local_file(True)\n\
         h.connect_uri({uri:?})\n\
         data = bytearray(range(256)) * (32 * 4096)\n\
         h.pwrite(data, 77)\n\
         assert h.pread(32 << 20, 77) == data\n\
         print(h.get_tls_negotiated())"
    );
    assert_eq!(run(nbdsh_command().args(["-c", &script])).trim(), "True");
    let log = server.stop();
    assert_eq!(log.sum("client left", "errors"), 0);
}

#[test]
fn who_is_not_who_he_should_be_gets_nothing() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let (authority, stranger) = (Authority::new(), Authority::new());
    let good = authority.directory(&scratch, "good", Kind::default());
    let expired = authority.directory(&scratch, "expired", Kind { expired: true, ..Kind::default() });
    let nobody = authority.directory(&scratch, "nobody", Kind { no_client: true, ..Kind::default() });
    let foreign = stranger.directory(&scratch, "foreign", Kind::default());
    // Knows the server, and is known by nobody.
    let forged = stranger.directory(&scratch, "forged", Kind::default());
    std::fs::copy(good.join("ca-cert.pem"), forged.join("ca-cert.pem")).unwrap();
    // By TCP: libnbd 1.14 verifies nobody on a unix socket.
    let server = served(&scratch, &image, &good, &["--tls-verify-peer", "--listen=127.0.0.1:0"]);
    let attempts = |directory: &PathBuf| {
        let uri = secured(server.uri(), directory);
        [
            run_failing(&mut info(&uri)),
            run_failing(Command::new("nbdcopy").args([&uri, "null:"])),
            run_failing(&mut qemu("qemu-img", server.uri(), directory, "localhost")),
        ]
    };
    for directory in [&nobody, &forged, &expired, &foreign] {
        attempts(directory);
    }
    assert!(attempts(&nobody)[0].contains("requires a client certificate"), "{}", attempts(&nobody)[0]);
    assert!(attempts(&foreign)[0].contains("UnknownIssuer"), "{}", attempts(&foreign)[0]);
    // Nobody is served by another name than that of the certificate.
    let uri = secured(server.uri(), &good);
    let other = uri.replace("tls-hostname=localhost", "tls-hostname=other.example");
    assert!(run_failing(&mut info(&other)).contains("not valid for name"), "{other}");
    run_failing(&mut qemu("qemu-img", server.uri(), &good, "other.example"));
    let log = server.log_text();
    assert!(!log.contains("client connected"), "{log}");
    run(&mut info(&uri));
    for reason in ["shows no certificate", "UnknownIssuer", "expired"] {
        assert!(log.contains(reason), "{reason}: {log}");
    }
}

#[test]
fn a_server_with_a_bad_certificate_is_used_by_nobody() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let authority = Authority::new();
    let good = authority.directory(&scratch, "good", Kind::default());
    for (name, kind, reason) in [
        ("expired", Kind { expired: true, ..Kind::default() }, "xpired"),
        ("other", Kind { other_host: true, ..Kind::default() }, "not valid for name"),
    ] {
        let (here, directory) = (Scratch::new(), authority.directory(&scratch, name, kind));
        let server = served(&here, &image, &directory, &["--listen=127.0.0.1:0"]);
        let uri = secured(server.uri(), &good);
        assert!(run_failing(&mut info(&uri)).contains(reason), "{name}");
        run_failing(Command::new("nbdcopy").args([&uri, "null:"]));
        run_failing(&mut qemu("qemu-img", server.uri(), &good, "localhost"));
        assert_eq!(server.log_text().contains("has expired"), kind.expired);
    }
}

#[test]
fn without_tls_there_is_nothing_where_it_is_required() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let directory = Authority::new().directory(&scratch, "pki", Kind::default());
    let server = served(&scratch, &image, &directory, &[]);
    let plain = server.uri().replacen("nbds", "nbd", 1);
    assert!(run_failing(&mut info(&plain)).contains("requires TLS: name it by nbds://"));
    run_failing(Command::new("nbdinfo").arg(&plain));
    run_failing(Command::new("qemu-img").args(["info", &plain]));
    let mut socket = greeted(&plain);
    socket.write_all(&FLAGS).unwrap();
    for number in [option::LIST, option::INFO, option::GO, option::STRUCTURED_REPLY, option::SET_META_CONTEXT, 77] {
        socket.write_all(&option(number, b"")).unwrap();
        assert_eq!(reply(&mut socket).0, option_reply::ERR_TLS_REQD, "option {number}");
    }
    socket.write_all(&option(option::EXPORT_NAME, b"image")).unwrap();
    assert!(socket.is_closed_by_peer());
    // Where it is allowed, both are served.
    let both = Scratch::new();
    let server = served(&both, &image, &directory, &["--tls=allow"]);
    run(Command::new("nbdcopy").args([server.uri(), "null:"]));
    run(Command::new("nbdcopy").args([&secured(server.uri(), &directory), "null:"]));
    // And without it nobody falls back.
    let none = Scratch::new();
    let server = Daemon::serve(&none, &image, &[]);
    let uri = secured(server.uri(), &directory);
    assert!(run_failing(&mut info(&uri)).contains("does not offer TLS"));
    let bare = uri.split("&tls-certificates").next().unwrap();
    assert!(run_failing(&mut info(bare)).contains("no certificates to verify it with"), "{bare}");
}

#[test]
fn bytes_that_were_put_before_tls_are_refused() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let directory = Authority::new().directory(&scratch, "pki", Kind::default());
    let server = served(&scratch, &image, &directory, &["--tls=allow"]);
    let start = option(option::STARTTLS, b"");
    // In one piece with STARTTLS, also when it is a whole option: not even an answer.
    for injected in [option(option::LIST, b""), b"I".to_vec(), b"\x16\x03\x01".to_vec()] {
        let mut socket = greeted(server.uri());
        socket.write_all(&[&FLAGS[..], &start, &injected].concat()).unwrap();
        assert!(socket.is_closed_by_peer());
    }
    // After the answer: it is taken for TLS, which it is not, and answered with nothing but an alert.
    for injected in [option(option::LIST, b""), option(option::EXPORT_NAME, b"image")] {
        let mut socket = greeted(server.uri());
        socket.write_all(&[&FLAGS[..], &start].concat()).unwrap();
        assert_eq!(reply(&mut socket).0, option_reply::ACK);
        socket.write_all(&injected).unwrap();
        assert!(socket.is_closed_by_peer());
    }
    // A handshake that ends in the middle.
    let mut socket = greeted(server.uri());
    socket.write_all(&[&FLAGS[..], &start].concat()).unwrap();
    assert_eq!(reply(&mut socket).0, option_reply::ACK);
    socket.write_all(b"\x16\x03\x01\x02\x00\x01\x00").unwrap();
    socket.half_close();
    assert!(socket.is_closed_by_peer());
    run(&mut info(&secured(server.uri(), &directory)));
    server.wait_for_log("bytes between STARTTLS and TLS");
    server.wait_for_log("what came is not TLS");
}

#[test]
fn a_handshake_that_does_not_go_on_ends_with_its_time() {
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let directory = Authority::new().directory(&scratch, "pki", Kind::default());
    let server = served(&scratch, &image, &directory, &["--handshake-timeout=0.3"]);
    let mut sockets: Vec<_> = (0..20).map(|_| greeted(server.uri())).collect();
    for socket in &mut sockets {
        socket.write_all(&[&FLAGS[..], &option(option::STARTTLS, b"")].concat()).unwrap();
        assert_eq!(reply(socket).0, option_reply::ACK);
        socket.write_all(b"\x16\x03\x01\x02\x00\x01\x00").unwrap();
    }
    assert!(sockets.iter_mut().all(Socket::is_closed_by_peer));
    assert_eq!(server.log_text().matches("the negotiation took too long").count(), 20);
}

#[test]
fn nbdkit_and_qemu_nbd_are_upstreams_by_tls() {
    let scratch = Scratch::new();
    let bytes = noise(20 << 20, 1);
    let image = scratch.file("image.raw", &bytes);
    let directory = Authority::new().directory(&scratch, "pki", Kind::default());
    let stranger = Authority::new().directory(&scratch, "stranger", Kind::default());
    let credentials = format!("tls-creds-x509,id=t,dir={},endpoint=server,verify-peer=on", directory.display());
    let certificates = format!("--tls-certificates={}", directory.display());
    let file = image.to_str().unwrap();
    let nbdkit = || Peer::nbdkit(&scratch, &["-r", "--tls=require", "--tls-verify-peer", &certificates, "file", file]);
    let qemu = || {
        let arguments =
            ["--read-only", "--format=raw", "--shared=8", "--object", &credentials, "--tls-creds=t", "--export-name=x"];
        Peer::qemu_nbd(&scratch, &image, &arguments)
    };
    for (peer, export) in [(nbdkit(), ""), (qemu(), "x")] {
        let uri = secured(&peer.uri().replacen(":///", &format!(":///{export}"), 1), &directory);
        let here = Scratch::new();
        let mirror = Daemon::mirror(&here, &format!("m={uri}"), &[]);
        let mut client = Client::open(mirror.uri());
        assert!(client.read(12_345, 6 * MIB) == bytes[12_345..12_345 + (6 << 20)]);
        assert!(client.read(0, 20 * MIB) == bytes);
        client.disconnect();
        assert_eq!(mirror.stop().sum("client left", "errors"), 0);
        assert!(run_failing(&mut info(&secured(peer.uri(), &stranger))).contains("UnknownIssuer"));
        let other = uri.replace("tls-hostname=localhost", "tls-hostname=other.example");
        assert!(run_failing(&mut info(&other)).contains("not valid for name"));
    }
}

#[test]
fn mirrors_reach_mirrors_and_clients_by_tls() {
    let scratch = Scratch::new();
    let bytes = noise(20 << 20, 1);
    let image = scratch.file("image.raw", &bytes);
    let directory = Authority::new().directory(&scratch, "pki", Kind::default());
    let server = served(&scratch, &image, &directory, &["--tls-verify-peer", "--read-only"]);
    let bare = format!("{}&tls-hostname=localhost", server.uri());
    let certificates = format!("--tls-certificates={}", directory.display());
    // The flag serves both roles.
    let first = Daemon::mirror_named(&scratch, "first", &bare, &[&certificates, "--tls-verify-peer"]);
    let second = Daemon::mirror_named(&scratch, "second", &secured(first.uri(), &directory), &[]);
    let mut client = Client::open(second.uri());
    assert!(client.read(0, 20 * MIB) == bytes);
    let status = || {
        let mut command = headwater(&scratch.path("first.log"));
        let socket = scratch.path("run").join(format!("{}.sock", first.pid()));
        let text = run(command.args(["status", "--json", "--at"]).arg(socket));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    eventually("client that is known by its certificate", || {
        let status = status();
        let clients = status["clients"].as_array().unwrap();
        !clients.is_empty()
            && clients.iter().all(|client| client["tls"] == true && client["tls_names"][0] == "host7.example")
    });
    drop(client);
    assert_eq!(second.stop().sum("client left", "errors"), 0);
    assert_eq!(first.stop().sum("client left", "errors"), 0);
}

#[test]
fn nbd_client_speaks_another_version() {
    // Debian's nbd-client offers TLS 1.2 and nothing else (its priorities are built in): it must be told no, and not be
    // kept waiting.
    let scratch = Scratch::new();
    let image = scratch.file("image.raw", &noise(1 << 20, 1));
    let directory = Authority::new().directory(&scratch, "pki", Kind::default());
    let server = served(&scratch, &image, &directory, &["--listen=127.0.0.1:0"]);
    let port = server.uri().split("127.0.0.1:").nth(1).and_then(|rest| rest.split('/').next()).unwrap();
    let mut client = Command::new("nbd-client");
    client.args(["-l", "localhost", port]);
    run_failing(&mut client);
    for (flag, file) in [("-certfile", "client-cert"), ("-keyfile", "client-key"), ("-cacertfile", "ca-cert")] {
        client.arg(flag).arg(directory.join(format!("{file}.pem")));
    }
    run_failing(client.args(["-tlshostname", "localhost"]));
    server.wait_for_log("it speaks no TLS 1.3");
}
