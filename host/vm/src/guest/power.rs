// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Suspend, hibernation, reboot, and kexec of a guest.

use std::fs::{self, File};
use std::path::PathBuf;
use std::time::Duration;

use agent::{Command, End, TakeOver};
use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use super::{Guest, live};
use crate::agent::Pending;
use crate::config::Config;
use crate::size::Size;
use crate::stopwatch::PATIENCE;

/// How long a guest may take to answer after resume, before the request is repeated.
const PING_TIMEOUT: Duration = Duration::from_secs(5);

/// The paths of the next kernel and its initramfs in the guest.
const KERNEL: &str = "/tmp/kernel";
const INITRAMFS: &str = "/tmp/initramfs";

impl Config {
    /// Gives the guest its own kernel and initramfs as disks, for [`Guest::load_kernel`].
    pub fn kexec(self) -> Self {
        let (kernel, initramfs) = (
            self.artifacts.image.clone(),
            self.artifacts.initramfs.clone(),
        );
        self.read_only_disk(&kernel).read_only_disk(&initramfs)
    }
}

impl Guest {
    /// Suspends the guest to RAM, calls `asleep`, and resumes the guest. For guests on
    /// [`Machine::I440fx`](crate::Machine).
    pub fn suspend<T>(&self, asleep: impl FnOnce() -> Result<T>) -> Result<T> {
        let mark = self.qmp().mark();
        let pending = self.fall_asleep("mem")?;
        self.wait_until("a suspended guest", PATIENCE, || {
            ensure!(
                pending.poll(Duration::ZERO)?.is_none(),
                "the guest resumes by itself"
            );
            Ok(self
                .qmp()
                .wait_event(mark, Duration::ZERO, |event| event.name == "SUSPEND")
                .is_ok())
        })?;
        let result = asleep()?;
        self.qmp().execute::<Value>("system_wakeup", &json!({}))?;
        self.wait(&pending, PATIENCE)?;
        // In one of a hundred cases the first message after resume does not arrive.
        self.wait_listening()?;
        Ok(result)
    }

    /// Waits until the guest answers, and repeats messages that may be lost.
    fn wait_listening(&self) -> Result<()> {
        self.wait_until("a guest that answers", PATIENCE, || {
            let ping = self.home().agent.send(Command::Ping)?;
            Ok(ping.poll(PING_TIMEOUT)?.is_some())
        })
    }

    /// Makes the guest suspend all of its devices and resume them at once, without suspending the
    /// system.
    ///
    /// # Errors
    ///
    /// It cannot do so now.
    pub fn suspend_devices(&self) -> Result<()> {
        self.write_file("/sys/power/pm_test", "devices")?;
        self.write_file("/sys/module/suspend/parameters/pm_test_delay", "0")?;
        let pending = self.fall_asleep("freeze")?;
        self.wait(&pending, PATIENCE)?;
        Ok(())
    }

    /// Makes the guest hibernate without a disk for its image: it stops all devices, and continues.
    pub fn hibernate_without_disk(&self) -> Result<()> {
        let pending = self.fall_asleep("disk")?;
        let refused = self.wait(&pending, PATIENCE).is_err();
        self.wait_listening()?;
        ensure!(refused, "the guest has hibernated without a disk");
        Ok(())
    }

    /// Suspends the guest in this way. The answer comes after resume.
    fn fall_asleep(&self, state: &str) -> Result<Pending> {
        let state = state.to_owned();
        self.home().agent.send(Command::Sleep { state })
    }

    /// Reboots the guest, and waits until it is up again. For guests with [`Config::reboots`].
    pub fn reboot(&self) -> Result<()> {
        self.restart(Command::End(End::Reboot))?;
        self.ready()
    }

    /// Loads the guest's kernel for kexec. For guests with [`Config::kexec`].
    pub fn load_kernel(&self) -> Result<()> {
        let command_line = self.read_file("/proc/cmdline")?;
        self.load_from_disks(TakeOver::End, command_line.trim_end())
    }

    /// Loads the guest's kernel as crash kernel, with one processor and the memory of the parameter `crashkernel=`. For
    /// guests with [`Config::kexec`].
    pub fn load_crash_kernel(&self) -> Result<()> {
        let command_line = self.read_file("/proc/cmdline")?;
        let words = command_line
            .split_whitespace()
            .filter(|word| !word.starts_with("crashkernel="));
        let command_line = words.chain(["nr_cpus=1"]).collect::<Vec<_>>().join(" ");
        self.load_from_disks(TakeOver::Panic, &command_line)
    }

