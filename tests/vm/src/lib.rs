// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Scenarios: tests of the driver in guests under QEMU.
//!
//! A scenario is a function that boots guests and checks both sides. The driver and the kernel are
//! parameters:
//!
//! ```no_run
//! use scenarios::Setup;
//! use vm::Size;
//!
//! fn gives_a_quarter(setup: &Setup) -> anyhow::Result<()> {
//!     vm::run(&setup.config().memory(Size::gib(1)), |guest| {
//!         guest.insmod(setup.driver, &[])?;
//!         guest.balloon().settle(Size::mib(256))?;
//!         anyhow::ensure!(guest.vmstat("nr_balloon_pages")? == 65536);
//!         guest.rmmod(setup.driver)
//!     })
//! }
//! ```

mod compaction;
mod configuration;
mod costs;
mod daemon_killed;
mod debugfs;
mod faults;
mod floor;
mod guest_memory;
mod hinting;
mod hostile;
mod latency;
mod lifecycle;
mod manager;
mod memory;
mod migration;
mod nodes;
mod observability;
mod oom;
mod overwriting;
mod page_sets;
mod poison;
mod power;
mod queues;
mod races;
mod reporting;
mod requests;
mod scenario;
mod signatures;
mod silent;
mod sizes;
mod snapshot;
mod soak;
mod statistics;
mod transports;
mod unit;
mod unit_oom;
mod unused;
mod vhost_user;
mod vmm;
mod withheld;
mod zeroing;
mod zeroing_dumps;
mod zeroing_features;

pub use scenario::{Scenario, Setup};

/// The scenarios, by topic.
pub const SCENARIOS: &[&[Scenario]] = &[
    sizes::SCENARIOS,
    floor::SCENARIOS,
    soak::SCENARIOS,
    manager::SCENARIOS,
    memory::SCENARIOS,
    compaction::SCENARIOS,
    latency::SCENARIOS,
    reporting::SCENARIOS,
    poison::SCENARIOS,
    statistics::SCENARIOS,
    oom::SCENARIOS,
    nodes::SCENARIOS,
    faults::SCENARIOS,
    lifecycle::SCENARIOS,
    races::SCENARIOS,
    power::SCENARIOS,
    transports::SCENARIOS,
    queues::SCENARIOS,
    hinting::SCENARIOS,
    page_sets::SCENARIOS,
    costs::SCENARIOS,
    configuration::SCENARIOS,
    observability::SCENARIOS,
    vhost_user::SCENARIOS,
    unit::SCENARIOS,
    unit_oom::SCENARIOS,
    requests::SCENARIOS,
    guest_memory::SCENARIOS,
    withheld::SCENARIOS,
    daemon_killed::SCENARIOS,
    unused::SCENARIOS,
    snapshot::SCENARIOS,
    migration::SCENARIOS,
    hostile::SCENARIOS,
    signatures::SCENARIOS,
    silent::SCENARIOS,
    vmm::SCENARIOS,
    zeroing::SCENARIOS,
    zeroing_dumps::SCENARIOS,
    zeroing_features::SCENARIOS,
];
