//! News for mirrors: kept until they are asked for, and told at once to those who wait.
//!
//! Owns: who is to be told what, and what each connection has been told. Does not own: what the news are (`control`), and
//! the request that waits (`transmission`).
//!
//! All who wait look when anything is told to anybody. That is a look in a map for each, some hundred nanoseconds, and
//! news are rare.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::export::facts::NAMESPACE;
use crate::export::{NodeId, split_content_name};
use crate::nbd::Uri;
use crate::nbd::wire::MAX_STRING;
use crate::net::multicast::Group;

/// Groups that mirrors are told of one export.
pub const MOST_GROUPS: usize = 4;
/// News that are kept. The oldest give way: a mirror that has not asked for so long is gone.
const MOST: usize = 4096;
/// How long an answer is held back while there are no news.
const HELD: Duration = Duration::from_secs(60);
/// The same in a debug build: tests set it here, in seconds.
const HELD_VARIABLE: &str = "HEADWATER_NOTICE_SECONDS";

/// The news for one mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// It is to fetch from these servers from now on, and to leave this one: `x-headwater:moved=URI,...`.
    Moved(Vec<Uri>),
    /// These are the servers that have the image; no need to leave: `x-headwater:upstreams=URI,...`.
    Upstreams(Vec<Uri>),
}

impl News {
    /// The news as a name of a context, at most as long as a string may be: of more servers the last are left out. `None`
    /// if none fits.
    ///
    /// A URI is printed without commas, so that they can only be those between two.
    fn to_text(&self) -> Option<String> {
        let (kind, uris) = match self {
            Self::Moved(uris) => ("moved", uris),
            Self::Upstreams(uris) => ("upstreams", uris),
        };
        let mut text = format!("{NAMESPACE}{kind}=");
        let empty = text.len();
        for uri in uris {
            // Paths of files mean nothing on other hosts.
            let uri = uri.clone().without_files().to_string();
            let comma = usize::from(text.len() > empty);
            if text.len() + comma + uri.len() > MAX_STRING {
                break;
            }
            text.push_str(&","[..comma]);
            text.push_str(&uri);
        }
        (text.len() > empty).then_some(text)
    }
}

/// What mirrors are told, by the name of the export and the mirror. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Notices(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    table: Mutex<Table>,
    /// The number of the last news.
    last: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    /// How many news there were.
    count: u64,
    news: BTreeMap<(String, NodeId), (u64, News)>,
    /// Those of them that have been asked for since they were told.
    asked: BTreeSet<(String, NodeId)>,
    /// Where an export is sent to many at once, for all mirrors, and the number of that. One for each export that ever
    /// was: who was told of a group is told too when there is none any more.
    casts: BTreeMap<String, (u64, Vec<Group>)>,
}

impl Default for Notices {
    fn default() -> Self {
        Self(Arc::new(Shared { table: Mutex::default(), last: watch::Sender::new(0) }))
    }
}

impl Notices {
    /// Tells a mirror that has (or will have) connections to `export`, in place of what it was told before. Those to
    /// `EXPORT@blake3-...` are told too, if nothing is to be told to just those.
    ///
    /// 4096 news are kept; then the oldest are forgotten.
    pub fn tell(&self, export: &str, node: NodeId, news: News) {
        let mut table = self.lock();
        table.count += 1;
        let count = table.count;
        table.asked.remove(&(export.to_owned(), node));
        table.news.insert((export.to_owned(), node), (count, news));
        if table.news.len() > MOST {
            let oldest = table.news.iter().min_by_key(|(_, (number, _))| *number).map(|(key, _)| key.clone());
            oldest.map(|key| (table.asked.remove(&key), table.news.remove(&key)));
        }
        drop(table);
        self.0.last.send_replace(count);
    }

    /// Tells all mirrors that have (or will have) connections to `export`, or to `EXPORT@blake3-...`, that it is sent to
    /// these groups now (`x-headwater:cast=GROUP:PORT` each, the first four), in place of what was told before.
    pub fn cast(&self, export: &str, groups: &[Group]) {
        let mut table = self.lock();
        let groups = &groups[..groups.len().min(MOST_GROUPS)];
        if table.casts.get(export).map_or(&[][..], |(_, groups)| groups) == groups {
            return;
        }
        table.count += 1;
        let count = table.count;
        table.casts.insert(export.to_owned(), (count, groups.to_vec()));
        drop(table);
        self.0.last.send_replace(count);
    }

    /// The groups that mirrors are told of `export` now.
    pub fn groups(&self, export: &str) -> Vec<Group> {
        self.lock().casts_of(export).collect()
    }

    /// There is nothing to be told any more.
    pub fn forget(&self, export: &str, node: NodeId) {
        let mut table = self.lock();
        table.news.remove(&(export.to_owned(), node));
        table.asked.remove(&(export.to_owned(), node));
    }

