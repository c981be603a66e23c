// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a guest gives the memory that it is asked for.

use crate::observation::{MIB, Millis, Pages, Stopped, Vm};

/// A guest with a larger target must inflate by `LEAST_PROGRESS` within `PATIENCE`.
pub(crate) const PATIENCE: Millis = 4_000;
const LEAST_PROGRESS: Pages = 60 * MIB;

/// A driver that reports that it has stopped gives no more after so long without progress.
const STOPPED_FOR: Millis = PATIENCE / 4;

/// The time before the policy again raises the target of a guest that did not inflate, the first time and at most.
const FIRST_RETRY: Millis = 10_000;
const LAST_RETRY: Millis = 300_000;

/// A guest has not inflated to its target.
#[derive(Clone, Copy, Debug)]
struct Unwilling {
    /// When the policy tries again.
    until: Millis,
    /// It had no memory to inflate. Once it has, the policy tries again at once.
    full: bool,
}

/// Memory that the guest's driver keeps available.
#[derive(Clone, Copy, Debug)]
struct Kept {
    /// When the policy asks for it again.
    until: Millis,
    pages: Pages,
}

/// A wait for memory from the guest.
#[derive(Clone, Copy, Debug)]
struct Wait {
    since: Millis,
    /// The balloon's size then.
    size: Pages,
    /// The least memory that was available in the guest.
    available: Option<Pages>,
}

#[derive(Debug)]
pub(crate) struct Progress {
    waiting: Option<Wait>,
    unwilling: Option<Unwilling>,
    kept: Option<Kept>,
    retry_after: Millis,
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            waiting: None,
            unwilling: None,
            kept: None,
            retry_after: FIRST_RETRY,
        }
    }
}

impl Progress {
    /// Gives up on a guest that does not inflate to its target. The balloon has had its size since `settled`.
    pub(crate) fn watch(&mut self, vm: &Vm, now: Millis, settled: Millis, headroom: Pages) {
        if vm.frozen {
            self.waiting = None;
            return;
        }
        let missing = vm.target.saturating_sub(vm.size);
        if missing <= LEAST_PROGRESS {
            if self.waiting.take().is_some_and(|wait| vm.size > wait.size) {
                self.retry_after = FIRST_RETRY;
            }
            return;
        }
        let new = Wait {
            since: now,
            size: vm.size,
            available: None,
        };
        let wait = self.waiting.get_or_insert(new);
        if let Some(sample) = vm.sample.filter(|sample| sample.taken >= settled) {
            let least = wait.available.unwrap_or(Pages::MAX).min(sample.available);
            wait.available = Some(least);
        }
        let wait = *wait;
        let stopped = matches!(vm.stopped, Some(Stopped::Full | Stopped::AfterOom))
            && now.saturating_sub(settled.max(wait.since)) >= STOPPED_FOR;
        if !stopped && now.saturating_sub(wait.since) < PATIENCE {
            return;
        }
        if vm.size.saturating_sub(wait.size) < LEAST_PROGRESS {
            self.give_up(vm, now, wait.available, headroom);
        }
        self.waiting = Some(new);
    }

    fn give_up(&mut self, vm: &Vm, now: Millis, available: Option<Pages>, headroom: Pages) {
        // A driver that pauses after it ran out of memory inflates again with the next target.
        let full = vm.stopped == Some(Stopped::AfterOom)
            || available.is_some_and(|available| available < headroom);
        // A driver with more available memory than that has given all but what it keeps for its guest.
        let kept = available.filter(|_| vm.stopped == Some(Stopped::Full) && !full);
        let time = if let Some(pages) = kept {
            self.kept = Some(Kept {
                until: now.saturating_add(LAST_RETRY),
                pages,
            });
            STOPPED_FOR
        } else {
            let time = self.retry_after;
            self.retry_after = time.saturating_mul(2).min(LAST_RETRY);
            time
        };
        self.unwilling = Some(Unwilling {
            until: now.saturating_add(time),
            full,
        });
    }

    /// The guest does not give what it was asked for, and has no reason to give it now.
    pub(crate) fn is_uncooperative(&self, vm: &Vm, now: Millis, headroom: Pages) -> bool {
        self.unwilling
            .filter(|unwilling| now < unwilling.until)
            .is_some_and(|unwilling| {
                let available = vm.sample.map_or(0, |sample| sample.available);
                !unwilling.full || available < headroom
            })
    }

    /// What a guest that uses so much does not give, as far as known: that, and what its driver keeps available.
    pub(crate) fn kept(&self, used: Pages, now: Millis) -> Pages {
        self.kept
            .filter(|kept| now < kept.until)
            .map_or(0, |kept| used.saturating_add(kept.pages))
    }
}
