//! A virtio device: any accesses to its registers, doorbells, and writes to RAM between them.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::transport_registers(bytes));
