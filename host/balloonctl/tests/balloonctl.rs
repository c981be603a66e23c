// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! balloonctl as it is run, against a daemon that acts out a script.

use std::fs;
use std::io::{BufRead, BufReader};
use std::mem::discriminant;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use balloon_control::{
    Begun, Changes, ControlError, Counters, ErrorKind, Guest, Handler, HintAction, Info, Lease,
    Metrics, Progress, Ranges, Request, RequestStatus, Response, Server, Shortfall, Stat, Stats,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

const GIB: u64 = 1 << 30;

/// Of requests that the guest is asked.
const ID: u64 = 7 << 50;

/// What the guest does while it is looked at.
#[derive(Clone, Copy, PartialEq)]
enum Conduct {
    /// Moves by a quarter of a GiB each time.
    Obedient,
    /// Stays where it is, for a reason or without one.
    Stuck(Option<Shortfall>),
    /// Its VMM goes away.
    Leaves,
    /// Its driver goes away.
    Unloads,
    /// Begins, and then another client sets another target.
    Retargeted,
    /// The lease on its target runs out.
    Lapses,
    /// Ends its answers so, after it was looked at twice.
    Ends(RequestStatus),
    /// Stays like this.
    Idle(RequestStatus),
    /// Is as it should be. The daemon forgets its requests, or only what they were answered.
    Forgotten { at_once: bool },
}

struct Script {
    info: Mutex<Info>,
    conduct: Conduct,
    /// What all requests but those for the state are refused with.
    refusal: Option<ErrorKind>,
    seen: Mutex<Vec<Request>>,
    changes: Changes,
    /// Whether a subscriber wants statistics.
    is_watched: AtomicBool,
}

impl Handler for Script {
    fn changes(&self) -> &Changes {
        &self.changes
    }

    fn handle(&self, request: Request) -> Result<Response, ControlError> {
        self.seen.lock().unwrap().push(request.clone());
        let mut info = self.info.lock().unwrap();
        if let (Some(kind), false) = (self.refusal, request == (Request::Info {})) {
            return Err(ControlError::new(kind, "what is wrong", "what to do"));
        }
        let is_forgotten = match request {
            Request::Progress { .. } => self.conduct == Conduct::Forgotten { at_once: true },
            Request::Ranges { .. } => self.conduct == Conduct::Forgotten { at_once: false },
            _ => false,
        };
        if is_forgotten {
            let kind = ErrorKind::OutOfRange;
            return Err(ControlError::new(kind, "there is no request", "what to do"));
        }
        Ok(match request {
            Request::Info {} => {
                if info.size != info.target {
                    self.act(&mut info);
                    self.changes.info();
                }
                Response::Info(info.clone())
            }
            Request::Subscribe { stats_milliseconds } => {
                self.is_watched
                    .store(stats_milliseconds.is_some(), Ordering::Relaxed);
                Response::Subscribed {}
            }
            Request::Set { bytes, .. } => {
                info.target = bytes;
                Response::Done {}
            }
            Request::Stats { .. } => {
                if self.is_watched.load(Ordering::Relaxed) {
                    self.changes.stats();
                }
                Response::Stats(self.stats())
            }
            Request::Metrics {} => Response::Metrics(Metrics {
                text: "# TYPE balloon_size_bytes gauge\nballoon_size_bytes 0\n".to_owned(),
            }),
            Request::Inhibit { seconds, owner } => {
                info.inhibited = Some(seconds);
                info.inhibitors.insert(owner.unwrap_or_default(), seconds);
                info.withheld = vec!["inhibited".to_owned()];
                Response::Done {}
            }
            Request::Resume { owner: Some(owner) } => {
                info.inhibitors.remove(&owner);
                Response::Done {}
            }
            Request::Resume { owner: None } => {
                info.inhibited = None;
                info.inhibitors.clear();
                info.withheld = vec!["pinned".to_owned()];
                Response::Done {}
            }
            Request::Unused { .. }
            | Request::Reclaim { .. }
            | Request::DropCaches { .. }
            | Request::Hints {
                action: HintAction::Start,
            } => Response::Begun(Begun { id: ID }),
            Request::SetStatsInterval { .. } | Request::Hints { .. } => Response::Done {},
            Request::Progress { id } | Request::Cancel { id } => {
                Response::Progress(self.progress(id))
            }
            Request::Ranges { id, from } => Response::Ranges(Ranges {
                id,
                end: 8 * GIB,
                ranges: match from {
                    0 => vec![(4096, 8192), (64 << 12, 4096)],
                    _ => vec![(2 * GIB, 4096)],
                },
                next: (from == 0).then_some(2 * GIB),
            }),
        })
    }
}

impl Script {
    fn act(&self, info: &mut Info) {
        match self.conduct {
            Conduct::Obedient if info.size < info.target => {
                info.size = (info.size + GIB / 4).min(info.target);
            }
            Conduct::Obedient => {
                info.size = info.size.saturating_sub(GIB / 4).max(info.target);
            }
            Conduct::Stuck(reason) => info.guest.short_of_target = reason,
            Conduct::Leaves => info.guest.connected = false,
            Conduct::Unloads => info.guest.driver = false,
            Conduct::Retargeted | Conduct::Lapses if info.size == GIB / 2 => info.size += GIB / 4,
            Conduct::Retargeted => info.target = 7 * GIB,
            Conduct::Lapses => (info.target, info.lapsed) = (7 * GIB, true),
            Conduct::Ends(_) | Conduct::Idle(_) | Conduct::Forgotten { .. } => {}
        }
    }

    fn stats(&self) -> Stats {
        Stats {
            age: 3,
            requested: 3021,
            sequence: u64::try_from(self.seen.lock().unwrap().len()).unwrap(),
            values: Stat::ALL
                .iter()
                .copied()
                .zip((0..).map(|n| n * 1000))
                .collect(),
        }
    }

    fn progress(&self, id: u64) -> Progress {
        let is_look = |request: &&Request| matches!(request, Request::Progress { .. });
        let looks = self.seen.lock().unwrap().iter().filter(is_look).count();
        let status = match self.conduct {
            Conduct::Idle(status) => status,
            _ if looks < 2 => RequestStatus::Waiting,
            Conduct::Ends(status) => status,
            _ => RequestStatus::Complete,
        };
        Progress {
            id,
            status,
            named: 3 * GIB,
            discarded: 2 * GIB,
        }
    }
}

/// A guest that has inflated half a GiB, as requested.
fn info() -> Info {
    Info {
        name: Some("web".to_owned()),
        vmm: Some(4711),
        target: GIB / 2,
        size: GIB / 2,
        memory: Some(8 * GIB),
        granule: 4096,
        stats_interval: 10,
        version: "0.2.0".to_owned(),
        uptime: 7260,
        guest: Guest {
            connected: true,
            driver: true,
            features: vec!["stats".to_owned(), "page-poison".to_owned()],
            answered: Some(3),
            short_of_target: None,
            open_requests: 1,
        },
        counters: Counters {
            inflated: GIB / 2,
            discarded: GIB / 2,
            discards: 1234,
            asked: 1500,
            answered: [(RequestStatus::Complete, 1498), (RequestStatus::Aborted, 1)].into(),
            refused: [("bad-address".to_owned(), 2)].into(),
            ..Counters::default()
        },
        ..Info::default()
    }
}

struct Daemon {
    directory: TempDir,
    script: Arc<Script>,
    _server: Server,
}

impl Daemon {
    fn start(info: Info, conduct: Conduct, refusal: Option<ErrorKind>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = Arc::new(Script {
            info: Mutex::new(info),
            conduct,
            refusal,
            seen: Mutex::default(),
            changes: Changes::default(),
            is_watched: AtomicBool::default(),
        });
        let server = Server::bind(
            &directory.path().join("balloon.sock"),
            Arc::clone(&script) as Arc<dyn Handler>,
        );
        Self {
            _server: server.unwrap(),
            directory,
            script,
        }
    }

    fn obedient() -> Self {
        Self::start(info(), Conduct::Obedient, None)
    }

    fn command(&self, arguments: &[&str]) -> Command {
        balloonctl(&self.directory.path().join("balloon.sock"), arguments)
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        succeeds(&output);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What clients have sent, without requests for the state: subscribers cause those, too.
    fn orders(&self) -> Vec<Request> {
        let is_order = |request: &&Request| {
            let state = Request::Info {};
            **request != state
                && !matches!(request, Request::Stats { .. } | Request::Subscribe { .. })
        };
        let seen = self.script.seen.lock().unwrap();
        seen.iter().filter(is_order).cloned().collect()
    }

    fn last_request(&self) -> Request {
        self.script.seen.lock().unwrap().last().unwrap().clone()
    }
}

fn balloonctl(socket: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_balloonctl"));
    command.args(arguments).env("BALLOON_SOCKET", socket);
    command
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn succeeds(output: &Output) {
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
}

/// It fails with this code, prints nothing else, and says these words and what to do.
fn fails(output: &Output, code: i32, words: &str) {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    let stderr = std::str::from_utf8(&output.stderr).unwrap();
    let lines: Vec<_> = stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{stderr}");
    assert!(lines[0].starts_with("error: "), "{stderr}");
    assert!(lines[0].contains(words), "{stderr}");
    assert!(lines[1].starts_with("help: "), "{stderr}");
}

#[test]
fn info_shows_the_state() {
    let daemon = Daemon::obedient();
    let output = daemon.run(&["info"]);
    succeeds(&output);
    for words in [
        "web, process 4711",
        "512.00 MiB, as requested",
        "has 8.00 GiB, responded 3 seconds ago",
        "ready, with stats, page-poison",
        "2 bad-address",
        "1,500 asked, 1 open, 1,498 complete, 1 aborted",
        "1,234 discards",
        "every 10 s",
        "version 0.2.0, up for 2 hours",
    ] {
        assert!(stdout(&output).contains(words), "{}", stdout(&output));
    }
    assert_eq!(
        daemon.json(&["info"]),
        serde_json::to_value(info()).unwrap()
    );
}

#[test]
fn json_is_the_answer_word_for_word() {
    let daemon = Daemon::obedient();
    let output = daemon.run(&["--json", "info"]);
    succeeds(&output);
    let expected = serde_json::to_string(&info()).unwrap() + "\n";
    assert_eq!(stdout(&output), expected);
    assert_eq!(stdout(&daemon.run(&["--json", "set", "1G"])), "{}\n");
}

#[test]
fn set_takes_sizes_and_percentages() {
    for (size, bytes) in [
        ("2GiB", 2 * GIB),
        ("512M", GIB / 2),
        ("50%", 4 * GIB),
        ("0", 0),
    ] {
        let daemon = Daemon::obedient();
        succeeds(&daemon.run(&["set", size]));
        assert_eq!(daemon.last_request(), Request::set(bytes));
    }
    let unknown = Info {
        memory: None,
        ..info()
    };
    let daemon = Daemon::start(unknown, Conduct::Obedient, None);
    fails(&daemon.run(&["set", "50%"]), 4, "not known");
    succeeds(&daemon.run(&["set", "1G"]));
}

#[test]
fn set_names_the_target_that_it_expects() {
    let expects = |size: &str| {
        let daemon = Daemon::obedient();
        succeeds(&daemon.run(&["set", "1G", "--expect", size]));
        daemon.last_request()
    };
    for (size, expected) in [("2GiB", 2 * GIB), ("25%", 2 * GIB), ("0", 0)] {
        let request = Request::Set {
            bytes: GIB,
            expected: Some(expected),
            lease: None,
            fallback: None,
            owner: None,
            release: None,
        };
        assert_eq!(expects(size), request);
    }
}

#[test]
fn set_takes_a_lease() {
    for (arguments, fallback, owner, release) in [
        (&[][..], None, None, None),
        (&["--fallback", "50%"], Some(4 * GIB), None, None),
        (&["--owner", "night"], None, Some("night".to_owned()), None),
        (&["--release", "512M"], None, None, Some(GIB / 2)),
    ] {
        let daemon = Daemon::obedient();
        let lease = [&["set", "1G", "--lease", "60"], arguments].concat();
        succeeds(&daemon.run(&lease));
        let request = Request::Set {
            bytes: GIB,
            expected: None,
            lease: Some(60_000),
            fallback,
            owner,
            release,
        };
        assert_eq!(daemon.last_request(), request);
    }
}

#[test]
fn info_shows_a_lease_and_its_end() {
    let shows = |lease, lapsed| {
        let info = Info {
            lease,
            lapsed,
            ..info()
        };
        let daemon = Daemon::start(info, Conduct::Obedient, None);
        stdout(&daemon.run(&["info"])).to_owned()
    };
    let lease = |owner| Lease {
        remaining: 59_999,
        fallback: 0,
        owner,
    };
    let end = "ends in 59 seconds, and then the target is 0 B";
    let text = shows(Some(lease(None)), false);
    assert!(text.contains(end), "{text}");
    let text = shows(Some(lease(Some("night".to_owned()))), false);
    assert!(text.contains(&format!("of night; {end}")), "{text}");
    let info = Info {
        lease: Some(lease(None)),
        release: Some(GIB / 4),
        released: GIB,
        ..info()
    };
    let daemon = Daemon::start(info, Conduct::Obedient, None);
    let output = daemon.run(&["info"]);
    for words in [
        "the daemon may lower the target by 256.00 MiB",
        "the daemon has lowered the target by 1.00 GiB",
    ] {
        assert!(stdout(&output).contains(words), "{output:?}");
    }
    let text = shows(None, true);
    assert!(text.contains("no client has renewed it"), "{text}");
    assert!(!shows(None, false).contains("Lease"));
}

#[test]
fn wait_returns_when_the_size_is_reached() {
    for target in ["2G", "0"] {
        let daemon = Daemon::obedient();
        let output = daemon.run(&["set", target, "--wait"]);
        succeeds(&output);
        assert!(stdout(&output).contains("The balloon has"));
        let info = daemon.script.info.lock().unwrap();
        assert_eq!(info.size, info.target);
    }
    let last = Daemon::obedient().json(&["set", "2G", "--wait"]);
    assert_eq!(
        (&last["size"], &last["target"]),
        (&json!(2 * GIB), &json!(2 * GIB))
    );
}

#[test]
fn wait_gives_up_in_time_and_says_why() {
    for (reason, words) in [
        (None, "512.00 MiB of 2.00 GiB after 1 s"),
        (Some(Shortfall::Floor), "the guest's floor is reached"),
        (Some(Shortfall::NoMemory), "no free memory"),
        (Some(Shortfall::AfterOom), "ran out of memory"),
    ] {
        let daemon = Daemon::start(info(), Conduct::Stuck(reason), None);
        let output = daemon.run(&["set", "2G", "--wait", "--timeout", "1"]);
        fails(&output, 6, words);
    }
}

#[test]
fn wait_does_not_wait_in_vain() {
    for (conduct, code, words) in [
        (
            Conduct::Stuck(Some(Shortfall::Excluded)),
            1,
            "kept out of ballooning",
        ),
        (Conduct::Leaves, 4, "disconnected"),
        (Conduct::Unloads, 4, "no balloon driver"),
        (Conduct::Retargeted, 1, "set to 7.00 GiB"),
        (Conduct::Lapses, 1, "the lease has run out"),
    ] {
        let daemon = Daemon::start(info(), conduct, None);
        let output = daemon.run(&["set", "2G", "--wait", "--timeout", "20"]);
        fails(&output, code, words);
    }
}

#[test]
fn refusals_have_their_exit_codes() {
    for (kind, code) in [
        (ErrorKind::NoGuest, 4),
        (ErrorKind::NoDriver, 4),
        (ErrorKind::OutOfRange, 5),
        (ErrorKind::Timeout, 6),
        (ErrorKind::Conflict, 7),
        (ErrorKind::Unsupported, 1),
        (ErrorKind::BadRequest, 1),
        (ErrorKind::Failed, 1),
    ] {
        let daemon = Daemon::start(info(), Conduct::Obedient, Some(kind));
        for arguments in [
            &["set", "2G"][..],
            &["set", "2G", "--wait"],
            &["stats", "--fresh"],
            &["stats", "--watch"],
            &["interval", "5"],
            &["hints", "start"],
            &["hints", "start", "--out", "/nowhere/pages"],
            &["inhibit"],
            &["resume"],
            &["metrics", "--json"],
            &["unused", "--out", "/nowhere/pages"],
            &["reclaim"],
            &["drop-caches"],
        ] {
            fails(&daemon.run(arguments), code, "what is wrong");
        }
    }
}

#[test]
fn a_forgotten_request_is_no_number_out_of_range() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("pages");
    let unused = ["unused", "--out", out.to_str().unwrap()];
    let hints = ["hints", "start", "--out", out.to_str().unwrap()];
    for (at_once, arguments) in [
        (true, &["reclaim"][..]),
        (true, &["drop-caches"]),
        (true, &unused),
        (false, &unused),
        (true, &hints),
        (false, &hints),
    ] {
        let daemon = Daemon::start(info(), Conduct::Forgotten { at_once }, None);
        fails(&daemon.run(arguments), 1, "no longer has the request");
    }
    assert!(!out.exists());
}

#[test]
fn wrong_command_lines_are_refused() {
    let daemon = Daemon::obedient();
    for arguments in [
        &[][..],
        &["set"],
        &["set", "512"],
        &["set", "101%"],
        &["set", "1G", "--expect", "101%"],
        &["set", "1G", "--lease", "0"],
        &["set", "1G", "--lease", "86401"],
        &["set", "1G", "--fallback", "0"],
        &["set", "1G", "--release", "0"],
        &["set", "1G", "--timeout", "5"],
        &["set", "1G", "--wait", "--timeout", "0"],
        &["stats", "--watch", "0"],
        &["interval", "-1"],
        &["inhibit", "--for", "0"],
        &["inhibit", "--for", "86401"],
        &["hints"],
        &["hints", "pause"],
        &["hints", "start", "--timeout", "5"],
        &["hints", "done", "--out", "f"],
        &["deflate"],
        &["unused"],
        &["unused", "--out", "f", "--min-order", "52"],
        &["unused", "--out", "f", "--start", "10%"],
        &["reclaim", "--timeout", "0"],
        &["reclaim", "--end", "12"],
        &["drop-caches", "--all"],
    ] {
        let output = daemon.run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
    }
    assert!(daemon.script.seen.lock().unwrap().is_empty());
}

#[test]
fn a_command_line_without_a_vm_is_refused() {
    for arguments in [&["info"][..], &["top"]] {
        let output = balloonctl(Path::new(""), arguments)
            .env_remove("BALLOON_SOCKET")
            .output()
            .unwrap();
        fails(&output, 2, "no VM is named");
    }
}

#[test]
fn a_daemon_that_cannot_be_reached_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("balloon.sock");
    let run = || balloonctl(&path, &["info"]).output().unwrap();
    fails(&run(), 3, "there is no socket");
    let vm = ["info", "--vm", "no-such-vm"];
    let named = balloonctl(&path, &vm).output().unwrap();
    fails(&named, 3, "/run/vhost-user-balloon/no-such-vm/control.sock");

    drop(UnixListener::bind(&path).unwrap());
    fails(&run(), 3, "no daemon listens");

    fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let client = balloonctl(&path, &["info"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(listener.accept().unwrap());
    fails(&client.wait_with_output().unwrap(), 3, "closed");
}

#[test]
fn stats_are_shown_with_their_units() {
    let daemon = Daemon::obedient();
    let output = daemon.run(&["stats"]);
    succeeds(&output);
    assert_eq!(daemon.last_request(), Request::Stats { fresh: false });
    let shows = |name: &str, value: &str| {
        let line = stdout(&output).lines().find(|line| line.contains(name));
        assert!(line.unwrap().contains(value), "{}", stdout(&output));
    };
    shows("swap-out", "1000 B");
    shows("major-faults", "2,000");
    shows("free-memory", "3.91 KiB");
    shows("oom-kills", "10,000");
    shows("Sample", "3 seconds old");

    let values = &daemon.json(&["stats", "--fresh"])["values"];
    assert_eq!(daemon.last_request(), Request::Stats { fresh: true });
    assert_eq!(values.as_object().unwrap().len(), Stat::ALL.len());
}

#[test]
fn watch_shows_one_sample_after_the_other() {
    let daemon = Daemon::obedient();
    let mut child = daemon
        .command(&["stats", "--watch", "1", "--json"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let samples: Vec<Stats> = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .take(2)
        .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
        .collect();
    assert!(samples[0].sequence < samples[1].sequence);
    // The reader has closed the pipe, which is not an error.
    assert!(child.wait().unwrap().success());
    let subscribed = Request::Subscribe {
        stats_milliseconds: Some(1000),
    };
    assert!(daemon.script.seen.lock().unwrap().contains(&subscribed));
}

#[test]
fn watch_ends_when_the_driver_goes_away() {
    let state = Info {
        target: GIB,
        ..info()
    };
    for (conduct, words) in [
        (Conduct::Unloads, "no balloon driver works"),
        (Conduct::Leaves, "the VMM has disconnected"),
    ] {
        let output = Daemon::start(state.clone(), conduct, None).run(&["stats", "--watch"]);
        assert_eq!(output.status.code(), Some(4), "{output:?}");
        assert!(stdout(&output).contains("free-memory"), "{output:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(stderr.contains(words), "{stderr}");
    }
}

#[test]
fn top_wants_a_terminal() {
    let daemon = Daemon::obedient();
    fails(&daemon.run(&["top"]), 1, "not a terminal");
}

#[test]
fn the_other_commands_say_what_they_should() {
    let daemon = Daemon::obedient();
    succeeds(&daemon.run(&["interval", "5"]));
    assert_eq!(
        daemon.last_request(),
        Request::SetStatsInterval { seconds: 5 }
    );
    let id = ID.to_string();
    for (name, action, words) in [
        ("start", HintAction::Start, id.as_str()),
        ("stop", HintAction::Stop, "asked to stop"),
        ("done", HintAction::Done, "returned to the guest"),
    ] {
        let output = daemon.run(&["hints", name]);
        succeeds(&output);
        assert!(stdout(&output).contains(words), "{output:?}");
        assert_eq!(daemon.last_request(), Request::Hints { action });
    }
    let metrics = daemon.run(&["metrics"]);
    succeeds(&metrics);
    assert_eq!(
        stdout(&metrics),
        "# TYPE balloon_size_bytes gauge\nballoon_size_bytes 0\n"
    );
}

/// The environment has a socket of a daemon, which the manager does not need.
#[test]
fn auto_runs_the_manager() {
    let directory = tempfile::tempdir().unwrap();
    let auto = |arguments: &[&str]| {
        balloonctl(Path::new("/no/socket"), arguments)
            .env("PATH", directory.path())
            .output()
            .unwrap()
    };
    let arguments = ["auto", "reserve", "8GiB", "--vm", "db", "--json"];
    fails(&auto(&arguments), 1, "cannot run balloon-manager");
    let program = directory.path().join("balloon-manager");
    fs::write(&program, "#!/bin/sh\necho \"$@\"; exit 4\n").unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
    let output = auto(&arguments);
    assert_eq!(stdout(&output), "reserve 8GiB --vm db --json\n");
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(stdout(&auto(&["auto", "--help"])), "--help\n");
    assert_eq!(stdout(&auto(&["--json", "auto", "top"])), "top --json\n");
    let arguments = ["--json", "auto", "explain", "--", "-vm"];
    assert_eq!(stdout(&auto(&arguments)), "explain --json -- -vm\n");
    assert_eq!(auto(&["auto"]).status.code(), Some(2));
}

#[test]
fn an_owner_resumes_for_itself() {
    let daemon = Daemon::obedient();
    succeeds(&daemon.run(&["inhibit", "--for", "60"]));
    let request = Request::Inhibit {
        seconds: 60,
        owner: None,
    };
    assert_eq!(daemon.last_request(), request);
    let inhibited = daemon.run(&["info"]);
    assert!(stdout(&inhibited).contains("inhibited for 60 seconds"));

    succeeds(&daemon.run(&["inhibit", "--for", "7200", "--owner", "backup"]));
    let inhibited = daemon.run(&["info"]);
    assert!(stdout(&inhibited).contains("inhibited for 60 seconds, by backup for 2 hours"));
    let resumed = daemon.run(&["resume", "--owner", "backup"]);
    succeeds(&resumed);
    assert!(stdout(&resumed).contains("another reason: inhibited for 60 seconds."));

    let resumed = daemon.run(&["resume"]);
    succeeds(&resumed);
    assert!(stdout(&resumed).contains("another reason: pinned."));
}

#[test]
fn another_file_is_not_written_through_a_link() {
    let daemon = Daemon::obedient();
    let place = |name| daemon.directory.path().join(name);
    fs::write(place("other"), "mine").unwrap();
    symlink(place("other"), place("pages.part")).unwrap();
    symlink(place("other"), place("pages")).unwrap();
    let out = place("pages");
    succeeds(&daemon.run(&["unused", "--out", out.to_str().unwrap()]));
    assert!(fs::read(place("other")).unwrap() == b"mine");
    assert_eq!(fs::read(out).unwrap()[..8], *b"UNUSEDPG");
}

#[test]
fn unused_pages_are_written_to_a_file() {
    let daemon = Daemon::obedient();
    let path = daemon.directory.path().join("pages");
    let out = path.to_str().unwrap();
    let output = daemon.run(&["unused", "--out", out, "--min-order", "3", "--end", "4GiB"]);
    succeeds(&output);
    assert!(stdout(&output).contains("3.00 GiB of the guest are unused, in 4 pages"));
    let asked = daemon.orders()[0].clone();
    let expected = Request::Unused {
        block: 32768,
        start: 0,
        end: 4 * GIB,
    };
    assert_eq!(asked, expected);

    let file = fs::read(&path).unwrap();
    let word = |at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    assert_eq!(file[..8], *b"UNUSEDPG");
    assert_eq!([8, 16, 24, 32].map(word), [1 | (12 << 32), 2 << 20, ID, 4]);
    assert_eq!(file.len(), 64 + (2 << 20) / 8);
    let bitmap = |number: usize| word(64 + 8 * number);
    assert_eq!([0, 1, 2].map(bitmap), [0b110, 1, 0]);
    assert_eq!(bitmap((2 << 30 >> 12) / 64), 1);
    let left: Vec<_> = fs::read_dir(daemon.directory.path()).unwrap().collect();
    assert_eq!(left.len(), 2, "the socket and the file: {left:?}");

    let answer = daemon.json(&["unused", "--out", out]);
    assert_eq!(
        (&answer["id"], &answer["status"]),
        (&json!(ID), &json!("complete"))
    );
    fails(
        &daemon.run(&["unused", "--out", "/nowhere/pages"]),
        1,
        "/nowhere/pages",
    );
}

#[test]
fn hinted_pages_are_written_to_a_file() {
    let daemon = Daemon::obedient();
    let path = daemon.directory.path().join("pages");
    let hints = ["hints", "start", "--out", path.to_str().unwrap()];
    let output = daemon.run(&hints);
    succeeds(&output);
    assert!(stdout(&output).contains("3.00 GiB of the guest are hinted, in 4 pages"));
    let action = HintAction::Start;
    assert_eq!(daemon.orders()[0], Request::Hints { action });
    let file = fs::read(&path).unwrap();
    assert_eq!(file[..8], *b"UNUSEDPG");
    assert_eq!(file[24..32], ID.to_le_bytes());
    assert_eq!(daemon.json(&hints)["named"], 3 * GIB);
}

#[test]
fn the_guest_is_asked_and_waited_for() {
    let daemon = Daemon::obedient();
    let output = daemon.run(&["reclaim", "--start", "0x100000"]);
    succeeds(&output);
    assert!(stdout(&output).contains("The host got 2.00 GiB back, of 3.00 GiB unused"));
    let expected = Request::Reclaim {
        block: 2 << 20,
        start: 1 << 20,
        end: 0,
    };
    assert_eq!(daemon.orders()[0], expected);
    assert_eq!(daemon.json(&["reclaim"])["discarded"], 2 * GIB);

    for (options, pages, slab) in [
        (&[][..], true, true),
        (&["--pages"], true, false),
        (&["--slab"], false, true),
        (&["--pages", "--slab"], true, true),
    ] {
        let daemon = Daemon::obedient();
        succeeds(&daemon.run(&[&["drop-caches"], options].concat()));
        let asked = daemon.orders()[0].clone();
        assert_eq!(asked, Request::DropCaches { pages, slab });
    }
}

#[test]
fn an_answer_that_ends_otherwise_is_told() {
    for (status, code, words) in [
        (RequestStatus::Aborted, 1, "had to stop"),
        (RequestStatus::Cancelled, 1, "another client"),
        (RequestStatus::Unsupported, 1, "does not know"),
        (RequestStatus::Malformed, 1, "refuses this request"),
        (RequestStatus::UnknownId, 1, "has lost"),
        (RequestStatus::Reset, 4, "went away"),
    ] {
        let daemon = Daemon::start(info(), Conduct::Ends(status), None);
        fails(&daemon.run(&["drop-caches"]), code, words);
    }
}

#[test]
fn a_guest_that_takes_too_long_is_told_to_stop() {
    let stop = Request::Hints {
        action: HintAction::Stop,
    };
    for (status, words) in [
        (
            RequestStatus::Waiting,
            "has not received the request within 1 s",
        ),
        (
            RequestStatus::Open,
            "has not finished its answer within 1 s",
        ),
    ] {
        for (arguments, end) in [
            (&["reclaim"][..], Request::Cancel { id: ID }),
            (&["hints", "start", "--out", "f"], stop.clone()),
        ] {
            let daemon = Daemon::start(info(), Conduct::Idle(status), None);
            let arguments = [arguments, &["--timeout", "1"]].concat();
            fails(&daemon.run(&arguments), 6, words);
            // Each event causes one look, and there are few without a change.
            let orders = daemon.orders();
            assert!(orders.len() < 8, "{orders:?}");
            assert_eq!(orders.last(), Some(&end));
        }
    }
}

#[test]
fn an_interrupt_tells_the_guest_to_stop() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let daemon = Daemon::start(info(), Conduct::Idle(RequestStatus::Open), None);
        let client = daemon
            .command(&["reclaim"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        while daemon.orders().len() < 2 {
            thread::sleep(Duration::from_millis(5));
        }
        kill(Pid::from_raw(client.id().try_into().unwrap()), signal).unwrap();
        fails(&client.wait_with_output().unwrap(), 130, "interrupted");
        assert_eq!(daemon.orders().last(), Some(&Request::Cancel { id: ID }));
    }
}

#[test]
fn completions_name_the_commands() {
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = balloonctl(Path::new("/nowhere"), &["completions", shell])
            .output()
            .unwrap();
        succeeds(&output);
        assert!(stdout(&output).contains("interval"), "{shell}");
    }
}

#[test]
fn the_man_page_has_all_sections() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().to_str().unwrap();
    succeeds(
        &balloonctl(Path::new("/nowhere"), &["man", path])
            .output()
            .unwrap(),
    );
    let page = fs::read_to_string(directory.path().join("balloonctl.1")).unwrap();
    for section in [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "OPTIONS",
        "COMMANDS",
        "EXIT STATUS",
        "FILES",
        "EXAMPLES",
    ] {
        assert!(
            page.contains(&format!(".SH {section}\n"))
                || page.contains(&format!(".SH \"{section}\"\n")),
            "{section} is missing"
        );
    }
    let mut missing = balloonctl(Path::new("/nowhere"), &["man", "/nowhere"]);
    fails(&missing.output().unwrap(), 1, "/nowhere/balloonctl.1");
}

/// The command line that sends such a request, if it does not come only after others.
fn command_line(request: &Request) -> Option<&'static [&'static str]> {
    Some(match request {
        Request::Info {} => &["info"],
        Request::Subscribe { .. } => &["set", "512MiB", "--wait"],
        Request::Set { .. } => &["set", "1GiB"],
        Request::Stats { .. } => &["stats"],
        Request::SetStatsInterval { .. } => &["interval", "10"],
        Request::Inhibit { .. } => &["inhibit"],
        Request::Resume { .. } => &["resume"],
        Request::Hints { .. } => &["hints", "start"],
        Request::Unused { .. } => &["unused", "--out", "unused-pages"],
        Request::Reclaim { .. } => &["reclaim"],
        Request::DropCaches { .. } => &["drop-caches"],
        Request::Metrics {} => &["metrics"],
        // These are about a request that the guest was asked.
        Request::Progress { .. } | Request::Ranges { .. } | Request::Cancel { .. } => return None,
    })
}

#[test]
fn every_request_has_a_command_and_is_documented() {
    const REQUESTS: &str = include_str!("../../fuzz/corpus/control/every-request");
    const DOCUMENT: &str = include_str!("../../../docs/vhost-user-balloon.md");
    // The first byte is the fuzzer's.
    for line in REQUESTS[1..].lines() {
        let request: Request = serde_json::from_str(line).unwrap();
        let Some(arguments) = command_line(&request) else {
            continue;
        };
        let daemon = Daemon::start(info(), Conduct::Ends(RequestStatus::Complete), None);
        let mut command = daemon.command(arguments);
        succeeds(&command.current_dir(&daemon.directory).output().unwrap());
        let seen = daemon.script.seen.lock().unwrap();
        let is_sent = seen
            .iter()
            .any(|sent| discriminant(sent) == discriminant(&request));
        assert!(is_sent, "{arguments:?} sends {seen:?}");
        assert!(
            DOCUMENT.contains(&format!("`{}", arguments[0])),
            "{arguments:?}"
        );
    }
}
