// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A scenario, and its parameters.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use anyhow::Result;
use vm::{Accel, Artifacts, Config, Device, Driver, Kernel, Zeroing};

pub(crate) use vm::PATIENCE;

/// A scenario.
pub struct Scenario {
    /// The name.
    pub name: &'static str,
    /// What a passed scenario proves.
    pub proves: &'static str,
    /// The kernels to run it with.
    pub kernels: &'static [Kernel],
    /// The drivers to run it with.
    pub drivers: &'static [Driver],
    /// The devices to run it with.
    pub devices: &'static [Device],
    /// Runs it.
    pub run: fn(&Setup) -> Result<()>,
}

pub(crate) const ALL_KERNELS: &[Kernel] = &[Kernel::Test, Kernel::Debug, Kernel::Debian];
pub(crate) const ALL_ARCHITECTURES: &[Kernel] = &[
    Kernel::Test,
    Kernel::Debug,
    Kernel::Kcfi,
    Kernel::Debian,
    Kernel::Arm64,
    Kernel::Arm64Pages16k,
    Kernel::Arm64Pages64k,
    Kernel::Riscv64,
    Kernel::S390x,
    Kernel::Powerpc64le,
];
/// The test kernels of all architectures.
pub(crate) const TEST_KERNELS: &[Kernel] = &[
    Kernel::Test,
    Kernel::Arm64,
    Kernel::Arm64Pages16k,
    Kernel::Arm64Pages64k,
    Kernel::Riscv64,
    Kernel::S390x,
    Kernel::Powerpc64le,
];
pub(crate) const BOTH_KERNELS: &[Kernel] = &[Kernel::Test, Kernel::Debug];
/// For scenarios in which the kernel calls functions of the driver that it does not call in others.
pub(crate) const CALLBACK_KERNELS: &[Kernel] = &[Kernel::Test, Kernel::Debug, Kernel::Kcfi];
/// The same, unless the debug kernel is too slow.
pub(crate) const FAST_KERNELS: &[Kernel] = &[Kernel::Test, Kernel::Kcfi];
pub(crate) const DEBUG_KERNEL: &[Kernel] = &[Kernel::Debug];
pub(crate) const TEST_KERNEL: &[Kernel] = &[Kernel::Test];
pub(crate) const BOTH_DRIVERS: &[Driver] = &[Driver::Rust, Driver::C];
pub(crate) const RUST_DRIVER: &[Driver] = &[Driver::Rust];
pub(crate) const ALL_DEVICES: &[Device] = &[Device::Qemu, Device::VhostUser, Device::Extended];
pub(crate) const QEMU_DEVICE: &[Device] = &[Device::Qemu];
pub(crate) const VHOST_USER_DEVICE: &[Device] = &[Device::VhostUser, Device::Extended];
pub(crate) const EXTENDED_DEVICE: &[Device] = &[Device::Extended];

/// The kernel's messages when it is out of memory, and when it kills a process.
pub(crate) const OOM: &str = "invoked oom-killer|Out of memory";

/// The parameters of a scenario.
pub struct Setup {
    /// The driver under test.
    pub driver: Driver,
    /// The balloon device of its guests.
    pub device: Device,
    /// The kernel of its guests.
    pub kernel: Kernel,
    config: Config,
    seeds: Option<Range<u64>>,
    time: Option<Duration>,
    notes: Mutex<Vec<String>>,
    skipped: Mutex<Option<String>>,
}

impl Setup {
    /// A setup for one run of a scenario.
    pub fn new(
        scenario: &Scenario,
        kernel: Kernel,
        driver: Driver,
        device: Device,
        artifacts: &Artifacts,
        accel: Accel,
        verbose: bool,
    ) -> Self {
        // Guests of other variants may run at the same time.
        let name = format!("{}-{}", scenario.name, device.name());
        let config = Config::new(artifacts, &name)
            .device(device)
            .accel(accel)
            .verbose(verbose);
        Self {
            driver,
            device,
            kernel,
            config,
            seeds: None,
            time: None,
            notes: Mutex::default(),
            skipped: Mutex::default(),
        }
    }

    /// Makes the guests' kernels zero memory, see [`Config::zeroing`].
    pub fn with_zeroing(mut self, zeroing: bool) -> Self {
        if zeroing {
            // Both variants may run at the same time.
            self.config = self.config.zeroing(Zeroing::Own).name_suffix("-zeroing");
        }
        self
    }

    /// Sets the seeds of scenarios with seeds.
    pub fn with_seeds(mut self, seeds: Option<Range<u64>>) -> Self {
        self.seeds = seeds;
        self
    }

    /// The requested seeds.
    pub(crate) fn seeds(&self) -> Option<Range<u64>> {
        self.seeds.clone()
    }

    /// Sets how long scenarios without an end of their own run.
    pub fn with_time(mut self, time: Option<Duration>) -> Self {
        self.time = time;
        self
    }

    /// The requested duration.
    pub(crate) fn time(&self) -> Option<Duration> {
        self.time
    }

    /// The configuration that the scenario's guests start from.
    pub fn config(&self) -> Config {
        self.config.clone()
    }

    /// Returns `fast`, or `slow` if the guests' kernel is many times slower than others.
    pub(crate) fn by_speed<T>(&self, fast: T, slow: T) -> T {
        if self.kernel.is_slow() { slow } else { fast }
    }

    /// One of the host's programs.
    pub fn tool(&self, name: &str) -> PathBuf {
        self.config.tool(name)
    }

    /// Where the guests' logs are.
    pub fn logs(&self) -> PathBuf {
        self.config.logs()
    }

    /// Prints a line below the scenario's result.
    pub fn note(&self, line: String) {
        self.notes.lock().expect("a lock").push(line);
    }

    /// Notes what has gone wrong with the C driver, whose faults are reported only.
    ///
    /// # Errors
    ///
    /// The failure, with the other driver.
    pub(crate) fn tolerate(&self, result: Result<()>) -> Result<()> {
        match result {
            Err(error) if self.driver == Driver::C => self.note(format!("{error:#}")),
            result => return result,
        }
        Ok(())
    }

    /// Records why the scenario cannot run on this machine. It then returns, and has not passed.
    pub fn skip(&self, reason: &str) {
        *self.skipped.lock().expect("a lock") = Some(reason.to_owned());
    }

    /// Why the scenario was skipped, if it was.
    pub fn skipped(&self) -> Option<String> {
        self.skipped.lock().expect("a lock").clone()
    }

    /// The lines to be printed below the result.
    pub fn notes(&self) -> Vec<String> {
        self.notes.lock().expect("a lock").clone()
    }
}
