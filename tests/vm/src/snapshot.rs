// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots without the guest's unused memory (docs/snapshots.md).

use std::time::Instant;

use anyhow::{Result, ensure};
use vm::{Load, Size, Snapshot};

use crate::scenario::{EXTENDED_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "snapshot",
    proves: "a snapshot has none of the memory that the guest has freed, and a restored guest runs",
    kernels: TEST_KERNEL,
    drivers: RUST_DRIVER,
    devices: EXTENDED_DEVICE,
    run: snapshot,
}];

/// The directory of guests' memory and snapshots, a tmpfs.
const DIRECTORY: &str = "/dev/shm";

fn snapshot(setup: &Setup) -> Result<()> {
    let (idle, idle_less) = save_twice(setup, "idle", Size::default())?;
    ensure!(
        idle_less <= idle,
        "{idle} are saved of an idle guest, and {idle_less} without its unused memory"
    );
    let (dirty, dirty_less) = save_twice(setup, "dirtied", Size::gib(5))?;
    ensure!(
        dirty_less.as_bytes() * 10 <= dirty.as_bytes(),
        "{dirty} are saved of a dirtied guest, and {dirty_less} without its unused memory"
    );
    Ok(())
}

/// Saves a guest that has used and freed `used`, and saves it again after it has returned its unused memory.
/// Restores the second snapshot. Returns the sizes of both.
fn save_twice(setup: &Setup, what: &str, used: Size) -> Result<(Size, Size)> {
    let directory = tempfile::tempdir_in(DIRECTORY)?;
    let config = setup
        .config()
        .memory(Size::gib(8))
        .memory_file(&directory.path().join("memory"))
        .hotplug_port()
        .balloon(None);
    vm::run(&config, |guest| {
        let data = guest.load(Load::Hold {
            mib: 128,
            threads: 2,
        })?;
        if used > Size::default() {
            guest.touch(used)?;
        }
        let note = |how: &str, snapshot: &Snapshot| {
            setup.note(format!(
                "{what}, {how}: {} saved in {} ms",
                snapshot.size,
                snapshot.took.as_millis()
            ));
            snapshot.size
        };
        let all = note("as it is", &guest.save(directory.path())?);

        guest.insmod(setup.driver, &[])?;
        let start = Instant::now();
        guest.reclaim()?;
        setup.note(format!(
            "{what}: unused memory was returned in {} ms",
            start.elapsed().as_millis()
        ));
        let snapshot = guest.save(directory.path())?;
        let less = note("without unused memory", &snapshot);

        guest.restore(&snapshot)?;
        data.verify(2)?;
        // The guest can use all of its memory.
        guest.touch(Size::gib(4))?;
        guest.reclaim()?;
        data.verify(2)?;
        data.stop()?;
        guest.rmmod(setup.driver)?;
        Ok((all, less))
    })
}
