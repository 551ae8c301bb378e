//! Sessions of bare-metal guests: they have no agent, so no hooks and no ports, and everything else.

mod activity;
#[cfg(feature = "endpoint")]
mod endpoint;
mod faults;
mod recovery;

use std::future::{Future, poll_fn};
use std::path::{Path, PathBuf};
use std::task::Poll;
use std::time::Duration;

use dormouse::{
    AnyMicroVm, Error, ErrorKind, Lost, MicroVm, RestoreOptions, Session, SessionEvents,
    SessionOptions, SessionPolicy, SessionReason, SessionState, Sessions,
};

use crate::guest::Program;
use crate::scratch::Scratch;
use crate::{PATIENCE, config, output};

/// A time that is over at once for a test, and not for a guest.
const SHORT: Duration = Duration::from_millis(60);

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).enable_all().build().unwrap();
    let done = runtime.block_on(async { tokio::time::timeout(2 * PATIENCE, future).await });
    runtime.shutdown_timeout(PATIENCE);
    done.expect("an end")
}

/// A directory of sessions that goes with the test.
struct House {
    scratch: Scratch,
    sessions: Sessions,
}

impl House {
    async fn new() -> Self {
        let scratch = Scratch::new();
        let sessions = Sessions::open(scratch.join("sessions")).await.unwrap();
        Self { scratch, sessions }
    }

    fn path(&self) -> PathBuf {
        self.scratch.join("sessions")
    }

    /// A session of a guest with this program.
    async fn start(&self, program: &Program, policy: SessionPolicy) -> Session {
        let vm = MicroVm::create(config(program)).unwrap();
        self.sessions.start(vm, SessionOptions::new().policy(policy)).await.unwrap()
    }

    /// A session of a guest that waits for ever.
    async fn halted(&self, policy: SessionPolicy) -> Session {
        self.start(&Program::Halt, policy).await
    }
}

/// The states and reasons of the next events.
async fn told(events: &mut SessionEvents, count: usize) -> Vec<(SessionState, SessionReason)> {
    let mut told = Vec::new();
    for _ in 0..count {
        let event = tokio::time::timeout(PATIENCE, events.next()).await;
        let event = event.expect("an event in time").expect("an event");
        told.push((event.state, event.reason));
    }
    told
}

async fn until(session: &Session, state: SessionState) {
    let mut watch = session.watch();
    let there = tokio::time::timeout(PATIENCE, watch.wait_for(state)).await;
    let event = there.unwrap_or_else(|_| panic!("{session:?} never is {state}"));
    assert!(event.is_some(), "{:?}", watch.event());
}

/// The sessions of a directory whose last handles were dropped: their keepers are tasks, and end a little later.
async fn reopened(directory: &Path) -> Sessions {
    loop {
        match Sessions::open(directory).await {
            Ok(sessions) => return sessions,
            Err(error) => assert_eq!(error.kind(), &ErrorKind::Session, "{error:?}"),
        }
        tokio::time::sleep(SHORT / 10).await;
    }
}

fn kind<T>(result: Result<T, Error>) -> ErrorKind {
    match result {
        Ok(_) => panic!("it was done"),
        Err(error) => error.kind().clone(),
    }
}

