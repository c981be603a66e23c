// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver's files in the guest's debugfs.

use anyhow::{Context, Result};
use vm::Guest;

/// One of the driver's files in debugfs.
pub(crate) fn show(guest: &Guest, name: &str) -> Result<String> {
    guest.sh(&format!(
        "cat /sys/kernel/debug/virtio_balloon_rs-virtio*/{name}"
    ))
}

/// The number after `name` in a text of `name number` pairs.
pub(crate) fn value(text: &str, name: &str) -> Result<u64> {
    let mut words = text.split_whitespace().skip_while(|word| *word != name);
    let value = words
        .nth(1)
        .with_context(|| format!("{name} is not in {text}"))?;
    Ok(value.parse()?)
}
