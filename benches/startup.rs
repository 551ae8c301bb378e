//! From nothing to the first instruction of a guest, beside the raw KVM calls for the same, and
//! what a drop costs. Bare-metal guest, so that it runs at full speed on any /dev/kvm.
//!
//! `cargo bench --bench startup` prints a table, with `-- --json` one JSON object a line; with
//! `-- --svg FILE` it draws the distributions.

#[path = "../tests/payload/guest.rs"]
mod guest;
mod report;

use std::io::{self, Write};
use std::sync::mpsc::{Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use dormouse::{Kernel, MicroVm, VmConfig};
use guest::Program;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use report::{Metric, Unit, micros, report};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const WARM_UP: usize = 10;
const ROUNDS: usize = 200;

fn main() {
    let mut metrics = Vec::new();
    for (size, memory_mib) in [("128 MiB", 128), ("4 GiB", 4096)] {
        let Samples { ours, floor, drops } = startup(memory_mib);
        let name = format!("create → first instruction, {size}");
        metrics.push(metric(name, ours, floor));
        let name = format!("drop of a running VM, {size}");
        metrics.push(metric(name, drops, Vec::new()));
    }
    report(&metrics, "raw KVM");
}

fn metric(name: String, ours: Vec<f64>, floor: Vec<f64>) -> Metric {
    Metric { name, unit: Unit::Micros, ours, floor, bar: None }
}

#[derive(Default)]
struct Samples {
    ours: Vec<f64>,
    floor: Vec<f64>,
    drops: Vec<f64>,
}

/// Measures ours and the floor in turn, so that both see the same machine.
fn startup(memory_mib: u32) -> Samples {
    let kernel = Kernel::bytes(guest::elf(&Program::Halt));
    let code = guest::code(&Program::Halt);
    let kvm = Kvm::new().expect("/dev/kvm");
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
    let mut samples = Samples::default();
    for round in 0..WARM_UP + ROUNDS {
        let (ours, drop) = dormouse(&kernel, memory_mib);
        settle();
        let floor = raw_kvm(&code, &cpuid, u64::from(memory_mib) << 20);
        settle();
        if round >= WARM_UP {
            samples.ours.push(micros(ours));
            samples.floor.push(micros(floor));
            samples.drops.push(micros(drop));
        }
    }
    samples
}

/// Lets the kernel finish with the VM before: closing one sleeps in RCU grace periods.
fn settle() {
    thread::sleep(Duration::from_millis(25));
}

/// `MicroVm::create` and `start` until the guest's first byte, and the drop of the VM.
fn dormouse(kernel: &Kernel, memory_mib: u32) -> (Duration, Duration) {
    let (sender, receiver) = channel();
    let config = VmConfig::new(kernel.clone()).memory_mib(memory_mib).console(FirstByte(sender));
    let begin = Instant::now();
    let vm = MicroVm::create(config).expect("create").start().expect("start");
    let first = receiver.recv().expect("the guest's first byte");
    let drop_begin = Instant::now();
    drop(vm);
    (first - begin, drop_begin.elapsed())
}

/// Sends the instant of each write.
struct FirstByte(Sender<Instant>);

impl Write for FirstByte {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(Instant::now());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The floor: the system calls that the same guest cannot do without, in the fastest order, with
/// nothing of ours around them. The supported CPUID was read before, as it is by the library.
fn raw_kvm(code: &[u8], cpuid: &CpuId, memory_bytes: u64) -> Duration {
    let begin = Instant::now();
    let hole = 0xc000_0000;
    let low = memory_bytes.min(hole);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if memory_bytes > low {
        ranges.push((GuestAddress(1 << 32), (memory_bytes - low) as usize));
    }
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).expect("memory");
    let kvm = Kvm::new().expect("/dev/kvm");
    let vm = kvm.create_vm().expect("KVM_CREATE_VM");
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the memory outlives the VM, which is closed before it below.
        unsafe { vm.set_user_memory_region(region) }.expect("memory slot");
    }
    vm.create_irq_chip().expect("KVM_CREATE_IRQCHIP");
    let mut vcpu = vm.create_vcpu(0).expect("KVM_CREATE_VCPU");
    vcpu.set_cpuid2(cpuid).expect("KVM_SET_CPUID2");

    memory.write_slice(code, GuestAddress(guest::ADDRESS)).expect("code");
    memory.write_obj(0xa003u64, GuestAddress(0x9000)).expect("PML4");
    memory.write_obj(0xb003u64, GuestAddress(0xa000)).expect("PDPT");
    let first_gib: Vec<u8> =
        (0..512u64).flat_map(|page| ((page << 21) | 0x83).to_le_bytes()).collect();
    memory.write_slice(&first_gib, GuestAddress(0xb000)).expect("PD");

    let mut sregs = vcpu.get_sregs().expect("KVM_GET_SREGS");
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, 0x9000, 0x20, 0x500);
    vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
    let mut regs = vcpu.get_regs().expect("KVM_GET_REGS");
    (regs.rip, regs.rflags) = (guest::ADDRESS, 2);
    vcpu.set_regs(&regs).expect("KVM_SET_REGS");
    match vcpu.run().expect("KVM_RUN") {
        VcpuExit::IoOut(0x3f8, b"B") => {}
        exit => panic!("the guest's first exit is {exit:?}"),
    }
    let elapsed = begin.elapsed();
    drop((vcpu, vm, kvm));
    drop(memory);
    elapsed
}
