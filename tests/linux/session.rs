//! Sessions of guests with an agent: hooks, ports, leases, and many that are woken at once.

mod faults;
mod python;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use dormouse::{
    AgentConfig, Entrypoint, Error, ErrorKind, Hook, HookName, MicroVm, Ready, Session,
    SessionOptions, SessionPolicy, SessionReason, SessionState, Sessions, Template,
    TemplateOptions,
};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::{Request, StatusCode};

use crate::agent::{block_on, busybox, config_of};
use crate::{PATIENCE, Release, Scratch, Transcript};

/// A server, and a child of it that counts.
const APPLICATION: &str = r#"
mkdir -p /www /run/dormouse; echo up > /www/index.html
(n=0; while true; do n=$((n + 1)); echo $n > /tmp/count; sleep 0.1; done) &
echo $! > /tmp/child; echo $$ > /tmp/server
exec httpd -f -p 8080 -h /www
"#;

fn application() -> AgentConfig {
    AgentConfig::new().entrypoint(Entrypoint::new(["sh", "-c", APPLICATION]))
}

/// A guest with this agent, and what it writes.
fn guest(agent: AgentConfig) -> (MicroVm<dormouse::Created>, Transcript) {
    let transcript = Transcript::default();
    let config = config_of(Release::Linux6_12, busybox(), agent).console(transcript.clone());
    (MicroVm::create(config).unwrap(), transcript)
}

async fn sh(session: &Session, script: &str) -> String {
    let output = session.exec("sh", ["-c", script]).await;
    output.unwrap_or_else(|error| panic!("{script}: {error:?}")).check().unwrap().text()
}

/// What the server answers; its connection is let go of.
async fn page(session: &Session) -> Result<String, Error> {
    let request = Request::get("/index.html").body(Empty::<Bytes>::new()).unwrap();
    let answer = session.request(8080, request).await?;
    assert_eq!(answer.status(), StatusCode::OK);
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    Ok(String::from_utf8(body.to_vec()).unwrap())
}

