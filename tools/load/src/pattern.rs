//! Data that say where they belong.
//!
//! Written data consist of units. Each says its own offset, the seed of the run and a version, and the rest of it
//! follows from these three: so a unit that is stale, comes from elsewhere or is torn is told apart from the right
//! one, without a copy of the image at hand.

/// The largest unit: what disks promise to write whole.
const LARGEST: u64 = 512;
/// The smallest: offset, seed, version and one word that follows from them.
const SMALLEST: u64 = 32;
/// Bytes of a word.
const WORD: usize = 8;

/// The pattern of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    seed: u64,
    unit: usize,
}

/// A unit that is not what it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wrong {
    /// Where.
    pub(crate) offset: u64,
    /// How.
    pub(crate) how: How,
}

/// How a unit is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum How {
    /// It belongs elsewhere.
    Misplaced {
        /// Where it belongs.
        from: u64,
    },
    /// It is of another run.
    OtherSeed {
        /// That run's seed.
        seed: u64,
    },
    /// It was overwritten, or not yet written.
    OtherVersion {
        /// The version that is there.
        found: u64,
        /// The version that was written last.
        wanted: u64,
    },
    /// Its parts do not belong together.
    Torn,
    /// It is zero.
    Zero,
    /// It was never written by this program.
    Foreign,
    /// It is not what the image has there.
    NotTheImage,
}

impl std::fmt::Display for How {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Misplaced { from } => write!(f, "data that belong at offset {from}"),
            Self::OtherSeed { seed } => write!(f, "data that were written with --seed {seed}"),
            Self::OtherVersion { found, wanted } => write!(f, "version {found} of the data instead of {wanted}"),
            Self::Torn => write!(f, "torn data: parts of several writes"),
            Self::Zero => write!(f, "zeroes"),
            Self::Foreign => write!(f, "data without the pattern"),
            Self::NotTheImage => write!(f, "data that are not the image's"),
        }
    }
}

impl Stamp {
    /// The pattern for blocks of `size` bytes from `start` on; `None` when they are too small for it.
    pub(crate) fn new(seed: u64, size: u32, start: u64) -> Option<Self> {
        let unit = 1u64 << (u64::from(size) | start | LARGEST).trailing_zeros();
        (unit >= SMALLEST).then(|| Self { seed, unit: headwater::units::to_usize(unit) })
    }

    /// Makes `block` what belongs at `offset`.
    pub(crate) fn write(self, block: &mut [u8], offset: u64, version: u64) {
        let mut at = offset;
        for unit in block.chunks_exact_mut(self.unit) {
            let mut words = self.words(at, version);
            for word in unit.chunks_exact_mut(WORD) {
                word.copy_from_slice(&words.next().to_le_bytes());
            }
            at += headwater::units::to_u64(self.unit);
        }
    }

    /// Holds `block` against what belongs at `offset`. Without a version, any one does that is whole.
    pub(crate) fn check(self, block: &[u8], offset: u64, version: Option<u64>) -> Result<(), Wrong> {
        let mut at = offset;
        for unit in block.chunks_exact(self.unit) {
            let wanted = version.unwrap_or_else(|| word(unit, 2));
            let mut words = self.words(at, wanted);
            if unit.chunks_exact(WORD).any(|word| word != words.next().to_le_bytes()) {
                return Err(Wrong { offset: at, how: self.how(unit, at, wanted) });
            }
            at += headwater::units::to_u64(self.unit);
        }
        Ok(())
    }

    /// What is wrong with a unit that is known to be.
    fn how(self, unit: &[u8], at: u64, wanted: u64) -> How {
        if unit.iter().all(|byte| *byte == 0) {
            return How::Zero;
        }
        let (from, seed, found) = (word(unit, 0), word(unit, 1), word(unit, 2));
        let mut words = Self { seed, ..self }.words(from, found);
        let matching = unit.chunks_exact(WORD).filter(|word| *word == words.next().to_le_bytes()).count();
        match matching {
            // The three words that it is derived from always match.
            3 => How::Foreign,
            whole if whole < unit.len() / WORD => How::Torn,
            _ if seed != self.seed => How::OtherSeed { seed },
            _ if from != at => How::Misplaced { from },
            _ => How::OtherVersion { found, wanted },
        }
    }

    fn words(self, offset: u64, version: u64) -> Words {
        Words { index: 0, head: [offset, self.seed, version], state: mix(offset ^ mix(self.seed ^ mix(version))) }
    }
}

/// The words of one unit, in order.
struct Words {
    index: usize,
    head: [u64; 3],
    state: u64,
}

impl Words {
    fn next(&mut self) -> u64 {
        let word = match self.head.get(self.index) {
            Some(word) => *word,
            None => {
                self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                mix(self.state)
            }
        };
        self.index += 1;
        word
    }
}

fn word(unit: &[u8], index: usize) -> u64 {
    let bytes = &unit[index * WORD..][..WORD];
    u64::from_le_bytes(bytes.try_into().expect("a word has eight bytes"))
}

/// Spreads every bit of `x` over all bits of the result (the finaliser of splitmix64).
pub(crate) const fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 4096;

    fn block(seed: u64, offset: u64, version: u64) -> Vec<u8> {
        let mut block = vec![0; SIZE];
        Stamp::new(seed, 4096, offset).unwrap().write(&mut block, offset, version);
        block
    }

    fn checked(block: &[u8], version: Option<u64>) -> Result<(), Wrong> {
        Stamp::new(7, 4096, 0).unwrap().check(block, 8192, version)
    }

    #[test]
    fn what_was_written_is_right_and_nothing_else() {
        let good = block(7, 8192, 3);
        assert_eq!(checked(&good, Some(3)), Ok(()));
        assert_eq!(checked(&good, None), Ok(()));
        for byte in [0, 9, 17, 100, 511, 512, SIZE - 1] {
            let mut bad = good.clone();
            bad[byte] ^= 1;
            let unit = 8192 + (byte as u64 & !511);
            assert_eq!(checked(&bad, None).unwrap_err().offset, unit, "byte {byte}");
        }
    }

    #[test]
    fn each_kind_of_wrong_is_told_apart() {
        let wrong = |block: &[u8]| checked(block, Some(3)).unwrap_err();
        assert_eq!(wrong(&block(7, 8192, 2)).how, How::OtherVersion { found: 2, wanted: 3 });
        assert_eq!(wrong(&block(7, 4096, 3)).how, How::Misplaced { from: 4096 });
        assert_eq!(wrong(&block(8, 8192, 3)).how, How::OtherSeed { seed: 8 });
        assert_eq!(wrong(&[0; SIZE]).how, How::Zero);
        assert_eq!(wrong(&[5; SIZE]).how, How::Foreign);
    }

    #[test]
    fn half_a_unit_of_another_version_is_torn() {
        let mut torn = block(7, 8192, 3);
        torn[1024 + 256..1536].copy_from_slice(&block(7, 8192, 4)[1024 + 256..1536]);
        assert_eq!(checked(&torn, None), Err(Wrong { offset: 8192 + 1024, how: How::Torn }));
    }

    #[test]
    fn units_are_as_large_as_blocks_and_their_start_allow() {
        let unit = |size, start| Stamp::new(1, size, start).map(|stamp| stamp.unit);
        assert_eq!(unit(4096, 0), Some(512));
        assert_eq!(unit(1 << 20, 512), Some(512));
        assert_eq!(unit(4096, 64), Some(64));
        assert_eq!(unit(96, 0), Some(32));
        assert_eq!(unit(100, 0), None);
        assert_eq!(unit(4096, 1), None);
    }
}
