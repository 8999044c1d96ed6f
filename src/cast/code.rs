//! Forward error correction of a block: Reed–Solomon.
//!
//! Over the field of 2^16 elements, with the fast Fourier transform of Lin, Chung and Han (*Novel polynomial basis and its
//! application to Reed–Solomon erasure codes*, FOCS 2014) as Leopard has it. Any so many symbols as the block has data make it
//! whole. Which bytes the parity has follows from the number of data symbols and that of parity symbols, so both are part of
//! the terms; a test holds the code to the bytes of version 1.
//!
//! Owns: the code. Does not own: which symbols are sent, and when a block is mended.

use reed_solomon_simd::{Error, ReedSolomonDecoder, ReedSolomonEncoder};

/// The parity symbols of a block: `count` of `symbol` bytes each, one after the other. `block` is filled up with zeroes to
/// whole symbols. The first of them are the same whatever `count` of the session's terms is asked for: always ask for all.
/// Empty if terms cannot be like that.
pub fn parity(block: &[u8], symbol: u16, count: u16) -> Vec<u8> {
    encode(block, usize::from(symbol), usize::from(count)).unwrap_or_default()
}

fn encode(block: &[u8], symbol: usize, count: usize) -> Result<Vec<u8>, Error> {
    if symbol == 0 {
        return Err(Error::InvalidShardSize { shard_bytes: symbol });
    }
    let mut encoder = ReedSolomonEncoder::new(block.len().div_ceil(symbol), count, symbol)?;
    let (whole, rest) = block.split_at(block.len() - block.len() % symbol);
    whole.chunks(symbol).try_for_each(|symbol| encoder.add_original_shard(symbol))?;
    if !rest.is_empty() {
        let mut last = rest.to_vec();
        last.resize(symbol, 0);
        encoder.add_original_shard(last)?;
    }
    let mut parity = Vec::with_capacity(count * symbol);
    encoder.encode()?.recovery_iter().for_each(|symbol| parity.extend_from_slice(symbol));
    Ok(parity)
}

/// Mends `data`, which is `symbols` symbols one after the other: those for which `has` is false are computed from the
/// others and from `parity` (indexes from 0 on, and bytes). `false`: there are too few.
pub fn mend(data: &mut [u8], symbol: u16, count: u16, has: impl Fn(u16) -> bool, parity: &[(u16, &[u8])]) -> bool {
    let symbols = data.len() / usize::from(symbol).max(1);
    let Ok(symbols) = u16::try_from(symbols) else { return false };
    let missing: Vec<u16> = (0..symbols).filter(|index| !has(*index)).collect();
    missing.is_empty() || decode(data, usize::from(symbol), usize::from(count), &missing, parity).is_ok()
}

