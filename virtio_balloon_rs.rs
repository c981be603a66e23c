// SPDX-License-Identifier: GPL-2.0

//! Virtio memory balloon driver.
//!
//! The host asks for memory by setting a target in the device's configuration space. The driver
//! takes that much from the page allocator, tells the host which pages it got, and leaves them
//! alone; when the target falls, the pages go back to the page allocator.
//!
//! Where to look: [`device`] has what all features share, [`balloon`] decides how large the balloon
//! is to be and moves pages, [`messages`] describes pages to the device, with the encoder of
//! [`bitmap`]. [`features`] has statistics, hints, reports and the host's requests, [`sources`] the
//! ways to memory. [`rust`] is the layer over the kernel's C, with the virtio bus.
//!
//! C header: [`include/uapi/linux/virtio_balloon.h`](srctree/include/uapi/linux/virtio_balloon.h)
//!
//! Specification: "Virtual I/O Device (VIRTIO)", clause 5.5, Traditional Memory Balloon Device.

#![deny(unsafe_code)]

mod balloon;
mod bitmap;
mod device;
mod features;
mod free_pages;
mod messages;
mod rust;
mod sources;

#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
#[path = "tests/kunit/mod.rs"]
mod kunit;

use balloon::control_loop::Balloon;
use bitmap::Encoding;
use device::{
    attributes,
    poison,
    queues::{
        AllTraffic,
        Queue,
        Queues, //
    },
    settings::Settings, //
};
use features::{
    hinting::{
        Hinting,
        Hints, //
    },
    host_requests::HostRequests,
    reporting::Reporting,
    stats::Stats, //
};
use kernel::{
    device::{
        Core,
        Device, //
    },
    fmt,
    prelude::*,
    str::CString,
    sync::Arc, //
};
use rust::{
    fs::{
        debugfs::{
            Dir,
            File, //
        },
        sysfs::Attributes, //
    },
    notifiers::{
        memory_hotplug::OfflineNotifier,
        oom::OomNotifier, //
    },
    virtio,
    virtio_balloon,
    work::{
        task::{
            new_slot,
            Task,
            TaskQueue, //
        },
        wakeup::WakeupSource, //
    }, //
};

struct BalloonDriver;

/// A bound device.
///
/// Each task is for itself: statistics are to be had while the balloon changes its size.
struct BalloonData {
    /// The size of the balloon and what has gone through the queues, in debugfs.
    _shown: Pin<KBox<File<Arc<Task<Balloon>>>>>,
    traffic: Pin<KBox<File<AllTraffic>>>,
    /// Dropped before the balloon, which it asks for memory.
    _oom: Option<Pin<KBox<OomNotifier<Task<Balloon>>>>>,
    _offline: Pin<KBox<OfflineNotifier<Task<Balloon>>>>,
    balloon: Arc<Task<Balloon>>,
    settings: Arc<Settings>,
    stats: Option<Pin<KBox<Task<Stats>>>>,
    hints: Option<Hints>,
    reporting: Option<Reporting>,
    requests: Option<Arc<Task<HostRequests>>>,
}

virtio::virtio_device_table!(ID_TABLE, [virtio::DeviceId::BALLOON]);

impl virtio::Driver for BalloonDriver {
    type Data = BalloonData;

