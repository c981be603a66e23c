// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A balloon device that does to its driver what no device should, for tests.
//!
//! It is one device for one front end, and all that it does comes from a seed: [`plan`] what it offers, [`acts`]
//! what it does. What it writes to its standard output is for the test: first, what QEMU has to know of the device,
//! then a line when it may be unplugged. What it does is in its log. When the guest takes part is up to the
//! guest, so a seed that is run again does the same, but not at the same moments of the guest's life.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use balloon_control::listen;
use clap::Parser;
use fastrand::Rng;
use log::{LevelFilter, info};
use vhost_user_backend::VhostUserDaemon;

mod acts;
mod device;
mod plan;
mod relay;
mod ring;

use acts::Actor;
use device::Device;
use plan::{End, Plan};
use relay::Channel;

/// How long the guest may take to find its device. Some it never takes up, since they lack a queue.
const PATIENCE: Duration = Duration::from_secs(2);

/// A balloon device that does to its driver what no device should.
#[derive(Parser)]
struct Options {
    /// Where the front end connects
    #[arg(long)]
    socket: PathBuf,
    /// What everything comes from
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Only ask for memory and hints, and be like that from the beginning
    #[arg(long)]
    only: Option<End>,
    /// Offer no free page reporting, with --only
    #[arg(long)]
    no_reports: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    log_as(options.seed);
    let mut random = Rng::with_seed(options.seed);
    let plan = match options.only {
        Some(end) => Plan::only(end, !options.no_reports),
        None => Plan::new(&mut random),
    };
    info!("{plan:x?}");

    let channel = Channel::default();
    let device = Arc::new(Device::new(plan.features, random.fork()));
    let (outer, outer_file) = listen(&options.socket)?;
    let inner_path = options.socket.with_extension("library");
    let (inner, inner_file) = listen(&inner_path)?;
    println!("{}", serde_json::to_string(&plan.properties)?);

    let (front, _) = outer.accept()?;
    let name = "vhost-user".to_owned();
    let mut library = VhostUserDaemon::new(name, Arc::clone(&device), device.memory())
        .map_err(|error| anyhow!("{error}"))?;
    relay::start(front, UnixStream::connect(&inner_path)?, channel.clone())?;
    library
        .start(&mut inner.into())
        .map_err(|error| anyhow!("{error}"))?;
    outer_file.remove();
    inner_file.remove();

    thread::spawn(move || {
        let mut actor = Actor::new(&device, channel, random);
        if options.only.is_some() {
            actor.want();
        }
        if actor.wait_driver(PATIENCE) {
            actor.act(plan.time);
            actor.decide(plan.end);
        } else {
            info!("no driver");
        }
        println!("over");
        actor.end(plan.end);
    });
    let ended = library.wait();
    info!("the front end is gone: {ended:?}");
    // With all threads, which have nobody to serve any more.
    process::exit(0)
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
