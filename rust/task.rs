// SPDX-License-Identifier: GPL-2.0

//! Work that belongs to the state it works on.
//!
//! The `kernel` crate's work items own a reference to their data while they are queued, which cannot
//! be taken back when the work is cancelled. A [`Task`] is the other way round: it owns its state, and
//! dropping it ends the work first. Nothing leaks, and nothing runs on after its owner is gone.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use core::{
    ops::Deref,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    container_of,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        LockClassKey, //
    },
    time::{
        msecs_to_jiffies,
        Msecs, //
    },
    types::Opaque, //
};

/// What a [`Task`] does when it is scheduled.
pub(crate) trait Job: Send + Sync + Sized {
    /// Does the work once. Never runs twice at the same time for one task.
    ///
    /// Runs in process context, in a freezable workqueue: it must end soon, and must not wait for
    /// anything that only the device can bring about.
    fn run(task: &Task<Self>);
}

/// A workqueue of its own: freezable, so that nothing is started while the system suspends, and not
/// bound to a CPU, since handling millions of pages takes a while.
struct OwnedQueue(NonNull<bindings::workqueue_struct>);

impl OwnedQueue {
    fn new(name: &'static CStr) -> Result<Self> {
        // SAFETY: Both strings are static and null-terminated, and "%s" takes one string.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(
                c"%s".as_char_ptr(),
                bindings::wq_flags_WQ_FREEZABLE | bindings::wq_flags_WQ_UNBOUND,
                1,
                name.as_char_ptr(),
            )
        };

        NonNull::new(queue).map(Self).ok_or(ENOMEM)
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        // SAFETY: The workqueue is ours, and no work is left: `Task` ended its own before.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// State and the work that is done on it.
///
/// # Invariants
///
/// - `dwork` is initialised and is only ever queued on `queue`.
/// - While the work function runs, `self` has not been dropped.
#[pin_data(PinnedDrop)]
pub(crate) struct Task<S: Job> {
    #[pin]
    dwork: Opaque<bindings::delayed_work>,
    queue: OwnedQueue,
    stopped: Atomic<bool>,
    #[pin]
    state: S,
}

// SAFETY: Work may be queued from any thread, and the state is `Send` by the bound of `Job`.
unsafe impl<S: Job> Send for Task<S> {}

// SAFETY: The workqueue does its own locking, and the state is `Sync` by the bound of `Job`.
unsafe impl<S: Job> Sync for Task<S> {}

impl<S: Job> Task<S> {
    /// Returns an initialiser for a task named `name` that works on `state`; see [`new_task!`].
    pub(crate) fn new(
        state: impl PinInit<S, Error>,
        name: &'static CStr,
        work_key: Pin<&'static LockClassKey>,
        timer_key: Pin<&'static LockClassKey>,
    ) -> impl PinInit<Self, Error> {
        // INVARIANT: `dwork` is initialised here, and its function expects it inside of a `Task<S>`.
        try_pin_init!(Self {
            dwork <- Opaque::ffi_init(|slot: *mut bindings::delayed_work| {
                // SAFETY: `slot` is valid for writes; `run` is a work function for this type.
                unsafe {
                    bindings::init_work_with_key(
                        &raw mut (*slot).work,
                        Some(Self::run),
                        false,
                        name.as_char_ptr(),
                        work_key.as_ptr(),
                    )
                };
                // SAFETY: The timer is a delayed work's, so that `delayed_work_timer_fn` and the flag
                // are the right ones.
                unsafe {
                    bindings::timer_init_key(
                        &raw mut (*slot).timer,
                        Some(bindings::delayed_work_timer_fn),
                        bindings::TIMER_IRQSAFE,
                        name.as_char_ptr(),
                        timer_key.as_ptr(),
                    )
                };
            }),
            queue: OwnedQueue::new(name)?,
            stopped: Atomic::new(false),
            state <- state,
        })
    }

    extern "C" fn run(work: *mut bindings::work_struct) {
        // SAFETY: By the type invariants the work item is `dwork.work` of a live `Task<S>`.
        let task = unsafe {
            let dwork = container_of!(work, bindings::delayed_work, work);
            &*container_of!(Opaque::cast_from(dwork), Self, dwork)
        };

        S::run(task);
    }

    /// Runs the task as soon as possible, and once more if it is running now. Callable from any context.
    pub(crate) fn schedule(&self) {
        // `mod_` and not `queue_`: a run that was put off is to begin at once.
        //
        // SAFETY: By the type invariants `dwork` is initialised; the workqueue lives as long as `self`.
        unsafe {
            bindings::mod_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                self.queue.0.as_ptr(),
                self.dwork.get(),
                0,
            )
        };
    }

    /// Runs the task in `delay` milliseconds, unless it is scheduled for some time already.
    pub(crate) fn schedule_in(&self, delay: Msecs) {
        // SAFETY: By the type invariants `dwork` is initialised; the workqueue lives as long as `self`.
        unsafe {
            bindings::queue_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                self.queue.0.as_ptr(),
                self.dwork.get(),
                msecs_to_jiffies(delay),
            )
        };
    }

    /// Waits until the task does not run and keeps it from running until [`resume`](Self::resume).
    ///
    /// May sleep. To be called from where a task is stopped and resumed one after the other, as in the
    /// callbacks of a bus.
    pub(crate) fn stop(&self) {
        if !self.stopped.xchg(true, Relaxed) {
            // SAFETY: By the type invariants `dwork` is initialised.
            unsafe { bindings::disable_delayed_work_sync(self.dwork.get()) };
        }
    }

    /// Takes [`stop`](Self::stop) back.
    pub(crate) fn resume(&self) {
        if self.stopped.xchg(false, Relaxed) {
            // SAFETY: By the type invariants `dwork` is initialised, and `stop` has disabled it.
            unsafe { bindings::enable_delayed_work(self.dwork.get()) };
        }
    }
}

impl<S: Job> Deref for Task<S> {
    type Target = S;

    fn deref(&self) -> &S {
        &self.state
    }
}

#[pinned_drop]
impl<S: Job> PinnedDrop for Task<S> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: By the type invariants `dwork` is initialised. When this returns the work function
        // does not run and cannot be queued again, so that the fields may be dropped.
        unsafe { bindings::disable_delayed_work_sync(self.dwork.get()) };
    }
}

/// Creates a [`Task`] initialiser with lock classes of its own.
macro_rules! new_task {
    ($state:expr, $name:expr $(,)?) => {
        $crate::rust::task::Task::new(
            $state,
            $name,
            ::kernel::static_lock_class!(),
            ::kernel::static_lock_class!(),
        )
    };
}
pub(crate) use new_task;
