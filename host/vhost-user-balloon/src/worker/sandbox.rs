// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Confines the worker, which reads data of the guest, to the system calls that it needs.
//!
//! The kernel filters the system calls of this thread and of all threads that it starts later (seccomp). A call
//! that is not listed here ends the worker, with the call's name in the log, and the supervisor starts another
//! one.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::process;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use log::warn;
use nix::libc::{
    AF_UNIX, CLONE_NEWCGROUP, CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, CLONE_NEWUSER,
    CLONE_NEWUTS, CLONE_THREAD, ENOSYS, F_DUPFD_CLOEXEC, F_GETFD, F_GETFL, F_SETFD, F_SETFL,
    FIONBIO, PR_SET_NAME, PR_SET_VMA, PROT_EXEC, SIGSYS, SOL_SOCKET, c_int, siginfo_t,
};
use nix::unistd::write;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};
use syscalls::Sysno;
use vmm_sys_util::signal::register_signal_handler;

/// The offset of the system call's number in a `siginfo_t`, in bytes, on 64-bit systems.
const SI_SYSCALL: u64 = 24;

/// The memory of this process, from which the handler reads that number.
static MEMORY: OnceLock<File> = OnceLock::new();

/// The calls that are allowed whatever their arguments.
const ALLOWED: &[Sysno] = &[
    // Sockets: the front end, clients, the supervisor.
    Sysno::accept4,
    Sysno::recvfrom,
    Sysno::recvmsg,
    Sysno::sendmsg,
    Sysno::sendto,
    Sysno::shutdown,
    // Waiting: queues, clients, timers, locks.
    Sysno::clock_nanosleep,
    Sysno::epoll_create1,
    Sysno::epoll_ctl,
    Sysno::epoll_pwait,
    Sysno::eventfd2,
    Sysno::futex,
    Sysno::ppoll,
    Sysno::restart_syscall,
    Sysno::sched_yield,
    Sysno::timerfd_create,
    Sysno::timerfd_settime,
    // Files: the guest's memory, the balloon's state, the state file, /proc, the log.
    Sysno::close,
    Sysno::fallocate,
    Sysno::fstat,
    Sysno::fstatfs,
    Sysno::fsync,
    Sysno::ftruncate,
    Sysno::getdents64,
    Sysno::lseek,
    Sysno::openat,
    Sysno::pread64,
    Sysno::pwrite64,
    Sysno::read,
    Sysno::readlinkat,
    Sysno::readv,
    Sysno::renameat,
    Sysno::renameat2,
    Sysno::statx,
    Sysno::unlinkat,
    Sysno::write,
    Sysno::writev,
    // Memory: the heap, stacks, the guest's memory.
    Sysno::brk,
    Sysno::madvise,
    Sysno::mremap,
    Sysno::munmap,
    // Threads and signals, by the C library.
    Sysno::exit,
    Sysno::exit_group,
    Sysno::getpid,
    Sysno::gettid,
    Sysno::rseq,
    Sysno::rt_sigaction,
    Sysno::rt_sigprocmask,
    Sysno::rt_sigreturn,
    Sysno::sched_getaffinity,
    Sysno::set_robust_list,
    Sysno::sigaltstack,
    // Clocks without the vDSO, and keys of hash tables.
    Sysno::clock_gettime,
    Sysno::getrandom,
];

/// Calls that exist on some architectures only, or under another name.
#[cfg(target_arch = "x86_64")]
const OTHERS: &[Sysno] = &[
    Sysno::epoll_wait,
    Sysno::newfstatat,
    Sysno::poll,
    Sysno::readlink,
    Sysno::rename,
    Sysno::unlink,
];
#[cfg(target_arch = "aarch64")]
const OTHERS: &[Sysno] = &[Sysno::fstatat];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const OTHERS: &[Sysno] = &[];

/// A new thread has the first of these flags, and none of the others, which make a process or a namespace.
const CLONE_FLAGS: &[c_int] = &[
    CLONE_THREAD,
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
];

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// A rule for an argument: its number, a comparison and a value.
fn rule(argument: u8, compare: SeccompCmpOp, value: c_int) -> Result<SeccompRule> {
    let value = value.try_into()?;
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, compare, value)?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// Rules for an argument that has one of these values.
fn one_of(argument: u8, values: &[c_int]) -> Result<Vec<SeccompRule>> {
    let rule = |&value: &c_int| rule(argument, SeccompCmpOp::Eq, value);
    values.iter().map(rule).collect()
}

