// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configurations that benchmarks compare: ways for a guest to return memory to the host.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use vm::{Config, Driver, Guest, Offer, Size};

/// The mechanism in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// This repository's balloon driver.
    Rs,
    /// The kernel's balloon driver.
    C,
    /// virtio-mem, which unplugs memory.
    VirtioMem,
    /// Free page reporting, which needs no request.
    Reporting,
    /// Nothing.
    None,
}

/// The device of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// QEMU's device.
    Qemu,
    /// This repository's device, with the extended protocol.
    VhostUser,
}

/// A configuration that is compared with others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contestant {
    /// The mechanism in the guest.
    pub driver: By,
    /// The device.
    pub device: Device,
}

impl Contestant {
    /// The C driver on QEMU's device, the usual configuration.
    pub const STOCK: Self = Self::new(By::C, Device::Qemu);

    /// This driver on this repository's device.
    pub const OURS: Self = Self::new(By::Rs, Device::VhostUser);

    /// Both drivers on QEMU's device.
    pub const ON_QEMU: [Self; 2] = [Self::new(By::Rs, Device::Qemu), Self::STOCK];

    /// Both drivers on both devices.
    pub const BALLOONS: [Self; 4] = [
        Self::OURS,
        Self::new(By::C, Device::VhostUser),
        Self::ON_QEMU[0],
        Self::ON_QEMU[1],
    ];

    /// A guest that can unplug memory.
    pub const VIRTIO_MEM: Self = Self::new(By::VirtioMem, Device::Qemu);

    /// A guest with free page reporting.
    pub const REPORTING: Self = Self::new(By::Reporting, Device::Qemu);

    /// A guest on one of the devices, without a mechanism.
    pub const fn none(device: Device) -> Self {
        Self::new(By::None, device)
    }

    /// This driver on this device.
    pub const fn new(driver: By, device: Device) -> Self {
        Self { driver, device }
    }

    /// The baseline: the C driver on the same device.
    pub fn base(self) -> Self {
        Self::new(By::C, self.device)
    }

    /// Boots a guest that can return `amount`, passes it to `body` and ends it.
    ///
    /// # Errors
    ///
    /// The error of [`vm::run`].
    pub fn run<T>(
        self,
        config: Config,
        amount: Size,
        body: impl FnOnce(&Guest) -> Result<T>,
    ) -> Result<T> {
        vm::run(&self.config(config, amount), |guest| {
            self.plug(guest, amount)?;
            self.load(guest, &[])?;
            body(guest)
        })
    }

    /// Gives the guest the memory `amount` that virtio-mem can unplug.
    pub(crate) fn plug(self, guest: &Guest, amount: Size) -> Result<()> {
        if self.driver == By::VirtioMem {
            guest.load_virtio_mem()?;
            guest.plug(amount)?;
        }
        Ok(())
    }

    /// Loads the driver, if it is a module, with more `parameters`.
    pub(crate) fn load(self, guest: &Guest, parameters: &[&str]) -> Result<()> {
        match self.module() {
            Some(driver) => guest.insmod(driver, &[driver.low_floor(), parameters].concat()),
            None => Ok(()),
        }
    }

    /// The configuration of its guest.
    pub(crate) fn config(self, config: Config, amount: Size) -> Config {
        let config = config.device(match self.device {
            Device::Qemu => vm::Device::Qemu,
            Device::VhostUser => vm::Device::Extended,
        });
        match self.driver {
            By::VirtioMem => config.virtio_mem(amount),
            By::Reporting => config.offer(&[Offer::FreePageReporting]),
            By::Rs | By::C | By::None => config,
        }
    }

    /// The driver that the guest loads.
    pub(crate) fn module(self) -> Option<Driver> {
        match self.driver {
            By::Rs => Some(Driver::Rust),
            By::C | By::Reporting => Some(Driver::C),
            By::VirtioMem | By::None => None,
        }
    }

    /// Makes the guest return `amount`, starting from nothing. Returns how long it took.
    pub fn inflate(self, guest: &Guest, amount: Size) -> Result<Duration> {
        match self.driver {
            By::VirtioMem => guest.plug(Size::default()),
            _ => guest.balloon().settle(amount),
        }
    }

    /// Makes the guest take back all of `amount`. Returns how long it took.
    pub fn deflate(self, guest: &Guest, amount: Size) -> Result<Duration> {
        match self.driver {
            By::VirtioMem => guest.plug(amount),
            _ => guest.balloon().settle(Size::default()),
        }
    }

    /// How much of the host's memory the guest uses.
    pub fn host_memory(self, guest: &Guest) -> Result<Size> {
        self.meter(guest)?()
    }

    /// A function that returns how much of the host's memory the guest uses.
    pub(crate) fn meter<'a>(
        self,
        guest: &'a Guest,
    ) -> Result<Box<dyn Fn() -> Result<Size> + Send + 'a>> {
        Ok(match self.device {
            Device::Qemu => Box::new(|| guest.resident()),
            Device::VhostUser => {
                let file = guest.memory_file()?;
                Box::new(move || file.resident())
            }
        })
    }
}

impl fmt::Display for By {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rs => "this driver",
            Self::C => "C driver",
            Self::VirtioMem => "virtio-mem",
            Self::Reporting => "reporting",
            Self::None => "none",
        })
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qemu => "QEMU",
            Self::VhostUser => "vhost-user",
        })
    }
}

impl fmt::Display for Contestant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.driver {
            By::VirtioMem | By::Reporting => self.driver.fmt(f),
            By::Rs | By::C | By::None => write!(f, "{}, {}", self.driver, self.device),
        }
    }
}
