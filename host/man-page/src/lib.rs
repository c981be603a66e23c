// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The man page of a program: the sections that the definition of its command line gives, and others.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use clap::{Arg, Command};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

/// A man page.
pub struct Page {
    /// The sections up to the description.
    man: Man,
    /// The sections after these.
    more: Roff,
}

impl Page {
    /// The page of a program, with all of its commands: the generator would write a page for each.
    pub fn new(command: Command, section: u8) -> Self {
        let mut command = command.disable_help_subcommand(true);
        command.build();
        let mut more = Roff::new();
        more.control("SH", ["OPTIONS"]);
        let options = command.get_arguments();
        for option in options.filter(|option| !option.is_hide_set()) {
            describe(&mut more, option);
        }
        if command.has_subcommands() {
            more.control("SH", ["COMMANDS"]);
            commands(&mut more, &command);
        }
        let usage = usage(&command);
        let man = Man::new(command.override_usage(usage)).section(section.to_string());
        Self { man, more }
    }

    /// Adds a section of terms, such as files, each with its meaning.
    pub fn terms<T: Into<String>, M: Into<String>>(
        &mut self,
        title: &str,
        terms: impl IntoIterator<Item = (T, M)>,
    ) {
        self.more.control("SH", [title]);
        for (term, meaning) in terms {
            self.more.control("TP", []);
            self.more.text([bold(term)]);
            self.more.text([roman(meaning)]);
        }
    }

    /// Adds the section of examples: what each is for, and the command.
    pub fn examples(&mut self, examples: &[(&str, &str)]) {
        self.more.control("SH", ["EXAMPLES"]);
        for (purpose, example) in examples {
            self.more.control("PP", []);
            self.more.text([roman(*purpose)]);
            self.more.control("PP", []);
            self.more.control("RS", ["4"]);
            self.more.control("nf", []);
            self.more.text([bold(*example)]);
            self.more.control("fi", []);
            self.more.control("RE", []);
        }
    }

    /// Adds the section that refers to other pages, each by its name and number.
    pub fn see_also(&mut self, pages: &[(&str, u8)]) {
        let mut line = Vec::new();
        for (name, number) in pages {
            if !line.is_empty() {
                line.push(roman(", "));
            }
            line.extend([bold(*name), roman(format!("({number})"))]);
        }
        self.more.control("SH", ["SEE ALSO"]);
        self.more.text(line);
    }

    /// The page's file in a directory.
    pub fn path(&self, directory: &Path) -> PathBuf {
        directory.join(self.man.get_filename())
    }

    /// Writes the page into a directory.
    ///
    /// # Errors
    ///
    /// It cannot be written there.
    pub fn write(&self, directory: &Path) -> io::Result<()> {
        let mut file = File::create(self.path(directory))?;
        self.man.render_title(&mut file)?;
        // Options stay whole, and lines have no gaps.
        Roff::new()
            .control("nh", [])
            .control("ad", ["l"])
            .to_writer(&mut file)?;
        self.man.render_name_section(&mut file)?;
        self.man.render_synopsis_section(&mut file)?;
        self.man.render_description_section(&mut file)?;
        self.more.to_writer(&mut file)
    }
}

/// Adds the commands of a program or of a command, without the options that all of them have.
fn commands(roff: &mut Roff, parent: &Command) {
    let visible = parent.get_subcommands().filter(|of| !of.is_hide_set());
    for command in visible {
        roff.control("SS", [usage(command).as_str()]);
        if let Some(about) = command.get_long_about().or(command.get_about()) {
            paragraphs(roff, "PP", &about.to_string());
        }
        for argument in command.get_arguments() {
            if !argument.is_global_set() && argument.get_id() != "help" {
                describe(roff, argument);
            }
        }
        commands(roff, command);
    }
}

/// Adds an argument, with its default and its values.
fn describe(roff: &mut Roff, argument: &Arg) {
    roff.control("TP", []);
    let short = argument.get_short().map(|letter| format!("-{letter}, "));
    let short = short.unwrap_or_default();
    roff.text([bold(format!("{short}{argument}"))]);
    if let Some(help) = argument.get_long_help().or(argument.get_help()) {
        paragraphs(roff, "IP", &help.to_string());
    }
    for value in argument.get_possible_values() {
        let help = value.get_help().map(|help| format!(": {help}"));
        roff.control("br", []);
        roff.text([bold(value.get_name()), roman(help.unwrap_or_default())]);
    }
    let takes_value = argument.get_action().takes_values();
    for value in argument.get_default_values().iter().filter(|_| takes_value) {
        roff.control("br", []);
        roff.text([roman(format!("[default: {}]", value.to_string_lossy()))]);
    }
    if let Some(variable) = argument.get_env() {
        roff.control("br", []);
        let variable = variable.to_string_lossy();
        roff.text([roman(format!("[environment: {variable}]"))]);
    }
}

/// Adds lines of text, with this macro where the text has an empty line.
fn paragraphs(roff: &mut Roff, next: &str, text: &str) {
    for line in text.lines() {
        match line {
            "" => roff.control(next, []),
            line => roff.text([roman(line)]),
        };
    }
}

/// The synopsis of a command.
fn usage(command: &Command) -> String {
    let mut command = command.clone();
    let usage = command.render_usage().to_string();
    usage.trim_start_matches("Usage: ").to_owned()
}
