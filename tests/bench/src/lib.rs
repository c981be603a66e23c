// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The costs of the balloon, compared with its alternatives.
//!
//! A benchmark is a function that boots guests with one contestant after the other, repeatedly, so that other load
//! on the machine affects all of them. It adds each run to the runs of the same subject:
//!
//! ```no_run
//! use benchmarks::{Bench, Contestant, Subject, measure};
//! use vm::Size;
//!
//! fn half_a_gib(bench: &Bench) -> anyhow::Result<()> {
//!     let (memory, amount) = (Size::gib(1), Size::mib(512));
//!     bench.rounds(&[(5, &Contestant::BALLOONS)], |contestant| {
//!         contestant.run(bench.config().memory(memory), amount, |guest| {
//!             let run = measure(guest, contestant, || contestant.inflate(guest, amount))?;
//!             bench.add(Subject::new("half-a-gib", contestant, memory, amount), run);
//!             Ok(())
//!         })
//!     })
//! }
//! ```

mod bench;
mod claim;
mod contestant;
mod division;
mod fragmented;
mod guest_load;
mod idle;
mod in_use;
mod machine;
mod migration;
mod reaction;
mod reclaim;
mod record;
mod rotate;
mod scale;
mod snapshot;
mod touched;

pub use crate::bench::{Bench, Benchmark, Setting};
pub use crate::claim::{Claim, find};
pub use crate::contestant::{By, Contestant, Device};
pub use crate::division::{Division, Timeline, Track};
pub use crate::machine::complaint;
pub use crate::record::{Record, Run, Stages, Subject, measure};

/// The benchmarks.
pub const BENCHMARKS: &[&Benchmark] = &[
    &idle::IDLE,
    &idle::DEBIAN,
    &touched::BENCHMARK,
    &in_use::BENCHMARK,
    &fragmented::BENCHMARK,
    &scale::BENCHMARK,
    &reaction::BENCHMARK,
    &migration::IDLE,
    &migration::DIRTY,
    &reclaim::BENCHMARK,
    &snapshot::IDLE,
    &snapshot::DIRTY,
    &guest_load::BENCHMARK,
    &rotate::BENCHMARK,
    &rotate::SMALL,
];
