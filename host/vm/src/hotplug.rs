// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Hotplug of balloon devices and memory.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use balloon_control::{Begun, HintAction, Progress, Request, RequestStatus};
use serde_json::{Value, json};

use crate::config::Config;
use crate::daemon::Daemon;
use crate::device::vhost_user_balloon;
use crate::driver::Driver;
use crate::guest::Guest;
use crate::size::Size;
use crate::stopwatch::PATIENCE;

impl Config {
    /// Adds a port with the id `port0` for hotplug.
    pub fn hotplug_port(self) -> Self {
        self.extra_device("pcie-root-port,id=port0,chassis=1")
    }

    /// Adds a slot for a memory module of up to this size, which can be unplugged again.
    pub fn memory_slot(self, size: Size) -> Self {
        let most = self.memory + size;
        self.parameter("memhp_default_state=online_movable")
            .argument("-m", &format!("slots=1,maxmem={}B", most.as_bytes()))
    }
}

impl Guest {
    /// Plugs a balloon, which must have the id `balloon0`, and waits until the driver uses it.
    pub fn plug_balloon(&self, device: &Value) -> Result<()> {
        self.qmp().execute::<Value>("device_add", device)?;
        self.wait_balloon()
    }

    /// Waits until a driver and its balloon are ready for each other.
    pub fn wait_balloon(&self) -> Result<()> {
        self.wait_until("a driver for a new device", PATIENCE, || self.has_balloon())
    }

    /// Whether a driver and its balloon are ready for each other.
    pub fn has_balloon(&self) -> Result<bool> {
        let status =
            self.sh("cat /sys/bus/virtio/drivers/virtio_balloon*/virtio*/status || true")?;
        // The last digit has all bits if the device is ready. The first digit has the failure bit.
        Ok(status.trim_end().ends_with("0f"))
    }

    /// Whether a driver is loaded.
    pub fn is_loaded(&self, driver: Driver) -> Result<bool> {
        let modules = self.read_file("/proc/modules")?;
        Ok(modules
            .lines()
            .any(|line| line.split(' ').next() == Some(driver.name())))
    }

    /// Unplugs the balloon, and waits until it is gone.
    pub fn unplug_balloon(&self) -> Result<()> {
        // It may already be gone. On resume a guest repeats its last write to the slot. If that
        // write powered off the slot, QEMU unplugs a device that was plugged since.
        let devices: Vec<Value> = self
            .qmp()
            .execute("qom-list", &json!({ "path": "/machine/peripheral" }))?;
        if devices.iter().any(|device| device["name"] == "balloon0") {
            self.unplug("balloon0")?;
        }
        Ok(())
    }

    fn unplug(&self, id: &str) -> Result<()> {
        let mark = self.qmp().mark();
        self.qmp()
            .execute::<Value>("device_del", &json!({ "id": id }))?;
        self.qmp().wait_event(mark, PATIENCE, |event| {
            event.name == "DEVICE_DELETED" && event.data["device"] == id
        })?;
        Ok(())
    }

    /// Plugs a memory module, and waits until the guest uses all of it. For guests with
    /// [`Config::memory_slot`].
    pub fn plug_memory(&self, size: Size) -> Result<()> {
        // A balloon may take some of it at once, and the total excludes that memory.
        let all = || self.meminfo().map(|memory| memory.total + memory.balloon);
        let total = all()? + size;
        let backend = json!({
            "qom-type": "memory-backend-memfd", "id": "module", "size": size.as_bytes(), "share": true,
        });
        self.qmp().execute::<Value>("object-add", &backend)?;
        let device = json!({ "driver": "pc-dimm", "id": "dimm0", "memdev": "module" });
        self.qmp().execute::<Value>("device_add", &device)?;
        self.wait_until("more memory", PATIENCE, || Ok(all()? >= total))
    }

    /// Unplugs the memory module. The guest must offline the memory first.
    pub fn unplug_memory(&self) -> Result<()> {
        self.unplug("dimm0")?;
        self.qmp()
            .execute::<Value>("object-del", &json!({ "id": "module" }))?;
        Ok(())
    }

