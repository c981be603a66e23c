// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The manager with control sockets of simulated guests.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use balloon_control::{
    Changes, ControlError, ErrorKind, Guest, Handler, Info, Lease, Request, Response, Server, Stat,
    Stats,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

const GIB: u64 = 1 << 30;

const METRICS: &str = include_str!("../../../docs/metrics.md");

const PROGRAM: &str = env!("CARGO_BIN_EXE_balloon-manager");

/// A guest whose balloon follows its target at once, as far as its processes do not use the memory.
#[derive(Clone, Debug)]
struct State {
    memory: u64,
    used: u64,
    target: u64,
    size: u64,
    stalls: u64,
    /// The number of the newest statistics.
    sequence: u64,
    sets: u64,
    resident: Option<u64>,
    vmm: Option<i32>,
    /// The lease on the target, and whether there was one that has run out.
    lease: Option<Lease>,
    lapsed: bool,
    /// What the daemon may lower the target by, if it ever does so by itself, and by what it has.
    release: Option<u64>,
    released: u64,
    /// How often a lease was renewed with the same target.
    renewals: u64,
    /// The daemon refuses targets.
    refuses: bool,
    /// The daemon cannot write its state file: it sets targets, and reports an error.
    forgetful: bool,
    /// Another program sets this target just before the next one.
    rival: Option<u64>,
    /// The daemon neither answers nor sets the next target.
    loses: bool,
    /// The daemon has a new process that does not know the memory yet.
    forgets: bool,
    /// No VM is connected to the daemon.
    ended: bool,
    /// The guest reports that its balloon has the target's size.
    lies: bool,
    /// How often the daemon was asked for its state.
    infos: u64,
    subscriptions: u64,
    /// The shortest interval of statistics that a client wants.
    interval: Option<Duration>,
}

#[derive(Clone)]
struct Fake(Arc<Mutex<State>>, Arc<Changes>);

impl Fake {
    fn new(memory: u64, used: u64) -> Self {
        let state = State {
            memory,
            used,
            target: 0,
            size: 0,
            stalls: 0,
            sequence: 0,
            sets: 0,
            resident: None,
            vmm: None,
            lease: None,
            lapsed: false,
            release: None,
            released: 0,
            renewals: 0,
            refuses: false,
            forgetful: false,
            rival: None,
            loses: false,
            forgets: false,
            ended: false,
            lies: false,
            infos: 0,
            subscriptions: 0,
            interval: None,
        };
        let guest = Self(Arc::new(Mutex::new(state)), Arc::default());
        let (state, changes) = (Arc::downgrade(&guest.0), Arc::clone(&guest.1));
        thread::spawn(move || {
            while let Some(state) = state.upgrade() {
                let interval = state.lock().unwrap().interval;
                state.lock().unwrap().sequence += 1;
                drop(state);
                thread::sleep(interval.unwrap_or(Duration::from_millis(20)));
                if interval.is_some() {
                    changes.stats();
                }
            }
        });
        guest
    }

    fn get(&self) -> State {
        self.0.lock().unwrap().clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.0.lock().unwrap());
    }

    fn grant(&self) -> u64 {
        let state = self.get();
        state.memory - state.target
    }

    /// The lease runs out.
    fn lapse(&self) {
        self.change(|state| {
            let lease = state.lease.take().unwrap();
            (state.target, state.size) = (lease.fallback, lease.fallback);
            state.lapsed = true;
        });
        self.1.info();
    }

    /// Waits until the lease has been renewed so many times.
    fn wait_for_renewals(&self, count: u64) {
        let before = self.get().renewals;
        wait_for("renewals", || self.get().renewals >= before + count);
    }

    /// Whether this request is lost: the next one with another target, once.
    fn loses(&self, request: &Request) -> bool {
        let mut state = self.0.lock().unwrap();
        let changes = matches!(request, Request::Set { bytes, .. } if *bytes != state.target);
        changes && std::mem::take(&mut state.loses)
    }

    /// The memory that the guest can touch.
    fn usable(&self) -> u64 {
        let state = self.get();
        state.memory - state.size
    }
}

impl Handler for Fake {
    fn changes(&self) -> &Changes {
        &self.1
    }

    fn sample_every(&self, interval: Option<Duration>) {
        self.change(|state| state.interval = interval);
    }

