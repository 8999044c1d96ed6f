//! The orders of a server.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::fill::orders::form::fuzz(data));
