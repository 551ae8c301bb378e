//! What goes wrong between a session and its guest: hooks that fail or hang, guests that die.

use std::fs;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dormouse::{BlockConfig, NetConfig, SessionEvent, SessionEvents};

use super::*;
use crate::wall_clock::WallClock;

async fn next(events: &mut SessionEvents) -> SessionEvent {
    tokio::time::timeout(PATIENCE, events.next())
        .await
        .expect("an event in time")
        .expect("an event")
}

#[test]
fn a_hook_suspend_that_hangs_leaves_it_running_and_idle_it_is_tried_again_later() {
    block_on(async {
        let scratch = Scratch::new("session-hangs");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let hangs = "echo x >> /tmp/tries; test ! -e /tmp/hang || sleep 1000";
        let hook = Hook::command(["sh", "-c", hangs]).timeout(Duration::from_secs(2));
        let (vm, _transcript) = guest(application().hook(HookName::Suspend, hook));
        let session = sessions.start(vm, SessionOptions::new()).await.unwrap();
        sh(&session, "echo > /tmp/hang").await;
        let mut events = session.events();
        let policy = SessionPolicy::new().idle_after(Duration::from_millis(100)).busy_cpu(None);
        session.set_policy(policy).await.unwrap();
        for _ in 0..2 {
            assert_eq!(next(&mut events).await.state, SessionState::Suspending);
            let failed = next(&mut events).await;
            assert_eq!(failed.state, SessionState::Running);
            assert_eq!(failed.reason, SessionReason::SuspendFailed);
            assert!(failed.message.unwrap().contains("within 2 s"));
        }
        assert_eq!(served(&session).await, "up\n");
        sh(&session, "rm /tmp/hang").await;
        until(&session, SessionState::Suspended).await;
        assert!(sh(&session, "wc -l < /tmp/tries").await.trim().parse::<u32>().unwrap() >= 3);
        session.terminate().await.unwrap();
    });
}

#[test]
fn a_hook_resume_that_fails_leaves_it_suspended_and_the_next_request_tries_again() {
    block_on(async {
        let scratch = Scratch::new("session-resume");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        // A note on the host's own disk says whether to fail: memory is as before each time.
        let disk = scratch.0.join("disk");
        fs::write(&disk, [0; 4096]).unwrap();
        let fails = "n=$(cat /tmp/count); echo resumed >> /tmp/hooks; echo $n > /tmp/resumed-at; \
                     test $(head -c 1 /dev/vda) != x";
        let last = Hook::command(["sh", "-c", "echo the last hook > /dev/console"]);
        let agent = application()
            .hook(HookName::Resume, Hook::command(["sh", "-c", fails]))
            .hook(HookName::Terminate, last);
        let config = config_of(Release::Linux6_12, busybox(), agent);
        // No file keeps a descriptor: it is still there for the next attempt.
        let network = NetConfig::pair().unwrap().0;
        let config = config.block(BlockConfig::new(&disk).read_only()).network(network);
        let session = sessions.start(MicroVm::create(config).unwrap(), SessionOptions::new()).await;
        let session = session.unwrap();
        served(&session).await;
        session.suspend().await.unwrap();
        note(&disk, b"x");
        let mut events = session.events();
        for _ in 0..2 {
            let error = page(&session).await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Hook, "{error:?}");
            let failed = next(&mut events).await;
            assert_eq!(failed.state, SessionState::Suspended);
            assert_eq!(failed.reason, SessionReason::ResumeFailed);
            assert!(failed.message.unwrap().contains("`resume`"));
            assert_eq!(session.state(), SessionState::Suspended);
        }
        note(&disk, b"y");
        assert_eq!(page(&session).await.unwrap(), "up\n");
        // Nothing is left of the attempts: neither wrote to a disk.
        assert_eq!(sh(&session, "cat /tmp/hooks").await, "resumed\n");
        let metering = session.metering();
        assert_eq!((metering.suspends, metering.resumes), (1, 1));
        // Its end does not depend on it.
        session.suspend().await.unwrap();
        note(&disk, b"x");
        session.terminate().await.unwrap();
        let console = session.console().unwrap().tail();
        assert!(console.contains("the last hook"), "{console}");
    });
}

/// Writes to a disk whose guest sleeps. By its time the file is as before, and so the guest may wake.
fn note(disk: &Path, byte: &[u8]) {
    let modified = fs::metadata(disk).unwrap().modified().unwrap();
    let file = fs::File::options().write(true).open(disk).unwrap();
    file.write_all_at(byte, 0).unwrap();
    file.set_modified(modified).unwrap();
}

