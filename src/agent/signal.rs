//! Signal names and numbers of an image's `StopSignal`.

/// What a process is stopped with where the image names nothing usable.
const TERM: u32 = 15;

/// The number of a signal as OCI images name it: `SIGTERM`, `TERM`, `15`, `SIGRTMIN+3`. TERM for none, and for one that
/// does not exist: an image is hostile input, and KILL follows after the grace period in any case.
pub fn parse(text: Option<&str>) -> u32 {
    let Some(text) = text else { return TERM };
    if let Ok(number) = text.parse::<u32>() {
        return if (1..=64).contains(&number) { number } else { TERM };
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    if let Some(offset) = name.strip_prefix("RTMIN") {
        let offset = offset.strip_prefix('+').unwrap_or("0").parse::<u32>().unwrap_or(u32::MAX);
        return if offset <= 30 { 34 + offset } else { TERM };
    }
    if let Some(offset) = name.strip_prefix("RTMAX") {
        let offset = offset.strip_prefix('-').unwrap_or("0").parse::<u32>().unwrap_or(u32::MAX);
        return if offset <= 30 { 64 - offset } else { TERM };
    }
    NAMES.iter().find(|(known, _)| *known == name).map_or(TERM, |(_, number)| *number)
}

/// Linux numbers on x86 and Arm: signal(7).
const NAMES: &[(&str, u32)] = &[
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers() {
        for (text, number) in [
            ("SIGTERM", 15),
            ("quit", 3),
            ("3", 3),
            ("SIGRTMIN+3", 37),
            ("RTMAX-1", 63),
            ("SIGWINCH", 28),
            ("0", TERM),
            ("65", TERM),
            ("nonsense", TERM),
            ("SIGRTMIN+99", TERM),
            ("-5", TERM),
        ] {
            assert_eq!(parse(Some(text)), number, "{text}");
        }
        assert_eq!(parse(None), TERM);
    }
}
