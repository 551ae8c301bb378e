//! All that a machine is but its memory and what backs its disks, as plain data.

use serde::{Deserialize, Serialize};

use super::Machine;
use super::device_state::DevicesState;
use crate::config::{Clock, MachineConfig};
use crate::error::Error;
use crate::kvm::{CpuProfile, Vcpu, VmState};

/// A stopped machine: what KVM knows of it, and its devices.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MachineState {
    vm: VmState,
    devices: DevicesState,
}

impl MachineState {
    /// The model-specific registers that are saved, by index: those of the first vCPU, which has
    /// what all have.
    pub(crate) fn msrs(&self) -> Vec<u32> {
        self.vm.msrs()
    }
}

#[cfg(fuzzing)]
impl MachineState {
    /// The states of the devices, for what has no machine.
    pub(crate) fn devices(&self) -> &DevicesState {
        &self.devices
    }
}

impl MachineState {
    /// Whether it is of a machine of this kind: counts, which come from a file.
    pub(crate) fn check(&self, config: &MachineConfig) -> Result<(), String> {
        let (found, expected) = (self.vm.vcpus(), usize::from(config.vcpus));
        if found != expected {
            return Err(format!("{found} vCPUs are saved of {expected}"));
        }
        Ok(())
    }
}

impl Machine {
    /// What its guest was shown of the CPU, and what this host is.
    pub(crate) fn profile(&self, vcpus: &[Vcpu]) -> Result<CpuProfile, Error> {
        if let Some(profile) = self.profile.get() {
            return Ok(profile.clone());
        }
        let capabilities = self.vm.capabilities();
        let profile = CpuProfile::new(capabilities, self.cpuid.clone(), vcpus.first())?;
        Ok(self.profile.get_or_init(|| profile).clone())
    }

    /// The state of a machine whose vCPUs are all here, and so stand still. Takes some 200 µs.
    pub(crate) fn state(&self, vcpus: &[Vcpu]) -> Result<MachineState, Error> {
        let devices = self.devices_state();
        Ok(MachineState { vm: self.vm.state(vcpus)?, devices })
    }

    /// Lets a new machine go on from a state: registers, clocks and interrupt controllers before
    /// devices, so that an interrupt that those raise is not lost. The guest is another one from
    /// now on: its VMGenID is new. Where it fails the machine is of no use.
    pub(crate) fn restore(
        &self,
        vcpus: &[Vcpu],
        state: &MachineState,
        clock: Clock,
    ) -> Result<(), Error> {
        self.vm.restore(&state.vm, vcpus, clock)?;
        self.restore_devices(&state.devices)?;
        self.renew_generation()
    }
}
