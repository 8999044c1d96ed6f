//! Headwater: a tiered NBD server for people who start many machines from few disk images.
pub mod clock;
pub mod disk;
pub mod error;
pub mod export;
pub mod image;
pub mod mirror;
pub mod nbd;
pub mod net;
pub mod ranges;
pub mod server;
pub mod telemetry;
pub mod units;
pub mod upstream;
pub mod worker;
