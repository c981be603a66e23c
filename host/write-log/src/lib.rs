// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A plugin for QEMU that records which pages of its memory a guest writes.
//!
//! ```text
//! qemu-system-x86_64 -accel tcg -plugin libwrite_log.so,log=LOG ...
//! ```
//!
//! LOG is an existing file: a bitmap of 64-bit words in which bit n stands for the 4 KiB from the guest-physical
//! address 4096 n on, long enough for all of the guest's memory. The plugin sets a bit when a processor of the guest
//! has written there. The reader of the log clears bits while the guest is stopped. Writes by devices are not recorded.
//!
//! The interface is that of QEMU's `qemu-plugin.h`, version 7.

#![expect(unsafe_code, reason = "a plugin of a program in C")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fs::File;
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use memmap2::MmapMut;

/// The binary logarithm of a page's size in bytes.
const PAGE_SHIFT: u32 = 12;

/// Values of `enum qemu_plugin_cb_flags` and `enum qemu_plugin_mem_rw`.
const CB_NO_REGS: c_int = 0;
const MEM_W: c_int = 2;

/// The version of the interface.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals, reason = "QEMU looks for this name")]
pub static qemu_plugin_version: c_int = 7;

type TranslatedCallback = extern "C" fn(tb: *mut c_void, log: *mut c_void);
type MemoryCallback = extern "C" fn(vcpu: c_uint, info: u32, vaddr: u64, log: *mut c_void);

unsafe extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(
        id: u64,
        callback: TranslatedCallback,
        userdata: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(tb: *const c_void) -> usize;
    fn qemu_plugin_tb_get_insn(tb: *const c_void, index: usize) -> *mut c_void;
    fn qemu_plugin_register_vcpu_mem_cb(
        insn: *mut c_void,
        callback: MemoryCallback,
        flags: c_int,
        rw: c_int,
        userdata: *mut c_void,
    );
    fn qemu_plugin_mem_size_shift(info: u32) -> c_uint;
    fn qemu_plugin_get_hwaddr(info: u32, vaddr: u64) -> *const c_void;
    fn qemu_plugin_hwaddr_is_io(address: *const c_void) -> bool;
    fn qemu_plugin_hwaddr_phys_addr(address: *const c_void) -> u64;
}

/// The log, as long as QEMU runs.
struct Log(&'static [AtomicU64]);

impl Log {
    /// Maps the log in `path`.
    fn open(path: &str) -> Option<Self> {
        let file = File::options().read(true).write(true).open(path).ok()?;
        // SAFETY: the memory is only accessed by atomic operations, here and, through the file, while the guest is
        // stopped. No process truncates the file while QEMU runs.
        let map = Box::leak(Box::new(unsafe { MmapMut::map_mut(&file) }.ok()?));
        let words = map.len() / size_of::<AtomicU64>();
        // SAFETY: a mapping is page-aligned, has this length, and is never unmapped.
        Some(Self(unsafe {
            std::slice::from_raw_parts(map.as_mut_ptr().cast(), words)
        }))
    }

    /// Takes note of a write at the physical address `address`.
    fn record(&self, address: u64) {
        let page = address >> PAGE_SHIFT;
        let word = usize::try_from(page / 64).ok();
        let mask = 1 << (page % 64);
        // Addresses beyond the end of the log are not memory.
        if let Some(word) = word.and_then(|word| self.0.get(word)) {
            if word.load(Relaxed) & mask == 0 {
                word.fetch_or(mask, Relaxed);
            }
        }
    }
}

/// Called by QEMU with the options of the command line.
///
/// # Safety
///
/// `argv` has `argc` strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let path = (0..usize::try_from(argc).unwrap_or(0)).find_map(|index| {
        // SAFETY: QEMU passes that many strings.
        let argument = unsafe { CStr::from_ptr(*argv.add(index)) };
        argument.to_str().ok()?.strip_prefix("log=")
    });
    let Some(log) = path.and_then(Log::open) else {
        eprintln!("write-log: log=LOG must name an existing log");
        return 1;
    };
    let log = ptr::from_ref(Box::leak(Box::new(log)));
    // SAFETY: the callback has the type of version 7, and its argument is never freed.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated, log.cast_mut().cast()) };
    0
}

/// QEMU has translated code of the guest: register its writes.
extern "C" fn translated(tb: *mut c_void, log: *mut c_void) {
    // SAFETY: QEMU passes a block that is being translated, which has that many instructions.
    unsafe {
        for index in 0..qemu_plugin_tb_n_insns(tb) {
            let insn = qemu_plugin_tb_get_insn(tb, index);
            qemu_plugin_register_vcpu_mem_cb(insn, written, CB_NO_REGS, MEM_W, log);
        }
    }
}

/// The guest has written to a virtual address.
extern "C" fn written(_vcpu: c_uint, info: u32, vaddr: u64, log: *mut c_void) {
    // SAFETY: it is the registered pointer, which is never freed.
    let log = unsafe { &*log.cast::<Log>() };
    // SAFETY: QEMU passes a valid description of an access.
    let last = vaddr.wrapping_add((1 << unsafe { qemu_plugin_mem_size_shift(info) }) - 1);
    // An access may reach into the next page.
    for vaddr in [vaddr, last] {
        // SAFETY: as above; the result is valid until the next call.
        unsafe {
            let address = qemu_plugin_get_hwaddr(info, vaddr);
            if !address.is_null() && !qemu_plugin_hwaddr_is_io(address) {
                log.record(qemu_plugin_hwaddr_phys_addr(address));
            }
        }
        if vaddr >> PAGE_SHIFT == last >> PAGE_SHIFT {
            break;
        }
    }
}
