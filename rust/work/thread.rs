// SPDX-License-Identifier: GPL-2.0

//! Threads that may outlive their owner.
//!
//! A work item has to end before its owner can go. A [`Thread`] is for work that may take any time
//! and that only the kernel can cut short: its owner sends `SIGKILL` and does not wait.
//!
//! The thread holds a reference to this module until it runs none of the module's code. Meanwhile
//! unloading the module fails with `EWOULDBLOCK`, at once.
//!
//! C header: [`include/linux/kthread.h`](srctree/include/linux/kthread.h)

use crate::rust::{
    bindings,
    work::task::Waker, //
};

use core::ptr::NonNull;
use kernel::{
    container_of,
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
    },
    types::Opaque, //
};

/// A thread that does one piece of work, and schedules a task when it has ended.
///
/// Dropping this kills the thread, and waits for it only if its work has ended.
///
/// # Invariants
///
/// `thread` is a thread of the kernel's, with a reference that is released on drop. It was started
/// with `shared`.
pub(crate) struct Thread {
    thread: NonNull<bindings::task_struct>,
    shared: Arc<Shared>,
}

// SAFETY: A thread may be killed, and its reference released, from any thread.
unsafe impl Send for Thread {}

// SAFETY: A shared reference gives access to `shared` only, which is `Sync`.
unsafe impl Sync for Thread {}

/// What the thread and its owner have in common.
#[pin_data]
struct Shared {
    outcome: SetOnce<Result>,
    /// Set before the signal is sent, which is lost on a thread that does not accept it yet.
    is_killed: Atomic<bool>,
    /// The task to be scheduled, until the owner has left.
    #[pin]
    waker: Mutex<Option<Waker>>,
}

/// What a thread starts with.
///
/// # Invariants
///
/// `raw` has the callback for `Self`.
#[repr(C)]
struct Start<F> {
    raw: Opaque<bindings::balloon_rs_thread_start>,
    work: F,
    shared: Arc<Shared>,
}

impl Thread {
    /// Starts a thread called `name` that does `work`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`, or `ENODEV` if the module is being unloaded.
    pub(crate) fn start<F>(name: &'static CStr, waker: Waker, work: F) -> Result<Self>
    where
        F: FnOnce() -> Result + Send + 'static,
    {
        let shared = Arc::pin_init(
            pin_init!(Shared {
                outcome: SetOnce::new(),
                is_killed: Atomic::new(false),
                waker <- new_mutex!(Some(waker), "Thread::waker"),
            }),
            GFP_KERNEL,
        )?;
        // INVARIANT: The callback is the one for this type.
        let start = KBox::new(
            Start {
                raw: Opaque::new(bindings::balloon_rs_thread_start {
                    run: Some(Self::run::<F>),
                }),
                work,
                shared: shared.clone(),
            },
            GFP_KERNEL,
        )?;
        let start = KBox::into_raw(start);

        // SAFETY: The name is a string. `start` is valid until the callback has taken it.
        let thread = from_err_ptr(unsafe {
            bindings::balloon_rs_start_thread(
                name.as_char_ptr(),
                Opaque::cast_into(&raw const (*start).raw),
            )
        })
        .inspect_err(|_| {
            // SAFETY: It comes from `into_raw`, and there is no thread that would take it.
            drop(unsafe { KBox::from_raw(start) });
        })?;

        // INVARIANT: It is a thread, with a reference to it.
        Ok(Self {
            thread: NonNull::new(thread).ok_or(ENOMEM)?,
            shared,
        })
    }

    /// Returns how the work went, if it has ended.
    pub(crate) fn outcome(&self) -> Option<Result> {
        self.shared.outcome.copy()
    }

    extern "C" fn run<F: FnOnce() -> Result>(start: *mut bindings::balloon_rs_thread_start) {
        // SAFETY: By the type invariants of `Start` it is part of one, which `start` has made. It
        // is taken only here.
        let start = unsafe {
            KBox::from_raw(container_of!(Opaque::cast_from(start), Start<F>, raw).cast_mut())
        };
        let Start { work, shared, .. } = KBox::into_inner(start);
        // Either way what the work owns is gone before the task hears of it.
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
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // What the task belongs to may be gone as soon as this returns.
        drop(self.shared.waker.lock().take());

        if self.outcome().is_some() {
            // A program that hears of the end may unload the module next.
            //
            // SAFETY: By the type invariants it is a thread of the kernel's, and the reference is
            // ours.
            unsafe { bindings::kthread_stop_put(self.thread.as_ptr()) };
        } else {
            self.shared.is_killed.store(true, Relaxed);
            // SAFETY: As above.
            unsafe {
                bindings::send_sig(bindings::SIGKILL as c_int, self.thread.as_ptr(), 1);
                bindings::put_task_struct(self.thread.as_ptr());
            }
        }
    }
}

/// Returns how many references to this module there are.
#[cfg(CONFIG_VIRTIO_BALLOON_RS_KUNIT_TEST)]
pub(crate) fn module_references() -> c_int {
    // SAFETY: The function has no preconditions.
    unsafe { bindings::balloon_rs_module_references() }
}
