// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What goes wrong, what to do about it, and the exit codes.

use std::fmt::Write;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use balloon_control::{ClientError, ErrorKind, Shortfall};
use console::style;
use indicatif::HumanBytes;

/// The exit codes, for the help and the man page.
pub(crate) const EXIT_CODES: [(u8, &str); 7] = [
    (0, "It is done."),
    (1, "It failed."),
    (2, "The command line is wrong."),
    (3, "The daemon cannot be reached, or does not answer."),
    (4, "No guest is connected, or no driver works in it."),
    (5, "The size is out of range."),
    (6, "The guest did not do it in time."),
];

/// The exit codes as the end of the help.
pub(crate) fn help() -> String {
    let mut text = style("Exit codes:").bold().underlined().to_string();
    for (code, meaning) in EXIT_CODES {
        // A string takes everything.
        let _ = write!(text, "\n  {code}  {meaning}");
    }
    text
}

/// What goes wrong.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The daemon refuses it, or cannot be reached.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A percentage of what?
    #[error("it is not known how much memory the guest has")]
    MemoryUnknown,
    /// The VMM goes away while the balloon is waited for.
    #[error("the VMM has disconnected")]
    Disconnected,
    /// The driver goes away, or there is none, while the balloon is waited for.
    #[error("no balloon driver works in the guest")]
    NoDriver,
    /// Another target was set while the balloon is waited for.
    #[error("the target was set to {} meanwhile", HumanBytes(*.0))]
    Retargeted(u64),
    /// The guest will not give memory away.
    #[error("{}, and has given away {}", Shortfall::Excluded, HumanBytes(*.0))]
    Excluded(u64),
    /// The guest does not reach the target in time.
    #[error(
        "the guest has given away {} of {} after {} s{}",
        HumanBytes(*size), HumanBytes(*target), waited.as_secs(),
        reason.map(|reason| format!(": {reason}")).unwrap_or_default()
    )]
    Late {
        /// In bytes.
        size: u64,
        /// In bytes.
        target: u64,
        waited: Duration,
        /// What the guest says.
        reason: Option<Shortfall>,
    },
    /// Nothing can be printed.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// The man page cannot be written.
    #[error("cannot write {path}: {source}", path = .0.display(), source = .1)]
    ManPage(PathBuf, io::Error),
}

impl Failure {
    /// What to do about it.
    fn advice(&self) -> String {
        match self {
            Self::Client(error) => return error.advice(),
            Self::MemoryUnknown => "start the guest, or name a size such as 2GiB",
            Self::Disconnected => "see whether the guest still runs; the target is kept for it",
            Self::NoDriver => "load the guest's balloon driver; the target is kept for it",
            Self::Retargeted(_) => "see who else sets it; this command does not fight for it",
            Self::Excluded(_) => "let the guest's administrator allow its driver to inflate",
            Self::Late { reason: None, .. } => {
                "see the guest's log; it goes on, and balloonctl info shows how far it is"
            }
            Self::Late { .. } => {
                "set a smaller size, or free memory in the guest; it goes on by itself"
            }
            Self::Output(_) => "see that there is room where the output goes",
            Self::ManPage(..) => "name a directory that is there and can be written",
        }
        .to_owned()
    }

    /// One of [`EXIT_CODES`].
    fn code(&self) -> u8 {
        match self {
            Self::Client(error) => match error {
                ClientError::Refused(error) => match error.kind {
                    ErrorKind::NoGuest | ErrorKind::NoDriver => 4,
                    ErrorKind::OutOfRange => 5,
                    ErrorKind::Timeout => 6,
                    ErrorKind::Unsupported | ErrorKind::BadRequest | ErrorKind::Failed => 1,
                },
                ClientError::Garbled(_) => 1,
                ClientError::Missing(_)
                | ClientError::Stale(_)
                | ClientError::Denied { .. }
                | ClientError::Connect { .. }
                | ClientError::Silent(_)
                | ClientError::Gone => 3,
            },
            Self::MemoryUnknown | Self::Disconnected | Self::NoDriver => 4,
            Self::Late { .. } => 6,
            Self::Retargeted(_) | Self::Excluded(_) | Self::Output(_) | Self::ManPage(..) => 1,
        }
    }

    /// Says what is wrong and what to do about it, and returns the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        // Whoever closes a pipe has seen enough.
        if matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        let error = style("error:").for_stderr().red().bold();
        let help = style("help:").for_stderr().green().bold();
        eprintln!("{error} {self}\n{help} {}", self.advice());
        ExitCode::from(self.code())
    }
}