/// Waits for the server.
async fn served(session: &Session) -> String {
    loop {
        match page(session).await {
            Ok(page) => return page,
            Err(error) => assert_eq!(error.kind(), &ErrorKind::Refused, "{error:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn until(session: &Session, state: SessionState) {
    let mut watch = session.watch();
    let there = tokio::time::timeout(PATIENCE, watch.wait_for(state)).await;
    assert!(there.expect("the state in time").is_some(), "{:?}", watch.event());
}

#[test]
fn hooks_run_in_order_and_a_request_wakes_the_same_processes() {
    block_on(async {
        let hook = |script: &str| Hook::command(["sh", "-c", script]);
        let agent = application()
            .hook(HookName::Run, hook("cat > /tmp/run; echo run >> /tmp/hooks"))
            .hook(HookName::Suspend, hook("echo suspend >> /tmp/hooks; test ! -e /tmp/refuse"))
            .hook(HookName::Resume, hook("sleep 0.3; echo resume >> /tmp/hooks"))
            .hook(HookName::Terminate, hook("echo the hook terminate > /dev/console"));
        let scratch = Scratch::new("session-hooks");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let (vm, transcript) = guest(agent);
        let options = SessionOptions::new().id("alice").run_payload("for \"alice\"");
        let session = sessions.start(vm, options).await.unwrap();
        let run = sh(&session, "cat /tmp/run").await;
        assert_eq!(run, r#"{"microvmId":"alice","runHookPayload":"for \"alice\""}"#);
        assert_eq!(served(&session).await, "up\n");
        let processes = "cat /tmp/server /tmp/child /proc/sys/kernel/random/boot_id; \
            kill -0 $(cat /tmp/server) $(cat /tmp/child)";
        let before = sh(&session, processes).await;

        // A hook that fails leaves it running, and says so.
        let mut events = session.events();
        sh(&session, "echo > /tmp/refuse").await;
        let error = session.suspend().await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Hook, "{error:?}");
        assert_eq!(events.next().await.unwrap().state, SessionState::Suspending);
        let failed = events.next().await.unwrap();
        assert_eq!(failed.state, SessionState::Running);
        assert_eq!(failed.reason, SessionReason::SuspendFailed);
        assert!(failed.message.unwrap().contains("`suspend`"));
        assert_eq!(page(&session).await.unwrap(), "up\n");
        sh(&session, "rm /tmp/refuse").await;

        // Calls that were under way end with the sleep; the handle of before is of no use after it.
        let agent = session.agent().await.unwrap();
        session.suspend().await.unwrap();
        assert_eq!(session.state(), SessionState::Suspended);
        agent.memory_bytes().await.unwrap_err();
        let unheld = session.connect_unheld(8080).await.unwrap_err();
        assert_eq!(unheld.kind(), &ErrorKind::SessionSuspended);
        let requests = (0..10).map(|_| {
            let session = session.clone();
            tokio::spawn(async move { page(&session).await })
        });
        for request in requests.collect::<Vec<_>>() {
            assert_eq!(request.await.unwrap().unwrap(), "up\n");
        }
        assert_eq!(sh(&session, processes).await, before);
        let goes_on = "n=$(cat /tmp/count); until [ $(cat /tmp/count) -gt $n ]; do sleep 0.1; done";
        sh(&session, goes_on).await;
        // Nobody got in before the hook was done, and it ran once.
        assert_eq!(sh(&session, "cat /tmp/hooks").await, "run\nsuspend\nsuspend\nresume\n");
        let metering = session.metering();
        assert_eq!((metering.suspends, metering.resumes), (1, 1));
        assert!(metering.requests >= 12, "{metering:?}");

        // One that sleeps is woken for its end.
        session.suspend().await.unwrap();
        session.terminate().await.unwrap();
        assert!(transcript.text().contains("the hook terminate"), "{}", transcript.text());
    });
}

#[test]
fn calls_streams_and_the_guests_own_lease_keep_it_awake() {
    block_on(async {
        let scratch = Scratch::new("session-awake");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let (vm, _transcript) = guest(application());
        // Under emulation an idle guest takes processor time too.
        let policy = SessionPolicy::new().busy_cpu(None);
        let options = SessionOptions::new().policy(policy.clone());
        let session = sessions.start(vm, options).await.unwrap();
        served(&session).await;
        let idle = policy.idle_after(Duration::from_millis(300));
        session.set_policy(idle).await.unwrap();
        until(&session, SessionState::Suspended).await;

        let stays = async |session: &Session| {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            session.state() == SessionState::Running
        };
        let mut events = session.events();
        // A command that takes a while. This process may be so slow that the session is idle again when it looks.
        let begin = SystemTime::now();
        assert_eq!(sh(&session, "sleep 2; echo done").await, "done\n");
        assert_eq!(events.next().await.unwrap().reason, SessionReason::Traffic);
        while let Some(event) = events.try_next() {
            assert!(event.at >= begin + Duration::from_secs(2), "{event}");
        }
        until(&session, SessionState::Suspended).await;
        // A stream over which nothing goes, and one that does not count.
        let stream = session.connect(8080).await.unwrap();
        let unheld = session.connect_unheld(8080).await.unwrap();
        assert!(stays(&session).await);
        drop(stream);
        until(&session, SessionState::Suspended).await;
        drop(unheld);
        // A body that is not read.
        let request = Request::get("/index.html").body(Empty::<Bytes>::new()).unwrap();
        let answer = session.request(8080, request).await.unwrap();
        assert!(stays(&session).await);
        drop(answer);
        until(&session, SessionState::Suspended).await;
        // A program of the handle that was asked for, for as long as that is open.
        let agent = session.agent().await.unwrap();
        let mut process = agent.command("sleep").arg("1000").spawn().await.unwrap();
        assert!(stays(&session).await);
        process.kill();
        process.wait().await.unwrap();
        drop(process);
        until(&session, SessionState::Suspended).await;
        // The guest's own.
        sh(&session, "echo > /run/dormouse/keep-awake").await;
        assert!(stays(&session).await);
        sh(&session, "(sleep 1; rm /run/dormouse/keep-awake) >/dev/null 2>&1 &").await;
        until(&session, SessionState::Suspended).await;
        // Programs that are started as it is sent to sleep run, then or when it has woken, or are cut off.
        let is_over = Arc::new(AtomicBool::new(false));
        let starting = tokio::spawn({
            let (session, is_over) = (session.clone(), Arc::clone(&is_over));
            async move {
                while !is_over.load(Ordering::Relaxed) {
                    match session.exec("true", [""; 0]).await {
                        Ok(output) => assert!(output.status.success()),
                        Err(error) => assert!(
                            matches!(error.kind(), ErrorKind::Agent | ErrorKind::GuestEnded(_)),
                            "{error:?}"
                        ),
                    }
                }
            }
        });
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(300)).await;
            session.suspend().await.unwrap();
        }
        is_over.store(true, Ordering::Relaxed);
        starting.await.unwrap();
        session.terminate().await.unwrap();
    });
}

#[test]
fn a_session_whose_hook_run_fails_is_over_and_says_why() {
    block_on(async {
        let scratch = Scratch::new("session-run");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let fails = Hook::command(["sh", "-c", "echo no luck >&2; exit 3"]);
        let (vm, _transcript) = guest(AgentConfig::new().hook(HookName::Run, fails));
        let starting = tokio::spawn({
            let sessions = sessions.clone();
            async move { sessions.start_with_id("one", vm, SessionOptions::new()).await }
        });
        // Nobody gets in before it is done.
        let session = loop {
            match sessions.get("one") {
                Some(session) => break session,
                None => tokio::task::yield_now().await,
            }
        };
        let refused = session.exec("true", [""; 0]).await.unwrap_err();
        assert_eq!(refused.kind(), &ErrorKind::SessionEnded, "{refused:?}");
        let error = starting.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Hook, "{error:?}");
        until(&session, SessionState::Terminated).await;
        let event = session.watch().event();
        assert_eq!(event.reason, SessionReason::StartFailed);
        assert!(event.message.unwrap().contains("no luck"));
        // One whose guest never is ready ends when it is asked to.
        let never = AgentConfig::new().hook(HookName::Run, Hook::command(["sleep", "1000"]));
        let (vm, _transcript) = guest(never);
        let starting = tokio::spawn({
            let sessions = sessions.clone();
            async move { sessions.start_with_id("two", vm, SessionOptions::new()).await }
        });
        while sessions.get("two").is_none() {
            tokio::task::yield_now().await;
        }
        sessions.get("two").unwrap().terminate().await.unwrap();
        let error = starting.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::SessionEnded, "{error:?}");
    });
}

