//! What the build script does where it cannot build the agent, with compilers that only pretend.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Output};

const GNU: &str = "x86_64-unknown-linux-gnu";
const MUSL: &str = "x86_64-unknown-linux-musl";

/// What rustc says where the C library for static programs is missing.
const NO_STATIC_LIBC: &str = "error: linking with `cc` failed: exit status: 1
  = note: /usr/bin/ld: cannot find -lc: No such file or directory
error: aborting due to 1 previous error";

/// A directory with the build script, compiled, and a compiler for it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("dormouse-build-{}-{name}", process::id()));
        fs::create_dir_all(path.join("out")).unwrap();
        let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("build.rs");
        let compiled = Command::new(rustc)
            .args(["--edition", "2024", "-o"])
            .arg(path.join("script"))
            .arg(script)
            .status()
            .unwrap();
        assert!(compiled.success());
        Self(path)
    }

    /// A compiler that can build for musl, and for nothing else.
    fn rustc(&self, fault: &str) -> PathBuf {
        let [written, path] = ["rustc.sh", "rustc"].map(|name| self.0.join(name));
        let text = format!(
            "#!/bin/sh\ncase \"$*\" in\n\
             *'--print sysroot'*) echo '{}'; exit;;\n\
             *{MUSL}*) while [ \"$1\" != -o ]; do shift; done; echo musl >\"$2\"; exit;;\n\
             esac\ncat >&2 <<'END'\n{fault}\nEND\nexit 1\n",
            self.0.join("sysroot").display()
        );
        fs::write(&written, text).unwrap();
        // By another process: what is open for writing cannot be executed, and a process that another test starts has a
        // copy of all descriptors of this one.
        let made = Command::new("install").arg("-m755").args([&written, &path]).status().unwrap();
        assert!(made.success());
        path
    }

    fn install_musl(&self) {
        let target = self.0.join("sysroot/lib/rustlib").join(MUSL).join("lib");
        fs::create_dir_all(target).unwrap();
    }

    fn run(&self, rustc: &Path, variables: &[(&str, &OsStr)]) -> Output {
        Command::new(self.0.join("script"))
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("CARGO_FEATURE_AGENT", "1")
            .env("OUT_DIR", self.0.join("out"))
            .env("TARGET", GNU)
            .env("RUSTC", rustc)
            .envs(variables.iter().copied())
            .output()
            .unwrap()
    }

    fn agent(&self) -> Option<String> {
        fs::read_to_string(self.0.join("out/guest-agent")).ok()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What cargo shows as errors.
fn errors(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    let lines = text.lines().filter_map(|line| line.strip_prefix("cargo::error="));
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn where_no_static_libc_is_installed_the_build_says_what_to_do() {
    let scratch = Scratch::new("none");
    let said = errors(&scratch.run(&scratch.rustc(NO_STATIC_LIBC), &[]));
    for word in [
        "cannot find -lc",
        "apt install libc6-dev",
        "dnf install glibc-static",
        "rustup target add x86_64-unknown-linux-musl",
        "DORMOUSE_GUEST_AGENT",
        "without the feature `agent`",
    ] {
        assert!(said.contains(word), "{word} in {said}");
    }
    assert_eq!(scratch.agent(), None);
}

#[test]
fn where_rust_has_musl_that_is_taken_instead() {
    let scratch = Scratch::new("musl");
    scratch.install_musl();
    let output = scratch.run(&scratch.rustc(NO_STATIC_LIBC), &[]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(scratch.agent().as_deref(), Some("musl\n"));
}

#[test]
fn an_error_in_the_code_is_said_and_not_hidden_by_another_target() {
    let scratch = Scratch::new("code");
    scratch.install_musl();
    let said = errors(&scratch.run(&scratch.rustc("error[E0308]: mismatched types"), &[]));
    assert!(said.contains("cannot build the agent") && said.contains("E0308"), "{said}");
    assert_eq!(scratch.agent(), None);
}

#[test]
fn for_documentation_nothing_is_compiled() {
    let scratch = Scratch::new("docs");
    let nobody = Path::new("/nonexistent/rustc");
    let output = scratch.run(nobody, &[("DOCS_RS", OsStr::new("1"))]);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(scratch.agent().as_deref(), Some(""));
}

#[test]
fn an_agent_that_is_given_is_taken_and_nothing_compiled() {
    let scratch = Scratch::new("given");
    let given = scratch.0.join("given");
    let nobody = Path::new("/nonexistent/rustc");
    let variable = [("DORMOUSE_GUEST_AGENT", given.as_os_str())];
    let said = errors(&scratch.run(nobody, &variable));
    assert!(said.contains(&*given.to_string_lossy()), "{said}");
    fs::write(&given, "an agent").unwrap();
    let output = scratch.run(nobody, &variable);
    assert!(output.status.success(), "{output:?}");
    assert_eq!(scratch.agent().as_deref(), Some("an agent"));
    // Another one is taken when it changes.
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains(&format!("rerun-if-changed={}", given.display())), "{text}");
}
