//! The floor: the same guest restored by the KVM calls that it cannot do without, in the fastest
//! order and with nothing around them. Its state was read from a raw VM before, its memory is a
//! file on a tmpfs, as that of a snapshot.

use std::fs::File;
use std::io::Error;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_lapic_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{Bytes, VolatileSlice};

use crate::guest::{self, Program};
use crate::scratch::Scratch;

/// A guest that writes dots, between two of them.
pub struct Saved {
    memory: File,
    bytes: usize,
    cpuid: CpuId,
    /// Those that are not as in a new vCPU, and the TSC.
    msrs: Msrs,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: Xsave,
    lapic: kvm_lapic_state,
    events: kvm_vcpu_events,
}

impl Saved {
    /// Runs the guest in a raw VM until it writes dots, and reads what it is then.
    pub fn new(scratch: &Scratch, memory_mib: u32, fill_mib: u8) -> Self {
        let bytes = (memory_mib as usize) << 20;
        let memory = scratch.file("floor-memory");
        memory.set_len(bytes as u64).expect("a sparse file");
        let kvm = Kvm::new().expect("/dev/kvm");
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).expect("CPUID");
        let ram = Mapping::reserve(bytes);
        ram.back(&memory, libc::MAP_SHARED);
        ram.load(&guest::code(&Program::Memory));
        let (vm, mut vcpu) = assemble(&kvm, &ram, &cpuid);
        let indexes = kvm.get_msr_index_list().expect("KVM_GET_MSR_INDEX_LIST");
        let fresh = read_msrs(&vcpu, indexes.as_slice());
        enter(&vcpu);
        run_until_dots(&mut vcpu, &[b'f', fill_mib, b'x']);
        let msrs = changed(&vcpu, &fresh, read_msrs(&vcpu, indexes.as_slice()));
        let saved = Self {
            memory,
            bytes,
            cpuid,
            msrs: Msrs::from_entries(&msrs).expect("a few MSRs"),
            regs: vcpu.get_regs().expect("KVM_GET_REGS"),
            sregs: vcpu.get_sregs().expect("KVM_GET_SREGS"),
            xsave: xsave(&vm, &vcpu),
            lapic: vcpu.get_lapic().expect("KVM_GET_LAPIC"),
            events: vcpu.get_vcpu_events().expect("KVM_GET_VCPU_EVENTS"),
        };
        drop((vcpu, vm));
        saved
    }

    /// From nothing to the first dot, on the calling thread.
    pub fn cold(&self) -> Duration {
        let begin = Instant::now();
        let kvm = Kvm::new().expect("/dev/kvm");
        let ram = Mapping::reserve(self.bytes);
        ram.back(&self.memory, libc::MAP_PRIVATE);
        let (vm, mut vcpu) = assemble(&kvm, &ram, &self.cpuid);
        self.set_registers(&vcpu);
        let elapsed = first_dot(&mut vcpu) - begin;
        drop((vcpu, vm));
        elapsed
    }

    /// A VM without memory and registers, and the thread that will run it.
    pub fn prepare(&self) -> Prepared<'_> {
        let kvm = Kvm::new().expect("/dev/kvm");
        let ram = Mapping::reserve(self.bytes);
        let (vm, vcpu) = assemble(&kvm, &ram, &self.cpuid);
        let (inbox, vcpus) = channel::<VcpuFd>();
        let (sender, first) = channel();
        thread::spawn(move || {
            if let Ok(mut vcpu) = vcpus.recv() {
                let instant = first_dot(&mut vcpu);
                sender.send((instant, vcpu)).expect("somebody measures");
            }
        });
        Prepared { saved: self, vcpu, inbox, first, _vm: vm, ram }
    }

    fn set_registers(&self, vcpu: &VcpuFd) {
        vcpu.set_regs(&self.regs).expect("KVM_SET_REGS");
        vcpu.set_sregs(&self.sregs).expect("KVM_SET_SREGS");
        // SAFETY: the area has the length that KVM gave for a VM with the same CPUID.
        unsafe { vcpu.set_xsave2(&self.xsave) }.expect("KVM_SET_XSAVE");
        vcpu.set_lapic(&self.lapic).expect("KVM_SET_LAPIC");
        let written = vcpu.set_msrs(&self.msrs).expect("KVM_SET_MSRS");
        assert_eq!(written, self.msrs.as_slice().len(), "an MSR is refused");
        vcpu.set_vcpu_events(&self.events).expect("KVM_SET_VCPU_EVENTS");
    }
}

