//! `spec.skills` -> files in the bot's data: `DATA/.skills/NAME/SKILL.md`, YAML front matter and Markdown (SEED.md).
//!
//! ```text
//! spec.skills ──> digests of the texts ──> differ from those on the record? ──> write, remove, note
//! ```
//!
//! What is noted is what *we* wrote, so that the bot may edit its skills at run time: a skill is written again only when
//! the spec says something else than before, and one that leaves the spec goes only where it is still as we wrote it. The
//! bot owns the tree, so every name in it is taken without following a link. Nothing here keeps a bot from starting.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::AtFlags;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use crate::api::bot_container::Skill;
use crate::oci::rootfs::read_file;
use crate::oci::{RootError, ensure_directory, open_directory, put_file};

/// Names of skills, each with the digest of its file's text.
pub type Skills = BTreeMap<String, String>;

/// Larger than any text that the API takes. Bytes.
const MOST: u64 = 1 << 20;
const FILE: &str = "SKILL.md";

/// What the spec asks for.
pub fn wanted(skills: &[Skill]) -> Skills {
    skills.iter().map(|skill| (skill.name.clone(), digest(text(skill).as_bytes()))).collect()
}

/// The file's text. A JSON string is a YAML string too (YAML 1.2, section 1.3), so what users write can't break out of the
/// front matter.
fn text(skill: &Skill) -> String {
    let quoted = |text: &str| serde_json::Value::from(text).to_string();
    let mut out = format!("---\nname: {}\n", quoted(&skill.name));
    if let Some(description) = &skill.description {
        let _ = writeln!(out, "description: {}", quoted(description));
    }
    if !skill.metadata.is_empty() {
        out.push_str("metadata:\n");
        for (key, value) in &skill.metadata {
            let _ = writeln!(out, "  {}: {}", quoted(key), quoted(value));
        }
    }
    out.push_str("---\n\n");
    out.push_str(&skill.content);
    if !out.ends_with('\n') {
        out.push('\n');
    }
    out
}

