//! The block nodes of a machine: which of them are clients of NBD servers, which disks they are for, and who holds them.
//!
//! Owns: what three queries tell (`query-named-block-nodes`, `x-debug-query-block-graph`, `query-block`), put together.
//! Does not own: asking, and changing anything.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use serde_json::Value;

use super::address;
use crate::nbd::Uri;

/// What the names of the nodes begin with that were added here; a number follows.
pub(super) const OURS: &str = "hw-redirect-";

/// A block node.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct Node {
    /// Its name, which qemu made up (`#block123`) where nobody gave one.
    #[serde(rename = "node-name")]
    pub(super) name: String,
    #[serde(rename = "drv")]
    pub(super) driver: String,
    #[serde(rename = "ro", default)]
    pub(super) is_read_only: bool,
    #[serde(rename = "file", default)]
    filename: String,
    #[serde(default)]
    pub(super) cache: Cache,
    #[serde(rename = "detect_zeroes", default)]
    pub(super) detect_zeroes: Option<String>,
    #[serde(default)]
    image: Image,
}

/// How a node treats the host's cache, which NBD has none of; kept as it is all the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub(super) struct Cache {
    #[serde(default)]
    pub(super) direct: bool,
    #[serde(rename = "no-flush", default)]
    pub(super) no_flush: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
struct Image {
    #[serde(rename = "virtual-size", default)]
    size: u64,
}

impl Node {
    /// Bytes.
    pub(super) const fn size(&self) -> u64 {
        self.image.size
    }

    /// The server, as far as qemu tells.
    pub(super) fn server(&self) -> Option<Uri> {
        address::read(&self.filename)
    }

    /// The server as qemu writes it.
    pub(super) fn filename(&self) -> &str {
        &self.filename
    }

    pub(super) fn is_ours(&self) -> bool {
        let number = self.name.strip_prefix(OURS);
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    }
}

/// Who holds a node.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holder {
    /// Another node.
    Node(String),
    /// A disk, an export, or whatever else reads and writes.
    Backend,
    /// A job, or something that this program does not know.
    Other(String),
}

/// A node is held under a name, as `file`, `backing` or `root`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Hold {
    pub(super) holder: Holder,
    pub(super) role: String,
}

/// A disk of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Disk {
    /// What it is called: the first of its names.
    pub(super) name: String,
    /// All that it may be called.
    names: BTreeSet<String>,
    /// Where the device is in qemu's object tree, if there is one.
    pub(super) device: Option<String>,
    /// The node on top.
    pub(super) root: String,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Graph {
    pub(super) nodes: BTreeMap<String, Node>,
    /// By the node that is held.
    holds: BTreeMap<String, Vec<Hold>>,
    pub(super) disks: Vec<Disk>,
}

#[derive(Deserialize)]
struct RawGraph {
    nodes: Vec<RawNode>,
    edges: Vec<RawEdge>,
}

#[derive(Deserialize)]
struct RawNode {
    id: u64,
    #[serde(rename = "type")]
    kind: String,
    name: String,
}

#[derive(Deserialize)]
struct RawEdge {
    parent: u64,
    child: u64,
    name: String,
}

#[derive(Deserialize)]
struct RawDisk {
    #[serde(default)]
    device: String,
    #[serde(default)]
    qdev: String,
    inserted: Option<RawInserted>,
}

#[derive(Deserialize)]
struct RawInserted {
    #[serde(rename = "node-name")]
    node: Option<String>,
}

impl Graph {
    /// Puts the three answers together, in the order of the file's head.
    pub(super) fn new(nodes: Value, graph: Value, disks: Value) -> serde_json::Result<Self> {
        let nodes: Vec<Node> = serde_json::from_value(nodes)?;
        let graph: RawGraph = serde_json::from_value(graph)?;
        let disks: Vec<RawDisk> = serde_json::from_value(disks)?;
        Ok(Self {
            nodes: nodes.into_iter().map(|node| (node.name.clone(), node)).collect(),
            holds: holds(graph),
            disks: disks.into_iter().filter_map(RawDisk::into_disk).collect(),
        })
    }

    /// Who holds a node, in an order of its own.
    pub(super) fn holds(&self, node: &str) -> &[Hold] {
        self.holds.get(node).map_or(&[], Vec::as_slice)
    }

    /// Whether this holder has this node under this name.
    pub(super) fn is_held(&self, node: &str, hold: &Hold) -> bool {
        self.holds(node).contains(hold)
    }

    /// A job that is at work somewhere in the machine, if there is one.
    pub(super) fn job(&self) -> Option<&str> {
        let mut holders = self.holds.values().flatten().map(|hold| &hold.holder);
        holders.find_map(|holder| if let Holder::Other(name) = holder { Some(name.as_str()) } else { None })
    }

