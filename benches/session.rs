//! What sessions cost: a thousand that sleep, the first answer of one that slept beside the bare resume of the same VM and the
//! same question, and a hundred of these at once. Bare-metal guest, so that it runs at full speed on any /dev/kvm; all
//! files are on a tmpfs.
//!
//! `cargo bench --bench session` prints a table, with `-- --json` one JSON object a line; with
//! `-- --svg FILE` it draws the distributions.

#[path = "../tests/payload/guest.rs"]
mod guest;
#[path = "session/held.rs"]
mod held;
mod report;
#[path = "snapshot/scratch.rs"]
mod scratch;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use dormouse::{
    Kernel, MicroVm, RestoreOptions, Running, Session, SessionOptions, SessionPolicy, Sessions,
    Snapshot, Suspended, VmConfig,
};
use guest::Program;
use held::{Held, wakeups_in_a_second};
use report::{Bar, Metric, Unit, micros, report};
use scratch::Scratch;
use tokio::runtime::{Builder, Runtime};

/// Sessions that sleep.
const MANY: usize = 1000;
/// Sessions that wake at once.
const AT_ONCE: usize = 100;
const WARM_UP: usize = 5;
const ROUNDS: usize = 100;
const ROUNDS_AT_ONCE: usize = 5;

fn main() {
    let scratch = Scratch::new();
    let halted = base(&scratch, "halted", &Program::Halt);
    let mut metrics = many(&scratch, &halted);
    let echoes = base(&scratch, "echoes", &Program::Echo);
    metrics.push(one(&scratch, &echoes));
    metrics.push(at_once(&scratch, &echoes));
    // `Metric`s of one unit make one table.
    metrics.sort_by_key(|metric| metric.unit as u8);
    report(&metrics, "the bare resume");
}

/// A guest that is up, as files that others come from.
fn base(scratch: &Scratch, name: &str, program: &Program) -> Snapshot {
    let kernel = Kernel::bytes(guest::elf(program));
    let vm = MicroVm::create(VmConfig::new(kernel).memory_mib(256)).expect("create");
    let vm = vm.start().expect("start");
    while vm.console().tail().is_empty() {
        thread::sleep(Duration::from_millis(1));
    }
    vm.pause().expect("pause").snapshot(scratch.empty(name)).expect("a snapshot")
}

/// A guest of this base, and what it says.
fn restored(base: &Snapshot) -> (MicroVm<Running>, Said) {
    let (sender, said) = channel();
    let options = RestoreOptions::new().console(Console(sender));
    let vm = base.restore_with(&options).expect("restore").resume().expect("resume");
    (vm, Said(said))
}