    const ID_TABLE: virtio::IdTable = &ID_TABLE;
    const FEATURES: &'static [virtio::Feature] = &[
        virtio_balloon::F_MUST_TELL_HOST,
        virtio_balloon::F_STATS_VQ,
        virtio_balloon::F_DEFLATE_ON_OOM,
        virtio_balloon::F_FREE_PAGE_HINT,
        virtio_balloon::F_PAGE_POISON,
        virtio_balloon::F_REPORTING,
        virtio_balloon::F_STOP_REASON,
        virtio_balloon::F_PAGE_SETS,
        virtio_balloon::F_HOST_REQUESTS,
    ];

    fn attributes() -> &'static Attributes<BalloonData> {
        &attributes::ATTRIBUTES
    }

    fn validate(features: &mut virtio::Features<'_>) -> Result {
        // The balloon names pages by their guest physical addresses, whatever the device uses for
        // buffers.
        features.clear(virtio::Feature::ACCESS_PLATFORM);
        // A report of several parts would need memory while free pages are set aside.
        features.clear(virtio::Feature::INDIRECT_DESC);
        poison::negotiate(features);
        if module_parameters::encoding.value() == encoding::PFNS {
            features.clear(virtio_balloon::F_PAGE_SETS);
        }
        if !features.has(virtio::Feature::VERSION_1) {
            features.clear(virtio_balloon::F_STOP_REASON);
            features.clear(virtio_balloon::F_PAGE_SETS);
            features.clear(virtio_balloon::F_HOST_REQUESTS);
        }
        check_fields(features)
    }

    fn probe(dev: &virtio::Device<Core<'_>>) -> Result<Self::Data> {
        if rust::mm::memory::is_crash_kernel() {
            dev_info!(
                dev,
                "this is a crash kernel, which needs its memory: no ballooning\n"
            );
            return Err(ENODEV);
        }

        poison::announce(dev)?;
        let wakeup = Arc::new(WakeupSource::new(dev), GFP_KERNEL)?;

        // It lasts as long as the counters in it.
        let dir = Dir::new(&name(dev)?)?;
        let traffic = dir.file(c"queues", AllTraffic::new()?);
        let traffic = KBox::pin_init(traffic, GFP_KERNEL)?;
        let queues = Queues::find(dev, forced_encoding(), &traffic)?;
        let settings = Arc::new(Settings::from_parameters(), GFP_KERNEL)?;
        let tasks = TaskQueue::new(&name(dev)?)?;
        let slot = new_slot!(c"virtio_balloon_rs", tasks)?;
        let balloon = Balloon::new(
            &slot,
            dev,
            queues.inflate,
            queues.deflate,
            &tasks,
            settings.clone(),
            wakeup.clone(),
        )?;
        let balloon = Arc::pin_init(Task::new(slot, balloon), GFP_KERNEL)?;
        let oom = dev
            .has_feature(virtio_balloon::F_DEFLATE_ON_OOM)
            .then(|| KBox::pin_init(OomNotifier::new(balloon.clone()), GFP_KERNEL))
            .transpose()?;
        let offline = KBox::pin_init(OfflineNotifier::new(balloon.clone()), GFP_KERNEL)?;
        let stats = queues
            .stats
            .map(|queue| {
                let stats = Stats::new(queue, dev.byte_order(), wakeup)?;
                let slot = new_slot!(c"virtio_balloon_rs_stats", tasks)?;

                KBox::pin_init(Task::new(slot, stats), GFP_KERNEL)
            })
            .transpose()?;

        let hints = queues
            .hints
            .map(|queue| Hints::new(dev, queue, &tasks, settings.clone(), &dir))
            .transpose()?;
        let reporting = queues
            .reports
            .map(|queue| Reporting::new(dev, queue, settings.clone(), &dir))
            .transpose()?;

        let requests = queues
            .requests
            .map(|queue| HostRequests::new(dev, queue, &tasks, settings.clone(), &dir))
            .transpose()?;

        let shown = KBox::pin_init(dir.file(c"balloon", balloon.clone()), GFP_KERNEL)?;
        dev_info!(dev, "features: {}\n", Features(dev));

        Ok(BalloonData {
            _shown: shown,
            traffic,
            _oom: oom,
            _offline: offline,
            balloon,
            settings,
            stats,
            hints,
            reporting,
            requests,
        })
    }

    fn ready(dev: &virtio::Device<Core<'_>>, data: &Self::Data) {
        data.balloon.target_changed();
        data.balloon.schedule();
        if let Some(stats) = &data.stats {
            stats.schedule();
        }
        if let Some(hints) = &data.hints {
            hints.task.id_changed();
            hints.task.schedule();
        }
        if let Some(reporting) = &data.reporting {
            reporting.start(dev);
        }
        if let Some(requests) = &data.requests {
            requests.schedule();
        }
    }

    fn queue_used(data: &Self::Data, index: usize) {
        match Queue::from_index(index) {
            Some(Queue::Inflate | Queue::Deflate) => {
                data.balloon.queue_used();
                data.balloon.schedule();
            }
            Some(Queue::Stats) => data.stats.iter().for_each(|stats| Stats::asked(stats)),
            Some(Queue::Hint) => data.hints.iter().for_each(|hints| hints.task.schedule()),
            Some(Queue::Report) => data.reporting.iter().for_each(Reporting::queue_used),
            Some(Queue::Request) => data
                .requests
                .iter()
                .for_each(|requests| requests.schedule()),
            None => (),
        }
    }

    fn config_changed(data: &Self::Data) {
        data.balloon.target_changed();
        data.balloon.schedule();
        if let Some(hints) = &data.hints {
            hints.task.id_changed();
            hints.task.schedule();
        }
    }

    fn unbind(_dev: &virtio::Device<Core<'_>>, data: &Self::Data) {
        data.leave();
    }

    fn freeze(_dev: &virtio::Device<Core<'_>>, data: &Self::Data) {
        // The host need not keep what it knows of the balloon, and an image on the disk must not
        // lack memory: as if the driver were unbound.
        data.leave();
    }

    fn frozen(data: &Self::Data) {
        data.balloon.take_back();
        if let Some(hints) = &data.hints {
            hints.task.take_back();
        }
        if let Some(requests) = &data.requests {
            requests.take_back();
        }
    }

    fn restore(dev: &virtio::Device<Core<'_>>, data: &Self::Data) -> Result {
        // QEMU does not outlive the start of a device that has lost its back end.
        if data.balloon.was_silent() {
            dev_warn!(
                dev,
                "the device did not answer before the system slept: no more ballooning until the driver is bound again\n"
            );
            return Err(ENODEV);
        }

        // The device has forgotten it.
        poison::announce(dev)?;

        let queues = Queues::find(dev, forced_encoding(), &data.traffic)?;

        data.balloon.attach(dev, queues.inflate, queues.deflate)?;
        data.balloon.resume();

        if let (Some(stats), Some(queue)) = (&data.stats, queues.stats) {
            stats.attach(queue)?;
            stats.resume();
        }
        if let (Some(hints), Some(queue)) = (&data.hints, queues.hints) {
            hints.task.attach(dev, queue)?;
            hints.task.resume();
        }
        if let (Some(reporting), Some(queue)) = (&data.reporting, queues.reports) {
            reporting.attach(queue);
        }
        if let (Some(requests), Some(queue)) = (&data.requests, queues.requests) {
            requests.attach(dev, queue)?;
            requests.resume();
        }

        Ok(())
    }

    fn shutdown(_dev: &virtio::Device<Core<'_>>, data: &Self::Data) {
        Balloon::shut_down(&data.balloon);
        if let Some(stats) = &data.stats {
            stats.stop();
        }
        if let Some(hints) = &data.hints {
            Hinting::shut_down(&hints.task);
        }
        // Caches that are being dropped do not concern the device.
        if let Some(requests) = &data.requests {
            HostRequests::shut_down(requests);
        }
    }
}

