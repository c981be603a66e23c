// SPDX-License-Identifier: GPL-2.0

//! Tasks that own their state.
//!
//! The `kernel` crate's work items own a reference to their data while they are queued, and
//! cancelling the work leaks it. A [`Task`] owns its state instead, and dropping it first ends the
//! work. Nothing leaks, and no work runs after its owner is gone.
//!
//! C header: [`include/linux/workqueue.h`](srctree/include/linux/workqueue.h)

use core::{
    marker::PhantomData,
    ops::Deref,
    ptr::{
        self,
        NonNull, //
    }, //
};
use kernel::{
    bindings,
    container_of,
    device::{
        Device,
        DeviceContext, //
    },
    prelude::*,
    str::CString,
    sync::{
        atomic::{
            Acquire,
            Atomic,
            Relaxed,
            Release, //
        },
        Arc,
        LockClassKey, //
    },
    time::{
        msecs_to_jiffies,
        Msecs, //
    },
    types::Opaque, //
};

/// The work of a [`Task`].
pub(crate) trait Job: Send + Sync + Sized {
    /// Runs once each time the task is scheduled, and never twice at the same time for one task.
    ///
    /// Runs in process context, in a freezable workqueue. It must end soon, since the system cannot
    /// suspend before, and must not wait for the device.
    fn run(task: &Task<Self>);
}

/// A workqueue of a device's tasks. It is freezable, so that no work starts while the system
/// suspends, and not bound to a CPU, since handling millions of pages takes long. Its priority and
/// its CPUs can be set in `/sys/devices/virtual/workqueue/`.
pub(crate) struct TaskQueue(NonNull<bindings::workqueue_struct>);

// SAFETY: A workqueue may be used, and destroyed, from any thread.
unsafe impl Send for TaskQueue {}

// SAFETY: As above; the workqueue does its own locking.
unsafe impl Sync for TaskQueue {}

impl TaskQueue {
    /// Makes a queue with the unique name `name` and a rescuer thread, which runs when memory is
    /// short.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(name: &CStr) -> Result<Arc<Self>> {
        Self::with_flags(name, bindings::wq_flags_WQ_MEM_RECLAIM)
    }

    /// Makes a queue without a rescuer thread: for tasks that wait for other threads, which may
    /// need memory. It is named after its `purpose`, unique for the device, and `dev`.
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn without_rescuer(
        purpose: &str,
        dev: &Device<impl DeviceContext>,
    ) -> Result<Arc<Self>> {
        let name = CString::try_from_fmt(fmt!("balloon_rs_{purpose}-{}", dev.name()))?;

        Self::with_flags(&name, 0)
    }

    fn with_flags(name: &CStr, flags: u32) -> Result<Arc<Self>> {
        // SAFETY: Both strings are null-terminated, "%s" takes one string, and the name is copied.
        let queue = unsafe {
            bindings::alloc_workqueue_noprof(
                c"%s".as_char_ptr(),
                bindings::wq_flags_WQ_FREEZABLE
                    | bindings::wq_flags_WQ_UNBOUND
                    | bindings::wq_flags_WQ_SYSFS
                    | flags,
                0,
                name.as_char_ptr(),
            )
        };

        Ok(Arc::new(
            Self(NonNull::new(queue).ok_or(ENOMEM)?),
            GFP_KERNEL,
        )?)
    }
}

impl Drop for TaskQueue {
    fn drop(&mut self) {
        // SAFETY: The workqueue is ours, and no work is left: `Task` ended it before, or there was
        // none, and no code can queue it any more.
        unsafe { bindings::destroy_workqueue(self.0.as_ptr()) };
    }
}

/// A work item that can be queued.
///
/// # Invariants
///
/// - `dwork` is initialised, is only ever queued on `queue`, and its function is the one of `S`,
///   for the [`Task<S>`] that owns this.
/// - `task` is null, or points to that task. While the work function runs, the task has not been
///   dropped.
#[pin_data(PinnedDrop)]
struct Work {
    #[pin]
    dwork: Opaque<bindings::delayed_work>,
    queue: Arc<TaskQueue>,
    task: Atomic<*mut c_void>,
}

// SAFETY: Work may be queued from any thread, and the task is `Send` and `Sync` by the bound of
// `Job`.
unsafe impl Send for Work {}

// SAFETY: As above; the workqueue does its own locking.
unsafe impl Sync for Work {}

impl Work {
    /// Waits until the work does not run, and prevents it from being queued. May be called more
    /// than once.
    fn disable(&self) {
        // SAFETY: By the type invariants `dwork` is initialised.
        unsafe { bindings::disable_delayed_work_sync(self.dwork.get()) };
    }
}

#[pinned_drop]
impl PinnedDrop for Work {
    fn drop(self: Pin<&mut Self>) {
        // The work may be queued even if there never was a task.
        self.disable();
    }
}

/// Schedules a [`Task`]. For code that has no reference to the task, such as a part of its state.
///
/// Does nothing before the task exists and after it was dropped.
#[derive(Clone)]
pub(crate) struct Waker(Arc<Work>);

/// The place of a future [`Task`].
pub(crate) struct Slot<S>(Waker, PhantomData<fn(&S)>);

