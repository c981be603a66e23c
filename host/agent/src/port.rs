// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The port that leads to the host.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::path::Path;
use std::thread;
use std::time::Duration;

use agent::PORT;
use anyhow::{Context, Result};

/// How often the agent checks whether the port exists.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(5);

const PORTS: &str = "/sys/class/virtio-ports";
const DRIVER: &str = "/sys/bus/virtio/drivers/virtio_console";

/// Opens the port as soon as it exists.
pub(crate) fn open() -> File {
    loop {
        if let Some(port) = find().and_then(|name| {
            let device = Path::new("/dev").join(name);
            OpenOptions::new().read(true).write(true).open(device).ok()
        }) {
            return port;
        }
        thread::sleep(POLL_INTERVAL);
    }
}

/// Runs a function while the port has no driver. A driver that is bound during a suspend may miss that
/// the host is connected, and then transports no more data.
pub(crate) fn unbound<T>(action: impl FnOnce() -> T) -> Result<T> {
    let port = Path::new(PORTS).join(find().context("the port is gone")?);
    let device = fs::read_link(port.join("device"))?;
    let name = device.file_name().context("a device has a name")?;
    let tell_driver = |file: &str| {
        fs::write(Path::new(DRIVER).join(file), name.as_encoded_bytes())
            .with_context(|| format!("writing to {DRIVER}/{file}"))
    };
    tell_driver("unbind")?;
    let result = action();
    tell_driver("bind")?;
    Ok(result)
}

/// The port's name, once its driver knows it.
fn find() -> Option<OsString> {
    let is_ours = |name: &OsString| {
        fs::read_to_string(Path::new(PORTS).join(name).join("name"))
            .is_ok_and(|name| name.trim_end() == PORT)
    };
    fs::read_dir(PORTS)
        .ok()?
        .map_while(Result::ok)
        .map(|port| port.file_name())
        .find(is_ours)
}
