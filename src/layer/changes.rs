//! What changed between two versions, as the bot sees it: its own layer over those below. Pure, but for a look at those.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, FileType, statat};

use crate::api::bot_snapshot::{ChangeKind, ChangedPath, Changes};

use super::manifest::{Item, Manifest};
use super::tree::{open_dir, open_root, xattrs};

/// As many paths as a status takes.
const PATHS: usize = 100;

/// The longest path that a status takes. Bytes.
const LONGEST: usize = 4096;

/// What a path is below a bot's own layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Below {
    /// Type and permissions.
    pub mode: u32,
    /// Owner and group.
    pub owner: (u32, u32),
}

/// One path that changed, how, and the bytes that it has now.
pub type Change = (Vec<u8>, ChangeKind, u64);

/// Compares `now` with the version before; `None`: with what is below. `below` tells what a path is there. Sorted by path.
pub fn compare(
    before: Option<&Manifest>,
    now: &Manifest,
    mut below: impl FnMut(&[u8]) -> Option<Below>,
) -> Vec<Change> {
    let mut found: Vec<Change> = Vec::new();
    let empty = Manifest::default();
    let old: BTreeMap<&str, &Item> =
        before.unwrap_or(&empty).items.iter().map(|item| (item.path.as_str(), item)).collect();
    let new: BTreeMap<&str, &Item> = now.items.iter().map(|item| (item.path.as_str(), item)).collect();
    for (path, item) in &new {
        if path.is_empty() {
            continue;
        }
        let bytes = item.bytes();
        let kind = match (old.get(path), item.is_whiteout()) {
            (Some(old), true) => (!old.is_whiteout()).then_some(ChangeKind::Removed),
            (Some(old), false) if old.is_whiteout() => Some(ChangeKind::Added),
            (Some(old), false) => differs(old, item).then_some(ChangeKind::Modified),
            (None, true) => below(&bytes).map(|_| ChangeKind::Removed),
            (None, false) => match below(&bytes) {
                None => Some(ChangeKind::Added),
                // Copied up for the sake of what is in it.
                Some(lower) if is_same_directory(&lower, item) => None,
                Some(_) => Some(ChangeKind::Modified),
            },
        };
        if let Some(kind) = kind {
            found.push((bytes, kind, if kind == ChangeKind::Removed { 0 } else { item.size }));
        }
    }
    for (path, item) in &old {
        if new.contains_key(path) || path.is_empty() {
            continue;
        }
        let bytes = item.bytes();
        let kind = match (item.is_whiteout(), below(&bytes)) {
            // What is below shows through again.
            (true, Some(_)) => Some(ChangeKind::Added),
            (true, None) => None,
            (false, Some(lower)) => (!is_same_directory(&lower, item)).then_some(ChangeKind::Modified),
            (false, None) => Some(ChangeKind::Removed),
        };
        if let Some(kind) = kind {
            found.push((bytes, kind, 0));
        }
    }
    found.sort_by(|(a, ..), (b, ..)| a.cmp(b));
    found
}

/// The same in numbers, with the first paths.
pub fn changes(before: Option<&Manifest>, now: &Manifest, below: impl FnMut(&[u8]) -> Option<Below>) -> Changes {
    let found = compare(before, now, below);
    let count = |wanted| i64::try_from(found.iter().filter(|(_, kind, _)| *kind == wanted).count()).unwrap_or(i64::MAX);
    let bytes = found.iter().fold(0_u64, |sum, (_, _, bytes)| sum.saturating_add(*bytes));
    Changes {
        added: count(ChangeKind::Added),
        modified: count(ChangeKind::Modified),
        removed: count(ChangeKind::Removed),
        bytes: i64::try_from(bytes).unwrap_or(i64::MAX),
        paths: found
            .iter()
            .take(PATHS)
            .map(|(path, change, _)| {
                let path = format!("/{}", String::from_utf8_lossy(path));
                ChangedPath { path: crate::api::condition::cut(&path, LONGEST), change: *change }
            })
            .collect(),
    }
}

/// Whether a bot would see another thing. A directory is what is in it, which is told by itself.
fn differs(old: &Item, new: &Item) -> bool {
    if old.kind() == FileType::Directory && new.kind() == FileType::Directory {
        return (old.mode, old.owner, &old.xattrs) != (new.mode, new.owner, &new.xattrs);
    }
    let seen = |item: &Item| Item { same: None, ..item.clone() };
    seen(old) != seen(new)
}

fn is_same_directory(lower: &Below, item: &Item) -> bool {
    let opaque = item.xattrs.contains_key("trusted.overlay.opaque");
    item.kind() == FileType::Directory && (lower.mode, lower.owner) == (item.mode, item.owner) && !opaque
}

/// The layers below a bot's own.
pub struct Lower {
    layers: Vec<OwnedFd>,
}

impl Lower {
    /// The top one first. One that can't be opened is left out: it only tells what is new.
    pub fn open(layers: &[PathBuf]) -> Self {
        Self { layers: layers.iter().filter_map(|path| open_root(path).ok()).collect() }
    }

