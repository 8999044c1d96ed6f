//! Asking a server for news: where else the image is to be fetched from.
//!
//! A server that offers the context `x-headwater:notice` holds back the answer to a BLOCK_STATUS on it until there is
//! news for the mirror that asks, or a minute has passed. What the news are is then listed to a connection that says
//! which mirror it is: `x-headwater:moved=URI,...` or `x-headwater:upstreams=URI,...`, with commas within a URI written as
//! `%2C`; and `x-headwater:cast=GROUP:PORT` for each group to which the image is being sent.
//!
//! Owns: both questions, and what the answers may look like. Does not own: when to ask, and what is done about it
//! (`control`).

use std::io;
use std::time::Duration;

use bytes::BytesMut;
use thiserror::Error;

use super::opening::{self, Introduction, OpenFailure, open_contexts, part, queries};
use super::{Remote, Role};
use crate::export::NodeId;
use crate::export::facts::NAMESPACE;
use crate::nbd::client::{Answer, InFlight, Received, Request};
use crate::nbd::handshake::client::{Agreed, Ask, Outcome};
use crate::nbd::reply::Violation;
use crate::nbd::uri::{Address, Security};
use crate::nbd::wire::{CommandFlags, NOTICE, command};
use crate::nbd::{Extent, Uri};
use crate::net::Stream;
use crate::net::multicast::Group;
use crate::ranges::ByteRange;

/// Servers that one piece of news may name; more are left out.
pub const MOST_SERVERS: usize = 16;
/// Groups that a server may name for one image; more are left out.
pub const MOST_GROUPS: usize = 4;
/// How long a server may hold back its answer: half as long again as ours do.
const PATIENCE: Duration = Duration::from_secs(90);
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);
/// Input is taken in pieces of this size.
const INPUT: usize = 4096;

/// What a server tells a mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Fetch from these servers from now on, and leave this one.
    Moved(Vec<Uri>),
    /// These servers have the image; if the present one is not among them, leave it.
    Upstreams(Vec<Uri>),
}

impl News {
    /// The news in what a server has listed, if there are any that can be used: what is not a sound URI is left out. A
    /// server that says both has moved.
    pub fn find(listed: &[String]) -> Option<Self> {
        let of = |key: &str| {
            let texts = listed.iter().filter_map(|text| text.strip_prefix(NAMESPACE)?.strip_prefix(key));
            texts.map(parse).find(|uris| !uris.is_empty())
        };
        of("moved=").map(Self::Moved).or_else(|| of("upstreams=").map(Self::Upstreams))
    }

    /// The servers, in the order in which they are to be tried.
    pub fn uris(&self) -> &[Uri] {
        match self {
            Self::Moved(uris) | Self::Upstreams(uris) => uris,
        }
    }

    /// Without servers that only the teller's own host can mean: a path of a socket is of no use elsewhere, and who tells
    /// us one could have us speak to anything here. From a server that we reach by TLS nothing leads to one without, and
    /// never with files that the teller names: the certificates stay those by which we know it. `None`: nothing is left.
    fn told_by(self, teller: &Uri) -> Option<Self> {
        let is_near = is_on_this_host(&teller.address);
        let is_used = |uri: &Uri| {
            (is_near || matches!(uri.address, Address::Tcp { .. }))
                && (uri.is_protected() || teller.security == Security::Plain)
        };
        let keep = |uris: Vec<Uri>| -> Vec<Uri> {
            let known = uris.into_iter().filter(is_used).map(|mut uri| {
                uri.tls.certificates = teller.tls.certificates.clone().filter(|_| uri.security == Security::Tls);
                uri
            });
            known.collect()
        };
        let news = match self {
            Self::Moved(uris) => Self::Moved(keep(uris)),
            Self::Upstreams(uris) => Self::Upstreams(keep(uris)),
        };
        (!news.uris().is_empty()).then_some(news)
    }
}

/// All that a server tells a mirror at one time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Told {
    /// Where else to go, if it says so.
    pub news: Option<News>,
    /// Groups to which the image is being sent, at most [`MOST_GROUPS`]. It is believed that they are groups, and
    /// nothing else: what is heard there is held against the manifest.
    pub groups: Vec<Group>,
}

