//! Small files of JSON that say whether they are whole: a line of JSON, and one with its CRC-32C as 8 hexadecimal
//! digits.
//!
//! Owns: that form. Does not own: what the JSON means, how long it may be, and how the file is replaced.

/// The bytes of a file that holds `json`, which has no line break in it.
pub fn seal(json: impl Into<Vec<u8>>) -> Vec<u8> {
    let mut bytes = json.into();
    let sum = checksum(&bytes);
    bytes.extend_from_slice(format!("\n{sum:08x}\n").as_bytes());
    bytes
}

/// The JSON in the bytes of a file; `None` if it is not whole.
pub fn unseal(bytes: &[u8]) -> Option<&str> {
    let (json, sum) = std::str::from_utf8(bytes).ok()?.strip_suffix('\n')?.split_once('\n')?;
    (format!("{:08x}", checksum(json.as_bytes())) == sum).then_some(json)
}

/// CRC-32C (RFC 3720, B.4).
pub fn checksum(bytes: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_whole_is_nothing() {
        let sealed = seal("{\"a\":1}");
        assert_eq!(unseal(&sealed), Some("{\"a\":1}"));
        for bit in 0..8 * sealed.len() {
            let mut damaged = sealed.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(unseal(&damaged), None, "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert_eq!(unseal(&sealed[..length]), None, "{length} bytes");
        }
    }

    #[test]
    fn the_sum_is_that_of_the_standard() {
        // RFC 3720, B.4: 32 bytes of zeroes, least byte first on the wire.
        assert_eq!(checksum(&[0; 32]), 0x8a91_36aa);
        assert_eq!(seal(""), b"\n00000000\n");
    }
}