#[test]
fn a_session_sleeps_wakes_and_ends_as_it_is_asked_and_asking_twice_is_asking_once() {
    use SessionReason::{Requested, Started, Traffic};
    use SessionState::{Pending, Running, Suspended, Suspending, Terminated, Terminating};
    block_on(async {
        let house = House::new().await;
        let mut all = house.sessions.events();
        let (writer, output) = output();
        let vm = MicroVm::create(config(&Program::Memory).console(writer)).unwrap();
        let options = SessionOptions::new().id("alice");
        let session = house.sessions.start(vm, options).await.unwrap();
        assert_eq!((session.id(), session.state()), ("alice", Running));
        assert_eq!([output.next(), output.next()], *b"B>");
        type_in(&session, b"w\x0a\x01");
        assert_eq!(output.next(), b'w');

        for _ in 0..2 {
            session.suspend().await.unwrap();
            assert_eq!(session.state(), Suspended);
        }
        assert!(session.with_vm(|_| ()).is_none());
        for _ in 0..2 {
            session.resume().await.unwrap();
            assert_eq!(session.state(), Running);
        }
        session.suspend().await.unwrap();
        drop(session.wake().await.unwrap());
        // The same guest, with the same console.
        type_in(&session, b"s\x14");
        assert_eq!([output.next(), output.next(), output.next(), output.next()], [10, 0, 0, 0]);

        for _ in 0..2 {
            session.terminate().await.unwrap();
            assert_eq!(session.state(), Terminated);
        }
        let sleep = [(Suspending, Requested), (Suspended, Requested)];
        let events = [
            &[(Pending, Started), (Running, Started)][..],
            &sleep,
            &[(Running, Requested)],
            &sleep,
            &[(Running, Traffic), (Terminating, Requested), (Terminated, Requested)],
        ];
        let events = events.concat();
        assert_eq!(told(&mut all, events.len()).await, events);
        assert!(all.try_next().is_none());
        assert_eq!(kind(session.suspend().await), ErrorKind::SessionEnded);
        assert_eq!(kind(session.resume().await), ErrorKind::SessionEnded);
        assert_eq!(kind(session.wake().await), ErrorKind::SessionEnded);
        assert_eq!(kind(session.set_policy(SessionPolicy::new()).await), ErrorKind::SessionEnded);
        assert!(session.events().next().await.is_none());
        // It is known until it is removed, and its name is taken.
        assert_eq!(house.sessions.get("alice").unwrap().state(), Terminated);
        let vm = MicroVm::create(config(&Program::Halt)).unwrap();
        let again = house.sessions.start_with_id("alice", vm, SessionOptions::new()).await;
        assert_eq!(kind(again), ErrorKind::Session);
        house.sessions.remove("alice").await.unwrap();
        assert!(house.sessions.get("alice").is_none());
        assert_eq!(std::fs::read_dir(house.path()).unwrap().count(), 1);
        let vm = MicroVm::create(config(&Program::Halt)).unwrap();
        house.sessions.start_with_id("alice", vm, SessionOptions::new()).await.unwrap();
        assert_eq!(kind(house.sessions.remove("alice").await), ErrorKind::Session);
        assert_eq!(kind(house.sessions.remove("bob").await), ErrorKind::Session);
    });
}

fn type_in(session: &Session, bytes: &[u8]) {
    session.with_vm(|vm| vm.console_input(bytes)).expect("a VM that runs").unwrap();
}

#[test]
fn a_watch_sees_changes_in_their_order_until_the_session_is_over() {
    use SessionState::{Running, Suspended, Suspending, Terminated, Terminating};
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new()).await;
        let mut watch = session.watch();
        assert_eq!((watch.state(), watch.event().state), (Running, Running));
        let watching = tokio::spawn(async move {
            let mut seen = Vec::new();
            while let Some(event) = watch.changed().await {
                seen.push(event.state);
            }
            (seen, watch.changed().await)
        });
        session.suspend().await.unwrap();
        session.resume().await.unwrap();
        session.terminate().await.unwrap();
        let (seen, after) = watching.await.unwrap();
        // Those that came one after the other at once may be one to it; the last is always seen.
        let mut all = [Suspending, Suspended, Running, Terminating, Terminated].into_iter();
        assert!(seen.iter().all(|state| all.any(|one| one == *state)), "{seen:?}");
        assert_eq!((seen.last(), after), (Some(&Terminated), None));
    });
}