impl Told {
    /// What is of use in what a server has listed.
    pub fn find(listed: &[String]) -> Self {
        let mut groups = Vec::new();
        let named = listed.iter().filter_map(|text| text.strip_prefix(NAMESPACE)?.strip_prefix("cast="));
        for group in named.filter_map(|text| text.parse().ok()) {
            if groups.len() < MOST_GROUPS && !groups.contains(&group) {
                groups.push(group);
            }
        }
        Self { news: News::find(listed), groups }
    }
}

/// Each once, at most [`MOST_SERVERS`].
fn parse(text: &str) -> Vec<Uri> {
    let mut uris: Vec<Uri> = Vec::new();
    for uri in text.split(',').filter_map(|text| text.parse().ok()) {
        if uris.len() < MOST_SERVERS && !uris.contains(&uri) {
            uris.push(uri);
        }
    }
    uris
}

fn is_on_this_host(address: &Address) -> bool {
    match address {
        Address::Unix(_) => true,
        Address::Tcp { host, .. } => {
            host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
        }
    }
}

/// Why there is no answer.
#[derive(Debug, Error)]
pub enum Lost {
    /// The socket failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server closed it.
    #[error("the server closed the connection")]
    Closed,
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// The server said no.
    #[error("the server refused: {0}")]
    Refused(String),
    /// It has held back its answer for too long.
    #[error("the server does not answer")]
    Silent,
}

/// A connection that waits for news and does nothing else.
#[derive(Debug)]
pub struct Line {
    stream: Stream,
    agreed: Agreed,
    in_flight: InFlight<()>,
    input: BytesMut,
    output: BytesMut,
}

impl Line {
    /// Connects to a server; `None` if it tells no news.
    async fn open(uri: &Uri, role: Role, limit: Duration) -> Result<Option<Self>, OpenFailure> {
        let introduction = Introduction { role, limit };
        let (stream, input, agreed) = open_contexts(uri, introduction, vec![NOTICE.to_owned()]).await?;
        let in_flight = InFlight::new(agreed.replies);
        let line = Self { stream, in_flight, input, output: BytesMut::new(), agreed };
        if line.agreed.contexts.is_empty() || line.agreed.size == 0 {
            line.close().await;
            return Ok(None);
        }
        Ok(Some(line))
    }

    /// Waits until the server answers: `true` if there is news. After an error the line is of no use any more.
    ///
    /// Cancel safety: the question stands, and the next call waits for its answer.
    pub async fn wait(&mut self) -> Result<bool, Lost> {
        if self.in_flight.is_empty() {
            let block = u64::from(self.agreed.block_sizes.minimum);
            let range = ByteRange::between(0, block.clamp(1, self.agreed.size));
            let request = Request { command: command::BLOCK_STATUS, flags: CommandFlags::REQ_ONE, range };
            self.in_flight.submit(request, (), &mut self.output);
        }
        tokio::time::timeout(PATIENCE, self.answer()).await.unwrap_or(Err(Lost::Silent))
    }

    async fn answer(&mut self) -> Result<bool, Lost> {
        loop {
            self.stream.write_all(&mut self.output).await?;
            match self.in_flight.receive(&mut self.input)? {
                Received::Reply(completion) => {
                    let answer = completion.result.map_err(|error| Lost::Refused(error.to_string()))?;
                    return Ok(self.tells_of_news(answer));
                }
                Received::Progress => {}
                Received::NeedInput => {
                    self.input.reserve(INPUT);
                    if self.stream.read_buf(&mut self.input).await? == 0 {
                        return Err(Lost::Closed);
                    }
                }
            }
        }
    }

    fn tells_of_news(&self, answer: Answer) -> bool {
        let Answer::Status(contexts) = answer else { return false };
        let is_notice = |id: u32| self.agreed.contexts.iter().any(|(known, name)| *known == id && name == NOTICE);
        let mut extents = contexts.into_iter().filter(|(id, _)| is_notice(*id)).flat_map(|(_, extents)| extents);
        extents.any(|Extent { status, .. }| status & 1 != 0)
    }

    /// Says goodbye, within a second.
    pub async fn close(self) {
        let _ = tokio::time::timeout(GOODBYE, part(&self.stream, self.agreed.replies)).await;
    }
}

