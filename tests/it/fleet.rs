//! Many mirrors and a tree of them, redirected while their clients read.

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::cache::{image_status, index, order, status};
use crate::support::readers::{Readers, Sample};
use crate::support::{Daemon, Scratch, eventually, headwater, noise, run};

const SIZE: usize = 64 << 20;

/// Two servers of one image.
struct Ground {
    scratch: Scratch,
    bytes: Arc<Vec<u8>>,
    first: Daemon,
    second: Daemon,
}

impl Ground {
    fn new() -> Self {
        let scratch = Scratch::new();
        let bytes = noise(SIZE, 1);
        let image = scratch.file("image.raw", &bytes);
        index(&scratch, &image, &[]);
        let serve = |name: &str| {
            let log = scratch.path(&format!("{name}.log"));
            let mut command = headwater(&log);
            command
                .arg("serve")
                .arg(&image)
                .arg("--read-only")
                .arg("--unix")
                .arg(scratch.path(&format!("{name}.sock")));
            Daemon::start(command, 1, &log)
        };
        let (first, second) = (serve("first"), serve("second"));
        Self { scratch, bytes: Arc::new(bytes), first, second }
    }

    /// A mirror that cannot hold all, so that its clients always wait for the upstream too.
    fn mirror(&self, name: &str, upstream: &str) -> Daemon {
        Daemon::mirror_named(&self.scratch, name, upstream, &["--cache-size=24M"])
    }

    /// Orders all clients of the first server to the second, and waits for it.
    fn redirect_all(&self) -> Value {
        let words = ["redirect", "image", "--to", self.second.uri(), "--all", "--wait", "--json"];
        serde_json::from_str(&run(&mut order(&self.scratch, &self.first, &words))).unwrap()
    }

    fn clients(&self, server: &Daemon) -> usize {
        status(&self.scratch, server)["clients"].as_array().unwrap().len()
    }

    /// The server that a mirror fetches from.
    fn upstream_of(&self, mirror: &Daemon) -> String {
        let image = image_status(&self.scratch, mirror, "image");
        let upstreams = image["mirror"]["upstreams"].as_array().unwrap();
        let current = upstreams.iter().find(|upstream| upstream["current"] == true);
        current.unwrap()["uri"].as_str().unwrap().to_owned()
    }
}

/// The longest read that began before a moment, and of those that ended after it.
fn longest(samples: &[Sample], moment: Instant) -> [Duration; 2] {
    let (after, before): (Vec<_>, Vec<_>) = samples.iter().partition(|sample| sample.began + sample.took >= moment);
    [before, after].map(|part: Vec<Sample>| part.iter().map(|sample| sample.took).max().unwrap())
}

#[test]
fn eight_mirrors_with_four_clients_each_move_at_once() {
    let ground = Ground::new();
    let mirrors: Vec<_> = (0..8).map(|number| ground.mirror(&format!("m{number}"), ground.first.uri())).collect();
    let readers = Readers::start(mirrors.iter().flat_map(|mirror| [mirror.uri(); 4]), &ground.bytes);
    readers.go_on(100);
    let moment = Instant::now();
    let report = ground.redirect_all();
    let took = moment.elapsed();
    readers.go_on(100);
    let [before, after] = longest(&readers.stop(), moment);
    eprintln!("moved in {took:?}; the longest read: {before:?} before, {after:?} since");
    assert_eq!(report["state"], "done", "{report}");
    let clients = report["clients"].as_array().unwrap();
    let ways: Vec<_> = clients.iter().map(|client| (&client["way"], &client["state"])).collect();
    assert_eq!(ways, vec![(&json!("notice"), &json!("moved")); 8], "{report}");
    for mirror in &mirrors {
        assert_eq!(ground.upstream_of(mirror), ground.second.uri());
    }
    eventually("empty server", || ground.clients(&ground.first) == 0);
    let errors = |log: crate::support::Log| log.sum("client left", "errors");
    for mirror in mirrors {
        assert_eq!(errors(mirror.stop()), 0);
    }
    assert_eq!(errors(ground.first.stop()), 0);
    let log = ground.second.stop();
    assert!(log.sent() > 0, "nobody reads there");
    assert_eq!(errors(log), 0);
}

#[test]
fn of_a_tree_only_the_roots_are_told() {
    let ground = Ground::new();
    let roots: Vec<_> = (0..2).map(|number| ground.mirror(&format!("root{number}"), ground.first.uri())).collect();
    let leaves: Vec<_> =
        (0..4).map(|number| ground.mirror(&format!("leaf{number}"), roots[number / 2].uri())).collect();
    let readers = Readers::start(leaves.iter().map(Daemon::uri), &ground.bytes);
    readers.go_on(50);
    let report = ground.redirect_all();
    readers.go_on(50);
    readers.stop();
    assert_eq!((&report["state"], report["clients"].as_array().unwrap().len()), (&json!("done"), 2), "{report}");
    for root in &roots {
        assert_eq!(ground.upstream_of(root), ground.second.uri());
    }
    for (number, leaf) in leaves.into_iter().enumerate() {
        assert_eq!(ground.upstream_of(&leaf), roots[number / 2].uri());
        assert!(!leaf.log_text().contains("lost a connection to the upstream"), "{}", leaf.log_text());
        assert_eq!(leaf.stop().sum("client left", "errors"), 0);
    }
    eventually("empty server", || ground.clients(&ground.first) == 0);
}
