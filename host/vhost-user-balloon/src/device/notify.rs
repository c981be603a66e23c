// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Notifications of the guest: the configuration space has changed.

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use super::Device;

/// The least time between two notifications. Each is an interrupt of the guest and a message for the VMM's main loop, and
/// a client may set targets without end. In tests it is long, since counts must not depend on the load of the machine.
const INTERVAL: Duration = Duration::from_millis(if cfg!(test) { 60_000 } else { 10 });

impl Device {
    /// Notifies the guest, now, soon, or when it has a driver. Front ends do not expect the message without a driver.
    pub(super) fn notify(&self) {
        self.told.store(self.asked(), SeqCst);
        self.config_changed.store(true, SeqCst);
        self.send_change();
    }

    /// Sends the notification of a change, if there is one and the guest was not notified a moment ago.
    pub(super) fn send_change(&self) {
        let may_send = self.running() && !self.notified.load(SeqCst);
        if may_send && self.config_changed.swap(false, SeqCst) {
            // Set before the timer runs, whose end clears it. Without a timer the next one is sent at once.
            self.notified.store(true, SeqCst);
            if !self.notice.once(INTERVAL) {
                self.notified.store(false, SeqCst);
            }
            self.channel.config_changed();
        }
    }

    /// Handles the end of the interval.
    pub(super) fn end_notice(&self) {
        self.notice.acknowledge();
        self.notified.store(false, SeqCst);
        self.send_change();
    }
}
