// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Loads: processes that use the guest's memory. Each is this program, with the load as an
//! argument. It writes reports to its standard output, one line of JSON each, and stops when its
//! standard input is closed.

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, LazyLock, Mutex};
use std::thread;

use agent::{Load, LoadId, LoadStatus, Progress};
use anyhow::{Context, Result};

use crate::process;

mod child;
mod churn;
mod compute;
mod copy;
mod fragment;
mod hog;
mod hold;
#[expect(unsafe_code, reason = "a file that is mapped may change")]
mod map;
mod pin;
mod tick;
mod touch;

use child::Stop;

/// Makes this program run a load, instead of the guest's init.
pub(crate) const ARGUMENT: &str = "load";

static LOADS: LazyLock<Mutex<HashMap<LoadId, Arc<Running>>>> = LazyLock::new(Mutex::default);

/// A load as its parent sees it.
struct Running {
    stdin: Mutex<Option<std::process::ChildStdin>>,
    status: Mutex<LoadStatus>,
    ended: Condvar,
}

/// Starts a load.
pub(crate) fn start(load: Load) -> Result<LoadId> {
    let mut child = Command::new("/proc/self/exe")
        .args([ARGUMENT, &serde_json::to_string(&load)?])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting a load")?;
    let id = LoadId(child.id());
    let running = Arc::new(Running {
        stdin: Mutex::new(child.stdin.take()),
        status: Mutex::new(LoadStatus {
            progress: Progress::default(),
            exit: None,
            stderr: String::new(),
        }),
        ended: Condvar::new(),
    });
    LOADS
        .lock()
        .expect("a lock")
        .insert(id, Arc::clone(&running));
    thread::spawn(move || watch(child, &running));
    Ok(id)
}

/// Follows a load to its end.
fn watch(mut child: Child, running: &Running) {
    let stdout = child.stdout.take().expect("its output is a pipe");
    for line in BufReader::new(stdout).lines().map_while(Result::ok) {
        if let Ok(progress) = serde_json::from_str(&line) {
            running.status.lock().expect("a lock").progress = progress;
        }
    }
    let mut stderr = String::new();
    let _ = child
        .stderr
        .take()
        .expect("its errors are a pipe")
        .read_to_string(&mut stderr);
    let exit = child.wait().expect("it is this process's child");
    let mut status = running.status.lock().expect("a lock");
    status.stderr = stderr;
    status.exit = Some(process::exit(exit));
    running.ended.notify_all();
}

fn find(id: LoadId) -> Result<Arc<Running>> {
    let loads = LOADS.lock().expect("a lock");
    loads
        .get(&id)
        .cloned()
        .with_context(|| format!("there is no load {}", id.0))
}

/// The status of a load.
pub(crate) fn status(id: LoadId) -> Result<LoadStatus> {
    Ok(find(id)?.status.lock().expect("a lock").clone())
}

/// Asks a load to stop and waits for its end.
pub(crate) fn stop(id: LoadId) -> Result<LoadStatus> {
    let load = find(id)?;
    load.stdin.lock().expect("a lock").take();
    let status = load
        .ended
        .wait_while(load.status.lock().expect("a lock"), |status| {
            status.exit.is_none()
        })
        .expect("a lock");
    Ok(status.clone())
}

/// The load's own process.
pub(crate) fn run(load: &str) -> Result<()> {
    // When memory runs out, the kernel must kill the loads and not the agent.
    fs::write("/proc/self/oom_score_adj", "0")?;
    let stop = Stop::when_stdin_closes();
    match serde_json::from_str(load).context("reading what load to run")? {
        Load::Hold { mib, threads } => hold::run(mib, threads, stop),
        Load::Touch { mib } => touch::run(mib),
        Load::Hog { mib } => hog::run(mib, stop),
        Load::Fragment { mib } => fragment::run(mib, stop),
        Load::Copy { mib, threads } => copy::run(mib, threads, stop),
        Load::Compute { threads } => compute::run(threads, stop),
        Load::Tick { microseconds } => tick::run(microseconds, stop),
        Load::Map { mib } => map::run(mib, stop),
        Load::Pin => pin::run(stop),
        Load::Churn { mib, threads, seed } => churn::run(mib, threads, seed, stop),
    }
}
