// SPDX-License-Identifier: GPL-2.0

//! Rust virtio driver sample.
//!
//! The driver reads from an entropy device. To make it probe, QEMU must be run with
//! `-device virtio-rng-pci`, and `CONFIG_HW_RANDOM_VIRTIO` must not be set.

use kernel::{
    device::{
        self,
        Core, //
    },
    new_spinlock_irq,
    prelude::*,
    sync::{
        aref::ARef,
        Arc,
        SpinLockIrq, //
    },
    uapi,
    virtio::{
        self,
        DeviceWritable,
        QueueStats,
        Virtqueue, //
    }, //
};

/// What the device writes into a buffer.
type Bytes = [u8; 16];

#[pin_data]
struct SampleData {
    dev: ARef<device::Device>,
    #[pin]
    queue: SpinLockIrq<Virtqueue<DeviceWritable<Bytes>>>,
}

impl SampleData {
    /// Logs what the device has written.
    fn buffers_used(&self) {
        let mut queue = self.queue.lock();

        while let Some((mut buffer, len)) = queue.next_used() {
            let bytes = buffer.take();

            dev_info!(self.dev, "the device wrote {len} bytes: {bytes:02x?}\n");
        }
    }
}

struct SampleDriver;

kernel::virtio_device_table!(
    VIRTIO_TABLE,
    [virtio::DeviceId::any_vendor(uapi::VIRTIO_ID_RNG)]
);

impl virtio::Driver for SampleDriver {
    type Data<'bound> = SampleData;

    const ID_TABLE: virtio::IdTable = &VIRTIO_TABLE;
    const FEATURES: &'static [virtio::FeatureBit] = &[];
    const QUEUE_CALLBACKS: &'static [fn(&SampleData)] = &[SampleData::buffers_used];

    fn probe<'bound>(
        vdev: &'bound virtio::Device<Core<'_>>,
    ) -> impl PinInit<SampleData, Error> + 'bound {
        pin_init::pin_init_scope(move || {
            let dev: &device::Device<Core<'_>> = vdev.as_ref();
            let stats = Arc::new(QueueStats::new(), GFP_KERNEL)?;
            let queue = vdev.find_vqs([Some(c"input")])?.take(0, stats)?;
            let queue = queue.ok_or(ENODEV)?;

            Ok(try_pin_init!(SampleData {
                dev: dev.into(),
                queue <- new_spinlock_irq!(queue),
            }))
        })
    }

    fn ready(_vdev: &virtio::Device<Core<'_>>, data: &SampleData) {
        let is_added = DeviceWritable::new(GFP_KERNEL).is_ok_and(|buffer| {
            let mut queue = data.queue.lock();
            let is_added = queue.add(buffer).is_ok();

            queue.kick();
            is_added
        });

        if !is_added {
            dev_warn!(data.dev, "no buffer for the device\n");
        }
    }
}

kernel::module_virtio_driver! {
    type: SampleDriver,
    name: "rust_driver_virtio",
    authors: ["The virtio_balloon_rs developers"],
    description: "Rust virtio driver",
    license: "GPL v2",
}