    /// The disks of which a node is a part, by their places in [`Graph::disks`].
    pub(super) fn disks_over(&self, node: &str) -> Vec<usize> {
        let (mut above, mut next) = (BTreeSet::from([node.to_owned()]), vec![node.to_owned()]);
        while let Some(node) = next.pop() {
            for hold in self.holds(&node) {
                if let Holder::Node(parent) = &hold.holder
                    && above.insert(parent.clone())
                {
                    next.push(parent.clone());
                }
            }
        }
        (0..self.disks.len()).filter(|disk| above.contains(&self.disks[*disk].root)).collect()
    }

    /// The nodes that are clients of NBD servers for some disk.
    pub(super) fn clients(&self) -> impl Iterator<Item = &Node> {
        self.nodes.values().filter(|node| node.driver == "nbd" && !self.disks_over(&node.name).is_empty())
    }

    /// Whether a disk, or a node that is a part of it, is called so.
    pub(super) fn is_called(&self, node: &str, name: &str) -> bool {
        node == name || self.disks_over(node).iter().any(|disk| self.disks[*disk].is_called(name))
    }

    /// Nodes that were added here and that nobody holds: what an earlier run left.
    pub(super) fn left_over(&self) -> Vec<String> {
        let idle = self.nodes.values().filter(|node| node.is_ours() && self.holds(&node.name).is_empty());
        idle.map(|node| node.name.clone()).collect()
    }

    /// A name that no node has.
    pub(super) fn free_name(&self) -> String {
        // One of as many names as there are nodes, and one more, is free.
        let names = (1..=self.nodes.len() + 1).map(|number| format!("{OURS}{number}"));
        names.into_iter().find(|name| !self.nodes.contains_key(name)).unwrap_or_else(|| OURS.to_owned())
    }
}

impl Disk {
    pub(super) fn is_called(&self, name: &str) -> bool {
        self.names.contains(name)
    }
}

impl RawDisk {
    /// Nothing for a drive without a medium.
    fn into_disk(self) -> Option<Disk> {
        let root = self.inserted?.node?;
        // Virtio devices hold their disk by an object of their own.
        let device = self.qdev.strip_suffix("/virtio-backend").unwrap_or(&self.qdev);
        let id = device.rsplit('/').next().unwrap_or(device);
        let names = [&self.device, id, device, &self.qdev, &root];
        let names: Vec<String> = names.into_iter().filter(|name| !name.is_empty()).map(ToString::to_string).collect();
        Some(Disk {
            name: names.first().cloned().unwrap_or_else(|| root.clone()),
            names: names.into_iter().collect(),
            device: (!device.is_empty()).then(|| device.to_owned()),
            root,
        })
    }
}

fn holds(graph: RawGraph) -> BTreeMap<String, Vec<Hold>> {
    let by_id: BTreeMap<u64, &RawNode> = graph.nodes.iter().map(|node| (node.id, node)).collect();
    let mut holds: BTreeMap<String, Vec<Hold>> = BTreeMap::new();
    for edge in &graph.edges {
        let (Some(parent), Some(child)) = (by_id.get(&edge.parent), by_id.get(&edge.child)) else { continue };
        let holder = match parent.kind.as_str() {
            "block-driver" => Holder::Node(parent.name.clone()),
            "block-backend" => Holder::Backend,
            kind => Holder::Other(format!("{kind} {}", parent.name)),
        };
        holds.entry(child.name.clone()).or_default().push(Hold { holder, role: edge.name.clone() });
    }
    holds
}

