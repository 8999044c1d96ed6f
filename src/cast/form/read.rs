//! Datagrams from bytes: their own, a stranger's, or half of them.

use std::time::{Duration, SystemTime};

use super::{
    ANNOUNCE, Announce, Datagram, HEAD, Head, ITEM, Key, LAST_MOMENT, LONGEST, MAGIC, MOST_BYTES, Malformed, Need,
    PAGE, Page, Phase, REPORT, Report, Run, SYMBOL, SYMBOLS, Standing, TAG, Terms, VERSION, WORD, Word,
};
use crate::cast::{ReceiverId, SessionId};
use crate::manifest::{ImageId, Shape};

/// The session of a datagram, and the image if it is an announcement: what is needed to find the key. Nothing of it is to
/// be believed yet.
pub fn peek(bytes: &[u8]) -> Result<(Head, Option<ImageId>), Malformed> {
    let (kind, head, body) = split(bytes)?;
    let image = if kind == ANNOUNCE { Some(ImageId(Body(body).array()?)) } else { None };
    Ok((head, image))
}

/// Reads a datagram.
pub fn decode<'a>(bytes: &'a [u8], key: &Key) -> Result<(Head, Datagram<'a>), Malformed> {
    let (kind, head, body) = split(bytes)?;
    let (told, tag) = bytes.split_at(bytes.len() - TAG);
    if key.tag(told) != tag {
        return Err(Malformed::Forged);
    }
    let mut body = Body(body);
    let datagram = match kind {
        ANNOUNCE => Datagram::Announce(body.announce(head.session)?),
        PAGE => Datagram::Page(body.page()?),
        SYMBOL => Datagram::Symbol { block: body.u32()?, index: body.u16()?, bytes: body.symbol()? },
        WORD => Datagram::Word(body.word()?),
        _ => Datagram::Report(body.report()?),
    };
    if body.0.is_empty() { Ok((head, datagram)) } else { Err(Malformed::Broken) }
}

/// What a datagram is, its head and its body.
fn split(bytes: &[u8]) -> Result<(u8, Head, &[u8]), Malformed> {
    let mut rest = Body(bytes);
    let [magic, what] = rest.array().map_err(|_| Malformed::Foreign)?;
    let kind = what & 0xF;
    if magic != MAGIC || what >> 4 != VERSION || !(ANNOUNCE..=REPORT).contains(&kind) {
        return Err(Malformed::Foreign);
    }
    if bytes.len() < HEAD + TAG || bytes.len() > MOST_BYTES {
        return Err(Malformed::Broken);
    }
    let head = Head { session: SessionId(rest.u64()?), number: rest.u32()? };
    Ok((kind, head, &bytes[HEAD..bytes.len() - TAG]))
}

