//! Datagrams to bytes.

use std::time::{Duration, SystemTime};

use super::{
    ANNOUNCE, Announce, Datagram, HEAD, Head, Key, LAST_MOMENT, LONGEST, MAGIC, Need, PAGE, Phase, REPORT, Report,
    SYMBOL, Standing, VERSION, WORD, Word,
};

/// Appends the bytes of a datagram to `to`. Lists are to fit ([`super::most_runs`], [`super::most_needs`]).
pub fn encode(head: Head, datagram: &Datagram<'_>, key: &Key, to: &mut Vec<u8>) {
    let start = to.len();
    let kind = match datagram {
        Datagram::Announce(_) => ANNOUNCE,
        Datagram::Page(_) => PAGE,
        Datagram::Symbol { .. } => SYMBOL,
        Datagram::Word(_) => WORD,
        Datagram::Report(_) => REPORT,
    };
    to.extend([MAGIC, VERSION << 4 | kind]);
    to.extend(head.session.0.to_le_bytes());
    to.extend(head.number.to_le_bytes());
    debug_assert_eq!(to.len() - start, HEAD);
    match datagram {
        Datagram::Announce(said) => announce(said, to),
        Datagram::Page(page) => {
            to.extend(page.page.to_le_bytes());
            for run in &page.runs {
                to.extend(run.first.to_le_bytes());
                to.extend(run.count.to_le_bytes());
            }
        }
        Datagram::Symbol { block, index, bytes } => {
            to.extend(block.to_le_bytes());
            to.extend(index.to_le_bytes());
            to.extend_from_slice(bytes);
        }
        Datagram::Word(said) => word(said, to),
        Datagram::Report(said) => report(said, to),
    }
    let tag = key.tag(&to[start..]);
    to.extend(tag);
}

fn announce(said: &Announce, to: &mut Vec<u8>) {
    let terms = &said.terms;
    to.extend(terms.image.0);
    to.extend(terms.shape.image_size.to_le_bytes());
    to.extend(terms.shape.chunk_size.to_le_bytes());
    to.extend(terms.block.to_le_bytes());
    to.extend(terms.symbol.to_le_bytes());
    to.extend(terms.parity.to_le_bytes());
    to.extend(terms.pages.to_le_bytes());
    to.extend(terms.plan.to_le_bytes());
    to.extend([u8::from(terms.rest), phase(said.phase)]);
    to.extend(terms.deadline.map_or(0, moment).to_le_bytes());
    to.extend(said.passed.to_le_bytes());
    to.extend(said.rate.to_le_bytes());
    to.extend(milliseconds(said.report_every).to_le_bytes());
    to.extend(milliseconds(said.spread).to_le_bytes());
}

const fn phase(phase: Phase) -> u8 {
    match phase {
        Phase::Waiting => 0,
        Phase::Sending => 1,
        Phase::Ending => 2,
        Phase::Ended(true) => 3,
        Phase::Ended(false) => 4,
    }
}

/// Milliseconds since 1970, at least 1: 0 stands for none.
fn moment(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(LAST_MOMENT).clamp(1, LAST_MOMENT)
}

/// Within what is read.
fn milliseconds(duration: Duration) -> u32 {
    let duration = duration.clamp(Duration::from_millis(1), LONGEST);
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}

fn word(said: &Word, to: &mut Vec<u8>) {
    for length in [said.coming.len(), said.unicast.len(), said.dropped.len()] {
        to.extend(u16::try_from(length).unwrap_or(u16::MAX).to_le_bytes());
    }
    needs(&said.coming, to);
    needs(&said.unicast, to);
    said.dropped.iter().for_each(|receiver| to.extend(receiver.0));
}

fn report(said: &Report, to: &mut Vec<u8>) {
    to.extend(said.receiver.0);
    to.push(match said.standing {
        Standing::Joined => 0,
        Standing::Complete => 1,
        Standing::Leaving => 2,
    });
    for number in [said.done, said.seen, said.lost, said.overflowed, said.heard] {
        to.extend(number.to_le_bytes());
    }
    needs(&said.needs, to);
}

fn needs(needs: &[Need], to: &mut Vec<u8>) {
    for need in needs {
        to.extend(need.first.to_le_bytes());
        to.extend(need.count.to_le_bytes());
        to.extend(need.symbols.to_le_bytes());
    }
}
