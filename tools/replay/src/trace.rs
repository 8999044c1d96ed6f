//! A recorded boot: what a machine asked of its disk, and when.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use headwater::ranges::ByteRange;
use headwater::units::to_u64;

/// The reads of a trace, in order.
#[derive(Debug, Default)]
pub struct Trace {
    /// In the order of the recording.
    pub reads: Vec<Read>,
    /// Lines that are no reads. They are not repeated: a machine started from a shared image writes elsewhere.
    pub others: u64,
}

/// One read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Read {
    /// Since the start of the recording.
    pub at: Duration,
    /// What it asked for; not empty.
    pub range: ByteRange,
}

const HEADER: &str = "seconds,op,offset,bytes";

impl Trace {
    /// Reads the lines of a CSV file with the columns `seconds,op,offset,bytes`.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut lines = text.lines();
        ensure!(lines.next() == Some(HEADER), "the first line is not `{HEADER}`");
        let mut trace = Self::default();
        for (index, line) in lines.enumerate() {
            match parse_line(line).with_context(|| format!("line {}: `{line}`", index + 2))? {
                Some(read) => trace.reads.push(read),
                None => trace.others += 1,
            }
        }
        Ok(trace)
    }

    /// Where its last byte ends: how large the image was at least.
    pub fn end(&self) -> u64 {
        self.reads.iter().map(|read| read.range.end()).max().unwrap_or(0)
    }

    /// The bytes of an image that it reads, in units of `chunk` bytes: what a cache must fetch for it.
    pub fn footprint(&self, chunk: u64) -> u64 {
        let chunks = |read: &Read| read.range.start() / chunk..read.range.end().div_ceil(chunk);
        let touched: BTreeSet<u64> = self.reads.iter().flat_map(chunks).collect();
        to_u64(touched.len()) * chunk
    }
}

fn parse_line(line: &str) -> anyhow::Result<Option<Read>> {
    let [seconds, operation, offset, bytes] = line.split(',').collect::<Vec<_>>()[..] else {
        bail!("not four columns");
    };
    let at = Duration::try_from_secs_f64(seconds.parse()?)?;
    let range = ByteRange::new(offset.parse()?, bytes.parse()?).context("the range does not fit in 64 bits")?;
    Ok((operation == "read" && !range.is_empty()).then_some(Read { at, range }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_taken_and_the_rest_is_counted() {
        let trace = Trace::parse("seconds,op,offset,bytes\n0.5,read,512,4096\n0.6,write,0,512\n1,flush,0,0\n").unwrap();
        let read = Read { at: Duration::from_millis(500), range: ByteRange::new(512, 4096).unwrap() };
        assert_eq!((trace.reads, trace.others), (vec![read], 2));
    }

    #[test]
    fn a_footprint_counts_each_chunk_once() {
        let lines = "seconds,op,offset,bytes\n0,read,4095,2\n1,read,0,4096\n2,read,65536,65536\n3,write,999999,1\n";
        let trace = Trace::parse(lines).unwrap();
        assert_eq!((trace.footprint(4096), trace.footprint(65536)), (18 * 4096, 2 * 65536));
        assert_eq!((trace.end(), Trace::default().end()), (131_072, 0));
    }

    #[test]
    fn what_is_no_trace_is_refused_with_its_line() {
        for (text, complaint) in [
            ("", "the first line"),
            ("seconds,op,offset,bytes\n0,read,1\n", "line 2: `0,read,1`: not four columns"),
            ("seconds,op,offset,bytes\n0,flush,0,0\n-1,read,1,1\n", "line 3"),
            ("seconds,op,offset,bytes\n0,read,18446744073709551615,1\n", "does not fit"),
        ] {
            let error = format!("{:#}", Trace::parse(text).unwrap_err());
            assert!(error.contains(complaint), "{error}");
        }
    }
}
