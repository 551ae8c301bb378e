use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;
use std::time::Duration;

use dormouse::{AgentConfig, ErrorKind, HostService};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Guest, block_on, busybox, config, config_of, sh};
use crate::{Release, guest_tool};

#[test]
fn ports_of_the_guest_are_reached_many_at_once_and_closed_by_halves() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new()).memory_mib(256)).await;
        let error = guest.agent.connect_tcp(8080).await.unwrap_err();
        assert_eq!(error.kind(), &ErrorKind::Refused, "{error}");
        guest.sh("mkdir -p /www; head -c 300000 /dev/zero >/www/zeros; busybox httpd -p 127.0.0.1:8080 -h /www").await;
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..50 {
            let agent = guest.agent.clone();
            tasks.spawn(async move {
                let mut stream = agent.connect_tcp(8080).await.unwrap();
                stream.write_all(b"GET /zeros HTTP/1.0\r\n\r\n").await.unwrap();
                let mut answer = Vec::new();
                stream.read_to_end(&mut answer).await.unwrap();
                assert!(
                    answer.starts_with(b"HTTP/1.0 200 OK")
                        || answer.starts_with(b"HTTP/1.1 200 OK")
                );
                assert!(answer.len() > 300_000, "{}", answer.len());
            });
        }
        while let Some(task) = tasks.join_next().await {
            task.unwrap();
        }
        // The end of what is written comes as an end, and the answer after it.
        guest.sh("(nc -l -p 9000 127.0.0.1 >/got; echo over >>/got) >/dev/null 2>&1 &").await;
        let mut stream = guest.connect(9000).await;
        stream.write_all(b"half\n").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).await.unwrap();
        assert_eq!(
            guest.sh("while ! grep over /got; do sleep 0.1; done; cat /got").await,
            "over\nhalf\nover\n"
        );
    });
}

#[test]
fn connections_that_are_dropped_leave_nothing_in_the_guest_whatever_its_server_does() {
    block_on(async {
        let guest = Guest::boot(config(AgentConfig::new())).await;
        // It takes every connection, and never reads or writes.
        guest.sh("(nc -ll -p 9100 -e sleep 1000) >/dev/null 2>&1 &").await;
        drop(guest.connect(9100).await);
        let threads: u32 = guest.sh("ls /proc/1/task | wc -l").await.trim().parse().unwrap();
        let mut streams = Vec::new();
        for _ in 0..20 {
            streams.push(guest.agent.connect_tcp(9100).await.unwrap());
        }
        let now: u32 = guest.sh("ls /proc/1/task | wc -l").await.trim().parse().unwrap();
        assert!(now > threads + 10, "{now}, {threads} before");
        // Some have said that they have said all, long before they go.
        for stream in &mut streams[..10] {
            stream.shutdown().await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        drop(streams);
        // One thread that stays may have come: it reads what programs say when nobody listens any more.
        let most = threads + 1;
        let script =
            format!("while test $(ls /proc/1/task | wc -l) -gt {most}; do sleep 0.1; done");
        guest.sh(&script).await;
    });
}

#[test]
fn a_guest_reaches_the_services_of_the_host_that_it_may_and_no_others() {
    block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let answering = thread::spawn(move || {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = [0; 6];
                stream.read_exact(&mut line).unwrap();
                stream.write_all(&line).unwrap();
            }
        });
        let agent = AgentConfig::new().service("echo", 7, HostService::Tcp(address));
        let guest = Guest::boot(config(agent)).await;
        for _ in 0..2 {
            assert_eq!(guest.sh("echo hello | nc 127.0.0.1 7").await, "hello\n");
        }
        answering.join().unwrap();
        guest.sh("! echo hello | nc 127.0.0.1 8").await;
    });
}

#[test]
fn what_a_program_of_the_guest_says_at_the_agents_port_disturbs_nobody() {
    block_on(async {
        let archive = busybox().host_file("bin/guest-tool", guest_tool());
        let config = config_of(Release::Linux6_12, archive, AgentConfig::new());
        let guest = Guest::boot(config.clone()).await;
        let other = Guest::boot(config).await;
        // Nothing at all, random bytes, a length of 4 GiB, a hello that is none, and a call of the wrong way.
        let hello = r"\022\000\000\000\000\000dormouse\377\377\377\377\000";
        let script = format!(
            "say() {{ guest-tool vsock-cat 1000 >/dev/null 2>&1; }}; \
             for at in 1 2 3 4 5; do \
             (sleep 1000 | say) & (head -c 100000 /dev/urandom | say) & (cat /dev/zero | say) & \
             (printf '\\377\\377\\377\\377\\000' | say) & (printf '{hello}' | say) & \
             (printf '\\001\\000\\000\\000\\004\\012' | say) & done; sleep 2; echo said"
        );
        assert_eq!(guest.sh(&script).await, "said\n");
        for guest in [&guest, &other] {
            let agent = guest.vm.agent().await.unwrap();
            assert_eq!(sh(&agent, "echo alive").await.unwrap(), "alive\n");
        }
    });
}
