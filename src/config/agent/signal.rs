//! Signals by their names and numbers on x86-64.
//!
//! Source: signal(7).

/// Names of signals by their numbers, from 1.
const SIGNALS: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
    "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
    "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
];
/// SIGRTMIN as the C library has it, and SIGRTMAX.
const REAL_TIME: (i32, i32) = (34, 64);

/// The number of `SIGTERM`, `TERM`, `15`, or `SIGRTMIN+3`.
pub(crate) fn signal(text: &str) -> Option<i32> {
    let (min, max) = REAL_TIME;
    if let Ok(number) = text.parse() {
        return (1..=max).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(at) = SIGNALS.iter().position(|known| *known == name) {
        return i32::try_from(at + 1).ok();
    }
    let number = match (name.strip_prefix("RTMIN"), name.strip_prefix("RTMAX")) {
        (Some(""), _) => min,
        (_, Some("")) => max,
        (Some(rest), _) => min.checked_add(rest.strip_prefix('+')?.parse().ok()?)?,
        (_, Some(rest)) => max.checked_sub(rest.strip_prefix('-')?.parse().ok()?)?,
        _ => return None,
    };
    (min..=max).contains(&number).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        let cases = [
            ("SIGTERM", 15),
            ("term", 15),
            ("QUIT", 3),
            ("9", 9),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("64", 64),
            ("SIGSYS", 31),
            ("RTMIN", 34),
        ];
        for (text, number) in cases {
            assert_eq!(signal(text), Some(number), "{text}");
        }
        for bad in ["", "0", "65", "SIG", "SIGFOO", "RTMIN+99", "RTMAX+1", "RTMIN+", "-1"] {
            assert_eq!(signal(bad), None, "{bad}");
        }
    }
}
