// SPDX-License-Identifier: GPL-2.0

//! Cleanup after a KUnit test in which an assertion fails: KUnit then ends the test's thread, and
//! no destructor runs. Without cleanup the next tests would find its devices.
//!
//! C header: [`include/kunit/resource.h`](srctree/include/kunit/resource.h)

use crate::rust::bindings;

use core::ptr::NonNull;
use kernel::{
    error::to_result,
    prelude::*, //
};

/// A function of an object that must be called once: when this is dropped, or at the end of the
/// test that has made this.
///
/// # Invariants
///
/// If there is a `test`, it has the function with the object as a deferred action.
pub(in crate::rust) struct Cleanup {
    test: Option<NonNull<bindings::kunit>>,
    function: unsafe extern "C" fn(*mut c_void),
    object: *mut c_void,
}

impl Cleanup {
    /// Makes one of `function`. Outside of a test it is called only when this is dropped.
    ///
    /// # Errors
    ///
    /// `ENOMEM`. The function is not called then.
    ///
    /// # Safety
    ///
    /// The function may be called once with `object`, from any thread.
    pub(in crate::rust) unsafe fn new(
        function: unsafe extern "C" fn(*mut c_void),
        object: *mut c_void,
    ) -> Result<Self> {
        // SAFETY: The function has no requirements.
        let test = NonNull::new(unsafe { bindings::kunit_get_current_test() });

        if let Some(test) = test {
            // SAFETY: It is the current test. By the requirements of this function the action may
            // be called.
            to_result(unsafe {
                bindings::kunit_add_action(test.as_ptr(), Some(function), object)
            })?;
        }
        // INVARIANT: The action was just added.
        Ok(Self {
            test,
            function,
            object,
        })
    }
}

impl Drop for Cleanup {
    fn drop(&mut self) {
        // SAFETY: By the type invariants. A test does not end before its objects are dropped,
        // unless an assertion fails: then they are not dropped at all.
        unsafe {
            match self.test {
                Some(test) => {
                    let function = Some(self.function);

                    bindings::kunit_release_action(test.as_ptr(), function, self.object);
                }
                None => (self.function)(self.object),
            }
        }
    }
}
