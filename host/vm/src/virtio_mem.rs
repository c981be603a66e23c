// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-mem: a host may use it instead of a balloon, or along with one.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::config::Config;
use crate::guest::Guest;
use crate::size::Size;

/// How often QEMU is asked how far the guest is.
const INTERVAL: Duration = Duration::from_millis(5);

const PATIENCE: Duration = Duration::from_secs(60);

impl Config {
    /// Has up to `more` of the guest's memory come from a virtio-mem device, which has none at first. There is no
    /// balloon then.
    pub fn virtio_mem(self, more: Size) -> Self {
        let base = self.memory - more;
        self.memory(base)
            .balloon(None)
            .device_of_memory("ram", more)
    }

    /// Gives the guest a virtio-mem device along with its balloon. It can have up to `more` and has no memory at first.
    pub fn virtio_mem_with_balloon(self, more: Size) -> Self {
        self.device_of_memory("memfd,share=on,reserve=off", more)
    }

    fn device_of_memory(self, backend: &str, more: Size) -> Self {
        let most = self.memory + more;
        self.parameter("memhp_default_state=online_movable")
            .argument("-m", &format!("maxmem={}B", most.as_bytes()))
            .argument(
                "-object",
                &format!("memory-backend-{backend},id=more,size={}", more.as_bytes()),
            )
            .extra_device("virtio-mem-pci,id=more0,memdev=more,requested-size=0")
    }
}

impl Guest {
    /// Has the virtio-mem device give the guest `size`, or take back what is more. Returns how long it took.
    ///
    /// # Errors
    ///
    /// The size of what is plugged does not change for a minute.
    pub fn plug(&self, size: Size) -> Result<Duration> {
        let qmp = self.qmp();
        let (start, mut last, mut stopwatch) = (Instant::now(), None, self.stopwatch());
        qmp.execute::<Value>(
            "qom-set",
            &json!({ "path": "/machine/peripheral/more0", "property": "requested-size", "value": size.as_bytes() }),
        )?;
        loop {
            let devices: Vec<Value> = qmp.execute("query-memory-devices", &json!({}))?;
            let device = devices
                .iter()
                .find(|device| device["data"]["id"] == "more0");
            let said = device.and_then(|device| device["data"]["size"].as_u64());
            let plugged = said.context("no virtio-mem device says its size")?;
            if plugged == size.as_bytes() {
                return Ok(start.elapsed());
            }
            if last != Some(plugged) {
                last = Some(plugged);
                stopwatch.restart();
            }
            ensure!(
                !stopwatch.has_passed(PATIENCE),
                "{} of {size} are plugged",
                Size::bytes(plugged)
            );
            thread::sleep(INTERVAL);
        }
    }
}