#[test]
fn a_hook_resume_that_fails_after_it_wrote_to_a_disk_leaves_memory_and_disk_that_fit() {
    block_on(async {
        let scratch = Scratch::new("session-wrote");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let disk = scratch.0.join("disk");
        fs::write(&disk, [0; 1 << 20]).unwrap();
        // What it wrote the last time it knows from its memory, and finds on its disk.
        let hook = "n=$(cat /tmp/n 2>/dev/null || echo 1); \
                    test $n = 1 || test $(head -c 1 /dev/vda) = $((n - 1)) || exit 9; \
                    echo $n | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null; \
                    echo $((n + 1)) > /tmp/n; test $n -ge 3";
        let agent = application().hook(HookName::Resume, Hook::command(["sh", "-c", hook]));
        let config = config_of(Release::Linux6_12, busybox(), agent).block(BlockConfig::new(&disk));
        let vm = MicroVm::create(config).unwrap();
        let session = sessions.start(vm, SessionOptions::new()).await.unwrap();
        served(&session).await;
        session.suspend().await.unwrap();
        for attempt in [b'1', b'2'] {
            let error = session.wake().await.unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Hook, "{error:?}");
            assert!(error.to_string().contains("code 1"), "{error}");
            assert_eq!(session.state(), SessionState::Suspended);
            assert_eq!(first_byte(&disk), attempt);
        }
        assert_eq!(page(&session).await.unwrap(), "up\n");
        assert_eq!(sh(&session, "cat /tmp/n; head -c 1 /dev/vda").await, "4\n3");
        let metering = session.metering();
        assert_eq!((metering.suspends, metering.resumes), (3, 1));
        session.terminate().await.unwrap();
    });
}

fn first_byte(path: &Path) -> u8 {
    let mut byte = [0];
    fs::File::open(path).unwrap().read_exact(&mut byte).unwrap();
    byte[0]
}

#[test]
fn a_guest_that_dies_in_its_hook_suspend_ends_its_session_and_the_calls_to_it() {
    block_on(async {
        let scratch = Scratch::new("session-dies");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let dies = Hook::command(["sh", "-c", "test ! -e /tmp/die || busybox poweroff -f"]);
        let (vm, _transcript) = guest(application().hook(HookName::Suspend, dies));
        let session = sessions.start(vm, SessionOptions::new()).await.unwrap();
        served(&session).await;
        // A call that is under way is told of it.
        let call = tokio::spawn({
            let session = session.clone();
            async move { session.exec("sh", ["-c", "echo > /tmp/die; sleep 1000"]).await }
        });
        sh(&session, "until [ -e /tmp/die ]; do sleep 0.1; done").await;
        let error = session.suspend().await.unwrap_err();
        assert_ne!(error.kind(), &ErrorKind::SessionEnded, "{error:?}");
        until(&session, SessionState::Terminated).await;
        let event = session.watch().event();
        assert_eq!(event.reason, SessionReason::GuestEnded);
        assert!(event.message.unwrap().contains("powered off"));
        call.await.unwrap().unwrap_err();
        assert_eq!(page(&session).await.unwrap_err().kind(), &ErrorKind::SessionEnded);
    });
}

#[test]
fn a_guest_that_dies_in_its_hook_resume_sleeps_as_before_and_the_next_request_tries_again() {
    block_on(async {
        let scratch = Scratch::new("session-dies-waking");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        // As above: a note on the host's own disk says whether to die.
        let disk = scratch.0.join("disk");
        fs::write(&disk, [0; 4096]).unwrap();
        let dies = "test $(head -c 1 /dev/vda) != x || busybox poweroff -f";
        let agent = application().hook(HookName::Resume, Hook::command(["sh", "-c", dies]));
        let config = config_of(Release::Linux6_12, busybox(), agent);
        let config = config.block(BlockConfig::new(&disk).read_only());
        let vm = MicroVm::create(config.network(NetConfig::pair().unwrap().0)).unwrap();
        let session = sessions.start(vm, SessionOptions::new()).await.unwrap();
        served(&session).await;
        let same = "cat /tmp/server /proc/sys/kernel/random/boot_id";
        let before = sh(&session, same).await;
        session.suspend().await.unwrap();
        note(&disk, b"x");
        let mut events = session.events();
        for _ in 0..2 {
            let error = page(&session).await.unwrap_err();
            // Its connection may be over before it is.
            assert!(
                matches!(error.kind(), ErrorKind::Agent | ErrorKind::GuestEnded(_)),
                "{error:?}"
            );
            let failed = next(&mut events).await;
            assert_eq!(failed.state, SessionState::Suspended);
            assert_eq!(failed.reason, SessionReason::ResumeFailed);
            assert_eq!(session.state(), SessionState::Suspended);
        }
        note(&disk, b"y");
        assert_eq!(page(&session).await.unwrap(), "up\n");
        assert_eq!(sh(&session, same).await, before);
        session.terminate().await.unwrap();
    });
}

