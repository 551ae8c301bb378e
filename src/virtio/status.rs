//! The device status, by which a driver says how far it is: the bits that a device acts on.
//!
//! Source: virtio 1.2 §2.1.

pub(super) const DRIVER_OK: u32 = 4;
pub(super) const FEATURES_OK: u32 = 8;
pub(super) const DEVICE_NEEDS_RESET: u32 = 64;
