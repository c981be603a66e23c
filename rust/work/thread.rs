// SPDX-License-Identifier: GPL-2.0

//! Threads that may outlive their owner.
//!
//! A work item must end before its owner is dropped. A [`Thread`] is for work of unbounded duration
//! that only the kernel can interrupt: its owner sends `SIGKILL` and does not wait.
//!
//! The thread holds a reference to this module while it runs code of the module. Meanwhile
//! unloading the module fails with `EWOULDBLOCK`, at once.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use crate::rust::{
    bindings,
    this_module::Reference,
    work::{
        signal::{
            self,
            Signal, //
        },
        task::Waker, //
    }, //
};

use core::ptr::NonNull;
use kernel::{
    error::from_err_ptr,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{
            Atomic,
            Relaxed, //
        },
        Arc,
        Mutex,
        SetOnce, //
    }, //
};

/// A thread that executes one function, and schedules a task at the end.
///
/// Dropping this kills the thread, unless it is [detached](Self::detach), and waits for it only if
/// its function has ended.
///
/// # Invariants
///
/// `thread` is a kernel thread, with a reference that is released on drop. It was started with
/// `shared`.
pub(crate) struct Thread {
    thread: NonNull<bindings::task_struct>,
    shared: Arc<Shared>,
    is_detached: bool,
}

// SAFETY: A thread may be killed, and its reference released, from any thread.
unsafe impl Send for Thread {}

// SAFETY: A shared reference gives access to `shared` only, which is `Sync`.
unsafe impl Sync for Thread {}

/// The shared state of the thread and its owner.
#[pin_data]
struct Shared {
    outcome: SetOnce<Result>,
    /// Set before the signal is sent, since a thread that does not accept the signal yet loses it.
    is_killed: Atomic<bool>,
    /// The task to schedule, until the owner is dropped.
    #[pin]
    waker: Mutex<Option<Waker>>,
}

/// The argument of a new thread.
struct Start<F> {
    work: F,
    reference: Reference,
    shared: Arc<Shared>,
}

impl Thread {
    /// Starts a thread called `name` that calls `work`, and then schedules the task of `waker` if
    /// there is one. If the thread cannot be started, `work` is dropped.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `ENODEV` if the module is being unloaded.
    pub(crate) fn start<F>(name: &'static CStr, waker: Option<Waker>, work: F) -> Result<Self>
    where
        F: FnOnce() -> Result + Send + 'static,
    {
        let shared = Arc::pin_init(
            pin_init!(Shared {
                outcome: SetOnce::new(),
                is_killed: Atomic::new(false),
                waker <- new_mutex!(waker, "Thread::waker"),
            }),
            GFP_KERNEL,
        )?;
        let start = KBox::new(
            Start {
                work,
                reference: Reference::take()?,
                shared: shared.clone(),
            },
            GFP_KERNEL,
        )?;
        let start = KBox::into_raw(start);

        // SAFETY: Both strings are null-terminated, and "%s" takes one string. `start` is valid
        // until the callback has taken it.
        let thread = from_err_ptr(unsafe {
            bindings::kthread_create_on_node(
                Some(Self::run::<F>),
                start.cast(),
                bindings::NUMA_NO_NODE,
                c"%s".as_char_ptr(),
                name.as_char_ptr(),
            )
        })
        .inspect_err(|_| {
            // SAFETY: It comes from `into_raw`, and no thread was started that would own it.
            drop(unsafe { KBox::from_raw(start) });
        })?;

        // SAFETY: The thread was just created, and does not run yet.
        unsafe {
            bindings::get_task_struct(thread);
            bindings::wake_up_process(thread);
        }
        // INVARIANT: It is a thread, with a reference to it.
        Ok(Self {
            thread: NonNull::new(thread).ok_or(ENOMEM)?,
            shared,
            is_detached: false,
        })
    }

    /// Leaves the thread alone. It ends by itself.
    pub(crate) fn detach(mut self) {
        self.is_detached = true;
    }

    /// Returns the result of the work, if it has ended.
    pub(crate) fn outcome(&self) -> Option<Result> {
        self.shared.outcome.copy()
    }

    /// # Safety
    ///
    /// `start` must be a `KBox<Start<F>>` that was made a raw pointer. The caller passes on its
    /// ownership.
    unsafe extern "C" fn run<F: FnOnce() -> Result>(start: *mut c_void) -> c_int {
        signal::allow(Signal::Kill);
        // SAFETY: By the requirements of this function.
        let reference = Self::work(unsafe { KBox::<Start<F>>::from_raw(start.cast()) });

        // SAFETY: The thread holds no other values.
        unsafe { reference.release_and_exit() }
    }

    /// Calls the function, and stores its result. Returns the thread's reference to the module.
    fn work<F: FnOnce() -> Result>(start: KBox<Start<F>>) -> Reference {
        let Start {
            work,
            reference,
            shared,
        } = KBox::into_inner(start);
        // In both cases the values that the function owns are dropped before the task is scheduled.
        let outcome = if shared.is_killed.load(Relaxed) {
            drop(work);
            Err(EINTR)
        } else {
            work()
        };

        shared.outcome.populate(outcome);
        if let Some(waker) = &*shared.waker.lock() {
            waker.schedule();
        };
        reference
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // The owner of the task may be dropped as soon as this returns.
        drop(self.shared.waker.lock().take());

        if self.outcome().is_some() {
            // A program that sees the end may unload the module next.
            //
            // SAFETY: By the type invariants it is a thread of the kernel's, and the reference is
            // ours.
            unsafe { bindings::kthread_stop_put(self.thread.as_ptr()) };
            return;
        }
        if !self.is_detached {
            self.shared.is_killed.store(true, Relaxed);
            // SAFETY: As above.
            unsafe { bindings::send_sig(bindings::SIGKILL as c_int, self.thread.as_ptr(), 1) };
        }
        // SAFETY: As above.
        unsafe { bindings::put_task_struct(self.thread.as_ptr()) };
    }
}
