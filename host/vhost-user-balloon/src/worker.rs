// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The worker: the process that implements the device. It serves the front ends of its supervisor, one
//! after the other.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use balloon_control::Server;
use log::{debug, info, warn};
use vhost_user_backend::VhostUserDaemon;

use crate::device::Device;
use crate::device::state::State;
use crate::options::{Options, Sandbox};
use crate::vhost_user::channel::{Channel, SERVE, START, TRIAL, VERSION};

pub mod sandbox;

/// Serves front ends until the supervisor closes the channel, which is the standard input.
///
/// # Errors
///
/// The supervisor is another program, the state file is invalid, or the system lacks a resource.
pub fn run(options: &Options) -> Result<()> {
    ensure!(
        options.worker == Some(VERSION),
        "a worker of version {VERSION} cannot serve a supervisor of another version"
    );
    let channel = Channel::new(io::stdin().as_fd().try_clone_to_owned()?);
    let start = channel.receive().context("waiting for the supervisor")?;
    ensure!(
        start.request() == START,
        "the supervisor does not start this worker"
    );
    // The state file belongs to the worker that runs meanwhile.
    let path = options.state.as_ref().filter(|_| start.body() != TRIAL);
    let mut files = start.into_parts().1.into_iter();
    let kept = files.next().map(File::from);
    let control = files.next().map(UnixListener::from);

    let interval = options.stats_interval;
    let state = match path {
        Some(path) => State::load(path, interval)?,
        None => State::new(interval),
    };
    let path = path.cloned();
    let device = Device::new(options.settings(), state, path, channel.try_clone()?, kept)?;
    let device = Arc::new(device);
    // Before there is another thread.
    match options.sandbox {
        Sandbox::Full => sandbox::enter(),
        Sandbox::None => info!("the worker is not confined (--sandbox none)"),
    }
    let leases = Arc::clone(&device);
    thread::Builder::new()
        .name("leases".to_owned())
        .spawn(move || leases.watch_leases())?;
    // A client that has an answer may take the daemon for started.
    channel.ready();
    let _control = control
        .map(|listener| Server::start(listener, Arc::clone(&device) as _))
        .transpose()?;
    while let Ok(message) = channel.receive() {
        let request = message.request();
        let (body, mut files) = message.into_parts();
        let (SERVE, Some(socket)) = (request, files.pop()) else {
            warn!("the supervisor has sent an unknown message");
            continue;
        };
        channel.set_vmm(&body);
        serve(&device, socket.into())?;
    }
    debug!("the supervisor ends this worker");
    Ok(())
}

/// Serves the front end that connects to this socket.
fn serve(device: &Arc<Device>, socket: UnixListener) -> Result<()> {
    let name = "vhost-user".to_owned();
    let mut library = VhostUserDaemon::new(name, Arc::clone(device), device.memory())
        .map_err(|error| anyhow!("{error}"))?;
    library
        .start(&mut socket.into())
        .map_err(|error| anyhow!("cannot serve a VMM: {error}"))?;
    for handler in library.get_epoll_handlers() {
        device.connect(&handler)?;
    }
    if let Err(error) = library.wait() {
        debug!("the connection has ended: {error}");
    }
    // This waits until all messages that were taken from the queues are completed.
    drop(library);
    device.disconnect();
    Ok(())
}
