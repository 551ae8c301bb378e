//! What goes wrong: guests that end, files that are damaged, disks that are full.

use std::fs;
use std::process::Command;

use super::*;
use crate::scratch::MOUNT;

#[test]
fn a_guest_that_ends_by_itself_ends_its_session_and_says_how() {
    block_on(async {
        let house = House::new().await;
        let session = house.start(&Program::Memory, SessionPolicy::new()).await;
        session.suspend().await.unwrap();
        session.resume().await.unwrap();
        type_in(&session, b"q");
        until(&session, SessionState::Terminated).await;
        let event = session.watch().event();
        assert_eq!(event.reason, SessionReason::GuestEnded);
        assert!(event.message.unwrap().contains("powered off"));
        let error = session.wake().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::SessionEnded);
        assert!(error.to_string().contains("powered off"), "{error}");
        assert!(!house.path().join(session.id()).join("asleep").exists());
        // So does one that is over before anybody looks.
        let fault = MicroVm::create(config(&Program::Fault)).unwrap().start().unwrap();
        while fault.exit_status().is_none() {
            tokio::time::sleep(SHORT / 10).await;
        }
        let session = house.sessions.start(fault, SessionOptions::new()).await.unwrap();
        until(&session, SessionState::Terminated).await;
        assert!(session.watch().event().message.unwrap().contains("triple fault"));
    });
}

#[test]
fn damage_is_its_sessions_own_and_says_what_it_is() {
    block_on(async {
        let house = House::new().await;
        let path = house.path();
        let [files, record, gone, sound] = [(); 4].map(|()| house.halted(SessionPolicy::new()));
        let all = [files.await, record.await, gone.await, sound.await];
        house.sessions.suspend_all().await.unwrap();
        let [files, record, gone, sound] = all.map(|session| session.id().to_owned());
        let House { scratch: _scratch, sessions } = house;
        drop(sessions);
        drop(reopened(&path).await);
        fs::write(path.join(&files).join("asleep/state"), "nonsense").unwrap();
        fs::write(path.join(&record).join("session.json"), "{}").unwrap();
        fs::remove_file(path.join(&gone).join("session.json")).unwrap();
        // What is no session is left alone.
        fs::create_dir(path.join("Not a session")).unwrap();
        fs::write(path.join("file"), "").unwrap();
        let sessions = reopened(&path).await;
        assert_eq!(sessions.list().len(), 4);
        let get = |id: &str| sessions.get(id).unwrap();
        for (id, why) in [(&record, "missing field"), (&gone, "session.json")] {
            let event = get(id).watch().event();
            assert_eq!(
                (event.state, event.reason),
                (SessionState::Terminated, SessionReason::Damaged)
            );
            assert!(event.message.as_deref().unwrap().contains(why), "{event}");
            assert_eq!(kind(get(id).wake().await), ErrorKind::SessionEnded);
        }
        for _ in 0..2 {
            let error = get(&files).wake().await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Snapshot);
            assert!(error.to_string().contains("damaged"), "{error}");
            assert_eq!(get(&files).state(), SessionState::Suspended);
        }
        drop(get(&sound).wake().await.unwrap());
        get(&files).terminate().await.unwrap();
        for id in [&files, &record, &gone] {
            sessions.remove(id).await.unwrap();
            assert!(!path.join(id).exists());
        }
        assert!(path.join("Not a session").exists());
    });
}

/// Whether this process has a mount namespace of its own. The first time it does not: then the test is run again in
/// one, and its end is checked here.
fn may_mount(test: &str) -> bool {
    const INSIDE: &str = "DORMOUSE_TEST_SESSION_MOUNT";
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let output = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--test-threads=1", "--exact", "--nocapture", test])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
    false
}

fn mount(directory: &Path, options: &str) {
    let status = Command::new("mount")
        .args(["-t", "tmpfs", "-o", options, "tmpfs"])
        .arg(directory)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_disk_that_is_full_leaves_it_running_and_it_is_tried_again() {
    let name = "session::faults::a_disk_that_is_full_leaves_it_running_and_it_is_tried_again";
    if !may_mount(name) {
        return;
    }
    block_on(async {
        let scratch = Scratch::new();
        let small = scratch.join(MOUNT);
        fs::create_dir(&small).unwrap();
        mount(&small, "size=2m");
        let sessions = Sessions::open(small.join("sessions")).await.unwrap();
        let (writer, output) = output();
        let vm = MicroVm::create(config(&Program::Memory).console(writer)).unwrap();
        let policy = SessionPolicy::new().idle_after(SHORT).busy_cpu(None);
        let session = sessions.start(vm, SessionOptions::new().policy(policy)).await.unwrap();
        let awake = session.wake().await.unwrap();
        assert_eq!([output.next(), output.next()], *b"B>");
        // Two hundred pages are 800 KiB.
        type_in(&session, b"w\xc8\x05");
        assert_eq!(output.next(), b'w');
        fs::write(small.join("ballast"), vec![1; 1600 << 10]).unwrap();
        let mut events = session.events();
        drop(awake);
        use SessionState::{Running, Suspended, Suspending};
        for _ in 0..3 {
            let mut failed = Vec::new();
            for _ in 0..2 {
                failed.push(tokio::time::timeout(PATIENCE, events.next()).await.unwrap().unwrap());
            }
            assert_eq!((failed[0].state, failed[1].state), (Suspending, Running));
            assert_eq!(failed[1].reason, SessionReason::SuspendFailed);
            let message = failed[1].message.as_deref().unwrap();
            assert!(message.contains("No space left on device"), "{message}");
        }
        // It runs, and says so, unless that is tried once more at the moment.
        let typed = || session.with_vm(|vm| vm.console_input(b"w\x0a\x01").unwrap()).is_some();
        while !typed() {
            tokio::time::sleep(SHORT / 10).await;
        }
        assert_eq!(output.next(), b'w');
        fs::remove_file(small.join("ballast")).unwrap();
        until(&session, Suspended).await;
        // A disk that is full again, and a request: what cannot be written down does not run.
        let mut file = fs::File::create(small.join("ballast")).unwrap();
        let filled = std::io::copy(&mut std::io::repeat(1), &mut file).unwrap_err();
        assert_eq!(filled.kind(), std::io::ErrorKind::StorageFull);
        let refused = session.wake().await.unwrap_err();
        assert_eq!(refused.kind(), &ErrorKind::File(std::io::ErrorKind::StorageFull));
        assert!(refused.to_string().contains("session.json"), "{refused}");
        drop(file);
        fs::remove_file(small.join("ballast")).unwrap();
        session.resume().await.unwrap();
        session.terminate().await.unwrap();
    });
}
