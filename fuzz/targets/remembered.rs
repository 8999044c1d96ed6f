//! What a mirror remembers of its upstream.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::control::mirrors::remembered::fuzz(data));
