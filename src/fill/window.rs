//! stub
#![allow(missing_docs)]
use std::time::{Duration, Instant};
#[derive(Debug)]
pub struct Window {
    f: u64,
}
impl Window {
    pub fn new(_: u64, _: u64) -> Self {
        Self { f: 0 }
    }
    pub fn limit(&self) -> u64 {
        4 << 20
    }
    pub fn in_flight(&self) -> u64 {
        self.f
    }
    pub fn sent(&mut self, _: Instant, b: u64) {
        self.f += b
    }
    pub fn landed(&mut self, _: Instant, b: u64, _: Duration) {
        self.f -= b
    }
    pub fn failed(&mut self, _: Instant, b: u64) {
        self.f -= b
    }
    pub fn withdrawn(&mut self, b: u64) {
        self.f -= b
    }
    pub fn demand_landed(&mut self, _: Instant, _: u64, _: Duration) {}
    pub fn rate(&self) -> Option<u64> {
        None
    }
}