/// What [`Saved::prepare`] makes: its memory goes last.
pub struct Prepared<'a> {
    saved: &'a Saved,
    vcpu: VcpuFd,
    inbox: Sender<VcpuFd>,
    first: Receiver<(Instant, VcpuFd)>,
    _vm: VmFd,
    ram: Mapping,
}

impl Prepared<'_> {
    /// Memory and registers: all that is left but KVM_RUN.
    pub fn restore(&self) {
        self.ram.back(&self.saved.memory, libc::MAP_PRIVATE);
        self.saved.set_registers(&self.vcpu);
    }

    /// Until the first dot, on the thread that waits.
    pub fn run(self) -> Instant {
        self.inbox.send(self.vcpu).expect("a thread that waits");
        let (instant, vcpu) = self.first.recv().expect("a dot");
        drop(vcpu);
        instant
    }
}

/// A VM with its memory slot, interrupt controllers and one vCPU, in the order that waits for no
/// grace period.
fn assemble(kvm: &Kvm, ram: &Mapping, cpuid: &CpuId) -> (VmFd, VcpuFd) {
    let vm = kvm.create_vm().expect("KVM_CREATE_VM");
    let region = kvm_userspace_memory_region {
        slot: 0,
        guest_phys_addr: 0,
        memory_size: ram.bytes as u64,
        userspace_addr: ram.address as u64,
        flags: 0,
    };
    // SAFETY: whoever calls this closes the VM before the mapping goes.
    unsafe { vm.set_user_memory_region(region) }.expect("memory slot");
    vm.create_irq_chip().expect("KVM_CREATE_IRQCHIP");
    let vcpu = vm.create_vcpu(0).expect("KVM_CREATE_VCPU");
    vcpu.set_cpuid2(cpuid).expect("KVM_SET_CPUID2");
    (vm, vcpu)
}

/// The registers of the 64-bit Linux entry.
fn enter(vcpu: &VcpuFd) {
    let mut sregs = vcpu.get_sregs().expect("KVM_GET_SREGS");
    let flat = kvm_segment { limit: u32::MAX, present: 1, s: 1, g: 1, ..Default::default() };
    sregs.cs = kvm_segment { selector: 8, type_: 0xb, l: 1, ..flat };
    let data = kvm_segment { selector: 16, type_: 3, db: 1, ..flat };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8000_0011, 0x9000, 0x20, 0x500);
    vcpu.set_sregs(&sregs).expect("KVM_SET_SREGS");
    let regs = kvm_regs { rip: guest::ADDRESS, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).expect("KVM_SET_REGS");
}

/// Types `input` at the guest until it writes dots, and stops it where no exit is half done.
fn run_until_dots(vcpu: &mut VcpuFd, mut input: &[u8]) {
    loop {
        match vcpu.run().expect("KVM_RUN") {
            VcpuExit::IoIn(0x3fd, status) => status[0] = u8::from(!input.is_empty()),
            VcpuExit::IoIn(0x3f8, data) => {
                data[0] = input.split_off_first().copied().expect("a byte that was announced");
            }
            VcpuExit::IoOut(0x3f8, b".") => break,
            VcpuExit::IoOut(0x3f8, _) => {}
            exit => panic!("an exit that the guest does not make: {exit:?}"),
        }
    }
    // KVM finishes the `out` on the way in, and goes no further.
    vcpu.set_kvm_immediate_exit(1);
    let error = vcpu.run().expect_err("an immediate exit");
    assert_eq!(error.errno(), libc::EINTR);
    vcpu.set_kvm_immediate_exit(0);
}