struct Console(Sender<u8>);

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for &byte in bytes {
            let _ = self.0.send(byte);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Said(Receiver<u8>);

impl Said {
    /// Asks a guest that echoes, and waits for the answer.
    fn ask(&self, vm: &MicroVm<Running>) {
        type_in(vm);
        self.answer();
    }

    fn answer(&self) {
        while self.0.recv_timeout(Duration::from_secs(30)).expect("an answer") != b'a' {}
    }
}

fn type_in(vm: &MicroVm<Running>) {
    vm.console_input(b"a").expect("a running guest");
}

fn runtime() -> Runtime {
    let mut runtime = Builder::new_multi_thread();
    runtime.worker_threads(2).enable_all();
    // Threads for work that blocks end before anything is measured.
    runtime.thread_keep_alive(Duration::from_millis(100)).build().expect("a runtime")
}

/// A session of this base that sleeps, with a timer.
async fn asleep(sessions: &Sessions, base: &Snapshot) -> (Session, Said) {
    let month = Duration::from_secs(30 * 86_400);
    let policy = SessionPolicy::new().idle_after(month).suspended_at_most(month).lifetime(month);
    let options = SessionOptions::new().policy(policy);
    let (vm, said) = restored(base);
    let session = sessions.start(vm, options).await.expect("a session");
    session.suspend().await.expect("suspend");
    (session, said)
}

/// Asks the guest of a session, which is awake.
fn ask(session: &Session, said: &Said) {
    session.with_vm(|vm| said.ask(vm)).expect("a session that runs");
}

/// What sleeping sessions cost: in the process that put them to sleep, and in one that found them.
fn many(scratch: &Scratch, base: &Snapshot) -> Vec<Metric> {
    let directory = scratch.empty("many");
    let runtime = runtime();
    let sessions = runtime.block_on(Sessions::open(&directory)).expect("sessions");
    // What the first ones make the allocator and the runtime keep is not theirs.
    let new = || runtime.block_on(asleep(&sessions, base)).0;
    let warm: Vec<_> = (0..50).map(|_| new()).collect();
    quiet();
    let before = Held::now();
    let all: Vec<_> = (0..MANY).map(|_| new()).collect();
    quiet();
    let kept = Held::now().since(&before);
    let wakeups = wakeups_in_a_second();
    drop((warm, all, sessions));
    runtime.shutdown_timeout(Duration::from_secs(10));
    quiet();

    let runtime = self::runtime();
    let before = Held::now();
    let begin = Instant::now();
    let sessions = runtime.block_on(Sessions::open(&directory)).expect("sessions");
    let opened = begin.elapsed();
    quiet();
    let count = sessions.list().len();
    let found = Held::now().since(&before);
    drop(sessions);
    runtime.shutdown_timeout(Duration::from_secs(10));
    assert_eq!(count, MANY + 50);
    let kib = |held: &Held, count: usize| held.bytes as f64 / 1024.0 / count as f64;
    vec![
        figure("a suspended session of 1,000", Unit::Kib, kib(&kept, MANY), Bar::AtMost(64.0)),
        figure("one that was found again", Unit::Kib, kib(&found, count), Bar::AtMost(64.0)),
        figure(
            "descriptors and threads of 1,000",
            Unit::Count,
            kept.descriptors_and_threads as f64,
            Bar::AtMost(0.0),
        ),
        figure("wake-ups for 1,000", Unit::PerSecond, wakeups, Bar::AtMost(0.0)),
        Metric {
            name: format!("opening a directory with {count}"),
            unit: Unit::Micros,
            ours: vec![micros(opened)],
            floor: Vec::new(),
            bar: None,
        },
    ]
}

/// The first answer of a session that sleeps, and of a bare VM of the same base, in turn.
fn one(scratch: &Scratch, base: &Snapshot) -> Metric {
    let runtime = runtime();
    let sessions = runtime.block_on(Sessions::open(scratch.empty("one"))).expect("sessions");
    let (session, said) = runtime.block_on(asleep(&sessions, base));
    let place = scratch.empty("bare");
    let (mut vm, bare_said) = suspended(base, place.clone());
    let mut metric = times("first answer of a session that sleeps", 1.5);
    for round in 0..WARM_UP + ROUNDS {
        settle();
        let begin = Instant::now();
        let awake = runtime.block_on(session.wake()).expect("wake");
        ask(&session, &said);
        let ours = begin.elapsed();
        drop(awake);
        runtime.block_on(session.suspend()).expect("suspend");
        settle();
        let begin = Instant::now();
        let woken = vm.resume().expect("resume");
        bare_said.ask(&woken);
        let floor = begin.elapsed();
        vm = woken.suspend(&place).expect("suspend");
        if round >= WARM_UP {
            metric.ours.push(micros(ours));
            metric.floor.push(micros(floor));
        }
    }
    drop(vm.terminate());
    metric
}

/// A hundred sessions that are asked at once while they sleep, and as many bare VMs, until the last has answered. Each
/// sleeps again when it has.
fn at_once(scratch: &Scratch, base: &Snapshot) -> Metric {
    let runtime = runtime();
    let sessions = runtime.block_on(Sessions::open(scratch.empty("at-once"))).expect("sessions");
    let mut all: Vec<_> = (0..AT_ONCE).map(|_| runtime.block_on(asleep(&sessions, base))).collect();
    let places = (0..AT_ONCE).map(|number| scratch.empty(&format!("bare-{number}")));
    let places: Vec<_> = places.collect();
    let mut bare: Vec<_> = places.iter().map(|place| suspended(base, place.clone())).collect();
    let mut metric = times("100 of them at once, until all have answered", 1.5);
    for round in 0..1 + ROUNDS_AT_ONCE {
        settle();
        let begin = Instant::now();
        let ours = runtime.block_on(async {
            let tasks = all.drain(..).map(|(session, said)| {
                tokio::spawn(async move {
                    let awake = session.wake().await.expect("wake");
                    let asked = session.clone();
                    let blocking = tokio::task::spawn_blocking(move || {
                        ask(&asked, &said);
                        (said, Instant::now())
                    });
                    let (said, answered) = blocking.await.expect("a thread");
                    drop(awake);
                    session.suspend().await.expect("suspend");
                    ((session, said), answered)
                })
            });
            let mut last = begin;
            for task in tasks.collect::<Vec<_>>() {
                let (session, answered) = task.await.expect("a task");
                all.push(session);
                last = last.max(answered);
            }
            last.duration_since(begin)
        });
        settle();
        let begin = Instant::now();
        let floor = runtime.block_on(async {
            let tasks = bare.drain(..).zip(places.clone()).map(|((vm, said), place)| {
                tokio::task::spawn_blocking(move || {
                    let vm = vm.resume().expect("resume");
                    said.ask(&vm);
                    let answered = Instant::now();
                    ((vm.suspend(place).expect("suspend"), said), answered)
                })
            });
            let mut last = begin;
            for task in tasks.collect::<Vec<_>>() {
                let (vm, answered) = task.await.expect("a thread");
                bare.push(vm);
                last = last.max(answered);
            }
            last.duration_since(begin)
        });
        if round >= 1 {
            metric.ours.push(micros(ours));
            metric.floor.push(micros(floor));
        }
    }
    metric
}

fn suspended(base: &Snapshot, place: PathBuf) -> (MicroVm<Suspended>, Said) {
    let (vm, said) = restored(base);
    (vm.suspend(place).expect("suspend"), said)
}

fn times(name: &str, bar: f64) -> Metric {
    let bar = Some(Bar::AtMost(bar));
    Metric { name: name.into(), unit: Unit::Micros, ours: Vec::new(), floor: Vec::new(), bar }
}

fn figure(name: &str, unit: Unit, value: f64, bar: Bar) -> Metric {
    Metric { name: name.into(), unit, ours: vec![value], floor: Vec::new(), bar: Some(bar) }
}

/// Waits until the runtime's idle threads have ended.
fn quiet() {
    thread::sleep(Duration::from_secs(1));
}

/// Lets the kernel finish with the VMs before, and what was begun behind a call be done.
fn settle() {
    thread::sleep(Duration::from_millis(50));
}
