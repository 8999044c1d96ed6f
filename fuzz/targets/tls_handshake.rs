//! What a client may send instead of a TLS handshake.

#![no_main]

use std::sync::LazyLock;

use headwater::tls::Clients;

/// A server with a certificate of its own making.
static CLIENTS: LazyLock<Clients> = LazyLock::new(|| {
    let directory = std::env::temp_dir().join(format!("headwater-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory for certificates");
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).expect("a certificate");
    std::fs::write(directory.join("server-cert.pem"), made.cert.pem()).expect("writing a certificate");
    std::fs::write(directory.join("server-key.pem"), made.signing_key.serialize_pem()).expect("writing a key");
    let clients = Clients::load(&directory, false).expect("certificates that were just made");
    let _ = std::fs::remove_dir_all(directory);
    clients
});

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::tls::fuzz_handshake(&CLIENTS, data));
