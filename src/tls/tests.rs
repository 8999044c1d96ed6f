//! Handshakes and records against `rustls` at the other end, and against ourselves.

use std::fs;
use std::io::{IoSlice, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use bytes::{Buf, BytesMut};
use proptest::prelude::*;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};

use super::*;

/// A directory with an authority, a server's certificate for `localhost` and a client's.
pub(crate) struct Certificates {
    pub(crate) directory: tempfile::TempDir,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

impl Certificates {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Two are two.
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        params.distinguished_name.push(DnType::CommonName, format!("authority {number}"));
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let put = |name: &str, text: String| fs::write(directory.path().join(name), text).unwrap();
        put("ca-cert.pem", authority.pem());
        for (role, names) in [("server", vec!["localhost".to_owned()]), ("client", vec!["host7".to_owned()])] {
            let key = KeyPair::generate().unwrap();
            let mut params = CertificateParams::new(names).unwrap();
            params.distinguished_name.push(DnType::CommonName, format!("the {role}"));
            params.subject_alt_names.push(SanType::URI("spiffe://a/b".try_into().unwrap()));
            put(&format!("{role}-cert.pem"), params.signed_by(&key, &authority).unwrap().pem());
            put(&format!("{role}-key.pem"), key.serialize_pem());
        }
        Self { directory }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    fn roots(&self) -> rustls::RootCertStore {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(self.path().join("ca-cert.pem")).unwrap()).unwrap();
        roots
    }
}

/// Has two of ours shake hands, with `cut` bytes at a time.
fn shake(mut client: Handshake, mut server: Handshake, cut: usize) -> Result<(Session, Session), Failure> {
    let (mut to_client, mut to_server) = (BytesMut::new(), BytesMut::new());
    let (mut at_client, mut at_server) = (BytesMut::new(), BytesMut::new());
    let (mut client_done, mut server_done) = (false, false);
    for _ in 0..100_000 {
        if !client_done {
            client_done = client.advance(&mut at_client, &mut to_server)? == Progress::Finished;
        }
        if !server_done {
            server_done = server.advance(&mut at_server, &mut to_client)? == Progress::Finished;
        }
        if client_done && server_done {
            assert!(to_client.is_empty() && at_client.is_empty() && to_server.is_empty() && at_server.is_empty());
            return Ok((client.finish()?, server.finish()?));
        }
        let taken = to_server.len().min(cut);
        at_server.extend_from_slice(&to_server.split_to(taken));
        let taken = to_client.len().min(cut);
        at_client.extend_from_slice(&to_client.split_to(taken));
    }
    panic!("the handshake does not end");
}

fn pair(certificates: &Certificates) -> (Session, Session) {
    let client = ClientIdentity::load(certificates.path()).unwrap().handshake("localhost").unwrap();
    let server = Clients::load(certificates.path(), true).unwrap().handshake().unwrap();
    shake(client, server, 1000).unwrap()
}

/// Seals all of `plain`, in batches of `batch`.
fn seal(session: &mut Session, plain: &[u8], batch: usize) -> BytesMut {
    let (mut out, mut at) = (vec![0; batch], 0);
    let mut sealed = BytesMut::new();
    while at < plain.len() {
        let middle = plain.len() / 3;
        let parts = [IoSlice::new(&plain[..middle]), IoSlice::new(&[]), IoSlice::new(&plain[middle..])];
        let (taken, length) = session.seal(&parts, at, &mut out).unwrap();
        sealed.extend_from_slice(&out[..length]);
        at += taken;
    }
    sealed
}

/// Opens all whole records.
fn open(session: &mut Session, sealed: &mut BytesMut) -> Vec<u8> {
    let mut plain = Vec::new();
    while let Some(opened) = session.open(sealed).unwrap() {
        plain.extend_from_slice(&sealed[opened.content.clone()]);
        sealed.advance(opened.length);
    }
    plain
}

#[test]
fn two_of_ours_agree_and_know_each_other() {
    let certificates = Certificates::new();
    for cut in [1, 7, 100_000] {
        let client = ClientIdentity::load(certificates.path()).unwrap().handshake("localhost").unwrap();
        let server = Clients::load(certificates.path(), true).unwrap().handshake().unwrap();
        let (mut client, mut server) = shake(client, server, cut).unwrap();
        assert_eq!(server.peer_names(), ["host7", "spiffe://a/b", "the client"]);
        assert_eq!(client.peer_names(), ["localhost", "spiffe://a/b", "the server"]);
        let mut sealed = seal(&mut client, b"a question", 1000);
        assert_eq!(open(&mut server, &mut sealed), b"a question");
    }
}

