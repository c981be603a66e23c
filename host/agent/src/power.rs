// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Suspend, the end of the guest's kernel, and kexec.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

use agent::{End, TakeOver};
use anyhow::{Context, Result};
use linux_raw_sys::general::__NR_kexec_file_load;
use nix::errno::Errno;
use nix::libc::{self, c_long};
use nix::sys::reboot::{RebootMode, reboot};

use crate::port;

/// Ends the kernel.
pub(crate) fn end(end: End) -> Result<Infallible> {
    let mode = match end {
        // A machine without ACPI cannot power off. QEMU's `-no-reboot` makes a reboot end QEMU, too.
        End::PowerOff if Path::new("/sys/firmware/acpi").exists() => RebootMode::RB_POWER_OFF,
        End::PowerOff | End::Reboot => RebootMode::RB_AUTOBOOT,
        End::Kexec => RebootMode::RB_KEXEC,
    };
    Ok(reboot(mode)?)
}

/// Suspends the guest, and returns after resume.
pub(crate) fn sleep(state: &str) -> Result<()> {
    port::unbound(|| fs::write("/sys/power/state", state))?
        .with_context(|| format!("the guest does not sleep in state {state}"))
}

/// Loads a kernel for kexec.
pub(crate) fn load_kernel(
    when: TakeOver,
    kernel: &str,
    initramfs: &str,
    command_line: &str,
) -> Result<()> {
    /// The kernel's KEXEC_FILE_ON_CRASH.
    const ON_CRASH: u64 = 2;
    let flags = match when {
        TakeOver::End => 0,
        TakeOver::Panic => ON_CRASH,
    };
    let open = |path: &str| File::open(path).with_context(|| format!("opening {path}"));
    let (image, ramfs) = (open(kernel)?, open(initramfs)?);
    let command_line = CString::new(command_line)?;
    // SAFETY: The kernel reads from two open descriptors, and from `command_line`, whose length is
    // passed.
    let result = unsafe {
        libc::syscall(
            c_long::from(__NR_kexec_file_load),
            image.as_raw_fd(),
            ramfs.as_raw_fd(),
            command_line.as_bytes_with_nul().len(),
            command_line.as_ptr(),
            flags,
        )
    };
    Errno::result(result).with_context(|| format!("loading {kernel} to take over"))?;
    Ok(())
}
