// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be typed.

use std::path::{Path, PathBuf};
use std::time::Duration;

use balloon_control::HintAction;
use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};
use clap_complete::Shell;

use crate::amount::{Amount, address};
use crate::failure;

/// Asks a guest for memory, and shows what it has given away
///
/// The guest's driver gives memory to the balloon, which inflates, and the host can use it for something
/// else. When the target is lowered the balloon deflates, and the guest has the memory back.
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
        value_name = "PATH",
        env = "BALLOON_SOCKET",
        default_value = "/run/vhost-user-balloon/balloon.sock",
        value_hint = ValueHint::FilePath
    )]
    socket: PathBuf,
    /// The VM of this name, with the socket that vhost-user-balloon@NAME.service has
    #[arg(long, global = true, value_name = "NAME")]
    vm: Option<String>,
    /// Print the daemon's answer as the JSON object that it is
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// The control socket.
    pub(crate) fn socket(&self) -> PathBuf {
        match &self.vm {
            Some(name) => Path::new("/run/vhost-user-balloon")
                .join(name)
                .join("control.sock"),
            None => self.socket.clone(),
        }
    }
}

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Show the balloon, the guest and what has been counted
    Info,
    /// Set how much memory the guest shall give away
    ///
    /// It is the balloon's size, not what remains to the guest. 0 deflates the balloon, and the guest has all of
    /// its memory.
    Set {
        /// A size such as 2GiB or 512M (units of 1024), or a percentage of the guest's memory such as 50%
        size: Amount,
        #[command(flatten)]
        wait: Patience,
    },
    /// Show the guest's memory statistics
    Stats {
        /// Ask the guest for new ones, instead of showing the last ones that it has sent
        #[arg(long)]
        fresh: bool,
        /// Show them again and again, with their changes, every 2 seconds or as many as named
        #[arg(
            long,
            value_name = "SECONDS",
            num_args = 0..=1,
            default_missing_value = "2",
            value_parser = clap::value_parser!(u32).range(1..)
        )]
        watch: Option<u32>,
    },
    /// Show balloons and what their guests do, live
    Top {
        /// The control sockets of the VMs, in place of that of --socket or --vm
        #[arg(value_hint = ValueHint::FilePath)]
        sockets: Vec<PathBuf>,
        /// The time between two looks
        #[arg(
            long,
            value_name = "SECONDS",
            default_value = "1",
            value_parser = clap::value_parser!(u32).range(1..)
        )]
        interval: u32,
    },
    /// Set how often the guest is asked for statistics
    Interval {
        /// The time between two samples; 0 stops asking
        seconds: u32,
    },
    /// Ask the guest which of its pages are free, so that a migration can skip them
    Hints {
        /// What to do
        action: Hints,
    },
    /// Write which of the guest's memory is unused into a file, for a copy that leaves it out
    ///
    /// The guest goes on, and may use that memory again at any time. A page can be left out of a copy only if it
    /// was not written since before this command was started: begin to log all writes first.
    Unused {
        /// Leave blocks out that are smaller than 2^N pages of 4 KiB
        #[arg(
            long,
            value_name = "N",
            default_value_t = 0,
            value_parser = clap::value_parser!(u8).range(..=51)
        )]
        min_order: u8,
        #[command(flatten)]
        place: Place,
        /// Where to write it, as a bitmap with a bit for each page of 4 KiB
        #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
        out: PathBuf,
        #[command(flatten)]
        limit: Limit,
    },
    /// Give unused memory of the guest back to the host, once
    ///
    /// The guest can use it again afterwards, and the balloon stays as it is.
    Reclaim {
        /// Leave blocks out that are smaller than 2^N pages of 4 KiB
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
    /// Have the guest drop its caches: those of files, and those of names and inodes
    DropCaches {
        /// Only the page cache, which has the contents of files
        #[arg(long)]
        pages: bool,
        /// Only the slab caches of names and inodes; with --pages, both
        #[arg(long)]
        slab: bool,
        #[command(flatten)]
        limit: Limit,
    },
    /// Print the daemon's numbers in Prometheus' text format
    Metrics,
    /// Print the completions for a shell
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the man page into a directory
    #[command(hide = true)]
    Man {
        /// Where to put it
        #[arg(value_hint = ValueHint::DirPath)]
        directory: PathBuf,
    },
}

/// Which part of the guest's memory is meant.
#[derive(Args)]
pub(crate) struct Place {
    /// Look from this guest-physical address on, such as 0x100000 or 4GiB
    #[arg(long, value_name = "ADDRESS", default_value = "0", value_parser = address)]
    pub(crate) start: u64,
    /// Look up to this address; 0 is the end of memory
    #[arg(long, value_name = "ADDRESS", default_value = "0", value_parser = address)]
    pub(crate) end: u64,
}

/// For how long to wait for the guest.
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
    /// Wait until the balloon has the size, and show it on its way
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

#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Hints {
    /// Ask for hints
    Start,
    /// Want no more hints; the guest does not use the hinted pages yet
    Stop,
    /// Let the guest use the hinted pages again
    Done,
}

impl Hints {
    /// What to say when it is done.
    pub(crate) fn done(self) -> &'static str {
        match self {
            Self::Start => "The guest is asked for hints.",
            Self::Stop => "The guest is told to stop hinting.",
            Self::Done => "The guest is told that it can use the hinted pages.",
        }
    }
}

impl From<Hints> for HintAction {
    fn from(hints: Hints) -> Self {
        match hints {
            Hints::Start => Self::Start,
            Hints::Stop => Self::Stop,
            Hints::Done => Self::Done,
        }
    }
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
