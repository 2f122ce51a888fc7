//! Fuzzes the reader `gguf`; see `pleach_tests::readers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = pleach_tests::readers::gguf(data);
});
