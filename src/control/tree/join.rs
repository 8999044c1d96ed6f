//! What several servers say, put together. Pure.
//!
//! A mirror is known by the names of its caches: it says them of its upstreams, and its upstreams of it. So an edge is
//! seen from both ends, and each end says what the other cannot know: the mirror how long it waits, the server how many
//! connections there are. Which server a mirror means by a URI is found out by where the servers listen, and where that
//! says nothing (another machine's name for it), by who has the mirror as a client.
//!
//! Owns: who is who. Does not own: asking them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use super::{Tree, TreeClients, TreeEdge, TreeImage, TreeServer};
use crate::control::load::{ClientLoad, Load, Rates, UpstreamLoad};
use crate::control::status::{ImageStatus, Kind, Status};
use crate::export::image_name;
use crate::nbd::Uri;
use crate::nbd::uri::Address;
use crate::units::to_u64;

/// Mirrors that no neighbour knows and that are in the tree all the same.
const MOST_UNKNOWN: usize = 128;

/// One server that was asked.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Its admin API; `None` for the server that asks.
    pub admin: Option<String>,
    /// Whether it is the server that asks.
    pub is_this: bool,
    /// What it says; if it does not answer now, what it said last.
    pub said: Option<Arc<Said>>,
    /// Why it does not answer.
    pub error: Option<String>,
    /// How long ago it said that, if it does not answer now.
    pub seconds_ago: Option<f64>,
}

/// What one server says.
#[derive(Debug, Clone)]
pub struct Said {
    /// Of itself.
    pub status: Status,
    /// Of the last seconds.
    pub load: Load,
}

/// A server of which something is known.
struct Known<'a> {
    id: String,
    said: &'a Said,
    /// Whether it answers now: else there is nothing that flows.
    answers: bool,
}

/// What a server sees of one mirror's cache.
#[derive(Default)]
struct FromAbove<'a> {
    connections: Vec<&'a ClientLoad>,
}

/// Puts together what the servers say. The order of `seen` is that of the servers; each is one, also if it was asked
/// under several names.
pub fn join(seen: &[Seen]) -> Tree {
    let mut tree = Tree::default();
    let known = servers(seen, &mut tree);
    let owners = owners(&known);
    let mut above = from_above(&known);
    for server in &known {
        let mut images: BTreeMap<&str, Vec<&UpstreamLoad>> = BTreeMap::new();
        for upstream in
            server.said.load.upstreams.iter().filter(|upstream| owners.get(&*upstream.node) == Some(&&*server.id))
        {
            images.entry(&upstream.node).or_default().push(upstream);
        }
        for (node, upstreams) in images {
            let seen_by = above.remove(node).unwrap_or_default();
            edges_of_cache(server, &upstreams, seen_by, &known, &mut tree);
        }
    }
    edges_to_strangers(above, &mut tree);
    for server in known.iter().filter(|server| server.answers) {
        tree.clients.extend(clients(server));
    }
    tree
}

/// The servers, each once.
fn servers<'a>(seen: &'a [Seen], tree: &mut Tree) -> Vec<Known<'a>> {
    let mut known: Vec<Known<'a>> = Vec::new();
    // One that answers under one name is not missing under another.
    let (fresh, stale): (Vec<_>, Vec<_>) = seen.iter().partition(|seen| seen.error.is_none());
    for seen in fresh.into_iter().chain(stale) {
        let Some(said) = seen.said.as_deref() else {
            tree.servers.push(silent(seen));
            continue;
        };
        let id = match (&*said.status.server, &seen.admin) {
            ("", admin) => format!("admin:{}", admin.as_deref().unwrap_or_default()),
            (server, _) => server.to_owned(),
        };
        if known.iter().any(|server| server.id == id) {
            continue;
        }
        tree.servers.push(server(id.clone(), seen, said));
        known.push(Known { id, said, answers: seen.error.is_none() });
    }
    known
}

