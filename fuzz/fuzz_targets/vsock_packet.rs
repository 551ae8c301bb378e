//! A socket device: a guest that sends any packets, and a host that does anything with its ends.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::vsock_packet(bytes));
