// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's process: its command line, its log and its signals.

use std::fs::File;
use std::path::Path;
use std::process::ExitCode;
use std::thread;

use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};
use clap_mangen::Man;
use log::{LevelFilter, error, info};
use nix::sys::prctl::set_no_new_privs;
use nix::sys::signal::{SigSet, Signal};
use vhost_user_balloon::daemon::Daemon;
use vhost_user_balloon::options::Options;

fn main() -> ExitCode {
    let options = Options::parse();
    env_logger::Builder::new()
        .filter_level(options.log)
        // A guest can have this library complain without end. The daemon counts the same, and logs it
        // now and then.
        .filter_module("virtio_queue", LevelFilter::Off)
        .format_timestamp(None)
        .init();
    let result = match &options.man {
        Some(directory) => write_man_page(directory),
        None => run(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    set_no_new_privs()?;
    // The threads to come inherit this, so the signals are for the one that waits for them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;

    let daemon = Daemon::new(options)?;
    let stop = daemon.stop();
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            match signals.wait() {
                Ok(signal) => info!("ending on {signal}"),
                Err(error) => error!("cannot wait for signals: {error}"),
            }
            stop.stop();
        })?;
    daemon.run()
}

fn write_man_page(directory: &Path) -> Result<()> {
    let path = directory.join("vhost-user-balloon.8");
    let mut file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
    Man::new(Options::command())
        .section("8")
        .render(&mut file)
        .with_context(|| format!("writing {}", path.display()))
}
