// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! virtio-mem: what a host would take in place of a balloon.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::guest::Guest;
use crate::qemu::Config;
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
            .parameter("memhp_default_state=online_movable")
            .argument("-m", &format!("maxmem={}B", (base + more).as_bytes()))
            .argument(
                "-object",
                &format!("memory-backend-ram,id=more,size={}", more.as_bytes()),
            )
            .extra_device("virtio-mem-pci,id=more0,memdev=more,requested-size=0")
    }
}

impl Guest {
    /// Has the virtio-mem device give the guest `size`. Returns how long it took.
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
            let devices: Value = qmp.execute("query-memory-devices", &json!({}))?;
            let plugged = devices[0]["data"]["size"].as_u64().context("a size")?;
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
