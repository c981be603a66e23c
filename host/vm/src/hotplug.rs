// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Balloon devices that come and go while the guest runs.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use balloon_control::{Begun, Progress, Request, RequestStatus};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::device::{Device, vhost_user_balloon};
use crate::guest::Guest;
use crate::qemu::Config;

/// How long a device may take to come or to go.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long the guest may take to answer a request.
const ANSWER_PATIENCE: Duration = Duration::from_secs(180);

impl Config {
    /// Gives the guest a port with the id `port0` that a device can be plugged in.
    pub fn hotplug_port(self) -> Self {
        self.extra_device("pcie-root-port,id=port0,chassis=1")
    }
}

impl Guest {
    /// Gives the guest a balloon, which has to have the id `balloon0`, and waits for the driver to use it.
    pub fn plug_balloon(&self, device: &Value) -> Result<()> {
        self.qmp().execute::<Value>("device_add", device)?;
        self.wait_until("a driver for a new device", PATIENCE, || {
            // The last digit has all bits when both sides are ready.
            let status =
                self.sh("cat /sys/bus/virtio/drivers/virtio_balloon*/virtio*/status || true")?;
            Ok(status.trim_end().ends_with('f'))
        })
    }

    /// Takes the balloon away from the guest, and waits until it is gone.
    pub fn unplug_balloon(&self) -> Result<()> {
        let mark = self.qmp().mark();
        self.qmp()
            .execute::<Value>("device_del", &json!({ "id": "balloon0" }))?;
        self.qmp().wait_event(mark, PATIENCE, |event| {
            event.name == "DEVICE_DELETED" && event.data["device"] == "balloon0"
        })?;
        Ok(())
    }

    /// Has unused memory given back by a balloon device that is there for just as long. For guests with
    /// [`Config::hotplug_port`] and no other balloon.
    ///
    /// # Errors
    ///
    /// The guest has no driver for it, or does not complete the request.
    pub fn reclaim(&self) -> Result<()> {
        let daemon = Daemon::start(self.config())?;
        self.connect("balloon", &daemon.socket())?;
        let mut device = vhost_user_balloon("pci", "balloon", &Device::Extended.properties());
        device["bus"] = json!("port0");
        self.plug_balloon(&device)?;
        let request = Request::Reclaim {
            block: 2 << 20,
            start: 0,
            end: 0,
        };
        let begun = daemon.call(&request)?;
        self.complete(&daemon, begun)?;
        self.unplug_balloon()?;
        self.disconnect("balloon")
    }

    /// Connects QEMU with the `socket` of a device, under the name `chardev`.
    pub(crate) fn connect(&self, chardev: &str, socket: &Path) -> Result<()> {
        let address = json!({ "type": "unix", "data": { "path": socket } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        self.qmp()
            .execute::<Value>("chardev-add", &json!({ "id": chardev, "backend": backend }))?;
        Ok(())
    }

    /// Closes the connection, after the device was unplugged.
    pub(crate) fn disconnect(&self, chardev: &str) -> Result<()> {
        // QEMU may not be done with it for a moment.
        self.wait_until("a device that is gone", PATIENCE, || {
            let gone = self
                .qmp()
                .execute::<Value>("chardev-remove", &json!({ "id": chardev }));
            Ok(gone.is_ok())
        })
    }

    /// Waits until a request that a daemon has made of the guest is completed.
    ///
    /// # Errors
    ///
    /// It ends in another way, or not at all.
    pub fn complete(&self, daemon: &Daemon, begun: Begun) -> Result<Progress> {
        let mut last = None;
        self.wait_until("the end of an answer", ANSWER_PATIENCE, || {
            let progress: Progress = daemon.call(&Request::Progress { id: begun.id })?;
            last = Some(progress);
            Ok(!matches!(
                progress.status,
                RequestStatus::Waiting | RequestStatus::Open
            ))
        })?;
        let progress = last.context("it was waited for")?;
        ensure!(
            progress.status == RequestStatus::Complete,
            "the request ends with {:?}",
            progress.status
        );
        Ok(progress)
    }
}
