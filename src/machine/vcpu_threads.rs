//! The threads that run vCPUs: one each, for the machine's whole life.
//!
//! A thread parks until it is given its vCPU, runs it until the guest ends or the host wants it
//! back, and gives it back. It may be started before its machine is there. So whoever holds the vCPUs knows that none of them runs: ownership
//! is the lock. The same thread always runs the same vCPU, because KVM makes a vCPU that changes
//! threads wait for an RCU grace period.
//!
//! Threads have every signal blocked (see `kvm::kick`) and are named `dormouse-vcpuN`.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SendError, Sender, TryRecvError, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::MachineError;
use crate::bus::Bus;
use crate::devices::VmGenId;
use crate::exit::{ExitLatch, ExitStatus};
use crate::kvm::{KickTarget, ThreadClock, Vcpu, Vm, VmExit, block_signals};
use crate::seccomp::{Confinement, SeccompError};
use crate::timings::FirstRun;

/// How long a thread looks for its vCPU before it sleeps: about as long as a machine is made in.
/// To wake it from its sleep on an idle processor takes 50 to 150 µs in a virtual machine.
const AWAKE: Duration = Duration::from_micros(500);

/// What a thread is told.
enum Call {
    /// A vCPU is about to come.
    Soon,
    Run(Vcpu),
}

/// Threads that no machine has yet: each confines itself, and parks.
///
/// They keep the VM from the start, so that dropping them is as cheap as that of [`VcpuThreads`].
#[derive(Debug)]
pub(crate) struct IdleThreads {
    // In this order, as in `VcpuThreads`.
    shared: Arc<Shared>,
    inboxes: Vec<Sender<Call>>,
}

/// One thread a vCPU.
///
/// Dropping it ends the threads, without waiting for them: the last one closes the VM and
/// unmaps its memory, which sleeps in the kernel for 1 to 15 ms.
#[derive(Debug)]
pub(crate) struct VcpuThreads {
    // In this order: a thread ends when its inbox closes, and it has to be one of the threads
    // that lets go of `shared`, and of the VM in it, last.
    shared: Arc<Shared>,
    inboxes: Vec<Sender<Call>>,
    first_run: Arc<FirstRun>,
}

/// The vCPUs are with their threads. Only [`VcpuThreads`] make one, so that a machine is
/// stopped only after it was run.
#[derive(Debug)]
pub(crate) struct Running(());

/// The vCPUs that could not be run.
#[derive(Debug)]
pub(crate) struct NotRun {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) error: MachineError,
}

struct Shared {
    /// Kept until the last thread ends.
    _vm: Arc<Vm>,
    /// What the vCPUs run in: there before the first of them comes.
    machine: OnceLock<Attached>,
    /// Asks every thread to give its vCPU back.
    stop: AtomicBool,
    parked: Mutex<Parked>,
    /// Signalled when a vCPU came back.
    came_back: Condvar,
}

/// What the threads need of a machine.
struct Attached {
    bus: Bus,
    exit: Arc<ExitLatch>,
    first_run: Arc<FirstRun>,
    /// Here because of its interrupt, which takes the kernel a while to close.
    _generation: Arc<VmGenId>,
}

#[derive(Default)]
struct Parked {
    /// Threads that can be kicked. Each enters itself before it takes its first vCPU; one that
    /// is not here yet looks at `stop` before it runs anything.
    kick: Vec<KickTarget>,
    /// Their processor time. They live for as long as their inboxes are open.
    clocks: Vec<ThreadClock>,
    /// vCPUs that came back.
    vcpus: Vec<Vcpu>,
}

impl IdleThreads {
    /// Starts `count` threads, which park. They confine themselves meanwhile, in about 0.2 ms.
    pub(crate) fn spawn(
        count: u8,
        confinement: Option<Confinement>,
        vm: Arc<Vm>,
    ) -> Result<Self, MachineError> {
        let shared = Arc::new(Shared {
            _vm: vm,
            machine: OnceLock::new(),
            stop: AtomicBool::new(false),
            parked: Mutex::default(),
            came_back: Condvar::new(),
        });
        let mut all = Self { shared, inboxes: Vec::new() };
        for id in 0..count {
            let (inbox, calls) = channel();
            let shared = Arc::clone(&all.shared);
            thread::Builder::new()
                .name(format!("dormouse-vcpu{id}"))
                .spawn(move || shared.serve(&calls, confinement))
                .map_err(|source| MachineError::Thread { id, source })?;
            all.inboxes.push(inbox);
        }
        Ok(all)
    }