    /// Whether a mirror has asked for what it is to be told, since that was told.
    pub fn is_asked(&self, export: &str, node: NodeId) -> bool {
        self.lock().asked.contains(&(export.to_owned(), node))
    }

    /// What a mirror that asks about the export of this full name is told, as names of contexts.
    pub(super) fn strings(&self, export: &str, node: NodeId) -> Vec<String> {
        let mut table = self.lock();
        let mut texts: Vec<_> = table.casts_of(export).map(|group| format!("{NAMESPACE}cast={group}")).collect();
        if let Some(key) = table.key(export, node) {
            texts.extend(table.news.get(&key).and_then(|(_, news)| news.to_text()));
            table.asked.insert(key);
        }
        texts
    }

    /// The number of the last that a mirror is to be told; 0 if there is nothing.
    fn last(&self, export: &str, node: NodeId) -> u64 {
        let table = self.lock();
        let news = table.key(export, node).and_then(|key| Some(table.news.get(&key)?.0));
        let casts = names(export).into_iter().filter_map(|name| Some(table.casts.get(name)?.0));
        casts.chain(news).max().unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Where the news for a mirror are that asks about the export of this full name.
    fn key(&self, export: &str, node: NodeId) -> Option<(String, NodeId)> {
        let keys = names(export).map(|name| (name.to_owned(), node));
        keys.into_iter().find(|key| self.news.contains_key(key))
    }

    /// The groups that whoever asks about the export of this full name is told.
    fn casts_of(&self, export: &str) -> impl Iterator<Item = Group> {
        let groups: BTreeSet<_> = names(export)
            .into_iter()
            .filter_map(|name| self.casts.get(name))
            .flat_map(|(_, groups)| groups.iter().copied())
            .collect();
        groups.into_iter().take(MOST_GROUPS)
    }
}

/// The names under which there may be something for who asks about the export of this full name.
fn names(export: &str) -> [&str; 2] {
    [export, split_content_name(export).0]
}

/// The news as one connection hears them.
#[derive(Debug)]
pub(super) struct Ears {
    notices: Notices,
    export: String,
    /// The mirror that the connection belongs to; nobody else is told anything.
    node: Option<NodeId>,
    /// The number of the last news that it was told of.
    heard: Rc<Cell<u64>>,
}

impl Ears {
    pub(super) fn new(notices: Notices, export: String, node: Option<NodeId>) -> Self {
        Self { notices, export, node, heard: Rc::default() }
    }

    /// Waits for news that this connection was not told of, for about a minute. Says whether there are some.
    pub(super) fn listen(&self) -> impl Future<Output = bool> + use<> {
        self.listen_for(held())
    }

