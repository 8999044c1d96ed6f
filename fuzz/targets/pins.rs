//! The pins of a mirror.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::mirror::pins::fuzz(data));
