// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use balloon_control::Access;
use clap::{Parser, ValueEnum, value_parser};
use log::LevelFilter;
use nix::unistd::{Gid, Group};

use crate::device::Settings;
use crate::device::floor::Floor;
use crate::memory::discard::Granularity;
use crate::memory::hazard::Hazard;
use crate::virtio::features::{Feature, offer};

/// The level of the worker's confinement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sandbox {
    /// As far as the kernel supports it.
    Full,
    /// Not at all.
    None,
}

/// A virtio memory balloon for one VM, as a vhost-user device
///
/// QEMU uses it with
///
///   -object memory-backend-memfd,id=memory,size=8G,share=on
///   -machine q35,memory-backend=memory
///   -chardev socket,id=balloon,path=SOCKET
///   -device vhost-user-test-device-pci,chardev=balloon,virtio-id=5,
///           num_vqs=6,vq_size=256,config_size=24
///
/// The last two lines are one argument. The memory has to be shared.
///
/// The daemon serves one VMM at a time, and then waits for the next one. It has
/// two processes. The supervisor holds the connection. The worker implements the
/// device. The supervisor replaces a worker that has crashed or does not respond.
/// On SIGHUP, as after an update, the program at the daemon's path takes over. If
/// that does not start, the running one continues. The guest is not affected.
///
/// The daemon ends on SIGTERM and SIGINT. Without systemd a guest that still runs
/// has no balloon from then on: QEMU's device cannot reconnect. As a service with
/// a file descriptor store the daemon leaves the connection to systemd, and
/// continues with it at its next start, also after a crash.
///
/// The daemon needs no privileges: only directories in which it may create its
/// sockets and its state file, and the memory file that it gets from the VMM.
#[derive(Clone, Debug, Parser)]
#[command(
    version,
    verbatim_doc_comment,
    args_override_self = true,
    override_usage = "vhost-user-balloon [OPTIONS] {--socket <PATH> | --fd <NUMBER>}"
)]
pub struct Options {
    /// The socket for the VMM
    #[arg(
        long,
        visible_alias = "socket-path",
        value_name = "PATH",
        required_unless_present_any = ["fd", "man", "print_capabilities", "worker"]
    )]
    pub socket: Option<PathBuf>,

    /// The socket for the VMM as a file descriptor of this number, instead of --socket
    ///
    /// The socket has an absolute path, and listens already. The daemon does not change its access, and leaves it at its
    /// end. It creates temporary files next to it.
    #[arg(long, value_name = "NUMBER", conflicts_with = "socket", value_parser = value_parser!(i32).range(3..))]
    pub fd: Option<i32>,

    /// Print the type of the device as JSON, as QEMU's conventions for back ends say, and do nothing else
    #[arg(long)]
    pub print_capabilities: bool,

    /// The group that the VMM's socket belongs to, for a VMM of another user
    ///
    /// The daemon must be in the group.
    #[arg(long, value_name = "GROUP", value_parser = group)]
    pub socket_group: Option<Gid>,

    /// The mode of the VMM's socket. The default is 0600, and 0660 with --socket-group
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub socket_mode: Option<u32>,

    /// The socket for balloonctl
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// The group whose members may use balloonctl
    #[arg(long, value_name = "GROUP", value_parser = group)]
    pub control_group: Option<Gid>,

    /// The mode of balloonctl's socket. The default is 0600, and 0660 with --control-group
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub control_mode: Option<u32>,

    /// Keep the target and the statistics interval in this file
    #[arg(long, value_name = "FILE")]
    pub state: Option<PathBuf>,

    /// The features to offer
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "stats,free-page-hinting,page-poison,free-page-reporting,event-idx"
    )]
    pub features: Vec<Feature>,

    /// Offer the extended protocol, which is not in the virtio specification
    ///
    /// page-sets describe memory as ranges and bitmaps. With stop-reason the guest reports why it stays below the target.
    /// With status it reports its size in messages: QEMU aborts at a write of the configuration space when this daemon
    /// was killed. host-requests ask the guest for unused memory. With pressure, which needs stats, the guest sends
    /// statistics when it is short of memory. QEMU's device then needs num_vqs=6 and config_size=24;
    /// otherwise 5 and 16 are enough.
    #[arg(long)]
    pub extensions: bool,

    /// The initial interval of the statistics; 0 turns them off
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stats_interval: u32,

    /// The smallest piece of shared memory to return: auto, 4K or 2M
    ///
    /// auto is the largest huge page, up to 2M, that the host allows for this memory: in shmem_enabled and those of
    /// each size, and for a tmpfs in its option huge=. Memory in hugetlbfs is returned in its own huge pages in any
    /// case. With 2M the guest has to notify before it reuses a page (must-tell-host), so that messages may contain
    /// parts of huge pages.
    #[arg(long, value_name = "SIZE", default_value = "auto")]
    pub granule: Granularity,

    /// Allocate host memory before the guest reuses deflated pages
    ///
    /// The daemon always does so for hugetlbfs, and for a tmpfs without room for all of the guest's memory. A
    /// guest that notifies before it reuses a page (must-tell-host) waits until the host has memory.
    #[arg(long)]
    pub prefault: bool,

    /// Return memory to the host in spite of these hazards
    ///
    /// Without this option the daemon does not return the memory that they concern. With pinned, userfaultfd and unseen
    /// the guest can lose data. With hugetlb the VM ends if the host has no huge page when the guest reuses one.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub allow: Vec<Hazard>,

    /// The name of the VM, for the label `vm` of the metrics
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// The memory to leave to the guest: auto, or a size such as 512MiB
    ///
    /// It limits every target. auto is 64 MiB and a sixteenth of the guest's memory, and at most half of it. 0
    /// leaves the limit to the guest's driver.
    #[arg(long, value_name = "SIZE", default_value = "auto")]
    pub floor: Floor,

    /// How long a booting guest need not inflate to an earlier target
    ///
    /// If no driver has started the device by then, the daemon logs that.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub boot_grace: u32,

    /// How far to confine the worker: full or none
    ///
    /// With full the worker may make only the system calls that it needs. Any other call ends the worker. The log has the
    /// call's name, and the supervisor starts another worker. none is for debugging.
    #[arg(long, value_name = "LEVEL", default_value = "full")]
    pub sandbox: Sandbox,

    /// The log level on standard error: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "info")]
    pub log: LevelFilter,

    /// Implement the device, for a supervisor that hands it over in this version
    #[arg(long, value_name = "VERSION", hide = true)]
    pub worker: Option<u32>,

    /// Continue with a supervisor's snapshot, which standard input has
    #[arg(long, hide = true)]
    pub resume: bool,

    /// The supervisor: when it ends, so does this process
    #[arg(long, value_name = "PID", hide = true)]
    pub parent: Option<i32>,

    /// Write the man page to this directory, and do nothing else
    #[arg(long, value_name = "DIR", hide = true)]
    pub man: Option<PathBuf>,
}

