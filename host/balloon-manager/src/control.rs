// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The manager's control socket: a JSON object on a line for each request and each response, as with the daemon.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use balloon_control::{Access, ControlError, ErrorKind, SocketFile, listen};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::manager::Manager;
use crate::{metrics, text};

/// Where the socket is.
pub(crate) const SOCKET: &str = "/run/balloon-manager/control.sock";

/// The longest request, and how long a client may take to send it or to read the response.
const MAX_REQUEST: u64 = 64 << 10;
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a reservation may last, in seconds.
const LONGEST: u64 = 86_400;

/// A client's request.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum Request {
    /// The host and all VMs.
    Status {},
    /// A VM, and its last actions.
    Explain { vm: String },
    /// Memory for a VM that is about to start.
    Reserve {
        bytes: u64,
        seconds: u64,
        /// The VM's name. Without it the first VM that starts uses the reservation that fits it best.
        #[serde(skip_serializing_if = "Option::is_none")]
        vm: Option<String>,
    },
    /// Whether a reservation has its memory.
    Reservation { id: u32 },
    /// Ends a reservation.
    Release { id: u32 },
    /// Leaves a VM alone, or manages it again.
    Pause { vm: String, paused: bool },
    /// For Prometheus.
    Metrics {},
}

/// How long to wait after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A request, and where its response goes.
pub(crate) type Call = (Request, oneshot::Sender<Value>);

/// Listens on the socket, and passes requests on. Creates the socket's directory, for this user only, if it is missing.
pub(crate) fn serve(path: &Path, calls: mpsc::Sender<Call>) -> Result<SocketFile> {
    if let Some(directory) = path.parent() {
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
    }
    let (listener, file) = listen(path, Access::default())?;
    listener.set_nonblocking(true)?;
    let listener = UnixListener::from_std(listener).context("cannot listen")?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(answer(stream, calls.clone()))),
                // File descriptors may be available again later.
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    });
    Ok(file)
}

/// Answers one client, until it disconnects or takes too long.
async fn answer(stream: UnixStream, calls: mpsc::Sender<Call>) -> Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let mut limited = (&mut stream).take(MAX_REQUEST);
        timeout(PATIENCE, limited.read_until(b'\n', &mut line)).await??;
        if line.is_empty() {
            return Ok(());
        }
        let whole = line.last() == Some(&b'\n');
        let response = match serde_json::from_slice(&line) {
            Ok(request) => {
                let (sender, receiver) = oneshot::channel();
                calls.send((request, sender)).await?;
                receiver.await?
            }
            Err(error) => failure(
                ErrorKind::BadRequest,
                &format!("the request is not understood: {error}"),
                "send one JSON object a line, such as {\"command\":\"status\"}",
            ),
        };
        let mut response = serde_json::to_vec(&response)?;
        response.push(b'\n');
        timeout(PATIENCE, stream.get_mut().write_all(&response)).await??;
        if !whole {
            return Ok(());
        }
    }
}

fn failure(kind: ErrorKind, message: &str, advice: &str) -> Value {
    json!({ "error": ControlError::new(kind, message, advice) })
}

fn no_vm(name: &str) -> Value {
    failure(
        ErrorKind::OutOfRange,
        &format!("there is no VM '{name}'"),
        "balloon-manager top lists the VMs",
    )
}

/// Executes a request.
pub(crate) fn handle(manager: &mut Manager, request: Request) -> Value {
    let unknown = |id| {
        failure(
            ErrorKind::OutOfRange,
            &format!("there is no reservation {id}"),
            "reserve again: a reservation ends with its time",
        )
    };
    match request {
        Request::Status {} => json!({ "ok": manager.status() }),
        Request::Explain { vm } => match manager.history(&vm) {
            Some((vm, history)) => json!({ "ok": { "vm": vm, "history": history } }),
            None => no_vm(&vm),
        },
        Request::Pause { vm, paused } => match manager.pause(&vm, paused) {
            true => json!({ "ok": {} }),
            false => no_vm(&vm),
        },
        Request::Reserve { seconds, .. } if !(1..=LONGEST).contains(&seconds) => failure(
            ErrorKind::OutOfRange,
            &format!("a reservation cannot last {seconds} s"),
            "reserve for 1 to 86400 seconds",
        ),
        Request::Reserve { bytes, seconds, vm } => {
            match manager.reserve(bytes, Duration::from_secs(seconds), vm) {
                Ok(reserved) => json!({ "ok": reserved }),
                Err(refusal) => failure(
                    ErrorKind::OutOfRange,
                    &format!("there is no room: {}", text::refusal(&refusal)),
                    "reserve less, lower floors, or move a VM to another host",
                ),
            }
        }
        Request::Reservation { id } => match manager.reservation(id) {
            Some(reserved) => json!({ "ok": reserved }),
            None => unknown(id),
        },
        Request::Release { id } => match manager.release(id) {
            true => json!({ "ok": {} }),
            false => unknown(id),
        },
        Request::Metrics {} => json!({ "ok": { "text": metrics::text(manager) } }),
    }
}
