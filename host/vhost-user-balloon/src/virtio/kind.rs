// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The kinds of queues.

use balloon_wire::{
    VIRTIO_BALLOON_F_FREE_PAGE_HINT, VIRTIO_BALLOON_F_HOST_REQUESTS, VIRTIO_BALLOON_F_REPORTING,
    VIRTIO_BALLOON_F_STATS_VQ,
};
use strum::VariantArray;

/// The maximum number of queues.
pub const MAX_QUEUES: usize = Kind::ALL.len();

/// The purpose of a queue, in the order of the specification (clause 5.5.2), followed by the extension
/// (docs/protocol.md, section 2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, VariantArray)]
pub enum Kind {
    /// Inflated pages.
    Inflate,
    /// Deflated pages.
    Deflate,
    /// The guest's memory statistics.
    Stats,
    /// Free page hinting.
    Hinting,
    /// Free page reporting.
    Reporting,
    /// Host requests.
    Requests,
}

impl Kind {
    /// All kinds.
    pub const ALL: &[Self] = Self::VARIANTS;

    /// The kind of the queue with this number. The specification has fixed numbers, but Linux, QEMU and
    /// others number the present queues without gaps, so a device must do the same.
    pub fn of(number: usize, acked_features: u64) -> Option<Self> {
        Self::present(acked_features).nth(number)
    }

    /// The number of the queue.
    pub fn number(self, acked_features: u64) -> Option<usize> {
        Self::present(acked_features).position(|kind| kind == self)
    }

    /// The queues of a device with these features.
    pub fn present(acked_features: u64) -> impl Iterator<Item = Self> {
        Self::ALL.iter().copied().filter(move |kind| {
            let bit = match kind {
                Self::Inflate | Self::Deflate => return true,
                Self::Stats => VIRTIO_BALLOON_F_STATS_VQ,
                Self::Hinting => VIRTIO_BALLOON_F_FREE_PAGE_HINT,
                Self::Reporting => VIRTIO_BALLOON_F_REPORTING,
                Self::Requests => VIRTIO_BALLOON_F_HOST_REQUESTS,
            };
            acked_features & (1 << bit) != 0
        })
    }
}

/// One value for each kind of queue.
#[derive(Debug, Default)]
pub struct ByKind<T>([T; MAX_QUEUES]);

impl<T> ByKind<T> {
    /// As many as there are kinds, made by `make`.
    pub fn from_fn(mut make: impl FnMut() -> T) -> Self {
        Self(std::array::from_fn(|_| make()))
    }

    /// That of one kind.
    pub fn of(&self, kind: Kind) -> &T {
        &self.0[kind as usize]
    }

    /// That of one kind, to be changed.
    pub fn of_mut(&mut self, kind: Kind) -> &mut T {
        &mut self.0[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATS: u64 = 1 << VIRTIO_BALLOON_F_STATS_VQ;
    const HINTING: u64 = 1 << VIRTIO_BALLOON_F_FREE_PAGE_HINT;
    const REPORTING: u64 = 1 << VIRTIO_BALLOON_F_REPORTING;
    const REQUESTS: u64 = 1 << VIRTIO_BALLOON_F_HOST_REQUESTS;

    #[test]
    fn queues_are_numbered_densely() {
        assert_eq!(Kind::of(2, STATS | HINTING | REPORTING), Some(Kind::Stats));
        assert_eq!(
            Kind::of(4, STATS | HINTING | REPORTING),
            Some(Kind::Reporting)
        );
        assert_eq!(Kind::of(3, STATS | REPORTING), Some(Kind::Reporting));
        assert_eq!(Kind::of(2, REPORTING), Some(Kind::Reporting));
        assert_eq!(Kind::of(2, 0), None);
        assert_eq!(Kind::Reporting.number(REPORTING), Some(2));
        assert_eq!(Kind::Stats.number(REPORTING), None);
        // The last of those that are there (HR-D1).
        for (others, number) in [
            (0, 2),
            (STATS, 3),
            (STATS | REPORTING, 4),
            (STATS | HINTING | REPORTING, 5),
        ] {
            assert_eq!(Kind::Requests.number(others | REQUESTS), Some(number));
            assert_eq!(Kind::of(number, others), None);
        }
    }
}
