// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A Debian system with systemd in a guest. Unlike a [`Container`](crate::Container) it has a kernel of its own, whose
//! OOM killer and memory cgroups a test may use.

use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::Guest;
use crate::agent::Pending;
use crate::stopwatch::PATIENCE;

/// The target that is active when the system has booted. Those after it start services that no test needs.
const TARGET: &str = "basic.target";

/// How often to check whether it has booted. Each check costs the guest time.
const INTERVAL: Duration = Duration::from_secs(2);

/// Boots the system in /system, in namespaces of its own.
const BOOT: &str = r#"
    mount -o bind /system /system
    cd /system
    mkdir -p proc sys dev run tmp var/cache var/lib
    for directory in proc sys dev; do
        mount -o rbind /$directory $directory
    done
    # Without this, systemd starts a device manager.
    mount -o remount,bind,ro sys
    mount -t tmpfs -o mode=755 run run
    mount -t tmpfs -o mode=1777 tmp tmp
    : >etc/machine-id
    exec chroot . /usr/bin/unshare --mount --uts --ipc --pid --fork --mount-proc \
        /usr/bin/env -i container=vm PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        /usr/lib/systemd/systemd --system --unit="$1"
"#;

/// Runs the rest of the line in the system.
const ENTER: &str = r#"
    exec chroot /system /usr/bin/nsenter --target=$(pidof systemd) --all --root --wd \
        /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin "$@"
"#;

/// A running system.
#[derive(Debug)]
pub struct GuestSystem<'a> {
    guest: &'a Guest,
    _boot: Pending,
}

impl Guest {
    /// Boots the system that [`Config::with_system`](crate::Config::with_system) has put into the guest.
    pub fn boot_system(&self) -> Result<GuestSystem<'_>> {
        let boot = self.start(&["sh", "-euc", BOOT, "sh", TARGET], None)?;
        let system = GuestSystem {
            guest: self,
            _boot: boot,
        };
        self.wait_until("a booted system", PATIENCE, || {
            thread::sleep(INTERVAL);
            let status = system.run("systemctl", &["is-active", "--quiet", TARGET]);
            Ok(status.is_ok())
        })?;
        Ok(system)
    }
}

impl GuestSystem<'_> {
    /// Runs a program there. Returns its output.
    ///
    /// # Errors
    ///
    /// It fails; the error has its output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let line = [&["sh", "-euc", ENTER, "sh", program], arguments].concat();
        let output = self.guest.exec(&line)?;
        ensure!(
            output.exit == agent::Exit::Status(0),
            "{program} {}: {:?}: {}{}",
            arguments.join(" "),
            output.exit,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }
}
