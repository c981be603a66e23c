// SPDX-License-Identifier: GPL-2.0

//! The balloon as a feature of a device.

#![forbid(unsafe_code)]

use crate::{
    balloon::{
        migration::Migration,
        state::Balloon,
        teardown, //
    },
    device::{
        feature::{
            Feature,
            Setup,
            Status, //
        },
        queues::{
            Queue,
            Queues, //
        },
        settings::Settings, //
    },
    messages::message::{
        Command,
        Format,
        MessageQueue, //
    },
    rust::{
        fs::debugfs,
        notifiers::{
            memory_hotplug::OfflineNotifier,
            oom::OomNotifier, //
        },
        virtio,
        virtio_balloon::F_DEFLATE_ON_OOM,
        work::task::{
            new_slot,
            Task, //
        }, //
    }, //
};

use kernel::{
    device::Core,
    prelude::*,
    sync::Arc,
    time::{
        Instant,
        Monotonic, //
    }, //
};

/// The balloon of a bound device, with its registrations, which are dropped before its task.
pub(crate) struct BalloonFeature {
    _shown: Pin<KBox<debugfs::File<Arc<Task<Balloon>>>>>,
    _oom: Option<Pin<KBox<OomNotifier<Task<Balloon>>>>>,
    _offline: Pin<KBox<OfflineNotifier<Task<Balloon>>>>,
    task: Arc<Task<Balloon>>,
}

/// Returns the inflate and the deflate queue.
fn take_queues(
    dev: &virtio::Device<Core<'_>>,
    queues: &mut Queues<'_>,
    settings: &Settings,
) -> Result<(MessageQueue<Migration>, MessageQueue<Migration>)> {
    let format = Format::of(dev, settings.encodings());
    let inflate = queues.take(Queue::Inflate)?.ok_or(ENOENT)?;
    let deflate = queues.take(Queue::Deflate)?.ok_or(ENOENT)?;

    Ok((
        MessageQueue::new(inflate, format, Command::Inflate)?,
        MessageQueue::new(deflate, format, Command::Deflate)?,
    ))
}

impl BalloonFeature {
    /// Sets up the feature, which every device has.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or the error of [`virtio::Device::config`].
    pub(crate) fn probe(setup: &mut Setup<'_, '_>) -> Result<Option<Arc<dyn Feature>>> {
        let (inflate, deflate) = take_queues(setup.dev, &mut setup.queues, &setup.settings)?;
        let slot = new_slot!(c"virtio_balloon_rs", setup.tasks)?;
        let balloon = Balloon::new(
            &slot,
            setup.dev,
            inflate,
            deflate,
            setup.settings.clone(),
            setup.wakeup.clone(),
        )?;
        let task = Arc::pin_init(Task::new(slot, balloon), GFP_KERNEL)?;
        let oom = setup
            .dev
            .has_feature(F_DEFLATE_ON_OOM)
            .then(|| KBox::pin_init(OomNotifier::new(task.clone()), GFP_KERNEL))
            .transpose()?;

        let feature = Self {
            _shown: KBox::pin_init(setup.dir.file(c"balloon", task.clone()), GFP_KERNEL)?,
            _oom: oom,
            _offline: KBox::pin_init(OfflineNotifier::new(task.clone()), GFP_KERNEL)?,
            task,
        };
        Ok(Some(Arc::new(feature, GFP_KERNEL)?))
    }
}

impl Feature for BalloonFeature {
    fn ready(&self, _dev: &virtio::Device<Core<'_>>) {
        self.config_changed();
    }

    fn queue_used(&self) {
        self.task.queue_used();
        self.task.schedule();
    }

    fn config_changed(&self) {
        self.task.target_changed();
        self.task.schedule();
    }

    fn settings_changed(&self) {
        self.task.settings_changed();
        self.task.schedule();
    }

    fn quiesce(&self, begin: Instant<Monotonic>) -> Result {
        teardown::quiesce(&self.task, begin)
    }

    fn shutdown(&self) {
        teardown::shutdown(&self.task);
    }

    fn after_reset(&self) {
        teardown::after_reset(&self.task);
    }

    fn restore(&self, dev: &virtio::Device<Core<'_>>, queues: &mut Queues<'_>) -> Result {
        let (inflate, deflate) = take_queues(dev, queues, self.task.settings())?;

        self.task.attach(dev, inflate, deflate)?;
        self.task.resume();
        Ok(())
    }

    fn give_up(&self) {
        self.task.bring_blocks_online();
    }

    fn status(&self) -> Option<&dyn Status> {
        Some(&**self.task)
    }
}