    /// Wakes the threads while their machine is put together, which is work for another processor.
    pub(crate) fn rouse(&self) {
        for inbox in &self.inboxes {
            // A thread that is gone is found out about when it has something to run.
            let _ = inbox.send(Call::Soon);
        }
    }

    /// Gives the threads the machine that their vCPUs run in. Wakes none of them.
    pub(crate) fn attach(
        self,
        bus: Bus,
        exit: Arc<ExitLatch>,
        first_run: Arc<FirstRun>,
        generation: Arc<VmGenId>,
    ) -> VcpuThreads {
        let Self { shared, inboxes } = self;
        let machine =
            Attached { bus, exit, first_run: Arc::clone(&first_run), _generation: generation };
        shared.machine.get_or_init(|| machine);
        VcpuThreads { shared, inboxes, first_run }
    }
}

impl VcpuThreads {
    /// Gives each thread its vCPU; vCPU 0 is the first of `vcpus`, and so on. Where a thread is
    /// gone, all vCPUs come back.
    pub(crate) fn run(&self, vcpus: Vec<Vcpu>) -> Result<Running, NotRun> {
        self.shared.stop.store(false, Ordering::SeqCst);
        self.first_run.started();
        let mut unsent = Vec::new();
        for (inbox, vcpu) in self.inboxes.iter().zip(vcpus) {
            if let Err(SendError(Call::Run(vcpu))) = inbox.send(Call::Run(vcpu)) {
                unsent.push(vcpu);
            }
        }
        if unsent.is_empty() {
            return Ok(Running(()));
        }
        self.shared.stop_all();
        let mut vcpus = self.shared.wait_for(self.inboxes.len() - unsent.len());
        vcpus.append(&mut unsent);
        vcpus.sort_by_key(Vcpu::id);
        Err(NotRun { vcpus, error: MachineError::ThreadGone })
    }

    /// Keeps vCPUs that do not run, for whoever waits for them.
    pub(crate) fn keep(&self, vcpus: Vec<Vcpu>) -> Running {
        for vcpu in vcpus {
            self.shared.take_back(vcpu);
        }
        Running(())
    }

    /// Takes the vCPUs back, wherever they are in the guest. Returns when all have come: after
    /// one exit each, or as long as a console writer blocks.
    pub(crate) fn stop(&self, running: Running) -> Vec<Vcpu> {
        self.shared.stop_all();
        self.wait(running)
    }

    /// Waits for the guest's end, and for its vCPUs.
    pub(crate) fn wait(&self, Running(()): Running) -> Vec<Vcpu> {
        self.shared.wait_for(self.inboxes.len())
    }

    /// As [`wait`](Self::wait), but gives up after a time.
    pub(crate) fn wait_timeout(
        &self,
        running: Running,
        timeout: Duration,
    ) -> Result<Vec<Vcpu>, Running> {
        let parked = self.shared.lock();
        let waited = self
            .shared
            .came_back
            .wait_timeout_while(parked, timeout, |parked| parked.vcpus.len() < self.inboxes.len());
        let (mut parked, result) = waited.unwrap_or_else(PoisonError::into_inner);
        if result.timed_out() { Err(running) } else { Ok(parked.take_all()) }
    }

    /// How much processor time the threads have used since they began; a system call each.
    pub(crate) fn cpu_time(&self) -> Duration {
        self.shared.lock().clocks.iter().map(|clock| clock.read()).sum()
    }

    /// Stops the guest without waiting for it, before the machine is taken down.
    pub(crate) fn halt(&self) {
        self.shared.stop_all();
    }
}

impl Shared {
    /// A thread's life: vCPU after vCPU, until there will be no more.
    fn serve(&self, inbox: &Receiver<Call>, confinement: Option<Confinement>) {
        block_signals();
        if let Some(Err(error)) = confinement.map(Confinement::apply) {
            return self.refuse(inbox, &error);
        }
        self.enter();
        while let Some(mut vcpu) = next(inbox) {
            if let Some(machine) = self.machine.get() {
                self.serve_one(machine, &mut vcpu);
            }
            self.take_back(vcpu);
        }
    }

