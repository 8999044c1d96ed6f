//! Headwater as its users see it: the real program, real sockets, real files, and the real tools of others.
//!
//! | module | tries |
//! | --- | --- |
//! | `support` | the program under test, other servers and clients, a link that can be cut |
//! | `handshake`, `transmission` | the server, byte by byte, as good and bad clients use it |
//! | `data_path` | long reads and merged writes, as the server does them in parts, in any mixture |
//! | `access` | who may have which export, and every way around it |
//! | `config` | the configuration file: checked, read, read again |
//! | `hostile` | ten thousand hostile connections, and clients that are served meanwhile |
//! | `serve` | real images: files, devices, durability, several views of one image |
//! | `index` | manifests: made, announced, refused, named |
//! | `metrics` | `/metrics`: what Prometheus' own checker says, and whether it agrees with clients |
//! | `mirror` | what reaches the upstream, and what clients get when it misbehaves |
//! | `crash` | kill, restart, compare |
//! | `steps` | a crash at each step of the order of writing |
//! | `lies` | upstreams that send wrong bytes, and caches whose files are damaged |
//! | `generations` | the upstream's image is replaced |
//! | `versions` | images that have most chunks in common |
//! | `bound` | the limit of a cache, its pins, full and failing disks |
//! | `faults` | full disks, failing disks, refused io_uring |
//! | `roles` | our client against our server: the conformance suite over a socket |
//! | `interop_clients`, `interop_upstreams` | libnbd, qemu, nbdkit, fio; nbdkit, qemu-nbd, nbd-server and the `nbd` crate |
//! | `tls` | TLS in both roles: who is let in, who is not, what is injected |
//! | `orders` | connections under orders: switched, told, closed, sent away |
//! | `kernel` | the kernel's client, in a virtual machine |
//! | `attach` | `headwater attach`, `redirect --device`, `detach`, in a virtual machine |
//! | `qmp` | disks of real qemu, moved by its monitor |
//! | `admin` | the admin API and the commands that use it |
//! | `api` | the admin API as it is described: who may ask, settings, OpenAPI, generated requests |
//! | `prefetch` | `headwater prefetch`, and what becomes of its orders |
//! | `cast_orders` | `headwater cast`: what is refused, what mirrors are told, the order behind each session |
//! | `redirect` | running clients moved to another server, and servers taken out of service |
//! | `verify` | `headwater verify`, and what `headwater status` counts |
//! | `balance` | clients of uneven load, moved until servers share it; standbys |
//! | `fleet` | many mirrors and a tree of them, redirected while their clients read |
//! | `fill` | what is fetched ahead of demand, why, and how fast at most |
//! | `follow` | mirrors that go to another upstream when they are told to |
//! | `profile` | what clients read in earlier runs: kept, moved, exchanged |
//! | `cast` | one sending that fills many mirrors, and what becomes of them when it goes wrong |
//! | `page` | the status page, in a real browser |
//! | `top` | `headwater top` in a terminal: what it shows, what its keys do |
//! | `package` | the manual, completions, units of systemd |
//! | `command_line` | what it prints, refuses and returns |
//!
//! A tool that is missing fails the test that needs it; `tools/test` installs them all.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed; the rules of `.clippy.toml` are for the program"
)]

mod access;
mod admin;
mod api;
mod attach;
mod balance;
mod bound;
mod cast;
mod cast_orders;
mod command_line;
mod config;
mod crash;
mod data_path;
mod faults;
mod fill;
mod fleet;
mod follow;
mod generations;
mod handshake;
mod hostile;
mod index;
mod interop_clients;
mod interop_upstreams;
mod kernel;
mod lies;
mod metrics;
mod mirror;
mod orders;
mod package;
mod page;
mod prefetch;
mod profile;
mod qmp;
mod redirect;
mod roles;
mod serve;
mod steps;
mod support;
mod takeover;
mod tls;
mod top;
mod transmission;
mod verify;
mod versions;
