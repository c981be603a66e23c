// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Modules whose signature the kernel does not accept.

use std::fs;

use anyhow::{Result, ensure};
use tempfile::NamedTempFile;
use vm::{Driver, Kernel, Size};

use crate::scenario::{QEMU_DEVICE, RUST_DRIVER, Scenario, Setup};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "secure_boot",
    proves: "with a module that Secure Boot refuses, the C driver has the device, and the log has the reason",
    // The others have no signatures.
    kernels: &[Kernel::Debian],
    drivers: RUST_DRIVER,
    devices: QEMU_DEVICE,
    run: secure_boot,
}];

/// Loads the drivers as udev does, in the system with the package. Prints the one that has the device.
const LOAD: &str = r#"
    cd /system
    modules=usr/lib/modules/$(uname -r)
    mkdir -p "$modules" proc sys
    cp /modules/*.ko "$modules"
    mount -o bind /proc proc
    mount -o bind /sys sys
    chroot . /usr/sbin/depmod
    chroot . /usr/sbin/modprobe virtio:d00000005v00001AF4
    basename $(readlink /sys/bus/virtio/drivers/virtio_balloon*/virtio*/driver)
"#;

/// Tries to load a module that is not signed: one whose signature is not at its end.
const LOAD_UNSIGNED: &str = r#"
    cp /modules/virtio-balloon-rs.ko /unsigned.ko
    echo >>/unsigned.ko
    ! insmod /unsigned.ko
"#;

fn secure_boot(setup: &Setup) -> Result<()> {
    fs::create_dir_all(setup.logs())?;
    let initramfs = NamedTempFile::new_in(setup.logs())?;
    // What Debian's kernel does when the firmware says that Secure Boot is enabled.
    let config = setup
        .config()
        .memory(Size::gib(2))
        .with_system(initramfs.path())?
        .parameter("lockdown=integrity")
        .parameter("module.sig_enforce=1");
    vm::run(&config, |guest| {
        let driver = guest.sh(LOAD)?;
        ensure!(
            driver.trim() == Driver::C.name(),
            "the device is bound to {driver}"
        );
        guest.sh(LOAD_UNSIGNED)?;
        let log = guest.run(&["dmesg"])?;
        // As in docs/install.md. DKMS has signed the first one.
        for reason in ["module with unavailable key", "unsigned module"] {
            let line = format!("Loading of {reason} is rejected");
            ensure!(log.contains(&line), "the log lacks {line}");
        }
        guest.balloon().settle(Size::mib(512))?;
        guest.balloon().settle(Size::default())?;
        Ok(())
    })
}