    fn enter(&self) {
        let mut parked = self.lock();
        parked.kick.push(KickTarget::current());
        parked.clocks.extend(ThreadClock::current());
    }

    /// Runs a vCPU until it is wanted back. A console writer of the embedding program may panic:
    /// that ends the guest, and neither the process nor the wait for the vCPU.
    fn serve_one(&self, machine: &Attached, vcpu: &mut Vcpu) {
        let run = catch_unwind(AssertUnwindSafe(|| self.run(machine, vcpu)));
        if run.is_err() {
            let reason = "a thread of the VMM panicked".to_owned();
            machine.exit.report(ExitStatus::Crashed { reason });
            self.stop_all();
        }
    }

    /// The life of a thread that cannot be confined: it runs nothing.
    fn refuse(&self, inbox: &Receiver<Call>, error: &SeccompError) {
        while let Some(vcpu) = next(inbox) {
            if let Some(machine) = self.machine.get() {
                let reason = format!("{error}; `VmConfig::seccomp(false)` does without");
                machine.exit.report(ExitStatus::Crashed { reason });
            }
            self.stop_all();
            self.take_back(vcpu);
        }
    }

    fn run(&self, machine: &Attached, vcpu: &mut Vcpu) {
        let Attached { bus, exit, first_run, .. } = machine;
        if vcpu.id() == 0 && !self.stop.load(Ordering::SeqCst) && first_run.entered() {
            let exit = vcpu.run(bus);
            first_run.left();
            self.after(machine, exit);
        }
        while !self.stop.load(Ordering::SeqCst) {
            let exit = vcpu.run(bus);
            self.after(machine, exit);
        }
        // The state of a guest that has ended is of no use to anybody.
        if exit.get().is_none() {
            let exit = vcpu.settle(bus);
            self.after(machine, exit);
        }
    }

    /// Ends the guest where the exit, or a device that handled it, says so.
    fn after(&self, machine: &Attached, exit: VmExit) {
        if let VmExit::Ended(status) = exit {
            machine.exit.report(status);
        }
        if machine.exit.get().is_some() {
            self.stop_all();
        }
    }

    /// Asks every thread for its vCPU. Under the lock, because a thread that has given its vCPU
    /// back may end, and its number be another thread's: no kick is under way any more when this
    /// returns, whoever set the flag.
    fn stop_all(&self) {
        let parked = self.lock();
        if !self.stop.swap(true, Ordering::SeqCst) {
            for target in &parked.kick {
                target.kick();
            }
        }
    }

    /// Waits until `count` vCPUs have come back, and takes them.
    fn wait_for(&self, count: usize) -> Vec<Vcpu> {
        let parked = self.lock();
        let waited = self.came_back.wait_while(parked, |parked| parked.vcpus.len() < count);
        waited.unwrap_or_else(PoisonError::into_inner).take_all()
    }

    fn take_back(&self, vcpu: Vcpu) {
        self.lock().vcpus.push(vcpu);
        self.came_back.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Waits for a thread's next vCPU. There is none any more when the machine is gone.
fn next(inbox: &Receiver<Call>) -> Option<Vcpu> {
    let mut call = inbox.recv().ok()?;
    loop {
        match call {
            Call::Soon => call = awake(inbox)?,
            Call::Run(vcpu) => return Some(vcpu),
        }
    }
}

/// Waits for a call, awake for a moment: whoever else wants the processor gets it.
fn awake(inbox: &Receiver<Call>) -> Option<Call> {
    let begin = Instant::now();
    while begin.elapsed() < AWAKE {
        match inbox.try_recv() {
            Ok(call) => return Some(call),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => thread::yield_now(),
        }
    }
    inbox.recv().ok()
}

impl Parked {
    /// All vCPUs, in the order of their numbers.
    fn take_all(&mut self) -> Vec<Vcpu> {
        let mut vcpus = std::mem::take(&mut self.vcpus);
        vcpus.sort_by_key(Vcpu::id);
        vcpus
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("stop", &self.stop).finish_non_exhaustive()
    }
}
