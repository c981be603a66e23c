// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Errors, advice and exit codes.

use std::fmt::Write;
use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use balloon_control::{ClientError, ErrorKind, Info, RequestStatus, Shortfall};
use console::style;
use indicatif::HumanBytes;

/// The exit codes, for the help and the man page.
pub(crate) const EXIT_CODES: [(u8, &str); 9] = [
    (0, "Success."),
    (1, "The command failed."),
    (2, "The command line is wrong."),
    (3, "The daemon cannot be reached, or does not respond."),
    (
        4,
        "No VMM is connected, or the guest has no balloon driver.",
    ),
    (5, "A size, an address or a time is out of range."),
    (6, "The guest did not finish in time."),
    (7, "The target is another one than the command expects."),
    (130, "Interrupted; the guest is asked to stop."),
];

/// The exit codes as the end of the help.
pub(crate) fn help() -> String {
    let mut text = style("Exit codes:").bold().underlined().to_string();
    for (code, meaning) in EXIT_CODES {
        // Writing to a string does not fail.
        let _ = write!(text, "\n  {code:>3}  {meaning}");
    }
    text
}

/// The status of an ended answer, as text.
fn end(status: RequestStatus) -> &'static str {
    match status {
        RequestStatus::Complete => "the guest is done",
        RequestStatus::Waiting | RequestStatus::Open => "the guest is not done",
        RequestStatus::Aborted => "the guest had to stop before it was done",
        RequestStatus::Cancelled => "another client cancelled the request",
        RequestStatus::Unsupported => "the guest's driver does not know this request",
        RequestStatus::Malformed => "the guest's driver refuses this request",
        RequestStatus::UnknownId => "the guest's driver has lost this request",
        RequestStatus::Reset => "the guest, its driver or the VMM went away",
    }
}

/// An error.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The daemon refuses the request, or cannot be reached.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The command line names no VM.
    #[error("no VM is named")]
    NoVm,
    /// A percentage of an unknown amount.
    #[error("the size of the guest's memory is not known")]
    MemoryUnknown,
    /// The VMM disconnects during the wait.
    #[error("the VMM has disconnected")]
    Disconnected,
    /// The driver is unbound during the wait, or there is none.
    #[error("no balloon driver works in the guest")]
    NoDriver,
    /// Another client has set the target during the wait.
    #[error("the target was set to {} meanwhile", HumanBytes(*.0))]
    Retargeted(u64),
    /// The lease has run out during the wait.
    #[error("the lease has run out, and the target is {} now", HumanBytes(*.0))]
    Lapsed(u64),
    /// The guest's administrator has turned ballooning off.
    #[error("{}; its balloon has {}", Shortfall::Excluded, HumanBytes(*.0))]
    Excluded(u64),
    /// The guest does not reach the target in time.
    #[error(
        "the balloon has {} of {} after {} s{}",
        HumanBytes(*size), HumanBytes(*target), waited.as_secs(),
        reason.map(|reason| format!(": {reason}")).unwrap_or_default()
    )]
    Late {
        /// In bytes.
        size: u64,
        /// In bytes.
        target: u64,
        waited: Duration,
        /// The guest's stop reason.
        reason: Option<Shortfall>,
    },
    /// The guest does not end an answer in time.
    #[error(
        "{} within {} s",
        if *seen { "the guest has not finished its answer" } else { "the guest has not received the request" },
        waited.as_secs()
    )]
    Unanswered {
        /// Whether the guest has received the request.
        seen: bool,
        waited: Duration,
    },
    /// The guest has ended its answer early.
    #[error("{}", end(*.0))]
    Ended(RequestStatus),
    /// The daemon keeps few requests.
    #[error("the daemon no longer has the request")]
    Forgotten,
    /// A signal has ended the wait.
    #[error("interrupted")]
    Interrupted,
    /// The output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
    /// The manager's program cannot be run.
    #[error("cannot run balloon-manager: {0}")]
    NoManager(io::Error),
    /// Only a terminal can be drawn on.
    #[error("the output is not a terminal")]
    NoTerminal,
    /// A file cannot be written.
    #[error("cannot write {path}: {source}", path = .0.display(), source = .1)]
    File(PathBuf, io::Error),
}

