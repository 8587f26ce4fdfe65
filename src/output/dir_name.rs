//! The name of a bot's log directory, `NAMESPACE_NAME_UID`: readable, unique by the uid, and at most 255 bytes.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::api::ids::BotUid;

/// Whose output a directory under `/var/log/berth` holds.
///
/// A namespace has at most 63 bytes and a uid 36, so a name longer than 154 (an object's may have 253) is cut and ends
/// in a hash of the whole; the uid is never cut, for it is what the sweeper goes by (FAULTS.md, rule 2).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BotDirName {
    text: String,
    uid: BotUid,
}

/// The longest name of a file, NAME_MAX in limits.h.
const NAME_MAX: usize = 255;
const MAX_NAMESPACE: usize = 63;
const UID: usize = 36;
const MAX_NAME: usize = NAME_MAX - MAX_NAMESPACE - UID - 2;
const HASH: usize = 16;
const _: () = assert!(MAX_NAMESPACE + 1 + MAX_NAME + 1 + UID == NAME_MAX);

impl BotDirName {
    /// The directory of the bot `namespace/name` with this uid.
    pub fn new(namespace: &str, name: &str, uid: &BotUid) -> Self {
        let text = format!("{}_{}_{uid}", part(namespace, MAX_NAMESPACE), part(name, MAX_NAME));
        Self { text, uid: uid.clone() }
    }

    /// The name of a directory that was found; `None` for one that can't be ours.
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, uid) = text.rsplit_once('_')?;
        let (namespace, name) = rest.split_once('_')?;
        let legal = |part: &str, max| !part.is_empty() && part.len() <= max && part.bytes().all(is_legal);
        let ours = legal(namespace, MAX_NAMESPACE) && legal(name, MAX_NAME) && !namespace.starts_with('.');
        ours.then_some(Self { text: text.to_owned(), uid: BotUid::parse(uid).ok()? })
    }

    /// The name as text: one path component, without `/`, and neither `.` nor `..`.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The uid in it.
    pub fn uid(&self) -> &BotUid {
        &self.uid
    }
}

impl fmt::Display for BotDirName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// What a DNS label or subdomain is made of; no `_`, which separates the parts.
fn is_legal(byte: u8) -> bool {
    matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.')
}

/// One part, unchanged when it is legal and fits, else what is legal of its head, and a hash of the whole.
fn part(text: &str, max: usize) -> String {
    if !text.is_empty() && text.len() <= max && text.bytes().all(is_legal) && !text.starts_with('.') {
        return text.to_owned();
    }
    let legal = |b: u8| if is_legal(b) && b != b'.' { char::from(b) } else { '-' };
    let mut cut: String = text.bytes().take(max - HASH - 1).map(legal).collect();
    cut.push('-');
    for byte in Sha256::digest(text.as_bytes()).iter().take(HASH / 2) {
        cut.push_str(&format!("{byte:02x}"));
    }
    cut
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn uid() -> BotUid {
        BotUid::parse("2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11").unwrap()
    }

    #[test]
    fn a_usual_name_is_readable() {
        let name = BotDirName::new("team-a", "web.v2", &uid());
        assert_eq!(name.as_str(), "team-a_web.v2_2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11");
    }

    #[test]
    fn the_longest_names_fit_and_stay_apart() {
        let (a, b) = (format!("{}a", "x".repeat(252)), format!("{}b", "x".repeat(252)));
        let namespace = "n".repeat(63);
        let (a, b) = (BotDirName::new(&namespace, &a, &uid()), BotDirName::new(&namespace, &b, &uid()));
        assert_eq!(a.as_str().len(), 255);
        assert_ne!(a, b, "the hash tells two cut names apart");
        assert!(a.as_str().ends_with(uid().as_str()));
    }

    #[test]
    fn what_is_not_ours_is_not_taken() {
        let uid = uid();
        for text in
            ["", "..", "journal", "a_b", "a_b_c", &format!("_{uid}"), &format!("a/b_c_{uid}"), &format!(".._c_{uid}")]
        {
            assert_eq!(BotDirName::parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn any_name_fits_is_one_component_and_is_parsed_back(namespace in ".{0,80}", name in ".{0,300}") {
            let dir = BotDirName::new(&namespace, &name, &uid());
            prop_assert!(dir.as_str().len() <= 255);
            prop_assert!(!dir.as_str().contains('/') && !dir.as_str().starts_with('.'));
            prop_assert_eq!(BotDirName::parse(dir.as_str()), Some(dir));
        }
    }
}
