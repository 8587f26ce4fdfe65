//! Names and ids as types: what is built from them fits containerd's, Linux's and Kubernetes' limits by construction.

use std::fmt;

/// The uid of a BotContainer as the API server gave it: a UUID, 36 characters.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BotUid(String);

/// Text that is not an id of the kind asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {wanted}")]
pub struct NotAnId {
    text: String,
    wanted: &'static str,
}

impl BotUid {
    /// Parses a uid: 36 characters of lower-case hex digits and dashes.
    pub fn parse(text: &str) -> Result<Self, NotAnId> {
        let shape = |(i, b): (usize, u8)| match i {
            8 | 13 | 18 | 23 => b == b'-',
            _ => matches!(b, b'0'..=b'9' | b'a'..=b'f'),
        };
        if text.len() == 36 && text.bytes().enumerate().all(shape) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NotAnId { text: text.chars().take(80).collect(), wanted: "an object's uid (a UUID in lower case)" })
        }
    }

    /// The uid as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The bot's container, netns, cgroup and lease all bear this name: 42 characters; containerd allows 76.
    pub fn container_id(&self) -> ContainerId {
        ContainerId(format!("{}{}", ContainerId::PREFIX, self.0))
    }
}

impl fmt::Display for BotUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Id of a bot's container in containerd's namespace `berth`, computed from the uid.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(String);

impl ContainerId {
    const PREFIX: &'static str = "berth-";

    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The uid that an id was computed from; `None` for an id that is not ours.
    pub fn uid_of(id: &str) -> Option<BotUid> {
        BotUid::parse(id.strip_prefix(Self::PREFIX)?).ok()
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uid_and_its_container_id_are_inverse() {
        let uid = BotUid::parse("2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11").unwrap();
        assert_eq!(uid.container_id().as_str(), "berth-2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11");
        assert_eq!(ContainerId::uid_of(uid.container_id().as_str()), Some(uid));
    }

    #[test]
    fn what_is_no_uid_is_refused() {
        for text in
            ["", "web", "../../etc", "2F0D7C1A-8F0C-4D7E-9A55-0F6A3D1F2B11", "2f0d7c1a08f0c-4d7e-9a55-0f6a3d1f2b11"]
        {
            assert!(BotUid::parse(text).is_err(), "{text:?} was taken");
        }
        assert_eq!(ContainerId::uid_of("berth-extract"), None);
    }
}
