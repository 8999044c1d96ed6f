//! The requests of a client.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::nbd::request::fuzz(data));
