//! The profiles of one image, as bytes: in files and on the wire.
//!
//! Little-endian. A *number* has 7 bits in each byte, lowest first; all but its last byte have the high bit set; it is
//! written in as few bytes as it fits.
//!
//! | bytes | meaning |
//! | --- | --- |
//! | 0..8 | `HEADPROF` |
//! | 8..12 | version, 1 |
//! | 12..16 | length of all, the checksum too |
//! | 16..24 | image size |
//! | 24 | 1 if the identity of the image is known, else 0 |
//! | 25..57 | the identity, or zeroes |
//! | 57 | tags, at most 16 |
//! | for each tag | in order of their names |
//! | 1 | length of its name, 1 to 64 |
//! | .. | its name |
//! | numbers | runs, spans |
//! | for each span | in order of pages, and joined where weight and time are the same |
//! | numbers | pages between the one before and this, pages, first touch in ms |
//! | 1 | weight, 31 to 255 |
//! | last 4 | CRC-32C of what comes before |
//!
//! At most [`MOST_PAGES`] pages and [`MOST_SPANS`] spans for each tag, and [`MOST_SPANS_IN_ALL`] spans. A span has at most
//! 8 + 3 + 4 + 1 bytes, so everything fits [`LARGEST`].
//!
//! There is one way to write a profile, and the decoder takes no other. It is fed by strangers: it never panics, and what
//! it allocates grows with the bytes that are there and not with what they announce.

use std::collections::BTreeMap;
use std::sync::Arc;

use thiserror::Error;

use super::recording::Run;
use super::spans::{Span, Spans};
use super::weights::{Known, Weight};
use super::{LATEST_MS, LONGEST_TAG, MOST_PAGES, MOST_SPANS, Merged, PAGE, Profile, Tag};
use crate::export::ImageId;
use crate::units::to_u64;

/// Tags of one image.
pub const MOST_TAGS: usize = 16;
/// Spans of all its tags.
pub const MOST_SPANS_IN_ALL: usize = 2 * MOST_SPANS;
/// Bytes that no encoded profiles exceed: 2 MiB and a page.
pub const LARGEST: u64 = (2 << 20) + PAGE;

const MAGIC: &[u8; 8] = b"HEADPROF";
const VERSION: u32 = 1;
/// Bytes up to and with the length.
const BEGINNING: usize = 16;
const SUM: usize = 4;
/// Pages of the largest image, and one more.
const MOST_OFFSET: u64 = u64::MAX / PAGE + 1;

/// What was learnt of one image, by tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profiles {
    image_size: u64,
    identity: Option<ImageId>,
    /// None of them is empty. Shared with whoever plays one.
    tags: BTreeMap<Tag, Arc<Profile>>,
}

/// Why bytes are no profiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FormatError {
    /// Something else.
    #[error("this is no profile")]
    NotOne,
    /// Of a newer program.
    #[error("the profile has version {0}, and this program knows version 1")]
    Version(u32),
    /// It was written by a program like this one, but these are other bytes.
    #[error("the profile is damaged")]
    Damaged,
}

/// Why profiles are not those of an image.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Foreign {
    /// Another size.
    #[error("the profile is of an image of {theirs} bytes, and this one has {ours}")]
    Size {
        /// Bytes, in the profile.
        theirs: u64,
        /// Bytes of the image.
        ours: u64,
    },
    /// Another identity; or only one of them is known.
    #[error("the profile is of the image {}, and this is {}", name(.theirs.as_ref()), name(.ours.as_ref()))]
    Identity {
        /// In the profile.
        theirs: Option<ImageId>,
        /// Of the image.
        ours: Option<ImageId>,
    },
}

fn name(identity: Option<&ImageId>) -> String {
    identity.map_or_else(|| "of unknown identity".to_owned(), ImageId::to_string)
}

/// There is no place for another tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("the image has {MOST_TAGS} profiles, and there is no place for another: forget one")]
pub struct TooManyTags;

