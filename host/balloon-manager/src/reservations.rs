// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that is reserved for VMs that are about to start.

use std::time::Duration;

use balloon_policy::{Pages, Reservation};
use tokio::time::Instant;

/// A reservation and when it ends.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    pub(crate) reservation: Reservation,
    /// The VM that it is for.
    pub(crate) vm: Option<String>,
    /// How long it waits for its memory, and how long it keeps that.
    pub(crate) time: Duration,
    pub(crate) until: Instant,
    pub(crate) admitted: bool,
}

impl Lease {
    /// The memory is free from now on.
    pub(crate) fn admit(&mut self, now: Instant) {
        self.admitted = true;
        self.until = now + self.time;
    }
}

/// Takes the memory of a VM that has started from the reservation for it, or else from the best fitting one without a
/// name: the VM is charged with it from now on.
pub(crate) fn use_reservation(leases: &mut [Lease], name: &str, memory: Pages) {
    let is_usable = |lease: &&mut Lease| lease.vm.as_ref().is_none_or(|vm| vm == name);
    let lease = leases.iter_mut().filter(is_usable).min_by_key(|lease| {
        let pages = lease.reservation.pages;
        (lease.vm.is_none(), pages < memory, pages.abs_diff(memory))
    });
    if let Some(Lease { reservation, .. }) = lease {
        reservation.pages = reservation.pages.saturating_sub(memory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is left of reservations of so many pages for these VMs when one has started.
    fn left(leases: &[(u64, Option<&str>)], name: &str, memory: Pages) -> Vec<Pages> {
        let lease = |&(pages, vm): &(Pages, Option<&str>)| Lease {
            reservation: Reservation { id: 0, pages },
            vm: vm.map(str::to_owned),
            time: Duration::ZERO,
            until: Instant::now(),
            admitted: true,
        };
        let mut leases: Vec<_> = leases.iter().map(lease).collect();
        use_reservation(&mut leases, name, memory);
        leases.iter().map(|lease| lease.reservation.pages).collect()
    }

    #[test]
    fn a_reservation_that_has_waited_lasts_for_its_time() {
        let start = Instant::now();
        let time = Duration::from_secs(60);
        let mut lease = Lease {
            reservation: Reservation { id: 1, pages: 1 },
            vm: None,
            time,
            until: start + time,
            admitted: false,
        };
        let later = start + Duration::from_secs(55);
        lease.admit(later);
        assert_eq!((lease.admitted, lease.until), (true, later + time));
    }

    #[test]
    fn a_vm_uses_its_own_reservation_or_the_best_fitting_one() {
        let named = [(10, None), (30, Some("db")), (10, Some("web"))];
        assert_eq!(left(&named, "db", 10), [10, 20, 10]);
        assert_eq!(left(&named, "web", 11), [10, 30, 0]);
        assert_eq!(left(&named, "other", 10), [0, 30, 10]);
        assert_eq!(left(&named[1..], "other", 10), [30, 10]);
        let sizes = [(8, None), (30, None), (12, None)];
        assert_eq!(left(&sizes, "other", 10), [8, 30, 2]);
        assert_eq!(left(&sizes, "other", 40), [8, 0, 12]);
    }
}
