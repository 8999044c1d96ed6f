//! A client's side of the handshake, as our server reads it.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::nbd::handshake::server::fuzz(data));