impl Profiles {
    /// Nothing is known of this image.
    pub const fn new(image_size: u64, identity: Option<ImageId>) -> Self {
        Self { image_size, identity, tags: BTreeMap::new() }
    }

    /// What one run teaches, to be handed on.
    pub fn of_run(image_size: u64, identity: Option<ImageId>, tag: Tag, run: &Run) -> Self {
        let profile = Arc::new(Profile::of_run(run));
        Self { image_size, identity, tags: BTreeMap::from([(tag, profile)]) }
    }

    /// Bytes of the image.
    pub const fn image_size(&self) -> u64 {
        self.image_size
    }

    /// What the image holds, if that is known.
    pub const fn identity(&self) -> Option<ImageId> {
        self.identity
    }

    pub(super) const fn set_identity(&mut self, identity: Option<ImageId>) {
        self.identity = identity;
    }

    /// Whether nothing is known.
    pub fn is_empty(&self) -> bool {
        self.tags.is_empty()
    }

    /// The profile of a workload.
    pub fn get(&self, tag: &Tag) -> Option<&Arc<Profile>> {
        self.tags.get(tag)
    }

    /// All profiles, by tag.
    pub fn iter(&self) -> impl Iterator<Item = (&Tag, &Arc<Profile>)> {
        self.tags.iter()
    }

    /// Refuses profiles of another image. Two images of unknown identity are one if they have one size: it is a hint.
    pub fn check(&self, image_size: u64, identity: Option<ImageId>) -> Result<(), Foreign> {
        if self.image_size != image_size {
            return Err(Foreign::Size { theirs: self.image_size, ours: image_size });
        }
        if self.identity != identity {
            return Err(Foreign::Identity { theirs: self.identity, ours: identity });
        }
        Ok(())
    }

    /// Learns from a run of a workload. Where all tags together have too many spans, this one gets what is left.
    pub fn merge(&mut self, tag: &Tag, run: &Run) -> Result<Merged, TooManyTags> {
        let room = self.room_beside(tag)?;
        let mut profile = self.tags.get(tag).map_or_else(Profile::default, |profile| Profile::clone(profile));
        let merged = profile.merge_within(run, room);
        if merged == Merged::Learnt {
            self.replace(tag.clone(), Arc::new(profile));
        }
        Ok(merged)
    }

    /// Puts a profile in the place of the one that this workload had, if there is room for all of it.
    pub(super) fn put(&mut self, tag: &Tag, profile: &Arc<Profile>) -> Result<(), TooManyTags> {
        if profile.spans.len() > self.room_beside(tag)? {
            return Err(TooManyTags);
        }
        self.replace(tag.clone(), Arc::clone(profile));
        Ok(())
    }

    fn replace(&mut self, tag: Tag, profile: Arc<Profile>) {
        if profile.is_empty() {
            self.tags.remove(&tag);
        } else {
            self.tags.insert(tag, profile);
        }
    }

    /// Spans that one tag may have beside all others.
    fn room_beside(&self, tag: &Tag) -> Result<usize, TooManyTags> {
        let others = self.tags.iter().filter(|(other, _)| *other != tag);
        let (count, spans) = others.fold((0, 0), |(count, spans), (_, other)| (count + 1, spans + other.spans.len()));
        if count >= MOST_TAGS { Err(TooManyTags) } else { Ok(MOST_SPANS_IN_ALL.saturating_sub(spans)) }
    }

    /// Forgets the profile of a workload; says whether there was one.
    pub(super) fn remove(&mut self, tag: &Tag) -> bool {
        self.tags.remove(tag).is_some()
    }

    /// Forgets all; says how many there were.
    pub(super) fn clear(&mut self) -> usize {
        std::mem::take(&mut self.tags).len()
    }

