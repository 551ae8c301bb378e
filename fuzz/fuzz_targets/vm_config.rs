//! A written configuration, from a file or a peer: taken or refused, and the same when written again.

#![no_main]

use dormouse::VmConfig;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|json: &[u8]| {
    let Ok(config) = serde_json::from_slice::<VmConfig>(json) else {
        return;
    };
    let _ = format!("{config:?}");
    let written = serde_json::to_string(&config).expect("what was read can be written");
    let again: VmConfig = serde_json::from_str(&written).expect("what was written can be read");
    assert_eq!(serde_json::to_string(&again).expect("the same again"), written);
});
