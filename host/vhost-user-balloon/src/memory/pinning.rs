// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device files through which a process pins memory.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

/// Whether an open file of a process is a device for pinning memory: `link` is the file's link in /proc, and `target`
/// the link's text. A VMM in a chroot, as a jail has, has the device under another path, so the kernel's own name of the
/// device counts, too.
pub(super) fn is_pinning(link: &Path, target: &Path) -> bool {
    pins(target) || kernels_name(link).is_some_and(|name| pins(&name))
}

/// Whether this is the path of a device for pinning memory.
fn pins(path: &Path) -> bool {
    let is_in = |directory| path.starts_with(directory) && path != Path::new(directory);
    let name = path.to_string_lossy();
    is_in("/dev/vfio")
        || is_in("/dev/infiniband")
        || name.starts_with("/dev/vhost-vdpa")
        || [Path::new("/dev/iommu"), Path::new("/dev/udmabuf")].contains(&path)
}

/// The path that the kernel proposes for a character device, by its number. None for other files, and without /sys.
fn kernels_name(link: &Path) -> Option<PathBuf> {
    // The type and the number of a file do not change, so a file system must not ask its server, which may be down.
    let file = statx(CWD, link, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    if FileType::from_raw_mode(file.stx_mode.into()) != FileType::CharacterDevice {
        return None;
    }
    let number = format!("{}:{}", file.stx_rdev_major, file.stx_rdev_minor);
    let properties = fs::read_to_string(format!("/sys/dev/char/{number}/uevent")).ok()?;
    let mut lines = properties.lines();
    let name = lines.find_map(|line| line.strip_prefix("DEVNAME="))?;
    Some(Path::new("/dev").join(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn device_files_that_pin_are_known() {
        for path in [
            "/dev/vfio/vfio",
            "/dev/vfio/12",
            "/dev/vfio/devices/vfio0",
            "/dev/iommu",
            "/dev/vhost-vdpa-0",
            "/dev/infiniband/uverbs0",
            "/dev/udmabuf",
        ] {
            assert!(pins(Path::new(path)), "{path}");
        }
        for path in [
            "/dev/kvm",
            "/dev/vhost-net",
            "/dev/vfiox",
            "/dev/null",
            "/tmp/vfio",
        ] {
            assert!(!pins(Path::new(path)), "{path}");
        }
    }

    fn link(file: &File) -> PathBuf {
        format!("/proc/self/fd/{}", file.as_raw_fd()).into()
    }

    #[test]
    fn a_device_is_known_by_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("12");
        // That of /dev/null, since few machines have a device for pinning memory. Only root can create the file.
        if mknod(&path, SFlag::S_IFCHR, Mode::S_IRUSR, makedev(1, 3)).is_err() {
            return;
        }
        let file = File::open(&path).unwrap();
        let name = kernels_name(&link(&file));
        assert_eq!(name.as_deref(), Some(Path::new("/dev/null")));
    }

    #[test]
    fn other_files_have_no_number() {
        let file = tempfile::tempfile().unwrap();
        assert!(!is_pinning(&link(&file), Path::new("/tmp/vfio")));
        assert!(is_pinning(&link(&file), Path::new("/dev/vfio/vfio")));
        let missing = Path::new("/proc/self/fd/-1");
        assert!(!is_pinning(missing, Path::new("/tmp/vfio")));
    }
}