impl Remote {
    /// A connection that waits for news from the server at `uri`; `None` if it tells none. It lives on the worker that
    /// calls.
    pub async fn listen(&self, uri: &Uri) -> Result<Option<Line>, OpenFailure> {
        Line::open(uri, self.common.terms().role, self.pool().connect_timeout).await
    }

    /// What the server at `uri` has to tell us now, asked over a connection of its own.
    pub async fn news(&self, uri: &Uri) -> Result<Told, OpenFailure> {
        let ask = Ask::Contexts { export: uri.export.clone(), list: queries(self.common.terms().role) };
        match opening::open(uri, ask, self.pool().connect_timeout).await?.2 {
            Outcome::Contexts(listed) => {
                let Told { news, groups } = Told::find(&listed);
                Ok(Told { news: news.and_then(|news| news.told_by(uri)), groups })
            }
            Outcome::Listed(_) | Outcome::Opened(_) | Outcome::StartTls => Ok(Told::default()),
        }
    }

    /// The name by which servers know us, if we have one.
    pub fn node(&self) -> Option<NodeId> {
        self.common.terms().role.node()
    }
}

/// Takes arbitrary bytes as what a server has listed, one string a line.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let listed: Vec<_> = String::from_utf8_lossy(data).lines().map(str::to_owned).collect();
    let Told { news, groups } = Told::find(&listed);
    assert!(groups.len() <= MOST_GROUPS, "too many groups");
    let texts: Vec<_> = groups.iter().map(|group| format!("{NAMESPACE}cast={group}")).collect();
    assert_eq!(Told::find(&texts), Told { news: None, groups }, "groups read back as something else");
    let Some(news) = news else { return };
    assert!((1..=MOST_SERVERS).contains(&news.uris().len()), "no servers, or too many");
    let texts: Vec<_> = news.uris().iter().map(Uri::to_string).collect();
    assert!(texts.iter().all(|text| !text.contains(',')), "a comma in a URI would be taken for the end of it");
    let key = if matches!(news, News::Moved(_)) { "moved" } else { "upstreams" };
    let again = News::find(&[format!("{NAMESPACE}{key}={}", texts.join(","))]);
    assert_eq!(again, Some(news), "it reads back as something else");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn find(listed: &[&str]) -> Option<News> {
        News::find(&listed.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    fn uris(texts: &[&str]) -> Vec<Uri> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn news_are_found_among_what_is_listed() {
        let moved = find(&["x-headwater:notice", "x-headwater:moved=nbd://b/x,nbd+unix:///y%2Cz?socket=/s"]);
        let expected = uris(&["nbd://b/x", "nbd+unix:///y%2Cz?socket=/s"]);
        assert_eq!(expected[1].export, "y,z");
        assert_eq!(moved, Some(News::Moved(expected)));
        let both = find(&["x-headwater:upstreams=nbd://a/x", "x-headwater:moved=nbd://b/x"]);
        assert_eq!(both, Some(News::Moved(uris(&["nbd://b/x"]))));
        let upstreams = find(&["x-headwater:upstreams=nbd://a/x,nbd://a/x,nbd://c/x"]);
        assert_eq!(upstreams, Some(News::Upstreams(uris(&["nbd://a/x", "nbd://c/x"]))));
    }

    #[test]
    fn groups_are_believed_to_be_groups() {
        let groups = |listed: &[&str]| -> Vec<String> {
            let listed: Vec<_> = listed.iter().map(|text| format!("x-headwater:cast={text}")).collect();
            Told::find(&listed).groups.iter().map(Group::to_string).collect()
        };
        assert_eq!(groups(&["239.1.2.3:7", "[ff15::7]:7", "239.1.2.3:7"]), ["239.1.2.3:7", "[ff15::7]:7"]);
        for text in ["", "239.1.2.3", "239.1.2.3:0", "10.0.0.1:7", "[::1]:7", "all:7", "239.1.2.3:7,239.1.2.4:7"] {
            assert!(groups(&[text]).is_empty(), "{text}");
        }
        let many: Vec<_> = (0..100).map(|last| format!("239.1.2.{last}:7")).collect();
        assert_eq!(groups(&many.iter().map(String::as_str).collect::<Vec<_>>()).len(), MOST_GROUPS);
        let both = ["x-headwater:cast=239.1.2.3:7", "x-headwater:moved=nbd://b/x"].map(str::to_owned);
        assert!(matches!(Told::find(&both), Told { news: Some(News::Moved(_)), groups } if groups.len() == 1));
    }

    #[test]
    fn what_cannot_be_used_is_left_out() {
        for text in ["x-headwater:moved=", "x-headwater:moved=,", "x-headwater:moved=http://a/x", "moved=nbd://a/x"] {
            assert_eq!(find(&[text]), None, "{text}");
        }
        let some = find(&["x-headwater:moved=nbd://a:0/x,nbd://b/x,nbd://c/x#y,file:///etc"]);
        assert_eq!(some, Some(News::Moved(uris(&["nbd://b/x"]))));
        let many: Vec<_> = (0..100).map(|number| format!("nbd://h{number}/x")).collect();
        let news = find(&[&format!("x-headwater:moved={}", many.join(","))]).unwrap();
        assert_eq!(news.uris().len(), MOST_SERVERS);
        assert_eq!(news.uris()[15].to_string(), "nbd://h15/x");
    }

    #[test]
    fn sockets_are_believed_to_neighbours_only() {
        let news = || find(&["x-headwater:moved=nbd+unix:///x?socket=/s,nbd://b/x"]).unwrap();
        for (teller, count) in [
            ("nbd://192.0.2.1/x", 1),
            ("nbd://example.com/x", 1),
            ("nbd://127.0.0.1/x", 2),
            ("nbd://[::1]/x", 2),
            ("nbd://localhost/x", 2),
            ("nbd+unix:///x?socket=/t", 2),
        ] {
            let left = news().told_by(&teller.parse().unwrap()).unwrap();
            assert_eq!(left.uris().len(), count, "{teller}");
        }
        for (teller, left) in [
            ("nbds://192.0.2.1/x", None),
            ("nbds://localhost/x", Some(&["nbd+unix:///x?socket=/s"][..])),
            ("nbds+unix:///x?socket=/t", Some(&["nbd+unix:///x?socket=/s"][..])),
        ] {
            let told = news().told_by(&teller.parse().unwrap());
            assert_eq!(told, left.map(|left| News::Moved(uris(left))), "TLS is not given up: {teller}");
        }
        let safe =
            find(&["x-headwater:upstreams=nbd://b/x,nbds://c/x"]).unwrap().told_by(&"nbds://a/x".parse().unwrap());
        assert_eq!(safe, Some(News::Upstreams(uris(&["nbds://c/x"]))));
        // Files are those by which we know the teller.
        let told = find(&["x-headwater:moved=nbd://a/x,nbds://b/x?tls-certificates=/etc"]).unwrap();
        let left = told.told_by(&"nbds://c/x?tls-certificates=/ours".parse().unwrap()).unwrap();
        assert_eq!(left.uris(), uris(&["nbds://b/x?tls-certificates=/ours"]));
        let only = find(&["x-headwater:moved=nbd+unix:///x?socket=/s"]).unwrap();
        assert_eq!(only.told_by(&"nbd://192.0.2.1/x".parse().unwrap()), None);
    }

    proptest! {
        #[test]
        fn no_listing_breaks_the_parser(text in ".{0,80}", tail in "[a-z0-9/:%?=&@\\[\\].,+]{0,60}") {
            fuzz(text.as_bytes());
            fuzz(format!("x-headwater:moved=nbd://a/{tail}").as_bytes());
            fuzz(format!("x-headwater:upstreams={tail},nbd:{tail}\n{text}").as_bytes());
            fuzz(format!("x-headwater:cast={tail}\nx-headwater:cast=239.1.{tail}:7\nx-headwater:cast={text}").as_bytes());
        }

        #[test]
        fn any_list_of_servers_reads_back(names in prop::collection::hash_set("[^\0]{0,20}", 1..16)) {
            let uris: Vec<_> = names.into_iter().map(|name| Uri::plain(Address::Unix(format!("/{name}").into()), name)).collect();
            let texts: Vec<_> = uris.iter().map(Uri::to_string).collect();
            prop_assert_eq!(find(&[&format!("x-headwater:moved={}", texts.join(","))]), Some(News::Moved(uris)));
        }
    }
}
