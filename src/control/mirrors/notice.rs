//! A mirror that goes where it is told.
//!
//! While the server that requests go to offers it, one connection more waits there for news ([`Line`]). What the news are
//! is asked for by a fresh connection: when the mirror comes to a server, when the server says that there is something,
//! when the line was lost (the server may be going away), and, as long as news could not be followed, again after a
//! pause. Servers that tell no news are left alone.
//!
//! What is told last holds. A server may still say what it said before the mirror went away and was sent back: that is
//! old, and is known by being the same as what was followed from there, while another server was followed since. Once it
//! is said anew it is news again.
//!
//! Servers also say to which groups the image is being sent; that holds until they say something else.
//!
//! Owns: when to ask, what is old. Does not own: the questions and the exchange of servers (`upstream`), what is kept over
//! a restart (`remembered`).

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::time::{sleep, sleep_until};

use super::casts::{Receptions, Tip};
use super::remembered::Remembered;
use crate::clock;
use crate::nbd::Uri;
use crate::net::multicast::Group;
use crate::upstream::notices::{Line, News};
use crate::upstream::{self, Remote, Route};

/// A server is asked no more often, whatever it answers.
const EVERY: Duration = Duration::from_millis(250);
/// After the line was lost, or news could not be followed; doubled each time, up to a limit.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Servers of which it is known what they said last.
const MOST_TELLERS: usize = 64;

/// Follows the news for one generation of a mirror.
#[derive(Debug)]
pub(super) struct Follower {
    name: String,
    remote: Arc<Remote>,
    /// `None` while a thread writes it, and if that died.
    remembered: Option<Remembered>,
    told: Told,
    visit: Option<Visit>,
    tuned: Tuned,
}

/// The groups to which the image is sent, as the server said last.
#[derive(Debug)]
struct Tuned {
    name: String,
    receptions: Arc<Receptions>,
    tips: Vec<Tip>,
}

impl Tuned {
    /// The server names these groups now.
    fn hear(&mut self, groups: &[Group]) {
        let is_new = |group: &&Group| !self.tips.iter().any(|tip| tip.group() == **group);
        let new: Vec<_> = groups.iter().filter(is_new).map(|group| self.receptions.named(&self.name, *group)).collect();
        self.tips.retain(|tip| groups.contains(&tip.group()));
        self.tips.extend(new);
    }
}

/// What was followed last, by the server that said it; the last one at the end.
#[derive(Debug, Default)]
struct Told(VecDeque<(Uri, News)>);

impl Told {
    fn follow(&mut self, teller: Uri, news: News) {
        self.0.retain(|(other, _)| *other != teller);
        if self.0.len() == MOST_TELLERS {
            self.0.pop_front();
        }
        self.0.push_back((teller, news));
    }

    /// Whether a server, where the mirror has just come, still says what was followed before it was sent back.
    fn is_old(&self, teller: &Uri, news: &News) -> bool {
        let was_followed = self.0.iter().any(|(other, old)| other == teller && old == news);
        // Who has come back because the other server died was not sent.
        was_followed && self.0.back().is_some_and(|(last, _)| last != teller)
    }
}

/// The time at one server.
#[derive(Debug)]
struct Visit {
    uri: Uri,
    line: Option<Line>,
    /// What it says that is not to be followed any more.
    old: Option<News>,
    /// What it said last.
    said: Option<News>,
    /// The next answer on the line is about what is known already.
    is_echo: bool,
    was_asked: bool,
    has_answered: bool,
    last_question: Option<Instant>,
    losses: u32,
    /// Times that what it says could not be followed, and when to try again.
    failures: u32,
    retry: Option<Instant>,
}

impl Visit {
    const fn new(uri: Uri) -> Self {
        Self {
            uri,
            line: None,
            old: None,
            said: None,
            is_echo: false,
            was_asked: false,
            has_answered: false,
            last_question: None,
            losses: 0,
            failures: 0,
            retry: None,
        }
    }

