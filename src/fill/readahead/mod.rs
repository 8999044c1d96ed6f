//! Where one client's reads lead to: what should be fetched before it is asked for.
//!
//! Each connection has a table of streams. A read that continues none of them begins a *candidate*; a candidate that
//! goes on in one direction becomes a *run*, and a run wishes for what lies before it. How far, grows while the reader
//! follows, as in the ramp-up of Linux (Wu, Xi and Xu, "On the design of a new Linux readahead framework", 2008; its
//! asynchronous marker is here the step of `run`), but no further than half of what the run has read, for most runs end
//! with a file; all of it, once a run is longer than files are. What was wished and never read counts against the whole
//! connection: unmatched chunks throttle their source (Nicolae and Rafique, "Leveraging collaborative content exchange
//! for on-demand VM multi-deployments", 2013).
//!
//! Nothing is assumed of the order of requests within what a client keeps in flight: a run takes reads a good way
//! before and behind its head. Runs go up, down, or up with a constant stride.
//!
//! Limits: a stride is found in order only, and up to 64 lengths of a read; a seventeenth stream waits for one of
//! sixteen to end; what is wished twice because two connections read the same is for the caller to notice.
//!
//! Owns: streams, windows, and what became of wishes. Does not own: what is absent, holes, chunks, fetching, time.
//! Costs some 3 KiB for each connection, and no allocation but for wishes.

mod candidate;
mod run;
mod trust;

#[cfg(test)]
mod tests;

use candidate::{Candidate, Verdict};
use run::Run;
pub use trust::Figures;
use trust::Trust;

use crate::ranges::ByteRange;
use crate::units::{KIB, MIB};

/// Streams of a connection that are told apart.
const STREAMS: usize = 16;
/// Reads for which a run that stands still is kept longer than a candidate.
const RUN_PATIENCE: u64 = 256;

/// How far reading ahead may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that a new run wishes for.
    pub first: u64,
    /// Bytes that one run may have wished for and not read yet; 0 for no readahead at all.
    pub most: u64,
    /// The unit of fetching, a power of two: wishes are cut at its multiples.
    pub chunk: u64,
}

impl Default for Limits {
    /// 16 MiB is what a reader must be ahead on a link of 10 Gbit/s and 10 ms (12.5 MB), with a step to spare.
    fn default() -> Self {
        Self { first: 128 * KIB, most: 16 * MIB, chunk: 64 * KIB }
    }
}

#[derive(Debug, Clone, Copy)]
enum Stream {
    Candidate(Candidate),
    Run(Run),
}

/// The streams of one connection.
#[derive(Debug)]
pub struct Readahead {
    limits: Limits,
    size: u64,
    /// Reads so far.
    now: u64,
    doors: Doors,
    streams: [Option<Stream>; STREAMS],
    trust: Trust,
}

/// What all streams are looked through for with each read, apart from them and each figure in a row: so random reads
/// touch little memory, and it is done without branches.
#[derive(Debug)]
struct Doors {
    /// Where reads begin that may continue a stream: `start - from < width`. No stream: a width of 0.
    from: [u64; STREAMS],
    width: [u64; STREAMS],
    /// Where the last read of a candidate began.
    last: [u64; STREAMS],
    /// The read that it was last used by, and more for a run: the lowest is replaced first.
    stamp: [u64; STREAMS],
}

/// One bit for each stream for which `is` holds, by its index.
fn select(is: impl Fn(usize) -> bool) -> u32 {
    (0..STREAMS).fold(0, |bits, index| bits | u32::from(is(index)) << index)
}

/// The indices of bits that are set.
fn indices(mut bits: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let index = usize::try_from((bits != 0).then(|| bits.trailing_zeros())?).ok()?;
        bits &= bits - 1;
        Some(index)
    })
}

impl Doors {
    const fn new() -> Self {
        Self { from: [0; STREAMS], width: [0; STREAMS], last: [0; STREAMS], stamp: [0; STREAMS] }
    }

    /// Streams that a read may continue that begins at `start`.
    fn at(&self, start: u64) -> impl Iterator<Item = usize> + use<> {
        indices(select(|index| start.wrapping_sub(self.from[index]) < self.width[index]))
    }

    /// Candidates whose last read began at most `most` bytes before `start`, and some other streams.
    fn before(&self, start: u64, most: u64) -> impl Iterator<Item = usize> + use<> {
        indices(select(|index| start.wrapping_sub(self.last[index]) <= most))
    }

    /// The stream that has not been used for longest.
    fn oldest(&self) -> usize {
        let stamps = self.stamp.iter().enumerate();
        let (_, index) = stamps.fold((u64::MAX, 0), |least, (index, &stamp)| least.min((stamp, index)));
        index
    }

    const fn close(&mut self, index: usize) {
        (self.from[index], self.width[index], self.last[index], self.stamp[index]) = (0, 0, 0, 0);
    }
}

impl Readahead {
    /// For a connection that has read nothing yet of an image of `size` bytes.
    pub const fn new(limits: Limits, size: u64) -> Self {
        Self { limits, size, now: 0, doors: Doors::new(), streams: [None; STREAMS], trust: Trust::new() }
    }

