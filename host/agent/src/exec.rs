// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Running programs to their end.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use agent::{Exit, Output};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::process;

const TOOLS: &str = "/bin/busybox";

/// Installs the shell's tools under their names.
pub(crate) fn install_tools() -> Result<()> {
    let status = Command::new(TOOLS)
        .args(["--install", "-s", "/bin"])
        .status()?;
    ensure!(status.success(), "{TOOLS} cannot install its names");
    Ok(())
}

/// Runs a program, and kills it and its children after `timeout`, if there is one.
pub(crate) fn run(argv: &[String], timeout: Option<Duration>) -> Result<Output> {
    let (program, arguments) = argv.split_first().context("there is no program to run")?;
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let group = Pid::from_raw(child.id().try_into()?);

    let (ended, output) = mpsc::channel();
    thread::spawn(move || ended.send(child.wait_with_output()));
    let end = match timeout {
        Some(timeout) => output.recv_timeout(timeout),
        None => output.recv().map_err(RecvTimeoutError::from),
    };
    let (exit, output) = match end {
        Ok(output) => {
            let output = output?;
            (process::exit(output.status), Some(output))
        }
        Err(_) => {
            killpg(group, Signal::SIGKILL)?;
            // The signal does not end a process that waits in the kernel, so do not wait for it.
            (
                Exit::TimedOut,
                output
                    .recv_timeout(Duration::from_secs(1))
                    .ok()
                    .transpose()?,
            )
        }
    };
    let text =
        |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
    Ok(Output {
        exit,
        stdout: text(output.as_ref().map(|output| &output.stdout[..])),
        stderr: text(output.as_ref().map(|output| &output.stderr[..])),
    })
}