    fn load_from_disks(&self, when: TakeOver, command_line: &str) -> Result<()> {
        self.sh(&format!(
            "cat /dev/vda >{KERNEL} && cat /dev/vdb >{INITRAMFS}"
        ))?;
        self.call(
            Command::LoadKernel {
                when,
                kernel: KERNEL.to_owned(),
                initramfs: INITRAMFS.to_owned(),
                command_line: command_line.to_owned(),
            },
            PATIENCE,
        )?;
        self.run(&["rm", KERNEL, INITRAMFS])?;
        Ok(())
    }

    /// Starts the loaded kernel, and waits until it is up.
    pub fn kexec(&self) -> Result<()> {
        self.restart(Command::End(End::Kexec))?;
        self.ready()
    }

    /// Makes the kernel panic, and waits until the crash kernel is up.
    pub fn panic(&self) -> Result<()> {
        self.restart(Command::WriteFile {
            path: "/proc/sysrq-trigger".to_owned(),
            contents: "c".to_owned(),
        })?;
        // Messages before the next kernel has reset the port are lost.
        self.wait_listening()
    }

    /// Ends the kernel, and waits until another one starts.
    fn restart(&self, command: Command) -> Result<()> {
        self.save_coverage()?;
        let mark = self.console.mark()?;
        let pending = self.home().agent.send(command)?;
        // The old kernel must not receive the ping.
        self.wait_until("a kernel that starts", PATIENCE, || {
            pending.poll(Duration::ZERO)?;
            Ok(self.console.count_since(mark, "^Linux version")? > 0)
        })
    }

    /// A value that differs after each boot.
    fn boot_id(&self) -> Result<String> {
        self.read_file("/proc/sys/kernel/random/boot_id")
    }

    /// Hibernates the guest to its first disk, and waits until QEMU has ended.
    fn hibernate(&self) -> Result<()> {
        self.sh("mkswap /dev/vda && swapon /dev/vda")?;
        let pending = self.fall_asleep("disk")?;
        if !self.home().qemu.wait(PATIENCE)? {
            pending.poll(Duration::ZERO)?;
            bail!("the guest does not hibernate in {} s", PATIENCE.as_secs());
        }
        Ok(())
    }
}

/// A hibernated guest.
#[derive(Debug)]
pub struct Hibernated {
    config: Config,
    boot_id: String,
    _disk: Disk,
}

/// Boots a guest, passes it to `body`, hibernates it and searches its log for faults. Returns the
/// guest and the result of `body`.
///
/// # Errors
///
/// As for [`run`](super::run), or the guest does not hibernate.
pub fn hibernate<T>(
    config: &Config,
    body: impl FnOnce(&Guest) -> Result<T>,
) -> Result<(Hibernated, T)> {
    let disk = Disk::new(config)?;
    let config = config.clone().disk(&disk.0).parameter("resume=/dev/vda");
    let (boot_id, value) = live(
        &config,
        |guest| Ok((guest.boot_id()?, body(guest)?)),
        Guest::hibernate,
    )?;
    let hibernated = Hibernated {
        config,
        boot_id,
        _disk: disk,
    };
    Ok((hibernated, value))
}

impl Hibernated {
    /// Resumes the guest in another QEMU, with `target` from the start, and then does the same as
    /// [`run`](super::run).
    pub fn resume<T>(self, target: Size, body: impl FnOnce(&Guest) -> Result<T>) -> Result<T> {
        let config = self.config.clone().target(target).part("resumed");
        live(
            &config,
            |guest| {
                ensure!(
                    guest.boot_id()? == self.boot_id,
                    "the guest has booted instead of being resumed"
                );
                body(guest)
            },
            Guest::power_off,
        )
    }
}

/// A disk for hibernation, in a file that is removed at the end.
#[derive(Debug)]
struct Disk(PathBuf);

impl Disk {
    fn new(config: &Config) -> Result<Self> {
        fs::create_dir_all(config.logs())?;
        let disk = Self(config.logs().join("disk"));
        File::create(&disk.0)?.set_len(config.memory.as_bytes())?;
        Ok(disk)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // A file that remains does no harm.
        let _ = fs::remove_file(&self.0);
    }
}
