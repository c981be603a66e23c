// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-mem, instead of a balloon or along with one.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::config::Config;
use crate::guest::Guest;
use crate::size::Size;
use crate::stopwatch::PATIENCE;

/// The file that has the driver's module, for kernels that do not have it built in.
pub const VIRTIO_MEM: &str = "virtio_mem.ko";

/// The polling interval.
const INTERVAL: Duration = Duration::from_millis(5);

impl Config {
    /// Adds a virtio-mem device with up to `more` memory, none of it plugged at first, and no balloon.
    pub fn virtio_mem(self, more: Size) -> Self {
        let base = self.memory - more;
        self.memory(base)
            .balloon(None)
            .device_of_memory("ram", more, "online_movable")
    }

    /// Adds a virtio-mem device along with the balloon. It can have up to `more` memory, none of it plugged at first.
    /// `online` sets how the guest's kernel onlines that memory.
    pub fn virtio_mem_with_balloon(self, more: Size, online: &str) -> Self {
        self.device_of_memory("memfd,share=on,reserve=off", more, online)
    }

    fn device_of_memory(self, backend: &str, more: Size, online: &str) -> Self {
        let most = self.memory + more;
        self.parameter(&format!("memhp_default_state={online}"))
            .argument("-m", &format!("maxmem={}B", most.as_bytes()))
            .argument(
                "-object",
                &format!("memory-backend-{backend},id=more,size={}", more.as_bytes()),
            )
            .extra_device("virtio-mem-pci,id=more0,memdev=more,requested-size=0")
    }
}

impl Guest {
    /// Loads virtio-mem's driver, unless the kernel has it built in.
    pub fn load_virtio_mem(&self) -> Result<()> {
        let load =
            format!("[ -e /sys/bus/virtio/drivers/virtio_mem ] || insmod /modules/{VIRTIO_MEM}");
        self.sh(&load)?;
        Ok(())
    }

    /// Makes the virtio-mem device plug or unplug memory up to `size`. Returns how long it took.
    ///
    /// # Errors
    ///
    /// The plugged size does not change for [`PATIENCE`].
    pub fn plug(&self, size: Size) -> Result<Duration> {
        let start = Instant::now();
        let plugged = self.plug_within(size, PATIENCE)?;
        ensure!(plugged == size, "{plugged} of {size} are plugged");
        Ok(start.elapsed())
    }

    /// Requests `size` from the virtio-mem device. Returns the plugged size when it has not changed for the time
    /// `patience`.
    pub fn plug_within(&self, size: Size, patience: Duration) -> Result<Size> {
        let qmp = self.qmp();
        let (mut last, mut stopwatch) = (None, self.stopwatch());
        qmp.execute::<Value>(
            "qom-set",
            &json!({ "path": "/machine/peripheral/more0", "property": "requested-size", "value": size.as_bytes() }),
        )?;
        loop {
            let is_over = stopwatch.has_passed(patience);
            let devices: Vec<Value> = qmp.execute("query-memory-devices", &json!({}))?;
            let device = devices
                .iter()
                .find(|device| device["data"]["id"] == "more0");
            let said = device.and_then(|device| device["data"]["size"].as_u64());
            let plugged = Size::bytes(said.context("no virtio-mem device says its size")?);
            let has_moved = last.replace(plugged) != Some(plugged);
            if plugged == size || is_over && !has_moved {
                return Ok(plugged);
            }
            if has_moved {
                stopwatch.restart();
            }
            thread::sleep(self.config().polling.unwrap_or(INTERVAL));
        }
    }
}