    /// The form; at most [`LARGEST`] bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(self.image_size.to_le_bytes());
        bytes.push(self.identity.is_some().into());
        bytes.extend(self.identity.map_or([0; 32], |identity| identity.0));
        bytes.extend(count_byte(self.tags.len()));
        for (tag, profile) in &self.tags {
            bytes.extend(count_byte(tag.as_str().len()));
            bytes.extend(tag.as_str().as_bytes());
            put_number(&mut bytes, profile.runs.into());
            put_number(&mut bytes, to_u64(profile.spans.len()));
            put_spans(&mut bytes, &profile.spans);
        }
        let length = u32::try_from(bytes.len() + SUM).expect("profiles are bounded");
        bytes[12..BEGINNING].copy_from_slice(&length.to_le_bytes());
        let sum = checksum(&bytes);
        bytes.extend(sum.to_le_bytes());
        debug_assert!(to_u64(bytes.len()) <= LARGEST);
        bytes
    }

    /// What [`Self::encode`] made, and nothing else.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if measure(bytes)? != bytes.len() {
            return Err(FormatError::Damaged);
        }
        let (body, sum) = bytes.split_last_chunk::<SUM>().ok_or(FormatError::Damaged)?;
        if u32::from_le_bytes(*sum) != checksum(body) {
            return Err(FormatError::Damaged);
        }
        let mut rest = Reader(&body[BEGINNING..]);
        let profiles = rest.profiles().filter(|_| rest.0.is_empty());
        profiles.ok_or(FormatError::Damaged)
    }
}

/// How long the profiles are that `bytes` begin with. It is not more than [`LARGEST`].
pub(super) fn measure(bytes: &[u8]) -> Result<usize, FormatError> {
    let beginning = bytes.get(..BEGINNING).filter(|beginning| beginning.starts_with(MAGIC));
    let beginning = beginning.ok_or(FormatError::NotOne)?;
    let word = |at: usize| beginning[at..].first_chunk().copied().map_or(0, u32::from_le_bytes);
    match (word(8), u64::from(word(12))) {
        (VERSION, length @ ..=LARGEST) => usize::try_from(length).map_err(|_| FormatError::Damaged),
        (VERSION, _) => Err(FormatError::Damaged),
        (version, _) => Err(FormatError::Version(version)),
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    u32::try_from(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes)).expect("CRC-32C has 32 bits")
}

/// Tags and lengths of tags are small.
fn count_byte(count: usize) -> [u8; 1] {
    [u8::try_from(count).expect("it has a bound")]
}

fn put_number(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    bytes.push((number & 0x7f) as u8);
}

fn put_spans(bytes: &mut Vec<u8>, spans: &Spans<Known>) {
    let mut at = 0;
    for span in spans.iter() {
        put_number(bytes, span.start - at);
        put_number(bytes, span.pages());
        put_number(bytes, span.value.first_ms.into());
        bytes.push(span.value.weight.0);
        at = span.end;
    }
}