#[test]
fn who_is_not_who_he_should_be_is_refused() {
    let (ours, foreign) = (Certificates::new(), Certificates::new());
    let server = || Clients::load(ours.path(), true).unwrap().handshake().unwrap();
    let failure = |client: Handshake| shake(client, server(), 9999).map(drop).unwrap_err().to_string();
    let other_name = ClientIdentity::load(ours.path()).unwrap().handshake("other.example").unwrap();
    assert!(failure(other_name).contains("not valid for name"), "another name");
    let stranger = ClientIdentity::load(foreign.path()).unwrap().handshake("localhost").unwrap();
    assert!(failure(stranger).contains("UnknownIssuer"), "another authority");
    let nobody = tempfile::tempdir().unwrap();
    fs::copy(ours.path().join("ca-cert.pem"), nobody.path().join("ca-cert.pem")).unwrap();
    let nobody = ClientIdentity::load(nobody.path()).unwrap();
    assert!(failure(nobody.handshake("localhost").unwrap()).contains("shows no certificate"), "no certificate");
    // Where none is required, it comes in without a name.
    let server = Clients::load(ours.path(), false).unwrap().handshake().unwrap();
    let (_, server) = shake(nobody.handshake("localhost").unwrap(), server, 9999).unwrap();
    assert!(server.peer_names().is_empty());
}

#[test]
fn the_peer_is_told_why_a_handshake_failed() {
    let certificates = Certificates::new();
    let mut server = Clients::load(certificates.path(), true).unwrap().handshake().unwrap();
    let (mut input, mut output) = (BytesMut::from(&b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00"[..]), BytesMut::new());
    assert!(matches!(server.advance(&mut input, &mut output), Err(Failure::Refused(_))));
    assert_eq!(output[0], 21, "an alert");
    let mut server = Clients::load(certificates.path(), true).unwrap().handshake().unwrap();
    let mut input = BytesMut::from(&b"IHAVEOPT\0\0\0\x01"[..]);
    assert_eq!(server.advance(&mut input, &mut output), Err(Failure::NotTls));
}

#[test]
fn certificates_that_cannot_be_used_are_refused_by_name() {
    let certificates = Certificates::new();
    let clients = Clients::load(certificates.path(), true).unwrap();
    assert!(clients.expires() > 0);
    let complaint = || clients.reload().map(drop).unwrap_err().to_string();
    fs::write(certificates.path().join("ca-cert.pem"), "").unwrap();
    assert!(complaint().contains("ca-cert.pem"), "{}", complaint());
    fs::write(certificates.path().join("server-key.pem"), "nonsense").unwrap();
    assert!(complaint().contains("server-key.pem"), "{}", complaint());
    fs::remove_file(certificates.path().join("server-cert.pem")).unwrap();
    assert!(complaint().contains("server-cert.pem"), "{}", complaint());
    // The old ones go on.
    assert!(clients.handshake().is_ok());
    assert!(ClientIdentity::load(Path::new("/nowhere")).unwrap_err().to_string().contains("ca-cert.pem"));
    let certificates = Certificates::new();
    fs::copy(certificates.path().join("client-key.pem"), certificates.path().join("server-key.pem")).unwrap();
    assert!(Clients::load(certificates.path(), true).is_err(), "another's key");
    let identity = ClientIdentity::load(certificates.path()).unwrap();
    assert!(identity.handshake("not a name").unwrap_err().to_string().contains("not a name"));
}

#[test]
fn a_session_goes_on_from_what_was_saved() {
    let certificates = Certificates::new();
    let (mut client, mut server) = pair(&certificates);
    for round in 0..3 {
        let text = format!("round {round}");
        let mut sealed = seal(&mut client, text.as_bytes(), 1000);
        assert_eq!(open(&mut server, &mut sealed), text.as_bytes());
        let mut sealed = seal(&mut server, text.as_bytes(), 1000);
        assert_eq!(open(&mut client, &mut sealed), text.as_bytes());
        let saved = serde_json::to_string(&server.save()).unwrap();
        server = Session::restore(serde_json::from_str(&saved).unwrap()).unwrap();
        assert_eq!(server.peer_names(), ["host7", "spiffe://a/b", "the client"]);
    }
    let shown = format!("{:?} {server:?}", server.save());
    assert!(!shown.contains("secret"), "{shown}");
    let mut broken = serde_json::to_value(server.save()).unwrap();
    broken["reads"]["secret"] = serde_json::json!([1, 2, 3]);
    assert!(Session::restore(serde_json::from_value(broken).unwrap()).is_err());
}

#[test]
fn records_that_were_touched_end_the_session() {
    let certificates = Certificates::new();
    let (mut client, server) = pair(&certificates);
    let mut sealed = seal(&mut client, b"a question", 1000);
    let again = || Session::restore(server.save()).unwrap();
    for at in 0..sealed.len() {
        let mut touched = sealed.clone();
        touched[at] ^= 1;
        let result = again().open(&mut touched);
        // A length that has grown is waited for.
        assert!(result.is_err() || (at == 4 && result == Ok(None)) || at == 3, "byte {at}: {result:?}");
    }
    let mut server = again();
    assert!(server.open(&mut sealed.clone()).is_ok());
    assert_eq!(server.open(&mut sealed), Err(RecordError::Forged), "again");
}

#[test]
fn the_end_is_told() {
    let certificates = Certificates::new();
    let (mut client, mut server) = pair(&certificates);
    let mut end = [0; 64];
    let length = client.seal_end(&mut end).unwrap();
    assert!(server.open(&mut end[..length]).unwrap().unwrap().is_end);
    let mut more = seal(&mut client, b"more", 1000);
    assert!(server.open(&mut more).unwrap().unwrap().is_end, "what comes behind it is nothing");
}

/// A `rustls` client that has shaken hands with a session of ours.
fn with_rustls(certificates: &Certificates, kx_cut: usize) -> (rustls::ClientConnection, Session) {
    let config = rustls::ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(certificates.roots())
        .with_no_client_auth();
    let name = ServerName::try_from("localhost").unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    client.set_buffer_limit(None);
    let mut server = Clients::load(certificates.path(), false).unwrap().handshake().unwrap();
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    loop {
        let mut sent = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut sent).unwrap();
        }
        let mut progress = Progress::NeedInput;
        for piece in sent.chunks(kx_cut) {
            input.extend_from_slice(piece);
            progress = server.advance(&mut input, &mut output).unwrap();
        }
        take(&mut client, &mut output);
        if progress == Progress::Finished {
            return (client, server.finish().unwrap());
        }
    }
}