/// One that never answered.
fn silent(seen: &Seen) -> TreeServer {
    let admin = seen.admin.clone().unwrap_or_default();
    TreeServer {
        id: format!("admin:{admin}"),
        name: admin.clone(),
        reachable: Some(false),
        error: seen.error.clone(),
        admin: Some(admin),
        ..TreeServer::default()
    }
}

fn server(id: String, seen: &Seen, said: &Said) -> TreeServer {
    let Said { status, load } = said;
    let answers = seen.error.is_none();
    let idle = Rates::default();
    let mut exports = load.exports.clone();
    if !answers {
        exports.iter_mut().for_each(|export| {
            *export = super::ExportLoad { export: std::mem::take(&mut export.export), ..Default::default() };
        });
    }
    TreeServer {
        id,
        name: name_of(status),
        this: seen.is_this,
        reachable: Some(answers),
        error: seen.error.clone(),
        seen_seconds_ago: seen.seconds_ago.filter(|_| !answers),
        admin: seen.admin.clone(),
        host: Some(status.host.clone()).filter(|host| !host.is_empty()),
        role: Some(status.role.to_string()),
        version: Some(status.version.clone()),
        pid: Some(status.pid),
        uptime_seconds: Some(status.uptime_seconds),
        listen: status.listen.clone(),
        sample: load.sample,
        at: load.at,
        connections: if answers { to_u64(load.clients.len()) } else { 0 },
        total: if answers { load.total } else { idle },
        exports,
        images: status.images.iter().map(image).collect(),
        draining: status.draining.is_draining(),
        cache_failed: status.cache.as_ref().is_some_and(|cache| cache.failed),
        thrashing: status.cache.as_ref().is_some_and(|cache| cache.thrashing),
    }
}

fn image(image: &ImageStatus) -> TreeImage {
    let (resident, zero, pinned) = match (&image.mirror, image.kind) {
        (Some(mirror), _) => (mirror.resident_bytes, mirror.zero_bytes, mirror.pinned_bytes),
        (None, Kind::Real) => (image.size, 0, 0),
        (None, Kind::Mirror) => (0, 0, 0),
    };
    TreeImage {
        name: image.name.clone(),
        size: image.size,
        resident_bytes: resident,
        zero_bytes: zero,
        pinned_bytes: pinned,
    }
}

/// A short name: where the server listens. A loopback address says nothing about the machine.
fn name_of(status: &Status) -> String {
    let addresses = status.listen.iter().filter_map(|uri| Some(uri.parse::<Uri>().ok()?.address));
    let mut by_kind: Vec<_> = addresses.collect();
    by_kind.sort_by_key(|address| matches!(address, Address::Unix(_)));
    let host = Some(&*status.host).filter(|host| !host.is_empty());
    match by_kind.first() {
        Some(Address::Tcp { host: name, port }) if is_loopback(name) => format!("{}:{port}", host.unwrap_or(name)),
        Some(address) => short(address),
        None => host.map_or_else(|| format!("process {}", status.pid), str::to_owned),
    }
}

