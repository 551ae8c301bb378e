//! A network interface whose other end sends anything, and a guest that does anything.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::net_frame(bytes));
