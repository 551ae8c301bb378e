//! The kernel's command line: only what the kernel will take gets in.
//!
//! Source: Linux Documentation/admin-guide/kernel-parameters.rst; COMMAND_LINE_SIZE of x86.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error as ThisError;

use crate::error::{Error, ErrorKind};

/// COMMAND_LINE_SIZE on x86: 2,048 bytes with the terminating NUL.
pub(crate) const MAX_BYTES: usize = 2048;

/// Why an argument is refused.
#[derive(Debug, ThisError)]
#[error("cannot add {argument:?} to the kernel command line")]
pub(crate) struct CmdlineError {
    argument: String,
    source: linux_loader::cmdline::Error,
}

impl From<CmdlineError> for Error {
    fn from(error: CmdlineError) -> Self {
        let fix = match error.source {
            linux_loader::cmdline::Error::TooLarge => "it holds at most 2047 bytes",
            _ => "it takes printable ASCII; a value with spaces stands in double quotes",
        };
        Error::new(ErrorKind::Config, error).fix(fix)
    }
}

/// A kernel command line: printable ASCII, at most 2,047 bytes.
///
/// The default sends the kernel's messages to the serial console, and lets a panic reset the
/// machine at once, so that it ends rather than hangs.
///
/// ```
/// use dormouse::Cmdline;
///
/// let cmdline = Cmdline::default().set("root", "/dev/vda")?.push("quiet")?;
/// assert_eq!(cmdline.as_str(), "console=ttyS0 panic=-1 root=/dev/vda quiet");
/// assert!(Cmdline::default().push("nul\0").is_err());
/// # Ok::<(), dormouse::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cmdline(String);

impl Cmdline {
    /// A command line with nothing on it, not even the console.
    pub fn empty() -> Self {
        Self(String::new())
    }

    /// Adds `argument`, which may hold several, separated by spaces. White space around it is cut
    /// off.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] where it is not printable ASCII or does not fit.
    pub fn push(self, argument: &str) -> Result<Self, Error> {
        self.insert(argument, |cmdline| cmdline.insert_str(argument))
    }

    /// Adds `key=value`.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::Config`] where either holds a space (outside double quotes) or anything but printable
    /// ASCII, the key an equals sign, or they do not fit.
    pub fn set(self, key: &str, value: &str) -> Result<Self, Error> {
        self.insert(&format!("{key}={value}"), |cmdline| cmdline.insert(key, value))
    }

    /// The text, as the guest's /proc/cmdline shows it.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn insert(
        self,
        argument: &str,
        add: impl FnOnce(&mut linux_loader::cmdline::Cmdline) -> linux_loader::cmdline::Result<()>,
    ) -> Result<Self, Error> {
        let failed = |source| CmdlineError { argument: argument.to_owned(), source };
        let mut cmdline = linux_loader::cmdline::Cmdline::new(MAX_BYTES).map_err(failed)?;
        if !self.0.is_empty() {
            cmdline.insert_str(&self.0).map_err(failed)?;
        }
        add(&mut cmdline).map_err(failed)?;
        let bytes = cmdline.as_cstring().map_err(failed)?;
        // An argument without text leaves the space that was to stand before it.
        Ok(Self(String::from_utf8_lossy(bytes.as_bytes()).trim_end().to_owned()))
    }
}

impl Default for Cmdline {
    fn default() -> Self {
        Self("console=ttyS0 panic=-1".to_owned())
    }
}

impl fmt::Display for Cmdline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Cmdline {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.is_empty() { Ok(Self::empty()) } else { Self::empty().push(text) }
    }
}

impl TryFrom<String> for Cmdline {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Cmdline> for String {
    fn from(cmdline: Cmdline) -> Self {
        cmdline.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_refused_and_what_just_fits_is_taken() {
        let longest = "a".repeat(MAX_BYTES - 1);
        assert_eq!(longest.parse::<Cmdline>().unwrap().as_str(), longest);
        let error = Cmdline::empty().push(&"a".repeat(MAX_BYTES)).unwrap_err();
        assert!(error.to_string().contains("at most 2047 bytes"), "{error}");
        assert!(longest.parse::<Cmdline>().unwrap().push("b").is_err());
    }

    #[test]
    fn nul_newline_and_non_ascii_are_refused() {
        for bad in ["a\0b", "a\nb", "käse", "\x7f"] {
            let error = Cmdline::default().push(bad).unwrap_err();
            assert_eq!(error.kind(), &ErrorKind::Config, "{bad:?}");
        }
        assert!(Cmdline::default().set("a b", "c").is_err());
        assert!(Cmdline::default().set("a", "b c").is_err());
    }

    #[test]
    fn an_argument_without_text_adds_nothing() {
        for nothing in ["", " ", "\n"] {
            assert_eq!(Cmdline::default().push(nothing).unwrap(), Cmdline::default());
        }
        assert_eq!(Cmdline::empty().push("quiet\n").unwrap().as_str(), "quiet");
    }

    #[test]
    fn serialized_text_is_checked_again() {
        let cmdline = Cmdline::default().push("quiet").unwrap();
        let json = serde_json::to_string(&cmdline).unwrap();
        assert_eq!(serde_json::from_str::<Cmdline>(&json).unwrap(), cmdline);
        assert!(serde_json::from_str::<Cmdline>(r#""a\u0000b""#).is_err());
    }
}