fn first_dot(vcpu: &mut VcpuFd) -> Instant {
    match vcpu.run().expect("KVM_RUN") {
        VcpuExit::IoOut(0x3f8, b".") => Instant::now(),
        exit => panic!("the guest's first exit is {exit:?}"),
    }
}

/// Those that there are, one by one, since KVM_GET_MSRS stops at one that is not there.
fn read_msrs(vcpu: &VcpuFd, indexes: &[u32]) -> Vec<kvm_msr_entry> {
    let read = |&index: &u32| {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut one = Msrs::from_entries(&[entry]).expect("one MSR");
        let count = vcpu.get_msrs(&mut one).unwrap_or(0);
        one.as_slice().first().copied().filter(|_| count == 1)
    };
    indexes.iter().filter_map(read).collect()
}

/// What a restore has to write: what is not as it was, and can be written.
fn changed(vcpu: &VcpuFd, fresh: &[kvm_msr_entry], now: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    let is_new = |entry: &kvm_msr_entry| {
        !fresh.iter().any(|fresh| fresh.index == entry.index && fresh.data == entry.data)
    };
    let is_accepted = |entry: &kvm_msr_entry| {
        let one = Msrs::from_entries(&[*entry]).expect("one MSR");
        vcpu.set_msrs(&one) == Ok(1)
    };
    now.into_iter().filter(is_new).filter(is_accepted).collect()
}

fn xsave(vm: &VmFd, vcpu: &VcpuFd) -> Xsave {
    let bytes = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    let mut area = Xsave::new(bytes.div_ceil(4).saturating_sub(1024)).expect("an XSAVE area");
    // SAFETY: the area has the length that KVM gives for this VM.
    unsafe { vcpu.get_xsave2(&mut area) }.expect("KVM_GET_XSAVE2");
    area
}

/// Addresses of the host that are a guest's memory.
struct Mapping {
    address: *mut libc::c_void,
    bytes: usize,
}

impl Mapping {
    /// Addresses alone: nothing is there.
    fn reserve(bytes: usize) -> Self {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, where the kernel likes.
        let address = unsafe { libc::mmap(ptr::null_mut(), bytes, libc::PROT_NONE, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED, "{}", Error::last_os_error());
        Self { address, bytes }
    }

    /// Puts a file there.
    fn back(&self, file: &File, flags: libc::c_int) {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_FIXED);
        let (address, bytes, fd) = (self.address, self.bytes, file.as_raw_fd());
        // SAFETY: the addresses are this value's, and no reference to them exists.
        let mapped = unsafe { libc::mmap(address, bytes, protection, flags, fd, 0) };
        assert_eq!(mapped, address, "{}", Error::last_os_error());
    }

    /// The guest's code, and page tables that map the first GiB as it is.
    fn load(&self, code: &[u8]) {
        // SAFETY: the addresses are this value's, mapped to write, and nobody else's yet.
        let ram = unsafe { VolatileSlice::new(self.address.cast(), self.bytes) };
        let first_gib = (0..512u64).flat_map(|page| ((page << 21) | 0x83).to_le_bytes());
        write(&ram, code, guest::ADDRESS);
        write(&ram, &0xa003u64.to_le_bytes(), 0x9000);
        write(&ram, &0xb003u64.to_le_bytes(), 0xa000);
        write(&ram, &first_gib.collect::<Vec<u8>>(), 0xb000);
    }
}

fn write<B: BitmapSlice>(ram: &VolatileSlice<B>, bytes: &[u8], at: u64) {
    ram.write_slice(bytes, at as usize).expect("an address of RAM");
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the addresses are this value's, and the VM that used them is closed.
        unsafe { libc::munmap(self.address, self.bytes) };
    }
}
