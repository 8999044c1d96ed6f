//! An image as its clients get it: each connection's reads are watched, and what they lead to is fetched.
//!
//! Owns: the watching. Does not own: any bytes; reads go to the mirror as they came.

use std::io::IoSlice;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};

use super::engine::Engine;
use super::image::Image;
use super::profile::Part;
use super::readahead::{Limits, Readahead};
use crate::clock;
use crate::error::Result;
use crate::export::{
    Check, Client, Context, Export, Facts, FileRange, LocalFuture, Piece, SharedExport, TryRead, TryWrite,
};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;

/// A reader that found so many of its reads here, and so many chunks' worth of bytes, is not looked at any more.
const IDLE_READS: u32 = 64;
const IDLE_CHUNKS: u64 = 4;

/// An image that is filled ahead of demand: as it stands in the registry, or for one connection.
#[derive(Debug)]
pub struct Filled {
    engine: Engine,
    image: Arc<Image>,
    /// What the connection has read; locked by its worker alone.
    watch: Option<Mutex<Watch>>,
}

#[derive(Debug)]
struct Watch {
    /// Reads, and their bytes, since one had to wait or met what was brought ahead.
    idle: (u32, u64),
    readahead: Option<Readahead>,
    wishes: Vec<ByteRange>,
    /// What is recorded of it, in its first minute.
    part: Option<Part>,
    has_read: bool,
}

impl Filled {
    /// `image`, filled by `engine`.
    pub const fn new(engine: Engine, image: Arc<Image>) -> Self {
        Self { engine, image, watch: None }
    }

    /// What is filled.
    pub const fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Whether a read of `range` tells something about what is to be fetched: it has to wait, or meets what was brought
    /// ahead. To be asked before it is made.
    fn is_news(&self, range: ByteRange) -> bool {
        self.watch.is_some() && self.image.has_gaps() && self.image.mirror.is_news(range)
    }

    /// A client has read, or is about to.
    fn note(&self, range: ByteRange, is_news: bool) {
        let Some(watch) = &self.watch else { return };
        let mut watch = watch.lock().unwrap_or_else(PoisonError::into_inner);
        let Watch { idle, readahead, wishes, part, has_read } = &mut *watch;
        if !std::mem::replace(has_read, true) {
            self.image.play(&self.engine);
        }
        if let Some(recorded) = part {
            let now = clock::now();
            recorded.note(now, range);
            if recorded.is_over(now) {
                *part = None;
            }
        }
        *idle = if is_news { (0, 0) } else { (idle.0.saturating_add(1), idle.1.saturating_add(range.length())) };
        // Who finds all that it reads leads nowhere where something is missing, and costs nothing.
        let is_idle = idle.0 > IDLE_READS && idle.1 > IDLE_CHUNKS * self.image.mirror.chunk_size();
        let Some(readahead) = readahead.as_mut().filter(|_| !is_idle) else { return };
        readahead.note(range, wishes);
        if wishes.is_empty() {
            return;
        }
        if self.image.is_readahead_wasted() {
            return wishes.clear();
        }
        self.image.wish(wishes.drain(..));
        drop(watch);
        self.engine.pump();
    }
}

#[deny(clippy::missing_trait_methods)]
impl Export for Filled {
    fn facts(&self) -> Facts {
        self.image.mirror.facts()
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        let is_news = self.is_news(range);
        let result = self.image.mirror.try_read(range, output);
        // What has to wait is noted when it is read again.
        if result != TryRead::Wait {
            self.note(range, is_news);
        }
        result
    }

    fn file_id(&self) -> Option<[u64; 2]> {
        None
    }

    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        let is_news = self.is_news(range);
        let found = self.image.mirror.in_file(range);
        if found.is_some() {
            self.note(range, is_news);
        }
        found
    }

    fn is_in_file(&self, range: ByteRange) -> bool {
        self.image.mirror.is_in_file(range)
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        let is_news = self.is_news(range);
        let mut read = self.image.mirror.read(range);
        let mut is_noted = false;
        Box::pin(std::future::poll_fn(move |context| {
            let result = read.as_mut().poll(context);
            // What the client waits for has begun before what it does not wait for.
            if !std::mem::replace(&mut is_noted, true) {
                self.note(range, is_news);
            }
            result
        }))
    }

    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        self.image.mirror.read_verified(range, check)
    }

    fn manifest(&self) -> Option<SharedExport> {
        self.image.mirror.manifest()
    }

    fn profile(&self) -> Option<SharedExport> {
        self.image.mirror.profile()
    }

    fn profile_inbox(&self) -> Option<SharedExport> {
        self.image.mirror.profile_inbox()
    }

    fn connect(&self, client: Client) -> Option<SharedExport> {
        self.image.look();
        // Eight readers at a time find room: what is evicted before it is read has been fetched for nothing.
        let most = self.image.filling().readahead.min(self.image.mirror.most_ahead() / 8);
        let limits = Limits { most, ..Limits::default() };
        let watch = Watch {
            readahead: (most > 0).then(|| Readahead::new(limits, self.image.mirror.size())),
            idle: (u32::MAX, u64::MAX),
            wishes: Vec::new(),
            // A mirror hands up what its own clients read, and reads more than that.
            part: (!client.is_mirror).then(|| self.image.exchange().recording().join(clock::now())).flatten(),
            has_read: false,
        };
        let (engine, image) = (self.engine.clone(), Arc::clone(&self.image));
        Some(Arc::new(Self { engine, image, watch: Some(Mutex::new(watch)) }))
    }

    fn try_write(&self, offset: u64, parts: &[IoSlice<'_>]) -> TryWrite {
        self.image.mirror.try_write(offset, parts)
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.image.mirror.write(offset, data, durability)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.image.mirror.write_zeroes(range, mode, durability)
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.image.mirror.trim(range, durability)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.image.mirror.flush()
    }

    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        self.image.mirror.cache(range)
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.image.mirror.extents(range, context, limit)
    }
}
