//! Fuzzes the reader `model_config`; see `pleach_tests::readers`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = pleach_tests::readers::model_config(data);
});
