// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The messages that a guest has sent to inflate or deflate its balloon.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context, Result};
use balloon_control::Counters;

use crate::guest::Guest;

/// The messages of a guest, as its daemon counts them.
#[derive(Clone, Debug, Default)]
pub struct Sent {
    /// The length of the messages in bytes.
    pub bytes: u64,
    /// Their number.
    pub messages: u64,
    /// How many times the device was notified of them.
    pub notifications: u64,
    /// How many there were, by their encoding.
    encodings: BTreeMap<String, u64>,
}

impl Guest {
    /// All messages of the guest so far.
    ///
    /// # Errors
    ///
    /// The device is QEMU's own.
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
            encodings: counters.encodings.clone(),
        }
    }

    /// How many messages there were in an encoding.
    ///
    /// # Errors
    ///
    /// The daemon does not count such messages.
    pub fn encoded_as(&self, encoding: &str) -> Result<u64> {
        let messages = self.encodings.get(encoding).copied();
        messages.with_context(|| format!("the daemon counts no messages as {encoding}"))
    }

    /// The difference from `before`.
    pub fn since(mut self, before: &Self) -> Self {
        for (encoding, messages) in &mut self.encodings {
            *messages -= before.encodings.get(encoding).unwrap_or(&0);
        }
        Self {
            bytes: self.bytes - before.bytes,
            messages: self.messages - before.messages,
            notifications: self.notifications - before.notifications,
            encodings: self.encodings,
        }
    }
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let encodings = self.encodings.iter();
        let encodings: Vec<_> = encodings
            .map(|(name, messages)| format!("{messages} {name}"))
            .collect();
        write!(
            f,
            "{} bytes in {} messages ({}), {} notifications",
            self.bytes,
            self.messages,
            encodings.join(", "),
            self.notifications
        )
    }
}
