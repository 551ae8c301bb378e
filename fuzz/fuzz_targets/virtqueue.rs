//! A virtqueue: any rings and descriptors, and any order of taking, giving back and putting back.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::virtqueue(bytes));