impl<S: Job> Slot<S> {
    /// Makes a place for a task named `name` that runs on `queue`; see [`new_slot!`].
    ///
    /// # Errors
    ///
    /// `ENOMEM`.
    pub(crate) fn new(
        name: &'static CStr,
        queue: Arc<TaskQueue>,
        work_key: Pin<&'static LockClassKey>,
        timer_key: Pin<&'static LockClassKey>,
    ) -> Result<Self> {
        // INVARIANT: `dwork` is initialised here, and its function is for `Task<S>`, of which there
        // is none.
        let work = Arc::pin_init(
            try_pin_init!(Work {
                dwork <- Opaque::ffi_init(|slot: *mut bindings::delayed_work| {
                    // SAFETY: `slot` is valid for writes; `run` is a work function. The timer
                    // belongs to a delayed work, so its function and the flag are the right ones.
                    unsafe {
                        bindings::init_work_with_key(
                            &raw mut (*slot).work,
                            Some(Self::run),
                            false,
                            name.as_char_ptr(),
                            work_key.as_ptr(),
                        );
                        bindings::timer_init_key(
                            &raw mut (*slot).timer,
                            Some(bindings::delayed_work_timer_fn),
                            bindings::TIMER_IRQSAFE,
                            name.as_char_ptr(),
                            timer_key.as_ptr(),
                        )
                    };
                }),
                queue,
                task: Atomic::new(ptr::null_mut()),
            }),
            GFP_KERNEL,
        )?;

        Ok(Self(Waker(work), PhantomData))
    }

    /// Returns a waker for the task that will be here.
    pub(crate) fn waker(&self) -> Waker {
        self.0.clone()
    }

    /// # Safety
    ///
    /// Only for the workqueue, which calls it with the `dwork.work` of a [`Work`] for a `Task<S>`.
    unsafe extern "C" fn run(work: *mut bindings::work_struct) {
        // SAFETY: By the requirements of this function. By the type invariants of `Work` the task
        // is null or a live `Task<S>`.
        let task = unsafe {
            let dwork = container_of!(work, bindings::delayed_work, work);
            let work = &*container_of!(Opaque::cast_from(dwork), Work, dwork);

            // Pairs with the release in `Task::new`.
            work.task.load(Acquire).cast::<Task<S>>().as_ref()
        };

        if let Some(task) = task {
            S::run(task);
        }
    }
}

impl Waker {
    /// Runs the task as soon as possible, and again if it is running now. Callable from any
    /// context.
    pub(crate) fn schedule(&self) {
        // `mod_` and not `queue_`: a delayed run must start at once.
        //
        // SAFETY: By the type invariants `dwork` is initialised. The workqueue lives as long as
        // `work`, whose work ends before.
        unsafe {
            bindings::mod_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                self.0.queue.0.as_ptr(),
                self.0.dwork.get(),
                0,
            )
        };
    }

    /// Runs the task after `delay` milliseconds, unless it is already scheduled.
    pub(crate) fn schedule_in(&self, delay: Msecs) {
        // SAFETY: As in `schedule`.
        unsafe {
            bindings::queue_delayed_work_on(
                bindings::wq_misc_consts_WORK_CPU_UNBOUND as c_int,
                self.0.queue.0.as_ptr(),
                self.0.dwork.get(),
                msecs_to_jiffies(delay),
            )
        };
    }
}

/// A state, and the work on it.
#[pin_data(PinnedDrop)]
pub(crate) struct Task<S: Job> {
    waker: Waker,
    stopped: Atomic<bool>,
    #[pin]
    state: S,
}

impl<S: Job> Task<S> {
    /// Returns an initialiser for a task in `slot` that works on `state`.
    pub(crate) fn new(slot: Slot<S>, state: impl PinInit<S, Error>) -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            waker: slot.0,
            stopped: Atomic::new(false),
            state <- state,
        })
        .pin_chain(|this| {
            let task = ptr::from_ref(&*this).cast_mut();

            // INVARIANT: The task is initialised and pinned, the only one in its slot, and ends the
            // work before it is dropped.
            this.waker.0.task.store(task.cast(), Release);
            Ok(())
        })
    }

    /// Waits until the task does not run, and prevents it from running until
    /// [`resume`](Self::resume).
    ///
    /// May sleep. Calls of `stop` and `resume` must not race, as in the callbacks of a bus.
    pub(crate) fn stop(&self) {
        if !self.stopped.xchg(true, Relaxed) {
            self.waker.0.disable();
        }
    }

    /// Takes [`stop`](Self::stop) back.
    pub(crate) fn resume(&self) {
        if self.stopped.xchg(false, Relaxed) {
            // SAFETY: By the type invariants `dwork` is initialised, and `stop` has disabled it.
            unsafe { bindings::enable_delayed_work(self.waker.0.dwork.get()) };
        }
    }

    /// See [`Waker::schedule`].
    pub(crate) fn schedule(&self) {
        self.waker.schedule();
    }

    /// See [`Waker::schedule_in`].
    pub(crate) fn schedule_in(&self, delay: Msecs) {
        self.waker.schedule_in(delay);
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
        // When this returns the work function does not run, and remaining wakers cannot queue it.
        self.waker.0.disable();
    }
}

/// Creates a [`Slot`] with lock classes of its own.
macro_rules! new_slot {
    ($name:expr, $queue:expr $(,)?) => {
        $crate::rust::work::task::Slot::new(
            $name,
            $queue.clone(),
            ::kernel::static_lock_class!(),
            ::kernel::static_lock_class!(),
        )
    };
}
pub(crate) use new_slot;
