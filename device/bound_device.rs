// SPDX-License-Identifier: GPL-2.0

//! A bound device: its features, which it calls in the order of their list.

#![forbid(unsafe_code)]

use crate::{
    device::{
        feature::{
            Feature,
            Probe,
            Setup,
            Status, //
        },
        negotiation,
        queues::{
            Owners,
            Queue,
            QueueUsed,
            Queues,
            Traffic, //
        },
        settings::{
            Parameters,
            Settings, //
        }, //
    },
    rust::{
        fs::debugfs::{
            Dir,
            File, //
        },
        mm::memory,
        virtio,
        work::{
            task::TaskQueue,
            wakeup::WakeupSource, //
        }, //
    }, //
};

use kernel::{
    device::{
        Core,
        Device, //
    },
    prelude::*,
    str::CString,
    sync::{
        atomic::Atomic,
        Arc, //
    }, //
};

/// A bound device.
pub(crate) struct BoundDevice {
    pub(super) features: KVec<Arc<dyn Feature>>,
    /// Which of them has taken each queue.
    owners: Owners,
    settings: Arc<Settings>,
    /// The traffic of the queues, in debugfs.
    pub(super) traffic: Pin<KBox<File<Traffic>>>,
    /// Whether the device did not respond in time when the features were quiesced.
    pub(super) is_unresponsive: Atomic<bool>,
}

impl BoundDevice {
    /// Sets up the negotiated features of `dev` by `probes`.
    ///
    /// # Errors
    ///
    /// `ENODEV` in a crash kernel, or the error of a feature.
    pub(crate) fn probe(
        dev: &virtio::Device<Core<'_>>,
        parameters: Parameters,
        probes: &[Probe],
    ) -> Result<Self> {
        if memory::is_crash_kernel() {
            dev_info!(
                dev,
                "this is a crash kernel, which needs its memory: no ballooning\n"
            );
            return Err(ENODEV);
        }

        let wakeup = Arc::new(WakeupSource::new(dev), GFP_KERNEL)?;
        // It lasts as long as the counters in it.
        let dir = Dir::new(&name(dev)?)?;
        let traffic = dir.file(c"queues", Traffic::new()?);
        let traffic = KBox::pin_init(traffic, GFP_KERNEL)?;
        let settings = Arc::new(Settings::new(parameters), GFP_KERNEL)?;
        let mut setup = Setup {
            dev,
            queues: Queues::find(dev, &traffic)?,
            tasks: TaskQueue::new(&name(dev)?)?,
            settings: settings.clone(),
            wakeup,
            dir,
        };
        let mut features = KVec::new();

        for probe in probes {
            setup.queues.set_owner(features.len());
            if let Some(feature) = probe(&mut setup)? {
                features.push(feature, GFP_KERNEL)?;
            }
        }
        let owners = setup.queues.owners();
        drop(setup);
        dev_info!(dev, "features: {}\n", negotiation::NegotiatedFeatures(dev));

        Ok(Self {
            features,
            owners,
            settings,
            traffic,
            is_unresponsive: Atomic::new(false),
        })
    }

    /// See [`Feature::ready`].
    pub(crate) fn ready(&self, dev: &virtio::Device<Core<'_>>) {
        self.features.iter().for_each(|feature| feature.ready(dev));
    }

    /// See [`Feature::config_changed`].
    pub(crate) fn config_changed(&self) {
        self.features
            .iter()
            .for_each(|feature| feature.config_changed());
    }

    /// Changes a setting, and notifies the features.
    pub(crate) fn set(&self, change: impl FnOnce(&Settings)) {
        change(&self.settings);
        self.features
            .iter()
            .for_each(|feature| feature.settings_changed());
    }

    /// Returns the settings.
    pub(crate) fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Returns the balloon's status.
    pub(crate) fn status(&self) -> Result<&dyn Status> {
        let mut features = self.features.iter();

        features.find_map(|feature| feature.status()).ok_or(ENODEV)
    }
}

impl QueueUsed for BoundDevice {
    /// See [`Feature::queue_used`].
    fn queue_used(&self, queue: Queue) {
        let owner = self.owners.of(queue);

        if let Some(feature) = owner.and_then(|owner| self.features.get(owner)) {
            feature.queue_used();
        }
    }
}

/// Returns a name for an object of the device, unique among devices.
fn name(dev: &virtio::Device<Core<'_>>) -> Result<CString> {
    let dev: &Device<_> = dev.as_ref();

    CString::try_from_fmt(fmt!("virtio_balloon_rs-{}", dev.name()))
}
