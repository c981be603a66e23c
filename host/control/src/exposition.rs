// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Prometheus' text exposition format, version 0.0.4.

use std::fmt::{Display, Write};

/// The text of some metrics, which grows by one line after the other.
#[derive(Clone, Debug)]
pub struct Exposition {
    /// What all names begin with.
    prefix: &'static str,
    /// The labels of all samples, as they are in the text.
    labels: Vec<String>,
    text: String,
}

// Writing to a string does not fail.
impl Exposition {
    /// No metrics yet, of which all names will have this prefix.
    pub fn new(prefix: &'static str) -> Self {
        Self {
            prefix,
            labels: Vec::new(),
            text: String::new(),
        }
    }

    /// Gives a label to all samples from now on.
    pub fn label_all(&mut self, label: &str, value: &str) {
        self.labels.push(pair(label, value));
    }

    /// Begins a metric of this type.
    pub fn head(&mut self, kind: &str, name: &str, help: &str) {
        let prefix = self.prefix;
        let _ = writeln!(self.text, "# HELP {prefix}_{name} {help}");
        let _ = writeln!(self.text, "# TYPE {prefix}_{name} {kind}");
    }

    /// Adds a sample of the metric, with a label of its own if it has one.
    pub fn sample(&mut self, name: &str, label: Option<(&str, &str)>, value: impl Display) {
        let own = label.map(|(label, value)| pair(label, value));
        let labels: Vec<_> = self.labels.iter().chain(&own).map(String::as_str).collect();
        let labels = match labels.as_slice() {
            [] => String::new(),
            labels => format!("{{{}}}", labels.join(",")),
        };
        let _ = writeln!(self.text, "{}_{name}{labels} {value}", self.prefix);
    }

    /// Adds a metric that has one sample.
    pub fn one(&mut self, kind: &str, name: &str, help: &str, value: u64) {
        self.head(kind, name, help);
        self.sample(name, None, value);
    }

    /// The text.
    pub fn into_text(self) -> String {
        self.text
    }
}

fn pair(label: &str, value: &str) -> String {
    let value = value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n");
    format!("{label}=\"{value}\"")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_have_their_labels() {
        let mut metrics = Exposition::new("balloon");
        metrics.one("gauge", "size_bytes", "The size.", u64::MAX);
        metrics.label_all("vm", "a\\\"b\n");
        metrics.head("counter", "messages_total", "Messages.");
        metrics.sample("messages_total", Some(("queue", "stats")), 7);
        metrics.sample("messages_total", None, 8);
        let expected = r#"# HELP balloon_size_bytes The size.
# TYPE balloon_size_bytes gauge
balloon_size_bytes 18446744073709551615
# HELP balloon_messages_total Messages.
# TYPE balloon_messages_total counter
balloon_messages_total{vm="a\\\"b\n",queue="stats"} 7
balloon_messages_total{vm="a\\\"b\n"} 8
"#;
        assert_eq!(metrics.into_text(), expected);
    }
}
