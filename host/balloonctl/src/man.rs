// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The man page, generated from the definition of the command line.

use std::path::Path;

use clap::CommandFactory;
use man_page::Page;

use crate::cli::{Cli, socket_of};
use crate::failure::{EXIT_CODES, Failure};

const SOCKET: &str =
    "The control socket of the VM NAME, for --vm. Only the daemon's user and root can connect.";

const EXAMPLES: [(&str, &str); 9] = [
    (
        "Inflate the balloon to half of the guest's memory, and wait at most a minute:",
        "balloonctl --vm vm1 set 50% --wait --timeout 60",
    ),
    ("Deflate the balloon:", "balloonctl --vm vm1 set 0"),
    (
        "Deflate it to a half, unless another client has changed its target of 2 GiB:",
        "balloonctl --vm vm1 set 1GiB --expect 2GiB",
    ),
    (
        "Inflate the balloon to 2 GiB for an hour:",
        "balloonctl --vm vm1 set 2GiB --lease 3600",
    ),
    (
        "Show new memory statistics every five seconds:",
        "balloonctl --vm vm1 stats --fresh --watch 5",
    ),
    (
        "Write a bitmap of unused pages, while all writes to guest memory are logged:",
        "balloonctl --vm vm1 unused --out unused-pages",
    ),
    (
        "Print the balloon size in bytes:",
        "balloonctl --vm vm1 info --json | jq .size",
    ),
    (
        "Show why balloon-manager has given a VM the memory that it has:",
        "balloonctl auto explain vm1",
    ),
    (
        "Complete commands and options in bash:",
        "source <(balloonctl completions bash)",
    ),
];

/// Writes the page into a directory.
///
/// # Errors
///
/// It cannot be written there.
pub(crate) fn generate(directory: &Path) -> Result<(), Failure> {
    let mut page = Page::new(Cli::command(), 1);
    let codes = EXIT_CODES.map(|(code, meaning)| (code.to_string(), meaning));
    page.terms("EXIT STATUS", codes);
    let socket = socket_of("NAME");
    page.terms("FILES", [(socket.to_string_lossy(), SOCKET)]);
    page.examples(&EXAMPLES);
    page.see_also(&[("vhost-user-balloon", 8), ("balloon-manager", 1)]);
    page.write(directory)
        .map_err(|error| Failure::File(page.path(directory), error))
}