/// Rules for an argument in which, of these flags, exactly those in `value` are set.
fn flags(argument: u8, flags: &[c_int], value: c_int) -> Result<Vec<SeccompRule>> {
    let mask = flags.iter().fold(0, |mask, flag| mask | flag).try_into()?;
    Ok(vec![rule(argument, SeccompCmpOp::MaskedEq(mask), value)?])
}

/// The calls that a worker may make.
fn allowed() -> Result<Rules> {
    let by_argument = [
        (Sysno::clone, flags(0, CLONE_FLAGS, CLONE_THREAD)?),
        // The first filter refuses it.
        (Sysno::clone3, vec![]),
        (
            Sysno::fcntl,
            one_of(1, &[F_DUPFD_CLOEXEC, F_GETFD, F_SETFD, F_GETFL, F_SETFL])?,
        ),
        (Sysno::getsockopt, one_of(1, &[SOL_SOCKET])?),
        (Sysno::ioctl, one_of(1, &[FIONBIO.try_into()?])?),
        // No code that is not in the program.
        (Sysno::mmap, flags(2, &[PROT_EXEC], 0)?),
        (Sysno::mprotect, flags(2, &[PROT_EXEC], 0)?),
        (Sysno::prctl, one_of(0, &[PR_SET_NAME, PR_SET_VMA])?),
        (Sysno::setsockopt, one_of(1, &[SOL_SOCKET])?),
        (Sysno::socketpair, one_of(0, &[AF_UNIX])?),
        // A panic ends the worker.
        (Sysno::tgkill, one_of(0, &[process::id().try_into()?])?),
    ];
    let always = ALLOWED.iter().chain(OTHERS).map(|&call| (call, vec![]));
    let rules = always.chain(by_argument);
    Ok(rules
        .map(|(call, rules)| (i64::from(call.id()), rules))
        .collect())
}

fn filter(rules: Rules, mismatch: SeccompAction, matching: SeccompAction) -> Result<BpfProgram> {
    Ok(SeccompFilter::new(rules, mismatch, matching, ARCH.try_into()?)?.try_into()?)
}

/// Opens the process memory, from which the handler reads the number of a forbidden call. Call this before
/// [`set_dumpable`], after which a process cannot open its own memory.
///
/// [`set_dumpable`]: nix::sys::prctl::set_dumpable
pub fn prepare() {
    if let Ok(memory) = File::open("/proc/self/mem") {
        // A process is one worker.
        let _ = MEMORY.set(memory);
    }
}

/// Confines this thread, and all threads that it starts. Logs a warning if the kernel does not
/// support that.
pub fn enter() {
    if let Err(error) = filter_system_calls() {
        warn!("the worker's system calls are not filtered: {error:#}");
    }
}

fn filter_system_calls() -> Result<()> {
    // A filter cannot see the flags of clone3(), and the C library has another call for a system without it.
    let missing = [(i64::from(Sysno::clone3.id()), vec![])].into();
    let enosys = SeccompAction::Errno(ENOSYS.try_into()?);
    let missing = filter(missing, SeccompAction::Allow, enosys)?;
    let allowed = filter(allowed()?, SeccompAction::Trap, SeccompAction::Allow)?;
    register_signal_handler(SIGSYS, on_violation).context("SIGSYS")?;
    apply_filter(&missing)?;
    Ok(apply_filter(&allowed)?)
}

/// Ends the process after a forbidden call. This is a signal handler, so it takes no lock and allocates nothing.
extern "C" fn on_violation(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    let mut number = [0; 4];
    let known = MEMORY.get().is_some_and(|memory| {
        let place = info.addr() as u64 + SI_SYSCALL;
        memory.read_exact_at(&mut number, place).is_ok()
    });
    let number = u32::from_ne_bytes(number);
    let name = usize::try_from(number)
        .ok()
        .filter(|_| known)
        .and_then(Sysno::new)
        .map_or("?", |call| call.name());
    let mut line = [0; 256];
    let mut rest = &mut line[..];
    let _ = writeln!(
        rest,
        "[ERROR vhost_user_balloon::worker::sandbox] the sandbox does not allow the system call {number} ({name}), and ends \
         the worker; report this as a bug, and start the daemon with --sandbox none until it is repaired"
    );
    let free = rest.len();
    let _ = write(io::stderr().as_fd(), &line[..line.len() - free]);
    process::abort();
}
