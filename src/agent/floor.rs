//! Which versions of containerd and runc a node may have: FAULTS.md, rule 14. docs/requirements.md says the same to people.

/// The oldest containerd whose API and collector are those that Berth is built against.
pub const CONTAINERD: Version = [1, 6, 0];
/// The oldest runc that Berth was tried with.
pub const RUNC: Version = [1, 1, 5];

/// Ways out of a container that a runc has, and the releases that closed them. An older series than the first has it in all
/// its releases.
pub const ESCAPES: &[Escape] = &[
    Escape { cve: "CVE-2024-21626", fixed_in: &[[1, 1, 12]] },
    Escape { cve: "CVE-2025-31133", fixed_in: &[[1, 2, 8], [1, 3, 3]] },
    Escape { cve: "CVE-2025-52565", fixed_in: &[[1, 2, 8], [1, 3, 3]] },
    Escape { cve: "CVE-2025-52881", fixed_in: &[[1, 2, 8], [1, 3, 3]] },
];

/// Major, minor and patch.
pub type Version = [u64; 3];

/// A known way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Escape {
    /// Its number.
    pub cve: &'static str,
    /// The first release of each series without it, the oldest first.
    pub fixed_in: &'static [Version],
}

impl Escape {
    /// Whether a release of runc's own has it.
    pub fn is_in(&self, version: Version) -> bool {
        let series = |fixed: &&Version| fixed[..2] == version[..2];
        match self.fixed_in.iter().find(series) {
            Some(fixed) => version < *fixed,
            None => self.fixed_in.first().is_some_and(|first| version < *first),
        }
    }
}

/// Whether a node with these versions, as the programs tell them, may run bots: what to know about them, or what is wrong.
pub fn judge(containerd: &str, runc: &str) -> Result<String, String> {
    for (what, version, floor) in [("containerd", containerd, CONTAINERD), ("runc", runc, RUNC)] {
        match numbers(version) {
            Some(found) if found < floor => {
                return Err(format!("{what} is {version}, below the floor {}; upgrade it", text(floor)));
            }
            Some(_) => {}
            None => {
                return Err(format!("the version of {what}, {version:?}, can't be read; install one that tells it"));
            }
        }
    }
    let found = numbers(runc).unwrap_or_default();
    let open: Vec<String> = ESCAPES
        .iter()
        .filter(|escape| escape.is_in(found))
        .map(|escape| {
            let fixed: Vec<String> = escape.fixed_in.iter().copied().map(text).collect();
            format!("{} (fixed in {})", escape.cve, fixed.join(", "))
        })
        .collect();
    let escapes = open.join(", ");
    match (open.is_empty(), is_distributions(runc)) {
        (true, _) => Ok(format!("containerd {containerd} and runc {runc} are at or above the floor")),
        // Debian and others mend an old release and keep its number.
        (false, true) => Ok(format!(
            "containerd {containerd} and runc {runc} are at or above the floor. This runc is a distribution's own: its \
             version does not tell whether it is without {escapes}; the distribution's security tracker does"
        )),
        (false, false) => Err(format!("runc {runc} lets a container out to its node: {escapes}; upgrade it")),
    }
}

/// Whether a version bears more than a release of the project's own does, as in `1.1.5+ds1` or `1.1.12-0ubuntu2`.
fn is_distributions(version: &str) -> bool {
    let rest = version.trim_start_matches('v').trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
    !rest.is_empty() && !["-rc", "-beta", "-alpha"].iter().any(|mark| rest.starts_with(mark))
}

/// The first three numbers of a version such as `1.6.20~ds1` or `v2.1.0-rc.1`.
fn numbers(version: &str) -> Option<Version> {
    let mut parts = version.trim_start_matches('v').split(['.', '~', '-', '+']);
    let mut next = || parts.next()?.parse().ok();
    Some([next()?, next()?, next().unwrap_or(0)])
}

fn text(version: Version) -> String {
    version.map(|number| number.to_string()).join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_the_field_are_read() {
        assert_eq!(numbers("1.6.20~ds1"), Some([1, 6, 20]));
        assert_eq!(numbers("v2.1.0-rc.1"), Some([2, 1, 0]));
        assert_eq!(numbers("1.1.5+ds1"), Some([1, 1, 5]));
        assert_eq!(numbers("2.0"), Some([2, 0, 0]));
        assert_eq!(numbers("unknown"), None);
        let own = ["1.1.5", "v1.2.8", "1.4.0-rc.3"];
        assert!(own.into_iter().all(|version| !is_distributions(version)));
        let distributions = ["1.1.5+ds1", "1.1.12-0ubuntu2~22.04.1", "1.6.20~ds1"];
        assert!(distributions.into_iter().all(is_distributions));
    }

    #[test]
    fn what_is_below_the_floor_or_lets_out_is_said() {
        for (containerd, runc, wrong) in [
            ("1.6.20", "1.2.8", None),
            ("2.1.0", "1.3.3", None),
            ("2.1.0", "1.4.0", None),
            ("1.5.9", "1.2.8", Some("containerd is 1.5.9, below the floor 1.6.0")),
            ("1.6.20", "1.0.3", Some("runc is 1.0.3, below the floor 1.1.5")),
            ("1.6.20", "1.1.11", Some("CVE-2024-21626 (fixed in 1.1.12)")),
            ("1.6.20", "1.1.15", Some("CVE-2025-31133 (fixed in 1.2.8, 1.3.3)")),
            ("1.6.20", "1.3.2", Some("CVE-2025-52881")),
            ("1.6.20", "", Some("the version of runc")),
        ] {
            match (judge(containerd, runc), wrong) {
                (Ok(_), None) => {}
                (Err(said), Some(wrong)) => assert!(said.contains(wrong), "{containerd}, {runc}: {said}"),
                (said, _) => panic!("{containerd}, {runc}: {said:?}"),
            }
        }
        assert!(!judge("1.6.20", "1.1.12").unwrap_err().contains("CVE-2024-21626"));
    }

    #[test]
    fn of_a_distributions_runc_it_is_said_what_its_version_does_not_tell() {
        let said = judge("1.6.20~ds1", "1.1.5+ds1").unwrap();
        assert!(said.contains("security tracker") && said.contains("CVE-2024-21626"), "{said}");
        assert!(judge("1.6.20~ds1", "1.0.0+ds1").is_err(), "below the floor all the same");
    }
}
