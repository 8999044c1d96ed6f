//! The table of simulated caches.

use headwater::mirror::policy::Admission;
use headwater::units::to_u64;

use crate::Workload;
use crate::cache::{self, Outcome, Room};
use crate::workload;

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn run(workload: &Workload) -> anyhow::Result<()> {
    let (cut, reads) = (workload.cut()?, workload.reads()?);
    println!("choice,cache_percent,policy,admission,hit,fetched,stored,evicted_segments,bypassed_segments");
    for choice in workload.choices() {
        let deployments = workload.deployments(*choice);
        let accesses = workload::accesses(&deployments, &reads, cut, workload.at_once.into());
        let all = to_u64(workload::distinct(&accesses, cut)) * cut.chunk;
        println!("{choice},,none,,{}", columns(cache::unbounded(&accesses, cut)));
        for percent in &workload.cache {
            let limit = all * percent / 100;
            println!("{choice},{percent},belady,,{}", columns(cache::clairvoyant(&accesses, cut, limit)));
            for kind in workload.policies() {
                for (admission, label) in [(Admission::Always, "always"), (Admission::Measured, "measured")] {
                    let outcome = cache::ours(&accesses, cut, Room { limit, fixed: 0 }, *kind, admission);
                    println!("{choice},{percent},{kind},{label},{}", columns(outcome));
                }
            }
        }
    }
    Ok(())
}

fn columns(outcome: Outcome) -> String {
    let Outcome { read, hit, stored, evicted, bypassed, fetched } = outcome;
    format!("{},{},{},{evicted},{bypassed}", share(hit, read), share(fetched, read), share(stored, read))
}

/// With four places.
fn share(part: u64, whole: u64) -> String {
    let places = u128::from(part) * 10_000 / u128::from(whole.max(1));
    format!("{}.{:04}", places / 10_000, places % 10_000)
}