    fn handle(&self, request: Request) -> Result<Response, ControlError> {
        if self.loses(&request) {
            // The manager does not wait that long.
            thread::sleep(Duration::from_secs(3));
            return Err(ControlError::new(ErrorKind::Failed, "no", "no"));
        }
        let mut state = self.0.lock().unwrap();
        match request {
            Request::Info {} => {
                state.infos += 1;
                let memory = Some(state.memory).filter(|_| !state.forgets && !state.ended);
                Ok(Response::Info(Info {
                    target: state.target,
                    lease: state.lease.clone(),
                    lapsed: state.lapsed,
                    release: state.release,
                    released: state.released,
                    size: if state.lies { state.target } else { state.size },
                    held: state.size,
                    resident: state.resident,
                    vmm: state.vmm,
                    memory,
                    shared: memory,
                    granule: 4096,
                    guest: Guest {
                        connected: !state.ended,
                        driver: !state.ended,
                        features: state
                            .release
                            .map(|_| "pressure".to_owned())
                            .into_iter()
                            .collect(),
                        ..Guest::default()
                    },
                    ..Info::default()
                }))
            }
            Request::Subscribe { .. } => {
                state.subscriptions += 1;
                Ok(Response::Subscribed {})
            }
            Request::Set { .. } if state.refuses => Err(ControlError::new(
                ErrorKind::Failed,
                "no",
                "ask another one",
            )),
            Request::Set {
                bytes,
                expected,
                lease,
                fallback,
                owner,
                release,
            } => {
                if bytes != state.target {
                    state.target = state.rival.take().unwrap_or(state.target);
                }
                if expected.is_some_and(|expected| expected != state.target) {
                    return Err(ControlError {
                        target: Some(state.target),
                        ..ControlError::new(ErrorKind::Conflict, "another one", "no")
                    });
                }
                state.renewals += u64::from(state.lease.is_some() && bytes == state.target);
                state.lease = lease.map(|remaining| Lease {
                    remaining,
                    fallback: fallback.unwrap(),
                    owner,
                });
                state.lapsed = false;
                // A daemon that never does so does not know the field.
                assert!(release.is_none() || state.release.is_some());
                if bytes != state.target {
                    state.release = state.release.map(|_| release.unwrap_or(0));
                    state.released = 0;
                }
                state.target = bytes;
                let most = state.memory.saturating_sub(state.used).max(state.size);
                state.size = bytes.min(most);
                state.sets += 1;
                match state.forgetful {
                    true => Err(ControlError::new(ErrorKind::Failed, "unsaved", "no")),
                    false => Ok(Response::Done {}),
                }
            }
            Request::Stats { .. } => {
                let usable = state.memory - state.size;
                let available = usable.saturating_sub(state.used);
                state.stalls += u64::from(available < 16 << 20);
                Ok(Response::Stats(Stats {
                    sequence: state.sequence,
                    values: BTreeMap::from([
                        (Stat::FreeMemory, available),
                        (Stat::AvailableMemory, available),
                        (Stat::AllocStalls, state.stalls),
                    ]),
                    ..Stats::default()
                }))
            }
            _ => Err(ControlError::new(ErrorKind::Unsupported, "no", "no")),
        }
    }
}

/// Plays QEMU's monitor of a VM of 4 GiB with an empty balloon, for one client.
fn monitor(listener: &UnixListener) -> UnixStream {
    let (mut stream, _) = listener.accept().unwrap();
    let client = stream.try_clone().unwrap();
    stream.write_all(b"{\"QMP\":{}}\n").unwrap();
    let lines = BufReader::new(stream.try_clone().unwrap()).lines();
    thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            let request: Value = serde_json::from_str(&line).unwrap();
            let value = match request["execute"].as_str().unwrap() {
                "qom-list" => json!([{ "name": "b", "type": "child<virtio-balloon-pci>" }]),
                "qom-get" => json!({ "stats": {}, "last-update": 0 }),
                "query-memory-size-summary" => json!({ "base-memory": 4 * GIB }),
                "query-memory-devices" => json!([]),
                "query-balloon" => json!({ "actual": 4 * GIB }),
                "query-status" => json!({ "running": true }),
                _ => json!({}),
            };
            let reply = json!({ "return": value, "id": request["id"] });
            if writeln!(stream, "{reply}").is_err() {
                break;
            }
        }
    });
    client
}

/// A host with sockets, and the manager.
struct Host {
    directory: TempDir,
    servers: Vec<Server>,
    manager: Option<Child>,
}

impl Host {
    fn new(config: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let host = Self {
            directory,
            servers: Vec::new(),
            manager: None,
        };
        host.configure(config);
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn configure(&self, config: &str) {
        let sockets = self.path("vms/*/control.sock");
        let text = format!("sockets = '{}'\n{config}", sockets.display());
        fs::write(self.path("config.toml"), text).unwrap();
    }

    fn socket(&self, name: &str) -> PathBuf {
        let directory = self.path("vms").join(name);
        fs::create_dir_all(&directory).unwrap();
        directory.join("control.sock")
    }

    fn add(&mut self, name: &str, guest: &Fake) {
        let server = Server::bind(&self.socket(name), Arc::new(guest.clone())).unwrap();
        self.servers.push(server);
    }

    fn run(&mut self, arguments: &[&str]) {
        self.run_by(&mut Command::new(PROGRAM), arguments);
    }

    /// Runs the manager by a command that gets its arguments.
    fn run_by(&mut self, command: &mut Command, arguments: &[&str]) {
        let child = command
            .args(["run", "--config"])
            .arg(self.path("config.toml"))
            .arg("--socket")
            .arg(self.path("run/manager.sock"))
            .args(arguments)
            .stderr(
                fs::File::options()
                    .create(true)
                    .append(true)
                    .open(self.path("log"))
                    .unwrap(),
            )
            .spawn()
            .unwrap();
        self.manager = Some(child);
        let socket = self.path("run/manager.sock");
        wait_for("the manager", || socket.exists());
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap()
    }

    fn signal(&self, signal: Signal) {
        let id = self.manager.as_ref().unwrap().id();
        kill(Pid::from_raw(id.try_into().unwrap()), signal).unwrap();
    }

    /// Asks the manager.
    fn ask(&self, arguments: &[&str]) -> Output {
        let (command, rest) = arguments.split_first().unwrap();
        Command::new(PROGRAM)
            .arg(command)
            .arg("--socket")
            .arg(self.path("run/manager.sock"))
            .args(rest)
            .output()
            .unwrap()
    }

    /// What the VMs are charged for, in pages.
    fn charged(&self) -> u64 {
        let status = self.ask(&["top", "--json"]).stdout;
        let status: Value = serde_json::from_slice(&status).unwrap();
        status["charged"].as_u64().unwrap()
    }

    fn decisions(&self) -> u64 {
        let metrics = words(&self.ask(&["metrics"]).stdout);
        let mut lines = metrics.lines();
        let value = lines.find_map(|line| line.strip_prefix("balloon_manager_decisions_total "));
        value.unwrap().parse().unwrap()
    }

    fn end(&mut self) {
        self.signal(Signal::SIGTERM);
        assert!(self.manager.take().unwrap().wait().unwrap().success());
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(mut manager) = self.manager.take() {
            // It may have ended.
            let _ = manager.kill();
            let _ = manager.wait();
        }
    }
}

/// A host whose manager runs, and guests of 4 GiB that use 1 GiB. `prepare` changes the first one before that.
fn running<const N: usize>(
    config: &str,
    names: [&str; N],
    prepare: impl FnOnce(&mut State),
) -> (Host, [Fake; N]) {
    let mut host = Host::new(config);
    let guests = names.map(|_| Fake::new(4 * GIB, GIB));
    guests[0].change(prepare);
    for (name, guest) in names.iter().zip(&guests) {
        host.add(name, guest);
    }
    host.run(&[]);
    (host, guests)
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{what} does not come"
        );
        thread::sleep(Duration::from_millis(5));
    }
}