    /// What a path is there: the topmost layer that has it counts, unless one above says that it is gone.
    pub fn find(&self, path: &[u8]) -> Option<Below> {
        let names: Vec<CString> = path.split(|byte| *byte == b'/').map(CString::new).collect::<Result<_, _>>().ok()?;
        let (last, above) = names.split_last()?;
        'layers: for layer in &self.layers {
            let mut fd = open_dir(layer.as_fd(), c".").ok()?;
            let mut hides = false;
            for name in above {
                match open_dir(fd.as_fd(), name) {
                    Ok(next) => fd = next,
                    Err(_) if is_there(&fd, name) => return None,
                    Err(_) if hides => return None,
                    Err(_) => continue 'layers,
                }
                hides |= xattrs(fd.as_fd()).is_ok_and(|found| found.contains_key(c"trusted.overlay.opaque"));
            }
            match statat(&fd, last.as_c_str(), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => {
                    let gone = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0;
                    return (!gone).then_some(Below { mode: stat.st_mode, owner: (stat.st_uid, stat.st_gid) });
                }
                Err(_) if hides => return None,
                Err(_) => {}
            }
        }
        None
    }
}

/// Whether a name is there that is no directory: a whiteout, or a file in the place of a directory below.
fn is_there(dir: &OwnedFd, name: &CString) -> bool {
    statat(dir, name.as_c_str(), AtFlags::SYMLINK_NOFOLLOW).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, mknodat};

    fn item(path: &str, mode: u32, digest: &str) -> Item {
        serde_json::from_value(serde_json::json!({"p": path, "m": mode, "o": [0, 0], "t": [1, 1], "s": 5, "h": digest}))
            .unwrap()
    }

    fn file(path: &str, digest: &str) -> Item {
        item(path, 0o100_644, digest)
    }

    fn dir(path: &str) -> Item {
        item(path, 0o040_755, "")
    }

    fn whiteout(path: &str) -> Item {
        item(path, 0o020_000, "")
    }

    fn of(mut items: Vec<Item>) -> Manifest {
        items.insert(0, dir(""));
        Manifest { items, on_disk: 0 }
    }

    /// `etc`, `etc/of-the-image` are in the image.
    fn below(path: &[u8]) -> Option<Below> {
        match path {
            b"etc" => Some(Below { mode: 0o040_755, owner: (0, 0) }),
            b"etc/of-the-image" | b"etc/other" => Some(Below { mode: 0o100_644, owner: (0, 0) }),
            _ => None,
        }
    }

    fn told(before: Option<Vec<Item>>, now: Vec<Item>) -> Vec<String> {
        let changes = changes(before.map(of).as_ref(), &of(now), below);
        changes.paths.iter().map(|c| format!("{:?} {}", c.change, c.path)).collect()
    }

    #[test]
    fn changes_are_what_a_bot_sees() {
        let image =
            vec![dir("data"), file("data/new", "1"), dir("etc"), file("etc/of-the-image", "2"), whiteout("etc/other")];
        assert_eq!(
            told(None, image.clone()),
            ["Added /data", "Added /data/new", "Modified /etc/of-the-image", "Removed /etc/other"]
        );
        assert!(told(Some(image.clone()), image.clone()).is_empty());
        // A file that the bot made and removed again, one back to what the image has, one whose removal was undone.
        assert_eq!(
            told(Some(image.clone()), vec![dir("data"), dir("etc")]),
            ["Removed /data/new", "Modified /etc/of-the-image", "Added /etc/other"]
        );
        assert_eq!(
            told(
                Some(image),
                vec![
                    dir("data"),
                    file("data/new", "9"),
                    dir("etc"),
                    whiteout("etc/of-the-image"),
                    file("etc/other", "3")
                ]
            ),
            ["Modified /data/new", "Removed /etc/of-the-image", "Added /etc/other"]
        );
        assert!(told(None, vec![whiteout("never-there")]).is_empty(), "nothing that was ever seen");
    }

    #[test]
    fn the_first_hundred_are_listed_and_all_are_counted() {
        let many: Vec<Item> = (0..250).map(|n| file(&format!("f{n:03}"), "x")).collect();
        let changes = changes(None, &of(many), |_| None);
        assert_eq!((changes.added, changes.bytes, changes.paths.len()), (250, 1250, 100));
        assert_eq!(changes.paths[99].path, "/f099");
    }

    #[test]
    fn a_path_below_is_found_through_layers_and_whiteouts() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for path in ["top/a", "top/opaque", "bottom/a/b", "bottom/opaque", "bottom/gone"] {
            std::fs::create_dir_all(at(path)).unwrap();
        }
        for path in ["bottom/a/b/deep", "bottom/opaque/hidden", "bottom/gone/file", "bottom/plain", "top/a/own"] {
            std::fs::write(at(path), "x").unwrap();
        }
        mknodat(CWD, at("top/gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap();
        let opaque = (c"trusted.overlay.opaque", b"y");
        rustix::fs::setxattr(at("top/opaque"), opaque.0, opaque.1, rustix::fs::XattrFlags::empty()).unwrap();
        let lower = Lower::open(&[at("top"), at("bottom"), at("none")]);
        for (path, there) in [
            ("a", true),
            ("a/b/deep", true),
            ("a/own", true),
            ("plain", true),
            ("plain/below", false),
            ("gone", false),
            ("gone/file", false),
            ("opaque/hidden", false),
            ("nothing", false),
        ] {
            assert_eq!(lower.find(path.as_bytes()).is_some(), there, "{path}");
        }
    }
}
