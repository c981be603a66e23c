// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Orders whose fate is not known.

use std::time::Duration;

use tokio::time::Instant;

/// A request whose connection broke has no effect any more once the device has answered others for so long. A daemon that
/// is stopped executes it when it continues.
const FATE: Duration = Duration::from_secs(10);

/// An order whose connection broke before the device answered.
pub(crate) struct Doubt {
    pub(crate) number: u64,
    /// The targets that this order and later ones are to replace: each may be in force.
    pub(crate) before: Vec<u64>,
    /// The order's target, unless there are later orders.
    pub(crate) target: Option<u64>,
    /// Since when the device has answered again.
    pub(crate) since: Option<Instant>,
}

impl Doubt {
    /// The device has answered that it has this target, or not. Returns whether the order's fate is known.
    pub(crate) fn is_over(&mut self, target: Option<u64>, now: Instant) -> bool {
        self.since = target.map(|_| self.since.unwrap_or(now));
        let is_set = target.is_some() && target == self.target;
        is_set || self.since.is_some_and(|since| now - since >= FATE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An order to replace the target 1 by this one.
    fn doubt(target: Option<u64>) -> Doubt {
        Doubt {
            number: 1,
            before: vec![1],
            target,
            since: None,
        }
    }

    #[test]
    fn an_order_is_in_doubt_until_the_daemon_has_answered_for_a_while() {
        let mut doubt = doubt(Some(2));
        let start = Instant::now();
        // A daemon that is stopped for an hour, and another time when it has hardly continued.
        assert!(!doubt.is_over(None, start + 360 * FATE));
        assert!(!doubt.is_over(Some(1), start + 361 * FATE));
        assert!(!doubt.is_over(None, start + 362 * FATE));
        assert!(!doubt.is_over(Some(1), start + 363 * FATE));
        assert!(doubt.is_over(Some(1), start + 364 * FATE));
    }

    /// A later order may have the target of the first one before.
    #[test]
    fn an_order_whose_target_is_set_is_in_no_doubt_if_it_is_the_only_one() {
        let start = Instant::now();
        assert!(doubt(Some(2)).is_over(Some(2), start));
        assert!(!doubt(None).is_over(Some(2), start));
        assert!(!doubt(None).is_over(None, start));
    }
}