/// An address, as short as it is told apart.
fn short(address: &Address) -> String {
    match address {
        Address::Tcp { host, port } if host.contains(':') => format!("[{host}]:{port}"),
        Address::Tcp { host, port } => format!("{host}:{port}"),
        Address::Unix(path) => path.file_stem().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
    }
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// Which server has the cache of a name. A cache that was copied has two: then it is whoever answers first.
fn owners<'a>(known: &'a [Known<'_>]) -> BTreeMap<&'a str, &'a str> {
    let mut owners = BTreeMap::new();
    for server in known {
        for upstream in &server.said.load.upstreams {
            owners.entry(&*upstream.node).or_insert(&*server.id);
        }
    }
    owners
}

/// Who has which caches as clients: by the name of the cache, then by the number of the server.
fn from_above<'a>(known: &'a [Known<'a>]) -> BTreeMap<&'a str, BTreeMap<&'a str, FromAbove<'a>>> {
    let mut above: BTreeMap<&str, BTreeMap<&str, FromAbove<'_>>> = BTreeMap::new();
    for server in known.iter().filter(|server| server.answers) {
        for client in &server.said.load.clients {
            if let Some(node) = &client.mirror {
                above.entry(node).or_default().entry(&server.id).or_default().connections.push(client);
            }
        }
    }
    above
}

/// The edges to one cache of `mirror`: one for each of its upstreams, and for each server that has it as a client and
/// that it does not name.
fn edges_of_cache(
    mirror: &Known<'_>,
    upstreams: &[&UpstreamLoad],
    mut seen_by: BTreeMap<&str, FromAbove<'_>>,
    known: &[Known<'_>],
    tree: &mut Tree,
) {
    let mut nameless = Vec::new();
    let mut taken = BTreeSet::new();
    for upstream in upstreams {
        let address = upstream.uri.parse::<Uri>().ok().map(|uri| uri.address);
        let named = |server: &&Known<'_>| address.as_ref().is_some_and(|it| is_at(server, it, mirror));
        // Two can be meant (a port of each machine): whoever has it as a client is the likelier one.
        let mut meant: Vec<_> = known.iter().filter(named).filter(|server| !taken.contains(&*server.id)).collect();
        meant.sort_by_key(|server| !seen_by.contains_key(&*server.id));
        match meant.first() {
            Some(server) => {
                taken.insert(&*server.id);
                tree.edges.push(edge(&server.id, mirror, upstream, seen_by.remove(&*server.id)));
            }
            None => nameless.push(*upstream),
        }
    }
    // Of those that nobody knows by name, the one in use is whoever has the mirror as a client, if only one has.
    nameless.sort_by_key(|upstream| !upstream.current);
    for (index, upstream) in nameless.into_iter().enumerate() {
        let only = if index == 0 && seen_by.len() == 1 { seen_by.pop_first() } else { None };
        let (from, above) = match only {
            Some((server, above)) => (server.to_owned(), Some(above)),
            None => (stranger(upstream, tree), None),
        };
        tree.edges.push(edge(&from, mirror, upstream, above));
    }
    for (server, above) in seen_by {
        let image = upstreams.first().map(|upstream| &*upstream.image);
        tree.edges.push(edge_from_above(server, &mirror.id, image, &above));
    }
}

/// Whether `address`, as `mirror` has it, is where `server` listens.
fn is_at(server: &Known<'_>, address: &Address, mirror: &Known<'_>) -> bool {
    let (status, asker) = (&server.said.status, &mirror.said.status);
    let one_machine = status.host == asker.host;
    let mut listening = status.listen.iter().filter_map(|uri| Some(uri.parse::<Uri>().ok()?.address));
    listening.any(|own| match (&own, address) {
        (Address::Unix(own), Address::Unix(meant)) => one_machine && own == meant,
        (Address::Tcp { host, port }, Address::Tcp { host: meant, port: meant_port }) => {
            let is_host = if is_loopback(meant) {
                one_machine && is_loopback(host)
            } else {
                host == meant || is_name_of(meant, &status.host)
            };
            port == meant_port && is_host
        }
        (Address::Unix(_), Address::Tcp { .. }) | (Address::Tcp { .. }, Address::Unix(_)) => false,
    })
}

/// Whether a name is that of a machine, with or without its domain.
fn is_name_of(name: &str, host: &str) -> bool {
    let label = |name: &str| name.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let is_address = name.parse::<IpAddr>().is_ok();
    !is_address && !host.is_empty() && label(name) == label(host)
}

/// The server behind a URI that is no neighbour; it is one for all who name it so.
fn stranger(upstream: &UpstreamLoad, tree: &mut Tree) -> String {
    let address = upstream.uri.parse::<Uri>().ok().map(|uri| uri.address);
    let name = address.as_ref().map_or_else(|| upstream.uri.clone(), short);
    let place = address.map_or_else(|| upstream.uri.clone(), |address| Uri::plain(address, String::new()).to_string());
    let id = format!("uri:{place}");
    if !tree.servers.iter().any(|server| server.id == id) {
        tree.servers.push(TreeServer { id: id.clone(), name, listen: vec![place], ..TreeServer::default() });
    }
    id
}

fn edge(from: &str, mirror: &Known<'_>, upstream: &UpstreamLoad, above: Option<FromAbove<'_>>) -> TreeEdge {
    let flows = mirror.answers;
    let while_it_flows = |rate: f64| if flows { rate } else { 0.0 };
    TreeEdge {
        from: from.to_owned(),
        to: mirror.id.clone(),
        image: upstream.image.clone(),
        node: upstream.node.clone(),
        uri: Some(upstream.uri.clone()),
        connections: above.map_or(0, |above| to_u64(above.connections.len())),
        current: upstream.current,
        reachable: if flows { upstream.reachable } else { Some(false) },
        bytes_per_second: while_it_flows(upstream.bytes_per_second),
        requests_per_second: while_it_flows(upstream.requests_per_second),
        latency: upstream.latency.filter(|_| flows),
    }
}

/// An edge of which only the server tells.
fn edge_from_above(from: &str, to: &str, image: Option<&str>, above: &FromAbove<'_>) -> TreeEdge {
    let first = above.connections.first();
    let sum = |of: fn(&Rates) -> f64| above.connections.iter().map(|client| of(&client.rates)).sum();
    let export = first.map(|client| image_name(&client.export));
    TreeEdge {
        from: from.to_owned(),
        to: to.to_owned(),
        image: image.or(export).unwrap_or_default().to_owned(),
        node: first.and_then(|client| client.mirror.clone()).unwrap_or_default(),
        uri: None,
        connections: to_u64(above.connections.len()),
        current: true,
        reachable: Some(true),
        bytes_per_second: sum(|rates| rates.read_bytes_per_second),
        requests_per_second: sum(|rates| rates.requests_per_second),
        latency: None,
    }
}

/// The edges to mirrors that are no neighbours.
fn edges_to_strangers(above: BTreeMap<&str, BTreeMap<&str, FromAbove<'_>>>, tree: &mut Tree) {
    tree.left_out = to_u64(above.len().saturating_sub(MOST_UNKNOWN));
    for (node, servers) in above.into_iter().take(MOST_UNKNOWN) {
        let id = format!("mirror:{node}");
        let peer = servers.values().flat_map(|above| &above.connections).map(|client| &*client.peer).next();
        let name = format!("mirror {}", peer.unwrap_or_default());
        let role = Some("mirror".to_owned());
        tree.servers.push(TreeServer { id: id.clone(), name, role, ..TreeServer::default() });
        for (server, above) in servers {
            tree.edges.push(edge_from_above(server, &id, None, &above));
        }
    }
}

/// The clients of a server that are no mirrors, by export.
fn clients(server: &Known<'_>) -> Vec<TreeClients> {
    let mut exports: BTreeMap<&str, (TreeClients, f64)> = BTreeMap::new();
    for client in server.said.load.clients.iter().filter(|client| client.mirror.is_none()) {
        let (sum, waited) = exports.entry(&client.export).or_default();
        let Rates {
            requests_per_second,
            read_bytes_per_second,
            written_bytes_per_second,
            errors_per_second,
            in_flight,
            ..
        } = client.rates;
        sum.count += 1;
        sum.requests_per_second += requests_per_second;
        sum.read_bytes_per_second += read_bytes_per_second;
        sum.written_bytes_per_second += written_bytes_per_second;
        sum.errors_per_second += errors_per_second;
        sum.in_flight += in_flight;
        *waited += client.mean_ms.unwrap_or(0.0) * requests_per_second;
    }
    let finish = |(export, (sum, waited)): (&str, (TreeClients, f64))| TreeClients {
        server: server.id.clone(),
        export: export.to_owned(),
        mean_ms: (sum.requests_per_second > 0.0).then(|| waited / sum.requests_per_second),
        ..sum
    };
    exports.into_iter().map(finish).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::status::Role;
    use proptest::prelude::*;

    /// What a server says that listens at `listen`.
    fn said(server: &str, listen: &[&str]) -> Said {
        let status = Status {
            version: "1".to_owned(),
            pid: 1,
            role: Role::Mirror,
            uptime_seconds: 1.0,
            listen: listen.iter().map(|uri| (*uri).to_owned()).collect(),
            server: server.to_owned(),
            host: "m".to_owned(),
            ..Status::default()
        };
        Said { status, load: Load::default() }
    }

    fn seen(said: Said) -> Seen {
        Seen { admin: Some(format!("/{}", said.status.server)), said: Some(Arc::new(said)), ..Seen::default() }
    }

    fn upstream(image: &str, node: &str, uri: &str, bytes: f64) -> UpstreamLoad {
        UpstreamLoad {
            image: image.to_owned(),
            node: node.to_owned(),
            uri: uri.to_owned(),
            current: true,
            reachable: Some(true),
            bytes_per_second: bytes,
            ..UpstreamLoad::default()
        }
    }

    fn client(export: &str, mirror: Option<&str>, bytes: f64) -> ClientLoad {
        let rates = Rates { read_bytes_per_second: bytes, requests_per_second: 1.0, ..Rates::default() };
        let mirror = mirror.map(str::to_owned);
        ClientLoad {
            export: export.to_owned(),
            peer: "p".to_owned(),
            mirror,
            rates,
            mean_ms: Some(2.0),
            ..Default::default()
        }
    }

    fn with(mut said: Said, upstreams: &[UpstreamLoad], clients: &[ClientLoad]) -> Said {
        said.load.upstreams = upstreams.to_vec();
        said.load.clients = clients.to_vec();
        said
    }

    /// `FROM>TO IMAGE CONNECTIONS`, in order.
    fn edges(tree: &Tree) -> Vec<String> {
        let line = |edge: &TreeEdge| format!("{}>{} {} {}", edge.from, edge.to, edge.image, edge.connections);
        let mut edges: Vec<_> = tree.edges.iter().map(line).collect();
        edges.sort();
        edges
    }

    fn ids(tree: &Tree) -> Vec<&str> {
        tree.servers.iter().map(|server| &*server.id).collect()
    }

    const A: &str = "nbd+unix:///?socket=/a";
    const B: &str = "nbd+unix:///?socket=/b";

    #[test]
    fn a_mirror_seen_from_both_ends_is_one() {
        let top = with(
            said("a", &[A]),
            &[],
            &[client("d", Some("n"), 5.0), client("d@manifest", Some("n"), 0.0), client("d", None, 7.0)],
        );
        let low = with(said("b", &[B]), &[upstream("x", "n", "nbd+unix:///d?socket=/a", 5.0)], &[]);
        for seen in [[seen(top.clone()), seen(low.clone())], [seen(low), seen(top)]] {
            let tree = join(&seen);
            assert_eq!(tree.servers.len(), 2);
            assert_eq!(edges(&tree), ["a>b x 2"]);
            assert_eq!(tree.edges[0].bytes_per_second, 5.0, "once, as the mirror saw it");
            let TreeClients { server, export, count, read_bytes_per_second, mean_ms, .. } = &tree.clients[0];
            assert_eq!((&**server, &**export, *count, *read_bytes_per_second, *mean_ms), ("a", "d", 1, 7.0, Some(2.0)));
        }
    }

    #[test]
    fn another_machines_name_for_a_server_is_found_out_by_its_clients() {
        let top = with(said("a", &["nbd://localhost"]), &[], &[client("d", Some("n"), 5.0)]);
        let mut low = with(said("b", &[B]), &[upstream("d", "n", "nbd://192.0.2.1/d", 5.0)], &[]);
        low.status.host = "other".to_owned();
        let spare = UpstreamLoad { current: false, ..upstream("d", "n", "nbd://192.0.2.9/d", 0.0) };
        low.load.upstreams.insert(0, spare);
        let tree = join(&[seen(top), seen(low)]);
        assert_eq!(edges(&tree), ["a>b d 1", "uri:nbd://192.0.2.9/>b d 0"]);
        assert_eq!(ids(&tree), ["a", "b", "uri:nbd://192.0.2.9/"]);
        assert_eq!(tree.servers[2].reachable, None);
    }

    #[test]
    fn a_port_of_each_machine_is_its_own() {
        let listens = |server, host: &str| {
            let mut said = said(server, &["nbd://localhost"]);
            said.status.host = host.to_owned();
            said
        };
        let low = |uri| with(listens("c", "two"), &[upstream("d", "n", uri, 1.0)], &[]);
        for (uri, from) in [
            ("nbd://localhost/d", "b"),
            ("nbd://127.0.0.1/d", "b"),
            ("nbd://one.example/d", "a"),
            ("nbd://two/d", "b"),
            ("nbd://three/d", "uri:nbd://three/"),
            ("nbd://localhost:1/d", "uri:nbd://localhost:1/"),
        ] {
            let mut low = low(uri);
            low.status.listen = vec![B.to_owned()];
            let tree = join(&[seen(listens("a", "one")), seen(listens("b", "two")), seen(low)]);
            assert_eq!(edges(&tree), [format!("{from}>c d 0")], "{uri}");
        }
    }

    #[test]
    fn two_mirrors_of_one_stranger_see_one_server() {
        let low = |server, node| seen(with(said(server, &[]), &[upstream("d", node, "nbd://far/d", 1.0)], &[]));
        let tree = join(&[low("a", "n"), low("b", "m")]);
        assert_eq!(edges(&tree), ["uri:nbd://far/>a d 0", "uri:nbd://far/>b d 0"]);
        assert_eq!(ids(&tree), ["a", "b", "uri:nbd://far/"]);
    }

    #[test]
    fn a_mirror_that_is_no_neighbour_is_there_without_a_name() {
        let clients = [client("d", Some("n"), 3.0), client("d", Some("n"), 4.0), client("e", Some("m"), 1.0)];
        let tree = join(&[seen(with(said("a", &[A]), &[], &clients))]);
        assert_eq!(edges(&tree), ["a>mirror:m e 1", "a>mirror:n d 2"]);
        assert_eq!(tree.edges[1].bytes_per_second, 7.0);
        assert!(tree.clients.is_empty());
        let many: Vec<_> = (0..200).map(|number| client("d", Some(&format!("n{number}")), 1.0)).collect();
        let tree = join(&[seen(with(said("a", &[A]), &[], &many))]);
        assert_eq!((tree.servers.len(), tree.left_out), (1 + MOST_UNKNOWN, 72));
    }

    #[test]
    fn a_server_that_was_lost_keeps_its_place_and_has_no_rates() {
        let top = with(said("a", &[A]), &[], &[]);
        let mut low =
            with(said("b", &[B]), &[upstream("d", "n", "nbd+unix:///d?socket=/a", 5.0)], &[client("d", None, 1.0)]);
        low.load.total.requests_per_second = 3.0;
        let lost = |said| Seen { error: Some("gone".to_owned()), seconds_ago: Some(4.0), ..seen(said) };
        let tree = join(&[seen(top.clone()), lost(low.clone())]);
        assert_eq!(edges(&tree), ["a>b d 0"]);
        let TreeEdge { bytes_per_second, reachable, .. } = &tree.edges[0];
        assert_eq!((*bytes_per_second, *reachable), (0.0, Some(false)));
        let TreeServer { reachable, seen_seconds_ago, total, .. } = &tree.servers[1];
        assert_eq!((*reachable, *seen_seconds_ago, total.requests_per_second), (Some(false), Some(4.0), 0.0));
        assert!(tree.clients.is_empty());
        // Its upstream can be lost as well, and whoever never answered has nothing but an address.
        let never = Seen { admin: Some("/z".to_owned()), error: Some("no".to_owned()), ..Seen::default() };
        let tree = join(&[seen(low), lost(top), never]);
        assert_eq!(edges(&tree), ["a>b d 0"]);
        assert_eq!(
            tree.servers.iter().map(|server| server.reachable).collect::<Vec<_>>(),
            [Some(true), Some(false), Some(false)]
        );
    }

    #[test]
    fn a_server_under_two_names_is_one_and_answers_if_it_does_under_one() {
        let one = seen(said("a", &[A]));
        let lost = Seen { admin: Some("/other".to_owned()), error: Some("no".to_owned()), ..one.clone() };
        let tree = join(&[lost, one]);
        assert_eq!((ids(&tree), tree.servers[0].reachable), (vec!["a"], Some(true)));
    }

    #[test]
    fn names_may_go_round_in_circles() {
        let a = with(
            said("a", &[A]),
            &[upstream("d", "na", "nbd+unix:///d?socket=/b", 1.0)],
            &[client("d", Some("nb"), 1.0)],
        );
        let b = with(
            said("b", &[B]),
            &[upstream("d", "nb", "nbd+unix:///d?socket=/a", 1.0)],
            &[client("d", Some("na"), 1.0)],
        );
        let own = with(
            said("c", &["nbd://h:1"]),
            &[upstream("d", "nc", "nbd://h:1/d", 1.0)],
            &[client("d", Some("nc"), 1.0)],
        );
        assert_eq!(edges(&join(&[seen(a), seen(b), seen(own)])), ["a>b d 1", "b>a d 1", "c>c d 1"]);
    }

    proptest! {
        /// Servers in a random tree, each with caches that read from others, all seen or some: each cache that a seen
        /// server has is the end of exactly one edge, with the rate that its mirror tells.
        #[test]
        fn each_cache_of_a_known_mirror_has_one_edge(
            parents in prop::collection::vec((0usize..8, 0usize..3), 1..8), hidden in prop::collection::vec(any::<bool>(), 9),
            by_name in any::<bool>(),
        ) {
            let count = parents.len() + 1;
            let listen = |index: usize| format!("nbd://h{index}/");
            let mut servers: Vec<_> = (0..count).map(|index| said(&format!("s{index}"), &[&listen(index)])).collect();
            let mut expected = Vec::new();
            for (index, (parent, caches)) in parents.iter().enumerate() {
                let (mirror, parent) = (index + 1, parent % (index + 1));
                for cache in 0..*caches {
                    let (node, image, rate) = (format!("n{mirror}-{cache}"), format!("i{cache}"), f64::from(u32::try_from(mirror * 10 + cache).unwrap()));
                    let uri = if by_name { format!("nbd://h{parent}/{image}") } else { format!("nbd://elsewhere{mirror}-{cache}/{image}") };
                    servers[mirror].load.upstreams.push(upstream(&image, &node, &uri, rate));
                    servers[parent].load.clients.push(client(&image, Some(&node), rate));
                    let from = match (hidden[parent], by_name) {
                        (false, _) => format!("s{parent}"),
                        (true, true) => format!("uri:nbd://h{parent}/"),
                        (true, false) => format!("uri:nbd://elsewhere{mirror}-{cache}/"),
                    };
                    match (hidden[mirror], hidden[parent]) {
                        (true, true) => {}
                        (true, false) => expected.push((format!("s{parent}"), format!("mirror:{node}"), rate)),
                        (false, _) => expected.push((from, format!("s{mirror}"), rate)),
                    }
                }
            }
            let shown = servers.iter().zip(&hidden).filter(|(_, hidden)| !**hidden);
            let tree = join(&shown.map(|(said, _)| seen(said.clone())).collect::<Vec<_>>());
            let mut edges: Vec<_> =
                tree.edges.iter().map(|edge| (edge.from.clone(), edge.to.clone(), edge.bytes_per_second)).collect();
            let order = |one: &(String, String, f64), other: &(String, String, f64)| one.partial_cmp(other).unwrap();
            edges.sort_by(order);
            expected.sort_by(order);
            prop_assert_eq!(edges, expected);
            let mut names = ids(&tree);
            names.sort_unstable();
            let all = names.len();
            names.dedup();
            prop_assert_eq!(names.len(), all, "each server once");
            prop_assert!(tree.edges.iter().all(|edge| names.contains(&&*edge.from) && names.contains(&&*edge.to)));
        }
    }
}
