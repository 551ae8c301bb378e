//! A registry of our own on loopback: Docker's, with an empty store.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Stdio};

use crate::programs;

/// Who may ask, where not everybody may: the password is SESAME, as bcrypt has it.
const HTPASSWD: &str = "ali:$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW\n";
pub const NAME: &str = "ali";
pub const SESAME: &str = "open sesame";

/// Ends with the test.
pub struct Registry {
    process: Child,
    /// `127.0.0.1:PORT`
    pub host: String,
}

impl Registry {
    /// One that keeps its images in `directory`, and, if it `asks`, shows them to who knows the password.
    pub fn start(directory: &Path, asks: bool) -> Self {
        fs::create_dir_all(directory).unwrap();
        let mut config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:0'}}\n",
            directory.join("store").display()
        );
        if asks {
            let htpasswd = directory.join("htpasswd");
            fs::write(&htpasswd, HTPASSWD).unwrap();
            config +=
                &format!("auth: {{htpasswd: {{realm: cave, path: {}}}}}\n", htpasswd.display());
        }
        let path = directory.join("config.yml");
        fs::write(&path, config).unwrap();
        let mut process = programs::command("docker-registry")
            .args(["serve".as_ref(), path.as_os_str()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It says where it listens, and is heard to the end, so that it never waits for us.
        let mut lines =
            BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut heard = Vec::new();
        let host = loop {
            let Some(line) = lines.next() else { panic!("no registry: {}", heard.join("\n")) };
            if let Some((_, place)) = line.split_once("listening on ") {
                break place.split(['"', ' ', ',']).next().unwrap().to_owned();
            }
            heard.push(line);
        };
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, host }
    }

    /// Puts the image that skopeo finds at `from` there, as `name:tag`.
    pub fn push(&self, from: &str, name: &str, options: &[&str]) {
        let to = format!("docker://{}/{name}", self.host);
        let options = [
            &["--dest-tls-verify=false", "--dest-creds"][..],
            &[&format!("{NAME}:{SESAME}")],
            options,
        ];
        skopeo_copy(from, &to, &options.concat());
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Copies an image from one of skopeo's places to another.
pub fn skopeo_copy(from: &str, to: &str, options: &[&str]) {
    let mut command = programs::command("skopeo");
    command.args(["--insecure-policy", "copy", "--quiet"]).args(options).args([from, to]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
