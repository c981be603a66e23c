// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The command line.

use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use log::LevelFilter;

use crate::device::Settings;
use crate::discard::Granularity;
use crate::features::{Feature, offer};
use crate::floor::Floor;
use crate::hazard::Hazard;

/// A virtio memory balloon for one VM, as a vhost-user device.
///
/// QEMU uses it with
///
///   -object memory-backend-memfd,id=memory,size=8G,share=on
///   -machine q35,memory-backend=memory
///   -chardev socket,id=balloon,path=SOCKET
///   -device vhost-user-test-device-pci,chardev=balloon,virtio-id=5,
///           num_vqs=6,vq_size=256,config_size=24
///
/// with the two parts of the last line in one. The memory has to be shared.
///
/// The daemon serves one VMM at a time, and waits for the next one when that is
/// gone. It ends on SIGTERM and SIGINT, and a guest that still runs is then
/// without its balloon for good: QEMU's device cannot be given another daemon.
/// The daemon's own process only keeps the connection. The device is in a child,
/// which is started anew when it has crashed, and on SIGHUP, as after an update.
/// The guest does not notice.
///
/// It needs no privileges: only directories where it may make its sockets and
/// its state file, and the memory file that the VMM hands over.
#[derive(Clone, Debug, Parser)]
#[command(version, verbatim_doc_comment, args_override_self = true)]
pub struct Options {
    /// The socket that the VMM connects to; only the user whom the daemon runs as may
    #[arg(long, value_name = "PATH", required_unless_present_any = ["man", "worker"])]
    pub socket: Option<PathBuf>,

    /// The socket that balloonctl connects to; only the user whom the daemon runs as may
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,

    /// Keep the target and the interval of the statistics in this file, also when the daemon has ended
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

    /// Offer the features of the extended protocol, which are not in the virtio specification: page-sets,
    /// with which the guest names memory by ranges and bitmaps, stop-reason, with which it tells why it
    /// stops short of the target, and host-requests, with which it can be asked for unused memory. QEMU's
    /// device needs num_vqs=6 and config_size=24 then, while 5 and 16 are enough otherwise
    #[arg(long)]
    pub extensions: bool,

    /// How often the guest is asked for statistics at first; 0 is never
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub stats_interval: u32,

    /// The smallest piece of shared memory to give back: auto, 4K or 2M. auto is 2M where the host has
    /// huge pages for shared memory. Memory in hugetlbfs is given back by its own huge pages in any case.
    /// With 2M the guest has to tell before it uses a page again (must-tell-host), so that huge pages may
    /// come in pieces
    #[arg(long, value_name = "SIZE", default_value = "auto")]
    pub granule: Granularity,

    /// Have memory ready for what comes out of the balloon before the guest uses it again. That is so in any
    /// case for hugetlbfs, and for a tmpfs that has no room for all of the guest's memory. A guest that tells
    /// before it uses a page again (must-tell-host) waits until the host has memory
    #[arg(long)]
    pub prefault: bool,

    /// Give memory back to the host in spite of these hazards, which would keep the daemon from it: pinned (a
    /// device has the addresses of the guest's pages, as with VFIO), locked (the VMM has locked its memory),
    /// userfaultfd, hugetlb (the host may have no huge page when the guest wants one back, and the VM ends
    /// then) and disk-file (the guest's memory is a file on a disk). With pinned and userfaultfd the guest
    /// can lose data
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    pub allow: Vec<Hazard>,

    /// The name of the VM, for the label `vm` of the metrics
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// How much memory to leave to the guest at least, whatever the target is: auto, or a size such as 512MiB.
    /// auto is 64 MiB and a sixteenth of the guest's memory, and half of it at most. 0 leaves this to the guest's
    /// driver
    #[arg(long, value_name = "SIZE", default_value = "auto")]
    pub floor: Floor,

    /// For how long a guest that boots is left alone by a target that was there before
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    pub boot_grace: u32,

    /// What to log to the standard error: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value_t = LevelFilter::Info)]
    pub log: LevelFilter,

    /// Have the device at work behind this socket, where the process that keeps the VMM's connection
    /// connects to
    #[arg(long, value_name = "PATH", hide = true)]
    pub worker: Option<PathBuf>,

    /// The process that has started this one, which is to end with it
    #[arg(long, value_name = "PID", hide = true)]
    pub parent: Option<i32>,

    /// Write the man page to this directory, and do nothing else
    #[arg(long, value_name = "DIR", hide = true)]
    pub man: Option<PathBuf>,
}

impl Options {
    /// How the device is to be.
    pub fn settings(&self) -> Settings {
        let mut features = self.features.clone();
        // A guest that tells before it uses a page again can wait for memory.
        if self.granule.is_large() || self.prefault || self.allow.contains(&Hazard::Hugetlb) {
            features.push(Feature::MustTellHost);
        }
        Settings {
            features: offer(&features, self.extensions),
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
    use crate::features::names;
    use clap::CommandFactory;

    fn parse(arguments: &[&str]) -> Result<Options, clap::Error> {
        Options::try_parse_from(["vhost-user-balloon"].iter().chain(arguments))
    }

    #[test]
    fn the_command_line_is_sound() {
        Options::command().debug_assert();
        assert!(parse(&[]).is_err());
        assert!(parse(&["--man", "."]).is_ok());
        assert!(parse(&["--socket", "s", "--features", "nonsense"]).is_err());
        assert!(parse(&["--socket", "s", "--features", "stop-reason"]).is_err());
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
            [
                "must-tell-host",
                "stats",
                "page-sets",
                "host-requests",
                "stop-reason"
            ]
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