impl Failure {
    /// Checks that there is a guest with a driver.
    pub(crate) fn check(info: &Info) -> Result<(), Self> {
        match (info.guest.connected, info.guest.driver) {
            (true, true) => Ok(()),
            (true, false) => Err(Self::NoDriver),
            (false, _) => Err(Self::Disconnected),
        }
    }

    /// An error of a query about this program's own request, whose id is not on the command line.
    pub(crate) fn of_request(error: ClientError) -> Self {
        match error {
            ClientError::Refused(error) if error.kind == ErrorKind::OutOfRange => Self::Forgotten,
            error => error.into(),
        }
    }

    /// The advice.
    fn advice(&self) -> String {
        match self {
            Self::Client(error) => return error.advice(),
            Self::NoVm => "use --vm NAME, --socket PATH, or BALLOON_SOCKET in the environment",
            Self::MemoryUnknown => "start the guest, or name a size such as 2GiB",
            Self::Disconnected => "see whether the guest still runs; the target is kept for it",
            Self::NoDriver => "load the guest's balloon driver; the target is kept for it",
            Self::Retargeted(_) => {
                "find the other client; this command does not set its target again"
            }
            Self::Lapsed(_) => "give the guest more time with a longer --lease",
            Self::Excluded(_) => "let the guest's administrator allow its driver to inflate",
            Self::Late { reason: None, .. } => {
                "see the guest's log; the guest continues, and balloonctl info shows its progress"
            }
            Self::Late { .. } => {
                "set a smaller size, or free memory in the guest; the guest continues by itself"
            }
            Self::Unanswered { seen: true, .. } => {
                "raise --timeout, or see the guest's log; the guest is asked to stop"
            }
            Self::Unanswered { seen: false, .. } => {
                "check that the guest is not paused, and look for its driver in the guest's log"
            }
            Self::Ended(RequestStatus::Reset) => "wait until the guest runs, and try again",
            Self::Ended(RequestStatus::Unsupported | RequestStatus::Malformed) => {
                "use a guest driver with host requests, such as virtio_balloon_rs"
            }
            Self::Ended(_) => "see the guest's log, and try again",
            Self::Forgotten => "try again, with fewer requests of other clients at the same time",
            Self::Interrupted => "the guest is asked to stop; what it has finished stays in effect",
            Self::Output(_) => "check that the output is on a file system with free space",
            Self::NoManager(_) => "install the package balloon-manager, which has the program",
            Self::NoTerminal => "use balloonctl info --json or balloonctl metrics for programs",
            Self::File(..) => "name a directory that exists and is writable",
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
                    ErrorKind::Conflict => 7,
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
            Self::NoVm => 2,
            Self::MemoryUnknown | Self::Disconnected | Self::NoDriver => 4,
            Self::Ended(RequestStatus::Reset) => 4,
            Self::Late { .. } | Self::Unanswered { .. } => 6,
            Self::Retargeted(_)
            | Self::Lapsed(_)
            | Self::Excluded(_)
            | Self::Ended(_)
            | Self::Forgotten
            | Self::Output(_)
            | Self::NoManager(_)
            | Self::NoTerminal
            | Self::File(..) => 1,
            Self::Interrupted => 130,
        }
    }

    /// Prints the error and the advice, and returns the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        // The reader has closed the pipe: it has read enough.
        if matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe) {
            return ExitCode::SUCCESS;
        }
        let error = style("error:").for_stderr().red().bold();
        let help = style("help:").for_stderr().green().bold();
        eprintln!("{error} {self}\n{help} {}", self.advice());
        ExitCode::from(self.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_documented() {
        let document = include_str!("../../../docs/troubleshooting.md");
        let (_, section) = document.split_once("\n## balloonctl\n").unwrap();
        let mut documented: Vec<u8> = section
            .lines()
            .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next()?.parse().ok())
            .collect();
        documented.dedup();
        let codes = EXIT_CODES.iter().map(|&(code, _)| code);
        assert!(codes.skip(1).eq(documented));
    }
}
