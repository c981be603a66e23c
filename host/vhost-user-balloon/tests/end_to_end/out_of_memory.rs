// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process of the daemon that the kernel kills at the memory limit of its cgroup.

use std::os::unix::process::ExitStatusExt;

use super::supervision::{Service, wait_for_info};
use super::*;

/// The files of a memory cgroup: its limit, and the value for none.
const VERSIONS: [(&str, &str); 2] = [("memory.limit_in_bytes", "-1"), ("memory.max", "max")];

/// Enough for the daemon, and not for the memory that the guest takes back.
const LIMIT: u64 = 12 << 20;

/// The balloon, in pages. One message lists them.
const PAGES: u32 = 4096;

/// The guest's memory in bytes.
const LARGE: u64 = 32 << 20;

/// A memory cgroup, which is removed when this is dropped.
struct Cgroup {
    path: PathBuf,
    version: (&'static str, &'static str),
}

impl Cgroup {
    /// None if the machine has no memory cgroup, or the caller may not make one.
    fn new() -> Option<Self> {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let roots = mounts.lines().filter_map(|mount| {
            let mut words = mount.split(' ').skip(1);
            let path = words.next()?;
            words.next()?.starts_with("cgroup").then_some(path)
        });
        roots.into_iter().find_map(|root| {
            let path = Path::new(root).join(format!("balloon-test-{}", std::process::id()));
            fs::create_dir(&path).ok()?;
            let version = VERSIONS
                .into_iter()
                .find(|(file, _)| path.join(file).exists());
            if version.is_none() {
                fs::remove_dir(&path).unwrap();
            }
            Some(Self {
                path,
                version: version?,
            })
        })
    }

    /// Puts a process into it, and those that it starts later.
    fn add(&self, process: Pid) {
        fs::write(self.path.join("cgroup.procs"), process.to_string()).unwrap();
    }

    fn limit(&self, bytes: Option<u64>) {
        let (file, none) = self.version;
        let value = bytes.map_or(none.to_owned(), |bytes| bytes.to_string());
        fs::write(self.path.join(file), &value).unwrap_or_else(|error| panic!("{value}: {error}"));
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that has ended may still be in it.
        let start = Instant::now();
        while fs::remove_dir(&self.path).is_err() && start.elapsed() < PATIENCE {
            thread::sleep(Duration::from_millis(5));
        }
    }
}

fn score(process: Pid) -> i32 {
    let file = format!("/proc/{process}/oom_score_adj");
    fs::read_to_string(file).unwrap().trim().parse().unwrap()
}

/// A guest whose balloon has [`PAGES`] pages, and the events of its deflate queue.
fn with_balloon(directory: &Path) -> (Vmm, [EventFd; 2]) {
    let mut vmm = Vmm::connect(directory);
    vmm.memory.set_len(LARGE).unwrap();
    vmm.start_with(0, LARGE);
    let events = [EventFd::new(0).unwrap(), EventFd::new(0).unwrap()];
    start_queue(&mut vmm.front, 1, 0, REQUESTS, &events[0], &events[1]);
    let pages = (0x1000..0x1000 + PAGES).flat_map(u32::to_le_bytes);
    vmm.send(&pages.collect::<Vec<_>>());
    (vmm, events)
}

/// Sends the message of [`with_balloon`] to the deflate queue.
fn deflate(vmm: &Vmm, kick: &EventFd) {
    vmm.store(REQUESTS, &MESSAGE.to_le_bytes());
    vmm.store(REQUESTS + 8, &(4 * PAGES).to_le_bytes());
    vmm.store(REQUESTS + AVAIL - DESCRIPTORS + 2, &[1, 0]);
    kick.write(1).unwrap();
}

fn is_deflated(vmm: &Vmm) -> bool {
    vmm.byte(REQUESTS + USED - DESCRIPTORS + 2) == 1
}

#[test]
fn an_oom_kill_of_either_process_leaves_the_vm_its_balloon() {
    for end_of_supervisor in [false, true] {
        let Some(cgroup) = Cgroup::new() else {
            return;
        };
        let service = Service::new();
        let directory = service.directory.path();
        // With this the daemon itself allocates what the guest takes back.
        let mut daemon = service.start(&["--prefault"]);
        let (mut vmm, [kick, _call]) = with_balloon(directory);
        let mut config = vmm.config();
        config[4..8].copy_from_slice(&PAGES.to_le_bytes());
        vmm.write_config(&config);
        set(directory, u64::from(PAGES) << 12);
        let mut client = Client::connect(&directory.join("control")).unwrap();
        client
            .call(&Request::SetStatsInterval { seconds: 7 })
            .unwrap();

        // Left to itself, the kernel chooses the worker.
        let worker = daemon.worker();
        assert!(score(worker) > score(daemon.pid()));
        if end_of_supervisor {
            fs::write(format!("/proc/{}/oom_score_adj", daemon.pid()), "1000").unwrap();
        }
        cgroup.add(daemon.pid());
        cgroup.add(worker);
        cgroup.limit(Some(LIMIT));
        deflate(&vmm, &kick);
        if end_of_supervisor {
            assert_eq!(
                daemon.0.wait().unwrap().signal(),
                Some(Signal::SIGKILL as i32)
            );
            cgroup.limit(None);
            daemon = service.start(&["--prefault"]);
        } else {
            // The kernel kills each worker at the same message.
            let mut worker = worker;
            for _ in 0..4 {
                daemon.wait_for_another(worker);
                worker = daemon.worker();
            }
            assert!(!is_deflated(&vmm));
            cgroup.limit(None);
        }
        wait_for("the deflated pages", || is_deflated(&vmm));
        wait_for_info("the driver", directory, |now| now.guest.driver);
        let now = info(directory);
        let size = u64::from(PAGES) << 12;
        assert_eq!((now.target, now.size, now.stats_interval), (size, size, 7));
        assert_eq!(now.counters.refused.len(), 0, "{:?}", now.counters.refused);
        // The target is new for the guest.
        assert_eq!(vmm.config()[..8], [PAGES.to_le_bytes(); 2].concat());
        service.end(&mut daemon, Signal::SIGTERM);
    }
}
