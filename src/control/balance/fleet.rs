//! Servers and clients, put together from what each server says of itself (`GET /v1/status` and `GET /v1/load`).
//!
//! Pure. Owns: who is one client, who serves it, what it costs, and where it may go. Does not own: whether it should.
//!
//! | who is connected | is | counts at | is moved by an order at |
//! | --- | --- | --- | --- |
//! | a client | itself | the server that it is connected to | that server |
//! | a client that is relayed | itself | the server that it is relayed to | the server that it is connected to |
//! | the relay of another server | nobody: its clients are known there | | |
//! | connections of a mirror to one image | one client | the server that it is connected to | that server |
//! | readers of manifests and profiles | nobody | the server, and stays there | |
//!
//! A relayed client is moved on by an order where it is connected, never where it is served: that would put a relay
//! behind a relay. When it is to come back, the order names that server's own address, which takes the relay away.
//!
//! **Bounds.** [`MOST_SERVERS`] servers, all their clients.

use std::collections::{BTreeMap, BTreeSet};

use super::plan::{Item, MOST_SERVERS, Problem, Slot};
use crate::control::load::{ClientLoad, Load, Rates};
use crate::control::status::{ClientStatus, ImageStatus, Status};
use crate::export::split_content_name;
use crate::nbd::Uri;

/// What a request costs beside its bytes, for [`Measure::Mix`]: as much as so many bytes. Answering one takes about as
/// long as copying 16 KiB to a socket.
const REQUEST: f64 = 16384.0;

/// What is shared evenly.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Measure {
    /// Bytes per second, and 16 KiB for each request.
    #[default]
    Mix,
    /// Bytes per second.
    Bytes,
    /// Requests per second.
    Requests,
    /// Clients, busy or not.
    Clients,
    /// How long requests take: a server whose 99th percentile is twice as long is given half as many of them.
    P99,
}

impl Measure {
    /// What a client costs that does so much.
    pub fn of(self, work: Work) -> f64 {
        match self {
            Self::Mix => work.bytes + work.requests * REQUEST,
            Self::Bytes => work.bytes,
            Self::Requests | Self::P99 => work.requests,
            Self::Clients => 1.0,
        }
    }

    /// What is too little to matter, whatever the mean.
    pub const fn floor(self) -> f64 {
        match self {
            Self::Mix => 131_072.0,
            Self::Bytes => 65_536.0,
            Self::Requests | Self::P99 => 8.0,
            Self::Clients => 0.5,
        }
    }
}

/// What is done in a second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Bytes read and written.
    pub bytes: f64,
    /// Requests.
    pub requests: f64,
}

impl Work {
    fn of(rates: &Rates) -> Self {
        Self {
            bytes: rates.read_bytes_per_second + rates.written_bytes_per_second,
            requests: rates.requests_per_second,
        }
    }

    fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.requests += other.requests;
    }

    /// What is more than `other`; nothing if that is but a fifth, which two looks at different moments differ by.
    fn beyond(self, other: Self) -> Self {
        let beyond = |mine: f64, its: f64| if mine > its * 1.25 { mine - its } else { 0.0 };
        Self { bytes: beyond(self.bytes, other.bytes), requests: beyond(self.requests, other.requests) }
    }
}

/// One server as it was asked.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// How operators name it.
    pub name: String,
    /// What it said; `None` if it did not answer.
    pub said: Option<(Status, Load)>,
    /// Where its clients reach it, if not where it says itself; an export of it is not named.
    pub uri: Option<Uri>,
    /// Whether it is a standby: takes no clients before it is brought in.
    pub is_standby: bool,
    /// Whether it is brought in.
    pub is_in: bool,
}

/// What an image is, so that it can be known on other servers: its identity, or its name and size when it has none.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Content {
    /// All with the same are the same image.
    Identity(String),
    /// Servers are asked again before a client is moved, and refuse what they cannot know.
    Named(String, u64),
}

/// An export of a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// Its name there.
    pub export: String,
    /// What it is.
    pub content: Content,
    /// Where others reach it.
    pub uri: String,
    writable: bool,
    /// Whether newcomers are sent away.
    is_drained: bool,
    /// Whether all of it is here.
    is_whole: bool,
}

