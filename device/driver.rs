// SPDX-License-Identifier: GPL-2.0

//! The callbacks of the virtio bus, which are passed to all features of the device.

#![forbid(unsafe_code)]

use crate::{
    device::{
        attributes::ATTRIBUTES,
        bound::Bound,
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

/// The components of the driver.
pub(crate) trait Features: 'static {
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

impl<F: Features> virtio::Driver for Driver<F> {
    type Data<'bound> = Bound;

    const ID_TABLE: virtio::IdTable = F::ID_TABLE;
    const FEATURES: &'static [virtio::Feature] = &negotiation::FEATURES;
    const QUEUE_CALLBACKS: &'static [fn(&Bound)] = &Queue::callbacks();

    fn init() -> Result {
        locks::init();
        F::parameters().map(|_| ())
    }

    fn attributes() -> Option<&'static Attributes<Bound>> {
        Some(&ATTRIBUTES)
    }

    fn validate(features: &mut virtio::Features<'_>) -> Result {
        negotiation::validate(features, &F::parameters()?)
    }

    fn probe<'bound>(dev: &'bound virtio::Device<Core<'_>>) -> impl PinInit<Bound, Error> + 'bound {
        F::parameters().and_then(|parameters| Bound::probe(dev, parameters, F::PROBES))
    }

    fn ready(dev: &virtio::Device<Core<'_>>, bound: &Bound) {
        bound.ready(dev);
    }

    fn config_changed(bound: &Bound) {
        bound.config_changed();
    }

    fn unbind(_dev: &virtio::Device<Core<'_>>, bound: &Bound) {
        bound.quiesce();
    }

    fn freeze(_dev: &virtio::Device<Core<'_>>, bound: &Bound) {
        bound.quiesce();
    }

    fn frozen(bound: &Bound) {
        bound.suspended();
    }

    fn restore(dev: &virtio::Device<Core<'_>>, bound: &Bound) -> Result {
        bound.restore(dev)
    }

    fn shutdown(_dev: &virtio::Device<Core<'_>>, bound: &Bound) {
        bound.shut_down();
    }
}
