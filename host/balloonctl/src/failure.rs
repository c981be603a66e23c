// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What goes wrong, what to do about it, and the exit codes.

use std::fmt::Write;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use balloon_control::{ClientError, ErrorKind, RequestStatus, Shortfall};
use console::style;
use indicatif::HumanBytes;

/// The exit codes, for the help and the man page.
pub(crate) const EXIT_CODES: [(u8, &str); 8] = [
    (0, "It is done."),
    (1, "It failed."),
    (2, "The command line is wrong."),
    (3, "The daemon cannot be reached, or does not answer."),
    (4, "No guest is connected, or no driver works in it."),
    (5, "The size is out of range."),
    (6, "The guest did not do it in time."),
    (130, "It was interrupted, and the guest is told."),
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

/// How an answer ended, in words.
fn end(status: RequestStatus) -> &'static str {
    match status {
        RequestStatus::Complete => "the guest is done",
        RequestStatus::Waiting | RequestStatus::Open => "the guest is not done",
        RequestStatus::Aborted => "the guest had to stop before it was done",
        RequestStatus::Cancelled => "somebody else told the guest to stop",
        RequestStatus::Unsupported => "the guest's driver does not know this request",
        RequestStatus::Malformed => "the guest's driver does not take this request",
        RequestStatus::UnknownId => "the guest's driver has lost this request",
        RequestStatus::Reset => "the guest, its driver or the VMM went away",
    }
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
    /// The guest does not end an answer in time.
    #[error(
        "{} within {} s",
        if *seen { "the guest does not end its answer" } else { "the guest does not take the request" },
        waited.as_secs()
    )]
    Unanswered {
        /// Whether the guest has got the request.
        seen: bool,
        waited: Duration,
    },
    /// The guest has ended an answer otherwise than with all that it was asked for.
    #[error("{}", end(*.0))]
    Ended(RequestStatus),
    /// Somebody does not want to wait any more.
    #[error("interrupted")]
    Interrupted,
    /// Nothing can be printed.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// Only a terminal can be drawn on.
    #[error("the output is not a terminal")]
    NoTerminal,
    /// A file cannot be written.
    #[error("cannot write {path}: {source}", path = .0.display(), source = .1)]
    File(PathBuf, io::Error),
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
            Self::Unanswered { seen: true, .. } => {
                "give it more time with --timeout, or see the guest's log; the guest is told to stop"
            }
            Self::Unanswered { seen: false, .. } => {
                "see that the guest is not paused, and look for its driver in the guest's log"
            }
            Self::Ended(RequestStatus::Reset) => "wait until the guest runs, and try again",
            Self::Ended(RequestStatus::Unsupported | RequestStatus::Malformed) => {
                "use a driver in the guest that knows this request, such as virtio_balloon_rs"
            }
            Self::Ended(_) => "see the guest's log, and try again",
            Self::Interrupted => "the guest is told to stop; what it has done stays done",
            Self::Output(_) => "see that there is room where the output goes",
            Self::NoTerminal => "use balloonctl info --json or balloonctl metrics for programs",
            Self::File(..) => "name a place that is there and can be written",
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
            Self::Ended(RequestStatus::Reset) => 4,
            Self::Late { .. } | Self::Unanswered { .. } => 6,
            Self::Retargeted(_)
            | Self::Excluded(_)
            | Self::Ended(_)
            | Self::Output(_)
            | Self::NoTerminal
            | Self::File(..) => 1,
            Self::Interrupted => 130,
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
