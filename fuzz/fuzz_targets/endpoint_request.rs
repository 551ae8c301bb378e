//! What a client of an endpoint says: how its connection begins, its target, its headers and its token.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| dormouse::fuzzing::endpoint_request(bytes));
