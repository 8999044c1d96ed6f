//! What the same costs without parity: symbols that somebody lost are sent again, each once in a round, until nobody lacks
//! any.

use std::time::Duration;

use crate::loss::Loss;
use crate::world::{DELAY, Outcome, datagram};

/// Receivers ask within this.
const SPREAD: Duration = Duration::from_millis(30);

/// Sends `symbols` symbols at `rate` bytes per second.
pub(crate) fn run(symbols: u64, receivers: usize, rate: u64, mut loss: Loss) -> Outcome {
    let mut lacking: Vec<(u64, Vec<usize>)> = (0..symbols).map(|symbol| (symbol, (0..receivers).collect())).collect();
    let (mut sent, mut time, mut peak) = (0, 0.0, 0);
    while !lacking.is_empty() {
        let mut asking = vec![false; receivers];
        sent += lacking.len() as u64;
        time += lacking.len() as f64 * datagram() as f64 / rate as f64 + (DELAY * 2).as_secs_f64();
        for (_, lack) in &mut lacking {
            loss.next();
            lack.retain(|receiver| loss.is_lost(*receiver));
            lack.iter().for_each(|receiver| asking[*receiver] = true);
        }
        lacking.retain(|(_, lack)| !lack.is_empty());
        let reports = asking.iter().filter(|asks| **asks).count();
        peak = peak.max(reports);
        time += if reports > 0 { SPREAD.as_secs_f64() } else { 0.0 };
    }
    Outcome {
        datagrams: sent,
        bytes: sent * datagram(),
        symbols,
        seconds: time,
        whole: receivers,
        peak,
        ..Outcome::default()
    }
}
