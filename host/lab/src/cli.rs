// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::ops::Range;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use vm::{Accel, Device, Driver, Kernel};

#[derive(Parser)]
#[command(about, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Inflate a balloon to 7 of a guest's 8 GiB and deflate it, with this driver and the C driver
    Demo {
        #[command(flatten)]
        guests: Guests,
    },
    /// Let three guests take turns in using much memory, with and without the manager
    DemoAuto {
        #[command(flatten)]
        guests: Guests,
    },
    /// Run the host's unit tests, KUnit in guests and the scenarios in guests
    Test {
        /// Run the tests in this kernel only
        #[arg(long, value_parser = kernel())]
        kernel: Option<Kernel>,
        /// Run only tests with this in their name; "host", "kunit", "packages" and "in-tree" stand
        /// for all tests of that kind
        #[arg(long)]
        only: Option<String>,
        /// Run long tests as well, and everything in all kernels
        #[arg(long)]
        long: bool,
        /// Run the scenarios on this driver
        #[arg(long, default_value = "rs")]
        driver: DriverName,
        /// Run the scenarios on this balloon device [default: QEMU's, and a few on both]
        #[arg(long)]
        device: Option<DeviceName>,
        #[command(flatten)]
        guests: Guests,
    },
    /// Benchmark against the C driver, virtio-mem and free page reporting
    Bench {
        /// Run only what has this in its name
        #[arg(long)]
        only: Option<String>,
        /// Run nothing, and write docs/performance.md, its plots and the README's table from the stored results
        #[arg(long, conflicts_with = "only")]
        docs: bool,
        #[command(flatten)]
        guests: Guests,
    },
    /// Show which lines of the module KUnit and the scenarios execute
    Coverage {
        /// Run only tests with this in their name, or "kunit", and add the result to earlier ones
        #[arg(long)]
        only: Option<String>,
        #[command(flatten)]
        guests: Guests,
    },
    /// Run KUnit in guests
    Kunit {
        /// Run it in this kernel only
        #[arg(long, value_parser = kernel())]
        kernel: Option<Kernel>,
        #[command(flatten)]
        guests: Guests,
    },
    /// Fuzz the input from guests, front ends and clients
    Fuzz {
        /// Run this target only
        #[arg(long)]
        target: Option<String>,
        /// For how long to run each target
        #[arg(long, default_value_t = 60)]
        seconds: u32,
    },
    /// Build Debian packages of the module and of the host's programs
    Deb,
    /// Run clippy on the module and on the host's programs
    Clippy,
    /// Format the sources
    Fmt {
        /// Change nothing, and fail if a file is not formatted
        #[arg(long)]
        check: bool,
    },
}

/// Options for running guests.
#[derive(Args, Clone, Copy)]
pub(crate) struct Guests {
    /// Accelerator [default: kvm if the processor supports it, otherwise tcg]
    #[arg(long)]
    accel: Option<AccelName>,
    /// Show the guests' logs while they run
    #[arg(long)]
    pub(crate) verbose: bool,
    /// Plug the hostile devices of these seeds, such as 0..1000 [default: from 0 on, for half a minute];
    /// scenarios of races and targets use the first seed
    #[arg(long)]
    seeds: Option<Seeds>,
    /// Duration of the races, in seconds [default: 60]
    #[arg(long)]
    time: Option<u64>,
}

/// A range of seeds.
#[derive(Clone, Copy)]
pub(crate) struct Seeds {
    first: u64,
    end: u64,
}

impl FromStr for Seeds {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (first, end) = text.split_once("..").context("name seeds as in 0..1000")?;
        Ok(Self {
            first: first.parse()?,
            end: end.parse()?,
        })
    }
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum AccelName {
    Kvm,
    Tcg,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DriverName {
    Rs,
    C,
}

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum DeviceName {
    Qemu,
    VhostUser,
    /// The vhost-user device with the extended protocol.
    Extended,
}

impl Guests {
    pub(crate) fn accel(self) -> Accel {
        match self.accel {
            None => Accel::detect(),
            Some(AccelName::Kvm) => Accel::Kvm,
            Some(AccelName::Tcg) => Accel::Tcg,
        }
    }

    pub(crate) fn seeds(self) -> Option<Range<u64>> {
        self.seeds.map(|Seeds { first, end }| first..end)
    }

    pub(crate) fn time(self) -> Option<Duration> {
        self.time.map(Duration::from_secs)
    }
}

/// Reads the name of a kernel.
fn kernel() -> impl TypedValueParser<Value = Kernel> {
    let names = Kernel::ALL.iter().map(|kernel| kernel.name());
    PossibleValuesParser::new(names).map(|name| name.parse().expect("it is one of these names"))
}

impl From<DriverName> for Driver {
    fn from(name: DriverName) -> Self {
        match name {
            DriverName::Rs => Self::Rust,
            DriverName::C => Self::C,
        }
    }
}

impl From<DeviceName> for Device {
    fn from(name: DeviceName) -> Self {
        match name {
            DeviceName::Qemu => Self::Qemu,
            DeviceName::VhostUser => Self::VhostUser,
            DeviceName::Extended => Self::Extended,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_name_every_kernel() {
        let between = |text: &'static str, start: &str, end: &str| {
            let (_, rest) = text.split_once(start).expect("it explains KERNEL=");
            rest.split_once(end).expect("another variable follows").0
        };
        let help = include_str!("../../../Makefile");
        let help = between(help, "\"KERNEL=", "\"ONLY=");
        let table = include_str!("../../../CONTRIBUTING.md");
        let table = between(table, "| `KERNEL=` |", "| `DEVICE=` |");
        for name in Kernel::ALL.iter().map(|kernel| kernel.name()) {
            let is_named = |text: &str| {
                text.split(|c: char| !c.is_alphanumeric() && c != '-')
                    .any(|word| word == name)
            };
            assert!(is_named(help), "make help does not name {name}");
            assert!(is_named(table), "CONTRIBUTING.md does not name {name}");
        }
    }
}
