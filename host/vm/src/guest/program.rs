// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Programs, files and modules in a guest.

use std::time::Duration;

use agent::{Command, Exit, Output, Reply};
use anyhow::{Result, bail, ensure};

use super::Guest;
use crate::agent::Pending;
use crate::driver::Driver;
use crate::stopwatch::PATIENCE;

impl Guest {
    /// Loads a module with its parameters, such as `floor_mib=64`.
    pub fn insmod(&self, driver: Driver, parameters: &[&str]) -> Result<()> {
        let module = format!("/modules/{}", driver.file());
        let argv = [&["insmod", &module], parameters].concat();
        let pending = self.start(&argv, None)?;
        let output = program_output(self.wait_printing(&pending)?)?;
        successful(&argv, output)?;
        Ok(())
    }

    /// Unloads a module.
    pub fn rmmod(&self, driver: Driver) -> Result<()> {
        self.save_coverage()?;
        let argv = ["rmmod", driver.name()];
        let pending = self.start(&argv, None)?;
        let output = program_output(self.wait(&pending, PATIENCE)?)?;
        successful(&argv, output)?;
        Ok(())
    }

    /// Runs a program in the guest and returns its result, whatever it is.
    pub fn exec(&self, argv: &[&str]) -> Result<Output> {
        self.output(&self.start(argv, None)?, PATIENCE)
    }

    /// The same, but the agent kills the program after `timeout`.
    pub fn exec_within(&self, argv: &[&str], timeout: Duration) -> Result<Output> {
        self.output(&self.start(argv, Some(timeout))?, timeout)
    }

    /// Starts a program in the guest; [`Guest::output`] waits for its end. The agent kills it after `timeout`.
    pub fn start(&self, argv: &[&str], timeout: Option<Duration>) -> Result<Pending> {
        let timeout_ms = timeout.map(|timeout| timeout.as_millis().try_into());
        self.home().agent.send(Command::Exec {
            argv: argv.iter().map(|&argument| argument.to_owned()).collect(),
            timeout_ms: timeout_ms.transpose()?,
        })
    }

    /// Waits for the end of a program that has been started.
    pub fn output(&self, pending: &Pending, timeout: Duration) -> Result<Output> {
        // The agent may have to kill the program first. The additional time is for the answer.
        program_output(self.wait(pending, timeout + Duration::from_secs(10))?)
    }

    /// Runs a program that must succeed, and returns its standard output.
    pub fn run(&self, argv: &[&str]) -> Result<String> {
        successful(argv, self.exec(argv)?)
    }

    /// Runs a shell command that must succeed, and returns its standard output.
    pub fn sh(&self, line: &str) -> Result<String> {
        self.run(&["sh", "-c", line])
    }

    /// Reads a file of the guest.
    pub fn read_file(&self, path: &str) -> Result<String> {
        match self.call(
            Command::ReadFile {
                path: path.to_owned(),
            },
            PATIENCE,
        )? {
            Reply::Text(text) => Ok(text),
            reply => bail!("the agent answers {reply:?} to a read"),
        }
    }

    /// Writes a file of the guest, in one write.
    pub fn write_file(&self, path: &str, contents: &str) -> Result<()> {
        let (path, contents) = (path.to_owned(), contents.to_owned());
        self.call(Command::WriteFile { path, contents }, PATIENCE)?;
        Ok(())
    }

    /// Writes a file of the guest, and waits until the kernel announces a change of an attribute in sysfs. Returns the
    /// attribute's new value.
    pub fn watch(&self, attribute: &str, path: &str, contents: &str) -> Result<String> {
        let command = Command::Watch {
            attribute: attribute.to_owned(),
            path: path.to_owned(),
            contents: contents.to_owned(),
            timeout_ms: u64::try_from(PATIENCE.as_millis() / 2)?,
        };
        match self.call(command, PATIENCE)? {
            Reply::Text(text) => Ok(text),
            reply => bail!("the agent answers {reply:?} to a watch"),
        }
    }
}

/// The result of a program.
fn program_output(reply: Reply) -> Result<Output> {
    match reply {
        Reply::Output(output) => Ok(output),
        reply => bail!("the agent answers {reply:?} to a program"),
    }
}

/// The standard output of a program that must succeed.
fn successful(argv: &[&str], output: Output) -> Result<String> {
    ensure!(
        output.exit == Exit::Status(0),
        "'{}' ends with {:?} in the guest: {}",
        argv.join(" "),
        output.exit,
        output.stderr.trim_end()
    );
    Ok(output.stdout)
}