/// What was negotiated, in words.
struct Features<'a, 'b>(&'a virtio::Device<Core<'b>>);

impl fmt::Display for Features<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("inflate and deflate")?;
        for (feature, words) in [
            (virtio_balloon::F_MUST_TELL_HOST, "the host is told first"),
            (virtio_balloon::F_STATS_VQ, "statistics"),
            (virtio_balloon::F_DEFLATE_ON_OOM, "deflate on OOM"),
            (virtio_balloon::F_FREE_PAGE_HINT, "free page hinting"),
            (virtio_balloon::F_PAGE_POISON, "page poison"),
            (virtio_balloon::F_REPORTING, "free page reporting"),
            (virtio_balloon::F_STOP_REASON, "stop reasons"),
            (virtio_balloon::F_PAGE_SETS, "page sets"),
            (virtio_balloon::F_HOST_REQUESTS, "host requests"),
        ] {
            if self.0.has_feature(feature) {
                write!(f, ", {words}")?;
            }
        }
        Ok(())
    }
}

/// Checks that the device has the fields of what was negotiated.
///
/// # Errors
///
/// `EINVAL`: features are not given up for it, since such a device may number its queues in any
/// way.
fn check_fields(features: &virtio::Features<'_>) -> Result {
    let has = |feature| features.has(feature);
    let fits = [
        (true, virtio_balloon::ACTUAL),
        (
            has(virtio_balloon::F_FREE_PAGE_HINT),
            virtio_balloon::HINT_ID,
        ),
        (
            has(virtio_balloon::F_PAGE_POISON),
            virtio_balloon::POISON_VAL,
        ),
        (
            has(virtio_balloon::F_STOP_REASON),
            virtio_balloon::STOP_REASON,
        ),
    ]
    .into_iter()
    .all(|(needed, field)| !needed || features.have_field(field));

    if !fits {
        dev_err!(
            features,
            "the configuration space is too short for what the device offers\n"
        );
    }
    fits.then_some(()).ok_or(EINVAL)
}

