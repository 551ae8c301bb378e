//! A guest of a few instructions, saved and restored by KVM itself. Where there is no /dev/kvm,
//! these tests say so and do nothing: the guests of tests/payload, which the testbed runs
//! everywhere, go the same way.

mod state;

use std::path::Path;
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;

use super::{Kvm, KvmError, Vcpu, Vm, VmExit};
use crate::arch::regs::Entry;
use crate::arch::{cpuid, msr};
use crate::bus::{Bus, BusDevice};
use crate::config::CpuTemplate;
use crate::memory::GuestRam;

const CODE: u64 = 0x10_0000;
const RAM_BYTES: usize = 2 << 20;
/// The port that the guests speak to.
const PORT: u16 = 0x100;

/// Answers reads with `answer`, and keeps what is written.
#[derive(Debug)]
struct Peer {
    answer: u8,
    written: Vec<u8>,
}

impl BusDevice for Peer {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.answer);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        self.written.extend(data);
    }
}

/// A VM without a machine around it.
struct Guest {
    vcpus: Vec<Vcpu>,
    vm: Arc<Vm>,
    bus: Bus,
    peer: Arc<Mutex<Peer>>,
}

impl Guest {
    /// A VM whose vCPUs have CPUID and nothing else, or None where there is no KVM.
    fn new(vcpus: u8, ram: Arc<GuestRam>) -> Option<Self> {
        let kvm = match Kvm::open(Path::new("/dev/kvm")) {
            Ok(kvm) => kvm,
            Err(error @ KvmError::Open { .. }) => {
                eprintln!("not tested: {error}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let vm = Arc::new(Vm::new(&kvm, ram).unwrap());
        let supported = &kvm.capabilities().supported_cpuid;
        let vcpus = (0..vcpus)
            .map(|id| {
                let cpuid = cpuid::for_vcpu(supported, id, vcpus, &CpuTemplate::default());
                let vcpu = vm.create_vcpu(id).unwrap();
                vcpu.configure(&cpuid, &msr::at_boot()).unwrap();
                vcpu
            })
            .collect();
        let peer = Arc::new(Mutex::new(Peer { answer: 0, written: Vec::new() }));
        let mut bus = Bus::default();
        bus.pio.insert(PORT.into(), 1, Arc::clone(&peer) as _).unwrap();
        Some(Self { vcpus, vm, bus, peer })
    }

    /// One whose first vCPU is about to run `code`.
    fn with_code(vcpus: u8, code: &[u8]) -> Option<Self> {
        let ram = ram();
        let entry = Entry::Linux64 { address: CODE };
        entry.write_tables(&ram).unwrap();
        ram.write(code, GuestAddress(CODE)).unwrap();
        let guest = Self::new(vcpus, Arc::new(ram))?;
        guest.vcpus[0].enter_at(entry).unwrap();
        Some(guest)
    }

    /// Lets the first vCPU run up to its next exit that a device answered.
    fn step(&mut self) {
        loop {
            match self.vcpus[0].run(&self.bus) {
                VmExit::Handled => return,
                VmExit::Interrupted => {}
                VmExit::Ended(status) => panic!("{status}"),
            }
        }
    }

    /// What the guest has written since the last time.
    fn written(&self) -> Vec<u8> {
        std::mem::take(&mut self.peer.lock().unwrap().written)
    }
}

fn ram() -> GuestRam {
    GuestRam::fresh(&[(GuestAddress(0), RAM_BYTES)]).unwrap()
}
