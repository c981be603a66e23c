// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A balloon device that does to its driver what no device should, for tests.
//!
//! It is one device for one front end, and all that it does comes from a seed: [`plan`] what it offers, [`acts`]
//! what it does. What it writes to its standard output is for the test: first, what QEMU has to know of the device,
//! then a line when it may be unplugged. What it does is in its log. When the guest takes part is up to the
//! guest, so a seed that is run again does the same, but not at the same moments of the guest's life.

use std::io::Write;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use fastrand::Rng;
use log::{LevelFilter, info};
use vhost_user_balloon::features::Feature;

mod acts;
mod device;
mod mood;
mod pci;
mod pci_space;
mod plan;
mod relay;
mod ring;
mod vhost_user;

use acts::Actor;
use device::{Device, Transport};
use pci::Pci;
use plan::{End, Plan};
use vhost_user::VhostUser;

/// How long the guest may take to find its device. Some it never takes up, since they lack a queue.
const PATIENCE: Duration = Duration::from_secs(2);

/// A balloon device that does to its driver what no device should.
#[derive(Parser)]
struct Options {
    /// Where the front end connects
    #[arg(long)]
    socket: PathBuf,
    /// Be a whole PCI device, for vfio-user, and not only the back end of one, for vhost-user
    #[arg(long)]
    pci: bool,
    /// What everything comes from
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Only ask for memory and hints, and be like that from the beginning
    #[arg(long)]
    only: Option<End>,
    /// Offer nothing but that, with --only [default: all but page sets]
    #[arg(long, requires = "only")]
    offer: Vec<Feature>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    log_as(options.seed);
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
        Arc::new(Pci::new(Arc::clone(&device), &plan))
    } else {
        Arc::new(VhostUser::new(Arc::clone(&device)))
    };
    let actors = Arc::clone(&transport);
    let begin = move || act(device, actors, &plan, random, options.only.is_some());
    let ended = transport.serve(&options.socket, &announce, Box::new(begin));
    info!("the front end is gone: {ended:?}");
    // With all threads, which have nobody to serve any more.
    process::exit(0)
}

/// Has the device do what is planned, in a thread of its own.
fn act(device: Arc<Device>, transport: Arc<dyn Transport>, plan: &Plan, random: Rng, wants: bool) {
    let (time, end) = (plan.time, plan.end);
    thread::spawn(move || {
        let mut actor = Actor::new(&device, &*transport, random);
        if wants {
            actor.want();
        }
        if actor.wait_driver(PATIENCE) {
            actor.act(time);
            actor.decide(end);
        } else {
            info!("no driver");
        }
        println!("over");
        actor.end(end);
    });
}

/// Has each line of the log say which seed it is of, and when that was.
fn log_as(seed: u64) {
    let start = Instant::now();
    env_logger::Builder::new()
        .filter_level(LevelFilter::Info)
        // It complains of what the device itself has done to the rings.
        .filter_module("virtio_queue", LevelFilter::Off)
        .format(move |line, record| {
            let time = start.elapsed().as_millis();
            writeln!(line, "seed {seed}, {time} ms: {}", record.args())
        })
        .init();
}
