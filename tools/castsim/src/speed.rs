//! How fast a block is encoded and mended, on one core.
//!
//! Each figure is the time that nine of ten rounds of one block take longer than, one after the other on one thread, in bits of
//! the block's data: rounds in which something else had the core say nothing about the code. They are the costs that sender
//! and receivers have beyond moving the bytes.

use std::hint::black_box;

use clap::Args;
use headwater::cast::code::{mend, parity};
use headwater::cast::form::{Datagram, Head, Key, decode, encode};
use headwater::cast::{BLOCK, MOST_PARITY, SessionId};
use headwater::clock;
use headwater::manifest::{Digest, ImageId};
use headwater::units::to_usize;
use serde::Serialize;

/// How fast a block is encoded and mended, on one core.
#[derive(Debug, Args)]
pub(crate) struct Speed {
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Bytes of a symbol; repeatable.
    #[arg(long = "symbol", default_values_t = [1444, 1424, 1408])]
    symbols: Vec<u16>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// One line of the table.
#[derive(Debug, Serialize)]
struct Figure {
    what: String,
    symbol_bytes: u16,
    /// Of data, per second, by the round that nine of ten are slower than.
    gbit_per_second: f64,
    /// Of one core, for a Gbit of data per second.
    core_per_gbit: f64,
}

impl Speed {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let figures: Vec<Figure> = self.symbols.iter().flat_map(|symbol| self.of_symbol(*symbol)).collect();
        #[expect(clippy::print_stdout, reason = "this is what it is for")]
        if self.json {
            println!("{}", serde_json::to_string_pretty(&figures)?);
        } else {
            println!("{:<28} {:>7} {:>8} {:>14}", "what", "symbol", "Gbit/s", "core per Gbit/s");
            for figure in &figures {
                let Figure { what, symbol_bytes, gbit_per_second, core_per_gbit } = figure;
                println!("{what:<28} {symbol_bytes:>7} {gbit_per_second:>8.1} {:>13.1} %", core_per_gbit * 100.0);
            }
        }
        Ok(())
    }

    fn of_symbol(&self, symbol: u16) -> Vec<Figure> {
        let width = usize::from(symbol);
        let mut block = vec![0; to_usize(BLOCK)];
        fill(&mut block);
        let parity_of = |block: &[u8]| parity(block, symbol, MOST_PARITY);
        let mut figures =
            vec![self.figure("encode, 256 parity", symbol, || drop(black_box(parity_of(black_box(&block)))))];
        let parity = parity_of(&block);
        block.resize(block.len().next_multiple_of(width), 0);
        for percent in [1, 5, 20] {
            figures.push(self.mending(&block, &parity, symbol, percent));
        }
        figures.extend(self.tags(&block, symbol));
        block.truncate(to_usize(BLOCK));
        figures.push(self.figure("digests of 64 KiB chunks", symbol, || {
            black_box(&block).chunks(65536).for_each(|chunk| {
                black_box(Digest::of(chunk));
            });
        }));
        figures
    }

    fn mending(&self, block: &[u8], parity: &[u8], symbol: u16, percent: usize) -> Figure {
        let width = usize::from(symbol);
        let symbols = block.len() / width;
        // Spread evenly over the block: which are lost does not change the cost.
        let lost = (symbols * percent).div_ceil(100);
        let is_lost = |index: usize| index * lost / symbols != (index + 1) * lost / symbols;
        let with: Vec<(u16, &[u8])> = (0..).zip(parity.chunks(width)).take(lost).collect();
        let mut data = block.to_vec();
        let figure = self.figure(&format!("mend, {percent} % lost"), symbol, || {
            for place in data.chunks_mut(width).enumerate().filter(|(index, _)| is_lost(*index)).map(|(_, place)| place)
            {
                place.fill(0);
            }
            assert!(mend(&mut data, symbol, MOST_PARITY, |index| !is_lost(usize::from(index)), &with));
        });
        assert!(data == block, "it is mended");
        figure
    }

    /// What making and checking the datagrams of a block costs.
    fn tags(&self, block: &[u8], symbol: u16) -> [Figure; 2] {
        let key = Key::new(ImageId([1; 32]), SessionId(1));
        let mut made = Vec::with_capacity(block.len() * 2);
        let mut ends = Vec::new();
        let making = self.figure("write datagrams and tags", symbol, || {
            made.clear();
            ends.clear();
            for (index, bytes) in (0..).zip(block.chunks(usize::from(symbol))) {
                let head = Head { session: SessionId(1), number: u32::from(index) };
                encode(head, &Datagram::Symbol { block: 1, index, bytes }, &key, &mut made);
                ends.push(made.len());
            }
        });
        let checking = self.figure("check tags, read datagrams", symbol, || {
            let mut start = 0;
            for end in &ends {
                assert!(decode(black_box(&made[start..*end]), &key).is_ok());
                start = *end;
            }
        });
        [making, checking]
    }

    fn figure(&self, what: &str, symbol: u16, mut once: impl FnMut()) -> Figure {
        once();
        let mut times: Vec<f64> = (0..self.rounds)
            .map(|_| {
                let start = clock::now();
                once();
                (clock::now() - start).as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        let gigabits = 8.0 * f64::from(u32::try_from(BLOCK).unwrap_or(u32::MAX)) / 1e9;
        let seconds = times[times.len() / 10];
        let (gbit_per_second, core_per_gbit) = (gigabits / seconds, seconds / gigabits);
        Figure { what: what.to_owned(), symbol_bytes: symbol, gbit_per_second, core_per_gbit }
    }
}

/// Bytes that are the same each time and not all alike.
fn fill(bytes: &mut [u8]) {
    let mut state = 1u32;
    for byte in bytes {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = state.to_le_bytes()[3];
    }
}
