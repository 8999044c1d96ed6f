//! The orders of a server to move its clients.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::control::redirect::file::fuzz(data));