    fn listen_for(&self, limit: Duration) -> impl Future<Output = bool> + use<> {
        let Self { notices, export, node, heard } = self;
        let (notices, export, node, heard) = (notices.clone(), export.clone(), *node, Rc::clone(heard));
        async move {
            let mut changed = notices.0.last.subscribe();
            let news = async {
                loop {
                    let number = node.map_or(0, |node| notices.last(&export, node));
                    if number > heard.get() {
                        return heard.set(number);
                    }
                    // The sender lives as long as `notices`.
                    let _ = changed.changed().await;
                }
            };
            tokio::time::timeout(limit, news).await.is_ok()
        }
    }
}

fn held() -> Duration {
    let set = std::env::var(HELD_VARIABLE).ok().filter(|_| cfg!(debug_assertions));
    let seconds = set.and_then(|text| text.parse().ok());
    seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or(HELD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uri(text: &str) -> Uri {
        text.parse().unwrap()
    }

    fn moved(text: &str) -> News {
        News::Moved(vec![uri(text)])
    }

    const NODE: NodeId = NodeId([1; 16]);

    #[test]
    fn the_last_that_was_told_holds_until_it_is_forgotten() {
        let notices = Notices::default();
        assert!(notices.strings("a", NODE).is_empty());
        notices.tell("a", NODE, moved("nbd://b/a"));
        notices.tell("a", NODE, moved("nbd://c/a"));
        assert_eq!(notices.strings("a", NODE), ["x-headwater:moved=nbd://c/a"]);
        assert!(notices.strings("b", NODE).is_empty() && notices.strings("a", NodeId([2; 16])).is_empty());
        let whole = format!("a@blake3-{}", "ab".repeat(32));
        assert_eq!(notices.strings(&whole, NODE), ["x-headwater:moved=nbd://c/a"]);
        assert!(notices.strings("a@manifest", NODE).is_empty());
        notices.tell(&whole, NODE, News::Upstreams(vec![uri("nbd://d/a"), uri("nbd://e/a")]));
        assert_eq!(notices.strings(&whole, NODE), ["x-headwater:upstreams=nbd://d/a,nbd://e/a"]);
        assert_eq!(notices.strings("a", NODE), ["x-headwater:moved=nbd://c/a"]);
        notices.forget("a", NODE);
        assert!(notices.strings("a", NODE).is_empty());
    }

    #[tokio::test]
    async fn all_mirrors_hear_where_an_export_is_sent_to_and_that_it_is_not_any_more() {
        let notices = Notices::default();
        let group = |last: u8| format!("239.1.2.{last}:7000").parse::<Group>().unwrap();
        let whole = format!("a@blake3-{}", "ab".repeat(32));
        let ears = Ears::new(notices.clone(), "a".into(), Some(NODE));
        let hears = async |ears: &Ears| futures_util::poll!(Box::pin(ears.listen())).is_ready();
        notices.cast("a", &[]);
        assert!(!hears(&ears).await, "there was nothing before");
        notices.cast("a", &[group(1)]);
        for (export, node) in [("a", NODE), ("a", NodeId([2; 16])), (whole.as_str(), NODE)] {
            assert_eq!(notices.strings(export, node), ["x-headwater:cast=239.1.2.1:7000"], "{export}");
        }
        assert!(notices.strings("b", NODE).is_empty() && notices.strings("a@manifest", NODE).is_empty());
        assert!(hears(&ears).await && !hears(&ears).await);
        notices.cast("a", &[group(1)]);
        assert!(!hears(&ears).await, "the same");
        notices.tell("a", NODE, moved("nbd://b/a"));
        let both = ["x-headwater:cast=239.1.2.1:7000", "x-headwater:moved=nbd://b/a"];
        assert_eq!(notices.strings("a", NODE), both);
        assert!(hears(&ears).await);
        notices.cast("a", &[]);
        assert!(hears(&ears).await);
        assert_eq!(notices.strings("a", NODE), ["x-headwater:moved=nbd://b/a"]);
        notices.cast("a", &[1, 2, 3, 4, 5].map(group));
        assert_eq!(notices.strings("a", NodeId([2; 16])).len(), MOST_GROUPS);
        assert!(!hears(&Ears::new(notices, "a".into(), None)).await, "a stranger");
    }

    #[test]
    fn so_many_news_are_kept() {
        let notices = Notices::default();
        let node = |number: usize| NodeId(u128::try_from(number).unwrap().to_be_bytes());
        // The first is told again, so the second is the oldest.
        for number in (0..MOST).chain([0, MOST]) {
            notices.tell("a", node(number), moved("nbd://b/a"));
        }
        let is_kept = |number| !notices.strings("a", node(number)).is_empty();
        assert!(is_kept(0) && !is_kept(1) && is_kept(2) && is_kept(MOST));
        assert_eq!(notices.lock().news.len(), MOST);
    }

    #[tokio::test]
    async fn a_connection_hears_all_news_once() {
        let notices = Notices::default();
        let ears = Ears::new(notices.clone(), "a".into(), Some(NODE));
        let hears = async |ears: &Ears| futures_util::poll!(Box::pin(ears.listen())).is_ready();
        assert!(!hears(&ears).await);
        notices.tell("a", NODE, moved("nbd://b/a"));
        assert!(ears.listen().await);
        assert!(!hears(&ears).await, "the same news");
        let mut waiting = Box::pin(ears.listen());
        let mut is_over = async || futures_util::poll!(&mut waiting).is_ready();
        assert!(!is_over().await);
        notices.tell("b", NODE, moved("nbd://b/b"));
        notices.tell("a", NodeId([2; 16]), moved("nbd://b/a"));
        assert!(!is_over().await, "news for others");
        notices.tell("a", NODE, moved("nbd://b/a"));
        assert!(waiting.await);
        assert!(hears(&Ears::new(notices.clone(), "a".into(), Some(NODE))).await, "another connection");
        assert!(!hears(&Ears::new(notices, "a".into(), None)).await, "a stranger");
    }

    #[tokio::test]
    async fn no_news_come_after_a_while() {
        let ears = Ears::new(Notices::default(), "a".into(), Some(NODE));
        assert!(!ears.listen_for(Duration::from_millis(1)).await);
    }

    proptest! {
        #[test]
        fn any_list_fits_a_string_and_reads_back(exports in prop::collection::vec("[^\0]{0,300}", 1..40)) {
            let uris: Vec<_> = exports.iter().map(|export| {
                Uri::plain(crate::nbd::uri::Address::Tcp { host: "h,1".into(), port: 7 }, export.clone())
            }).collect();
            let text = News::Moved(uris.clone()).to_text().unwrap();
            prop_assert!(text.len() <= MAX_STRING);
            let list = text.strip_prefix("x-headwater:moved=").unwrap();
            let read: Vec<Uri> = list.split(',').map(uri).collect();
            prop_assert_eq!(&read, &uris[..read.len()]);
            let next = uris.get(read.len()).map_or(MAX_STRING, |uri| uri.to_string().len());
            prop_assert!(text.len() + 1 + next > MAX_STRING, "as many as there is room for");
        }
    }
}
