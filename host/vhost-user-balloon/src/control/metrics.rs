// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The numbers for a monitoring system, in Prometheus' text exposition format.

use balloon_control::{Counters, Exposition, Info, Received, Shortfall, Stats, Unit};

/// Writes the state of a balloon as metrics, with the last sample of the guest's statistics, and the name of the VM
/// as a label if it has one.
pub(super) fn text(info: &Info, stats: Option<&Stats>, vm: Option<&str>) -> String {
    let mut metrics = Exposition::new("balloon");
    if let Some(vm) = vm {
        metrics.label_all("vm", vm);
    }
    for (name, help, value) in GAUGES {
        if let Some(value) = value(info) {
            metrics.one("gauge", name, help, value);
        }
    }
    for (name, help, value) in COUNTERS {
        metrics.one("counter", name, help, value(&info.counters));
    }
    by_queue(&mut metrics, &info.counters);
    by_outcome(&mut metrics, info);
    if let Some(stats) = stats {
        statistics(&mut metrics, stats);
    }
    metrics.into_text()
}

/// A metric: its name, its help, and its value. It is left out while the value is unknown.
type Gauge = (&'static str, &'static str, fn(&Info) -> Option<u64>);

const GAUGES: [Gauge; 15] = [
    ("target_bytes", "Requested balloon size.", |info| {
        Some(info.target)
    }),
    (
        "size_bytes",
        "Balloon size as the guest reports it.",
        |info| Some(info.size),
    ),
    (
        "held_bytes",
        "Memory in the balloon by the guest's messages.",
        |info| Some(info.held),
    ),
    (
        "resident_bytes",
        "Memory that the host has allocated for the guest.",
        |info| info.resident,
    ),
    ("guest_memory_bytes", "The guest's memory.", |info| {
        info.memory
    }),
    (
        "shared_memory_bytes",
        "Memory that the VMM has shared, including memory that the guest lacks.",
        |info| info.shared,
    ),
    (
        "limit_bytes",
        "Largest balloon that respects the guest's floor.",
        |info| info.limit,
    ),
    (
        "lease_seconds",
        "Remaining time of the lease on the target.",
        |info| info.lease.as_ref().map(|lease| lease.remaining / 1000),
    ),
    (
        "lapsed",
        "Whether the target is that after a lease that has run out.",
        |info| Some(info.lapsed.into()),
    ),
    ("boot_grace_seconds", "Remaining boot grace.", |info| {
        Some(info.grace.unwrap_or_default())
    }),
    ("connected", "Whether a VMM is connected.", |info| {
        Some(info.guest.connected.into())
    }),
    (
        "driver",
        "Whether a guest driver uses the device.",
        |info| Some(info.guest.driver.into()),
    ),
    (
        "withheld",
        "Whether some or all memory is not returned to the host.",
        |info| Some(u64::from(!info.withheld.is_empty())),
    ),
    (
        "open_requests",
        "Host requests without a completion.",
        |info| Some(info.guest.open_requests),
    ),
    (
        "guest_answered_seconds",
        "Time since the guest last used a queue.",
        |info| info.guest.answered,
    ),
];

/// A number that only grows.
type Total = (&'static str, &'static str, fn(&Counters) -> u64);

const COUNTERS: [Total; 13] = [
    (
        "inflated_bytes_total",
        "Memory that the guest inflated.",
        |counters| counters.inflated,
    ),
    (
        "deflated_bytes_total",
        "Memory that the guest deflated.",
        |counters| counters.deflated,
    ),
    (
        "discarded_bytes_total",
        "Memory returned to the host.",
        |counters| counters.discarded,
    ),
    (
        "discards_total",
        "Calls that returned memory.",
        |counters| counters.discards,
    ),
    (
        "discard_failures_total",
        "Failed calls that return memory.",
        |counters| counters.discard_failures,
    ),
    (
        "prefault_failures_total",
        "How often the host had no memory for deflated pages.",
        |counters| counters.prefault_failures,
    ),
    (
        "withheld_bytes_total",
        "Memory in messages that must not be returned to the host.",
        |counters| counters.withheld,
    ),
    (
        "discarding_microseconds_total",
        "Time spent on returning memory.",
        |counters| counters.discarding,
    ),
    (
        "translating_microseconds_total",
        "Time spent on decoding inflate messages.",
        |counters| counters.translating,
    ),
    (
        "reported_bytes_total",
        "Memory in free page reports.",
        |counters| counters.reported,
    ),
    (
        "hinted_bytes_total",
        "Memory in free page hints.",
        |counters| counters.hinted,
    ),
    (
        "unused_bytes_total",
        "Memory in answers to requests for unused memory.",
        |counters| counters.unused,
    ),
    ("requests_total", "Host requests made.", |counters| {
        counters.asked
    }),
];

