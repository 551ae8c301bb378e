//! Sessions that are found again: by who opens their directory, after a process that ended in any way.

use std::fs;
use std::io::{BufRead, BufReader};

use std::process::{Child, Command, Stdio};

use dormouse::{Metering, NetConfig};

use super::*;

const DIRECTORY: &str = "DORMOUSE_TEST_SESSIONS";

/// Keeps sessions in each way in which a process may leave them, says so, and waits to be killed.
async fn other_process(directory: &Path) {
    let sessions = Sessions::open(directory).await.unwrap();
    let start = |id: &'static str, policy: SessionPolicy| {
        let sessions = sessions.clone();
        async move {
            let vm = MicroVm::create(config(&Program::Heartbeat)).unwrap();
            let options = SessionOptions::new().id(id).policy(policy);
            sessions.start(vm, options).await.unwrap()
        }
    };
    let asleep = start("asleep", SessionPolicy::new().auto_resume(false)).await;
    asleep.suspend().await.unwrap();
    let running = start("running", SessionPolicy::new()).await;
    running.suspend().await.unwrap();
    running.resume().await.unwrap();
    let restored = start("restored", SessionPolicy::new().lost(Lost::Restore)).await;
    restored.suspend().await.unwrap();
    restored.resume().await.unwrap();
    let _fresh = start("fresh", SessionPolicy::new().lost(Lost::Restore)).await;
    start("over", SessionPolicy::new()).await.terminate().await.unwrap();
    for session in sessions.list() {
        while session.state() == SessionState::Running && session.metering().vcpu < SHORT / 10 {
            tokio::time::sleep(SHORT / 10).await;
        }
        let metering = serde_json::to_string(&session.metering()).unwrap();
        println!("session {} {metering}", session.id());
    }
    println!("kept");
    std::future::pending().await
}

