//! A server's side of the handshake, as our client reads it.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::nbd::handshake::client::fuzz(data));
