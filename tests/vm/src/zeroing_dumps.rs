// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests whose kernel zeroes all memory that it allocates: what other kernels and dumps see of the balloon's memory
//! blocks.

use anyhow::{Result, ensure};
use vm::{Kernel, Size, Zeroing};

use crate::compaction::{fullest_block, write};
use crate::power::{boot_by_kexec, crash};
use crate::scenario::{EXTENDED_DEVICE, QEMU_DEVICE, RUST_DRIVER, Scenario, Setup, TEST_KERNEL};
use crate::zeroing::{MOST_MORE, resident, taken, zeroing};
use crate::zeroing_features::{begin, end};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "zeroing_crash_dump",
        proves: "the memory of a guest whose balloon has memory blocks can be saved, also while one is offline",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: crash_dump,
    },
    Scenario {
        name: "zeroing_kexec",
        proves: "a kernel that is started by kexec while the driver takes memory blocks has all memory",
        kernels: TEST_KERNEL,
        drivers: RUST_DRIVER,
        devices: QEMU_DEVICE,
        run: |setup| boot_by_kexec(setup, Zeroing::On),
    },
    Scenario {
        name: "zeroing_kcore",
        proves: "a reader of /proc/kcore sees no page of the balloon, and the host provides no memory for it",
        // The others have no /proc/kcore.
        kernels: &[Kernel::Debian],
        drivers: RUST_DRIVER,
        devices: EXTENDED_DEVICE,
        run: kcore,
    },
];

fn crash_dump(setup: &Setup) -> Result<()> {
    crash(setup, &zeroing(setup), |guest| {
        let blocks = taken(guest)?;
        ensure!(blocks > 0, "no memory block was taken");
        // The dump has its memory nevertheless.
        let block = fullest_block(guest, ".")?;
        write(guest, &block.state, "offline")
    })
}

/// Reads the guest's memory in /proc/kcore: the segments that have a physical address.
const READ_KCORE: &str = r#"
word() { od -An -v -t u8 -j "$1" -N 8 /proc/kcore | tr -d ' '; }
half() { od -An -v -t u2 -j "$1" -N 2 /proc/kcore | tr -d ' '; }
headers=$(word 32)
count=$(half 56)
number=0
read=0
while [ $number -lt $count ]; do
	header=$((headers + 56 * number))
	offset=$(word $((header + 8)))
	address=$(word $((header + 24)))
	size=$(word $((header + 40)))
	# Others have the address -1.
	case $address in
	[0-9]|[0-9]?*)
		if [ ${#address} -lt 19 ] && [ $size -ge 1048576 ]; then
			dd if=/proc/kcore of=/dev/null bs=1M iflag=skip_bytes,count_bytes skip=$offset count=$size 2>/dev/null
			read=$((read + size))
		fi
		;;
	esac
	number=$((number + 1))
done
echo $read
"#;

fn kcore(setup: &Setup) -> Result<()> {
    let (memory, size) = (Size::gib(2), Size::mib(1_200));
    vm::run(&setup.config().memory(memory), |guest| {
        let (total, data) = begin(setup, guest, setup.driver.low_floor())?;
        // Each page that the guest has read or written takes host memory.
        guest.balloon().settle(size)?;
        let before = resident(setup, guest)?;
        let read = Size::bytes(guest.sh(READ_KCORE)?.trim().parse()?);
        let after = resident(setup, guest)?;
        setup.note(format!(
            "{read} of /proc/kcore were read; the guest took {before} before, and {after} after"
        ));
        ensure!(
            read >= memory - Size::mib(128),
            "only {read} of {memory} are in /proc/kcore"
        );
        ensure!(
            after < memory - size + MOST_MORE,
            "the guest takes {after}, although {size} are in the balloon"
        );
        guest.balloon().settle(Size::default())?;
        end(setup, guest, total, data)
    })
}
