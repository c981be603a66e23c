// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Boots guests under QEMU, talks to them and watches their logs.
//!
//! A guest is a [`Config`] and a closure that gets the running [`Guest`]. When the closure returns,
//! [`run`] powers off the guest and searches its whole log for faults. A guest that warned, hung or
//! crashed is an error whatever the closure returned:
//!
//! ```no_run
//! use vm::{Artifacts, Config, Driver, Kernel, Size};
//!
//! # fn main() -> anyhow::Result<()> {
//! # let artifacts = Artifacts {
//! #     kernel: Kernel::Test, image: "".into(), qemu: "".into(), initramfs: "".into(), tools: "".into(),
//! #     logs: "".into(), coverage: None, system: None,
//! # };
//! let config = Config::new(&artifacts, "a_quarter").memory(Size::gib(1));
//! vm::run(&config, |guest| {
//!     guest.insmod(Driver::Rust, &[])?;
//!     let took = guest.balloon().settle(Size::mib(256))?;
//!     println!("{} MiB are free after {took:?}", guest.meminfo()?.free.as_mib());
//!     guest.rmmod(Driver::Rust)
//! })
//! # }
//! ```
//!
//! Targets are sizes of the balloon. (QEMU's own commands count the memory that the guest keeps.)

mod agent;
mod architecture;
mod balloon;
mod config;
mod console;
mod container;
mod control;
mod coverage;
mod daemon;
mod device;
mod driver;
mod fault_injection;
mod guest;
mod home;
mod hostile;
mod hotplug;
mod huge_pages;
mod interrupts;
pub mod ktap;
mod machine;
mod manager;
mod memory_file;
mod memory_use;
mod migration;
mod processor_time;
mod qemu;
mod qmp;
mod samples;
mod sent;
mod size;
mod snapshot;
mod stopwatch;
mod threads;
mod time_stamp_counter;
mod tracing;
mod virtio_mem;
mod vmm;
mod write_log;

pub use ::agent::{Exit, Load, LoadId, LoadStatus, Output, PageFlag};

pub use crate::agent::Pending;
pub use crate::architecture::Architecture;
pub use crate::balloon::Balloon;
pub use crate::config::{Artifacts, Config, Zeroing};
pub use crate::console::{Console, Mark};
pub use crate::container::{Container, System};
pub use crate::control::Sample;
pub use crate::coverage::Coverage;
pub use crate::daemon::{Daemon, Processes};
pub use crate::device::{Device, Offer};
pub use crate::driver::Driver;
pub use crate::fault_injection::Allocation;
pub use crate::guest::load::RunningLoad;
pub use crate::guest::memory::Meminfo;
pub use crate::guest::power::{Hibernated, hibernate};
pub use crate::guest::system::GuestSystem;
pub use crate::guest::{Guest, run, run_all, run_and_kill};
pub use crate::hostile::{Hostile, Link};
pub use crate::huge_pages::{HugePages, has_transparent_huge_pages};
pub use crate::machine::{Accel, Kernel, Machine, MemoryBackend};
pub use crate::manager::Manager;
pub use crate::memory_file::MemoryFile;
pub use crate::migration::{Migration, Transfer};
pub use crate::qmp::{Event, Qmp};
pub use crate::samples::Samples;
pub use crate::sent::Sent;
pub use crate::size::Size;
pub use crate::snapshot::Snapshot;
pub use crate::stopwatch::{PATIENCE, Stopwatch};
pub use crate::tracing::{Off, Section};
pub use crate::virtio_mem::VIRTIO_MEM;
pub use crate::vmm::{Vmm, VmmSeen};
pub use crate::write_log::WriteLog;
