// SPDX-License-Identifier: GPL-2.0

//! How long the driver waits, and how often it looks: all of its timeouts, intervals and pauses.

#![forbid(unsafe_code)]

use kernel::time::{
    Delta,
    Msecs, //
};

/// How long a device may make no progress before it counts as unresponsive: then teardown ends, the
/// system may suspend, and page migration is refused.
pub(crate) const UNRESPONSIVE: Delta = Delta::from_millis(2_000);

/// How long teardown takes at most, for a device that makes progress: from the first feature on that
/// is quiesced, memory blocks included that its tasks still take. Messages that the device has not
/// acknowledged by then are discarded by the reset that follows.
///
/// A memory block is not left half taken. So a feature that comes after the balloon may add
/// [`OFFLINE`], and the time that the kernel has to bring blocks online.
pub(crate) const TEARDOWN: Delta = Delta::from_millis(10_000);

/// The interval at which progress is polled during teardown.
pub(crate) const POLL_INTERVAL: Delta = Delta::from_millis(5);

/// How long an OOM notifier waits for the device, where it must be notified before pages can be used,
/// once until the device uses buffers.
pub(crate) const OOM: Delta = Delta::from_millis(100);

/// How long an OOM notifier waits for the memory block that is being taken, if the balloon is empty.
pub(crate) const OOM_BLOCK: Delta = Delta::from_millis(500);

/// How long an OOM notifier waits for the device to use hints, once until it uses some.
pub(crate) const OOM_HINTS: Delta = Delta::from_millis(500);

/// How long page migration waits for the device to acknowledge pages that have moved, once until it
/// acknowledges some.
pub(crate) const MIGRATION: Delta = Delta::from_millis(100);

/// How long compaction waits before it tries again, when more pages have moved than the device could be
/// notified of.
pub(crate) const MIGRATION_RETRY: Delta = Delta::from_micros(200);

/// How long the end of a balloon waits for pages that the kernel has isolated for page migration. After
/// that a thread waits.
pub(crate) const MIGRATION_AT_END: Delta = Delta::from_millis(2_000);

/// When a task looks for used buffers that the device has not interrupted for.
pub(crate) const MISSED_INTERRUPT: Msecs = 1_000;

/// The same during a round of hints, which a migration waits for.
pub(crate) const MISSED_HINT_INTERRUPT: Msecs = 20;

/// The same while a report of free pages is at the device.
pub(crate) const MISSED_REPORT_INTERRUPT: Msecs = 100;

/// The first and the longest pause of a balloon that could not grow for lack of memory. Worth another
/// try soon: memory comes and goes.
pub(crate) const NO_MEMORY_PAUSES: (Msecs, Msecs) = (200, 30_000);

/// The same after the guest has run out of memory.
pub(crate) const OUT_OF_MEMORY_PAUSES: (Msecs, Msecs) = (10_000, 300_000);

/// How long the driver logs nothing of a kind that the host can cause after it has logged some.
pub(crate) const LOG_INTERVAL: Delta = Delta::from_secs(5);

/// The interval at which the size of a balloon is reported while it changes.
pub(crate) const REPORT_INTERVAL: Delta = Delta::from_millis(1_000);

/// For how long a device that has used a buffer counts as alive.
pub(crate) const ALIVE: Msecs = 100;

/// How long compaction keeps pages isolated, more or less.
pub(crate) const ISOLATION: Msecs = 10;

/// How long the kernel may try to take a memory block offline. One that is free takes a few milliseconds.
pub(crate) const OFFLINE: Msecs = 100;

/// How long bringing a memory block online may take before the task gets a signal. The kernel does not
/// look for signals there: it only writes to the `struct page`s. The limit is there for its end, which
/// clears the signal flag that a restarted write leaves.
pub(crate) const ONLINE: Msecs = 1_000;

/// When memory blocks that could not be brought online are tried again.
pub(crate) const ONLINE_AGAIN: Msecs = 1_000;