    /// Waits until there is a reason to ask what the news are.
    ///
    /// Cancel safety: nothing is lost but time.
    async fn reason_to_ask(&mut self, remote: &Remote) {
        let retry = self.retry;
        let due = async {
            match retry {
                Some(time) => sleep_until(time.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = due => {}
            () = self.hear(remote) => {}
        }
    }

    /// Waits until the server says that there is something new, or the line to it was lost.
    async fn hear(&mut self, remote: &Remote) {
        loop {
            if self.line.is_none() {
                sleep(pause(self.losses)).await;
                match remote.listen(&self.uri).await {
                    Ok(Some(line)) => (self.line, self.is_echo) = (Some(line), self.said.is_some()),
                    // It said that it does; whatever it means, it is not asked again.
                    Ok(None) => return std::future::pending().await,
                    Err(error) => return self.lose(&error),
                }
            }
            if let Some(last) = self.last_question {
                sleep_until((last + EVERY).into()).await;
            }
            let Some(line) = &mut self.line else { continue };
            let asked = clock::now();
            self.last_question = Some(asked);
            match line.wait().await {
                Ok(is_news) => {
                    self.losses = 0;
                    // What is there already is answered at once.
                    let is_echo = std::mem::take(&mut self.is_echo) && clock::now().duration_since(asked) < EVERY;
                    if is_news {
                        // Also if it is the same again. An echo may be about what has changed since it was asked for.
                        self.old = self.old.take().filter(|_| is_echo);
                        return;
                    }
                }
                Err(error) => return self.lose(&error),
            }
        }
    }

    fn lose(&mut self, error: &dyn std::error::Error) {
        tracing::debug!(uri = %self.uri, %error, "no line for news");
        (self.line, self.losses) = (None, self.losses.saturating_add(1));
    }

    /// What is to be followed, as soon as there is something.
    ///
    /// Cancel safety: nothing is lost but time.
    async fn news(&mut self, remote: &Remote, told: &Told, tuned: &mut Tuned) -> News {
        loop {
            if std::mem::replace(&mut self.was_asked, true) {
                self.reason_to_ask(remote).await;
            }
            match remote.news(&self.uri).await {
                Ok(upstream::notices::Told { news: said, groups }) => {
                    tuned.hear(&groups);
                    self.old = self.old.take().filter(|old| Some(old) == said.as_ref());
                    if !std::mem::replace(&mut self.has_answered, true) {
                        self.old = said.clone().filter(|news| told.is_old(&self.uri, news));
                    }
                    if said != self.said {
                        (self.failures, self.retry) = (0, None);
                    }
                    self.said.clone_from(&said);
                    if let Some(news) = said.filter(|news| Some(news) != self.old.as_ref()) {
                        return news;
                    }
                    self.retry = None;
                }
                Err(error) => {
                    tracing::debug!(uri = %self.uri, %error, "cannot ask for news");
                    self.losses = self.losses.saturating_add(1);
                    self.retry = Some(clock::now() + pause(self.losses));
                }
            }
        }
    }

    /// It will be asked again after a pause.
    fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.retry = Some(clock::now() + pause(self.failures));
    }
}

/// Nothing at first; then it doubles up to the limit.
fn pause(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        failures => FIRST_PAUSE.saturating_mul(1 << (failures - 1).min(10)).min(LONGEST_PAUSE),
    }
}

impl Follower {
    pub(super) fn new(name: String, remote: Arc<Remote>, remembered: Remembered, receptions: Arc<Receptions>) -> Self {
        let tuned = Tuned { name: name.clone(), receptions, tips: Vec::new() };
        Self { name, remote, remembered: Some(remembered), told: Told::default(), visit: None, tuned }
    }

    /// Goes where it is told, for ever. One task of a worker does this; its connections live there.
    pub(super) async fn run(mut self) {
        self.remember().await;
        let mut place = self.remote.place();
        loop {
            let now = place.borrow_and_update().clone();
            self.turn_to(now.uri).await;
            let Some(visit) = self.visit.as_mut().filter(|_| now.tells_news) else {
                self.tuned.hear(&[]);
                if place.changed().await.is_err() {
                    return;
                }
                continue;
            };
            self.remote.introduce().await;
            let news = tokio::select! {
                biased;
                changed = place.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                news = visit.news(&self.remote, &self.told, &mut self.tuned) => news,
            };
            self.follow(news).await;
        }
    }

