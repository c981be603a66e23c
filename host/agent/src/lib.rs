// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The protocol between the host and the agent in the guest: one JSON object a line, over a
//! virtio-serial port. The agent handles each request in a thread of its own, so answers may come
//! in another order than requests. The id assigns an answer to its request.

use serde::{Deserialize, Serialize};

/// The name of the virtio-serial port that the agent listens on.
pub const PORT: &str = "org.virtio-balloon-rs.agent";

/// A request of the host.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// The answer has the same id.
    pub id: u64,
    /// What to do.
    pub command: Command,
}

/// An answer of the guest.
#[derive(Debug, Serialize, Deserialize)]
pub struct Response {
    /// The id of the request.
    pub id: u64,
    /// The result, or a sentence that gives the error.
    pub result: Result<Reply, String>,
}

/// A command for the guest.
#[derive(Debug, Serialize, Deserialize)]
pub enum Command {
    /// Does nothing. The answer shows that the guest is up.
    Ping,
    /// Runs a program to its end; answered with [`Reply::Output`].
    Exec {
        /// The program and its arguments.
        argv: Vec<String>,
        /// The time in milliseconds after which the agent kills it, if there is a limit.
        timeout_ms: Option<u64>,
    },
    /// Reads a file; answered with [`Reply::Text`].
    ReadFile {
        /// Where the file is.
        path: String,
    },
    /// Writes a file with one call, as files under /sys require.
    WriteFile {
        /// Where the file is.
        path: String,
        /// The new content.
        contents: String,
    },
    /// Writes a file, and waits until the kernel announces a change of an attribute in sysfs; answered with
    /// [`Reply::Text`], the attribute's new value.
    Watch {
        /// Where the attribute is.
        attribute: String,
        /// Where the file is that is written.
        path: String,
        /// The new content.
        contents: String,
        /// How long the change may take, in milliseconds.
        timeout_ms: u64,
    },
    /// Counts the pages in a range of page frame numbers that have all of some flags; answered with
    /// [`Reply::Pages`].
    CountPages {
        /// The first page's number.
        start: u64,
        /// The end of the range; memory may end before it.
        end: u64,
        /// The flags.
        flags: Vec<PageFlag>,
    },
    /// Starts a load on the guest's memory; answered with [`Reply::Load`].
    StartLoad(Load),
    /// Reads the status of a load; answered with [`Reply::Status`].
    LoadStatus(LoadId),
    /// Asks a load to stop; answered with [`Reply::Status`] when it has ended.
    StopLoad(LoadId),
    /// Suspends the guest; answered after resume. The host must not send a request before that.
    Sleep {
        /// The value for /sys/power/state.
        state: String,
    },
    /// Loads a kernel for [`End::Kexec`], or for a panic.
    LoadKernel {
        /// When the kernel starts.
        when: TakeOver,
        /// The file with its image.
        kernel: String,
        /// The file with its initramfs.
        initramfs: String,
        /// Its command line.
        command_line: String,
    },
    /// Ends the guest's kernel; there is no answer.
    End(End),
}

/// When a loaded kernel starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TakeOver {
    /// At the end of the present one.
    End,
    /// When the present one panics.
    Panic,
}

/// A way to end a kernel.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum End {
    /// Power-off.
    PowerOff,
    /// The machine is reset.
    Reboot,
    /// Starts the loaded kernel, without a reset.
    Kexec,
}

/// The answers without an error.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// The command is done, and has no result.
    Done,
    /// The result of a program.
    Output(Output),
    /// The contents of a file.
    Text(String),
    /// A number of pages.
    Pages(u64),
    /// The load is running.
    Load(LoadId),
    /// How a load fares.
    Status(LoadStatus),
}

/// The result of a program.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// It returned this status.
    Status(i32),
    /// This signal killed it.
    Signal(i32),
    /// The agent killed it after the timeout.
    TimedOut,
}

/// The name of a load: its process id in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LoadId(pub u32);

/// A process that uses the guest's memory.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Load {
    /// Fills anonymous memory with a pattern and then, until it is stopped, verifies it and writes
    /// the next one. Fails at the first corrupted word.
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
    /// Allocates more and more memory until it is stopped or killed.
    Hog {
        /// The maximum, in MiB.
        mib: usize,
    },
    /// Allocates memory, frees every other page and keeps the rest until it is stopped.
    Fragment {
        /// How much memory it allocates at first, in MiB.
        mib: usize,
    },
    /// Copies memory until it is stopped. A pass is a MiB.
    Copy {
        /// How much memory there is, in MiB: half of it is copied to the other half.
        mib: usize,
        /// How many threads share the work.
        threads: usize,
    },
    /// Maps the first disk, and reads from each page repeatedly until it is stopped.
    Map {
        /// How much of it, in MiB.
        mib: usize,
    },
    /// Keeps the kernel from migrating a page, which it also locks into memory, until it is stopped.
    Pin,
    /// Computes until it is stopped, with hardly any memory. Each pass is the same amount of work.
    Compute {
        /// How many threads do it, each for itself.
        threads: usize,
    },
    /// Sleeps repeatedly until it is stopped, and reports how late it woke up at most.
    Tick {
        /// For how long it sleeps each time.
        microseconds: u64,
    },
    /// Allocates, verifies and frees memory of all kinds until it is stopped. Fails at the first corrupted word. A pass
    /// is a verified piece.
    Churn {
        /// How much memory it has at most, in MiB.
        mib: usize,
        /// How many threads share the work.
        threads: usize,
        /// The seed of the run.
        seed: u64,
    },
}

/// A flag of a page, by its bit in /proc/kpageflags.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum PageFlag {
    /// It is free.
    Buddy = 10,
    /// A process has mapped it.
    Mapped = 11,
    /// It has a memory error.
    MemoryError = 19,
    /// It is logically offline, as a balloon's pages are.
    Offline = 23,
    /// A process has locked it into memory.
    Locked = 33,
}

/// How a load fares.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct LoadStatus {
    /// Its last report.
    pub progress: Progress,
    /// How it ended, if it has.
    pub exit: Option<Exit>,
    /// Its standard error: the reason of a failure.
    pub stderr: String,
}

/// A report of a running load.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// How much memory it holds, in MiB.
    pub mib: usize,
    /// The number of passes through all of its memory.
    pub passes: u64,
    /// How late it woke up at most, in microseconds, if it measures that.
    pub stall_us: u64,
}
