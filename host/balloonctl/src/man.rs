// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The man page, made from the definition of the command line.

use std::fs;
use std::io;
use std::path::Path;

use clap::{Command, CommandFactory};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use crate::cli::Cli;
use crate::failure::{EXIT_CODES, Failure};

const EXAMPLES: [(&str, &str); 6] = [
    (
        "Ask the guest for half of its memory, and wait for a minute at most:",
        "balloonctl set 50% --wait --timeout 60",
    ),
    ("Let the guest have all of it back:", "balloonctl set 0"),
    (
        "See what the guest uses its memory for, every five seconds and as it is at that moment:",
        "balloonctl stats --fresh --watch 5",
    ),
    (
        "Which of the guest's pages are unused, now that all writes to its memory are logged?",
        "balloonctl unused --out /run/vm/unused-pages",
    ),
    (
        "How much has the guest given away, in bytes?",
        "balloonctl info --json | jq .size",
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
    exit_codes(&mut roff);
    files(&mut roff, command);
    examples(&mut roff);
    roff.control("SH", ["SEE ALSO"]);
    roff.text([bold("vhost-user-balloon"), roman("(8)")]);
    roff.to_writer(&mut page)?;
    Ok(page)
}

/// All commands on the one page: the generator would give each a page of its own.
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

/// How a command is called, without the options that all of them have.
fn usage(command: &Command) -> String {
    let mut command = command.clone();
    let usage = command.render_usage().to_string();
    usage.trim_start_matches("Usage: ").to_owned()
}

fn exit_codes(roff: &mut Roff) {
    roff.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in EXIT_CODES {
        roff.control("TP", []);
        roff.text([bold(code.to_string())]);
        roff.text([roman(meaning)]);
    }
}

fn files(roff: &mut Roff, command: &Command) {
    roff.control("SH", ["FILES"]);
    let socket = command
        .get_arguments()
        .find(|argument| argument.get_id() == "socket");
    for path in socket.into_iter().flat_map(clap::Arg::get_default_values) {
        roff.control("TP", []);
        roff.text([bold(path.to_string_lossy())]);
        roff.text([roman(
            "The control socket, unless --socket or BALLOON_SOCKET names another one. Only the user that the \
             daemon runs as can use it, and root.",
        )]);
    }
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