fn digest(text: &[u8]) -> String {
    Sha256::digest(text).iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// A skill could not be written or removed.
#[derive(Debug, thiserror::Error)]
#[error("the skill {skill} can't be written into the bot's data")]
pub struct SkillFailed {
    /// Its name.
    pub skill: String,
    /// Why.
    pub source: RootError,
}

/// Brings the skills below `data` from what `noted` says to what is asked. Gives what is to be noted then, and the first
/// failure: the others are written all the same. Safe twice, and when cut off.
pub fn write(root: BorrowedFd, data: &str, skills: &[Skill], noted: &Skills) -> (Skills, Option<SkillFailed>) {
    let folder = format!("{}/.skills", data.trim_end_matches('/'));
    let wanted = wanted(skills);
    // A folder that is gone, with its layer or by the bot, takes what was noted of it along.
    let noted = match open_directory(root, &folder) {
        Ok(None) => &Skills::new(),
        _ => noted,
    };
    let (mut now, mut failed) = (noted.clone(), None);
    let names: BTreeSet<&String> = wanted.keys().chain(noted.keys()).collect();
    for name in names {
        if wanted.get(name) == noted.get(name) {
            continue;
        }
        let skill = skills.iter().find(|skill| &skill.name == name);
        let done = match skill {
            Some(skill) => put(root, data, &format!("{folder}/{name}"), &text(skill)),
            None => noted.get(name).map_or(Ok(()), |ours| remove(root, &folder, name, ours)),
        };
        match (done, wanted.get(name)) {
            (Ok(()), Some(digest)) => drop(now.insert(name.clone(), digest.clone())),
            (Ok(()), None) => drop(now.remove(name)),
            (Err(source), _) => drop(failed.get_or_insert(SkillFailed { skill: name.clone(), source })),
        }
    }
    (now, failed)
}

/// The new files belong to whom the bot's data belongs to.
fn put(root: BorrowedFd, data: &str, folder: &str, text: &str) -> Result<(), RootError> {
    let io = |call, path: &str, errno: Errno| RootError::Io { call, path: path.to_owned(), source: errno.into() };
    let data_directory = open_directory(root, data)?.ok_or_else(|| io("open", data, Errno::NOENT))?;
    let stat = rustix::fs::fstat(&data_directory).map_err(|errno| io("stat", data, errno))?;
    let (uid, gid) = (stat.st_uid, stat.st_gid);
    if let Some((parent, _)) = folder.rsplit_once('/') {
        ensure_directory(root, parent, uid, gid, 0o755)?;
    }
    ensure_directory(root, folder, uid, gid, 0o755)?;
    let directory = open_directory(root, folder)?.ok_or_else(|| io("open", folder, Errno::NOENT))?;
    put_file(directory.as_fd(), FILE, &format!("{folder}/{FILE}"), text.as_bytes(), (uid, gid))
}

/// What the bot changed is the bot's, and stays.
fn remove(root: BorrowedFd, folder: &str, name: &str, ours: &str) -> Result<(), RootError> {
    let (Some(parent), Some(directory)) =
        (open_directory(root, folder)?, open_directory(root, &format!("{folder}/{name}"))?)
    else {
        return Ok(());
    };
    let path = format!("{folder}/{name}/{FILE}");
    match read_file(directory.as_fd(), FILE, MOST) {
        Ok(Some(text)) if digest(&text) == ours => {}
        Ok(_) | Err(RootError::NotAFile { .. } | RootError::TooLarge { .. } | RootError::TooManyLinks { .. }) => {
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    let failed = |errno: Errno| RootError::Io { call: "remove", path: path.clone(), source: errno.into() };
    match rustix::fs::unlinkat(&directory, FILE, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(failed(errno)),
    }
    match rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT | Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        Err(errno) => Err(failed(errno)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::path::Path;

    use super::*;

    fn skill(name: &str, content: &str) -> Skill {
        Skill { name: name.into(), description: None, metadata: BTreeMap::new(), content: content.into() }
    }

    fn root(dir: &Path) -> OwnedFd {
        std::fs::create_dir_all(dir.join("data")).unwrap();
        std::fs::File::open(dir).unwrap().into()
    }

    fn done((now, failed): (Skills, Option<SkillFailed>)) -> Skills {
        assert!(failed.is_none(), "{failed:?}");
        now
    }

    #[test]
    fn front_matter_holds_whatever_is_written() {
        let skill = Skill {
            name: "search".into(),
            description: Some("a: \"b\" # c".into()),
            metadata: BTreeMap::from([("k: e".into(), "---".into())]),
            content: "# How to".into(),
        };
        let expected = "---\nname: \"search\"\ndescription: \"a: \\\"b\\\" # c\"\nmetadata:\n  \"k: e\": \"---\"\n---\n\n# How to\n";
        assert_eq!(text(&skill), expected);
    }

    #[test]
    fn skills_come_change_and_go_and_what_the_bot_edits_is_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let root = root(dir.path());
        let read = |name: &str| std::fs::read_to_string(dir.path().join("data/.skills").join(name).join(FILE)).ok();
        let two = [skill("a", "one"), skill("b", "two")];
        let noted = done(write(root.as_fd(), "/data", &two, &Skills::new()));
        assert_eq!(noted, wanted(&two));
        assert!(read("a").unwrap().ends_with("one\n"));

        // The bot edits b; the spec still says the same of it, and another thing of a.
        std::fs::write(dir.path().join("data/.skills/b/SKILL.md"), "mine").unwrap();
        let other = [skill("a", "other"), skill("b", "two")];
        let noted = done(write(root.as_fd(), "/data", &other, &noted));
        assert!(read("a").unwrap().ends_with("other\n"));
        assert_eq!(read("b").unwrap(), "mine");

        // Both leave the spec: what the bot edited stays.
        let noted = done(write(root.as_fd(), "/data", &[], &noted));
        assert_eq!(noted, Skills::new());
        assert!(!dir.path().join("data/.skills/a").exists());
        assert_eq!(read("b").unwrap(), "mine");

        // The folder is gone, though the note says otherwise: a new layer.
        std::fs::remove_dir_all(dir.path().join("data/.skills")).unwrap();
        done(write(root.as_fd(), "/data", &two, &wanted(&two)));
        assert!(read("a").unwrap().ends_with("one\n"));
    }

    #[test]
    fn no_link_of_the_bot_is_followed_and_the_others_are_written() {
        let dir = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        let root = root(dir.path());
        let folder = dir.path().join("data/.skills");
        std::fs::create_dir_all(folder.join("b")).unwrap();
        std::os::unix::fs::symlink(outside.path(), folder.join("a")).unwrap();
        std::fs::write(outside.path().join("file"), "theirs").unwrap();
        std::os::unix::fs::symlink(outside.path().join("file"), folder.join("b").join(FILE)).unwrap();
        let (noted, failed) = write(root.as_fd(), "/data", &[skill("a", "x"), skill("b", "y")], &Skills::new());
        assert_eq!(failed.unwrap().skill, "a");
        assert_eq!(noted.keys().collect::<Vec<_>>(), ["b"]);
        assert_eq!(std::fs::read_to_string(outside.path().join("file")).unwrap(), "theirs");
        assert!(std::fs::read_to_string(folder.join("b").join(FILE)).unwrap().ends_with("y\n"));
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 1);

        // Nor when they leave the spec.
        std::fs::remove_file(folder.join("b").join(FILE)).unwrap();
        std::os::unix::fs::symlink(outside.path().join("file"), folder.join("b").join(FILE)).unwrap();
        done(write(root.as_fd(), "/data", &[], &noted));
        assert!(outside.path().join("file").exists());
    }
}
