//! A group as its hearers: finding the mirror, putting blocks together, handing them over.
//!
//! STUB

use std::fmt;
use std::io;
use std::sync::Arc;

use crate::cast::SessionId;
use crate::cast::form::Terms;
use crate::cast::receiver::State;
use crate::manifest::ImageId;
use crate::mirror::Mirror;
use crate::net::multicast::Group;
use crate::ranges::ByteRange;
use crate::worker::Workers;

/// Who has mirrors that a session can fill.
///
/// *Who implements it*: whoever knows the mirrors of a server. *Who calls it*: the thread of a group; it must not wait for
/// long.
pub trait Audience: fmt::Debug + Send + Sync {
    /// The mirror that has a manifest and holds this.
    fn mirror(&self, image: ImageId) -> Option<Mirror>;

    /// A session fills a mirror from now on. It brings `covers`.
    fn began(&self, mirror: &Mirror, terms: &Terms, covers: Vec<ByteRange>);

    /// It does not any more.
    fn ended(&self, mirror: &Mirror, terms: &Terms, state: State);
}

/// Hears one group. Dropped, it leaves the group, and sessions that are not over are abandoned.
#[derive(Debug)]
pub struct Hearing;

/// What was heard so far.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// Bytes of all datagrams.
    pub bytes: u64,
    /// Datagrams that are none of ours, or of images that nobody here has.
    pub foreign: u64,
    /// Those with a wrong tag.
    pub forged: u64,
    /// Those that were malformed.
    pub broken: u64,
    /// Those that the system threw away because the queue was full.
    pub overflowed: u64,
    /// Sessions that are under way, and some that were.
    pub sessions: Vec<HeardSession>,
}

/// One session, of one mirror.
#[derive(Debug, Clone)]
pub struct HeardSession {
    /// The session.
    pub session: SessionId,
    /// What it brings.
    pub image: ImageId,
    /// Whether it still does.
    pub state: State,
    /// Blocks that are here, and all.
    pub blocks: (u32, u32),
    /// Bytes of symbols that were kept.
    pub kept_bytes: u64,
    /// Symbols that were here already, or that nobody wanted.
    pub skipped: u64,
    /// Blocks that were mended.
    pub mended: u64,
    /// Blocks whose bytes were not those of the image.
    pub wrong: u64,
}

impl Hearing {
    /// Joins a group and fills the mirrors of `audience` with what is heard, on a thread of its own.
    pub fn start(
        group: Group,
        interface: Option<String>,
        audience: Arc<dyn Audience>,
        workers: &Arc<Workers>,
    ) -> io::Result<Self> {
        let _ = (group, interface, audience, workers);
        unimplemented!()
    }

    /// What was heard so far.
    pub fn status(&self) -> Heard {
        unimplemented!()
    }
}
