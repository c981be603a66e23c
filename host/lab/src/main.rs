// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program behind make. It runs in the build root, with the checkout as its current directory.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use vm::Device;

mod bench;
mod check;
mod cli;
mod coverage;
mod deb;
mod debian;
mod demo;
mod demo_auto;
mod descendants;
mod foreign;
mod fuzz;
mod host_tests;
mod in_tree;
mod initramfs;
mod kernel;
mod kunit;
mod module;
mod places;
mod platform;
mod progress;
mod queue;
mod report;
mod setup;
#[cfg(test)]
mod structure;
mod test;
mod toolchain;

use cli::{Cli, Command};

fn main() -> Result<ExitCode> {
    let good = match Cli::parse().command {
        Command::Demo { guests } => demo::run(guests),
        Command::DemoAuto { guests } => demo_auto::run(guests),
        Command::Test {
            kernel,
            only,
            long,
            driver,
            device,
            guests,
        } => {
            let wanted = test::Wanted {
                kernel,
                only: only.as_deref(),
                long,
                driver: driver.into(),
                device: device.map(Device::from),
            };
            test::run(wanted, guests)
        }
        Command::Bench {
            docs: true, guests, ..
        } => bench::write_docs(guests),
        Command::Bench { only, guests, .. } => bench::run(only.as_deref(), guests),
        Command::Coverage { only, guests } => coverage::run(only.as_deref(), guests),
        Command::Kunit { kernel, guests } => kunit::run(kernel, guests),
        Command::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds),
        Command::Deb => deb::run(),
        Command::Clippy => check::clippy(),
        Command::Fmt { check } => check::format(check),
    }?;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
