//! A virtio device that goes on from any state: refused, or the same when written again, and
//! then as robust as any.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::transport_state(bytes));
