// SPDX-License-Identifier: GPL-2.0

//! The negotiation of features.

#![forbid(unsafe_code)]

use crate::{
    device::{
        queues::Queue,
        settings::Parameters, //
    },
    rust::{
        mm::memory,
        virtio::{
            self,
            FeatureBit, //
        },
        virtio_balloon::{
            ACTUAL,
            F_MUST_TELL_HOST,
            F_PAGE_POISON,
            F_PAGE_SETS,
            F_PRESSURE,
            F_REPORTING,
            F_STATS_VQ,
            F_STATUS,
            KNOWN, //
        }, //
    }, //
};

use kernel::{
    device::Core,
    fmt,
    prelude::*, //
};

/// The bits of all features that the driver knows.
pub(crate) const FEATURES: [FeatureBit; KNOWN.len()] = {
    let mut features = [F_MUST_TELL_HOST; KNOWN.len()];
    let mut n = 0;

    while n < KNOWN.len() {
        features[n] = KNOWN[n].feature;
        n += 1;
    }
    features
};

/// Gives up features that are incompatible with other features, or with this system.
///
/// # Errors
///
/// `EINVAL` if the configuration space lacks a field of a negotiated feature. The driver does not
/// give the feature up instead, since such a device may number its queues in any way.
pub(crate) fn validate(features: &mut virtio::Negotiation<'_>, parameters: &Parameters) -> Result {
    // The balloon sends guest physical addresses of pages, whatever addresses buffers have.
    features.clear(FeatureBit::ACCESS_PLATFORM);
    // A report of several parts would need memory while free pages are isolated.
    features.clear(FeatureBit::INDIRECT_DESC);
    validate_poison(features);
    if !features.has(F_STATS_VQ) {
        features.clear(F_PRESSURE);
    }
    if !parameters.wire_format.has_page_sets() {
        features.clear(F_PAGE_SETS);
    }
    // A status has the form of a page set.
    if !features.has(F_PAGE_SETS) {
        features.clear(F_STATUS);
    }
    if !features.has(FeatureBit::VERSION_1) {
        KNOWN
            .iter()
            .filter(|known| known.is_extension)
            .for_each(|known| features.clear(known.feature));
    }

    let mut fields = KNOWN
        .iter()
        .filter(|known| features.has(known.feature))
        .filter_map(|known| known.field);
    if features.have_field(ACTUAL) && fields.all(|field| features.have_field(field)) {
        return Ok(());
    }

    dev_err!(
        features,
        "the configuration space is too short for what the device offers\n"
    );
    Err(EINVAL)
}

/// Gives up features that are incompatible with the value of free pages.
///
/// Specification: clause 5.5.3.1, Driver Requirements: Feature bits.
fn validate_poison(features: &mut virtio::Negotiation<'_>) {
    if memory::free_page_value().is_none() {
        features.clear(F_PAGE_POISON);
    } else if !features.has(F_PAGE_POISON) && features.has(F_REPORTING) {
        dev_info!(
            features,
            "free pages are not reported: they have a value, and the device offers no page poison\n"
        );
        // The numbers of the queues that follow would be uncertain.
        let lost = Queue::ALL
            .into_iter()
            .skip_while(|&queue| queue != Queue::Report);
        for feature in lost.filter_map(Queue::feature) {
            features.clear(feature);
        }
    }
}

/// The negotiated features of a device, as text.
pub(crate) struct NegotiatedFeatures<'a, 'b>(pub(crate) &'a virtio::Device<Core<'b>>);

impl fmt::Display for NegotiatedFeatures<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("inflate and deflate")?;
        for known in KNOWN {
            if self.0.has_feature(known.feature) {
                write!(f, ", {}", known.words)?;
            }
        }
        Ok(())
    }
}
