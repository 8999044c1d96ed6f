//! The first block of a manifest.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::manifest::fuzz(data));
