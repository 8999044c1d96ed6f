//! What a server tells a mirror.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::upstream::notices::fuzz(data));
