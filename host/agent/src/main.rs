// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's init: mounts file systems, and then executes the host's requests.

use std::convert::Infallible;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use agent::{Command, Reply, Request, Response};
use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

mod exec;
mod load;
mod pages;
mod port;
#[expect(unsafe_code, reason = "there is no crate for a kernel that takes over")]
mod power;
mod process;
mod watch;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(load::ARGUMENT) => {
            load::run(&arguments.next().context("the load to run is not named")?)
        }
        _ => init(),
    }
}

/// The body of process 1. The kernel panics when it ends, and prints the reason on the console.
fn init() -> Result<()> {
    for (what, directory) in [
        ("proc", "/proc"),
        ("sysfs", "/sys"),
        ("devtmpfs", "/dev"),
        ("debugfs", "/sys/kernel/debug"),
        ("tracefs", "/sys/kernel/tracing"),
        ("cgroup2", "/sys/fs/cgroup"),
        ("tmpfs", "/tmp"),
    ] {
        fs::create_dir_all(directory)?;
        mount(
            Some(what),
            directory,
            Some(what),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("mounting {what} on {directory}"))?;
    }
    // The agent must respond when the guest is out of memory.
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    exec::install_tools()?;
    match serve()? {}
}

/// Answers requests for as long as the guest lives.
fn serve() -> Result<Infallible> {
    let answers = Arc::new(Mutex::new(None));
    loop {
        let port = port::open();
        *answers.lock().expect("a lock") = Some(port.try_clone()?);
        // The port disappears when its driver is unbound, and reappears later.
        for line in BufReader::new(port).lines().map_while(Result::ok) {
            let request: Request = serde_json::from_str(&line).context("reading a request")?;
            let answers = Arc::clone(&answers);
            thread::spawn(move || {
                let result = execute(request.command).map_err(|error| format!("{error:#}"));
                let response = Response {
                    id: request.id,
                    result,
                };
                answer(&answers, &response);
            });
        }
        *answers.lock().expect("a lock") = None;
        thread::sleep(port::POLL_INTERVAL);
    }
}

/// Sends an answer as soon as the port is open.
fn answer(port: &Mutex<Option<File>>, response: &Response) {
    let mut line = serde_json::to_vec(response).expect("an answer is representable");
    line.push(b'\n');
    let write = |port: &mut File| port.write_all(&line).is_ok();
    while !port.lock().expect("a lock").as_mut().is_some_and(write) {
        thread::sleep(port::POLL_INTERVAL);
    }
}

fn execute(command: Command) -> Result<Reply> {
    Ok(match command {
        Command::Ping => Reply::Done,
        Command::Exec { argv, timeout_ms } => {
            Reply::Output(exec::run(&argv, timeout_ms.map(Duration::from_millis))?)
        }
        Command::ReadFile { path } => {
            let contents = fs::read(&path).with_context(|| format!("reading {path}"))?;
            Reply::Text(String::from_utf8_lossy(&contents).into_owned())
        }
        Command::WriteFile { path, contents } => {
            write(&path, &contents)?;
            Reply::Done
        }
        Command::Watch {
            attribute,
            path,
            contents,
            timeout_ms,
        } => Reply::Text(watch::change(&attribute, timeout_ms, || {
            write(&path, &contents)
        })?),
        Command::CountPages { start, end, flags } => {
            Reply::Pages(pages::count(start, end, &flags)?)
        }
        Command::StartLoad(load) => Reply::Load(load::start(load)?),
        Command::LoadStatus(id) => Reply::Status(load::status(id)?),
        Command::StopLoad(id) => Reply::Status(load::stop(id)?),
        Command::Sleep { state } => {
            power::sleep(&state)?;
            Reply::Done
        }
        Command::LoadKernel {
            when,
            kernel,
            initramfs,
            command_line,
        } => {
            power::load_kernel(when, &kernel, &initramfs, &command_line)?;
            Reply::Done
        }
        Command::End(end) => match power::end(end)? {},
    })
}

/// Writes a file in one write, instead of what it had. The kernel clears its trace when the file is truncated.
fn write(path: &str, contents: &str) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .truncate(true)
        .open(path)
        .and_then(|mut file| file.write_all(contents.as_bytes()))
        .with_context(|| format!("writing '{}' to {path}", contents.trim_end()))
}