fn words(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

/// A lease of this program, or of one without a name.
fn lease_of(owner: Option<&str>) -> Lease {
    Lease {
        remaining: 1000,
        fallback: 0,
        owner: owner.map(str::to_owned),
    }
}

/// The same host, with short leases.
const LEASE: &str = "lease = 3\n[host]\npool = '6GiB'\nreserve = '256MiB'\n";

const SMALL: &str = "[host]\npool = '6GiB'\nreserve = '256MiB'\n";

/// Runs a program with the socket `$1` as that of systemd's journal. Other processes must not see what is mounted.
const WITH_JOURNAL: &str = r#"
    mount --make-private /run
    mount -t tmpfs -o mode=755 run /run
    mkdir -p /run/systemd/journal
    : >/run/systemd/journal/socket
    mount --bind "$1" /run/systemd/journal/socket
    shift
    exec "$@"
"#;

/// Whether an entry of the journal has this field with this value.
fn has_field(entry: &[u8], name: &str, value: &str) -> bool {
    let mut field = format!("{name}\n").into_bytes();
    field.extend((value.len() as u64).to_le_bytes());
    field.extend(value.as_bytes());
    entry.windows(field.len()).any(|part| part == field)
}

#[test]
fn entries_of_the_journal_have_fields() {
    let mut host = Host::new(SMALL);
    let [web, db] = [GIB, GIB].map(|used| Fake::new(4 * GIB, used));
    host.add("web", &web);
    host.add("db", &db);
    let socket = host.path("journal");
    let journal = UnixDatagram::bind(&socket).unwrap();
    let limit = Some(Duration::from_secs(60));
    journal.set_read_timeout(limit).unwrap();
    let log = fs::File::create(host.path("log"))
        .unwrap()
        .metadata()
        .unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation=unchanged"])
        .args(["sh", "-euc", WITH_JOURNAL, "sh"])
        .arg(&socket)
        .arg(PROGRAM)
        .env("JOURNAL_STREAM", format!("{}:{}", log.dev(), log.ino()));
    host.run_by(&mut command, &[]);
    let mut entry = vec![0; 1 << 16];
    let is_action = |entry: &[u8]| {
        has_field(entry, "VM", "web")
            && has_field(entry, "CAUSE", "it does not use the memory")
            && has_field(entry, "FROM", &(4 * GIB).to_string())
    };
    loop {
        let length = journal.recv(&mut entry).unwrap();
        if is_action(&entry[..length]) {
            break;
        }
    }
    assert_eq!(host.log(), "");
    host.end();
}

#[test]
fn memory_moves_to_the_guest_that_needs_it_and_the_recording_replays() {
    let mut host = Host::new(SMALL);
    let [web, db] = [GIB, GIB].map(|used| Fake::new(4 * GIB, used));
    host.add("web", &web);
    host.add("db", &db);
    let record = host.path("record.jsonl");
    host.run(&["--record", record.to_str().unwrap()]);
    // Together they could touch 8 GiB.
    let fits = || web.usable() + db.usable() <= 6 * GIB - 256 * (1 << 20);
    wait_for("memory that fits", fits);

    for (busy, idle) in [(&web, &db), (&db, &web)] {
        idle.change(|state| state.used = GIB / 2);
        busy.change(|state| state.used = 7 * GIB / 2);
        wait_for("memory for the busy guest", || {
            assert!(fits());
            busy.usable() > 7 * GIB / 2 && busy.get().size <= busy.get().target
        });
    }
    let explained = words(&host.ask(&["explain", "db"]).stdout);
    assert!(explained.starts_with("db: "), "{explained}");
    assert!(explained.contains("its grant from"), "{explained}");
    let top = words(&host.ask(&["top"]).stdout);
    assert!(top.contains("pool 6.0 GiB") && top.contains("web"), "{top}");
    let line = top.lines().find(|line| line.starts_with("web")).unwrap();
    let causes = ["it has more than its share", "it does not use the memory"];
    assert!(causes.iter().any(|cause| line.ends_with(cause)), "{top}");
    let metrics = words(&host.ask(&["metrics"]).stdout);
    assert!(
        metrics.contains("balloon_manager_vm_memory_bytes{vm=\"db\"} 4294967296"),
        "{metrics}"
    );
    // The memory for the second one came from the first one.
    for counter in ["cuts_total{vm=\"web\"}", "raises_total{vm=\"db\"}"] {
        let mut lines = metrics.lines();
        let line = lines.find(|line| line.contains(counter)).unwrap();
        assert!(!line.ends_with(" 0"), "{line}");
    }
    // They have waited for it.
    let mut lines = metrics.lines();
    let count = lines.find_map(|line| line.strip_prefix("balloon_manager_need_seconds_count "));
    assert!(count.unwrap().parse::<u64>().unwrap() >= 1, "{metrics}");
    // Each metric is in the document.
    for line in metrics.lines() {
        if let Some(head) = line.strip_prefix("# TYPE ") {
            let (name, kind) = head.split_once(' ').unwrap();
            let row = format!("| `{name}` | {kind} |");
            assert!(METRICS.contains(&row), "{row} is missing");
        }
    }
    assert_eq!(metrics.matches("vm_cuts_total{vm=").count(), 2);
    host.end();

    let replay = |path: &Path| {
        Command::new(PROGRAM)
            .arg("replay")
            .arg(path)
            .output()
            .unwrap()
    };
    let output = replay(&record);
    assert!(output.status.success(), "{}", words(&output.stderr));
    assert!(words(&output.stdout).contains("decisions are as recorded"));
    // Another target would not follow from the observation.
    let text = fs::read_to_string(&record).unwrap();
    let changed = text.replacen(
        "\"actions\":[{\"number\":1",
        "\"actions\":[{\"number\":2",
        1,
    );
    assert_ne!(text, changed);
    fs::write(&record, changed).unwrap();
    let output = replay(&record);
    assert!(!output.status.success());
    assert!(
        words(&output.stderr).contains("differs"),
        "{}",
        words(&output.stderr)
    );
}

/// Prometheus refuses metrics of which two have the same labels.
#[test]
fn two_vms_with_one_name_have_metrics_of_their_own() {
    let mut host = Host::new(SMALL);
    let path = host.path("db.qmp");
    host.configure(&format!("qmp = '{}'\n{SMALL}", path.display()));
    let _qemu = UnixListener::bind(&path).unwrap();
    host.add("db", &Fake::new(4 * GIB, GIB));
    host.run(&[]);
    let metrics = words(&host.ask(&["metrics"]).stdout);
    for name in ["db", path.to_str().unwrap()] {
        let label = format!("vm_raises_total{{vm=\"{name}\"}}");
        assert_eq!(metrics.matches(&label).count(), 1, "{metrics}");
    }
}

#[test]
fn top_repeats_json_as_well() {
    let mut host = Host::new(SMALL);
    host.run(&[]);
    let mut top = Command::new(PROGRAM)
        .args(["top", "--watch", "--json", "--socket"])
        .arg(host.path("run/manager.sock"))
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(top.stdout.take().unwrap()).lines();
    let statuses = lines.take(2).map(|line| {
        let status: Value = serde_json::from_str(&line.unwrap()).unwrap();
        status["now"].as_u64().unwrap()
    });
    let statuses: Vec<_> = statuses.collect();
    top.kill().unwrap();
    top.wait().unwrap();
    assert!(
        statuses.len() == 2 && statuses[0] < statuses[1],
        "{statuses:?}"
    );
}

#[test]
fn a_daemon_that_hangs_delays_no_other_vm() {
    let mut host = Host::new(SMALL);
    let hanging = UnixListener::bind(host.socket("hanging")).unwrap();
    let [web, db] = [GIB, GIB].map(|used| Fake::new(4 * GIB, used));
    host.add("web", &web);
    host.add("db", &db);
    host.run(&[]);
    wait_for("memory that fits", || web.usable() + db.usable() <= 6 * GIB);
    let line = "hanging/control.sock: the daemon does not answer";
    wait_for("the error", || host.log().contains(line));
    drop(hanging);
}

/// The manager cannot see the memory of these guests itself.
#[test]
fn the_daemon_reports_resident_memory() {
    let (host, [web]) = running(SMALL, ["web"], |web| web.resident = Some(3 * GIB));
    for resident in [3 * GIB, 2 * GIB] {
        web.change(|state| state.resident = Some(resident));
        wait_for("the resident memory", || {
            let line = format!("vm_resident_bytes{{vm=\"web\"}} {resident}\n");
            words(&host.ask(&["metrics"]).stdout).contains(&line)
        });
    }
}

#[test]
fn vms_come_and_go() {
    let mut host = Host::new(SMALL);
    host.run(&[]);
    let web = Fake::new(4 * GIB, GIB);
    host.add("web", &web);
    wait_for("the VM", || {
        words(&host.ask(&["top"]).stdout).contains("web")
    });
    wait_for("the charge", || host.charged() > 0);
    web.change(|state| state.ended = true);
    web.1.info();
    wait_for("the end of the VM", || host.charged() == 0);
    host.servers.clear();
    wait_for("its end", || {
        !words(&host.ask(&["top"]).stdout).contains("web")
    });
    assert!(host.log().contains("web: its socket has gone"));
}

/// The other guest gets no memory that the one that lies still has.
#[test]
fn a_guest_that_lies_about_its_balloon_counts_with_what_it_has() {
    let mut host = Host::new(SMALL);
    let [liar, db] = [4 * GIB, GIB].map(|used| Fake::new(4 * GIB, used));
    liar.change(|state| state.lies = true);
    host.add("liar", &liar);
    host.add("db", &db);
    host.run(&[]);
    let fits = || liar.usable() + db.usable() <= 6 * GIB - 256 * (1 << 20);
    wait_for("memory that fits", fits);
    db.change(|state| state.used = 7 * GIB / 2);
    let infos = db.get().infos;
    wait_for("answers", || {
        assert!(fits(), "{:?} {:?}", liar.get(), db.get());
        db.get().infos > infos + 6
    });
    assert_eq!(liar.usable(), 4 * GIB);
}

#[test]
fn the_manager_subscribes_to_events_and_again_after_a_restart_of_the_daemon() {
    let (mut host, [web]) = running(SMALL, ["web"], |_| {});
    wait_for("the subscription", || web.get().subscriptions > 0);
    for _ in 0..5 {
        let infos = web.get().infos;
        web.1.info();
        wait_for("a request for the state", || web.get().infos > infos);
    }
    host.servers.clear();
    let subscriptions = web.get().subscriptions;
    host.add("web", &web);
    let is_new = || web.get().subscriptions > subscriptions;
    wait_for("another subscription", is_new);
    host.end();
}

#[test]
fn a_guest_in_need_sends_statistics_more_often() {
    let (mut host, [web]) = running(SMALL, ["web"], |_| {});
    let has_interval = |milliseconds| {
        let interval = Some(Duration::from_millis(milliseconds));
        wait_for("the interval", || web.get().interval == interval);
    };
    has_interval(1000);
    web.change(|state| state.used = 4 * GIB - (64 << 20));
    has_interval(100);
    web.change(|state| state.used = GIB);
    has_interval(1000);
    host.end();
    wait_for("no interval", || web.get().interval.is_none());
}

#[test]
fn a_vm_counts_while_its_daemon_does_not_know_the_memory() {
    let (host, [web]) = running(SMALL, ["web"], |_| {});
    wait_for("the charge", || host.charged() > 0);
    web.change(|state| state.forgets = true);
    let infos = web.get().infos;
    wait_for("answers", || web.get().infos > infos + 2);
    assert!(host.charged() > 0);
}

/// QEMU runs on, and connects to the next daemon after a while.
#[test]
fn a_vm_counts_while_its_daemon_restarts() {
    let (mut host, [web]) = running(&LEASE.replace("lease = 3", "lease = 15"), ["web"], |_| {});
    wait_for("the charge", || host.charged() > 0);
    let counts = |host: &Host| {
        let before = host.decisions();
        wait_for("decisions", || {
            assert!(host.charged() > 0);
            host.decisions() > before + 1
        });
    };
    host.servers.clear();
    counts(&host);
    web.change(|state| state.ended = true);
    let infos = web.get().infos;
    host.add("web", &web);
    wait_for("the daemon", || web.get().infos > infos);
    counts(&host);
    web.change(|state| state.ended = false);
    web.1.info();
    let renewals = web.get().renewals;
    wait_for("a renewal", || web.get().renewals > renewals);
    assert_eq!(host.log().matches("web: found").count(), 1);
    // The next time it does not come back.
    host.servers.clear();
    wait_for("its end", || {
        host.log().contains("web: its socket has gone")
    });
}

#[test]
fn a_vm_whose_vmm_has_ended_with_its_daemon_does_not_count() {
    let mut host = Host::new(&format!("lease = 3600\n{SMALL}"));
    let web = Fake::new(4 * GIB, GIB);
    let mut vmm = Command::new("sleep").arg("3600").spawn().unwrap();
    web.change(|state| state.vmm = Some(vmm.id().try_into().unwrap()));
    host.add("web", &web);
    host.run(&[]);
    wait_for("the charge", || host.charged() > 0);
    host.servers.clear();
    wait_for("decisions", || host.log().contains("web/control.sock: "));
    let before = host.decisions();
    wait_for("decisions", || host.decisions() > before + 1);
    assert!(host.charged() > 0);
    vmm.kill().unwrap();
    vmm.wait().unwrap();
    wait_for("the end of the charge", || host.charged() == 0);
}

#[test]
fn a_vm_that_is_none_of_the_configuration_any_more_goes_at_once() {
    let (host, [_web]) = running(SMALL, ["web"], |_| {});
    wait_for("the charge", || host.charged() > 0);
    fs::write(
        host.path("config.toml"),
        format!(
            "sockets = '/no/*'
{SMALL}"
        ),
    )
    .unwrap();
    host.signal(Signal::SIGHUP);
    wait_for("its end", || {
        host.log().contains("web: its socket has gone")
    });
}

#[test]
fn a_daemon_may_lower_its_target_by_itself() {
    let (host, [web, db]) = running(LEASE, ["web", "db"], |web| web.release = Some(0));
    wait_for("a release", || web.get().release > Some(0));
    let of = |guest: &Fake| {
        let state = guest.get();
        4 * GIB - state.target + state.release.unwrap_or(0)
    };
    // It is charged for what it may take.
    wait_for("the charges", || {
        let (web, db) = (of(&web), of(&db));
        host.charged() == (web + db) / 4096
    });
    let charged = host.charged();
    let mut lowered = 0;
    web.change(|state| {
        let pages = state.release.replace(0).unwrap();
        lowered = state.target - pages;
        (state.target, state.size, state.released) = (lowered, lowered, pages);
    });
    web.1.info();
    web.wait_for_renewals(2);
    assert_eq!(web.get().target, lowered);
    assert!(host.charged() <= charged);
    let explained = words(&host.ask(&["explain", "web"]).stdout);
    assert!(!explained.contains("another program"), "{explained}");
}

/// Its socket stays. Another QEMU may come.
#[test]
fn a_vm_whose_qemu_was_killed_does_not_count() {
    let mut host = Host::new(SMALL);
    let path = host.path("web.qmp");
    host.configure(&format!("qmp = '{}'\n{SMALL}", path.display()));
    let listener = UnixListener::bind(&path).unwrap();
    host.run(&[]);
    let client = monitor(&listener);
    wait_for("the charge", || host.charged() == 4 * GIB / 4096);
    drop(listener);
    client.shutdown(Shutdown::Both).unwrap();
    wait_for("the end of the charge", || host.charged() == 0);
    fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let _client = monitor(&listener);
    wait_for("the charge", || host.charged() == 4 * GIB / 4096);
}

/// Its daemon runs on, for the next VM.
#[test]
fn a_vm_that_has_ended_has_no_account_and_no_lease() {
    let (host, [web, db]) = running(LEASE, ["web", "db"], |_| {});
    web.wait_for_renewals(1);
    web.change(|state| state.ended = true);
    web.1.info();
    wait_for("the end of the account", || {
        let metrics = words(&host.ask(&["metrics"]).stdout);
        !metrics.contains("vm_memory_bytes{vm=\"web\"}")
    });
    let top = words(&host.ask(&["top"]).stdout);
    let line = top.lines().find(|line| line.starts_with("web")).unwrap();
    assert!(line.ends_with("unknown"), "{line}");
    // One may be on its way.
    db.wait_for_renewals(1);
    let renewals = web.get().renewals;
    db.wait_for_renewals(3);
    assert_eq!(web.get().renewals, renewals);
}

#[test]
fn a_target_of_another_program_is_not_overwritten() {
    let (host, [web, db]) = running(LEASE, ["web", "db"], |web| web.rival = Some(3 * GIB));
    wait_for("the conflict", || {
        let explained = words(&host.ask(&["explain", "web"]).stdout);
        explained.contains("another program changes its target")
    });
    let line = "another program has set the target to 3.0 GiB";
    assert!(host.log().contains(line), "{}", host.log());
    // The other program has leases as well.
    web.change(|state| state.lease = Some(lease_of(Some("night"))));
    let sets = web.get().sets;
    db.wait_for_renewals(2);
    let state = web.get();
    assert_eq!((state.target, state.sets), (3 * GIB, sets));
}

/// Unlike a lease of the manager before, it is not renewed.
#[test]
fn a_vm_with_a_lease_of_another_program_is_left_alone_until_it_ends() {
    for owner in [None, Some("night")] {
        let (host, [web, db]) = running(LEASE, ["web", "db"], |web| {
            web.lease = Some(lease_of(owner));
        });
        db.wait_for_renewals(2);
        assert_eq!((web.get().sets, web.get().target), (0, 0));
        let line = "web/control.sock: another program has a lease on the target, which stays";
        assert_eq!(host.log().matches(line).count(), 1, "{}", host.log());
        web.lapse();
        wait_for("a target", || web.get().sets > 0);
        web.wait_for_renewals(2);
    }
}

#[test]
fn targets_have_leases_that_the_manager_and_the_next_one_renew() {
    let (mut host, [web, db]) = running(LEASE, ["web", "db"], |_| {});
    let has_lease = |guest: &Fake| guest.get().lease.is_some();
    wait_for("leases", || has_lease(&web) && has_lease(&db));
    for guest in [&web, &db] {
        guest.wait_for_renewals(2);
    }
    let share = |guest: &Fake| {
        let lease = guest.get().lease.unwrap();
        assert_eq!(lease.remaining, 3000);
        guest.get().memory - lease.fallback
    };
    assert_eq!(share(&web).abs_diff(share(&db)) / 4096, 0);
    // All but the reserve and the fast reserve, in whole pages.
    assert_eq!(share(&web), (6 * GIB - 768 * (1 << 20)) / 2);
    let explained = words(&host.ask(&["explain", "web"]).stdout);
    assert!(
        explained.contains("without a manager it has 2.6 GiB"),
        "{explained}"
    );

    host.signal(Signal::SIGKILL);
    host.manager.take().unwrap().wait().unwrap();
    fs::remove_file(host.path("run/manager.sock")).unwrap();
    host.run(&[]);
    for guest in [&web, &db] {
        guest.wait_for_renewals(2);
    }
}

/// It would keep all of its memory for good if the manager died.
#[test]
fn a_vm_that_was_never_moved_has_a_lease() {
    let mut host = Host::new(&format!("{LEASE}[vm.web]\nfloor = '4GiB'\n"));
    let [web, db] = [4 * GIB, GIB].map(|used| Fake::new(4 * GIB, used));
    host.add("web", &web);
    host.add("db", &db);
    host.run(&[]);
    for guest in [&web, &db] {
        guest.wait_for_renewals(2);
    }
    assert_eq!(web.get().target, 0);
    let share = |guest: &Fake| 4 * GIB - guest.get().lease.unwrap().fallback;
    assert!(share(&web) + share(&db) < 6 * GIB);
}

/// Without the lease the daemon sets no other target.
#[test]
fn a_vm_that_the_manager_shall_leave_alone_keeps_its_target_for_good() {
    let (host, [web, db]) = running(LEASE, ["web", "db"], |_| {});
    wait_for("a target", || web.get().target > 0);
    web.wait_for_renewals(1);
    host.configure(&format!("{LEASE}[vm.web]\nweight = 0\n"));
    host.signal(Signal::SIGHUP);
    wait_for("the end of the lease", || web.get().lease.is_none());
    let State { target, sets, .. } = web.get();
    assert!(target > 0);
    db.wait_for_renewals(3);
    assert_eq!((web.get().target, web.get().sets), (target, sets));
}

#[test]
fn a_vm_that_is_paused_keeps_its_target_until_it_is_resumed() {
    let (host, [web, db]) = running(LEASE, ["web", "db"], |_| {});
    wait_for("a target", || web.get().target > 0);
    web.wait_for_renewals(1);
    assert!(host.ask(&["pause", "web"]).status.success());
    wait_for("the end of the lease", || web.get().lease.is_none());
    assert!(words(&host.ask(&["explain", "web"]).stdout).contains("left alone"));
    let target = web.get().target;
    web.change(|state| state.used = 3 * GIB);
    db.wait_for_renewals(2);
    assert_eq!(
        (web.get().target, web.get().lease.is_none()),
        (target, true)
    );
    assert!(host.ask(&["resume", "web"]).status.success());
    wait_for("memory", || web.usable() > 3 * GIB);
    let output = host.ask(&["pause", "none"]);
    assert!(words(&output.stderr).contains("there is no VM 'none'"));
}

#[test]
fn a_manager_that_was_stopped_takes_up_the_targets_after_its_leases() {
    let (host, [web, db]) = running(LEASE, ["web", "db"], |_| {});
    let has_lease = |guest: &Fake| guest.get().lease.is_some();
    wait_for("leases", || has_lease(&web) && has_lease(&db));
    host.signal(Signal::SIGSTOP);
    web.lapse();
    let sets = web.get().sets;
    host.signal(Signal::SIGCONT);
    web.change(|state| state.used = 3 * GIB);
    wait_for("another target", || web.get().sets > sets);
    assert!(!host.log().contains("another program"), "{}", host.log());
}

/// The target before it is still in force. The next one replaces that, and counts as the manager's.
#[test]
fn a_target_that_is_lost_is_none_of_another_program() {
    let (host, [web, _db]) = running(SMALL, ["web", "db"], |web| web.loses = true);
    wait_for("the first target", || !web.get().loses);
    // The manager sends another target before it knows that the first one is lost.
    web.change(|state| state.used = 2 * GIB);
    wait_for("a target", || web.get().sets > 0);
    assert!(!host.log().contains("another program"), "{}", host.log());
}

#[test]
fn observing_sets_no_target() {
    let mut host = Host::new(LEASE);
    let [web, db] = [GIB, GIB].map(|used| Fake::new(4 * GIB, used));
    web.change(|state| state.lease = Some(lease_of(Some("balloon-manager"))));
    host.add("web", &web);
    host.add("db", &db);
    host.run(&["--observe"]);
    wait_for("decisions", || {
        host.log().contains("web: would set its grant from 4.0 GiB")
    });
    wait_for("memory for all", || {
        let top = words(&host.ask(&["top"]).stdout);
        // Each of them uses 1 of 4 GiB.
        top.contains("observing only: would save 5.")
    });
    let metrics = words(&host.ask(&["metrics"]).stdout);
    let savings = metrics
        .lines()
        .find_map(|line| line.strip_prefix("balloon_manager_observed_savings_bytes "));
    assert!(savings.unwrap().parse::<u64>().unwrap() > 5 * GIB);
    // What it would have set counts as set, and is not proposed again.
    let before = host.decisions();
    wait_for("decisions", || host.decisions() > before + 12);
    assert_eq!((web.get().sets, db.get().sets), (0, 0));
    host.end();
    let log = host.log();
    assert!(log.matches("web: would set").count() <= 2, "{log}");
    assert!(log.contains("the host would have saved "), "{log}");
}

#[test]
fn a_daemon_that_refuses_targets_is_asked_again_later() {
    let (host, [web, db]) = running(SMALL, ["web", "db"], |web| web.refuses = true);
    wait_for("a refusal", || host.log().contains("no; ask another one"));
    wait_for("memory of the other VM", || db.usable() < 2 * GIB);
    assert_eq!(web.grant(), 4 * GIB);
    // Once for the lease, and once for the target.
    assert!(host.log().matches("no; ask another one").count() <= 2);
}

#[test]
fn leases_of_a_daemon_that_cannot_keep_them_are_renewed() {
    let (host, [web, _db]) = running(LEASE, ["web", "db"], |web| web.forgetful = true);
    web.wait_for_renewals(2);
    assert!(host.log().contains("unsaved; no"));
}

#[test]
fn reservations_are_admitted_or_refused_with_the_arithmetic() {
    let (host, [web]) = running(SMALL, ["web"], |_| {});
    wait_for("the VM", || {
        words(&host.ask(&["top"]).stdout).contains("4.0 GiB")
    });
    // 1.75 GiB are free, without what the VM does not use.
    let output = host.ask(&["reserve", "4GiB", "--seconds", "50"]);
    assert!(output.status.success(), "{}", words(&output.stderr));
    assert!(words(&output.stdout).contains("the memory is free for 50 s"));
    assert!(web.grant() < 2 * GIB);
    let output = host.ask(&["reserve", "2GiB"]);
    let error = words(&output.stderr);
    let sum = "256.0 MiB + floors of 512.0 MiB + reservations of 4.0 GiB + 2.0 GiB requested = 6.8 GiB, and the pool has 6.0 GiB";
    assert!(error.contains(sum), "{error}");
    assert!(host.ask(&["release", "1"]).status.success());
    assert!(!host.ask(&["release", "1"]).status.success());
    assert!(host.ask(&["reserve", "2GiB"]).status.success());
}

/// A daemon that hangs delays the first decision. The pool is not known before.
#[test]
fn a_reservation_right_after_the_start_waits_for_the_first_decision() {
    let mut host = Host::new(SMALL);
    let _hanging = UnixListener::bind(host.socket("hanging")).unwrap();
    host.run(&[]);
    let output = host.ask(&["reserve", "2GiB"]);
    assert!(output.status.success(), "{}", words(&output.stderr));
}

#[test]
fn a_reservation_ends_with_the_command_that_waits_for_it() {
    let mut host = Host::new(SMALL);
    host.add("web", &Fake::new(4 * GIB, 4 * GIB));
    host.run(&[]);
    let reserved = |text| words(&host.ask(&["top"]).stdout).contains(text);
    let mut command = Command::new(PROGRAM)
        .args(["reserve", "4GiB", "--seconds", "3600", "--socket"])
        .arg(host.path("run/manager.sock"))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the reservation", || reserved("reserved 4.0 GiB"));
    let id = command.id().try_into().unwrap();
    kill(Pid::from_raw(id), Signal::SIGINT).unwrap();
    assert!(!command.wait().unwrap().success());
    assert!(reserved("reserved 0 B"));
}

/// The VMs need 6.2 GiB of the 7.3 GiB that are divided: there is no room for one of them twice.
#[test]
fn a_vm_that_starts_uses_its_reservation() {
    for named in [true, false] {
        let mut host = Host::new("[host]\npool = '8GiB'\nreserve = '256MiB'\n");
        let guests = ["db", "web"].map(|name| {
            let guest = Fake::new(4 * GIB, 2 * GIB);
            host.add(name, &guest);
            guest
        });
        host.run(&[]);
        wait_for("the VMs", || {
            words(&host.ask(&["top"]).stdout).contains("4.0 GiB")
        });
        let name: &[&str] = if named { &["--vm", "new"] } else { &[] };
        let output = host.ask(&[&["reserve", "2GiB"], name].concat());
        assert!(output.status.success(), "{}", words(&output.stderr));
        host.add("new", &Fake::new(2 * GIB, 2 * GIB));
        wait_for("the VM", || {
            words(&host.ask(&["top"]).stdout).contains("reserved 0 B")
        });
        thread::sleep(Duration::from_secs(2));
        for guest in &guests {
            assert!(guest.grant() > 2 * GIB, "{}", host.log());
        }
    }
}

#[test]
fn a_reload_shows_what_changes_and_refuses_floors_that_do_not_fit() {
    let (mut host, [web, db]) = running(SMALL, ["web", "db"], |_| {});
    wait_for("the VMs", || {
        words(&host.ask(&["top"]).stdout).contains("4.0 GiB")
    });
    wait_for("memory that fits", || web.usable() + db.usable() <= 6 * GIB);
    host.configure(&format!("profile = 'density'\n{SMALL}"));
    host.signal(Signal::SIGHUP);
    wait_for("the profile", || {
        host.log()
            .contains("configuration: + profile = \"density\"")
    });
    host.configure(&format!("{SMALL}[vm.'*']\nfloor = '3GiB'\n"));
    host.signal(Signal::SIGHUP);
    wait_for("the refusal", || host.log().contains("floors of 6.0 GiB"));
    assert!(host.log().contains("the configuration stays as it was"));
    host.configure("flor = 1\n");
    host.signal(Signal::SIGHUP);
    wait_for("the mistake", || {
        host.log().contains("unknown field `flor`")
    });
    host.end();
}

#[test]
fn wrong_configurations_are_refused() {
    let host = Host::new("[vm.a]\nflor = '1GiB'\n");
    let output = Command::new(PROGRAM)
        .args(["check", "--config"])
        .arg(host.path("config.toml"))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let error = words(&output.stderr);
    assert!(
        error.contains("config.toml is not valid") && error.contains("unknown field `flor`"),
        "{error}"
    );
    let output = host.ask(&["top"]);
    assert!(words(&output.stderr).contains("is the manager running?"));
}
