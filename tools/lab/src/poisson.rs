//! What virtual machines ask for when nobody coordinates them: Poisson arrivals.
//!
//! The time from one request to the next is exponentially distributed and knows nothing of the past, so requests per unit of
//! time are Poisson distributed: mean and variance are alike. What came out is a trace that `replay` plays by the clock.

use std::fmt::Write;

use headwater::export::conformance::Random;
use headwater::units::to_u64;
use load::process::to_f64;

/// Where requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Anywhere, at multiples of their size. Sizes are the powers of two from 4K to 64K, each as often.
    Random,
    /// One after the other, of 64K, from anywhere on, and from the beginning again at the end.
    Sequential,
}

/// The unit of offsets and the smallest request.
const BLOCK: u64 = 4096;
const LARGEST: u64 = 64 << 10;

/// One machine's requests: the same for the same seed.
#[derive(Debug)]
pub(crate) struct Machine {
    random: Random,
    /// Requests per second.
    rate: f64,
    pattern: Pattern,
    /// Bytes of the image, which are several requests at least.
    size: u64,
    seconds: f64,
    next: u64,
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Request {
    pub(crate) seconds: f64,
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
}

impl Machine {
    /// A machine that asks so often, on average. Machines with other seeds ask at other times and for other things.
    pub(crate) fn new(seed: u64, rate: f64, pattern: Pattern, size: u64) -> Self {
        // Seeds that are close to each other would begin alike, and odd ones are as the even ones below them.
        let mut random = Random::new(seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15) << 1);
        for _ in 0..8 {
            random.number();
        }
        let next = random.below(size / LARGEST) * LARGEST;
        Self { random, rate, pattern, size, seconds: 0.0, next }
    }

    /// A trace, as `replay` reads it, of so many requests.
    pub(crate) fn trace(self, requests: usize) -> String {
        let mut text = String::from("seconds,op,offset,bytes\n");
        for Request { seconds, offset, bytes } in self.take(requests) {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{seconds:.6},read,{offset},{bytes}");
        }
        text
    }

    /// By inversion: of a number that is evenly distributed over what is more than 0 and at most 1.
    fn gap(&mut self) -> f64 {
        const STEPS: u64 = 1 << 53;
        let even = to_f64((self.random.number() >> 11) + 1) / to_f64(STEPS);
        -even.ln() / self.rate
    }

    fn place(&mut self) -> (u64, u64) {
        match self.pattern {
            Pattern::Random => {
                let bytes = BLOCK << self.random.below(to_u64(5));
                (self.random.below(self.size / bytes) * bytes, bytes)
            }
            Pattern::Sequential => {
                let offset = self.next;
                self.next = if offset + 2 * LARGEST > self.size { 0 } else { offset + LARGEST };
                (offset, LARGEST)
            }
        }
    }
}

impl Iterator for Machine {
    type Item = Request;

    /// There is always another one.
    fn next(&mut self) -> Option<Request> {
        self.seconds += self.gap();
        let (offset, bytes) = self.place();
        Some(Request { seconds: self.seconds, offset, bytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 8 << 20;
    const RATE: f64 = 20.0;
    const COUNT: usize = 20_000;

    fn requests(seed: u64, pattern: Pattern) -> Vec<Request> {
        Machine::new(seed, RATE, pattern, SIZE).take(COUNT).collect()
    }

    fn mean_and_variance(samples: &[f64]) -> (f64, f64) {
        let count = to_f64(to_u64(samples.len()));
        let mean = samples.iter().sum::<f64>() / count;
        (mean, samples.iter().map(|sample| (sample - mean).powi(2)).sum::<f64>() / count)
    }

    fn is_near(value: f64, expected: f64, part: f64) -> bool {
        (value - expected).abs() <= expected * part
    }

    #[test]
    fn gaps_are_exponentially_distributed() {
        for seed in 0..10 {
            let times: Vec<f64> = requests(seed, Pattern::Random).iter().map(|request| request.seconds).collect();
            let gaps: Vec<f64> =
                std::iter::once(times[0]).chain(times.windows(2).map(|pair| pair[1] - pair[0])).collect();
            let (mean, variance) = mean_and_variance(&gaps);
            // The mean of 20000 is off by 0.7 % with a standard deviation, the variance by 2 %: four of them.
            assert!(is_near(mean, 1.0 / RATE, 0.03), "{seed}: {mean}");
            assert!(is_near(variance, 1.0 / (RATE * RATE), 0.09), "{seed}: {variance}");
            // Without memory: of the gaps longer than the mean, the same part is longer than twice the mean.
            let longer = |bound: f64| to_f64(to_u64(gaps.iter().filter(|gap| **gap * RATE > bound).count()));
            assert!(is_near(longer(2.0) / longer(1.0), (-1.0f64).exp(), 0.06), "{seed}");
        }
    }

    #[test]
    fn requests_per_second_vary_as_much_as_there_are() {
        for seed in 0..10 {
            let mut counts = vec![0.0; 900];
            for request in requests(seed, Pattern::Random) {
                let second = std::time::Duration::from_secs_f64(request.seconds).as_secs();
                if let Some(count) = counts.get_mut(headwater::units::to_usize(second)) {
                    *count += 1.0;
                }
            }
            let (mean, variance) = mean_and_variance(&counts);
            assert!(is_near(mean, RATE, 0.03), "{seed}: {mean}");
            assert!(is_near(variance, RATE, 0.2), "{seed}: {variance}");
        }
    }

    #[test]
    fn machines_differ_and_are_the_same_each_time() {
        assert_eq!(requests(1, Pattern::Random), requests(1, Pattern::Random));
        let firsts: std::collections::BTreeSet<u64> =
            (0..64).map(|seed| requests(seed, Pattern::Random)[0].seconds.to_bits()).collect();
        assert_eq!(firsts.len(), 64);
    }

    #[test]
    fn what_is_asked_for_is_in_the_image() {
        for pattern in [Pattern::Random, Pattern::Sequential] {
            for Request { offset, bytes, .. } in requests(3, pattern) {
                assert!(bytes >= BLOCK && offset % BLOCK == 0 && offset + bytes <= SIZE, "{offset}+{bytes}");
            }
        }
        let mut sizes: Vec<u64> = requests(3, Pattern::Random).iter().map(|request| request.bytes).collect();
        sizes.sort_unstable();
        sizes.dedup();
        assert_eq!(sizes, [4096, 8192, 16384, 32768, 65536]);
        let sequential = requests(3, Pattern::Sequential);
        assert!(sequential.windows(2).all(|pair| pair[1].offset == (pair[0].offset + LARGEST) % SIZE));
    }

    #[test]
    fn a_trace_can_be_replayed() {
        let text = Machine::new(1, RATE, Pattern::Random, SIZE).trace(100);
        let trace = replay::trace::Trace::parse(&text).unwrap();
        assert_eq!((trace.reads.len(), trace.others), (100, 0));
        assert!(trace.end() <= SIZE);
    }
}