/// Computes the symbols of `missing`, which are in order, from as many of parity.
fn decode(data: &mut [u8], symbol: usize, count: usize, missing: &[u16], parity: &[(u16, &[u8])]) -> Result<(), Error> {
    let mut decoder = ReedSolomonDecoder::new(data.len() / symbol, count, symbol)?;
    let mut lacks = missing.iter().copied().peekable();
    for (index, symbol) in data.chunks_exact(symbol).enumerate() {
        if lacks.next_if(|missing| usize::from(*missing) == index).is_none() {
            decoder.add_original_shard(index, symbol)?;
        }
    }
    // More would only be copied.
    for (index, symbol) in parity.iter().take(missing.len()) {
        decoder.add_recovery_shard(usize::from(*index), symbol)?;
    }
    for (index, bytes) in decoder.decode()?.restored_original_iter() {
        data[index * symbol..][..symbol].copy_from_slice(bytes);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn noise(length: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    }

    /// Encodes, loses the symbols of `lost`, and mends with parity symbols of `with`.
    fn mended(block: &[u8], symbol: u16, count: u16, lost: &BTreeSet<u16>, with: &[u16]) -> (bool, Vec<u8>, Vec<u8>) {
        let width = usize::from(symbol);
        let parity = parity(block, symbol, count);
        assert_eq!(parity.len(), width * usize::from(count));
        let mut whole = block.to_vec();
        whole.resize(block.len().next_multiple_of(width), 0);
        let mut data = whole.clone();
        for index in lost {
            data[usize::from(*index) * width..][..width].fill(0xEE);
        }
        let with: Vec<_> = with.iter().map(|index| (*index, &parity[usize::from(*index) * width..][..width])).collect();
        let is_mended = mend(&mut data, symbol, count, |index| !lost.contains(&index), &with);
        (is_mended, data, whole)
    }

    /// Data symbols, bytes of a symbol, bytes that the last one lacks, parity symbols; which order both are drawn in.
    fn case() -> impl Strategy<Value = (u16, u16, u16, u16, Vec<u16>, Vec<u16>)> {
        let sizes = (prop_oneof![1u16..6, 1u16..80], 32u16..120, 1u16..40);
        sizes.prop_flat_map(|(symbols, half, count)| {
            let shuffled = |count| Just((0..count).collect::<Vec<u16>>()).prop_shuffle();
            (Just(symbols), Just(half * 2), 0..half * 2, Just(count), shuffled(symbols), shuffled(count))
        })
    }

    proptest! {
        #[test]
        fn any_so_many_symbols_mend_and_one_less_do_not(
            (symbols, symbol, lacks, count, lost, with) in case(),
            losses: prop::sample::Index,
            seed: u64,
        ) {
            let most = usize::from(symbols.min(count));
            let losses = losses.index(most + 1);
            let block = noise(usize::from(symbols) * usize::from(symbol) - usize::from(lacks), seed);
            let lost: BTreeSet<u16> = lost[..losses].iter().copied().collect();
            let (is_mended, data, whole) = mended(&block, symbol, count, &lost, &with[..losses]);
            prop_assert!(is_mended && data == whole);
            if losses > 0 {
                let (is_mended, ..) = mended(&block, symbol, count, &lost, &with[..losses - 1]);
                prop_assert!(!is_mended);
            }
        }
    }

    #[test]
    fn sizes_that_occur_are_mended_by_the_last_parity_symbols() {
        for (symbols, symbol) in [(1, 1444), (2, 1444), (3, 1424), (727, 1444), (737, 1424), (2905, 1444), (4194, 1000)]
        {
            let block = noise(usize::from(symbols) * usize::from(symbol) - 7, u64::from(symbols));
            let lost: BTreeSet<u16> = (0..symbols.min(200)).map(|index| symbols - 1 - index).collect();
            let with: Vec<u16> = (56..256).rev().take(lost.len()).collect();
            let (is_mended, data, whole) = mended(&block, symbol, 256, &lost, &with);
            assert!(is_mended && data == whole, "{symbols} of {symbol}");
        }
    }

    #[test]
    fn nothing_is_needed_when_nothing_is_lost() {
        let (is_mended, data, whole) = mended(&noise(1000, 1), 100, 4, &BTreeSet::new(), &[]);
        assert!(is_mended && data == whole);
    }

    #[test]
    fn symbols_that_cannot_be_mend_nothing() {
        let mut data = noise(1000, 1);
        let mend = |data: &mut [u8], parity: &[(u16, &[u8])]| mend(data, 100, 4, |index| index != 3, parity);
        assert!(!mend(&mut data, &[(4, &[0; 100])]), "there are four");
        assert!(!mend(&mut data, &[(0, &[0; 98])]));
        assert!(!mend(&mut data, &[]));
        assert!(parity(&data, 0, 4).is_empty());
        assert!(parity(&data, 101, 4).is_empty());
        assert!(parity(&data, 100, 0).is_empty());
        assert!(parity(&[], 100, 4).is_empty());
    }

    /// Both ends have to compute the same bytes, whatever version they are of.
    #[test]
    fn the_code_is_that_of_version_1() {
        let hash = |symbols: usize, symbol: u16, count| {
            let bytes = parity(&noise(symbols * usize::from(symbol) - 100, 1), symbol, count);
            blake3::hash(&bytes).to_hex()[..16].to_owned()
        };
        assert_eq!(hash(727, 1444, 256), "b8ee1fc962692cea");
        assert_eq!(hash(3, 1424, 256), "3147a0412c465fd6");
        assert_eq!(hash(20, 1000, 7), "511abab58e14d2fb");
    }
}
