// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The man page, generated from the definition of the command line.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Command;
use man_page::Page;

use crate::control::SOCKET;

/// The files of the manager, with their use.
const FILES: [(&str, &str); 3] = [
    (
        "/etc/balloon-manager/config.toml",
        "The configuration. Without it the defaults apply.",
    ),
    (
        "/etc/balloon-manager/config.d/*.toml, /run/balloon-manager/config.d/*.toml, \
         /usr/lib/balloon-manager/config.d/*.toml",
        "Drop-ins, in the order of their names. Later ones override single settings of earlier ones.",
    ),
    (SOCKET, "The manager's socket."),
];

const EXIT_CODES: [(&str, &str); 3] = [
    ("0", "Success. `run` also ends with 0 on SIGTERM or SIGINT."),
    (
        "1",
        "The command failed. For replay this includes decisions that differ from the recorded ones.",
    ),
    ("2", "The command line is wrong."),
];

const EXAMPLES: [(&str, &str); 4] = [
    (
        "Report what the manager would do and save, and set no target:",
        "balloon-manager run --observe",
    ),
    (
        "Show the host and its VMs every second:",
        "balloon-manager top --watch",
    ),
    (
        "Show why vm1 has the memory that it has:",
        "balloon-manager explain vm1",
    ),
    (
        "Start a VM of 8 GiB when the other VMs have given enough memory:",
        "balloon-manager reserve 8GiB --vm vm2 && virsh start vm2",
    ),
];

/// Writes the page into a directory.
///
/// # Errors
///
/// It cannot be written there.
pub(crate) fn generate(command: Command, directory: &Path) -> Result<()> {
    let mut page = Page::new(command, 1);
    page.terms("EXIT STATUS", EXIT_CODES);
    page.terms("FILES", FILES);
    page.examples(&EXAMPLES);
    page.see_also(&[("vhost-user-balloon", 8), ("balloonctl", 1)]);
    page.write(directory)
        .with_context(|| format!("cannot write {}", page.path(directory).display()))
}
