//! Which user a bot runs as: the image's or the spec's, looked up in the image's own `/etc/passwd` and `/etc/group`.
//!
//! Neither file is trusted: both are read through [`super::rootfs`], up to a size, and parsed here; the host's users and
//! libnss play no part. What does not parse is passed over, as libc passes it over.
//!
//! | image `USER` | spec | uid | gid |
//! | --- | --- | --- | --- |
//! | none | | 0 | 0, or as passwd says |
//! | `name`, `uid` | | of name; uid | of passwd, else 0 |
//! | `name:group`, `uid:gid` | | of name; uid | of group; gid |
//! | any | `runAsUser` | that | of passwd, else 0 |
//! | any | `runAsGroup` | as above | that |
//!
//! Additional groups: the gid itself and every group of `/etc/group` that lists the user, as containerd has it.

use std::os::fd::BorrowedFd;

use k8s_openapi::api::core::v1::SecurityContext;

use super::rootfs::{self, RootError};
use crate::api::condition::{Reason, cut};

/// Who the process is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Groups besides, sorted; the gid is among them.
    pub additional_gids: Vec<u32>,
    /// Home directory, where `/etc/passwd` has the user: an absolute path.
    pub home: Option<String>,
}

/// Why the user can't be told, or is refused.
#[derive(Debug, thiserror::Error)]
pub enum UserError {
    /// `/etc/passwd` or `/etc/group` of the image has no such name.
    #[error(
        "the image's USER {user:?}: there is no {kind} {name:?} in the image's {file}; set spec.securityContext.runAsUser to a number, or correct the image"
    )]
    NotThere {
        /// The image's `USER`.
        user: String,
        /// user or group.
        kind: &'static str,
        /// The name looked for.
        name: String,
        /// Where it was looked for.
        file: &'static str,
    },
    /// The image's `USER` has no form that is known.
    #[error(
        "the image's USER {user:?} is not of the form user or user:group; set spec.securityContext.runAsUser, or correct the image"
    )]
    Malformed {
        /// The image's `USER`.
        user: String,
    },
    /// The kernel has no such id.
    #[error("{field}: {id} is no user or group id; use 0 to 2147483647")]
    OutOfRange {
        /// Where it is written.
        field: &'static str,
        /// As it is written.
        id: String,
    },
    /// `runAsNonRoot` is set and the user is root.
    #[error(
        "spec.securityContext.runAsNonRoot is set, and {what} is root; set spec.securityContext.runAsUser to a number other than 0, or use another image"
    )]
    Root {
        /// What named root.
        what: String,
    },
    /// A file of the image can't be used.
    #[error("the user can't be looked up in the image")]
    Unreadable {
        /// Which file, and why.
        #[from]
        source: RootError,
    },
}

impl UserError {
    /// The reason for condition and Event.
    pub fn reason(&self) -> Reason {
        match self {
            Self::NotThere { .. } | Self::Malformed { .. } | Self::OutOfRange { .. } | Self::Root { .. } => {
                Reason::InvalidSpec
            }
            Self::Unreadable { source } => source.reason(),
        }
    }

    /// Whether trying again, with nothing edited, can help.
    pub fn retryable(&self) -> bool {
        match self {
            // Spec, image and the files in the layer are what they are.
            Self::NotThere { .. } | Self::Malformed { .. } | Self::OutOfRange { .. } | Self::Root { .. } => false,
            Self::Unreadable { source } => source.retryable(),
        }
    }
}

const PASSWD: &str = "/etc/passwd";
const GROUP: &str = "/etc/group";

/// Most bytes read of `/etc/passwd` and of `/etc/group`: some ten thousand users.
pub const MAX_FILE: u64 = 1 << 20;
/// Longer lines are passed over. A group's line lists its members, so it is not short.
pub const MAX_LINE: usize = 64 << 10;
/// As many groups as a process can have.
const MAX_GROUPS: usize = 65_536;

/// Tells the user of a bot whose root file system is `root`; `image_user` is the image's `USER`.
///
/// # Errors
/// When a name is not in the image, an id is out of range, the user would be root against `runAsNonRoot`, or the image's
/// files can't be used. What is not needed for the answer is still read (for home and groups), so a bot whose
/// `/etc/passwd` is no file is refused even when all ids are given.
pub fn resolve_user(root: BorrowedFd, image_user: &str, security: Option<&SecurityContext>) -> Result<User, UserError> {
    let passwd = rootfs::read_file(root, PASSWD, MAX_FILE)?.unwrap_or_default();
    let group = rootfs::read_file(root, GROUP, MAX_FILE)?.unwrap_or_default();
    choose(&passwd, &group, image_user, security)
}

