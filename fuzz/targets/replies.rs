//! The replies of a server, one by one.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::nbd::reply::fuzz(data));
