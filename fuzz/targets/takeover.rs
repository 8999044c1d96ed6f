//! The account of a server that is replaced, and what the two say to each other.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    headwater::control::takeover::fuzz(data);
    headwater::control::takeover::talk::fuzz(data);
});
