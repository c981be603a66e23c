// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The examples of docs/control.md match this library, and the fuzzer's corpus has all commands.

use std::collections::BTreeSet;

use balloon_control::{
    Begun, ControlError, Event, HintAction, Info, Metrics, Progress, Ranges, Request, Stat, Stats,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

const DOCUMENT: &str = include_str!("../../../docs/control.md");

/// The requests in the document, and what follows each of them.
fn blocks() -> impl Iterator<Item = (&'static str, Vec<Value>)> {
    DOCUMENT.split("```json\n").skip(1).map(|block| {
        let (example, _) = block.split_once("```").expect("the block ends");
        let (request, answers) = example.split_once('\n').expect("a response follows");
        let answers = answers.lines().map(serde_json::from_str);
        (
            request,
            answers.collect::<Result<_, _>>().expect("they are JSON"),
        )
    })
}

/// The requests and responses in the document.
fn examples() -> Vec<(&'static str, Value)> {
    let first = |(request, mut answers): (_, Vec<_>)| (request, answers.swap_remove(0));
    blocks().map(first).collect()
}

/// Whether the value is one of this type, with all of its fields and no other ones.
fn is_a<T: Serialize + DeserializeOwned>(value: &Value) -> bool {
    T::deserialize(value).is_ok_and(|read| serde_json::to_value(read).unwrap() == *value)
}

#[test]
fn examples_are_exact() {
    for (line, response) in examples() {
        let request: Request = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_string(&request).unwrap(), line);
        let response = response.as_object().unwrap();
        let (key, value) = response.iter().next().unwrap();
        let good = match (key.as_str(), request) {
            ("error", _) => is_a::<ControlError>(value),
            ("ok", Request::Info {}) => is_a::<Info>(value),
            ("ok", Request::Stats { .. }) => is_a::<Stats>(value),
            ("ok", Request::Metrics {}) => is_a::<Metrics>(value),
            (
                "ok",
                Request::Unused { .. }
                | Request::Reclaim { .. }
                | Request::DropCaches { .. }
                | Request::Hints {
                    action: HintAction::Start,
                },
            ) => is_a::<Begun>(value),
            ("ok", Request::Progress { .. } | Request::Cancel { .. }) => is_a::<Progress>(value),
            ("ok", Request::Ranges { .. }) => is_a::<Ranges>(value),
            ("ok", _) => *value == Value::Object(Map::new()),
            _ => false,
        };
        assert!(good && response.len() == 1, "{line}: {response:?}");
    }
}

/// The names of an enum's variants, in its error for a value with another one.
fn variants<T: DeserializeOwned>(other: &str) -> BTreeSet<String> {
    let Err(error) = serde_json::from_str::<T>(other) else {
        panic!("{other} is one");
    };
    let message = error.to_string();
    let (_, names) = message.split_once("expected ").unwrap();
    names
        .split('`')
        .skip(1)
        .step_by(2)
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_event_has_an_example() {
    let mut documented = BTreeSet::new();
    for (line, answers) in blocks() {
        for event in answers.get(1..).unwrap() {
            assert_eq!(command(line), "\"subscribe\"");
            assert!(is_a::<Event>(event), "{event}");
            documented.extend(event.as_object().unwrap().keys().cloned());
        }
    }
    assert_eq!(documented, variants::<Event>(r#"{"?":{}}"#));
}

/// The command of a request.
fn command(line: &str) -> String {
    serde_json::from_str::<Value>(line).unwrap()["command"].to_string()
}

/// All commands.
fn commands() -> BTreeSet<String> {
    let names = variants::<Request>(r#"{"command":"?"}"#);
    names.iter().map(|name| format!("{name:?}")).collect()
}

#[test]
fn every_command_has_an_example() {
    let documented: BTreeSet<_> = examples().iter().map(|(line, _)| command(line)).collect();
    assert_eq!(documented, commands());
}

#[test]
fn every_command_is_in_the_fuzz_corpus() {
    const INPUT: &str = include_str!("../../fuzz/corpus/control/every-request");
    // The first byte is the length of one read.
    let lines: Vec<_> = INPUT[1..].lines().collect();
    let fuzzed: BTreeSet<_> = lines.iter().map(|line| command(line)).collect();
    assert_eq!(fuzzed, commands());
    for line in lines {
        let request: Request = serde_json::from_str(line).unwrap();
        assert_eq!(serde_json::to_string(&request).unwrap(), line);
    }
}

#[test]
fn every_statistic_is_in_the_example() {
    let documented = examples()
        .into_iter()
        .find_map(|(_, mut response)| serde_json::from_value::<Stats>(response["ok"].take()).ok());
    let documented: Vec<_> = documented.unwrap().values.into_keys().collect();
    assert_eq!(documented, Stat::ALL);
}