    /// Leaves the server that was listened to, if requests go to another one.
    async fn turn_to(&mut self, uri: Option<Uri>) {
        if self.visit.as_ref().map(|visit| &visit.uri) == uri.as_ref() {
            return;
        }
        let before = std::mem::replace(&mut self.visit, uri.map(Visit::new));
        if let Some(line) = before.and_then(|visit| visit.line) {
            line.close().await;
        }
    }

    async fn follow(&mut self, news: News) {
        let (name, from) = (&self.name, self.remote.current());
        let configured = self.remembered.as_ref().map(Remembered::configured).unwrap_or_default();
        let route = Route { to: news.uris(), reserve: configured };
        let result = match &news {
            News::Moved(_) => self.remote.redirect(route).await,
            News::Upstreams(_) => self.remote.replace_servers(route).await,
        };
        let Some(visit) = &mut self.visit else { return };
        match result {
            Ok(()) => {
                let to = self.remote.current();
                if to == from {
                    tracing::debug!(name, at = %to, "told what servers there are");
                } else {
                    tracing::info!(name, %from, %to, "going to another upstream, as told");
                }
                visit.old = Some(news.clone());
                (visit.failures, visit.retry) = (0, None);
                self.told.follow(visit.uri.clone(), news);
                self.remember().await;
            }
            Err(error) => {
                visit.failed();
                if visit.failures == 1 {
                    tracing::warn!(name, at = %from, %error, "told to go to another upstream, which cannot be used: staying");
                } else {
                    tracing::debug!(name, at = %from, %error, "still staying");
                }
            }
        }
    }

    /// Makes durable which servers are used.
    async fn remember(&mut self) {
        let Some(mut remembered) = self.remembered.take() else { return };
        let servers = self.remote.uris();
        let keeping = tokio::task::spawn_blocking(move || {
            let kept = remembered.keep(&servers);
            (remembered, kept)
        });
        let Ok((remembered, kept)) = keeping.await else {
            return tracing::error!(name = self.name, "cannot remember the upstream: the thread died");
        };
        if let Err(error) = kept {
            tracing::warn!(name = self.name, %error, "cannot remember the upstream: after a restart it is as configured");
        }
        self.remembered = Some(remembered);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uri(name: u8) -> Uri {
        format!("nbd://{}/x", char::from(b'a' + name)).parse().unwrap()
    }

    fn moved(name: u8) -> News {
        News::Moved(vec![uri(name)])
    }

    #[test]
    fn what_was_followed_before_being_sent_back_is_old() {
        let mut told = Told::default();
        assert!(!told.is_old(&uri(0), &moved(1)));
        told.follow(uri(0), moved(1));
        // It came back because b died: a has nothing new to say, and means it.
        assert!(!told.is_old(&uri(0), &moved(1)));
        told.follow(uri(1), moved(0));
        assert!(told.is_old(&uri(0), &moved(1)));
        assert!(!told.is_old(&uri(0), &moved(2)), "that is something else");
        assert!(!told.is_old(&uri(1), &moved(0)));
    }

    #[test]
    fn pauses_grow_up_to_the_limit() {
        assert_eq!([0, 1, 2, 3, 100].map(pause), [0, 250, 500, 1000, 30_000].map(Duration::from_millis));
    }

    proptest! {
        /// Servers keep saying what they were last ordered to say; nobody ever takes it back. Each order is given to the
        /// server where the mirror is. However they go round, the mirror ends where the last one sends it.
        #[test]
        fn rounds_of_orders_settle(orders in prop::collection::vec(0u8..4, 1..30)) {
            let (mut told, mut said, mut at) = (Told::default(), vec![None; 4], 0u8);
            for target in orders {
                said[usize::from(at)] = Some(moved(target));
                // Said anew, so it is followed whatever was said before.
                told.follow(uri(at), moved(target));
                at = target;
                // What the server says where it has come to is asked first.
                let mut steps = 0;
                while let Some(news) = said[usize::from(at)].clone().filter(|news| !told.is_old(&uri(at), news)) {
                    let News::Moved(to) = &news else { unreachable!() };
                    let next = (0..4).find(|name| uri(*name) == to[0]).unwrap();
                    if next == at {
                        break;
                    }
                    told.follow(uri(at), news);
                    at = next;
                    steps += 1;
                    prop_assert!(steps < 8, "it goes round and round");
                }
                prop_assert_eq!(at, target);
            }
        }
    }
}
