use std::io::{Read, Write};
use std::os::unix::net::UnixStream as StdStream;
use std::thread::JoinHandle;

use super::*;
use crate::agent::tests::{agent_of, heard};
use crate::config::AgentConfig;
use crate::protocol::{Failure, FailureKind, Frame, Reply};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n";
const LATER: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";

/// An agent whose guest gives these answers, one to each request, and what it was asked by.
fn guest(name: HookName, hook: Hook, answers: &[&str]) -> (Agent, Vec<JoinHandle<String>>) {
    let (agent, guests) = agent_of(AgentConfig::new().hook(name, hook), answers.len());
    let asked = guests.into_iter().zip(answers).map(|(guest, answer)| {
        let answer = answer.to_string();
        std::thread::spawn(move || serve(guest, &answer))
    });
    (agent, asked.collect())
}

fn serve(mut guest: StdStream, answer: &str) -> String {
    heard(&mut guest);
    guest.write_all(&Frame::message(&Reply::Done)).unwrap();
    let mut request = Vec::new();
    let mut byte = [0];
    // All requests here have a payload that ends with `}`.
    while !request.ends_with(b"}") {
        match guest.read(&mut byte) {
            Ok(1) => request.extend(byte),
            _ => break,
        }
    }
    // The host may have heard enough.
    let _ = guest.write_all(answer.as_bytes());
    String::from_utf8(request).unwrap()
}

async fn refusal(name: HookName, hook: Hook, answer: &str) -> String {
    let (agent, _asked) = guest(name, hook, &[answer]);
    let error = agent.run_hook(name, "{}").await.unwrap_err();
    assert_eq!(error.kind(), &ErrorKind::Hook, "{error}");
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_has_the_path_of_its_hook_and_the_payload() {
    let (agent, asked) = guest(HookName::Run, Hook::http(9000), &[OK]);
    agent.run_hook(HookName::Run, r#"{"microvmId": "a"}"#).await.unwrap();
    let request = asked.into_iter().next().unwrap().join().unwrap();
    let line = "POST /aws/lambda-microvms/runtime/v1/run HTTP/1.1\r\n";
    assert!(request.starts_with(line), "{request}");
    assert!(request.contains("content-type: application/json\r\n"), "{request}");
    assert!(request.ends_with("\r\n\r\n{\"microvmId\": \"a\"}"), "{request}");
    // Another one is not configured, and nothing happens.
    agent.run_hook(HookName::Suspend, "{}").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_say_not_yet_is_asked_again_and_others_have_failed() {
    let (agent, asked) = guest(HookName::Ready, Hook::http_at(80, "/up"), &[LATER, LATER, OK]);
    agent.run_hook(HookName::Ready, "{}").await.unwrap();
    for request in asked {
        assert!(request.join().unwrap().starts_with("POST /up HTTP/1.1\r\n"));
    }
    let said = refusal(HookName::Suspend, Hook::http(80), LATER).await;
    assert_eq!(said, "the hook `suspend` was answered 503 Service Unavailable");
    let error = "HTTP/1.1 500 Internal Server Error\r\ncontent-length: 0\r\n\r\n";
    let said = refusal(HookName::Ready, Hook::http(80), error).await;
    assert_eq!(said, "the hook `ready` was answered 500 Internal Server Error");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_at_the_port_is_not_yet_for_who_may_say_so() {
    let refused = Failure { kind: FailureKind::Refused, errno: 111, what: "connect".into() };
    let refused = Frame::message(&Reply::Failed(refused));
    for name in [HookName::Ready, HookName::Terminate] {
        let config = AgentConfig::new().hook(name, Hook::http(80));
        let (agent, mut guests) = agent_of(config, 2);
        let mut nobody = guests.remove(0);
        let refused = refused.clone();
        let nobody = std::thread::spawn(move || {
            heard(&mut nobody);
            nobody.write_all(&refused).unwrap();
            nobody
        });
        let somebody = guests.remove(0);
        let asked = std::thread::spawn(move || serve(somebody, OK));
        let done = agent.run_hook(name, "{}").await;
        drop(nobody.join().unwrap());
        match name.may_wait() {
            true => {
                done.unwrap();
                asked.join().unwrap();
            }
            false => {
                let error = done.unwrap_err().to_string();
                assert_eq!(error, "the hook `terminate` found nobody at port 80");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_nonsense_and_an_endless_answer_are_failures() {
    let soon = Hook::http(80).timeout(Duration::from_millis(50));
    let (agent, mut guests) = agent_of(AgentConfig::new().hook(HookName::Run, soon), 1);
    let mut silent = guests.remove(0);
    let silent = std::thread::spawn(move || {
        heard(&mut silent);
        silent
    });
    let said = agent.run_hook(HookName::Run, "{}").await.unwrap_err().to_string();
    assert!(said.contains("has not answered within 0.05 s"), "{said}");
    drop(silent.join().unwrap());
    let said = refusal(HookName::Run, Hook::http(80), "SMTP 220 hello\r\n\r\n").await;
    assert!(said.contains("was not answered"), "{said}");
    let long = format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{}", "x".repeat(1 << 20));
    let said = refusal(HookName::Run, Hook::http(80), &long).await;
    assert!(said.contains("was not answered"), "{said}");
}