/// One server.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Server {
    /// How operators name it.
    pub name: String,
    /// Whether it answered.
    pub is_reachable: bool,
    /// Whether any of it is out of service.
    pub is_draining: bool,
    /// Whether it is a standby.
    pub is_standby: bool,
    /// Whether it is one that was not brought in.
    pub is_idle: bool,
    /// The number of its last sample.
    pub sample: u64,
    /// What it has.
    pub places: Vec<Place>,
    /// What it serves that nobody can move.
    pub fixed: Work,
    /// How long its requests took, all exports: the 99th percentile in milliseconds.
    pub p99_ms: Option<f64>,
    /// The same for each image.
    pub p99_of: BTreeMap<Content, f64>,
    /// Other servers that it is fed by, also indirectly: indices.
    above: BTreeSet<usize>,
}

impl Server {
    fn place(&self, content: &Content) -> Option<&Place> {
        self.places.iter().find(|place| place.content == *content)
    }
}

/// One client.
#[derive(Debug, Clone, PartialEq)]
pub struct Client {
    /// Names it as long as it is connected; a mirror for ever.
    pub key: String,
    /// Its number where it is connected.
    pub id: u64,
    /// The server that it is connected to, by index.
    pub connected: usize,
    /// The server that serves it.
    pub served: usize,
    /// Its export where it is connected.
    pub export: String,
    /// The image that it uses.
    pub content: Content,
    /// What it does.
    pub work: Work,
    /// The server that is this client, if it is a mirror that we know.
    is: Option<usize>,
}

/// All servers and their clients.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Fleet {
    /// In the order in which they were named.
    pub servers: Vec<Server>,
    /// All that can be moved.
    pub clients: Vec<Client>,
}

/// A client that should be served from another server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// The client.
    pub key: String,
    /// Its number where it is connected.
    pub id: u64,
    /// The server that the order goes to: where it is connected.
    pub at: usize,
    /// Its export there.
    pub export: String,
    /// The server that serves it now.
    pub from: usize,
    /// The one that shall.
    pub to: usize,
    /// That one's address.
    pub uri: String,
    /// Whether it must be forced, because the new server is fed by the old one.
    pub force: bool,
}

/// Clients and servers as the search sees them, and who is who.
#[derive(Debug, Clone, Default)]
pub struct Task {
    /// What is to be solved.
    pub problem: Problem,
    /// The server of each slot.
    pub slots: Vec<usize>,
    /// The client of each item.
    pub items: Vec<usize>,
    /// Clients that must leave where they are, because that is a standby that goes.
    pub leaving: Vec<usize>,
}

impl Fleet {
    /// Puts together what servers said. Of more than [`MOST_SERVERS`] the rest is left out.
    pub fn of(seen: &[Seen], export: Option<&str>) -> Self {
        let seen = &seen[..seen.len().min(MOST_SERVERS)];
        let mut fleet = Self { servers: seen.iter().map(server).collect(), clients: Vec::new() };
        for (index, one) in seen.iter().enumerate() {
            if let Some((status, load)) = &one.said {
                Census { fleet: &mut fleet, seen, index, export }.take(status, load);
            }
        }
        fleet.discount_relays(seen);
        fleet.find_feeders(seen);
        fleet
    }

    /// Takes away from each server what relays ask of it for clients that are known.
    fn discount_relays(&mut self, seen: &[Seen]) {
        for (index, one) in seen.iter().enumerate() {
            let Some((status, load)) = &one.said else { continue };
            let mut asked = Work::default();
            for client in status.clients.iter().filter(|client| client.is_relay) {
                asked.add(rates_of(load, client.id));
            }
            let mut known = Work::default();
            for client in self.clients.iter().filter(|client| client.served == index && client.connected != index) {
                known.add(client.work);
            }
            self.servers[index].fixed.add(asked.beyond(known));
        }
    }

