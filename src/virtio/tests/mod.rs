//! Every device, driven by the drivers of the crate virtio-drivers and by hostile ones of ours,
//! with no KVM.

mod balloon;
mod block;
mod driver;
mod hostile;
mod net;
mod queue;
mod rng;
mod socket;
mod state;
mod tap;
mod threads;
mod turns;
mod vsock;