/// What has not been read yet. `None`: it is not as it should be.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1).map(|byte| byte[0])
    }

    fn number(&mut self) -> Option<u64> {
        let mut number = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            let shifted = bits << shift;
            if shifted >> shift != bits || (byte == 0 && shift > 0) {
                return None;
            }
            number |= shifted;
            if byte & 0x80 == 0 {
                return Some(number);
            }
        }
        None
    }

    fn profiles(&mut self) -> Option<Profiles> {
        let image_size = u64::from_le_bytes(*self.take(8)?.first_chunk()?);
        let (flag, id) = (self.byte()?, *self.take(32)?.first_chunk()?);
        let identity = match flag {
            0 if id == [0; 32] => None,
            1 => Some(ImageId(id)),
            _ => return None,
        };
        let mut profiles = Profiles::new(image_size, identity);
        let mut spans_left = MOST_SPANS_IN_ALL;
        let count = usize::from(self.byte()?);
        for _ in 0..Some(count).filter(|count| *count <= MOST_TAGS)? {
            let length = Some(usize::from(self.byte()?)).filter(|length| *length <= LONGEST_TAG)?;
            let tag: Tag = std::str::from_utf8(self.take(length)?).ok()?.parse().ok()?;
            if profiles.tags.last_key_value().is_some_and(|(last, _)| *last >= tag) {
                return None;
            }
            let profile = self.profile(image_size.div_ceil(PAGE))?;
            spans_left = spans_left.checked_sub(profile.spans.len())?;
            profiles.tags.insert(tag, Arc::new(profile));
        }
        Some(profiles)
    }

    fn profile(&mut self, image_pages: u64) -> Option<Profile> {
        let runs = u32::try_from(self.number()?).ok().filter(|runs| *runs > 0)?;
        let count = self.number()?;
        if count == 0 || count > to_u64(MOST_SPANS) {
            return None;
        }
        let (mut spans, mut read, mut at) = (Spans::default(), 0, 0);
        for _ in 0..count {
            let span = self.span(at)?;
            at = span.end;
            read += 1;
            spans.push(span);
        }
        let is_sound = spans.len() == read && at <= image_pages && spans.pages() <= MOST_PAGES;
        is_sound.then_some(Profile { runs, spans })
    }

    /// The next span behind page `at`.
    fn span(&mut self, at: u64) -> Option<Span<Known>> {
        let start = at.checked_add(self.number()?)?;
        let pages = self.number()?;
        let end = start.checked_add(pages).filter(|end| *end <= MOST_OFFSET)?;
        let first_ms = u32::try_from(self.number()?).ok()?;
        let weight = Weight(self.byte()?);
        let is_sound = pages > 0 && first_ms <= LATEST_MS && weight >= Weight::EIGHTH;
        is_sound.then_some(Span { start, end, value: Known { weight, first_ms } })
    }
}