    /// Finds out which servers get their bytes from which others.
    fn find_feeders(&mut self, seen: &[Seen]) {
        let nodes: Vec<BTreeSet<&str>> = seen.iter().map(nodes).collect();
        for (index, one) in seen.iter().enumerate() {
            let clients = one.said.iter().flat_map(|(status, _)| &status.clients);
            for node in clients.filter_map(|client| client.mirror.as_deref()) {
                for (below, _) in nodes.iter().enumerate().filter(|(below, of)| *below != index && of.contains(node)) {
                    self.servers[below].above.insert(index);
                }
            }
        }
        // Until nothing is added: each round goes up one tier more.
        for _ in 0..self.servers.len() {
            let above: Vec<_> = self.servers.iter().map(|server| server.above.clone()).collect();
            for server in &mut self.servers {
                let more: Vec<usize> = server.above.iter().flat_map(|one| above[*one].iter().copied()).collect();
                server.above.extend(more);
            }
        }
        for client in &mut self.clients {
            let node = client.key.strip_prefix(MIRROR).and_then(|rest| rest.split('/').next());
            client.is = node.and_then(|node| nodes.iter().position(|of| of.contains(node)));
        }
    }

    /// Whether a server may serve a client, and whether that has to be forced. It may always stay.
    fn may(&self, client: &Client, to: usize) -> Option<bool> {
        let server = &self.servers[to];
        let place = server.place(&client.content)?;
        let home = self.servers[client.connected].place(&client.content)?;
        let is_open = server.is_reachable && !server.is_idle && !place.is_drained && place.writable == home.writable;
        let is_itself = client.is.is_some_and(|itself| itself == to || server.above.contains(&itself));
        if !is_open || is_itself {
            return None;
        }
        if to == client.connected || !server.above.contains(&client.connected) {
            return Some(false);
        }
        // It costs what it is fed by all that it lacks: a standby is there for that.
        let is_known = matches!(client.content, Content::Identity(_));
        ((place.is_whole || server.is_standby) && is_known && !place.writable).then_some(true)
    }

    /// The order that moves a client.
    pub fn order(&self, client: usize, to: usize) -> Option<Move> {
        let client = &self.clients[client];
        let force = self.may(client, to)?;
        Some(Move {
            key: client.key.clone(),
            id: client.id,
            at: client.connected,
            export: client.export.clone(),
            from: client.served,
            to,
            uri: self.servers[to].place(&client.content)?.uri.clone(),
            force,
        })
    }

    /// What is to be solved: one task for each set of servers that have images in common. `rests` tells who is not to
    /// be moved, `weight` what a server's share is in relation to that of others.
    pub fn tasks(
        &self,
        measure: Measure,
        tolerance: f64,
        rests: impl Fn(&Client) -> bool,
        weight: impl Fn(usize) -> f64,
    ) -> Vec<Task> {
        self.groups().into_iter().map(|slots| self.task(slots, measure, tolerance, &rests, &weight)).collect()
    }

    /// Servers that take part, in sets that have images in common.
    fn groups(&self) -> Vec<Vec<usize>> {
        let takes_part = |server: &Server| {
            server.is_reachable && !server.is_idle && server.places.iter().any(|place| !place.is_drained)
        };
        let mut groups: Vec<(BTreeSet<&Content>, Vec<usize>)> = Vec::new();
        for (index, server) in self.servers.iter().enumerate().filter(|(_, server)| takes_part(server)) {
            let open = server.places.iter().filter(|place| !place.is_drained);
            let mut own: (BTreeSet<&Content>, Vec<usize>) = (open.map(|place| &place.content).collect(), vec![index]);
            groups.retain(|(contents, members)| {
                let is_apart = contents.is_disjoint(&own.0);
                if !is_apart {
                    own.0.extend(contents);
                    own.1.extend(members);
                }
                is_apart
            });
            own.1.sort_unstable();
            groups.push(own);
        }
        groups.into_iter().map(|(_, members)| members).collect()
    }

    fn task(
        &self,
        slots: Vec<usize>,
        measure: Measure,
        tolerance: f64,
        rests: &impl Fn(&Client) -> bool,
        weight: &impl Fn(usize) -> f64,
    ) -> Task {
        let fixed = |server: &usize| match measure {
            Measure::Clients => 0.0,
            _ => measure.of(self.servers[*server].fixed),
        };
        let slot = |server: &usize| Slot { fixed: fixed(server), weight: weight(*server).max(1e-3) };
        let servers: Vec<Slot> = slots.iter().map(slot).collect();
        let problem = Problem { servers, clients: Vec::new(), tolerance, floor: measure.floor() };
        let mut task = Task { problem, slots, items: Vec::new(), leaving: Vec::new() };
        for (index, client) in self.clients.iter().enumerate() {
            let Some(at) = task.slots.iter().position(|server| *server == client.served) else {
                if self.servers[client.served].is_idle && self.can_go_to(client, &task.slots) {
                    task.leaving.push(index);
                }
                continue;
            };
            let may = task.slots.iter().enumerate();
            let may = may.filter(|(_, server)| !rests(client) && self.may(client, **server).is_some());
            let may = may.fold(0, |bits, (slot, _)| bits | 1 << slot);
            task.problem.clients.push(Item { load: measure.of(client.work), at, may });
            task.items.push(index);
        }
        task
    }