/// The group with a name or a number.
fn group(name: &str) -> Result<Gid, String> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => name
            .parse()
            .map(Gid::from_raw)
            .map_err(|_| "there is no such group".to_owned()),
        Err(errno) => Err(errno.desc().to_owned()),
    }
}

/// Permissions of a file, in octal.
fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok();
    mode.filter(|mode| (0o600..=0o777).contains(mode))
        .ok_or_else(|| "not an octal mode from 0600 to 0777".to_owned())
}

/// The access to a socket with these options.
fn access(group: Option<Gid>, mode: Option<u32>) -> Access {
    let default = if group.is_some() { 0o660 } else { 0o600 };
    Access {
        mode: mode.unwrap_or(default),
        group,
    }
}

impl Options {
    /// Who may connect as the VMM.
    pub fn socket_access(&self) -> Access {
        access(self.socket_group, self.socket_mode)
    }

    /// Who may connect to the control socket.
    pub fn control_access(&self) -> Access {
        access(self.control_group, self.control_mode)
    }

    /// The features to offer, without the extensions. They depend on the host's huge pages, too.
    pub fn offered(&self) -> Vec<Feature> {
        let mut features = self.features.clone();
        // A guest that notifies before it reuses a page can wait for memory.
        if self.granule.is_large() || self.prefault || self.allow.contains(&Hazard::Hugetlb) {
            features.push(Feature::MustTellHost);
        }
        features
    }

    /// How the device is to be.
    pub fn settings(&self) -> Settings {
        Settings {
            features: offer(&self.offered(), self.extensions),
            granularity: self.granule,
            prefault: self.prefault,
            allowed: self.allow.clone(),
            name: self.name.clone(),
            floor: self.floor,
            boot_grace: Duration::from_secs(self.boot_grace.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::features::names;
    use clap::CommandFactory;

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        Options::try_parse_from(["vhost-user-balloon"].iter().chain(arguments))
    }

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
        assert!(parse(&[]).is_err());
        assert!(parse(&["--man", "."]).is_ok());
        assert!(parse(&["--print-capabilities"]).is_ok());
        assert!(parse(&["--fd", "3"]).is_ok());
        assert!(parse(&["--fd", "0"]).is_err());
        assert!(parse(&["--fd", "3", "--socket", "s"]).is_err());
        assert!(parse(&["--socket-path", "s"]).unwrap().socket.is_some());
        assert!(parse(&["--socket", "s", "--features", "nonsense"]).is_err());
        assert!(parse(&["--socket", "s", "--features", "stop-reason"]).is_err());
    }

    #[test]
    fn others_connect_if_asked_for() {
        let access = |arguments: &[&str]| {
            let arguments = [&["--socket", "s"], arguments].concat();
            let options = parse(&arguments).unwrap();
            [options.socket_access(), options.control_access()]
        };
        let open = |mode, group: Option<u32>| Access {
            mode,
            group: group.map(Gid::from_raw),
        };
        let closed = open(0o600, None);
        assert_eq!(access(&[]), [closed; 2]);
        assert_eq!(
            access(&["--socket-group", "root"]),
            [open(0o660, Some(0)), closed]
        );
        assert_eq!(
            access(&["--control-group", "7", "--socket-mode", "0666"]),
            [open(0o666, None), open(0o660, Some(7))]
        );
        for wrong in [
            ["--socket-group", "no such group"],
            ["--control-mode", "0400"],
            ["--control-mode", "0999"],
        ] {
            assert!(parse(&[&["--socket", "s"], &wrong[..]].concat()).is_err());
        }
    }

    #[test]
    fn features_are_chosen() {
        // What auto is depends on the host.
        let offered = |arguments: &[&str]| {
            let small = match arguments.contains(&"--granule") {
                false => &["--granule", "4K"][..],
                true => &[],
            };
            let arguments = [&["--socket", "s"], small, arguments].concat();
            names(parse(&arguments).unwrap().settings().features)
        };
        assert_eq!(
            offered(&[]),
            [
                "stats",
                "free-page-hinting",
                "page-poison",
                "free-page-reporting",
                "event-idx"
            ]
        );
        assert_eq!(
            offered(&["--features", "stats,must-tell-host", "--extensions"]),
            names(offer(&[Feature::MustTellHost, Feature::Stats], true))
        );
        for option in [
            &["--granule", "2M"][..],
            &["--prefault"],
            &["--allow", "hugetlb"],
        ] {
            assert_eq!(
                offered(&[&["--features", "stats"], option].concat()),
                ["must-tell-host", "stats"]
            );
        }
    }
}
