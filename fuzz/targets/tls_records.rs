//! Records of a TLS session: as they come, and with anything in them.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::tls::fuzz_records(data));