/// The type and the name of the metric for a statistic of the guest.
fn guest_metric(statistic: &str, unit: Unit, is_counter: bool) -> (&'static str, String) {
    let name = statistic.replace('-', "_");
    let unit = match unit {
        Unit::Bytes => "_bytes",
        Unit::Times => "",
    };
    match is_counter {
        true => ("counter", format!("guest_{name}{unit}_total")),
        false => ("gauge", format!("guest_{name}{unit}")),
    }
}

/// A metric with a value for each value of a label.
fn many<'a>(
    metrics: &mut Exposition,
    kind: &str,
    name: &str,
    help: &str,
    label: &str,
    values: impl IntoIterator<Item = (&'a str, u64)>,
) {
    metrics.head(kind, name, help);
    for (of, value) in values {
        metrics.sample(name, Some((label, of)), value);
    }
}

fn by_queue(metrics: &mut Exposition, counters: &Counters) {
    for (name, help, of) in [
        (
            "messages_total",
            "Messages received on each queue.",
            counters.messages,
        ),
        (
            "notifications_total",
            "Notifications received on each queue.",
            counters.notifications,
        ),
    ] {
        many(metrics, "counter", name, help, "queue", of.named());
    }
    let Received {
        inflate,
        deflate,
        requests,
    } = counters.received;
    many(
        metrics,
        "counter",
        "received_bytes_total",
        "Size of messages that list pages.",
        "queue",
        [
            ("inflate", inflate),
            ("deflate", deflate),
            ("requests", requests),
        ],
    );
}

fn by_outcome(metrics: &mut Exposition, info: &Info) {
    let counters = &info.counters;
    let encodings = counters.encodings.iter();
    many(
        metrics,
        "counter",
        "page_messages_total",
        "Messages that list pages, by encoding.",
        "encoding",
        encodings.map(|(encoding, &value)| (encoding.as_str(), value)),
    );
    let answered = counters.answered.iter();
    let answered: Vec<_> = answered
        .map(|(status, &times)| (status.to_string(), times))
        .collect();
    many(
        metrics,
        "counter",
        "answers_total",
        "Ended host requests, by status.",
        "status",
        answered.iter().map(|(status, times)| (&**status, *times)),
    );
    let refused = counters.refused.iter();
    many(
        metrics,
        "counter",
        "refused_total",
        "Refused messages, by reason.",
        "reason",
        refused.map(|(reason, &value)| (reason.as_str(), value)),
    );
    let reason = info.guest.short_of_target.map(Shortfall::name);
    many(
        metrics,
        "gauge",
        "short_of_target",
        "Stop reason of the guest.",
        "reason",
        reason.map(|reason| (reason, 1)),
    );
}

