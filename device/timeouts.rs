// SPDX-License-Identifier: GPL-2.0

//! All timeouts, intervals and pauses of the driver.

#![forbid(unsafe_code)]

use kernel::time::{
    Delta,
    Msecs, //
};

/// How long a device may make no progress, or fail to read its target, before it counts as
/// unresponsive. Then the system may suspend, and, without progress, page migration is refused.
pub(crate) const UNRESPONSIVE: Delta = Delta::from_millis(2_000);

/// How long teardown waits for a device that makes no progress: on unbind, unplug and `rmmod`, and
/// before a suspend, which also waits for a report of free pages.
pub(crate) const TEARDOWN_STALL: Delta = Delta::from_millis(2_000);

/// The longest teardown, for a device that makes progress. It starts with the first feature, and
/// includes memory blocks that tasks are still taking. The reset that follows discards
/// unacknowledged messages.
///
/// The driver always completes a memory block. So a feature after the balloon may add [`OFFLINE`],
/// and the time for bringing blocks online. After that `rmmod` may add [`ONLINE_WITHOUT_THREAD`].
pub(crate) const TEARDOWN: Delta = Delta::from_millis(10_000);

/// How long an OOM notifier waits for a device that must be notified before pages can be used. It
/// does not wait again until the device uses buffers.
pub(crate) const OOM: Delta = Delta::from_millis(100);

/// How long an OOM notifier waits for the memory block that is being taken, if the balloon is
/// empty.
pub(crate) const OOM_BLOCK: Delta = Delta::from_millis(500);

/// How long an OOM notifier waits for the device to use hints. It does not wait again until the
/// device uses some.
pub(crate) const OOM_HINTS: Delta = Delta::from_millis(500);

/// How long page migration waits for the device to acknowledge migrations. It does not wait again
/// until the device acknowledges some.
pub(crate) const MIGRATION: Delta = Delta::from_millis(100);

/// How long page migration waits before it tries again, when too many migrations are unreported.
pub(crate) const MIGRATION_RETRY: Delta = Delta::from_micros(200);

/// How long teardown waits for pages that the kernel has isolated for page migration. After that a
/// thread waits.
pub(crate) const MIGRATION_AT_END: Delta = Delta::from_millis(2_000);

/// How long memory offlining waits for the device: for the messages and the report in flight.
pub(crate) const GOING_OFFLINE: Delta = Delta::from_millis(2_000);

/// The interval at which a task polls for used buffers without an interrupt.
pub(crate) const MISSED_INTERRUPT: Msecs = 1_000;

/// The same during a round of hints, for which a VM migration waits.
pub(crate) const MISSED_HINT_INTERRUPT: Msecs = 20;

/// The same while a report of free pages is at the device.
pub(crate) const MISSED_REPORT_INTERRUPT: Msecs = 100;

/// The first and the longest pause of a balloon that could not grow for lack of memory. They are
/// short, since memory may be freed soon.
pub(crate) const NO_MEMORY_PAUSES: (Msecs, Msecs) = (200, 30_000);

/// The same after the guest has run out of memory.
pub(crate) const OUT_OF_MEMORY_PAUSES: (Msecs, Msecs) = (10_000, 300_000);

/// The least time between two log messages of a kind that the host can trigger.
pub(crate) const LOG_INTERVAL: Delta = Delta::from_secs(5);

/// The interval at which the size of a balloon is reported while it changes.
pub(crate) const REPORT_INTERVAL: Delta = Delta::from_millis(1_000);

/// For how long a device that has used a buffer counts as responsive.
pub(crate) const ALIVE: Msecs = 100;

/// How long page migration keeps pages isolated, more or less.
pub(crate) const ISOLATION: Msecs = 10;

/// The least time between two pressure notices.
pub(crate) const PRESSURE_NOTICES: Delta = Delta::from_millis(100);

/// How long the kernel may try to take a memory block offline. A free one takes a few milliseconds.
pub(crate) const OFFLINE: Msecs = 100;

/// How long bringing a memory block online may take before the task gets a signal. The kernel does
/// not check for signals there: it only writes to the `struct page`s. The limit exists for its end,
/// which clears the signal flag of a restarted write.
pub(crate) const ONLINE: Msecs = 1_000;

/// How long taking a memory block offline, or bringing it online, waits for other threads that do
/// so.
pub(crate) const HOTPLUG_BUSY: Delta = Delta::from_millis(300);

/// The interval for retrying memory blocks that could not be brought online.
pub(crate) const ONLINE_AGAIN: Msecs = 1_000;

/// How long a thread tries to bring memory blocks online when the driver has left the device.
pub(crate) const ONLINE_AT_END: Delta = Delta::from_secs(60);

/// The same without a thread, as while the module is being unloaded.
pub(crate) const ONLINE_WITHOUT_THREAD: Delta = Delta::from_secs(10);

/// The CPU time that host requests may use at once. Then they pause: for ten times what they used
/// beyond that.
pub(crate) const REQUEST_BUDGET: Delta = Delta::from_secs(2);

/// The same for each GiB of the guest's memory, if that is more: one request may concern all of it.
pub(crate) const REQUEST_BUDGET_PER_GIB: Delta = Delta::from_millis(500);

/// The most that counts as used beyond that. A measured time may include time in which the whole
/// guest was stopped, and requests must not pause without a limit for that.
pub(crate) const REQUEST_DEBT: Delta = Delta::from_secs(10);

/// The least that dropping caches counts: the kernel logs a line for it each time.
pub(crate) const DROPPING_CACHES: Delta = Delta::from_millis(500);