#[test]
fn a_guest_that_wrote_to_its_disk_and_dies_in_its_hook_resume_is_over() {
    block_on(async {
        let scratch = Scratch::new("session-dies-written");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let disk = scratch.0.join("disk");
        fs::write(&disk, [0; 4096]).unwrap();
        let dies = "echo y >/dev/vda; sync; echo c >/proc/sysrq-trigger";
        let agent = application().hook(HookName::Resume, Hook::command(["sh", "-c", dies]));
        let config = config_of(Release::Linux6_12, busybox(), agent);
        let vm = MicroVm::create(config.block(BlockConfig::new(&disk))).unwrap();
        let session = sessions.start(vm, SessionOptions::new()).await.unwrap();
        session.suspend().await.unwrap();
        page(&session).await.unwrap_err();
        // Its memory of before knows another disk: it is not woken with that, now or later.
        assert_eq!(fs::read(&disk).unwrap()[0], b'y');
        let event = session.watch().event();
        assert_eq!(event.state, SessionState::Terminated);
        assert_eq!(event.reason, SessionReason::GuestEnded, "{event}");
        assert_eq!(page(&session).await.unwrap_err().kind(), &ErrorKind::SessionEnded);
    });
}

#[test]
fn a_clock_that_jumps_by_days_puts_nothing_to_sleep_and_ends_nothing_and_a_guest_that_wakes_has_it()
{
    block_on(async {
        const DAY: i64 = 86_400;
        let scratch = Scratch::new("session-clock");
        let directory = scratch.0.join("sessions");
        let mut sessions = Sessions::open(&directory).await.unwrap();
        let hour = Duration::from_secs(3600);
        let policy =
            SessionPolicy::new().idle_after(hour).suspended_at_most(hour).lifetime(3 * hour);
        let mut ids = Vec::new();
        for _ in 0..2 {
            let (vm, _transcript) = guest(application());
            let options = SessionOptions::new().policy(policy.clone());
            ids.push(sessions.start(vm, options).await.unwrap().id().to_owned());
        }
        let mut clock = WallClock::new();
        let [awake, asleep] = [0, 1].map(|n| sessions.get(&ids[n]).unwrap());
        asleep.suspend().await.unwrap();
        let mut events = sessions.events();
        for jump in [30 * DAY, -30 * DAY] {
            clock.jump(jump);
            tokio::time::sleep(Duration::from_millis(500)).await;
            assert_eq!(awake.state(), SessionState::Running);
            assert_eq!(asleep.state(), SessionState::Suspended);
            assert!(events.try_next().is_none());
            for session in [&awake, &asleep] {
                let used = session.metering();
                assert!(used.running + used.suspended < hour, "{used:?}");
            }
        }
        // Nor does it to who is found again after it.
        drop((awake, asleep, events));
        drop(sessions);
        clock.jump(30 * DAY);
        sessions = loop {
            match Sessions::open(&directory).await {
                Ok(sessions) => break sessions,
                Err(error) => assert_eq!(error.kind(), &ErrorKind::Session, "{error:?}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let asleep = sessions.get(&ids[1]).unwrap();
        assert_eq!(asleep.state(), SessionState::Suspended);
        assert!(asleep.metering().suspended < hour);
        let before = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let date: u64 = sh(&asleep, "date +%s").await.trim().parse().unwrap();
        let after = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        // It was told a moment before.
        assert!((before - 10..=after).contains(&date), "{before} {date} {after}");
        // Only the time of day went on: a scheduler whose clock makes a step of days may not survive it.
        let uptime: i64 = sh(&asleep, "cut -d. -f1 /proc/uptime").await.trim().parse().unwrap();
        assert!(uptime < DAY, "up for {uptime} s");
        asleep.terminate().await.unwrap();
    });
}
