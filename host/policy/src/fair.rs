// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Weighted max-min fairness, in whole pages.

use crate::observation::Pages;

/// One VM's claim on memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The claim gets this first.
    pub floor: Pages,
    /// The claim gets no more than this, or than its floor if that is more.
    pub want: Pages,
    /// Its share of what is contended, relative to the other claims. 0 counts as 1.
    pub weight: u16,
}

/// The binary digits of a level after the point: as many as the largest weight has, so that two neighbouring levels
/// differ by at most one page for each claim.
const FRACTION: u32 = u16::BITS;

impl Claim {
    fn weight(&self) -> u128 {
        u128::from(self.weight.max(1))
    }

    /// What the claim gets when each unit of weight is worth `level` pages, in units of 2^-FRACTION.
    fn at(&self, level: u128) -> Pages {
        let pages = Pages::try_from((self.weight() * level) >> FRACTION).unwrap_or(Pages::MAX);
        pages.min(self.want).max(self.floor)
    }
}

/// Divides `capacity` between claims: each one gets its floor, and then the page after page goes to the claim with the
/// least memory for its weight, until it has what it wants. Of several the first one gets the page. When the floors do
/// not fit, they are what is divided.
///
/// The result has the properties of the sequence of pages: more capacity takes nothing from any claim, and neither does
/// a claim that goes away or wants less.
pub fn share(capacity: Pages, claims: &[Claim]) -> Vec<Pages> {
    let sum = |pages: &mut dyn Iterator<Item = Pages>| pages.fold(0, Pages::saturating_add);
    if sum(&mut claims.iter().map(|claim| claim.floor)) > capacity {
        let floors: Vec<_> = claims
            .iter()
            .map(|claim| Claim {
                floor: 0,
                want: claim.floor,
                ..*claim
            })
            .collect();
        return share(capacity, &floors);
    }
    let at = |level: u128| sum(&mut claims.iter().map(|claim| claim.at(level)));
    // At this level each claim has at least a page for each page of the capacity.
    let mut beyond = (u128::from(capacity) + 1) << FRACTION;
    let mut level = 0;
    if at(beyond) <= capacity {
        return claims.iter().map(|claim| claim.at(beyond)).collect();
    }
    while beyond - level > 1 {
        let middle = level.midpoint(beyond);
        if at(middle) <= capacity {
            level = middle;
        } else {
            beyond = middle;
        }
    }
    let mut shares: Vec<_> = claims.iter().map(|claim| claim.at(level)).collect();
    let mut next: Vec<_> = (0..claims.len())
        .filter(|&index| shares[index] < claims[index].want)
        .collect();
    // By (share + 1) / weight; the sort is stable.
    next.sort_by(|&a, &b| {
        let key =
            |index: usize, other: usize| (u128::from(shares[index]) + 1) * claims[other].weight();
        key(a, b).cmp(&key(b, a))
    });
    let rest = capacity - sum(&mut shares.iter().copied());
    for &index in next
        .iter()
        .take(usize::try_from(rest).unwrap_or(usize::MAX))
    {
        shares[index] += 1;
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn claim(floor: Pages, want: Pages, weight: u16) -> Claim {
        Claim {
            floor,
            want,
            weight,
        }
    }

    #[test]
    fn memory_goes_by_weight_until_a_claim_has_enough() {
        assert_eq!(share(100, &[claim(0, 100, 1), claim(0, 100, 3)]), [25, 75]);
        assert_eq!(share(100, &[claim(0, 10, 1), claim(0, 100, 1)]), [10, 90]);
        assert_eq!(share(100, &[claim(40, 90, 1), claim(0, 90, 9)]), [40, 60]);
        assert_eq!(share(100, &[claim(0, 30, 1), claim(0, 40, 1)]), [30, 40]);
        assert_eq!(share(100, &[]), []);
    }

    #[test]
    fn floors_that_do_not_fit_are_divided() {
        assert_eq!(share(10, &[claim(10, 10, 1), claim(10, 20, 1)]), [5, 5]);
        assert_eq!(share(10, &[claim(2, 10, 1), claim(20, 20, 1)]), [2, 8]);
    }

    #[test]
    fn the_rest_goes_to_the_first() {
        assert_eq!(share(5, &[claim(0, 9, 1), claim(0, 9, 1)]), [3, 2]);
    }

    #[test]
    fn the_largest_hosts_do_not_overflow() {
        let claims = vec![claim(0, 1 << 44, u16::MAX); 10_000];
        let shares = share(1 << 44, &claims);
        assert_eq!(shares.iter().sum::<Pages>(), 1 << 44);
        assert_eq!(share(Pages::MAX, &claims), vec![1 << 44; 10_000]);
    }
}
