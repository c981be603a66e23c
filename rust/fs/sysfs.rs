// SPDX-License-Identifier: GPL-2.0

//! Attributes of a device in sysfs.
//!
//! The driver core creates them after the driver was bound. Before it unbinds the driver it removes
//! them, and waits for readers.
//!
//! C headers: [`include/linux/sysfs.h`](srctree/include/linux/sysfs.h),
//! [`include/linux/device.h`](srctree/include/linux/device.h)

use crate::rust::bindings;

use core::marker::PhantomData;
use kernel::{
    device,
    error::from_result,
    fmt,
    page::PAGE_SIZE,
    prelude::*,
    str::CString,
    types::Opaque, //
};

/// An attribute of a device whose driver has the data `D`.
pub(crate) trait Attribute<D> {
    /// Its name.
    const NAME: &'static CStr;

    /// Sets the attribute to a text without white space around it. `None` if it is read-only.
    const STORE: Option<fn(&D, &str) -> Result> = None;

    /// The shown value.
    type Value: fmt::Display;

    /// Returns the shown value. May sleep.
    fn show(data: &D) -> Result<Self::Value>;
}

/// An attribute in the driver core's form.
#[repr(transparent)]
pub(crate) struct RawAttribute<D>(Opaque<bindings::device_attribute>, PhantomData<fn(&D)>);

// SAFETY: Only the driver core accesses it, which does its own locking.
unsafe impl<D> Sync for RawAttribute<D> {}

impl<D: 'static> RawAttribute<D> {
    /// Makes one of `A`. For [`attributes!`].
    pub(crate) const fn new<A: Attribute<D>>() -> Self {
        let mode = if A::STORE.is_some() { 0o644 } else { 0o444 };
        let mut raw: bindings::device_attribute = pin_init::zeroed();

        raw.attr.name = A::NAME.to_bytes_with_nul().as_ptr().cast();
        raw.attr.mode = mode;
        raw.__bindgen_anon_1.show = Some(show::<D, A>);
        raw.__bindgen_anon_2.store = Some(store::<D, A>);
        Self(Opaque::new(raw), PhantomData)
    }
}

/// A directory of attributes in the driver core's form.
#[repr(transparent)]
pub(crate) struct RawGroup<D>(Opaque<bindings::attribute_group>, PhantomData<fn(&D)>);

// SAFETY: As for `RawAttribute`.
unsafe impl<D> Sync for RawGroup<D> {}

impl<D: 'static> RawGroup<D> {
    /// Makes one of the attributes in `list`, which ends with none. For [`attributes!`].
    pub(crate) const fn new(
        name: &'static CStr,
        list: &'static [Option<&'static RawAttribute<D>>],
    ) -> Self {
        let mut raw: bindings::attribute_group = pin_init::zeroed();

        raw.name = name.to_bytes_with_nul().as_ptr().cast();
        // A `device_attribute` begins with the attribute, and none is a null pointer.
        raw.__bindgen_anon_2.attrs = list.as_ptr().cast_mut().cast();
        Self(Opaque::new(raw), PhantomData)
    }
}

/// The attributes of a driver with the data `D`; see [`attributes!`].
pub(crate) struct Attributes<D: 'static>([Option<&'static RawGroup<D>>; 2]);

impl<D> Attributes<D> {
    /// Makes them of one directory. For [`attributes!`].
    pub(crate) const fn new(group: &'static RawGroup<D>) -> Self {
        Self([Some(group), None])
    }

    /// Returns them in the form of `struct device_driver`. None is a null pointer.
    pub(in crate::rust) fn as_ptr(&'static self) -> *mut *const bindings::attribute_group {
        self.0.as_ptr().cast_mut().cast()
    }
}

/// Declares the [`Attributes`] of a driver, in a directory of the device.
macro_rules! attributes {
    (
        $(#[$meta:meta])*
        $vis:vis static $name:ident: $data:ty = $directory:ident { $($attribute:ty),* $(,)? }
    ) => {
        $(#[$meta])*
        $vis static $name: $crate::rust::fs::sysfs::Attributes<$data> = {
            static LIST: &[Option<&$crate::rust::fs::sysfs::RawAttribute<$data>>] = &[
                $({
                    static ATTRIBUTE: $crate::rust::fs::sysfs::RawAttribute<$data> =
                        $crate::rust::fs::sysfs::RawAttribute::new::<$attribute>();
                    Some(&ATTRIBUTE)
                },)*
                None,
            ];
            static GROUP: $crate::rust::fs::sysfs::RawGroup<$data> =
                $crate::rust::fs::sysfs::RawGroup::new($directory, LIST);

            $crate::rust::fs::sysfs::Attributes::new(&GROUP)
        };
    };
}
pub(crate) use attributes;

/// Returns the data of the driver of the device, for a callback of an attribute of `D`.
///
/// # Safety
///
/// `dev` must be bound for `'a`, to a driver with the data `D`.
unsafe fn data<'a, D>(dev: *mut bindings::device) -> &'a D {
    // SAFETY: By the requirements of this function.
    unsafe {
        let dev: &device::Device<device::CoreInternal<'_>> = device::Device::from_raw(dev);

        Pin::get_ref(dev.drvdata_borrow::<D>())
    }
}

/// Shows the attribute `A`.
///
/// # Safety
///
/// `dev` must be bound to a driver with the data `D`, and `page` a page of zeroes that no other
/// code accesses, until this returns. That is so when sysfs calls for an attribute of
/// [`attributes!`].
unsafe extern "C" fn show<D: 'static, A: Attribute<D>>(
    dev: *mut bindings::device,
    _attribute: *mut bindings::device_attribute,
    page: *mut c_char,
) -> isize {
    // SAFETY: By the requirements of this function.
    let (data, page) = unsafe {
        (
            data::<D>(dev),
            core::slice::from_raw_parts_mut(page.cast::<u8>(), PAGE_SIZE),
        )
    };

    from_result(|| {
        let value = A::show(data)?;
        let text = CString::try_from_fmt(fmt!("{value}\n"))?;
        let text = text.to_bytes();

        page.get_mut(..text.len())
            .ok_or(EOVERFLOW)?
            .copy_from_slice(text);
        Ok(text.len() as isize)
    })
}

/// Sets the attribute `A`.
///
/// # Safety
///
/// `dev` must be bound to a driver with the data `D`, and the `len` bytes of `text` must not
/// change, until this returns. That is so when sysfs calls for an attribute of [`attributes!`].
unsafe extern "C" fn store<D: 'static, A: Attribute<D>>(
    dev: *mut bindings::device,
    _attribute: *mut bindings::device_attribute,
    text: *const c_char,
    len: usize,
) -> isize {
    // SAFETY: By the requirements of this function.
    let (data, text) = unsafe {
        (
            data::<D>(dev),
            core::slice::from_raw_parts(text.cast::<u8>(), len),
        )
    };

    from_result(|| {
        let text = core::str::from_utf8(text).map_err(|_| EINVAL)?.trim();
        // Because of the mode of a read-only attribute, sysfs does not call this.
        let store = A::STORE.ok_or(EIO)?;

        store(data, text)?;
        Ok(len as isize)
    })
}
