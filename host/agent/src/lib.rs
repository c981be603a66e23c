// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the host and the agent in the guest say to each other: one JSON object a line, over a
//! virtio-serial port. The agent works on each request in a thread of its own, so that answers
//! may come in another order than the requests; the id says what an answer belongs to.

use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port that the agent listens on.
pub const PORT: &str = "org.virtio-balloon-rs.agent";

/// What the host asks for.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Comes back in the answer.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// What the guest answers.
#[derive(Debug, Serialize, Deserialize)]
pub struct Response {
    /// The id of the request.
    pub id: u64,
    /// What came of it, or one sentence about why it failed.
    pub result: Result<Reply, String>,
}

/// Something to do in the guest.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Does nothing; the answer says that the guest is up.
    Ping,
    /// Runs a program to its end; answered with [`Reply::Output`].
    Exec {
        /// The program and its arguments.
        argv: Vec<String>,
        /// How long it may take before it is killed, in milliseconds, if there is a limit.
        timeout_ms: Option<u64>,
    },
    /// Reads a file; answered with [`Reply::Text`].
    ReadFile {
        /// Where the file is.
        path: String,
    },
    /// Writes a file in one write, as files under /sys want it.
    WriteFile {
        /// Where the file is.
        path: String,
        /// What it is to hold.
        contents: String,
    },
    /// Writes a file, and waits until the kernel says that an attribute in sysfs has changed; answered with
    /// [`Reply::Text`], what it says then.
    Watch {
        /// Where the attribute is.
        attribute: String,
        /// Where the file is that is written.
        path: String,
        /// What it is to hold.
        contents: String,
        /// How long the change may take, in milliseconds.
        timeout_ms: u64,
    },
    /// Counts the pages with numbers from one to below another one that have all of some flags; answered with
    /// [`Reply::Pages`].
    CountPages {
        /// The first page's number.
        start: u64,
        /// The number after the last page's; memory may end before.
        end: u64,
        /// The flags.
        flags: Vec<PageFlag>,
    },
    /// Starts a load on the guest's memory; answered with [`Reply::Load`].
    StartLoad(Load),
    /// How a load fares; answered with [`Reply::Status`].
    LoadStatus(LoadId),
    /// Asks a load to stop; answered with [`Reply::Status`] when it has ended.
    StopLoad(LoadId),
    /// Has the guest sleep; answered when it goes on. Until then nothing may be asked for.
    Sleep {
        /// The word for /sys/power/state.
        state: String,
    },
    /// Makes a kernel ready for [`End::Kexec`], or for a panic.
    LoadKernel {
        /// When it is to take over.
        when: TakeOver,
        /// The file that has its image.
        kernel: String,
        /// The file that has its initramfs.
        initramfs: String,
        /// Its command line.
        command_line: String,
    },
    /// Ends the guest's kernel; there is no answer.
    End(End),
}

/// When a kernel that was loaded takes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TakeOver {
    /// At the end of the present one.
    End,
    /// When the present one panics.
    Panic,
}

/// How a kernel ends.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum End {
    /// The machine is switched off.
    PowerOff,
    /// The machine is reset.
    Reboot,
    /// The kernel that has been loaded takes over, and the machine goes on.
    Kexec,
}

/// The good answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// There is nothing more to say.
    Done,
    /// What a program left behind.
    Output(Output),
    /// The contents of a file.
    Text(String),
    /// A number of pages.
    Pages(u64),
    /// A load runs.
    Load(LoadId),
    /// How a load fares.
    Status(LoadStatus),
}

/// What a program left behind.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// What it wrote to its standard output.
    pub stdout: String,
    /// What it wrote to its standard error.
    pub stderr: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It returned this status.
    Status(i32),
    /// This signal killed it.
    Signal(i32),
    /// It took longer than it may.
    TimedOut,
}

/// Names a load: its process id in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LoadId(pub u32);

/// A process that does something to the guest's memory.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Load {
    /// Fills anonymous memory with a pattern and then, until it is stopped, verifies it and
    /// writes the next one. Fails at the first word that is not what was written.
    Hold {
        /// How much memory, in MiB.
        mib: usize,
        /// How many threads share the work.
        threads: usize,
    },
    /// Touches memory, frees it and ends.
    Touch {
        /// How much memory, in MiB.
        mib: usize,
    },
    /// Takes more and more memory until it is stopped or killed.
    Hog {
        /// Where it stops to grow, in MiB.
        mib: usize,
    },
    /// Takes memory, gives back one of each two pages and keeps the other until it is stopped.
    Fragment {
        /// How much memory is taken at first, in MiB.
        mib: usize,
    },
    /// Copies memory until it is stopped. A pass is a MiB.
    Copy {
        /// How much memory there is, in MiB: half of it is copied to the other half.
        mib: usize,
        /// How many threads share the work.
        threads: usize,
    },
    /// Maps the first disk, and reads from each page over and over until it is stopped.
    Map {
        /// How much of it, in MiB.
        mib: usize,
    },
    /// Computes until it is stopped, with hardly any memory. A pass is always as much work.
    Compute {
        /// How many threads do it, each for itself.
        threads: usize,
    },
    /// Sleeps over and over until it is stopped, and says how late it was at most.
    Tick {
        /// For how long it sleeps each time.
        microseconds: u64,
    },
    /// Takes, verifies and gives back memory of all kinds until it is stopped. Fails at the first word that is not what
    /// was written. A pass is a piece that was verified.
    Churn {
        /// How much memory it has at most, in MiB.
        mib: usize,
        /// How many threads share the work.
        threads: usize,
        /// What makes one run differ from another.
        seed: u64,
    },
}

/// What the kernel says of a page, by its bit in /proc/kpageflags.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum PageFlag {
    /// It is free.
    Buddy = 10,
    /// A process has mapped it.
    Mapped = 11,
    /// It has a memory error.
    MemoryError = 19,
    /// It is logically offline, as a balloon's are.
    Offline = 23,
}

/// How a load fares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadStatus {
    /// What it said last.
    pub progress: Progress,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
    /// What it wrote to its standard error: the reason of a failure.
    pub stderr: String,
}

/// What a load says while it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// How much memory it holds, in MiB.
    pub mib: usize,
    /// How often it has been through all of its memory.
    pub passes: u64,
    /// By how much it was late at most, in microseconds, if it is to be on time.
    pub stall_us: u64,
}
