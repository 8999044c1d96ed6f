//! NBD URIs.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::nbd::uri::fuzz(data));
