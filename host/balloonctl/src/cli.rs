// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueHint};
use clap_complete::Shell;

use crate::amount::{Amount, address};
use crate::failure;

/// Where help lists the options of all commands: after those of a command.
const COMMON: usize = 100;

/// Sets the balloon size of a VM, and shows its balloon and memory statistics
///
/// Inflating the balloon moves memory from the guest to the host. Deflating it returns the memory to
/// the guest. The guest's balloon driver does both when the target changes.
#[derive(Parser)]
#[command(
    name = "balloonctl",
    version,
    max_term_width = 100,
    after_help = failure::help(),
    subcommand_value_name = "COMMAND",
    subcommand_required = true,
    disable_help_subcommand = true
)]
pub(crate) struct Cli {
    /// The control socket of vhost-user-balloon
    #[arg(
        long,
        global = true,
        display_order = COMMON,
        value_name = "PATH",
        env = "BALLOON_SOCKET",
        value_hint = ValueHint::FilePath
    )]
    socket: Option<PathBuf>,
    /// The VM's name, as in vhost-user-balloon@NAME.service
    #[arg(long, global = true, display_order = COMMON, value_name = "NAME")]
    vm: Option<String>,
    /// Print raw JSON
    #[arg(long, global = true, display_order = COMMON)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// The control socket, if the command line or the environment names one.
    pub(crate) fn socket(&self) -> Option<PathBuf> {
        match &self.vm {
            Some(name) => Some(socket_of(name)),
            None => self.socket.clone(),
        }
    }
}

/// The control socket of vhost-user-balloon@NAME.service.
pub(crate) fn socket_of(vm: &str) -> PathBuf {
    Path::new("/run/vhost-user-balloon")
        .join(vm)
        .join("control.sock")
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Show the balloon, the guest and the counters
    Info,
    /// Set the target: the size of the balloon
    ///
    /// The target is the amount of memory that the guest gives up, not the amount that it keeps. 0 deflates
    /// the balloon.
    Set {
        #[command(flatten)]
        target: Target,
        #[command(flatten)]
        wait: Patience,
    },
    /// Show the guest's memory statistics
    Stats {
        /// Request a new sample from the guest
        #[arg(long)]
        fresh: bool,
        /// Show each new sample, with changes, and request one every SECONDS (2 if omitted)
        #[arg(
            long,
            value_name = "SECONDS",
            num_args = 0..=1,
            default_missing_value = "2",
            value_parser = clap::value_parser!(u32).range(1..=3600)
        )]
        watch: Option<u32>,
    },
    /// Show balloons and their guests, live
    Top {
        /// The control sockets of the VMs
        #[arg(value_hint = ValueHint::FilePath)]
        sockets: Vec<PathBuf>,
        /// The time over which rates are taken
        #[arg(
            long,
            value_name = "SECONDS",
            default_value = "1",
            value_parser = clap::value_parser!(u32).range(1..)
        )]
        interval: u32,
    },
    /// Set the interval of the statistics
    Interval {
        /// The time between two samples; 0 turns statistics off
        seconds: u32,
    },
    /// Stop returning memory to the host, for a limited time
    ///
    /// Use it while guest memory must stay in place: while a device pins it, or during a snapshot. The guest
    /// can still inflate. Memory that it inflates meanwhile stays with the VM until it is inflated again.
    Inhibit {
        /// The time limit, up to a day; repeat the command before it ends to extend it. A shorter time than the
        /// remaining one changes nothing
        #[arg(
            long = "for",
            value_name = "SECONDS",
            default_value = "600",
            value_parser = clap::value_parser!(u32).range(1..=86_400)
        )]
        seconds: u32,
        /// A name, such as that of a backup program; each name has a time limit of its own
        #[arg(long, value_name = "NAME")]
        owner: Option<String>,
    },
    /// End inhibit: return memory to the host again
    ///
    /// Without a name this ends the inhibit commands of all clients.
    Resume {
        /// End the inhibit command with this name only
        #[arg(long, value_name = "NAME")]
        owner: Option<String>,
    },
    /// Control free page hinting, for migrations that skip free pages
    Hints {
        #[command(subcommand)]
        action: Hints,
    },
    /// Write a bitmap of unused guest pages, for tools that copy guest memory
    ///
    /// The guest keeps running and may use these pages again at any time. A copy may leave out a page only
    /// if it was not written since before this command started. Start a log of all writes first.
    Unused {
        /// Skip blocks smaller than 2^N pages of 4 KiB
        #[arg(
            long,
            value_name = "N",
            default_value_t = 0,
            value_parser = clap::value_parser!(u8).range(..=51)
        )]
        min_order: u8,
        #[command(flatten)]
        place: Place,
        /// The file to write, with one bit for each page of 4 KiB
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        out: PathBuf,
        #[command(flatten)]
        limit: Limit,
    },
    /// Return the guest's unused memory to the host once
    ///
    /// The guest can use that memory again afterwards. The balloon keeps its size.
    Reclaim {
        /// Skip blocks smaller than 2^N pages of 4 KiB
        #[arg(
            long,
            value_name = "N",
            default_value_t = 9,
            value_parser = clap::value_parser!(u8).range(..=51)
        )]
        min_order: u8,
        #[command(flatten)]
        place: Place,
        #[command(flatten)]
        limit: Limit,
    },
    /// Make the guest drop its page cache and slab caches
    DropCaches {
        /// Drop the page cache (file contents) only
        #[arg(long)]
        pages: bool,
        /// Drop the slab caches (names and inodes) only; with --pages, both
        #[arg(long)]
        slab: bool,
        #[command(flatten)]
        limit: Limit,
    },
    /// Print metrics in Prometheus' text format
    Metrics,
    /// Run a command of balloon-manager, which moves memory between VMs
    ///
    /// top shows the host and its VMs, `explain VM` shows why a VM has the memory that it has, `reserve SIZE`
    /// reserves memory for a VM that is about to start, and `release ID` ends that. See balloon-manager(1).
    #[command(disable_help_flag = true)]
    Auto {
        /// The command of balloon-manager, and its options
        #[arg(
            required = true,
            trailing_var_arg = true,
            allow_hyphen_values = true,
            value_name = "ARGS"
        )]
        arguments: Vec<OsString>,
    },
    /// Print completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the man page into a directory
    #[command(hide = true)]
    Man {
        /// The directory
        #[arg(value_hint = ValueHint::DirPath)]
        directory: PathBuf,
    },
}