/// For the fuzzer: whatever the bytes are, and whatever stands in a form whose length and checksum are right.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let whole = |bytes: &[u8]| {
        if let Ok(profiles) = Profiles::decode(bytes) {
            assert_eq!(profiles.encode(), bytes, "there is one form only");
            for (_, profile) in profiles.iter() {
                let wished: u64 = profile.wishes(profiles.image_size).iter().map(|wish| wish.length()).sum();
                assert!(wished <= profile.to_run().bytes());
                let mut again = Profile::clone(profile);
                again.merge(&profile.to_run());
            }
        }
    };
    whole(data);
    let length = u32::try_from(BEGINNING + data.len() + SUM).unwrap_or(u32::MAX);
    let mut made = [MAGIC, &VERSION.to_le_bytes()[..], &length.to_le_bytes()[..], data].concat();
    let sum = checksum(&made);
    made.extend(sum.to_le_bytes());
    whole(&made);
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::spans::tests::of_naive;
    use super::*;
    use proptest::prelude::*;

    pub(in crate::fill::profile) const SIZE: u64 = 1 << 30;

    /// A run that touches so many pages from `start` on, 3 ms after the beginning.
    pub(in crate::fill::profile) fn run(start: u64, pages: u64) -> Run {
        Run::of(of_naive(&(start..start + pages).map(|page| (page, 3)).collect()))
    }

    pub(in crate::fill::profile) fn tag(text: &str) -> Tag {
        text.parse().unwrap()
    }

    fn profiles() -> impl Strategy<Value = Profiles> {
        let known = (31u8..=255, 0..=LATEST_MS)
            .prop_map(|(weight, first_ms)| Known { weight: Weight(weight), first_ms: first_ms / 9 });
        let pages = prop::collection::btree_map(0..SIZE / PAGE, known, 1..40);
        let profile = (1u32.., pages).prop_map(|(runs, pages)| Arc::new(Profile { runs, spans: of_naive(&pages) }));
        let tags = prop::collection::btree_map("[A-Za-z0-9._-]{1,64}".prop_map(|text| tag(&text)), profile, 0..4);
        let identity = prop::option::of(any::<[u8; 32]>().prop_map(ImageId));
        (tags, identity).prop_map(|(tags, identity)| Profiles { image_size: SIZE, identity, tags })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(profiles in profiles()) {
            let bytes = profiles.encode();
            prop_assert_eq!(measure(&bytes), Ok(bytes.len()));
            prop_assert_eq!(Profiles::decode(&bytes), Ok(profiles));
        }

        #[test]
        fn no_other_byte_is_believed(profiles in profiles(), at in 0usize..1 << 16, bit in 0u8..8) {
            let mut bytes = profiles.encode();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(Profiles::decode(&bytes).is_err());
            prop_assert!(Profiles::decode(&bytes[..at]).is_err());
        }

        #[test]
        fn anything_may_come(data in prop::collection::vec(any::<u8>(), 0..300), profiles in profiles(), change in 16usize..100) {
            fuzz(&data);
            let mut bytes = profiles.encode();
            bytes.truncate(bytes.len() - SUM);
            if let Some(byte) = bytes.get_mut(change) {
                *byte = data.first().copied().unwrap_or(0);
            }
            fuzz(&bytes[BEGINNING..]);
        }
    }

    #[test]
    fn the_largest_profiles_fit() {
        let mut profiles = Profiles::new(u64::MAX, Some(ImageId([255; 32])));
        for number in 0..MOST_TAGS {
            let each = u64::try_from(MOST_SPANS_IN_ALL / MOST_TAGS).unwrap();
            let gap = u64::MAX / PAGE / each;
            let value = Known { weight: Weight::WHOLE, first_ms: LATEST_MS };
            let span = |index: u64| Span { start: index * gap + 1, end: index * gap + 1 + MOST_PAGES / each, value };
            let profile = Profile { runs: u32::MAX, spans: (0..each).map(span).collect() };
            profiles.put(&tag(&format!("{number:064}")), &Arc::new(profile)).unwrap();
        }
        let bytes = profiles.encode();
        assert!(to_u64(bytes.len()) <= LARGEST);
        assert_eq!(Profiles::decode(&bytes).unwrap(), profiles);
        assert_eq!(profiles.merge(&tag("more"), &run(0, 100)), Err(TooManyTags));
        assert_eq!(profiles.merge(&tag(&format!("{:064}", 3)), &run(0, 1 << 20)), Ok(Merged::Learnt));
        assert!(to_u64(profiles.encode().len()) <= LARGEST, "each has what the others leave");
    }

    #[test]
    fn what_is_announced_is_not_allocated() {
        // A profile of 65536 spans in 70 bytes.
        let mut body = [&SIZE.to_le_bytes()[..], &[0; 33], &[1, 4], b"boot", &[1]].concat();
        put_number(&mut body, to_u64(MOST_SPANS));
        assert_eq!(Reader(&body).profiles(), None);
        let mut long = Profiles::new(SIZE, None).encode();
        long[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(measure(&long), Err(FormatError::Damaged));
        long[8] = 2;
        assert_eq!(Profiles::decode(&long), Err(FormatError::Version(2)));
        assert_eq!(Profiles::decode(b"HEADPROF"), Err(FormatError::NotOne));
    }

    #[test]
    fn profiles_belong_to_one_image() {
        let (id, other) = (Some(ImageId([1; 32])), Some(ImageId([2; 32])));
        let of = |identity| Profiles::new(SIZE, identity);
        assert_eq!(of(id).check(SIZE, id), Ok(()));
        assert_eq!(of(None).check(SIZE, None), Ok(()), "as far as anybody knows");
        for (theirs, ours) in [(id, other), (id, None), (None, id)] {
            assert_eq!(of(theirs).check(SIZE, ours), Err(Foreign::Identity { theirs, ours }));
        }
        assert_eq!(of(id).check(SIZE + 1, id), Err(Foreign::Size { theirs: SIZE, ours: SIZE + 1 }));
    }
}
