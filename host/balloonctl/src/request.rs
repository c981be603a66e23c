// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Making host requests, and waiting for their answers.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use balloon_control::{Answer, Begun, Client, Info, Progress, Request, RequestStatus};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::failure::Failure;

/// The polling interval, in milliseconds.
const POLL_INTERVAL: u16 = 100;

/// Makes a request, and waits until the answer is complete. Returns its status and how long it took. Cancels
/// the request on a timeout or an interrupt.
///
/// # Errors
///
/// The request cannot be made, or the guest does not complete the answer in time.
pub(crate) fn ask(
    client: &mut Client,
    request: &Request,
    timeout: Duration,
) -> Result<(Answer, Progress, Duration), Failure> {
    let interrupts = Interrupts::new()?;
    let info: Info = client.call(&Request::Info {})?.parse()?;
    let Begun { id } = client.call(request)?.parse()?;
    let start = Instant::now();
    let result = wait(client, id, info.memory, timeout, &interrupts);
    if let Err(Failure::Interrupted | Failure::Unanswered { .. }) = result {
        // A failure is ignored, since nothing else can be done.
        let _ = client.call(&Request::Cancel { id });
    }
    let (answer, progress) = result?;
    Ok((answer, progress, start.elapsed()))
}

fn wait(
    client: &mut Client,
    id: u64,
    memory: Option<u64>,
    timeout: Duration,
    interrupts: &Interrupts,
) -> Result<(Answer, Progress), Failure> {
    let start = Instant::now();
    let bar = Bar::new(memory.unwrap_or(0));
    loop {
        let answer = client
            .call(&Request::Progress { id })
            .map_err(Failure::of_request)?;
        let progress: Progress = answer.parse()?;
        match progress.status {
            RequestStatus::Complete => return Ok((answer, progress)),
            RequestStatus::Waiting | RequestStatus::Open => {}
            status => return Err(Failure::Ended(status)),
        }
        if start.elapsed() >= timeout {
            return Err(Failure::Unanswered {
                seen: progress.status == RequestStatus::Open,
                waited: timeout,
            });
        }
        bar.show(&progress);
        interrupts.wait()?;
    }
}

/// The signals by which users and service managers end a program.
struct Interrupts(SignalFd);

impl Interrupts {
    /// From now on a wait returns on these signals.
    fn new() -> Result<Self, Failure> {
        let mut signals = SigSet::empty();
        signals.add(Signal::SIGINT);
        signals.add(Signal::SIGTERM);
        let made = signals
            .thread_block()
            .and_then(|()| SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC));
        Ok(Self(made.map_err(std::io::Error::from)?))
    }

    /// Waits for the polling interval, or for one of them.
    fn wait(&self) -> Result<(), Failure> {
        let mut events = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut events, PollTimeout::from(POLL_INTERVAL)) {
            Ok(0) | Err(Errno::EINTR) => Ok(()),
            Ok(_) => Err(Failure::Interrupted),
            Err(errno) => Err(std::io::Error::from(errno).into()),
        }
    }
}

/// Shows how much memory the guest has listed, on standard error if that is a terminal.
struct Bar(ProgressBar);

impl Bar {
    fn new(memory: u64) -> Self {
        let style = ProgressStyle::with_template("[{wide_bar}] {prefix}")
            .expect("the template is valid")
            .progress_chars("#> ");
        Self(ProgressBar::new(memory).with_style(style))
    }

    fn show(&self, progress: &Progress) {
        let Self(bar) = self;
        bar.set_prefix(match progress.status {
            RequestStatus::Waiting => "the guest has not seen it yet".to_owned(),
            _ => format!(
                "{} unused of {}",
                HumanBytes(progress.named),
                HumanBytes(bar.length().unwrap_or(0))
            ),
        });
        bar.set_position(progress.named);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
