// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU's machine protocol.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::stopwatch::{PATIENCE, Stopwatch};

/// How often the client checks whether QEMU's time is up.
const INTERVAL: Duration = Duration::from_millis(200);

/// A connection to QEMU.
#[derive(Debug)]
pub struct Qmp {
    /// The number of QEMU's process.
    process: u32,
    /// The stream and the answers, under one lock because QEMU answers in order.
    channel: Mutex<(UnixStream, Receiver<Answer>)>,
    events: Arc<Events>,
}

/// An event of QEMU.
#[derive(Clone, Debug, Deserialize)]
pub struct Event {
    /// The name, such as `DEVICE_DELETED`.
    #[serde(rename = "event")]
    pub name: String,
    /// The particulars.
    #[serde(default)]
    pub data: Value,
}

#[derive(Debug, Default)]
struct Events {
    seen: Mutex<Vec<Event>>,
    news: Condvar,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Answer {
    Return(Value),
    Error(Failure),
}

#[derive(Debug, Deserialize)]
struct Failure {
    desc: String,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Message {
    Greeting {
        #[serde(rename = "QMP")]
        _version: Value,
    },
    Event(Event),
    Answer(Answer),
}

impl Qmp {
    /// Adopts the stream of a QEMU that was just started, with its process id.
    pub(crate) fn new(stream: UnixStream, process: u32) -> Result<Self> {
        let events = Arc::new(Events::default());
        let (sender, answers) = mpsc::channel();
        let reader = BufReader::new(stream.try_clone()?);
        let news = Arc::clone(&events);
        thread::spawn(move || {
            for line in reader.lines().map_while(Result::ok) {
                match serde_json::from_str(&line).expect("QEMU speaks its own protocol") {
                    Message::Greeting { .. } => {}
                    Message::Event(event) => {
                        news.seen.lock().expect("a lock").push(event);
                        news.news.notify_all();
                    }
                    Message::Answer(answer) => {
                        // The receiver is gone after a timeout.
                        let _ = sender.send(answer);
                    }
                }
            }
        });
        let qmp = Self {
            process,
            channel: Mutex::new((stream, answers)),
            events,
        };
        qmp.execute::<Value>("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and returns QEMU's answer.
    ///
    /// # Errors
    ///
    /// QEMU refuses the command, is gone, or does not answer in a minute.
    pub fn execute<T: DeserializeOwned>(&self, command: &str, arguments: &Value) -> Result<T> {
        let line = json!({ "execute": command, "arguments": arguments }).to_string() + "\n";
        let (stream, answers) = &mut *self.channel.lock().expect("a lock");
        stream
            .write_all(line.as_bytes())
            .with_context(|| format!("QEMU is gone at {command}"))?;
        let stopwatch = Stopwatch::start(self.process);
        loop {
            let is_over = stopwatch.has_passed(PATIENCE);
            match answers.recv_timeout(INTERVAL) {
                Ok(Answer::Return(value)) => return Ok(serde_json::from_value(value)?),
                Ok(Answer::Error(failure)) => bail!("QEMU refuses {command}: {}", failure.desc),
                Err(RecvTimeoutError::Disconnected) => bail!("QEMU is gone at {command}"),
                Err(RecvTimeoutError::Timeout) => ensure!(
                    !is_over,
                    "QEMU does not answer {command} in {} s ({stopwatch})",
                    PATIENCE.as_secs()
                ),
            }
        }
    }

    /// The number of events so far; [`Qmp::wait_event`] can skip them.
    pub fn mark(&self) -> usize {
        self.events.seen.lock().expect("a lock").len()
    }

    /// Waits for an event after the first `mark` ones that `wanted` accepts, and returns it.
    ///
    /// # Errors
    ///
    /// It does not come in time.
    pub fn wait_event(
        &self,
        mark: usize,
        timeout: Duration,
        wanted: impl Fn(&Event) -> bool,
    ) -> Result<Event> {
        let stopwatch = Stopwatch::start(self.process);
        let mut seen = self.events.seen.lock().expect("a lock");
        loop {
            let is_over = stopwatch.has_passed(timeout);
            if let Some(event) = seen.iter().skip(mark).find(|event| wanted(event)) {
                return Ok(event.clone());
            }
            ensure!(
                !is_over,
                "QEMU did not send the expected event within {} s ({stopwatch})",
                timeout.as_secs()
            );
            let interval = timeout.min(INTERVAL);
            seen = self
                .events
                .news
                .wait_timeout(seen, interval)
                .expect("a lock")
                .0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_told_apart() {
        let parse = |line| serde_json::from_str::<Message>(line).unwrap();
        assert!(matches!(
            parse(r#"{"QMP": {"version": {}}}"#),
            Message::Greeting { .. }
        ));
        assert!(matches!(
            parse(r#"{"return": {}}"#),
            Message::Answer(Answer::Return(_))
        ));
        assert!(matches!(
            parse(r#"{"error": {"class": "GenericError", "desc": "no"}}"#),
            Message::Answer(Answer::Error(Failure { desc })) if desc == "no"
        ));
        assert!(matches!(
            parse(r#"{"timestamp": {}, "event": "RESUME"}"#),
            Message::Event(Event { name, .. }) if name == "RESUME"
        ));
    }
}
