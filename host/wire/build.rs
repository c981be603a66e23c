// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Makes the Rust side of the wire format from the C headers.

use std::env;
use std::path::PathBuf;

fn main() {
    let uapi = "../../uapi";
    println!("cargo:rerun-if-changed={uapi}");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    bindgen::Builder::default()
        .header(format!("{uapi}/linux/virtio_balloon_ext.h"))
        .clang_arg(format!("-I{uapi}"))
        .allowlist_item("(VIRTIO_BALLOON|virtio_balloon)_.*")
        .derive_debug(false)
        .generate()
        .expect("bindgen reads the headers")
        .write_to_file(out.join("bindings.rs"))
        .expect("cargo's directory can be written to");
}