fn statistics(metrics: &mut Exposition, stats: &Stats) {
    let help = "The age of the guest's statistics.";
    metrics.one("gauge", "guest_statistics_age_seconds", help, stats.age);
    for (stat, &value) in &stats.values {
        let help = format!("The guest's statistic {stat}.");
        let (kind, name) = guest_metric(&stat.to_string(), stat.unit(), stat.is_counter());
        metrics.one(kind, &name, &help, value);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use balloon_control::{ByQueue, Guest, RequestStatus, Stat};

    /// Replaces each number in a value by a different one.
    fn number(value: &mut Value, next: &mut u64) {
        match value {
            Value::Number(_) => {
                *next += 1;
                *value = (*next).into();
            }
            Value::Object(fields) => fields.values_mut().for_each(|value| number(value, next)),
            _ => {}
        }
    }

    #[test]
    fn every_counter_is_a_metric() {
        const FIRST: u64 = 7_000_000;
        let mut value = serde_json::to_value(Counters::default()).unwrap();
        let mut last = FIRST;
        number(&mut value, &mut last);
        let info = Info {
            counters: serde_json::from_value(value).unwrap(),
            ..Info::default()
        };
        let text = text(&info, None, None);
        assert!(last > FIRST + 20);
        for number in FIRST + 1..=last {
            assert!(
                text.contains(&format!(" {number}\n")),
                "{number} is not in\n{text}"
            );
        }
    }

    #[test]
    fn a_statistic_that_goes_down_is_a_gauge() {
        for (unit, is_counter, kind, name) in [
            (Unit::Bytes, true, "counter", "guest_swap_in_bytes_total"),
            (Unit::Bytes, false, "gauge", "guest_swap_in_bytes"),
            (Unit::Times, true, "counter", "guest_swap_in_total"),
            (Unit::Times, false, "gauge", "guest_swap_in"),
        ] {
            let metric = guest_metric("swap-in", unit, is_counter);
            assert_eq!(metric, (kind, name.to_owned()));
        }
    }

    #[test]
    fn names_are_those_of_prometheus() {
        let all = Stats {
            values: Stat::ALL.iter().map(|&stat| (stat, 1)).collect(),
            ..Stats::default()
        };
        let info = Info {
            counters: Counters {
                answered: [(RequestStatus::Complete, 1)].into(),
                refused: [("truncated".to_owned(), 1)].into(),
                ..Counters::default()
            },
            ..Info::default()
        };
        let text = text(&info, Some(&all), None);
        let types: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '))
            .collect();
        assert!(types.len() > GAUGES.len() + COUNTERS.len() + Stat::ALL.len());
        for (name, kind) in types {
            let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
            assert!(name.chars().all(is_name), "{name}");
            assert_eq!(name.ends_with("_total"), kind == "counter", "{name}");
        }
    }

    #[test]
    fn metrics_have_their_types_and_labels() {
        let info = Info {
            target: 4096,
            size: 0,
            memory: Some(1 << 30),
            granule: 4096,
            stats_interval: 10,
            uptime: 1,
            guest: Guest {
                connected: true,
                ..Guest::default()
            },
            counters: Counters {
                inflated: 8192,
                answered: [(RequestStatus::UnknownId, 5)].into(),
                messages: ByQueue {
                    reports: 3,
                    ..ByQueue::default()
                },
                encodings: [("bitmaps".to_owned(), 4)].into(),
                refused: [("truncated".to_owned(), 2)].into(),
                ..Counters::default()
            },
            withheld: vec!["pinned".to_owned()],
            ..Info::default()
        };
        let stats = Stats {
            age: 3,
            values: [
                (Stat::FreeMemory, 5),
                (Stat::SwapIn, 6),
                (Stat::OomKills, 7),
            ]
            .into(),
            ..Stats::default()
        };
        let named = text(&info, Some(&stats), Some("a\"b"));
        for expected in [
            "balloon_target_bytes{vm=\"a\\\"b\"} 4096\n",
            "balloon_messages_total{vm=\"a\\\"b\",queue=\"reports\"} 3\n",
            "# TYPE balloon_guest_free_memory_bytes gauge\n",
            "# TYPE balloon_guest_swap_in_bytes_total counter\n",
            "balloon_guest_oom_kills_total{vm=\"a\\\"b\"} 7\n",
            "balloon_guest_statistics_age_seconds{vm=\"a\\\"b\"} 3\n",
        ] {
            assert!(named.contains(expected), "{expected} is not in\n{named}");
        }
        let text = text(&info, None, None);
        assert!(!text.contains("guest_free_memory"), "{text}");
        for expected in [
            "# TYPE balloon_target_bytes gauge\nballoon_target_bytes 4096\n",
            "# TYPE balloon_inflated_bytes_total counter\nballoon_inflated_bytes_total 8192\n",
            "balloon_messages_total{queue=\"reports\"} 3\n",
            "balloon_answers_total{status=\"unknown-id\"} 5\n",
            "# TYPE balloon_open_requests gauge\nballoon_open_requests 0\n",
            "balloon_page_messages_total{encoding=\"bitmaps\"} 4\n",
            "balloon_received_bytes_total{queue=\"deflate\"} 0\n",
            "balloon_refused_total{reason=\"truncated\"} 2\n",
            "balloon_withheld 1\n",
            "balloon_withheld_bytes_total 0\n",
            "balloon_connected 1\nballoon_driver".split_at(20).0,
        ] {
            assert!(text.contains(expected), "{expected} is not in\n{text}");
        }
        assert!(!text.contains("answered"), "{text}");
        // Every metric is described once.
        let mut names: Vec<_> = text
            .lines()
            .filter(|line| line.starts_with("# TYPE"))
            .collect();
        let all = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
