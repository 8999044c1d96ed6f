//! Headwater: a tiered NBD server for people who start many machines from few disk images.
//!
//! A server holds a *real image*, or a *mirror* that starts empty, fetches what its clients read from the server
//! above it, keeps it, and serves it again, to virtual machines and to further mirrors. Every tier is an
//! [`export::Export`] over a lower one; a request is a walk down.
//!
//! The modules, in reading order. Each imports only those above it in this list, and those of one level do not import
//! each other; `docs/architecture.md` has the reasons and `tests/architecture.rs` holds the code to it.
//!
//! | level | module | |
//! | --- | --- | --- |
//! | 0 | [`units`] | sizes as operators write them |
//! | 0 | [`ranges`] | ranges of bytes |
//! | 0 | [`clock`] | the monotonic clock |
//! | 0 | [`error`] | what can go wrong with a request |
//! | 1 | [`nbd`] | the protocol without I/O, both roles |
//! | 1 | [`disk`] | files by io_uring; nearly all unsafe code |
//! | 1 | [`manifest`] | what an image holds: digests, identity |
//! | 1 | [`sealed`] | small files of JSON that say whether they are whole |
//! | 1 | [`telemetry`] | logs and counters |
//! | 1 | [`tls`] | TLS 1.3 without I/O: handshakes, records, certificates |
//! | 2 | [`net`] | sockets |
//! | 2 | [`worker`] | one thread per core |
//! | 2 | [`export`] | what every tier is; wrappers; the conformance suite |
//! | 2 | [`cast`] | one sending that fills many mirrors: the protocol without I/O |
//! | 3 | [`image`] | real images: raw, block devices, qcow2 |
//! | 3 | [`upstream`] | an export of another server |
//! | 3 | [`mirror`] | a cache of the tier below |
//! | 3 | [`server`] | serves exports to clients |
//! | 4 | [`agent`] | the client's end of a redirect: qemu by QMP, the kernel's device by netlink |
//! | 4 | [`fill`] | what is fetched ahead of demand |
//! | 4 | [`multicast`] | sending an image to a group, and filling mirrors with what is heard |
//! | 5 | [`control`] | the admin API |
//! | 6 | [`cli`] | the command line |

pub mod agent;
pub mod cast;
pub mod cli;
pub mod clock;
pub mod control;
pub mod disk;
pub mod error;
pub mod export;
pub mod fill;
pub mod image;
pub mod manifest;
pub mod mirror;
pub mod multicast;
pub mod nbd;
pub mod net;
pub mod ranges;
pub mod sealed;
pub mod server;
pub mod telemetry;
pub mod tls;
pub mod units;
pub mod upstream;
pub mod worker;