/// What has not been read yet.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (array, rest) = self.0.split_first_chunk().ok_or(Malformed::Broken)?;
        self.0 = rest;
        Ok(*array)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        self.array().map(u8::from_le_bytes)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    fn announce(&mut self, session: SessionId) -> Result<Announce, Malformed> {
        let image = ImageId(self.array()?);
        let shape = Shape { image_size: self.u64()?, chunk_size: self.u32()? };
        let (block, symbol, parity, pages) = (self.u32()?, self.u16()?, self.u16()?, self.u16()?);
        let plan = self.u64()?;
        let rest = match self.u8()? {
            0 => false,
            1 => true,
            _ => return Err(Malformed::Broken),
        };
        let phase = self.phase()?;
        let deadline = self.moment()?;
        let terms = Terms { session, image, shape, block, symbol, parity, pages, plan, rest, deadline };
        let said = Announce {
            terms,
            phase,
            passed: self.u32()?,
            rate: self.u64()?,
            report_every: self.milliseconds()?,
            spread: self.milliseconds()?,
        };
        if terms.is_sound() && said.rate > 0 { Ok(said) } else { Err(Malformed::Broken) }
    }

    fn phase(&mut self) -> Result<Phase, Malformed> {
        Ok(match self.u8()? {
            0 => Phase::Waiting,
            1 => Phase::Sending,
            2 => Phase::Ending,
            3 => Phase::Ended(true),
            4 => Phase::Ended(false),
            _ => return Err(Malformed::Broken),
        })
    }

    fn moment(&mut self) -> Result<Option<SystemTime>, Malformed> {
        match self.u64()? {
            0 => Ok(None),
            since @ 1..=LAST_MOMENT => {
                let time = SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(since));
                time.map(Some).ok_or(Malformed::Broken)
            }
            _ => Err(Malformed::Broken),
        }
    }

    fn milliseconds(&mut self) -> Result<Duration, Malformed> {
        let duration = Duration::from_millis(u64::from(self.u32()?));
        if duration.is_zero() || duration > LONGEST { Err(Malformed::Broken) } else { Ok(duration) }
    }

    fn page(&mut self) -> Result<Page, Malformed> {
        let page = self.u16()?;
        let mut runs = Vec::with_capacity(self.0.len() / ITEM);
        while !self.0.is_empty() {
            let run = Run { first: self.u32()?, count: self.u32()? };
            if run.count == 0 || run.first.checked_add(run.count).is_none() {
                return Err(Malformed::Broken);
            }
            runs.push(run);
        }
        if runs.is_empty() { Err(Malformed::Broken) } else { Ok(Page { page, runs }) }
    }

    /// Whether it is as long as the session's symbols are is for the receiver to see.
    fn symbol(&mut self) -> Result<&'a [u8], Malformed> {
        let bytes = std::mem::take(&mut self.0);
        let is_length = u16::try_from(bytes.len()).is_ok_and(|length| SYMBOLS.contains(&length) && length % 2 == 0);
        if is_length { Ok(bytes) } else { Err(Malformed::Broken) }
    }

    fn word(&mut self) -> Result<Word, Malformed> {
        let (coming, unicast, dropped) = (self.u16()?, self.u16()?, self.u16()?);
        let coming = self.needs(usize::from(coming), false)?;
        let unicast = self.needs(usize::from(unicast), true)?;
        let dropped = self.list(usize::from(dropped), 16, |body| body.array().map(ReceiverId))?;
        Ok(Word { coming, unicast, dropped })
    }

    fn report(&mut self) -> Result<Report, Malformed> {
        let receiver = ReceiverId(self.array()?);
        let standing = match self.u8()? {
            0 => Standing::Joined,
            1 => Standing::Complete,
            2 => Standing::Leaving,
            _ => return Err(Malformed::Broken),
        };
        let (done, seen, lost, overflowed) = (self.u32()?, self.u32()?, self.u32()?, self.u32()?);
        let heard = self.u32()?;
        let needs = self.needs(self.0.len().div_ceil(ITEM), false)?;
        Ok(Report { receiver, standing, done, seen, lost, overflowed, heard, needs })
    }

    /// So many needs. `of_none`: they may be of no symbols.
    fn needs(&mut self, count: usize, of_none: bool) -> Result<Vec<Need>, Malformed> {
        self.list(count, ITEM, |body| {
            let need = Need { first: body.u32()?, count: body.u16()?, symbols: body.u16()? };
            let is_sound = need.count > 0 && (need.symbols > 0 || of_none);
            let is_within = need.first.checked_add(u32::from(need.count)).is_some();
            if is_sound && is_within { Ok(need) } else { Err(Malformed::Broken) }
        })
    }

    /// So many items of so many bytes each. Nothing is allocated for items that are not there.
    fn list<T>(
        &mut self,
        count: usize,
        length: usize,
        read: impl Fn(&mut Self) -> Result<T, Malformed>,
    ) -> Result<Vec<T>, Malformed> {
        if self.0.len() < count * length {
            return Err(Malformed::Broken);
        }
        (0..count).map(|_| read(self)).collect()
    }
}

/// Bytes from anywhere do no harm, and neither do they with a right tag; what is read is written the same again.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let key = Key::new(ImageId([7; 32]), SessionId(7));
    let _ = (peek(data), decode(data, &key).map(|_| ()));
    let told = [data, &key.tag(data)].concat();
    let Ok((head, datagram)) = decode(&told, &key) else { return };
    assert!(peek(&told).is_ok_and(|(peeked, _)| peeked == head));
    let mut again = Vec::new();
    super::encode(head, &datagram, &key, &mut again);
    assert_eq!(again, told, "there is one form only");
}

/// Bytes of an announcement before its tag.
pub(in crate::cast) const TOLD: usize = HEAD + 92;

/// The terms of an announcement without a tag: for fuzzing what is made of them.
pub(in crate::cast) fn terms_of(told: &[u8]) -> Option<Terms> {
    let key = Key::new(ImageId([7; 32]), SessionId(7));
    match decode(&[told, &key.tag(told)].concat(), &key) {
        Ok((_, Datagram::Announce(said))) => Some(said.terms),
        _ => None,
    }
}
