//! Profiles: files, and what other servers and mirrors send.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::fill::profile::fuzz(data));
