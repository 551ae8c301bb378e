//! What keeps a session awake, and what a policy does.

use super::*;

#[test]
fn one_that_is_idle_sleeps_and_a_lease_of_the_host_keeps_it_awake() {
    block_on(async {
        let house = House::new().await;
        // Asked for before there is a session, which may sleep before anybody asks it.
        let mut events = house.sessions.events();
        let session = house.halted(SessionPolicy::new().idle_after(SHORT)).await;
        until(&session, SessionState::Suspended).await;
        let awake = session.wake().await.unwrap();
        let other = session.keep_awake();
        // Some times what it would have to be idle for.
        tokio::time::sleep(5 * SHORT).await;
        assert_eq!(session.state(), SessionState::Running);
        drop(awake);
        tokio::time::sleep(3 * SHORT).await;
        assert_eq!(session.state(), SessionState::Running);
        drop(other);
        until(&session, SessionState::Suspended).await;
        // A lease alone does not wake it.
        let lease = session.keep_awake();
        tokio::time::sleep(SHORT).await;
        assert_eq!(session.state(), SessionState::Suspended);
        drop(lease);
        use SessionReason::{Idle, Started, Traffic};
        use SessionState::{Pending, Running, Suspended, Suspending};
        let seen = told(&mut events, 7).await;
        let start = [(Pending, Started), (Running, Started)];
        let sleep = [(Suspending, Idle), (Suspended, Idle)];
        assert_eq!(seen, [&start[..], &sleep, &[(Running, Traffic)], &sleep].concat());
        assert!(events.try_next().is_none());
    });
}

#[test]
fn a_guest_that_computes_is_not_idle_unless_that_does_not_count() {
    block_on(async {
        let house = House::new().await;
        // A thousandth of a processor, which it gets however many others want it.
        let policy = SessionPolicy::new().idle_after(50 * SHORT).busy_cpu(0.001);
        let session = house.start(&Program::Heartbeat, policy.clone()).await;
        let mut events = session.events();
        tokio::time::sleep(70 * SHORT).await;
        assert_eq!(session.state(), SessionState::Running);
        assert!(events.try_next().is_none());
        session.set_policy(policy.busy_cpu(None)).await.unwrap();
        until(&session, SessionState::Suspended).await;
        assert!(session.metering().vcpu > SHORT);
    });
}

#[test]
fn a_policy_changes_while_it_runs_and_while_it_sleeps() {
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new()).await;
        let hour = Duration::from_secs(3600);
        for policy in [SessionPolicy::new(), SessionPolicy::new().idle_after(hour)] {
            session.set_policy(policy).await.unwrap();
            tokio::time::sleep(SHORT).await;
            assert_eq!(session.state(), SessionState::Running);
        }
        session
            .set_policy(SessionPolicy::new().idle_after(SHORT).auto_resume(false))
            .await
            .unwrap();
        until(&session, SessionState::Suspended).await;
        // Nobody but who asks for it by name wakes it now.
        assert_eq!(kind(session.wake().await), ErrorKind::SessionSuspended);
        assert_eq!(kind(session.connect(80).await), ErrorKind::SessionSuspended);
        session.resume().await.unwrap();
        until(&session, SessionState::Suspended).await;
        let refused = SessionPolicy::new().busy_cpu(f64::NAN);
        assert_eq!(kind(session.set_policy(refused).await), ErrorKind::Config);
        assert!(!session.policy().auto_resume);
        session.set_policy(SessionPolicy::new().suspended_at_most(SHORT)).await.unwrap();
        until(&session, SessionState::Terminated).await;
        assert_eq!(session.watch().event().reason, SessionReason::SuspendedAtMost);
        assert!(!house.path().join(session.id()).join("asleep").exists());
    });
}

#[test]
fn a_lifetime_counts_running_and_suspended_time_and_nothing_holds_it() {
    block_on(async {
        let house = House::new().await;
        let policy = SessionPolicy::new().lifetime(5 * SHORT);
        let held = house.halted(SessionPolicy::new()).await;
        let asleep = house.halted(SessionPolicy::new()).await;
        let _awake = held.keep_awake();
        asleep.suspend().await.unwrap();
        let all = [held, asleep].map(|session| (session.events(), session));
        for (mut events, session) in all {
            // Now, however long it took to come here: a lifetime counts from the start.
            session.set_policy(policy.clone()).await.unwrap();
            until(&session, SessionState::Terminated).await;
            use SessionState::{Terminated, Terminating};
            let ends = [Terminating, Terminated].map(|state| (state, SessionReason::Lifetime));
            assert_eq!(told(&mut events, 2).await, ends);
            let metering = session.metering();
            assert!(metering.running + metering.suspended >= 5 * SHORT, "{metering:?}");
            let over = session.metering();
            assert_eq!(over, metering);
        }
    });
}

#[test]
fn what_is_suspended_by_name_sleeps_whatever_holds_it() {
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new().idle_after(SHORT)).await;
        let awake = session.wake().await.unwrap();
        session.suspend().await.unwrap();
        tokio::time::sleep(2 * SHORT).await;
        assert_eq!(session.state(), SessionState::Suspended);
        drop(session.wake().await.unwrap());
        drop(awake);
        until(&session, SessionState::Suspended).await;
    });
}

#[test]
fn a_session_without_an_agent_says_so_to_who_wants_a_port() {
    block_on(async {
        let house = House::new().await;
        let session = house.halted(SessionPolicy::new()).await;
        for refused in [
            kind(session.connect(80).await),
            kind(session.connect_unheld(80).await),
            kind(session.agent().await),
            kind(session.exec("true", [""; 0]).await),
        ] {
            assert_eq!(refused, ErrorKind::Config);
        }
        session.suspend().await.unwrap();
        assert_eq!(kind(session.connect_unheld(80).await), ErrorKind::SessionSuspended);
        assert_eq!(session.state(), SessionState::Suspended);
    });
}

#[test]
fn metering_never_falls() {
    block_on(async {
        let house = House::new().await;
        let session = house.start(&Program::Heartbeat, SessionPolicy::new()).await;
        let mut before = session.metering();
        let look = |before: &mut dormouse::Metering| {
            let now = session.metering();
            assert!(now.running >= before.running && now.suspended >= before.suspended);
            assert!(now.vcpu >= before.vcpu && now.snapshot_bytes >= before.snapshot_bytes);
            assert!(now.suspends >= before.suspends && now.resumes >= before.resumes);
            *before = now;
        };
        for round in 1..=3 {
            tokio::time::sleep(SHORT / 4).await;
            look(&mut before);
            let (running, written) = (before.running, before.snapshot_bytes);
            session.suspend().await.unwrap();
            look(&mut before);
            assert!(before.running > running && before.snapshot_bytes > written);
            let asleep = before;
            tokio::time::sleep(SHORT / 4).await;
            look(&mut before);
            assert!(before.suspended > asleep.suspended);
            assert_eq!((before.running, before.vcpu), (asleep.running, asleep.vcpu));
            session.resume().await.unwrap();
            look(&mut before);
            assert_eq!((before.suspends, before.resumes), (round, round));
        }
        session.terminate().await.unwrap();
        look(&mut before);
    });
}
