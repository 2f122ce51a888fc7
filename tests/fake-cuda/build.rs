//! Gives the library the driver's name, so that whoever loaded it by its path gets it again when asking for the driver.

fn main() {
    println!("cargo:rustc-cdylib-link-arg=-Wl,-soname,libcuda.so");
    println!("cargo:rerun-if-changed=build.rs");
}