/// The pure part: the same from the contents of the two files.
fn choose(
    passwd: &[u8],
    group: &[u8],
    image_user: &str,
    security: Option<&SecurityContext>,
) -> Result<User, UserError> {
    let run_as_user = match security.and_then(|s| s.run_as_user) {
        Some(id) => Some(in_range("spec.securityContext.runAsUser", id)?),
        None => None,
    };
    let run_as_group = match security.and_then(|s| s.run_as_group) {
        Some(id) => Some(in_range("spec.securityContext.runAsGroup", id)?),
        None => None,
    };

    // A user of the spec takes the place of the image's whole, its group included: the two may not fit each other.
    let (image_name, image_group) = match (run_as_user, image_user.split_once(':')) {
        (Some(_), _) => ("", None),
        (None, Some((name, group))) => (name, Some(group)),
        (None, None) => (image_user, None),
    };
    let malformed = || UserError::Malformed { user: cut(image_user, 100) };
    if image_group.is_some_and(|group| group.is_empty() || group.contains(':'))
        || image_group.is_some() && image_name.is_empty()
        || image_user.contains(['\0', '\n'])
    {
        return Err(malformed());
    }

    let entry = match run_as_user {
        Some(uid) => find_uid(passwd, uid).unwrap_or(Account::nameless(uid)),
        None if image_name.is_empty() => find_uid(passwd, 0).unwrap_or(Account::nameless(0)),
        None => match number(image_name) {
            Some(uid) => {
                let uid = uid.ok_or_else(|| out_of_range("the image's USER", image_name))?;
                find_uid(passwd, uid).unwrap_or(Account::nameless(uid))
            }
            None => accounts(passwd)
                .find(|a| a.name == image_name)
                .ok_or_else(|| not_there(image_user, "user", image_name, PASSWD))?,
        },
    };
    let gid = match (run_as_group, image_group) {
        (Some(gid), _) => gid,
        (None, None) => entry.gid,
        (None, Some(name)) => match number(name) {
            Some(gid) => gid.ok_or_else(|| out_of_range("the image's USER", name))?,
            None => {
                groups(group).find(|g| g.name == name).ok_or_else(|| not_there(image_user, "group", name, GROUP))?.gid
            }
        },
    };

    // By the id that was found, so that a name which the bot has since bound to 0 does not pass.
    if entry.uid == 0 && security.and_then(|s| s.run_as_non_root) == Some(true) {
        return Err(UserError::Root {
            what: match run_as_user {
                Some(_) => "spec.securityContext.runAsUser 0".to_owned(),
                None if image_user.is_empty() => "the user of an image without USER".to_owned(),
                None => format!("the image's USER {:?}", cut(image_user, 100)),
            },
        });
    }

    let mut additional_gids = vec![gid];
    if !entry.name.is_empty() {
        let listed = groups(group).filter(|g| g.members.split(',').any(|member| member == entry.name));
        additional_gids.extend(listed.map(|g| g.gid).take(MAX_GROUPS - 1));
    }
    additional_gids.sort_unstable();
    additional_gids.dedup();
    let home = Some(entry.home).filter(|home| home.starts_with('/')).map(str::to_owned);
    Ok(User { uid: entry.uid, gid, additional_gids, home })
}

/// A line of `/etc/passwd`.
#[derive(Clone, Copy)]
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl Account<'_> {
    fn nameless(uid: u32) -> Self {
        Self { name: "", uid, gid: 0, home: "" }
    }
}

/// A line of `/etc/group`.
struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn accounts(passwd: &[u8]) -> impl Iterator<Item = Account<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, uid, gid) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let (_, home) = (fields.next(), fields.next().unwrap_or(""));
        let named = !name.is_empty() && !home.contains('\0');
        named.then_some(Account { name, uid: number(uid)??, gid: number(gid)??, home })
    })
}

fn groups(group: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(':');
        let (name, _, gid) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Group { name, gid: number(gid)??, members: fields.next().unwrap_or("") }).filter(|g| !g.name.is_empty())
    })
}

fn lines(file: &[u8]) -> impl Iterator<Item = &str> {
    file.split(|&b| b == b'\n')
        .filter(|line| line.len() <= MAX_LINE)
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(str::trim)
        .filter(|line| !line.starts_with('#'))
}

fn find_uid(passwd: &[u8], uid: u32) -> Option<Account<'_>> {
    accounts(passwd).find(|a| a.uid == uid)
}

/// `None`: no number. `Some(None)`: a number, but no id: a larger one wraps to another user somewhere down the way, 2^32 to
/// root (CVE-2024-40635).
fn number(text: &str) -> Option<Option<u32>> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    digits.then(|| text.parse::<i32>().ok().map(i32::unsigned_abs))
}

fn in_range(field: &'static str, id: i64) -> Result<u32, UserError> {
    i32::try_from(id)
        .ok()
        .filter(|id| *id >= 0)
        .map(i32::unsigned_abs)
        .ok_or_else(|| UserError::OutOfRange { field, id: id.to_string() })
}

fn out_of_range(field: &'static str, id: &str) -> UserError {
    UserError::OutOfRange { field, id: cut(id, 40) }
}

fn not_there(user: &str, kind: &'static str, name: &str, file: &'static str) -> UserError {
    UserError::NotThere { user: cut(user, 100), kind, name: cut(name, 100), file }
}

#[cfg(test)]
mod tests;