/// A target.
#[derive(Args)]
pub(crate) struct Target {
    /// A size such as 2GiB or 512M (units of 1024), or a percentage of the guest's memory such as 50%
    pub(crate) size: Amount,
    /// Change nothing, with exit code 7, unless this is the target now
    #[arg(long, value_name = "SIZE")]
    pub(crate) expect: Option<Amount>,
    /// How long the target stays; repeat the command before that to extend it
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = clap::value_parser!(u32).range(1..=86_400)
    )]
    pub(crate) lease: Option<u32>,
    /// The target after the lease; the target before it if omitted
    #[arg(long, value_name = "SIZE", requires = "lease")]
    pub(crate) fallback: Option<Amount>,
    /// By how much the daemon may lower the target by itself, once, when the guest notifies it that memory is short
    #[arg(long, value_name = "SIZE", requires = "lease")]
    pub(crate) release: Option<Amount>,
    /// The name of the program that takes the lease, for `info`
    #[arg(long, value_name = "NAME", requires = "lease")]
    pub(crate) owner: Option<String>,
}

impl Target {
    /// Whether it depends on how much memory the guest has.
    pub(crate) fn is_relative(&self) -> bool {
        let sizes = [Some(self.size), self.expect, self.fallback, self.release];
        sizes.into_iter().flatten().any(Amount::is_relative)
    }
}

/// A part of the guest's memory.
#[derive(Args)]
pub(crate) struct Place {
    /// The first guest-physical address, such as 0x100000 or 4GiB
    #[arg(long, value_name = "ADDRESS", default_value = "0", value_parser = address)]
    pub(crate) start: u64,
    /// The end address; 0 is the end of memory
    #[arg(long, value_name = "ADDRESS", default_value = "0", value_parser = address)]
    pub(crate) end: u64,
}

/// How long to wait for the guest.
#[derive(Args)]
pub(crate) struct Limit {
    /// How long to wait for the guest
    #[arg(
        long,
        value_name = "SECONDS",
        default_value = "300",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    timeout: u32,
}

impl Limit {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.into())
    }
}

/// Whether to wait for the guest, and for how long.
#[derive(Args)]
pub(crate) struct Patience {
    /// Wait until the balloon has this size, and show its progress
    #[arg(long)]
    pub(crate) wait: bool,
    /// How long to wait
    #[arg(
        long,
        value_name = "SECONDS",
        requires = "wait",
        default_value = "300",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    timeout: u32,
}

impl Patience {
    pub(crate) fn timeout(&self) -> Duration {
        Duration::from_secs(self.timeout.into())
    }
}

/// A command of free page hinting.
#[derive(Subcommand)]
pub(crate) enum Hints {
    /// Request hints
    ///
    /// With --out it waits until the guest has ended its hints, and writes a bitmap of the hinted pages. A copy
    /// may leave them out under the conditions of the command unused.
    #[command(mut_arg("timeout", |timeout| timeout.requires("out")))]
    Start {
        /// The file to write, with one bit for each page of 4 KiB
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        out: Option<PathBuf>,
        #[command(flatten)]
        limit: Limit,
    },
    /// Stop hinting; the guest keeps the hinted pages out of use
    Stop,
    /// Return the hinted pages to the guest
    Done,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }
}
