//! A program of Python's in a container image, whose hooks are HTTP.

use dormouse::{Cmdline, VmConfig};

use super::*;
use crate::debian_image;

/// Answers each hook, and says what it was asked when it is asked for `/log`.
const APPLICATION: &str = r#"
import http.server, json
log = []
class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, text):
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"] or 0)).decode()
        log.append([self.path, self.headers["content-type"], body])
        self.answer(500 if len(log) == 3 else 200, b"")
    def do_GET(self):
        self.answer(200, json.dumps(log).encode())
    def log_message(self, *args):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", 9000), Handler).serve_forever()
"#;

#[test]
fn an_application_of_aws_lambdas_is_asked_the_same_hooks_at_the_same_paths_in_order() {
    block_on(async {
        let scratch = Scratch::new("session-python");
        let sessions = Sessions::open(scratch.0.join("sessions")).await.unwrap();
        let image = debian_image::unpacked("python").await;
        let config = VmConfig::new(Release::Linux6_12.kernel())
            .cmdline(Cmdline::default().push("quiet").unwrap())
            .memory_mib(256);
        let hook = || Hook::http(9000).timeout(PATIENCE / 3);
        // It is not there before its port is: `ready` waits for it, `run` would not.
        let agent = AgentConfig::new()
            .entrypoint(Entrypoint::new(["python3", "-c", APPLICATION]))
            .hook(HookName::Ready, hook())
            .hook(HookName::Run, hook())
            .hook(HookName::Suspend, hook())
            .hook(HookName::Resume, hook())
            .hook(HookName::Terminate, hook());
        let vm = MicroVm::create(image.configure(config.agent(agent))).unwrap();
        let options = SessionOptions::new().id("alice").run_payload(r#"{"user": 7}"#);
        let session = sessions.start(vm, options).await.unwrap();
        // The third that it is asked it refuses.
        let refused = session.suspend().await.unwrap_err();
        assert_eq!(refused.kind(), &ErrorKind::Hook, "{refused:?}");
        assert_eq!(session.state(), SessionState::Running);
        session.suspend().await.unwrap();
        let request = Request::get("/log").body(Empty::<Bytes>::new()).unwrap();
        let answer = session.request(9000, request).await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK);
        let log = answer.into_body().collect().await.unwrap().to_bytes();
        let log: Vec<[String; 3]> = serde_json::from_slice(&log).unwrap();
        let names = ["ready", "run", "suspend", "suspend", "resume"];
        let paths = names.map(|name| format!("/aws/lambda-microvms/runtime/v1/{name}"));
        let asked: Vec<_> = log.iter().map(|[path, _, _]| path).collect();
        assert_eq!(asked, paths.each_ref());
        assert_eq!(log[1][1], "application/json");
        assert_eq!(
            serde_json::from_str::<serde_json::Value>(&log[1][2]).unwrap(),
            serde_json::json!({ "microvmId": "alice", "runHookPayload": "{\"user\": 7}" })
        );
        session.terminate().await.unwrap();
    });
}
