// SPDX-License-Identifier: GPL-2.0

//! The callbacks of the virtio bus, which are passed to all features of the device.

#![forbid(unsafe_code)]

use crate::{
    device::{
        attributes::ATTRIBUTES,
        bound_device::BoundDevice,
        feature::Probe,
        negotiation,
        queues::Queue,
        settings::Parameters, //
    },
    rust::{
        fs::sysfs::Attributes,
        mm::locks,
        virtio, //
    }, //
};

use core::marker::PhantomData;
use kernel::{
    device::Core,
    prelude::*, //
};

/// What distinguishes the driver: its ids, features and parameters.
pub(crate) trait FeatureList: 'static {
    /// The ids of its devices.
    const ID_TABLE: virtio::IdTable;

    /// The features of a device. Each step of their life cycle calls them in this order, and so are
    /// they dropped.
    const PROBES: &'static [Probe];

    /// Returns the values of the module's parameters.
    ///
    /// # Errors
    ///
    /// `EINVAL` if one has no legal value. The error is logged.
    fn parameters() -> Result<Parameters>;
}

/// The driver with the features `F`.
pub(crate) struct Driver<F>(PhantomData<F>);

impl<F: FeatureList> virtio::Driver for Driver<F> {
    type Data<'bound> = BoundDevice;

    const ID_TABLE: virtio::IdTable = F::ID_TABLE;
    const FEATURES: &'static [virtio::FeatureBit] = &negotiation::FEATURES;
    const QUEUE_CALLBACKS: &'static [fn(&BoundDevice)] = &Queue::callbacks();

    fn init() -> Result {
        locks::init();
        F::parameters().map(|_| ())
    }

    fn attributes() -> Option<&'static Attributes<BoundDevice>> {
        Some(&ATTRIBUTES)
    }

    fn validate(features: &mut virtio::Negotiation<'_>) -> Result {
        negotiation::validate(features, &F::parameters()?)
    }

    fn probe<'bound>(
        dev: &'bound virtio::Device<Core<'_>>,
    ) -> impl PinInit<BoundDevice, Error> + 'bound {
        F::parameters().and_then(|parameters| BoundDevice::probe(dev, parameters, F::PROBES))
    }

    fn ready(dev: &virtio::Device<Core<'_>>, bound: &BoundDevice) {
        bound.ready(dev);
    }

    fn config_changed(bound: &BoundDevice) {
        bound.config_changed();
    }

    fn quiesce(_dev: &virtio::Device<Core<'_>>, bound: &BoundDevice) {
        bound.quiesce();
    }

    fn after_reset(_dev: &virtio::Device<Core<'_>>, bound: &BoundDevice) {
        bound.after_reset();
    }

    fn restore(dev: &virtio::Device<Core<'_>>, bound: &BoundDevice) -> Result {
        bound.restore(dev)
    }

    fn shutdown(_dev: &virtio::Device<Core<'_>>, bound: &BoundDevice) {
        bound.shutdown();
    }
}