    /// Returns unused memory to the host through a balloon device that is plugged only for that.
    /// For guests with [`Config::hotplug_port`] and no other balloon.
    ///
    /// # Errors
    ///
    /// The guest has no driver for it, or does not complete the request.
    pub fn reclaim(&self) -> Result<()> {
        let daemon = self.plug_daemon()?;
        self.wait_balloon()?;
        self.reclaim_with(&daemon)?;
        self.unplug_daemon(daemon)
    }

    /// The same through the balloon of `daemon`.
    ///
    /// # Errors
    ///
    /// The guest does not complete the request.
    pub fn reclaim_with(&self, daemon: &Daemon) -> Result<()> {
        let request = Request::Reclaim {
            block: 2 << 20,
            start: 0,
            end: 0,
        };
        let begun = daemon.call(&request)?;
        self.complete(daemon, begun)?;
        Ok(())
    }

    /// Makes the guest hint its free memory to `daemon`, and take it back.
    ///
    /// # Errors
    ///
    /// The guest does not hint most of it, or does not take it back.
    pub fn hint_with(&self, daemon: &Daemon) -> Result<()> {
        let hint = |action| daemon.call::<Value>(&Request::Hints { action });
        let hinted = || -> Result<Size> { Ok(Size::bytes(daemon.info()?.counters.hinted)) };
        let (free, before) = (self.free()?, hinted()?);
        hint(HintAction::Start)?;
        self.wait_until("hints", PATIENCE, || {
            Ok(hinted()? > before + Size::mib(free.as_mib() / 2))
        })?;
        hint(HintAction::Done)?;
        self.wait_until("all memory is free again", PATIENCE, || {
            Ok(self.free()? + Size::gib(1) > free)
        })
    }

    /// Plugs a balloon with a daemon of its own. For guests with [`Config::hotplug_port`] and no other
    /// balloon.
    pub fn plug_daemon(&self) -> Result<Daemon> {
        let daemon = self.config().start_daemon()?;
        self.connect("balloon", &daemon.socket())?;
        let properties = self.config().device.properties();
        let mut device = vhost_user_balloon("pci", "balloon", &properties);
        device["bus"] = json!("port0");
        self.qmp().execute::<Value>("device_add", &device)?;
        Ok(daemon)
    }

    /// Unplugs the balloon of `daemon`, and waits until it is gone.
    pub fn unplug_daemon(&self, daemon: Daemon) -> Result<()> {
        self.unplug_balloon()?;
        self.disconnect("balloon")?;
        drop(daemon);
        Ok(())
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
    pub fn disconnect(&self, chardev: &str) -> Result<()> {
        // QEMU may still use it for a moment.
        self.wait_until("a device that is gone", PATIENCE, || {
            let gone = self
                .qmp()
                .execute::<Value>("chardev-remove", &json!({ "id": chardev }));
            Ok(gone.is_ok())
        })
    }

    /// Waits until the guest has completed a request of a daemon.
    ///
    /// # Errors
    ///
    /// It ends in another way, or not at all.
    pub fn complete(&self, daemon: &Daemon, begun: Begun) -> Result<Progress> {
        let progress = self.end(daemon, begun)?;
        ensure!(
            progress.status == RequestStatus::Complete,
            "the request ends with {:?}",
            progress.status
        );
        Ok(progress)
    }

    /// Waits until a request of a daemon has ended, with any status.
    ///
    /// # Errors
    ///
    /// It does not end.
    pub fn end(&self, daemon: &Daemon, begun: Begun) -> Result<Progress> {
        let mut last = None;
        self.wait_until("the end of an answer", PATIENCE, || {
            let progress: Progress = daemon.call(&Request::Progress { id: begun.id })?;
            last = Some(progress);
            Ok(!matches!(
                progress.status,
                RequestStatus::Waiting | RequestStatus::Open
            ))
        })?;
        last.context("it was waited for")
    }
}
