// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's process: its command line, its log and its signals.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::panic;
use std::path::Path;
use std::process::{self, ExitCode};
use std::thread;

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, Parser};
use clap_mangen::Man;
use log::{LevelFilter, error, info};
use nix::sys::prctl::{set_dumpable, set_no_new_privs, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::getppid;
use vhost_user_balloon::channel::Channel;
use vhost_user_balloon::daemon::Daemon;
use vhost_user_balloon::keeper;
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
        None if options.worker.is_some() => work(&options),
        None => set_no_new_privs()
            .map_err(Into::into)
            .and_then(|()| keeper::run(&options)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Is the child that has the device.
fn work(options: &Options) -> Result<()> {
    // No front end can reach this process without the one that has started it, which may have ended before
    // the kernel was asked for the signal.
    set_pdeathsig(Signal::SIGTERM)?;
    ensure!(
        options
            .parent
            .is_none_or(|parent| getppid().as_raw() == parent),
        "the process that has started this one has ended"
    );
    // A core dump would have all of the guest's memory in it, and each hole in that memory would be filled
    // to be written.
    set_dumpable(false)?;
    // A device without the thread that serves it helps nobody. Another process takes it up.
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        default(info);
        process::abort();
    }));
    // The threads to come inherit this, so the signals are for the one that waits for them.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    signals.thread_block()?;

    // The standard input is the other process's end of a stream.
    let channel = Channel::new(io::stdin().as_fd().try_clone_to_owned()?);
    // The standard output is a file in memory that other processes with the device had before.
    let kept = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let kept = Some(kept).filter(|kept| kept.metadata().is_ok_and(|metadata| metadata.is_file()));
    let daemon = Daemon::new(options, channel, kept)?;
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