/// What the parameter `encoding` means, beside the default: the shorter one of ranges and bitmaps.
mod encoding {
    /// Page sets are ranges.
    pub(super) const RANGES: u8 = 1;
    /// Page sets are bitmaps.
    pub(super) const BITMAPS: u8 = 2;
    /// No page sets, but arrays of page frame numbers.
    pub(super) const PFNS: u8 = 3;
}

/// Returns the encoding that page sets must have, if there is one.
fn forced_encoding() -> Option<Encoding> {
    match module_parameters::encoding.value() {
        encoding::RANGES => Some(Encoding::Ranges),
        encoding::BITMAPS => Some(Encoding::Bitmap),
        _ => None,
    }
}

/// Returns the name of what belongs to the device, where there may be more than one.
fn name(dev: &virtio::Device<Core<'_>>) -> Result<CString> {
    let dev: &Device<_> = dev.as_ref();

    CString::try_from_fmt(fmt!("virtio_balloon_rs-{}", dev.name()))
}

impl BalloonData {
    /// Gives everything back and stops all that is going on: the device is about to be reset.
    fn leave(&self) {
        if let Some(hints) = &self.hints {
            Hinting::leave(&hints.task);
        }
        Balloon::give_back(&self.balloon);
        if let Some(stats) = &self.stats {
            Stats::stop(stats);
        }
        if let Some(requests) = &self.requests {
            HostRequests::stop(requests);
        }
    }
}

virtio::module_virtio_driver! {
    type: BalloonDriver,
    name: "virtio_balloon_rs",
    authors: ["The virtio_balloon_rs developers"],
    description: "Virtio balloon driver",
    license: "GPL",
    params: {
        inflate: bool {
            default: true,
            description: "Whether the host's wishes for memory are followed; statistics, hints and reports go on if not",
        },
        encoding: u8 {
            default: 0,
            description: "How pages are named, for measuring: 0 as short as possible, 1 ranges, 2 bitmaps, 3 page frame numbers",
        },
        memory_blocks: bool {
            default: true,
            description: "Whether free memory blocks are taken offline and online, for the balloon and for the host, where the kernel zeroes what it allocates",
        },
        floor_mib: i32 {
            default: -1,
            description: "Available memory in MiB below which the balloon does not grow, nor are hints given (0: no limit, -1: by the guest's memory)",
        },
    },
}
