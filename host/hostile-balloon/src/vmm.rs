// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The balloon devices of other VMMs: what each offers and does, and what it accepts of its driver.
//!
//! Such a device follows the protocol. It reads orders from its standard input, one a line, and answers each with what
//! it has seen of its driver. It serves queues only when the driver notifies it, and discards memory at once, since the
//! VMMs do.

use std::io;
use std::path::Path;
use std::process;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result};
use clap::ValueEnum;
use fastrand::Rng;
use log::{error, info};

mod chain;
mod cloud_hypervisor;
mod crosvm;
mod firecracker;
mod hints;
mod machine;
mod rules;

use cloud_hypervisor::CloudHypervisor;
use crosvm::Crosvm;
use firecracker::Firecracker;
use machine::{Machine, Order};
use rules::Rules;

use crate::device::{Device, Transport, Watch};
use crate::pci::Pci;
use crate::pci_space::Shape;

/// The length of the configuration space that each of these VMMs declares, in bytes. Their devices use only its
/// beginning.
const CONFIG: usize = 0x1000;

/// A VMM.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Vmm {
    /// Firecracker.
    Firecracker,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// crosvm.
    Crosvm,
}

impl Vmm {
    fn rules(self) -> Box<dyn Rules> {
        match self {
            Self::Firecracker => Box::new(Firecracker),
            Self::CloudHypervisor => Box::new(CloudHypervisor),
            Self::Crosvm => Box::new(Crosvm),
        }
    }
}

/// Is the device of `vmm` for the front end that connects to `socket`, until it disconnects.
pub(crate) fn serve(vmm: Vmm, socket: &Path) -> Result<()> {
    let rules = vmm.rules();
    let profile = rules.profile();
    info!("{profile:x?}");
    let shape = Shape {
        flaw: None,
        config_size: CONFIG,
        sizes: profile.queues.iter().map(|(_, size)| *size).collect(),
    };
    let device = Arc::new(Device::new(profile.features, Rng::new()));
    let machine = Arc::new(Machine::new(rules, Arc::clone(&device)));
    let watch: Arc<dyn Watch> = machine.clone();
    let transport: Arc<dyn Transport> = Arc::new(Pci::new(device, shape, Some(watch)));
    let ordered = Arc::clone(&transport);
    let begin = move || {
        thread::spawn(move || {
            if let Err(error) = obey(&machine, &*ordered) {
                error!("{error:#}");
                process::exit(1);
            }
        });
    };
    transport.serve(socket, &|| println!("{{}}"), Box::new(begin))
}

/// Follows the orders on standard input.
fn obey(machine: &Machine, transport: &dyn Transport) -> Result<()> {
    for line in io::stdin().lines() {
        let line = line.context("reading an order")?;
        let order: Order = serde_json::from_str(&line).with_context(|| line.clone())?;
        if !matches!(order, Order::Show) {
            info!("{order:?}");
        }
        println!(
            "{}",
            serde_json::to_string(&machine.follow(transport, order))?
        );
    }
    Ok(())
}
