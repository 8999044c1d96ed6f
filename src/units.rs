//! Byte sizes as operators write them, and conversions that cannot lose bits.
//!
//! Owns: `64K`, `10G`, `1.5MiB` in both directions. Suffixes are powers of 1024, as in qemu and nbdkit;
//! there is no decimal notation.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// 1024 bytes.
pub const KIB: u64 = 1 << 10;
/// 1024 KiB.
pub const MIB: u64 = 1 << 20;
/// 1024 MiB.
pub const GIB: u64 = 1 << 30;

// Lengths are carried as `u64` on the wire and used as `usize` in memory.
const _: () = assert!(usize::BITS == 64, "Headwater needs a 64-bit target");

/// A length that arrived as 64 bits, for use in memory.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits: asserted above")]
pub const fn to_usize(bytes: u64) -> usize {
    bytes as usize
}

/// A length in memory, for use on the wire.
pub const fn to_u64(bytes: usize) -> u64 {
    bytes as u64
}

/// A number of bytes that reads and prints like `64K`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Why a text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseSizeError {
    /// No digits at the start.
    #[error("a size starts with a number, as in 64K or 10G")]
    NoNumber,
    /// Something other than K, M, G, T, P or E behind the number.
    #[error("unknown unit {0:?}: use K, M, G, T, P or E (powers of 1024)")]
    UnknownUnit(String),
    /// More than 2^64 - 1 bytes.
    #[error("more than 16 exbibytes")]
    TooLarge,
    /// `0.3K` is not a whole number of bytes.
    #[error("not a whole number of bytes")]
    Fraction,
}

const UNITS: [(char, u32); 6] = [('E', 60), ('P', 50), ('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    /// Reads `4096`, `64K`, `64k`, `64KiB`, `64KB` and `1.5G`.
    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        let text = text.trim();
        let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(split);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if whole.is_empty() || fraction.contains('.') {
            return Err(ParseSizeError::NoNumber);
        }
        let shift = parse_unit(unit.trim())?;
        let whole: u128 = whole.parse().map_err(|_| ParseSizeError::TooLarge)?;
        let mut bytes = whole.checked_mul(1 << shift).ok_or(ParseSizeError::TooLarge)?;
        if !fraction.is_empty() {
            // Nine digits are exact in u128 and finer than anyone types.
            let digits = fraction.get(..9).unwrap_or(fraction);
            let scale = 10u128.pow(u32::try_from(digits.len()).unwrap_or(9));
            let part = digits.parse::<u128>().map_err(|_| ParseSizeError::NoNumber)? << shift;
            if part % scale != 0 {
                return Err(ParseSizeError::Fraction);
            }
            bytes += part / scale;
        }
        u64::try_from(bytes).map(Self).map_err(|_| ParseSizeError::TooLarge)
    }
}

/// The power of two that a unit stands for.
fn parse_unit(unit: &str) -> Result<u32, ParseSizeError> {
    let unknown = || ParseSizeError::UnknownUnit(unit.to_owned());
    let mut rest = unit.chars();
    let Some(first) = rest.next() else { return Ok(0) };
    if unit.eq_ignore_ascii_case("b") {
        return Ok(0);
    }
    let letter = first.to_ascii_uppercase();
    let (_, shift) = UNITS.iter().find(|(name, _)| *name == letter).ok_or_else(unknown)?;
    let tail = rest.as_str();
    if tail.is_empty() || tail.eq_ignore_ascii_case("b") || tail.eq_ignore_ascii_case("ib") {
        Ok(*shift)
    } else {
        Err(unknown())
    }
}

impl fmt::Display for ByteSize {
    /// Prints the exact value with the largest unit that divides it, else three digits: `64K`, `1.43G`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.0;
        for (name, shift) in UNITS {
            if bytes != 0 && bytes.is_multiple_of(1 << shift) && (bytes >> shift) < 10_000 {
                return write!(f, "{}{name}", bytes >> shift);
            }
        }
        for (name, shift) in UNITS {
            if bytes >> shift != 0 {
                let hundredths = (u128::from(bytes) * 100) >> shift;
                return match hundredths {
                    0..1_000 => write!(f, "{}.{:02}{name}", hundredths / 100, hundredths % 100),
                    1_000..10_000 => write!(f, "{}.{}{name}", hundredths / 100, hundredths % 100 / 10),
                    _ => write!(f, "{}{name}", hundredths / 100),
                };
            }
        }
        write!(f, "{bytes}")
    }
}

impl fmt::Debug for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_as_operators_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64K", 64 * KIB),
            ("64k", 64 * KIB),
            ("64KiB", 64 * KIB),
            ("64 KB", 64 * KIB),
            ("1.5G", GIB + GIB / 2),
            ("10G", 10 * GIB),
            ("3b", 3),
            ("15E", 15 << 60),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_its_reason() {
        for (text, error) in [
            ("", ParseSizeError::NoNumber),
            ("K", ParseSizeError::NoNumber),
            ("-1", ParseSizeError::NoNumber),
            ("64X", ParseSizeError::UnknownUnit("X".into())),
            ("64Kx", ParseSizeError::UnknownUnit("Kx".into())),
            ("16E", ParseSizeError::TooLarge),
            ("99999999999999999999999999999999999999999", ParseSizeError::TooLarge),
            ("0.3K", ParseSizeError::Fraction),
        ] {
            assert_eq!(text.parse::<ByteSize>(), Err(error), "{text}");
        }
    }

    #[test]
    fn sizes_print_exactly_when_a_unit_divides_them() {
        for (bytes, text) in [
            (0, "0"),
            (1, "1"),
            (1000, "1000"),
            (64 * KIB, "64K"),
            (1536 * MIB, "1536M"),
            (10 * GIB, "10G"),
            (153_092_096, "146M"),
            (1_536_000_001, "1.43G"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn an_exact_print_reads_back(bytes in 0u64..100_000, shift in 0u32..40) {
            let size = ByteSize(bytes << shift);
            let text = size.to_string();
            if !text.contains('.') {
                // Rounded prints of four digits and more may differ; exact ones may not.
                let back: ByteSize = text.parse().unwrap();
                prop_assert!(back == size || back.0.abs_diff(size.0) * 100 <= size.0);
            }
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = text.parse::<ByteSize>();
        }
    }
}
