// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's init: mounts what is to be mounted and then does what the host asks for.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use agent::{Command, PORT, Reply, Request, Response};
use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

mod exec;
mod load;
mod process;

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        Some(load::ARGUMENT) => {
            load::run(&arguments.next().context("the load to run is not named")?)
        }
        _ => init(),
    }
}

/// What process 1 does. Its end would be the kernel's, which says why on the console.
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
    // The host must reach the agent most of all when the guest is out of memory.
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    exec::install_tools()?;
    serve(open_port()?)
}

/// Opens the port, which appears when its driver has found it.
fn open_port() -> Result<File> {
    loop {
        if let Some(device) = find_port()? {
            return OpenOptions::new()
                .read(true)
                .write(true)
                .open(&device)
                .with_context(|| format!("opening {}", device.display()));
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn find_port() -> Result<Option<PathBuf>> {
    let Ok(ports) = fs::read_dir("/sys/class/virtio-ports") else {
        return Ok(None);
    };
    for port in ports {
        let port = port?;
        let name = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        let device = PathBuf::from("/dev").join(port.file_name());
        if name.trim_end() == PORT && device.exists() {
            return Ok(Some(device));
        }
    }
    Ok(None)
}

/// Answers requests for as long as the host sends any.
fn serve(port: File) -> Result<()> {
    let answers = Arc::new(Mutex::new(port.try_clone()?));
    for line in BufReader::new(port).lines() {
        let request: Request = serde_json::from_str(&line?).context("reading a request")?;
        let answers = Arc::clone(&answers);
        thread::spawn(move || {
            let result = execute(request.command).map_err(|error| format!("{error:#}"));
            let response = Response {
                id: request.id,
                result,
            };
            let mut line = serde_json::to_vec(&response).expect("an answer is representable");
            line.push(b'\n');
            // The host is gone when this fails, and nobody is left to be told.
            let _ = answers
                .lock()
                .expect("no thread panics while it answers")
                .write_all(&line);
        });
    }
    bail!("the host closed the port");
}

fn execute(command: Command) -> Result<Reply> {
    Ok(match command {
        Command::Ping => Reply::Done,
        Command::Exec { argv, timeout_ms } => {
            Reply::Output(exec::run(&argv, Duration::from_millis(timeout_ms))?)
        }
        Command::ReadFile { path } => {
            let contents = fs::read(&path).with_context(|| format!("reading {path}"))?;
            Reply::Text(String::from_utf8_lossy(&contents).into_owned())
        }
        Command::WriteFile { path, contents } => {
            OpenOptions::new()
                .write(true)
                .open(&path)
                .and_then(|mut file| file.write_all(contents.as_bytes()))
                .with_context(|| format!("writing '{}' to {path}", contents.trim_end()))?;
            Reply::Done
        }
        Command::StartLoad(load) => Reply::Load(load::start(load)?),
        Command::LoadStatus(id) => Reply::Status(load::status(id)?),
        Command::StopLoad(id) => Reply::Status(load::stop(id)?),
        Command::PowerOff => match reboot(power_off_mode())? {},
    })
}

/// How a guest switches itself off. A machine without ACPI cannot, but QEMU ends as well when it is
/// told not to reboot one.
fn power_off_mode() -> RebootMode {
    if Path::new("/sys/firmware/acpi").exists() {
        RebootMode::RB_POWER_OFF
    } else {
        RebootMode::RB_AUTOBOOT
    }
}