#[test]
fn twenty_sessions_of_a_template_that_are_woken_at_once_all_answer() {
    block_on(async {
        let scratch = Scratch::new("session-many");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let options = TemplateOptions::new(scratch.0.join("templates"));
        let options = options.timeout(PATIENCE).ready(Ready::Port(8080));
        let config = config_of(Release::Linux6_12, busybox(), application());
        let template = Template::build(config, &options).await.unwrap();
        let mut all = Vec::new();
        for number in 0..20 {
            let vm = template.start().await.unwrap();
            let id = format!("guest-{number}");
            let session = sessions.start_with_id(&id, vm, SessionOptions::new()).await.unwrap();
            sh(&session, &format!("echo {id} > /www/index.html")).await;
            // So that not all are awake at once before they have to be.
            session.suspend().await.unwrap();
            all.push(session);
        }
        let requests: Vec<_> = all
            .iter()
            .map(|session| {
                let session = session.clone();
                tokio::spawn(async move { page(&session).await })
            })
            .collect();
        for (number, request) in requests.into_iter().enumerate() {
            assert_eq!(request.await.unwrap().unwrap(), format!("guest-{number}\n"));
        }
        assert!(all.iter().all(|session| session.metering().resumes == 1));
        sessions.suspend_all().await.unwrap();
        assert!(all.iter().all(|session| session.state() == SessionState::Suspended));
    });
}
