//! How an image wants to be run.
//!
//! Source: OCI image specification, config.md; Docker's image specification 1.2, which it comes from. A field
//! may be null wherever it may be missing.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::ImageError;
use super::digest::Digest;
use crate::config::{Entrypoint, signal};

/// How an image wants to be run: what its maker wrote into it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ImageConfig {
    /// The program, and the arguments that always come first.
    pub entrypoint: Vec<String>,
    /// Arguments that come next, or the program where there is no entrypoint.
    pub cmd: Vec<String>,
    /// The environment, in order.
    pub env: Vec<(String, String)>,
    /// `user`, `uid`, `user:group` or `uid:gid`, of the image's own /etc/passwd and /etc/group.
    pub user: Option<String>,
    /// An absolute path.
    pub working_dir: Option<String>,
    /// Ports that its programs listen at.
    pub exposed_ports: Vec<ExposedPort>,
    /// The number of the signal that asks its program to end; SIGTERM if none.
    pub stop_signal: Option<i32>,
    /// What its maker, or others, say about it.
    pub labels: BTreeMap<String, String>,
    /// Directories with data that outlives it.
    pub volumes: Vec<String>,
}

/// A port that an image's program listens at.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExposedPort {
    /// Its number.
    pub port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
}

impl ImageConfig {
    /// The program that the image is there for, as the agent starts it; none if the image names none.
    ///
    /// A user that the image names is looked up by the agent, in the image's own /etc/passwd and /etc/group, which say
    /// its HOME too, unless the image does; HOME is `/root` where it names none. All of it can be changed: see [`Entrypoint`].
    pub fn entrypoint(&self) -> Option<Entrypoint> {
        self.entrypoint_with(&self.cmd)
    }

    /// As [`entrypoint`](Self::entrypoint), with these arguments in place of the image's `cmd`, as
    /// `docker run IMAGE ARGS…` has it.
    pub fn entrypoint_with<S: AsRef<str>>(&self, args: &[S]) -> Option<Entrypoint> {
        let args = args.iter().map(AsRef::as_ref);
        let argv: Vec<&str> = self.entrypoint.iter().map(String::as_str).chain(args).collect();
        if argv.is_empty() {
            return None;
        }
        let mut entrypoint = Entrypoint::new(argv);
        let user = self.user.as_deref();
        for (name, value) in &self.env {
            entrypoint = entrypoint.env(name, value);
        }
        if let Some(directory) = &self.working_dir {
            entrypoint = entrypoint.current_dir(directory);
        }
        if let Some(user) = user {
            entrypoint = entrypoint.user(user);
        }
        if let Some(signal) = self.stop_signal {
            entrypoint = entrypoint.stop_signal(signal.to_string());
        }
        Some(entrypoint)
    }
}

/// The file that describes an image.
#[derive(Debug, Deserialize)]
pub(super) struct ConfigFile {
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) os: String,
    #[serde(default)]
    config: Option<Run>,
    rootfs: Option<Rootfs>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Run {
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    env: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde::de::IgnoredAny>>,
    stop_signal: Option<String>,
    labels: Option<BTreeMap<String, String>>,
    volumes: Option<BTreeMap<String, serde::de::IgnoredAny>>,
}

#[derive(Debug, Deserialize)]
struct Rootfs {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

impl ConfigFile {
    /// The digests of the unpacked layers, the lowest first.
    pub(super) fn diff_ids(&self) -> Result<Vec<Digest>, ImageError> {
        let Some(rootfs) = &self.rootfs else {
            return Err(ImageError::Missing { name: "`rootfs` in its configuration".to_owned() });
        };
        if rootfs.kind != "layers" {
            let value = rootfs.kind.clone();
            return Err(ImageError::Config { what: "kind of root file system", value });
        }
        let texts = rootfs.diff_ids.iter().flatten();
        let parse = |text: &String| {
            Digest::parse(text).ok_or_else(|| ImageError::NoDigest { text: text.clone() })
        };
        texts.map(parse).collect()
    }

