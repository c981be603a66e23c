// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The man page, generated from the definition of the command line.

use std::fs;
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

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
    let mut command = Cli::command();
    command.build();
    let man = Man::new(command.clone()).manual("User Commands");
    let path = directory.join(man.get_filename());
    render(&man, &command)
        .and_then(|page| fs::write(&path, page))
        .map_err(|error| Failure::File(path, error))
}

fn render(man: &Man, command: &Command) -> io::Result<Vec<u8>> {
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    let mut roff = Roff::new();
    commands(&mut roff, command);
    let codes = EXIT_CODES.map(|(code, meaning)| (code.to_string(), meaning));
    man_page::terms(&mut roff, "EXIT STATUS", codes);
    let socket = socket_of("NAME");
    man_page::terms(&mut roff, "FILES", [(socket.to_string_lossy(), SOCKET)]);
    examples(&mut roff);
    let pages = [("vhost-user-balloon", 8), ("balloon-manager", 1)];
    man_page::see_also(&mut roff, &pages);
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// All commands on one page: the generator would write a page for each.
fn commands(roff: &mut Roff, command: &Command) {
    roff.control("SH", ["COMMANDS"]);
    for command in command
        .get_subcommands()
        .filter(|command| !command.is_hide_set())
    {
        roff.control("SS", [usage(command).as_str()]);
        if let Some(about) = command.get_long_about().or(command.get_about()) {
            roff.text([roman(about.to_string())]);
        }
        let arguments = command
            .get_arguments()
            .filter(|argument| !argument.is_global_set() && argument.get_id() != "help");
        for argument in arguments {
            roff.control("TP", []);
            roff.text([bold(argument.to_string())]);
            let help = argument.get_help().map(ToString::to_string);
            roff.text([roman(help.unwrap_or_default())]);
            let takes_value = argument.get_action().takes_values();
            for value in argument.get_default_values().iter().filter(|_| takes_value) {
                roff.text([roman(format!("[default: {}]", value.to_string_lossy()))]);
            }
            for value in argument.get_possible_values() {
                let help = value.get_help().map(|help| format!(": {help}"));
                roff.control("br", []);
                roff.text([bold(value.get_name()), roman(help.unwrap_or_default())]);
            }
        }
    }
}

/// The synopsis of a command, without the common options.
fn usage(command: &Command) -> String {
    let mut command = command.clone();
    let usage = command.render_usage().to_string();
    usage.trim_start_matches("Usage: ").to_owned()
}

fn examples(roff: &mut Roff) {
    roff.control("SH", ["EXAMPLES"]);
    for (what, example) in EXAMPLES {
        roff.control("PP", []);
        roff.text([roman(what)]);
        roff.control("PP", []);
        roff.control("RS", ["4"]);
        roff.control("nf", []);
        roff.text([bold(example)]);
        roff.control("fi", []);
        roff.control("RE", []);
    }
}
