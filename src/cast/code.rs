//! Forward error correction of a block: Reed–Solomon.
//!
//! STUB

/// The parity symbols of a block: `count` of `symbol` bytes each, one after the other. `block` is filled up with zeroes to
/// whole symbols. The first of them are the same whatever `count` of the session's terms is asked for: always ask for all.
pub fn parity(block: &[u8], symbol: u16, count: u16) -> Vec<u8> {
    let _ = (block, symbol, count);
    unimplemented!()
}

/// Mends `data`, which is `symbols` symbols one after the other: those for which `has` is false are computed from the
/// others and from `parity` (indexes from 0 on, and bytes). `false`: there are too few.
pub fn mend(data: &mut [u8], symbol: u16, count: u16, has: impl Fn(u16) -> bool, parity: &[(u16, &[u8])]) -> bool {
    let _ = (data, symbol, count, has, parity);
    unimplemented!()
}