/// Takes arbitrary answers; whatever they are, looking around in them has an end.
pub(super) fn fuzz(nodes: Value, graph: Value, disks: Value) {
    let Ok(graph) = Graph::new(nodes, graph, disks) else { return };
    for node in graph.nodes.values() {
        // The answers do not matter, only that there are some.
        let _ = (graph.disks_over(&node.name), node.server(), graph.is_called(&node.name, "x"));
    }
    assert!(graph.left_over().len() <= graph.nodes.len() && !graph.nodes.contains_key(&graph.free_name()));
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// A machine of qemu: `top` is held by a disk, and each of `edges` is a parent, a role and a child.
    pub(in super::super) fn graph(top: &[(&str, &str)], edges: &[(&str, &str, &str)], nbd: &[(&str, &str)]) -> Graph {
        let mut names: Vec<&str> = Vec::new();
        let mut id = |name| match names.iter().position(|known| *known == name) {
            Some(index) => index,
            None => {
                names.push(name);
                names.len() - 1
            }
        };
        let mut lines: Vec<Value> = Vec::new();
        for (parent, role, child) in edges {
            lines.push(json!({ "parent": id(parent), "child": id(child), "name": role }));
        }
        for (disk, node) in top {
            lines.push(json!({ "parent": id(disk), "child": id(node), "name": "root" }));
        }
        for (name, _) in nbd {
            id(name);
        }
        let kind =
            |name: &str| if top.iter().any(|(disk, _)| *disk == name) { "block-backend" } else { "block-driver" };
        let all = names.iter().enumerate();
        let objects: Vec<_> = all.map(|(id, name)| json!({ "id": id, "name": name, "type": kind(name) })).collect();
        let nodes = names.iter().filter(|name| kind(name) == "block-driver").map(|name| {
            let file = nbd.iter().find(|(node, _)| node == name).map(|(_, file)| *file);
            let driver = if file.is_some() { "nbd" } else { "raw" };
            json!({ "node-name": name, "drv": driver, "ro": true, "file": file.unwrap_or("x"),
                    "image": { "virtual-size": 4096 }, "cache": { "direct": false, "no-flush": false } })
        });
        let disks = top.iter().map(|(disk, node)| {
            let qdev = format!("/machine/peripheral/{disk}/virtio-backend");
            json!({ "device": "", "qdev": qdev, "inserted": { "node-name": node } })
        });
        Graph::new(nodes.collect(), json!({ "nodes": objects, "edges": lines }), disks.collect()).unwrap()
    }

    #[test]
    fn a_client_is_found_under_its_disks() {
        let edges = [
            ("overlay", "file", "local"),
            ("overlay", "backing", "#block1"),
            ("#block1", "file", "#block2"),
            ("other", "backing", "#block1"),
            ("idle", "file", "lonely"),
        ];
        let nbd = [("#block2", "nbd://::1:1/a b"), ("lonely", "nbd://h:1/x"), ("hw-redirect-1", "nbd://h:1/x")];
        let graph = graph(&[("vd0", "overlay"), ("vd1", "other"), ("vd2", "local")], &edges, &nbd);
        let clients: Vec<_> = graph.clients().map(|node| node.name.as_str()).collect();
        assert_eq!(clients, ["#block2"]);
        assert_eq!(graph.disks_over("#block2"), [0, 1]);
        assert_eq!(graph.nodes["#block2"].server(), Some("nbd://[::1]:1/a%20b".parse().unwrap()));
        assert_eq!(graph.disks[0].device.as_deref(), Some("/machine/peripheral/vd0"));
        for (name, is_called) in [("vd0", true), ("vd1", true), ("vd2", false), ("#block2", true), ("overlay", true)] {
            assert_eq!(graph.is_called("#block2", name), is_called, "{name}");
        }
        assert_eq!(graph.left_over(), ["hw-redirect-1"]);
        assert_eq!(graph.free_name(), "hw-redirect-2");
    }

    #[test]
    fn ours_are_those_with_a_number() {
        let name = |name: &str| graph(&[], &[], &[(name, "nbd://h:1/x")]).left_over().len();
        assert_eq!(["hw-redirect-12", "hw-redirect-", "hw-redirect-1a", "hw-1"].map(name), [1, 0, 0, 0]);
    }

    #[test]
    fn a_drive_without_a_medium_is_no_disk() {
        let disks = json!([{ "device": "cd", "qdev": "x" }, { "device": "d", "inserted": { "node-name": "n" } }]);
        let graph = Graph::new(json!([]), json!({ "nodes": [], "edges": [] }), disks).unwrap();
        assert_eq!(graph.disks.len(), 1);
        assert_eq!((graph.disks[0].name.as_str(), graph.disks[0].device.as_deref()), ("d", None));
    }

    #[test]
    fn a_job_anywhere_is_found() {
        let nodes =
            json!([{ "id": 1, "name": "n", "type": "block-driver" }, { "id": 2, "name": "j", "type": "block-job" }]);
        let edges = json!([{ "parent": 2, "child": 1, "name": "main node" }]);
        let graph = Graph::new(json!([]), json!({ "nodes": nodes, "edges": edges }), json!([])).unwrap();
        assert_eq!(graph.job(), Some("block-job j"));
        assert_eq!(Graph::default().job(), None);
    }

    proptest! {
        /// Against paths that are followed from the top, by brute force.
        #[test]
        fn a_disk_is_over_a_node_when_a_path_leads_there(edges in proptest::collection::vec((0..8_usize, 0..8_usize), 0..20), top in 0..8_usize) {
            let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
            let all: Vec<_> = edges.iter().map(|(from, to)| (names[*from], "file", names[*to])).collect();
            let graph = graph(&[("disk", names[top])], &all, &[]);
            let mut reached = BTreeSet::from([top]);
            for _ in names {
                let more: Vec<_> = edges.iter().filter(|(from, _)| reached.contains(from)).map(|(_, to)| *to).collect();
                reached.extend(more);
            }
            for (index, name) in names.iter().enumerate() {
                prop_assert_eq!(graph.disks_over(name).len(), usize::from(reached.contains(&index)));
            }
        }
    }
}
