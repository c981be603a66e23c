// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The interrupts of balloon and virtio-mem devices.

use anyhow::Result;

use crate::guest::Guest;

/// Shows the interrupts of these devices, which have the names of the devices.
const SHOW: &str = "
    for device in /sys/bus/virtio/drivers/virtio_balloon*/virtio* /sys/bus/virtio/drivers/virtio_mem/virtio*; do
        grep -w ${device##*/} /proc/interrupts || true
    done";

impl Guest {
    /// How many interrupts the guest has had from its balloon or virtio-mem device, since it has a driver.
    pub fn interrupts(&self) -> Result<u64> {
        Ok(self.sh(SHOW)?.lines().map(count).sum())
    }
}

/// The interrupts on all processors in a line of /proc/interrupts.
fn count(line: &str) -> u64 {
    let numbers = line.split_whitespace().skip(1);
    numbers.map_while(|word| word.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_of_all_processors_count() {
        let line =
            " 25:         12          3  PCI-MSIX-0000:00:02.0   1-edge      virtio0-virtqueues";
        assert_eq!(count(line), 15);
        assert_eq!(count(""), 0);
    }
}
