//! The heat of a mirror: what was used when, kept over a restart.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::mirror::policy::fuzz(data));
