// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Free page hinting: a guest lists its free pages during a VM migration, and QEMU does not copy
//! them.

use anyhow::{Context, Result, ensure};
use vm::{Config, Guest, Kernel, Load, Migration, Offer, RunningLoad, Size, Transfer, Zeroing};

use crate::overwriting::{List, Overwriting};
use crate::scenario::{
    BOTH_DRIVERS, BOTH_KERNELS, CALLBACK_KERNELS, EXTENDED_DEVICE, PATIENCE, QEMU_DEVICE,
    RUST_DRIVER, Scenario, Setup, TEST_KERNEL,
};
use crate::sizes::check_size;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "migrate_with_hints",
        proves: "a guest migrates without its unused memory, and has its data and all of its memory afterwards",
        kernels: CALLBACK_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: migrate_with_hints,
    },
    Scenario {
        name: "migrate_while_allocating",
        proves: "a process gets the memory that a migration leaves out, and no process is killed",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: migrate_while_allocating,
    },
    Scenario {
        name: "migrate_cancelled",
        proves: "a guest has its memory back when its migration is cancelled, and can migrate later",
        kernels: BOTH_KERNELS,
        drivers: BOTH_DRIVERS,
        devices: QEMU_DEVICE,
        run: migrate_cancelled,
    },
    Scenario {
        name: "hints_data_intact",
        proves: "the guest's data stay intact when the host overwrites hinted memory",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: data_intact,
    },
    Scenario {
        name: "hints_proof",
        proves: "memory that the driver hints, and that was not written since the id, has no content that the guest needs",
        kernels: BOTH_KERNELS,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: proof,
    },
    Scenario {
        name: "hints_lie",
        proves: "the proof fails for a driver that hints memory in use",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: lie,
    },
];

/// The driver hints pages that it has allocated. Where the kernel would zero them, it hints memory blocks.
const BOTH_WAYS: [Zeroing; 2] = [Zeroing::Off, Zeroing::On];

/// The bandwidth of a migration that must not end early: copying all of a guest takes half a
/// minute.
pub(crate) const SLOW: Size = Size::mib(32);

fn config(setup: &Setup) -> Config {
    setup.config().offer(&[Offer::FreePageHint])
}

/// The memory of a guest with one process that holds some of it.
pub(crate) struct Shares {
    hold: usize,
    /// What another process has written and freed: no page of it is zero, so QEMU would send all of
    /// it.
    freed: Size,
}

impl Shares {
    pub(crate) fn of(guest: &Guest) -> Result<Self> {
        let available = guest.meminfo()?.available;
        Ok(Self {
            hold: usize::try_from(available.as_mib() / 10)?,
            freed: Size::mib(available.as_mib() * 7 / 10),
        })
    }

    /// Starts the process that holds its share and verifies it.
    fn hold<'a>(&self, guest: &'a Guest) -> Result<RunningLoad<'a>> {
        let load = guest.load(Load::Hold {
            mib: self.hold,
            threads: 2,
        })?;
        Ok(load)
    }

    /// Writes and frees the other share, and returns the size of free memory.
    pub(crate) fn write_and_free(&self, guest: &Guest) -> Result<Size> {
        guest.touch(self.freed)?;
        guest.free()
    }
}

/// Hinted memory of a guest.
fn overwriting(setup: &Setup, zeroing: Zeroing, memory: Size, rounds: u64) -> Overwriting {
    Overwriting {
        list: List::Hints,
        config: config(setup).zeroing(zeroing),
        memory,
        rounds,
        seed: 0,
    }
}

fn data_intact(setup: &Setup) -> Result<()> {
    for zeroing in BOTH_WAYS {
        let mut total = Size::default();
        overwriting(setup, zeroing, Size::gib(2), 4).run(setup.driver, &mut total)?;
        setup.note(format!(
            "{total} of hinted memory were overwritten, zeroing {zeroing:?}"
        ));
        ensure!(total > Size::default(), "nothing was overwritten");
    }
    Ok(())
}

fn proof(setup: &Setup) -> Result<()> {
    let (memory, guests, rounds) = match setup.kernel {
        Kernel::Test => (Size::gib(8), 5, 10),
        _ => (Size::gib(2), 2, 3),
    };
    for zeroing in BOTH_WAYS {
        let mut total = Size::default();
        for seed in 0..guests {
            let guest = Overwriting {
                seed,
                ..overwriting(setup, zeroing, memory, rounds)
            };
            guest
                .run(setup.driver, &mut total)
                .with_context(|| format!("with the seed {seed}, zeroing {zeroing:?}"))?;
        }
        setup.note(format!(
            "{total} of hinted memory were overwritten in {rounds} rounds in each of {guests} guests, zeroing {zeroing:?}"
        ));
        ensure!(total > Size::default(), "nothing was overwritten");
    }
    Ok(())
}

fn lie(setup: &Setup) -> Result<()> {
    for zeroing in BOTH_WAYS {
        overwriting(setup, zeroing, Size::gib(2), 3).detects_lie(setup)?;
    }
    Ok(())
}