/// A process that keeps sessions in this directory, and what it says that they have used.
fn elsewhere(directory: &Path) -> (Child, Vec<(String, Metering)>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--test-threads=1", "--nocapture", "sessions_of_a_process_that_was_killed"])
        .env(DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut used = Vec::new();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(|line| line.unwrap());
    for line in lines.by_ref().take_while(|line| !line.ends_with("kept")) {
        if let Some((_, session)) = line.split_once("session ") {
            let (id, metering) = session.split_once(' ').unwrap();
            used.push((id.to_owned(), serde_json::from_str(metering).unwrap()));
        }
    }
    (child, used)
}

#[test]
fn sessions_of_a_process_that_was_killed_are_found_as_their_policy_says() {
    use SessionReason::{Lost, Requested, Restored};
    use SessionState::{Running, Suspended, Terminated};
    if let Some(directory) = std::env::var_os(DIRECTORY) {
        return block_on(other_process(Path::new(&directory)));
    }
    block_on(async {
        let scratch = Scratch::new();
        let directory = scratch.join("sessions");
        let (mut child, used) = elsewhere(&directory);
        assert_eq!(used.len(), 5);
        // One process has them at a time.
        assert_eq!(kind(Sessions::open(&directory).await), ErrorKind::Session);
        child.kill().unwrap();
        child.wait().unwrap();

        let sessions = Sessions::open(&directory).await.unwrap();
        let get = |id: &str| sessions.get(id).unwrap();
        let found = |id: &str| {
            let event = get(id).watch().event();
            (event.state, event.reason)
        };
        assert_eq!(found("asleep"), (Suspended, Requested));
        assert_eq!(found("running"), (Terminated, Lost));
        assert_eq!(found("restored"), (Suspended, Restored));
        assert_eq!(found("fresh"), (Terminated, Lost));
        assert_eq!(found("over"), (Terminated, Requested));
        assert!(!get("asleep").policy().auto_resume);
        for (id, before) in &used {
            let now = get(id).metering();
            assert!(now.running >= before.running && now.vcpu >= before.vcpu, "{id}");
            assert!(now.suspended >= before.suspended, "{id}");
            // Others slept or ended at once, and may not have run at all.
            let ran = ["running", "restored", "fresh"].contains(&id.as_str());
            assert!(before.vcpu > Duration::ZERO || !ran, "{id}");
            assert_eq!(now.snapshot_bytes, before.snapshot_bytes, "{id}");
        }
        for id in ["asleep", "restored"] {
            get(id).resume().await.unwrap();
            assert_eq!(get(id).state(), Running);
        }
        // The guests go on.
        while !get("asleep").console().unwrap().tail().contains('.') {
            tokio::time::sleep(SHORT / 10).await;
        }
        sessions.suspend_all().await.unwrap();
        drop(sessions);
        // Its keepers are tasks, and end a little later.
        let sessions = reopened(&directory).await;
        let asleep = sessions.list().into_iter().filter(|session| session.state() == Suspended);
        assert_eq!(asleep.count(), 2);
        // The events go on counting, too.
        assert!(sessions.get("asleep").unwrap().watch().event().number >= 6);
    });
}

#[test]
fn who_opens_sessions_gives_them_what_no_file_keeps() {
    block_on(async {
        let scratch = Scratch::new();
        let directory = scratch.join("sessions");
        let sessions = Sessions::open(&directory).await.unwrap();
        let config = config(&Program::Heartbeat).network(NetConfig::pair().unwrap().0);
        let vm = MicroVm::create(config).unwrap();
        let session = sessions.start(vm, SessionOptions::new().id("one")).await.unwrap();
        session.suspend().await.unwrap();
        // This process has its descriptor.
        session.resume().await.unwrap();
        session.suspend().await.unwrap();
        drop((session, sessions));
        let sessions = reopened(&directory).await;
        let error = sessions.get("one").unwrap().resume().await.unwrap_err();
        assert!(error.to_string().contains("Sessions::open_with"), "{error}");
        drop(sessions);
        drop(reopened(&directory).await);
        let given = |id: &str| {
            assert_eq!(id, "one");
            RestoreOptions::new().network(0, NetConfig::pair().unwrap().0)
        };
        let sessions = loop {
            match Sessions::open_with(&directory, given).await {
                Err(error) if error.kind() == &ErrorKind::Session => tokio::task::yield_now().await,
                opened => break opened.unwrap(),
            }
        };
        let session = sessions.get("one").unwrap();
        session.resume().await.unwrap();
        assert_eq!(session.state(), SessionState::Running);
    });
}

#[test]
fn what_runs_ends_with_the_last_handle_and_what_sleeps_does_not() {
    block_on(async {
        let house = House::new().await;
        let path = house.path();
        let running = house.halted(SessionPolicy::new()).await;
        let asleep = house.halted(SessionPolicy::new()).await;
        asleep.suspend().await.unwrap();
        let ids = [running.id().to_owned(), asleep.id().to_owned()];
        let House { scratch: _scratch, sessions } = house;
        drop((sessions, asleep));
        assert_eq!(kind(Sessions::open(&path).await), ErrorKind::Session);
        assert_eq!(running.state(), SessionState::Running);
        drop(running);
        let sessions = reopened(&path).await;
        let states = ids.map(|id| sessions.get(&id).unwrap().state());
        assert_eq!(states, [SessionState::Terminated, SessionState::Suspended]);
    });
}

#[test]
fn a_session_that_was_suspended_for_too_long_while_nobody_looked_ends_and_a_clock_set_back_keeps_none()
 {
    block_on(async {
        let house = House::new().await;
        let path = house.path();
        let policy = SessionPolicy::new().suspended_at_most(Duration::from_secs(3600));
        let (old, young) = (house.halted(policy.clone()).await, house.halted(policy).await);
        house.sessions.suspend_all().await.unwrap();
        let ids = [old.id().to_owned(), young.id().to_owned()];
        let House { scratch: _scratch, sessions } = house;
        drop((sessions, old, young));
        drop(reopened(&path).await);
        // As if it had been written in another boot, and the clock been set: two hours back, and two hours on.
        let two_hours = Duration::from_secs(7200).as_secs() as i64;
        for (id, jump) in ids.iter().zip([-two_hours, two_hours]) {
            let file = path.join(id).join("session.json");
            let mut record: serde_json::Value =
                serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
            let stamp = &mut record["stamp"];
            stamp["boot"] = "another".into();
            let wall = stamp["wall"]["secs"].as_i64().unwrap();
            stamp["wall"]["secs"] = (wall + jump).into();
            fs::write(&file, serde_json::to_vec(&record).unwrap()).unwrap();
        }
        let sessions = reopened(&path).await;
        let [old, young] = ids.map(|id| sessions.get(&id).unwrap());
        until(&old, SessionState::Terminated).await;
        assert_eq!(old.watch().event().reason, SessionReason::SuspendedAtMost);
        assert_eq!(young.state(), SessionState::Suspended);
        let metering = young.metering();
        assert!(metering.suspended < Duration::from_secs(3600), "{metering:?}");
        young.resume().await.unwrap();
    });
}

#[test]
fn one_that_is_killed_between_its_files_and_its_record_is_asleep() {
    block_on(async {
        let house = House::new().await;
        let path = house.path();
        let session = house.halted(SessionPolicy::new()).await;
        let id = session.id().to_owned();
        session.suspend().await.unwrap();
        let file = path.join(&id).join("session.json");
        let House { scratch: _scratch, sessions } = house;
        drop((sessions, session));
        drop(reopened(&path).await);
        let record: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let found = async |snapshot: serde_json::Value| {
            let mut record = record.clone();
            record["state"] = "suspending".into();
            record["lasting"]["snapshot"] = snapshot;
            fs::write(&file, serde_json::to_vec(&record).unwrap()).unwrap();
            let sessions = reopened(&path).await;
            let session = sessions.get(&id).unwrap();
            if session.state() == SessionState::Suspended {
                session.resume().await.unwrap();
            }
            session.watch().event().reason
        };
        // There was no snapshot before, and now there is.
        assert_eq!(found(serde_json::Value::Null).await, SessionReason::Requested);
        // It is that of before: what came after is lost.
        let same = record["lasting"]["snapshot"].clone();
        assert_eq!(found(same.clone()).await, SessionReason::Lost);
        // Who found it finished knows it by then: what it did since, and did not finish to save, is lost too.
        found(serde_json::Value::Null).await;
        drop(reopened(&path).await);
        let known: serde_json::Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(known["lasting"]["snapshot"], same);
    });
}

#[test]
fn files_that_cannot_be_read_just_now_end_no_session_for_good() {
    block_on(async {
        let house = House::new().await;
        let path = house.path();
        let session = house.halted(SessionPolicy::new().lost(Lost::Restore)).await;
        let id = session.id().to_owned();
        session.suspend().await.unwrap();
        session.resume().await.unwrap();
        let House { scratch: _scratch, sessions } = house;
        drop((sessions, session));
        drop(reopened(&path).await);
        let file = path.join(&id).join("session.json");
        let mut record: serde_json::Value =
            serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        record["state"] = "running".into();
        fs::write(&file, serde_json::to_vec(&record).unwrap()).unwrap();
        // A later version, as is found where somebody goes back to this one.
        let state = path.join(&id).join("asleep").join("state");
        let before = fs::read(&state).unwrap();
        let mut later = before.clone();
        later[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        fs::write(&state, &later).unwrap();
        let sessions = reopened(&path).await;
        let event = sessions.get(&id).unwrap().watch().event();
        assert_eq!((event.state, event.reason), (SessionState::Terminated, SessionReason::Lost));
        assert!(event.message.unwrap().contains("version"));
        drop(sessions);
        fs::write(&state, &before).unwrap();
        let sessions = reopened(&path).await;
        let session = sessions.get(&id).unwrap();
        assert_eq!(session.watch().event().reason, SessionReason::Restored);
        session.resume().await.unwrap();
    });
}

#[test]
fn what_sessions_stand_beside_is_none_of_them() {
    block_on(async {
        let scratch = Scratch::new();
        let directory = scratch.join("sessions");
        fs::create_dir_all(directory.join("images")).unwrap();
        fs::write(directory.join("images/layer"), "").unwrap();
        // What a process left that was killed while it made one.
        fs::create_dir(directory.join("half-made")).unwrap();
        let sessions = Sessions::open(&directory).await.unwrap();
        let ids: Vec<_> = sessions.list().iter().map(|session| session.id().to_owned()).collect();
        assert_eq!(ids, ["half-made"]);
        // The lock has no session's name.
        let vm = MicroVm::create(config(&Program::Halt)).unwrap();
        sessions.start(vm, SessionOptions::new().id("lock")).await.unwrap();
    });
}

#[test]
fn a_session_is_kept_by_the_runtime_of_all_and_who_waits_when_that_is_over_is_told() {
    let scratch = Scratch::new();
    let runtime = || {
        let mut runtime = tokio::runtime::Builder::new_multi_thread();
        runtime.worker_threads(1).enable_all().build().unwrap()
    };
    let (opened_on, other) = (runtime(), runtime());
    let sessions = opened_on.block_on(Sessions::open(scratch.join("sessions"))).unwrap();
    let start = |runtime: &tokio::runtime::Runtime| {
        let vm = MicroVm::create(config(&Program::Halt)).unwrap();
        runtime.block_on(sessions.start(vm, SessionOptions::new())).unwrap()
    };
    let session = start(&other);
    other.shutdown_background();
    opened_on.block_on(session.suspend()).unwrap();
    opened_on.block_on(session.resume()).unwrap();
    opened_on.shutdown_background();
    let last = runtime();
    let asked = last.block_on(async { tokio::time::timeout(PATIENCE, session.suspend()).await });
    assert_eq!(kind(asked.expect("an answer")), ErrorKind::Session);
}

/// Says so where it is not the process that the test began in, but one whose clocks have jumped.
const JUMPED: &str = "DORMOUSE_TEST_SESSIONS_JUMPED";

#[test]
fn a_process_whose_monotonic_clocks_are_others_takes_no_session_for_an_old_one() {
    if let Some(directory) = std::env::var_os(JUMPED) {
        return block_on(async {
            let sessions = reopened(directory.as_ref()).await;
            let session = sessions.list().pop().unwrap();
            session.resume().await.unwrap();
            let metering = session.metering();
            assert!(metering.suspended < Duration::from_secs(3600), "{metering:?}");
            session.suspend().await.unwrap();
        });
    }
    block_on(async {
        let house = House::new().await;
        let path = house.path();
        let hour = Duration::from_secs(3600);
        let policy = SessionPolicy::new().suspended_at_most(hour).lifetime(2 * hour);
        house.halted(policy).await.suspend().await.unwrap();
        let House { scratch: _scratch, sessions } = house;
        drop(sessions);
        // Eleven days later, and before the host was started.
        for jump in ["1000000", "-1"] {
            drop(reopened(&path).await);
            let output = Command::new("unshare")
                .args(["--user", "--map-root-user", "--time", "--fork"])
                .args(["--boottime", jump, "--monotonic", jump, "--"])
                .arg(std::env::current_exe().unwrap())
                .args(["--test-threads=1", "--exact", "--nocapture"])
                .arg("session::recovery::a_process_whose_monotonic_clocks_are_others_takes_no_session_for_an_old_one")
                .env(JUMPED, &path)
                .output()
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && text.contains("1 passed"), "{text}{errors}");
        }
        let sessions = reopened(&path).await;
        let session = sessions.list().pop().unwrap();
        assert_eq!(session.state(), SessionState::Suspended);
        assert_eq!(session.metering().resumes, 2);
    });
}