#[test]
fn a_vm_of_any_state_becomes_a_session_but_one_that_is_over() {
    block_on(async {
        let house = House::new().await;
        let create = || MicroVm::create(config(&Program::Halt)).unwrap();
        let start = || create().start().unwrap();
        let vms: [AnyMicroVm; 5] = [
            create().into(),
            start().into(),
            start().pause().unwrap().into(),
            start().suspend(house.scratch.join("asleep")).unwrap().into(),
            start().pause().unwrap().suspend_in_memory().unwrap().into(),
        ];
        for vm in vms {
            let name = vm.state_name();
            let session = house.sessions.start(vm, SessionOptions::new()).await.unwrap();
            assert_eq!(session.state(), SessionState::Running, "{name}");
            session.suspend().await.unwrap();
            session.resume().await.unwrap();
        }
        assert_eq!(house.sessions.list().len(), 5);
        let over = house.sessions.start_with_id("over", start().terminate(), SessionOptions::new());
        assert_eq!(kind(over.await), ErrorKind::Config);
        assert!(house.sessions.get("over").is_none());
        for id in ["", "A", "a.b", "-"] {
            let refused = house.sessions.start_with_id(id, create(), SessionOptions::new()).await;
            assert_eq!(kind(refused), ErrorKind::Config);
        }
        house.sessions.suspend_all().await.unwrap();
        let states = house.sessions.list().into_iter().map(|session| session.state());
        assert_eq!(states.filter(|state| *state == SessionState::Suspended).count(), 5);
    });
}

#[test]
fn a_hundred_that_want_it_at_once_make_one_resume() {
    use SessionReason::{Requested, Traffic};
    use SessionState::{Running, Suspended, Suspending};
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new()).await;
        let mut events = session.events();
        // In the middle of going to sleep, too.
        let suspending = tokio::spawn({
            let session = session.clone();
            async move { session.suspend().await }
        });
        assert_eq!(told(&mut events, 1).await, [(Suspending, Requested)]);
        let wakes: Vec<_> = (0..100)
            .map(|_| {
                let session = session.clone();
                tokio::spawn(async move { session.wake().await })
            })
            .collect();
        for wake in wakes {
            drop(wake.await.unwrap().unwrap());
            assert_eq!(session.state(), Running);
        }
        suspending.await.unwrap().unwrap();
        assert_eq!(told(&mut events, 2).await, [(Suspended, Requested), (Running, Traffic)]);
        let others = (0..100).map(|_| {
            let session = session.clone();
            tokio::spawn(async move { session.suspend().await })
        });
        for other in others.collect::<Vec<_>>() {
            other.await.unwrap().unwrap();
        }
        let (suspend, resume) = (session.clone(), session.clone());
        let ends = tokio::join!(session.terminate(), suspend.terminate(), resume.terminate());
        assert!(matches!(ends, (Ok(()), Ok(()), Ok(()))));
        assert_eq!(told(&mut events, 4).await.len(), 4);
        assert!(events.next().await.is_none());
        let metering = session.metering();
        assert_eq!((metering.suspends, metering.resumes), (2, 1));
    });
}

#[test]
fn a_wake_that_fails_fails_once_for_all_and_one_that_nobody_wants_any_more_is_not_tried() {
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new()).await;
        session.suspend().await.unwrap();
        let mut events = session.events();
        let asleep = house.path().join(session.id()).join("asleep");
        let away = house.scratch.join("away");
        std::fs::rename(&asleep, &away).unwrap();
        let wakes: Vec<_> = (0..20)
            .map(|_| {
                let session = session.clone();
                tokio::spawn(async move { session.wake().await })
            })
            .collect();
        for wake in wakes {
            let error = wake.await.unwrap().unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Snapshot, "{error:?}");
        }
        let failed = told(&mut events, 1).await;
        assert_eq!(failed, [(SessionState::Suspended, SessionReason::ResumeFailed)]);
        // Nobody else was needed for it to be tried a few times at most: who came later tried again.
        std::fs::rename(&away, &asleep).unwrap();
        // A time would not do, since a wake takes less than a timer's tick.
        asked_and_dropped(session.wake()).await;
        session.resume().await.unwrap();
        assert!(session.with_vm(|vm| vm.exit_status().is_none()).unwrap());
    });
}

