//! Gives the shared library the name the real driver has.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // A later dlopen("libcuda.so.1") then finds the copy that is already loaded.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so.1");
    // Worker threads outlive a dlclose, which cudarc's presence check does.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
