// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A balloon device that violates the protocol, for tests of its driver, or one that is as strict as another VMM's
//! ([`vmm`]).
//!
//! It is one device for one front end. A seed determines its features ([`plan`]) and its actions ([`acts`]). Its
//! standard output is for the test: first QEMU's options for the device, then a line when it may be unplugged. A line
//! of the test on its standard input ends the wait for a driver, and the time in which some devices behave well. It
//! logs its actions. The timing depends on the guest: the same seed repeats the actions, but not at the same
//! moments.

use std::io::Write;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use fastrand::Rng;
use log::{LevelFilter, info};
use vhost_user_balloon::virtio::features::Feature;

mod acts;
mod device;
mod mood;
mod pci;
mod pci_space;
mod plan;
mod relay;
mod ring;
mod vhost_user;
mod vmm;

use acts::{Actor, NO_DRIVER, OVER};
use device::{Device, Transport};
use pci::Pci;
use pci_space::Shape;
use plan::{End, Plan};
use vhost_user::VhostUser;
use vmm::Vmm;

/// A balloon device that violates the protocol, for tests of its driver.
#[derive(Parser)]
struct Options {
    /// The socket for the front end
    #[arg(long)]
    socket: PathBuf,
    /// Be a whole PCI device over vfio-user, instead of a vhost-user back end
    #[arg(long)]
    pci: bool,
    /// Be the device of this VMM, as a whole PCI device, and end at the first thing that the VMM does not accept
    #[arg(long, conflicts_with_all = ["only", "offer"])]
    vmm: Option<Vmm>,
    /// Seed of all random numbers
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Only request memory and hints, and behave in this way from the start
    #[arg(long)]
    only: Option<End>,
    /// Offer only these features, with --only [default: all but page sets]
    #[arg(long, requires = "only")]
    offer: Vec<Feature>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    log_as(options.seed);
    if let Some(vmm) = options.vmm {
        let ended = vmm::serve(vmm, &options.socket);
        info!("the front end is gone: {ended:?}");
        process::exit(0);
    }
    let mut random = Rng::with_seed(options.seed);
    let plan = match options.only {
        Some(end) => Plan::only(end, &options.offer),
        None => Plan::new(&mut random, options.pci),
    };
    info!("{plan:x?}");

    let device = Arc::new(Device::new(plan.features, random.fork()));
    let properties = serde_json::to_string(&plan.properties)?;
    let announce = || println!("{properties}");
    let transport: Arc<dyn Transport> = if options.pci {
        Arc::new(Pci::new(Arc::clone(&device), Shape::from(&plan), None))
    } else {
        Arc::new(VhostUser::new(Arc::clone(&device)))
    };
    let actors = Arc::clone(&transport);
    let begin = move || act(device, actors, &plan, random, options.only.is_some());
    let ended = transport.serve(&options.socket, &announce, Box::new(begin));
    info!("the front end is gone: {ended:?}");
    // With all threads, which have no front end any more.
    process::exit(0)
}

/// Runs the device's actions in a thread of its own.
fn act(device: Arc<Device>, transport: Arc<dyn Transport>, plan: &Plan, random: Rng, wants: bool) {
    let (time, end) = (plan.time, plan.end);
    thread::spawn(move || {
        let mut actor = Actor::new(&device, &*transport, random);
        if wants {
            actor.want();
        }
        let has_driver = actor.wait_driver();
        if has_driver {
            actor.act(time);
            actor.decide(end);
        }
        let line = if has_driver { OVER } else { NO_DRIVER };
        info!("{line}");
        println!("{line}");
        actor.end(end);
    });
}

/// Adds the seed and the time to each line of the log.
fn log_as(seed: u64) {
    let start = Instant::now();
    env_logger::Builder::new()
        .filter_level(LevelFilter::Info)
        // The library logs errors about the device's own changes to the rings.
        .filter_module("virtio_queue", LevelFilter::Off)
        .format(move |line, record| {
            let time = start.elapsed().as_millis();
            writeln!(line, "seed {seed}, {time} ms: {}", record.args())
        })
        .init();
}
