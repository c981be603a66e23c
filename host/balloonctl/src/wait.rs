// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Waiting until the balloon has its size.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use balloon_control::{Answer, Client, ClientError, Info, News, Shortfall};
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::failure::Failure;

/// The time over which the rate is averaged.
const RATE_TIME: Duration = Duration::from_secs(1);

/// Waits until the balloon, which had `from` bytes, has the size that was just set. Returns the last state
/// and how long it took.
///
/// # Errors
///
/// The guest or its driver goes away, does not inflate at all or not in time, or another client sets
/// another target.
pub(crate) fn wait(
    client: Client,
    from: u64,
    timeout: Duration,
) -> Result<(Answer, Duration), Failure> {
    let start = Instant::now();
    let mut events = client.subscribe(None)?;
    let mut last = None;
    let mut bar: Option<Bar> = None;
    loop {
        match events.next(timeout.saturating_sub(start.elapsed()))? {
            Some(News::Info(answer)) => last = Some(answer),
            Some(News::Stats(_)) => continue,
            Some(News::Alive) | None => {}
        }
        let answer = last.as_ref().ok_or(ClientError::Silent(timeout))?;
        let info: Info = answer.parse()?;
        // The daemon may have rounded the target, so it is the daemon's that counts.
        let bar = bar.get_or_insert_with(|| Bar::new(from, info.target));
        let elapsed = start.elapsed();
        if bar.is_reached(&info, elapsed, timeout)? {
            return Ok((answer.clone(), elapsed));
        }
        bar.show(&info, elapsed);
    }
}

/// The way from one size to another, on standard error when that is a terminal.
struct Bar {
    target: u64,
    way: u64,
    bar: ProgressBar,
    /// The last times and sizes.
    looks: VecDeque<(Duration, u64)>,
}

impl Bar {
    fn new(from: u64, target: u64) -> Self {
        let way = from.abs_diff(target);
        let template = "[{wide_bar}] {prefix}  {msg:.yellow}";
        let style = ProgressStyle::with_template(template).expect("the template is valid");
        let bar = ProgressBar::new(way).with_style(style.progress_chars("#> "));
        Self {
            target,
            way,
            bar,
            looks: VecDeque::new(),
        }
    }

    /// Whether the balloon has its size.
    fn is_reached(
        &self,
        info: &Info,
        elapsed: Duration,
        timeout: Duration,
    ) -> Result<bool, Failure> {
        let Info { size, guest, .. } = info;
        let reason = guest.short_of_target;
        if info.target != self.target && info.lapsed {
            Err(Failure::Lapsed(info.target))
        } else if info.target != self.target {
            Err(Failure::Retargeted(info.target))
        } else if info.is_reached() {
            Ok(true)
        } else if let Err(failure) = Failure::check(info) {
            Err(failure)
        } else if reason == Some(Shortfall::Excluded) {
            Err(Failure::Excluded(*size))
        } else if elapsed >= timeout {
            Err(Failure::Late {
                size: *size,
                target: self.target,
                waited: elapsed,
                reason,
            })
        } else {
            Ok(false)
        }
    }

    fn show(&mut self, info: &Info, elapsed: Duration) {
        let left = info.size.abs_diff(self.target);
        let rate = self.rate(info.size, elapsed);
        self.bar.set_prefix(format!(
            "{} of {}, {}/s",
            HumanBytes(info.size),
            HumanBytes(self.target),
            HumanBytes(rate)
        ));
        let reason = info.guest.short_of_target;
        self.bar
            .set_message(reason.map_or_else(String::new, |reason| reason.to_string()));
        self.bar.set_position(self.way.saturating_sub(left));
    }

    /// How fast the size changes, in bytes per second. A guest that stops is seen at once to do so, unlike by
    /// a mean of the whole way.
    fn rate(&mut self, size: u64, elapsed: Duration) -> u64 {
        self.looks.push_back((elapsed, size));
        let is_old = |&(second, _): &(Duration, u64)| elapsed.saturating_sub(second) >= RATE_TIME;
        while self.looks.get(1).is_some_and(is_old) {
            self.looks.pop_front();
        }
        let Some(&(earlier, before)) = self.looks.front() else {
            return 0;
        };
        let passed = u64::try_from(elapsed.saturating_sub(earlier).as_millis()).unwrap_or(u64::MAX);
        size.abs_diff(before)
            .saturating_mul(1000)
            .checked_div(passed)
            .unwrap_or(0)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_second() {
        let mut bar = Bar::new(0, 1 << 30);
        let mut rate = |look: u64, size| bar.rate(size, Duration::from_millis(look * 100));
        assert_eq!(rate(0, 0), 0);
        assert_eq!(rate(0, 5), 0);
        assert_eq!(rate(1, 1000), 10_000);
        for look in 2..20 {
            rate(look, look * 1000);
        }
        assert_eq!(rate(20, 20_000), 10_000);
        for look in 21..30 {
            rate(look, 20_000);
        }
        assert_eq!(rate(30, 20_000), 0);
    }
}
