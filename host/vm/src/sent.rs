// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest has sent to inflate or deflate its balloon.

use std::fmt;

use anyhow::Result;
use balloon_control::{Counters, Encodings};

use crate::guest::Guest;

/// What a guest has sent, as the daemon that has its device counts it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    /// The length of the messages in bytes.
    pub bytes: u64,
    /// How many there were.
    pub messages: u64,
    /// How many times the device was notified of them.
    pub notifications: u64,
    /// What they were.
    pub encodings: Encodings,
}

impl Guest {
    /// All that the guest has sent so far.
    ///
    /// # Errors
    ///
    /// The balloon is QEMU's own.
    pub fn sent(&self) -> Result<Sent> {
        Ok(Sent::of(&self.daemon()?.info()?.counters))
    }
}

impl Sent {
    fn of(counters: &Counters) -> Self {
        let (messages, notifications) = (counters.messages, counters.notifications);
        Self {
            bytes: counters.received.inflate + counters.received.deflate,
            messages: messages.inflate + messages.deflate,
            notifications: notifications.inflate + notifications.deflate,
            encodings: counters.encodings,
        }
    }

    /// What it has sent since it had sent `before`.
    pub fn since(self, before: Self) -> Self {
        let (now, then) = (self.encodings, before.encodings);
        Self {
            bytes: self.bytes - before.bytes,
            messages: self.messages - before.messages,
            notifications: self.notifications - before.notifications,
            encodings: Encodings {
                pfns: now.pfns - then.pfns,
                ranges: now.ranges - then.ranges,
                bitmaps: now.bitmaps - then.bitmaps,
            },
        }
    }
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} bytes in {} messages ({} of ranges, {} bitmaps, {} of page frame numbers), {} notifications",
            self.bytes,
            self.messages,
            self.encodings.ranges,
            self.encodings.bitmaps,
            self.encodings.pfns,
            self.notifications
        )
    }
}