    /// How it is to be run.
    pub(super) fn run(self) -> Result<ImageConfig, ImageError> {
        let run = self.config.unwrap_or_default();
        let refuse = |what, value: &str| ImageError::Config { what, value: value.to_owned() };
        let some = |text: Option<String>| text.filter(|text| !text.is_empty());
        let mut env = Vec::new();
        for variable in run.env.into_iter().flatten() {
            // Without a value it would be taken from whoever runs it; here nobody has one.
            if let Some((name, value)) = variable.split_once('=')
                && !name.is_empty()
            {
                env.push((name.to_owned(), value.to_owned()));
            }
        }
        let working_dir = some(run.working_dir);
        // Docker takes a relative one to be below the root.
        let working_dir = working_dir.map(|path| match path.starts_with('/') {
            true => path,
            false => format!("/{path}"),
        });
        let ports = run.exposed_ports.into_iter().flatten();
        let ports = ports.map(|(text, _)| port(&text).ok_or_else(|| refuse("exposed port", &text)));
        let stop_signal = some(run.stop_signal);
        let stop_signal = stop_signal
            .map(|text| signal(&text).ok_or_else(|| refuse("stop signal", &text)))
            .transpose()?;
        Ok(ImageConfig {
            entrypoint: run.entrypoint.unwrap_or_default(),
            cmd: run.cmd.unwrap_or_default(),
            env,
            user: some(run.user),
            working_dir,
            exposed_ports: ports.collect::<Result<_, _>>()?,
            stop_signal,
            labels: run.labels.unwrap_or_default(),
            volumes: run.volumes.unwrap_or_default().into_keys().collect(),
        })
    }
}

/// `80`, or `80/udp`.
fn port(text: &str) -> Option<ExposedPort> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    let port = port.parse().ok()?;
    let known = ["tcp", "udp", "sctp"].contains(&protocol);
    known.then(|| ExposedPort { port, protocol: protocol.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(run: &str) -> Result<ImageConfig, ImageError> {
        let text = format!(r#"{{"config": {run}, "rootfs": {{"type": "layers"}}}}"#);
        serde_json::from_str::<ConfigFile>(&text).unwrap().run()
    }

    #[test]
    fn an_image_is_run_as_it_says() {
        let config = parse(
            r#"{"Entrypoint": ["/bin/app", "-v"], "Cmd": ["serve"], "Env": ["PATH=/bin", "A=b=c", "EMPTY="],
                "User": "web:log", "WorkingDir": "srv", "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
                "StopSignal": "SIGQUIT", "Labels": {"x": "y"}, "Volumes": {"/data": {}}}"#,
        );
        let config = config.unwrap();
        let entrypoint = config.entrypoint().unwrap();
        let expected = Entrypoint::new(["/bin/app", "-v", "serve"])
            .env("PATH", "/bin")
            .env("A", "b=c")
            .env("EMPTY", "")
            .current_dir("/srv")
            .user("web:log")
            .stop_signal("3");
        assert_eq!(entrypoint, expected);
        assert_eq!(config.entrypoint_with(&["once"]).unwrap().argv, ["/bin/app", "-v", "once"]);
        assert_eq!(config.stop_signal, Some(3));
        let ports: Vec<_> =
            config.exposed_ports.iter().map(|p| (p.port, p.protocol.as_str())).collect();
        assert_eq!(ports, [(53, "udp"), (80, "tcp")]);
        assert_eq!(config.volumes, ["/data"]);
    }

    #[test]
    fn nothing_has_to_be_there_and_null_is_nothing() {
        for run in
            ["null", "{}", r#"{"Entrypoint": null, "Env": null, "User": "", "Labels": null}"#]
        {
            let config = parse(run).unwrap();
            assert_eq!(config, ImageConfig::default());
            assert_eq!(config.entrypoint(), None);
        }
        let root = parse(r#"{"Cmd": ["sh"]}"#).unwrap().entrypoint().unwrap();
        assert_eq!(root, Entrypoint::new(["sh"]));
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for run in [r#"{"ExposedPorts": {"http": {}}}"#, r#"{"ExposedPorts": {"80/x": {}}}"#] {
            assert!(parse(run).unwrap_err().to_string().contains("exposed port"), "{run}");
        }
        assert!(parse(r#"{"StopSignal": "SIGNOPE"}"#).is_err());
    }
}
