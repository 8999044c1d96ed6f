//! What a monitor of qemu sends.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::agent::qmp::message::fuzz(data));