    fn can_go_to(&self, client: &Client, slots: &[usize]) -> bool {
        slots.iter().any(|server| self.may(client, *server).is_some())
    }

    /// What a server serves.
    pub fn work(&self, server: usize) -> Work {
        let mut work = self.servers[server].fixed;
        self.clients.iter().filter(|client| client.served == server).for_each(|client| work.add(client.work));
        work
    }

    /// How many clients a server serves that can be moved.
    pub fn count(&self, server: usize) -> usize {
        self.clients.iter().filter(|client| client.served == server).count()
    }

    /// What all clients of an image do, and the longest 99th percentile that one of its servers has, in milliseconds.
    pub fn of_image(&self, content: &Content) -> (Work, Option<f64>) {
        let mut work = Work::default();
        self.clients.iter().filter(|client| client.content == *content).for_each(|client| work.add(client.work));
        let serving = self.servers.iter().filter(|server| !server.is_idle);
        (work, serving.filter_map(|server| server.p99_of.get(content).copied()).max_by(f64::total_cmp))
    }
}

/// What the keys of mirrors begin with.
const MIRROR: &str = "mirror ";

fn rates_of(load: &Load, id: u64) -> Work {
    load.clients.iter().find(|client| client.id == id).map(|client| Work::of(&client.rates)).unwrap_or_default()
}

/// The names of a server's caches.
fn nodes(seen: &Seen) -> BTreeSet<&str> {
    seen.said.iter().flat_map(|(_, load)| load.upstreams.iter().map(|upstream| upstream.node.as_str())).collect()
}

fn server(seen: &Seen) -> Server {
    let idle = Server {
        name: seen.name.clone(),
        is_standby: seen.is_standby,
        is_idle: seen.is_standby && !seen.is_in,
        ..Server::default()
    };
    let Some((status, load)) = &seen.said else { return idle };
    let places: Vec<Place> = status.images.iter().filter_map(|image| place(seen, status, image)).collect();
    let p99 = |rates: &Rates| rates.latency.map(|latency| latency.p99_ms);
    let mut p99_of = BTreeMap::new();
    for export in &load.exports {
        let place = places.iter().find(|place| place.export == export.export);
        if let (Some(place), Some(p99)) = (place, p99(&export.rates)) {
            p99_of.insert(place.content.clone(), p99);
        }
    }
    Server {
        is_reachable: true,
        is_draining: status.draining.is_draining(),
        sample: load.sample,
        places,
        p99_ms: p99(&load.total),
        p99_of,
        ..idle
    }
}

fn place(seen: &Seen, status: &Status, image: &ImageStatus) -> Option<Place> {
    let mut uri = seen.uri.clone().or_else(|| status.listen.iter().find_map(|uri| uri.parse().ok()))?;
    uri.export.clone_from(&image.name);
    let content = match &image.identity {
        Some(identity) => Content::Identity(identity.clone()),
        None => Content::Named(image.name.clone(), image.size),
    };
    let here = image.mirror.as_ref().map(|mirror| mirror.resident_bytes.saturating_add(mirror.zero_bytes));
    Some(Place {
        export: image.name.clone(),
        content,
        uri: uri.to_string(),
        writable: image.writable,
        is_drained: status.draining.all || status.draining.exports.contains(&image.name),
        is_whole: here.is_none_or(|here| here >= image.size),
    })
}

/// Takes in the clients of one server.
struct Census<'a> {
    fleet: &'a mut Fleet,
    seen: &'a [Seen],
    index: usize,
    /// The only export that is balanced.
    export: Option<&'a str>,
}