/// Gives the client what was sealed, and what it reads there.
fn take(client: &mut rustls::ClientConnection, sealed: &mut BytesMut) -> Vec<u8> {
    let mut plain = Vec::new();
    while !sealed.is_empty() {
        let count = client.read_tls(&mut &sealed[..]).unwrap();
        sealed.advance(count);
        client.process_new_packets().unwrap();
        // It would wait for more, if it could.
        let _ = client.reader().read_to_end(&mut plain);
    }
    plain
}

#[test]
fn keys_are_updated_from_both_sides() {
    let certificates = Certificates::new();
    let (mut client, mut server) = with_rustls(&certificates, 999);
    for _ in 0..3 {
        client.refresh_traffic_keys().unwrap();
        client.writer().write_all(b"under new keys").unwrap();
        let mut sent = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut sent).unwrap();
        }
        assert_eq!(open(&mut server, &mut BytesMut::from(&sent[..])), b"under new keys");
        // It has asked for ours too, which comes with the next answer.
        let saved = server.save();
        let mut server_again = Session::restore(saved).unwrap();
        let mut answer = seal(&mut server_again, b"answered", 1000);
        assert_eq!(answer.len(), 8 + 5 + 2 * OVERHEAD);
        assert_eq!(take(&mut client, &mut answer), b"answered");
        server = server_again;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn what_rustls_says_and_hears_is_what_we_hear_and_say(
        messages in prop::collection::vec((any::<bool>(), 1..50_000usize), 1..6),
        cut in 1..20_000usize,
        batch in OVERHEAD + 6..40_000usize,
        seed in any::<u8>(),
    ) {
        let certificates = Certificates::new();
        let (mut client, mut server) = with_rustls(&certificates, cut);
        for (from_us, length) in messages {
            let plain: Vec<u8> = (0..=250).cycle().take(length).map(|byte: u8| byte ^ seed).collect();
            if from_us {
                let mut sealed = seal(&mut server, &plain, batch);
                prop_assert_eq!(take(&mut client, &mut sealed), plain);
            } else {
                client.writer().write_all(&plain).unwrap();
                let mut sent = Vec::new();
                while client.wants_write() {
                    client.write_tls(&mut sent).unwrap();
                }
                let (mut input, mut heard) = (BytesMut::new(), Vec::new());
                for piece in sent.chunks(cut) {
                    input.extend_from_slice(piece);
                    heard.extend(open(&mut server, &mut input));
                }
                prop_assert_eq!(heard, plain);
                prop_assert!(input.is_empty());
            }
        }
    }

    #[test]
    fn no_bytes_break_a_session_or_a_handshake(data in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzz_records(&data);
        let certificates = Certificates::new();
        fuzz_handshake(&Clients::load(certificates.path(), false).unwrap(), &data);
        let greeting = [b"\x16\x03\x01\x01\x00".as_slice(), &data].concat();
        fuzz_handshake(&Clients::load(certificates.path(), false).unwrap(), &greeting);
    }
}
