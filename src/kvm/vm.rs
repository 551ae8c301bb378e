//! A KVM virtual machine: memory slots first, then the interrupt controllers, then vCPUs.

use std::sync::{Arc, Mutex};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::IoEventAddress;
use vmm_sys_util::eventfd::EventFd;

use super::vm_state::Fresh;
use super::{Capabilities, Kvm, KvmError, Vcpu};
use crate::arch::layout;
use crate::memory::GuestRam;

/// A VM of KVM, and the memory that it was given.
#[derive(Debug)]
pub(crate) struct Vm {
    // KVM reads and writes the memory for as long as the VM lives: the descriptor is closed
    // before the memory goes, and every vCPU keeps its VM.
    pub(super) fd: kvm_ioctls::VmFd,
    ram: Arc<GuestRam>,
    capabilities: &'static Capabilities,
    /// What it was before it ran, where somebody looked: a restore then sets what differs, for
    /// each call costs some 10 µs.
    pub(super) fresh: Mutex<Option<Fresh>>,
}

impl Vm {
    /// Creates a VM (api.rst §4.2), registers its RAM (§4.35), and only then puts the local
    /// APICs, the IOAPIC and the PIC in (§4.24).
    ///
    /// The order is worth 5 ms: a memory slot that comes after a device on a KVM bus waits for
    /// an SRCU grace period.
    pub(crate) fn new(kvm: &Kvm, ram: Arc<GuestRam>) -> Result<Self, KvmError> {
        let fd = create(kvm)?;
        for (slot, region) in (0..).zip(ram.slots()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.guest_address,
                memory_size: region.len,
                userspace_addr: region.host_address,
            };
            // SAFETY: the region is a mapping that `ram` owns, and `ram` is kept, in a field
            // after `fd`, until the VM is closed.
            unsafe { fd.set_user_memory_region(region) }
                .map_err(KvmError::call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        fd.set_tss_address(layout::KVM_TSS).map_err(KvmError::call("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(KvmError::call("KVM_CREATE_IRQCHIP"))?;
        Ok(Self { fd, ram, capabilities: kvm.capabilities(), fresh: Mutex::default() })
    }

    /// Creates vCPU `id` (api.rst §4.7).
    pub(crate) fn create_vcpu(self: &Arc<Self>, id: u8) -> Result<Vcpu, KvmError> {
        let fd = self.fd.create_vcpu(id.into()).map_err(KvmError::call("KVM_CREATE_VCPU"))?;
        if !self.capabilities.scales_tsc {
            // The host's frequency, as it is known by now (api.rst §4.55). KVM itself takes what was known when it was
            // loaded: where the kernel measured again after that, and found more, a guest's TSC stands still on a
            // CPU that scales none, and no timer of its own ends. Linux before 5.17 does not let us.
            let _ = fd.set_tsc_khz(0);
        }
        Ok(Vcpu::new(fd, id, Arc::clone(self)))
    }

    /// Lets a write to `event` raise interrupt `gsi` once (api.rst §4.75).
    pub(crate) fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, gsi).map_err(KvmError::call("KVM_IRQFD"))
    }

    /// Lets the guest's 4-byte store of `value` at `address` write to `event`, without an exit
    /// (api.rst §4.59).
    pub(crate) fn register_doorbell(
        &self,
        event: &EventFd,
        address: u64,
        value: u32,
    ) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(event, &IoEventAddress::Mmio(address), value)
            .map_err(KvmError::call("KVM_IOEVENTFD"))
    }

    /// What the process's KVM can do.
    pub(crate) fn capabilities(&self) -> &'static Capabilities {
        self.capabilities
    }

    /// The guest's memory.
    pub(crate) fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }
}

/// KVM_CREATE_VM ends with EINTR where a signal for the process comes at the wrong moment.
fn create(kvm: &Kvm) -> Result<kvm_ioctls::VmFd, KvmError> {
    loop {
        match kvm.fd().create_vm() {
            Err(errno) if errno.errno() == libc::EINTR => {}
            created => return created.map_err(KvmError::call("KVM_CREATE_VM")),
        }
    }
}