impl Census<'_> {
    fn take(&mut self, status: &Status, load: &Load) {
        let mut mirrors = BTreeMap::new();
        let loads: BTreeMap<u64, &ClientLoad> = load.clients.iter().map(|client| (client.id, client)).collect();
        for client in status.clients.iter().filter(|client| !client.is_relay) {
            let work = loads.get(&client.id).map(|load| Work::of(&load.rates)).unwrap_or_default();
            let Some((export, content)) = self.image_of(client) else {
                self.fleet.servers[self.index].fixed.add(work);
                continue;
            };
            let Some(served) = self.served_by(client) else { continue };
            let name = &self.fleet.servers[self.index].name;
            let key = match &client.mirror {
                Some(node) => format!("{MIRROR}{node}/{export}"),
                None => format!("{name} {}", client.id),
            };
            if let Some(known) = client.mirror.as_ref().and_then(|_| mirrors.get(&key)) {
                let known: &mut Client = &mut self.fleet.clients[*known];
                known.work.add(work);
                continue;
            }
            mirrors.insert(key.clone(), self.fleet.clients.len());
            let (id, connected, is) = (client.id, self.index, None);
            self.fleet.clients.push(Client { key, id, connected, served, export, content, work, is });
        }
    }

    /// The image that a client uses, if it can be moved: its name here, and what it is.
    fn image_of(&self, client: &ClientStatus) -> Option<(String, Content)> {
        // What lies beside an image goes with nobody.
        let name = split_content_name(&client.export).0;
        let is_wanted = self.export.is_none_or(|export| export == name);
        let server = &self.fleet.servers[self.index];
        let place = server.places.iter().find(|place| place.export == client.export || place.export == name)?;
        is_wanted.then(|| (place.export.clone(), place.content.clone()))
    }

    /// The server that serves a client; `None` if it is one that we do not know.
    fn served_by(&self, client: &ClientStatus) -> Option<usize> {
        let Some(label) = &client.relayed_to else { return Some(self.index) };
        let uris = Uri::parse_list(label).ok()?;
        uris.iter().find_map(|uri| self.seen.iter().position(|seen| is_at(seen, uri)))
    }
}

/// Whether a server is reached at a place.
fn is_at(seen: &Seen, uri: &Uri) -> bool {
    let listen = seen.said.iter().flat_map(|(status, _)| &status.listen);
    let told = listen.filter_map(|text| text.parse::<Uri>().ok()).any(|own| own.address == uri.address);
    told || seen.uri.as_ref().is_some_and(|own| own.address == uri.address)
}

#[cfg(test)]
pub(super) mod samples {
    use super::*;

    /// Servers of one image.
    pub(in super::super) fn fleet(servers: usize) -> Fleet {
        let server = |index: usize| Server {
            name: format!("s{index}"),
            is_reachable: true,
            places: vec![Place {
                export: "image".to_owned(),
                content: content(),
                uri: format!("nbd://s{index}/image"),
                writable: false,
                is_drained: false,
                is_whole: true,
            }],
            ..Server::default()
        };
        Fleet { servers: (0..servers).map(server).collect(), clients: Vec::new() }
    }

    fn content() -> Content {
        Content::Identity("blake3-1".to_owned())
    }

