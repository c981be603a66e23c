// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Snapshots that leave out what the guest does not use (docs/snapshots.md).

use std::time::Instant;

use anyhow::{Result, ensure};
use vm::{Load, Size, Snapshot};

use crate::scenario::{EXTENDED_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "snapshot",
    proves: "a snapshot has none of the memory that the guest has freed, and the guest goes on from it",
    kernels: TEST_KERNEL,
    drivers: RUST_DRIVER,
    devices: EXTENDED_DEVICE,
    run: snapshot,
}];

/// Where guests' memory and snapshots are: in memory.
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

/// Saves a guest that has used and freed `used`, and saves it once more after unused memory was given back. Goes on
/// from the second one. Returns what each of them takes.
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
            "{what}: unused memory was given back in {} ms",
            start.elapsed().as_millis()
        ));
        let snapshot = guest.save(directory.path())?;
        let less = note("without unused memory", &snapshot);

        guest.restore(&snapshot)?;
        data.verify(2)?;
        // All memory is as good as before.
        guest.touch(Size::gib(4))?;
        guest.reclaim()?;
        data.verify(2)?;
        data.stop()?;
        guest.rmmod(setup.driver)?;
        Ok((all, less))
    })
}
