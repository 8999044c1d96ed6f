//! What the kernel says by netlink.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::agent::kernel::messages::fuzz(data));