    impl Fleet {
        /// Adds a client, who came to one server and may be served by another.
        pub(in super::super) fn with(mut self, connected: usize, served: usize, requests: f64) -> Self {
            let id = u64::try_from(self.clients.len()).unwrap();
            let work = Work { bytes: requests * 65536.0, requests };
            let (key, export, content) = (format!("c{id}"), "image".to_owned(), content());
            self.clients.push(Client { key, id, connected, served, export, content, work, is: None });
            self
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    /// A server of one image, with these clients and their requests per second.
    fn seen(name: &str, image: Value, clients: &[(Value, f64)], more: Value) -> Seen {
        let mut status = json!({
            "version": "1", "pid": 1, "role": "serve", "uptime_seconds": 1.0, "images": [image],
            "listen": [format!("nbd+unix:///?socket=/run/{name}")], "clients": [], "cache": null,
        });
        let mut load = json!({ "sample": 9, "clients": [] });
        for (client, requests) in clients {
            let mut whole = json!({
                "peer": "unix:pid=7", "export": "image", "connected_seconds": 1.0, "requests": 1, "read_bytes": 1,
                "written_bytes": 0, "errors": 0, "requests_in_flight": 0, "bytes_in_flight": 0,
            });
            merge(&mut whole, client);
            let rates = json!({ "id": client["id"], "rates": { "requests_per_second": requests } });
            status["clients"].as_array_mut().unwrap().push(whole);
            load["clients"].as_array_mut().unwrap().push(rates);
        }
        merge(&mut status, &more["status"]);
        merge(&mut load, &more["load"]);
        let said = Some((serde_json::from_value(status).unwrap(), serde_json::from_value(load).unwrap()));
        Seen { name: name.to_owned(), said, ..Seen::default() }
    }

    fn merge(whole: &mut Value, part: &Value) {
        for (name, value) in part.as_object().into_iter().flatten() {
            whole[name] = value.clone();
        }
    }

    fn image(identity: Option<&str>) -> Value {
        json!({
            "name": "image", "kind": "real", "size": 4096, "writable": false, "chunk_size": null,
            "identity": identity, "path": "/image", "mirror": null,
        })
    }

    /// A mirror of it that holds so much.
    fn mirrored(here: u64) -> Value {
        let mut image = image(Some("blake3-1"));
        merge(&mut image, &json!({ "kind": "mirror", "mirror": { "resident_bytes": here } }));
        image
    }

    fn fed(node: &str) -> Value {
        json!({ "load": { "upstreams": [{ "node": node }] } })
    }

    /// Where a client may go, besides where it is.
    fn ways(fleet: &Fleet, client: usize) -> Vec<(usize, bool)> {
        let orders = (0..fleet.servers.len()).filter(|to| *to != fleet.clients[client].served);
        orders.filter_map(|to| Some((to, fleet.order(client, to)?.force))).collect()
    }

    #[test]
    fn a_relayed_client_counts_where_it_is_served_and_is_moved_where_it_is_connected() {
        let real = || image(Some("blake3-1"));
        let relayed = json!({ "id": 3, "relayed_to": "nbd+unix:///image?socket=/run/b" });
        let first = seen("a", real(), &[(relayed, 50.0), (json!({ "id": 4 }), 10.0)], json!({}));
        let relay = json!({ "id": 8, "is_relay": true });
        let second = seen("b", real(), &[(relay, 52.0), (json!({ "id": 9 }), 5.0)], json!({}));
        let third = seen("c", real(), &[], json!({}));
        let fleet = Fleet::of(&[first, second, third], None);
        let requests: Vec<f64> = (0..3).map(|server| fleet.work(server).requests).collect();
        assert_eq!(requests, [10.0, 55.0, 0.0], "the relay is not counted again");
        assert_eq!([fleet.count(0), fleet.count(1)], [1, 2]);
        let order = fleet.order(0, 2).unwrap();
        assert_eq!((order.at, order.id, order.from, &*order.uri), (0, 3, 1, "nbd+unix:///image?socket=/run/c"));
        let back = fleet.order(0, 0).unwrap();
        assert_eq!((back.at, &*back.uri, back.force), (0, "nbd+unix:///image?socket=/run/a", false));
    }

    #[test]
    fn what_relays_of_strangers_ask_for_stays() {
        let relay = json!({ "id": 8, "is_relay": true });
        let fleet = Fleet::of(&[seen("a", image(None), &[(relay, 30.0)], json!({}))], None);
        assert_eq!((fleet.servers[0].fixed.requests, fleet.clients.len()), (30.0, 0));
        let elsewhere = json!({ "id": 8, "relayed_to": "nbd://stranger/image" });
        let fleet = Fleet::of(&[seen("a", image(None), &[(elsewhere, 30.0)], json!({}))], None);
        assert_eq!((fleet.work(0).requests, fleet.clients.len()), (0.0, 0), "and who is served by them is not ours");
    }

    #[test]
    fn connections_of_a_mirror_are_one_client_and_readers_of_manifests_are_none() {
        let clients = [
            (json!({ "id": 1, "mirror": "aa" }), 3.0),
            (json!({ "id": 2, "mirror": "aa" }), 4.0),
            (json!({ "id": 3, "mirror": "aa", "export": "image@manifest" }), 2.0),
        ];
        let fleet = Fleet::of(&[seen("a", image(None), &clients, json!({}))], None);
        let found: Vec<_> = fleet.clients.iter().map(|client| (client.id, client.work.requests)).collect();
        assert_eq!((found, fleet.servers[0].fixed.requests), (vec![(1, 7.0)], 2.0));
        assert!(Fleet::of(&[seen("a", image(None), &clients, json!({}))], Some("other")).clients.is_empty());
    }

    #[test]
    fn only_servers_of_the_same_image_take_clients() {
        let client = || [(json!({ "id": 1 }), 1.0)];
        let with = |other: Value, more: Value| {
            let first = seen("a", image(Some("blake3-1")), &client(), json!({}));
            ways(&Fleet::of(&[first, seen("b", other, &[], more)], None), 0)
        };
        assert_eq!(with(image(Some("blake3-1")), json!({})), [(1, false)]);
        assert_eq!(with(image(Some("blake3-2")), json!({})), []);
        assert_eq!(with(image(None), json!({})), []);
        let draining = json!({ "status": { "draining": { "all": true } } });
        assert_eq!(with(image(Some("blake3-1")), draining), []);
        let mut writable = image(Some("blake3-1"));
        writable["writable"] = json!(true);
        assert_eq!(with(writable, json!({})), []);
        let silent = Seen { name: "b".to_owned(), ..Seen::default() };
        let fleet = Fleet::of(&[seen("a", image(None), &client(), json!({})), silent], None);
        assert!(!fleet.servers[1].is_reachable && ways(&fleet, 0).is_empty());
    }

    #[test]
    fn a_mirror_is_never_put_below_itself() {
        // The origin feeds a, which feeds b.
        let clients = [(json!({ "id": 1, "mirror": "aa" }), 1.0), (json!({ "id": 2 }), 1.0)];
        let origin = seen("origin", image(Some("blake3-1")), &clients, json!({}));
        let below_a = seen("a", mirrored(4096), &[(json!({ "id": 5, "mirror": "bb" }), 1.0)], fed("aa"));
        let below_b = seen("b", mirrored(4096), &[(json!({ "id": 6 }), 1.0)], fed("bb"));
        let fleet = Fleet::of(&[origin, below_a, below_b], None);
        assert_eq!(ways(&fleet, 0), [], "mirror a may use neither itself nor b");
        assert_eq!(ways(&fleet, 1), [(1, true), (2, true)], "a client of the origin may, if it is forced");
        assert_eq!(ways(&fleet, 2), [(0, false)], "mirror b may go up");
        assert_eq!(ways(&fleet, 3), [(0, false), (1, false)]);
    }

    #[test]
    fn a_mirror_that_lacks_most_of_it_takes_nobody_from_above_unless_it_is_a_standby() {
        let ways = |is_standby: bool, is_in: bool| {
            let clients = [(json!({ "id": 1, "mirror": "aa" }), 1.0), (json!({ "id": 2 }), 1.0)];
            let origin = seen("origin", image(Some("blake3-1")), &clients, json!({}));
            let cold = Seen { is_standby, is_in, ..seen("a", mirrored(0), &[], fed("aa")) };
            ways(&Fleet::of(&[origin, cold], None), 1)
        };
        assert_eq!(ways(false, false), []);
        assert_eq!(ways(true, true), [(1, true)]);
        assert_eq!(ways(true, false), [], "and not before it is brought in");
    }

    #[test]
    fn a_standby_that_went_is_left_by_its_clients() {
        let real = || image(Some("blake3-1"));
        let clients = [(json!({ "id": 3, "relayed_to": "nbd+unix:///image?socket=/run/b" }), 50.0)];
        let first = seen("a", real(), &clients, json!({}));
        let second =
            Seen { is_standby: true, ..seen("b", real(), &[(json!({ "id": 8, "is_relay": true }), 50.0)], json!({})) };
        let fleet = Fleet::of(&[first, second], None);
        let tasks = fleet.tasks(Measure::Mix, 0.2, |_| false, |_| 1.0);
        assert_eq!((tasks.len(), &tasks[0].slots, &tasks[0].leaving), (1, &vec![0], &vec![0]));
    }

    #[test]
    fn servers_without_an_image_in_common_are_apart() {
        let named = |name: &str| {
            let mut image = image(None);
            image["name"] = json!(name);
            image
        };
        let fleet = Fleet::of(
            &[
                seen("a", named("x"), &[], json!({})),
                seen("b", named("y"), &[], json!({})),
                seen("c", named("x"), &[], json!({})),
            ],
            None,
        );
        assert_eq!(fleet.groups(), [vec![1], vec![0, 2]]);
    }
}
