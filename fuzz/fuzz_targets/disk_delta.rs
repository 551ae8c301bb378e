//! A delta, over a disk of zeros.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::disk_delta(bytes));
