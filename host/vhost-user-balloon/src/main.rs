// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's process: its command line, its log and its signals.

use std::fs;
use std::panic;
use std::path::Path;
use std::process::{self, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{CommandFactory, Parser};
use log::{LevelFilter, error, warn};
use man_page::Page;
use nix::sys::prctl::{set_dumpable, set_name, set_no_new_privs, set_pdeathsig};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::getppid;
use vhost_user_balloon::options::Options;
use vhost_user_balloon::supervisor;
use vhost_user_balloon::worker::{self, sandbox};

/// The files of the daemon, with their use.
const FILES: [(&str, &str); 3] = [
    (
        "/run/vhost-user-balloon/NAME/",
        "The sockets of vhost-user-balloon@NAME.service: vmm.sock for the VMM, and control.sock for balloonctl.",
    ),
    (
        "/etc/default/vhost-user-balloon, /etc/vhost-user-balloon/NAME.conf",
        "OPTIONS= of the service, for all VMs and for one.",
    ),
    (
        "/var/lib/vhost-user-balloon/NAME/state",
        "The --state of the service.",
    ),
];

const EXIT_CODES: [(&str, &str); 3] = [
    ("0", "SIGTERM or SIGINT has ended the daemon."),
    (
        "1",
        "The daemon cannot start, or cannot continue. The log has the error.",
    ),
    ("2", "The command line is wrong."),
];

const EXAMPLES: [(&str, &str); 3] = [
    (
        "Serve a VM. QEMU must run as the same user, or as root:",
        "mkdir -p /run/vhost-user-balloon/vm1\n\
         vhost-user-balloon --extensions \\\n    \
         --socket /run/vhost-user-balloon/vm1/vmm.sock \\\n    \
         --control /run/vhost-user-balloon/vm1/control.sock",
    ),
    (
        "Do the same as a service:",
        "systemctl start vhost-user-balloon@vm1",
    ),
    ("Ask the guest for 2 GiB:", "balloonctl --vm vm1 set 2GiB"),
];

/// What QEMU's schema `vhost-user.json` has for a balloon.
const CAPABILITIES: &str = r#"{"type": "balloon"}"#;

fn main() -> ExitCode {
    let options = Options::parse();
    env_logger::Builder::new()
        .filter_level(options.log)
        // A guest can make this library log without end. The daemon counts the same errors, and
        // limits its log.
        .filter_module("virtio_queue", LevelFilter::Off)
        .format_timestamp(None)
        .init();
    let result = match &options.man {
        Some(directory) => write_man_page(directory),
        None if options.print_capabilities => {
            println!("{CAPABILITIES}");
            Ok(())
        }
        None if options.worker.is_some() => work(&options),
        None => supervise(&options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the worker.
fn work(options: &Options) -> Result<()> {
    // A worker whose supervisor has ended sees the end of its channel, unless it hangs. The supervisor may
    // have ended before the worker requested the signal.
    set_pdeathsig(Signal::SIGKILL)?;
    ensure!(
        options
            .parent
            .is_none_or(|parent| getppid().as_raw() == parent),
        "the supervisor of this worker has ended"
    );
    sandbox::prepare();
    if let Err(error) = offer_to_oom_killer() {
        warn!(
            "cannot raise the worker's oom_score_adj: {error}; an OOM kill may end the supervisor first"
        );
    }
    // A core dump would contain all of the guest's memory, and writing it would fill each hole in that
    // memory.
    set_dumpable(false)?;
    set_name(c"balloon-worker")?;
    // A device without its thread is useless. Another worker continues it.
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        default(info);
        process::abort();
    }));
    // Only the supervisor handles an interrupt from the terminal.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.thread_block()?;
    worker::run(options)
}

/// Makes the kernel's OOM killer choose the worker rather than the supervisor, which replaces a worker. Call this before
/// [`set_dumpable`], after which a process cannot write its own score.
fn offer_to_oom_killer() -> Result<()> {
    /// Thousandths of the memory that the kernel counts in addition to the worker's own.
    const MORE: i32 = 100;
    const HIGHEST: i32 = 1000;
    const FILE: &str = "/proc/self/oom_score_adj";
    let inherited: i32 = fs::read_to_string(FILE)?.trim().parse()?;
    fs::write(FILE, (inherited + MORE).min(HIGHEST).to_string())?;
    Ok(())
}

/// Runs the supervisor.
fn supervise(options: &Options) -> Result<()> {
    set_no_new_privs()?;
    // Its path may be that of a file descriptor.
    set_name(c"vhost-user-ball")?;
    supervisor::run(options)
}

fn write_man_page(directory: &Path) -> Result<()> {
    let mut page = Page::new(Options::command(), 8);
    page.terms("EXIT STATUS", EXIT_CODES);
    page.terms("FILES", FILES);
    page.examples(&EXAMPLES);
    page.see_also(&[("balloonctl", 1), ("balloon-manager", 1)]);
    page.write(directory)
        .with_context(|| format!("writing {}", page.path(directory).display()))
}
