//! A guest that dies while it answers, and another that does not.

use dormouse::{Ready, SessionReason, Template, TemplateOptions};
use http_body_util::Empty;
use hyper::Response;
use hyper::body::Incoming;
use hyper::client::conn::http1::SendRequest;

use super::*;
use crate::agent::{busybox, config_of};

/// A server with an answer that never ends, an answer of a length that never comes, and one that never begins.
const APPLICATION: &str = r#"
mkdir -p /www/cgi-bin; echo up > /www/index.html
busybox truncate -s 1024G /www/long
cat > /www/cgi-bin/endless <<'CGI'
#!/bin/sh
echo 'Content-Type: text/plain'; echo
while true; do echo more; done
CGI
printf '#!/bin/sh\necho > /tmp/asked; sleep 1000\n' > /www/cgi-bin/never
busybox chmod +x /www/cgi-bin/*
exec httpd -f -p 8080 -h /www
"#;

async fn ask(endpoint: &Endpoint, path: &str) -> (SendRequest<Empty<Bytes>>, Response<Incoming>) {
    let mut sender = client::h1(endpoint.address()).await;
    let answer = sender.send_request(client::request(path)).await.unwrap();
    assert_eq!(answer.status(), 200, "{path}");
    (sender, answer)
}

#[test]
fn a_guest_that_dies_in_the_middle_of_answers_breaks_them_off_and_another_goes_on() {
    block_on(async {
        let scratch = Scratch::new("endpoint-death");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let agent = AgentConfig::new().entrypoint(Entrypoint::new(["sh", "-c", APPLICATION]));
        let config = config_of(Release::Linux6_12, busybox(), agent);
        let options = TemplateOptions::new(scratch.0.join("templates"));
        let options = options.timeout(PATIENCE).ready(Ready::Port(8080));
        let template = Template::build(config, &options).await.unwrap();
        let options = EndpointOptions::new().without_tokens();
        let endpoint = Endpoint::bind("127.0.0.1:0", sessions.clone(), options).await.unwrap();
        let other = template.start().await.unwrap();
        sessions.start_with_id("other", other, SessionOptions::new()).await.unwrap();
        // Its kernel panics, or resets the machine at once. (One that switches it off resets its devices before, which is
        // how an application ends an answer that has no length, too.)
        for (key, how) in [("c", "panicked"), ("b", "rebooted")] {
            let vm = template.start().await.unwrap();
            let session = sessions.start_with_id("one", vm, SessionOptions::new()).await.unwrap();
            let (_client, mut endless) = ask(&endpoint, "/cgi-bin/endless").await;
            let (_client, mut long) = ask(&endpoint, "/long").await;
            for answer in [&mut endless, &mut long] {
                answer.frame().await.unwrap().unwrap();
            }
            assert_eq!(long.headers()["content-length"], "1099511627776");
            assert!(!endless.headers().contains_key("content-length"));
            let address = endpoint.address();
            let never = client::get(address, "one.localhost", "/cgi-bin/never", "");
            let never = tokio::spawn(never);
            let asked = ["-c", "until [ -e /tmp/asked ]; do sleep 0.1; done"];
            session.exec("sh", asked).await.unwrap().check().unwrap();

            let dies = format!("echo {key} > /proc/sysrq-trigger; sleep 1000");
            session.exec("sh", ["-c", &dies]).await.unwrap_err();
            assert!(endless.into_body().collect().await.is_err());
            assert!(long.into_body().collect().await.is_err());
            let never = never.await.unwrap();
            assert_eq!((never.status, never.stage().as_str()), (502, "response"));
            assert_eq!(never.json()["session"], "one");
            let end = session.watch().wait_for(SessionState::Terminated).await.unwrap();
            assert_eq!(end.reason, SessionReason::GuestEnded);
            assert!(end.message.as_deref().unwrap().contains(how), "{end}");
            let gone = client::get(address, "one.localhost", "/", "").await;
            assert_eq!((gone.status, gone.stage().as_str()), (404, "route"));
            let lives = client::get(address, "other.localhost", "/", "").await;
            assert_eq!((lives.status, lives.body.as_str()), (200, "up\n"));
            sessions.remove("one").await.unwrap();
        }
    });
}
