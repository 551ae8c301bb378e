//! What the host reads of the agent in a guest, and the agent of the host: frames and messages.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    dormouse::fuzzing::agent_frame(bytes);
    dormouse::fuzzing::agent_reader(bytes);
});
