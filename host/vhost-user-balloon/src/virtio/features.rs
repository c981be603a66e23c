// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The features that the device can offer.

use std::fmt;

use balloon_wire::{
    VIRTIO_BALLOON_F_DEFLATE_ON_OOM, VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    VIRTIO_BALLOON_F_HOST_REQUESTS, VIRTIO_BALLOON_F_MUST_TELL_HOST, VIRTIO_BALLOON_F_PAGE_POISON,
    VIRTIO_BALLOON_F_PAGE_SETS, VIRTIO_BALLOON_F_PRESSURE, VIRTIO_BALLOON_F_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ, VIRTIO_BALLOON_F_STATUS, VIRTIO_BALLOON_F_STOP_REASON, config,
};
use clap::ValueEnum;
use strum::VariantArray;
use vhost::vhost_user::message::VhostUserVirtioFeatures;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

/// A feature that can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, VariantArray)]
pub enum Feature {
    /// The guest notifies the device before it reuses a page.
    MustTellHost,
    /// The guest sends memory statistics.
    Stats,
    /// The guest deflates before it runs out of memory.
    DeflateOnOom,
    /// The guest lists free pages on request, for a migration.
    FreePageHinting,
    /// The guest reports the content of its free pages.
    PagePoison,
    /// The guest reports free pages continuously.
    FreePageReporting,
    /// Both sides suppress needless notifications.
    EventIdx,
    /// The guest describes pages by ranges and bitmaps; an extension.
    #[value(skip)]
    PageSets,
    /// The guest answers requests; an extension.
    #[value(skip)]
    HostRequests,
    /// The guest reports why it stays below the target; an extension.
    #[value(skip)]
    StopReason,
    /// The guest sends statistics unasked when it is short of memory; an extension.
    #[value(skip)]
    Pressure,
    /// The guest reports its size and its stop reason in messages; an extension.
    #[value(skip)]
    Status,
}

impl Feature {
    /// All of them.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// The feature's bit, alone.
    pub const fn mask(self) -> u64 {
        1 << match self {
            Self::MustTellHost => VIRTIO_BALLOON_F_MUST_TELL_HOST,
            Self::Stats => VIRTIO_BALLOON_F_STATS_VQ,
            Self::DeflateOnOom => VIRTIO_BALLOON_F_DEFLATE_ON_OOM,
            Self::FreePageHinting => VIRTIO_BALLOON_F_FREE_PAGE_HINT,
            Self::PagePoison => VIRTIO_BALLOON_F_PAGE_POISON,
            Self::FreePageReporting => VIRTIO_BALLOON_F_REPORTING,
            Self::EventIdx => VIRTIO_RING_F_EVENT_IDX,
            Self::PageSets => VIRTIO_BALLOON_F_PAGE_SETS,
            Self::HostRequests => VIRTIO_BALLOON_F_HOST_REQUESTS,
            Self::StopReason => VIRTIO_BALLOON_F_STOP_REASON,
            Self::Pressure => VIRTIO_BALLOON_F_PRESSURE,
            Self::Status => VIRTIO_BALLOON_F_STATUS,
        }
    }

    /// Whether it is not in the specification (docs/protocol.md, section 1). Users choose all extensions or none, so
    /// the command line has no value for one.
    fn is_extension(self) -> bool {
        self.to_possible_value().is_none()
    }

    /// Whether it is in a set of features.
    pub const fn is_in(self, features: u64) -> bool {
        features & self.mask() != 0
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MustTellHost => "must-tell-host",
            Self::Stats => "stats",
            Self::DeflateOnOom => "deflate-on-oom",
            Self::FreePageHinting => "free-page-hinting",
            Self::PagePoison => "page-poison",
            Self::FreePageReporting => "free-page-reporting",
            Self::EventIdx => "event-idx",
            Self::PageSets => "page-sets",
            Self::HostRequests => "host-requests",
            Self::StopReason => "stop-reason",
            Self::Pressure => "pressure",
            Self::Status => "status",
        })
    }
}

/// The names of the features in a set.
pub fn names(features: u64) -> Vec<String> {
    Feature::ALL
        .iter()
        .filter(|feature| feature.is_in(features))
        .map(ToString::to_string)
        .collect()
}

/// The offered features: these, and the mandatory ones. Pressure notices are statistics (PN-V1).
pub fn offer(features: &[Feature], extensions: bool) -> u64 {
    let offered = |feature: &Feature| match feature {
        Feature::Pressure => extensions && features.contains(&Feature::Stats),
        _ => features.contains(feature) || (extensions && feature.is_extension()),
    };
    let set = Feature::ALL.iter().filter(|feature| offered(feature));
    set.fold(0, |set, feature| set | feature.mask())
        | (1 << VIRTIO_F_VERSION_1)
        | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
}

/// How much of the configuration space a driver may read, in bytes.
pub fn config_size(features: u64) -> usize {
    let has = |feature: Feature| feature.is_in(features);
    let mut extensions = Feature::ALL.iter().filter(|feature| feature.is_extension());
    if extensions.any(|&feature| has(feature)) {
        config::SIZE
    } else if has(Feature::PagePoison) {
        config::DISCARD_GRANULE
    } else if has(Feature::FreePageHinting) {
        config::POISON_VAL
    } else {
        config::FREE_PAGE_HINT_CMD_ID
    }
}

/// Whether a driver with these features notifies the device before it reuses a page.
///
/// With page sets it must, unless its guest is out of memory and deflate on OOM was negotiated (PS-D14,
/// PS-V10).
pub fn tells_before_use(features: u64) -> bool {
    let has = |feature: Feature| feature.is_in(features);
    has(Feature::MustTellHost) || (has(Feature::PageSets) && !has(Feature::DeflateOnOom))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_command_line() {
        for feature in Feature::value_variants() {
            let value = feature.to_possible_value().unwrap();
            assert_eq!(value.get_name(), feature.to_string());
            assert_eq!(names(feature.mask()), [feature.to_string()]);
        }
    }

    #[test]
    fn extensions_are_offered_on_request() {
        assert_eq!(names(offer(&[Feature::Stats], false)), ["stats"]);
        assert_eq!(
            names(offer(&[], true)),
            ["page-sets", "host-requests", "stop-reason", "status"]
        );
        assert_eq!(
            names(offer(&[Feature::Stats], true)),
            [
                "stats",
                "page-sets",
                "host-requests",
                "stop-reason",
                "pressure",
                "status"
            ]
        );
    }

    #[test]
    fn the_configuration_space_grows_with_the_features() {
        let sizes = [
            offer(&[Feature::Stats], false),
            offer(&[Feature::FreePageHinting], false),
            offer(&[Feature::PagePoison], false),
            Feature::PageSets.mask(),
            Feature::HostRequests.mask(),
            Feature::StopReason.mask(),
            Feature::Pressure.mask(),
            Feature::Status.mask(),
        ];
        assert_eq!(sizes.map(config_size), [8, 12, 16, 24, 24, 24, 24, 24]);
    }

    #[test]
    fn some_drivers_tell_before_they_use_a_page() {
        use Feature::{DeflateOnOom, MustTellHost, PageSets};
        for (features, tells) in [
            (&[][..], false),
            (&[DeflateOnOom], false),
            (&[MustTellHost, DeflateOnOom], true),
            (&[PageSets], true),
            (&[PageSets, DeflateOnOom], false),
            (&[PageSets, MustTellHost, DeflateOnOom], true),
        ] {
            assert_eq!(
                tells_before_use(offer(features, false)),
                tells,
                "{features:?}"
            );
        }
    }
}