/// Asks for something, and drops that at once.
async fn asked_and_dropped(asked: impl Future) {
    let mut asked = Box::pin(asked);
    assert!(poll_fn(|context| Poll::Ready(asked.as_mut().poll(context).is_pending())).await);
}

#[test]
fn what_is_asked_for_is_done_although_nobody_waits_for_it() {
    block_on(async {
        let house = House::new().await;
        let vm = MicroVm::create(config(&Program::Halt)).unwrap();
        asked_and_dropped(house.sessions.start_with_id("alice", vm, SessionOptions::new())).await;
        let session = loop {
            match house.sessions.get("alice") {
                Some(session) => break session,
                None => tokio::time::sleep(SHORT / 10).await,
            }
        };
        until(&session, SessionState::Running).await;
        let policy = SessionPolicy::new().idle_after(SHORT).busy_cpu(None);
        asked_and_dropped(session.set_policy(policy)).await;
        until(&session, SessionState::Suspended).await;
        session.terminate().await.unwrap();
        asked_and_dropped(house.sessions.remove("alice")).await;
        while house.path().join("alice").exists() {
            tokio::time::sleep(SHORT / 10).await;
        }
    });
}

#[test]
fn who_takes_the_name_of_a_session_that_is_being_removed_keeps_it() {
    block_on(async {
        let house = House::new().await;
        let start = || {
            let vm = MicroVm::create(config(&Program::Halt)).unwrap();
            house.sessions.start_with_id("alice", vm, SessionOptions::new())
        };
        start().await.unwrap().terminate().await.unwrap();
        let mut removing = Box::pin(house.sessions.remove("alice"));
        poll_fn(|context| Poll::Ready(removing.as_mut().poll(context).is_pending())).await;
        let session = loop {
            match start().await {
                Ok(session) => break session,
                Err(error) => assert_eq!(error.kind(), &ErrorKind::Session, "{error:?}"),
            }
        };
        removing.await.unwrap();
        assert_eq!(house.sessions.get("alice").unwrap().state(), SessionState::Running);
        assert!(house.path().join("alice/session.json").exists());
        assert_eq!(kind(house.sessions.remove("alice").await), ErrorKind::Session);
        session.terminate().await.unwrap();
        // Of two who remove it one does.
        let both = tokio::join!(house.sessions.remove("alice"), house.sessions.remove("alice"));
        both.0.unwrap();
        assert_eq!(kind(both.1), ErrorKind::Session);
    });
}

#[test]
fn a_hundred_that_are_asked_at_once_while_they_sleep_all_answer() {
    block_on(async {
        let house = House::new().await;
        let vm = MicroVm::create(config(&Program::Echo)).unwrap().start().unwrap();
        let base = vm.pause().unwrap().snapshot(house.scratch.join("base")).unwrap();
        let mut all = Vec::new();
        for number in 0..100 {
            let (writer, output) = output();
            let vm = base.restore_with(&RestoreOptions::new().console(writer)).unwrap();
            let session = house.sessions.start(vm, SessionOptions::new()).await.unwrap();
            session.suspend().await.unwrap();
            // What it says when it boots, if it did not before the snapshot.
            output.so_far();
            all.push((number, session, output));
        }
        let tasks = all.into_iter().map(|(number, session, output)| {
            tokio::spawn(async move {
                // None of them is the letter that switches the guest off, nor the one with which it boots.
                let question = number | 0x80;
                let _awake = session.wake().await.unwrap();
                type_in(&session, &[question]);
                let answer = tokio::task::spawn_blocking(move || {
                    std::iter::repeat_with(|| output.next()).find(|byte| *byte != b'B')
                });
                assert_eq!(answer.await.unwrap(), Some(question));
                // Else it would keep the processor busy.
                session.suspend().await.unwrap();
                assert_eq!(session.metering().resumes, 1);
            })
        });
        for task in tasks.collect::<Vec<_>>() {
            task.await.unwrap();
        }
    });
}
