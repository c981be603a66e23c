// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Making requests of the guest, and waiting for its answers.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use balloon_control::{
    Answer, Begun, Client, Events, HintAction, Info, Progress, Request, RequestStatus,
};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::failure::Failure;

/// After so long without an event, the next question finds out whether the daemon is still there: it sends one every
/// second at least.
const SILENCE: Duration = Duration::from_secs(5);

/// Makes a request, and waits until the answer is complete. `events` say when to look. Returns its status and how long
/// it took. Cancels the request on a timeout or an interrupt.
///
/// # Errors
///
/// The request cannot be made, or the guest does not complete the answer in time.
pub(crate) fn ask(
    client: &mut Client,
    events: Events,
    request: &Request,
    timeout: Duration,
) -> Result<(Answer, Progress, Duration), Failure> {
    let interrupts = interrupts()?;
    let info: Info = client.call(&Request::Info {})?.parse()?;
    let Begun { id } = client.call(request)?.parse()?;
    let start = Instant::now();
    let wake = Wake { interrupts, events };
    let result = wait(client, id, info.memory, timeout, wake);
    if let Err(Failure::Interrupted | Failure::Unanswered { .. }) = result {
        // A failure is ignored, since nothing else can be done.
        let _ = client.call(&cancel(request, id));
    }
    let (answer, progress) = result?;
    Ok((answer, progress, start.elapsed()))
}

/// The request that ends a request with this id.
fn cancel(request: &Request, id: u64) -> Request {
    match request {
        Request::Hints { .. } => Request::Hints {
            action: HintAction::Stop,
        },
        _ => Request::Cancel { id },
    }
}

fn wait(
    client: &mut Client,
    id: u64,
    memory: Option<u64>,
    timeout: Duration,
    mut wake: Wake,
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
        let left = timeout.saturating_sub(start.elapsed());
        if left.is_zero() {
            return Err(Failure::Unanswered {
                seen: progress.status == RequestStatus::Open,
                waited: timeout,
            });
        }
        bar.show(&progress);
        wake.wait(left.min(SILENCE))?;
    }
}

/// What ends a wait.
struct Wake {
    interrupts: SignalFd,
    events: Events,
}

impl Wake {
    /// Waits for an event of the daemon, and for `limit` at most.
    ///
    /// # Errors
    ///
    /// There is a signal, or the connection fails.
    fn wait(&mut self, limit: Duration) -> Result<(), Failure> {
        let limit = match self.events.is_read() {
            true => Duration::ZERO,
            false => limit,
        };
        let mut sources = [self.interrupts.as_fd(), self.events.as_fd()]
            .map(|source| PollFd::new(source, PollFlags::POLLIN));
        let limit = PollTimeout::try_from(limit).unwrap_or(PollTimeout::MAX);
        match poll(&mut sources, limit) {
            Ok(_) if sources[0].any() == Some(true) => return Err(Failure::Interrupted),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(std::io::Error::from(errno).into()),
        }
        // Whatever the event is, the request may have changed.
        self.events.next(Duration::ZERO)?;
        Ok(())
    }
}

/// The signals by which users and service managers end a program. They no longer do that.
fn interrupts() -> Result<SignalFd, Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    let made = signals
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC));
    Ok(made.map_err(std::io::Error::from)?)
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
