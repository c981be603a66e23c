// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The man pages, generated from the definition of the command line.

use std::fs::OpenOptions;
use std::path::Path;

use anyhow::{Context, Result};
use clap::Command;
use clap_mangen::roff::Roff;

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

/// Writes the pages into a directory.
///
/// # Errors
///
/// They cannot be written there.
pub(crate) fn generate(command: Command, directory: &Path) -> Result<()> {
    let failure = || format!("cannot write to {}", directory.display());
    clap_mangen::generate_to(command, directory).with_context(failure)?;
    let main = directory.join("balloon-manager.1");
    let mut page = OpenOptions::new()
        .append(true)
        .open(main)
        .with_context(failure)?;
    let mut more = Roff::new();
    man_page::terms(&mut more, "FILES", FILES);
    let pages = [("vhost-user-balloon", 8), ("balloonctl", 1)];
    man_page::see_also(&mut more, &pages);
    more.to_writer(&mut page).with_context(failure)
}