fn migrate_with_hints(setup: &Setup) -> Result<()> {
    vm::run(&config(setup), |guest| {
        let shares = Shares::of(guest)?;
        let load = shares.hold(guest)?;
        // Without a driver there are no hints.
        shares.write_and_free(guest)?;
        let without = guest.migrate(SLOW)?.finish()?;
        ensure!(
            without.sent > shares.freed,
            "{} were sent of a guest that has written {}, so hints cannot save anything",
            without.sent,
            shares.freed
        );
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let quarter = Size::mib(shares.freed.as_mib() / 4);
        for balloon in [Size::default(), quarter, Size::default()] {
            shares.write_and_free(guest)?;
            guest.balloon().settle(balloon)?;
            let (free, resident) = (guest.free()?, guest.resident()?);
            let migration = guest.migrate(SLOW)?;
            wait_hints(guest, &migration, &shares)?;
            let with = migration.finish()?;
            let half = Size::mib(shares.freed.as_mib() / 2);
            ensure!(
                with.sent + half < without.sent,
                "{} were sent, and {} without hints, though {} were unused",
                with.sent,
                without.sent,
                shares.freed
            );
            let resident_now = guest.resident()?;
            ensure!(
                resident_now + half < resident,
                "QEMU has {resident_now} after a migration that should have left {} out, and {resident} before",
                shares.freed
            );
            check_all_back(guest, free)?;
            check_size(guest, balloon)?;
            load.verify(1)?;
            setup.note(format!(
                "{} sent with a balloon of {balloon}, {} without hints; QEMU then has {resident_now} of {resident}",
                with.sent, without.sent
            ));
        }
        load.stop()?;
        guest.rmmod(setup.driver)
    })
}

fn migrate_while_allocating(setup: &Setup) -> Result<()> {
    vm::run(&config(setup), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let shares = Shares::of(guest)?;
        let load = shares.hold(guest)?;
        // The process allocates the memory while hints are in flight, and when the device has used
        // all.
        for early in [true, false] {
            let free = shares.write_and_free(guest)?;
            let need = guest.meminfo()?.available.as_mib() * 9 / 10;
            let start = || {
                guest.start_load(Load::Hold {
                    mib: usize::try_from(need)?,
                    threads: 2,
                })
            };
            let (migration, greedy) = if early {
                let greedy = start()?;
                (guest.migrate(SLOW)?, greedy)
            } else {
                let migration = guest.migrate(SLOW)?;
                wait_hints(guest, &migration, &shares)?;
                let now = guest.free()?;
                setup.note(format!("{now} of {free} free when {need} MiB were taken"));
                (migration, start()?)
            };
            greedy.verify(1)?;
            // The migration is still active when the process has all of its memory.
            migration.progress()?;
            migration.finish()?;
            for load in [&greedy, &load] {
                load.verify(1)?;
            }
            greedy.stop()?;
            check_all_back(guest, free)?;
        }
        let kills = guest.vmstat("oom_kill")?;
        ensure!(kills == 0, "{kills} processes were killed");
        load.stop()?;
        guest.rmmod(setup.driver)
    })
}

fn migrate_cancelled(setup: &Setup) -> Result<()> {
    vm::run(&config(setup), |guest| {
        guest.insmod(setup.driver, setup.driver.low_floor())?;
        let shares = Shares::of(guest)?;
        let load = shares.hold(guest)?;
        let free = shares.write_and_free(guest)?;
        for _ in 0..2 {
            let migration = guest.migrate(SLOW)?;
            wait_hints(guest, &migration, &shares)?;
            let free_meanwhile = guest.free()?;
            migration.cancel()?;
            check_all_back(guest, free)?;
            setup.note(format!(
                "{free_meanwhile} were free when it was cancelled, and {free} before and after"
            ));
        }
        let migration = guest.migrate(SLOW)?;
        wait_hints(guest, &migration, &shares)?;
        migration.finish()?;
        check_all_back(guest, free)?;
        load.stop()?;
        guest.rmmod(setup.driver)
    })
}

/// Waits until hints have removed the memory that the guest has written and freed from the
/// migration.
pub(crate) fn wait_hints(guest: &Guest, migration: &Migration<'_>, shares: &Shares) -> Result<()> {
    guest.wait_until("hints", PATIENCE, || {
        let Transfer {
            sent, remaining, ..
        } = migration.progress()?;
        // The rest also becomes small without hints, when all memory has been sent.
        ensure!(
            sent.as_mib() < shares.freed.as_mib() / 2,
            "{sent} are sent and {remaining} are left, though {} are unused",
            shares.freed
        );
        Ok(remaining + shares.freed < guest.memory())
    })
}

/// Checks that the guest gets back the memory that it had hinted.
pub(crate) fn check_all_back(guest: &Guest, before: Size) -> Result<()> {
    let mut free = Size::default();
    guest
        .wait_until("all memory is free again", PATIENCE, || {
            free = guest.free()?;
            Ok(free + Size::mib(32) > before)
        })
        .map_err(|error| error.context(format!("{free} are free, and {before} were before")))
}
