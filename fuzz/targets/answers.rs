//! The replies of a server to requests in flight: cookies, order, coverage.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| headwater::nbd::client::fuzz(data));
