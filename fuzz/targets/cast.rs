//! Datagrams of a cast, and the layouts that follow from them.

#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    headwater::cast::form::fuzz(data);
    headwater::cast::layout::fuzz(data);
});