    /// Notes a read, whether it was a hit or a miss, and adds what should be fetched because of it to `wishes`, in the
    /// order in which it will be read: at most 64 ranges, within the image, at most `limits.most` bytes and a chunk.
    pub fn note(&mut self, read: ByteRange, wishes: &mut Vec<ByteRange>) {
        if self.limits.most == 0 || read.is_empty() || read.end() > self.size {
            return;
        }
        self.now += 1;
        match self.nearest(read) {
            Some(index) => self.advance(index, read, wishes),
            None => self.begin(read, wishes),
        }
    }

    /// Changes how many bytes a run may have wished for; 0 for no readahead.
    pub fn set_most(&mut self, bytes: u64) {
        self.limits.most = bytes;
        if bytes == 0 {
            (0..STREAMS).for_each(|index| self.end(index));
        }
    }

    /// What became of the wishes so far.
    pub const fn figures(&self) -> Figures {
        self.trust.figures()
    }

    /// The stream that a read continues: of several, that whose head is nearest. Runs come first: a candidate from
    /// before a run was found, and nearer, would go along with it and take its reads.
    fn nearest(&self, read: ByteRange) -> Option<usize> {
        let mut best = None;
        for index in self.doors.at(read.start()) {
            let rank = match &self.streams[index] {
                Some(Stream::Candidate(candidate)) => Some((1, candidate.distance(read))),
                Some(Stream::Run(run)) => run.distance(read, self.size).map(|distance| (0, distance)),
                None => None,
            };
            if let Some(rank) = rank
                && best.is_none_or(|(least, _)| rank < least)
            {
                best = Some((rank, index));
            }
        }
        best.map(|(_, index)| index)
    }

    fn advance(&mut self, index: usize, read: ByteRange, wishes: &mut Vec<ByteRange>) {
        match &mut self.streams[index] {
            Some(Stream::Candidate(candidate)) => {
                candidate.add(read);
                let candidate = *candidate;
                match candidate.verdict(self.trust.proof()) {
                    Verdict::Undecided => self.stamp(index),
                    Verdict::Wanders => self.put(index, Stream::Candidate(Candidate::new(read))),
                    Verdict::Runs(way) => self.start(index, &candidate, way, read, wishes),
                }
            }
            Some(Stream::Run(run)) => {
                self.trust.credit(run.add(read, self.size), run.is_silent());
                if run.has_lost_the_reader() {
                    self.end(index);
                    self.put(index, Stream::Candidate(Candidate::new(read)));
                } else {
                    self.wish(index, wishes);
                }
            }
            None => {}
        }
    }

    /// A read that continues nothing, unless it is the next of reads that are equally far apart.
    fn begin(&mut self, read: ByteRange, wishes: &mut Vec<ByteRange>) {
        let mut new = Candidate::new(read);
        for index in self.doors.before(read.start(), candidate::LONGEST_STRIDE.saturating_mul(read.length())) {
            if let Some(Stream::Candidate(before)) = &self.streams[index] {
                new.follow(before);
            }
        }
        let index = self.doors.oldest();
        self.end(index);
        match new.verdict(self.trust.proof()) {
            Verdict::Runs(way) => self.start(index, &new, way, read, wishes),
            _ => self.put(index, Stream::Candidate(new)),
        }
    }

    fn start(&mut self, index: usize, from: &Candidate, way: run::Way, read: ByteRange, wishes: &mut Vec<ByteRange>) {
        let run = Run::new(from, way, read, self.limits, self.size, self.trust.is_silent());
        self.put(index, Stream::Run(run));
        self.wish(index, wishes);
    }

    fn wish(&mut self, index: usize, wishes: &mut Vec<ByteRange>) {
        let Some(Stream::Run(mut run)) = self.streams[index] else { return };
        if run.is_due(self.limits, &self.trust) {
            self.absorb(index, &mut run);
            if run.is_silent() && !self.trust.is_silent() {
                run.speak();
            }
            let before = wishes.len();
            let bytes = run.wish(self.limits, &self.trust, self.size, wishes);
            if run.is_silent() {
                wishes.truncate(before);
            } else {
                self.trust.note_wish(bytes);
            }
        }
        self.put(index, Stream::Run(run));
    }

    /// Takes over runs whose wishes overlap those of `run`: they follow the same reader, whose requests did not come
    /// in order, or one that was caught up with.
    fn absorb(&mut self, index: usize, run: &mut Run) {
        for other in (0..STREAMS).filter(|other| *other != index) {
            if let Some(Stream::Run(second)) = self.streams[other]
                && run.absorb(&second)
            {
                self.streams[other] = None;
                self.doors.close(other);
            }
        }
    }

    fn put(&mut self, index: usize, stream: Stream) {
        self.streams[index] = Some(stream);
        self.stamp(index);
    }

    /// Notes that a stream was used: its door moves.
    fn stamp(&mut self, index: usize) {
        let doors = &mut self.doors;
        let (door, patience) = match &self.streams[index] {
            Some(Stream::Run(run)) => (run.door(self.size), RUN_PATIENCE),
            Some(Stream::Candidate(candidate)) => {
                doors.last[index] = candidate.last_start();
                (candidate.door(), 0)
            }
            None => return,
        };
        (doors.from[index], doors.width[index]) = door;
        doors.stamp[index] = self.now + patience;
    }

    fn end(&mut self, index: usize) {
        if let Some(Stream::Run(run)) = &self.streams[index] {
            self.trust.debit(run.unread(), run.is_silent());
        }
        self.streams[index] = None;
        self.doors.close(index);
    }
}
