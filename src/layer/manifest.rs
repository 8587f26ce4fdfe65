//! What is in a layer: every path with its facts and the digest of its contents, as a file with a line a path, sorted.

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead as _, BufReader, BufWriter, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustix::fs::FileType;
use serde::{Deserialize, Serialize};

use super::take::Take;
use super::tree::{Content, Facts, Inode, Tree, open_root, read, walk, xattrs};

/// One path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Item {
    /// Relative to the layer's root, which has the empty path. Bytes that are no printable ASCII are written `%XX`, and so is `%`.
    #[serde(rename = "p")]
    pub path: String,
    /// Type and permissions.
    #[serde(rename = "m")]
    pub mode: u32,
    /// Owner and group.
    #[serde(rename = "o")]
    pub owner: (u32, u32),
    /// Bytes of a regular file, else 0.
    #[serde(rename = "s", default, skip_serializing_if = "is_zero")]
    pub size: u64,
    /// Of a device.
    #[serde(rename = "r", default, skip_serializing_if = "is_zero")]
    pub rdev: u64,
    /// Last modification. Seconds and nanoseconds.
    #[serde(rename = "t")]
    pub mtime: (i64, i64),
    /// The first of the paths that are the same file, where there are several; written as a path.
    #[serde(rename = "l", default, skip_serializing_if = "Option::is_none")]
    pub same: Option<String>,
    /// Where a symbolic link leads; written as a path.
    #[serde(rename = "to", default, skip_serializing_if = "Option::is_none")]
    pub target: Option<String>,
    /// Extended attributes; names written as paths, values in base64.
    #[serde(rename = "x", default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, String>,
    /// Digest of the contents of a regular file, in hex: see [`super::tree::Hasher`].
    #[serde(rename = "h", default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl Item {
    /// Its type.
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }

    /// Whether it says that a path of a lower layer is gone.
    pub fn is_whiteout(&self) -> bool {
        self.kind() == FileType::CharacterDevice && self.rdev == 0
    }

    /// Its path in bytes.
    pub fn bytes(&self) -> Vec<u8> {
        unescape(&self.path)
    }
}

/// Everything that is in a layer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Sorted by the bytes of their paths; the root first.
    pub items: Vec<Item>,
    /// Size on disk, hard links once. Bytes. Not part of the file.
    pub on_disk: u64,
}

impl Manifest {
    /// Of what was taken.
    pub fn of(tree: &Tree, take: &Take) -> io::Result<Self> {
        let content = |facts: &Facts| {
            let known =
                take.known(facts.inode()).ok_or_else(|| io::Error::other("a file of the layer was not read"))?;
            Ok(known.content.clone())
        };
        Self::build(tree, content)
    }

    /// Of a layer that nobody changes, read now; `cold`: from the disk rather than from memory.
    pub fn read_layer(path: &Path, threads: usize, cold: bool) -> io::Result<Self> {
        Self::read_at(open_root(path)?, threads, cold)
    }

    /// The same of a directory that is open already.
    pub fn read_at(root: OwnedFd, threads: usize, cold: bool) -> io::Result<Self> {
        let Some(tree) = walk(root.as_fd(), threads, &|| false)? else { return Ok(Self::default()) };
        let mut contents: HashMap<Inode, Content> = HashMap::new();
        contents.insert(tree.root.inode(), Content { xattrs: xattrs(root.as_fd())?, ..Content::default() });
        for (number, directory) in tree.dirs.iter().enumerate() {
            let fd = tree.open(root.as_fd(), u32::try_from(number).unwrap_or(u32::MAX))?;
            for entry in &directory.entries {
                if contents.contains_key(&entry.facts.inode()) {
                    continue;
                }
                let vanished = || io::Error::other(format!("{:?} changed while it was read", entry.name));
                let (_, content) = read(fd.as_fd(), &entry.name, &entry.facts, cold, None)?.ok_or_else(vanished)?;
                contents.insert(entry.facts.inode(), content);
            }
        }
        let unread = || io::Error::other("a file of the layer was not read");
        Self::build(&tree, |facts| contents.get(&facts.inode()).cloned().ok_or_else(unread))
    }

    fn build(tree: &Tree, mut content: impl FnMut(&Facts) -> io::Result<Content>) -> io::Result<Self> {
        let mut items: Vec<(Vec<u8>, Facts)> = vec![(Vec::new(), tree.root)];
        for (number, directory) in tree.dirs.iter().enumerate() {
            let at = tree.path(u32::try_from(number).unwrap_or(u32::MAX));
            for entry in &directory.entries {
                let mut path = at.clone();
                if !path.is_empty() {
                    path.push(b'/');
                }
                path.extend_from_slice(entry.name.to_bytes());
                items.push((path, entry.facts));
            }
        }
        items.sort_unstable_by(|(a, _), (b, _)| a.cmp(b));
        // Names in this layer: an inode may have others that are none of it.
        let mut names: HashMap<Inode, u64> = HashMap::new();
        for (_, facts) in &items {
            *names.entry(facts.inode()).or_default() += 1;
        }
        let mut first: HashMap<Inode, String> = HashMap::new();
        let mut manifest = Self::default();
        for (path, facts) in items {
            let content = content(&facts)?;
            let path = escape(&path);
            let several = names.get(&facts.inode()).is_some_and(|names| *names > 1) && !facts.is_whiteout();
            let same = several.then(|| first.entry(facts.inode()).or_insert_with(|| path.clone()).clone());
            if same.as_ref().is_none_or(|same| *same == path) {
                manifest.on_disk += facts.on_disk;
            }
            let regular = facts.kind() == FileType::RegularFile;
            manifest.items.push(Item {
                path,
                mode: facts.mode,
                owner: (facts.uid, facts.gid),
                size: if regular { facts.size } else { 0 },
                rdev: if matches!(facts.kind(), FileType::CharacterDevice | FileType::BlockDevice) {
                    facts.rdev
                } else {
                    0
                },
                mtime: facts.mtime,
                same,
                target: content.target.as_ref().map(|target| escape(target.to_bytes())),
                xattrs: content
                    .xattrs
                    .iter()
                    .map(|(name, value)| (escape(name.to_bytes()), BASE64.encode(value)))
                    .collect(),
                digest: content.digest.map(|digest| digest.iter().map(|byte| format!("{byte:02x}")).collect()),
            });
        }
        Ok(manifest)
    }

    /// The same, but for an attribute of the root that was put there on purpose.
    pub fn without_root_attribute(mut self, name: &str) -> Self {
        if let Some(root) = self.items.first_mut() {
            root.xattrs.remove(name);
        }
        self
    }

    /// Paths that are no directories.
    pub fn files(&self) -> u64 {
        self.items.iter().filter(|item| item.kind() != FileType::Directory).count() as u64
    }

    /// Reads one from its file.
    pub fn load(path: &Path) -> io::Result<Self> {
        let mut items = Vec::new();
        for line in BufReader::new(std::fs::File::open(path)?).lines() {
            items.push(serde_json::from_str(&line?)?);
        }
        Ok(Self { items, on_disk: 0 })
    }

    /// Writes its file, whole or not at all.
    pub fn save(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        let mut file = BufWriter::new(std::fs::File::create(&new)?);
        for item in &self.items {
            serde_json::to_writer(&mut file, item)?;
            file.write_all(b"\n")?;
        }
        file.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        std::fs::rename(&new, path)?;
        match path.parent() {
            Some(dir) => std::fs::File::open(dir)?.sync_all(),
            None => Ok(()),
        }
    }

    /// Where `self`, which was read now, is not what `wanted` says: in words, and how many.
    pub fn differences(&self, wanted: &Self, most: usize) -> (Vec<String>, u64) {
        let (mut words, mut count) = (Vec::new(), 0);
        let mut tell = |text: String| {
            count += 1;
            if words.len() < most {
                words.push(text);
            }
        };
        let (mut is, mut be) = (self.items.iter().peekable(), wanted.items.iter().peekable());
        loop {
            match (is.peek(), be.peek()) {
                (None, None) => break,
                (Some(is_), Some(be_)) if is_.path == be_.path => {
                    if is_ != be_ {
                        tell(format!("/{}: {}", is_.path, difference(is_, be_)));
                    }
                    is.next();
                    be.next();
                }
                (Some(is_), be_) if be_.is_none_or(|be_| is_.bytes() < be_.bytes()) => {
                    tell(format!("/{} is there and should not be", is_.path));
                    is.next();
                }
                (_, Some(be_)) => {
                    tell(format!("/{} is missing", be_.path));
                    be.next();
                }
                (Some(_), None) => break,
            }
        }
        (words, count)
    }
}

/// What differs, in words.
fn difference(is: &Item, be: &Item) -> String {
    if is.mode != be.mode {
        return format!("mode {:o}, should be {:o}", is.mode, be.mode);
    }
    if is.owner != be.owner {
        return format!("owner {}:{}, should be {}:{}", is.owner.0, is.owner.1, be.owner.0, be.owner.1);
    }
    if is.size != be.size {
        return format!("{} bytes, should be {}", is.size, be.size);
    }
    if is.digest != be.digest {
        return "other contents".to_owned();
    }
    if is.mtime != be.mtime {
        return format!("mtime {}.{:09}, should be {}.{:09}", is.mtime.0, is.mtime.1, be.mtime.0, be.mtime.1);
    }
    if is.xattrs != be.xattrs {
        return "other extended attributes".to_owned();
    }
    if is.target != be.target {
        return "leads elsewhere".to_owned();
    }
    if is.same != be.same {
        return "another file has this name as well, or does not".to_owned();
    }
    "another device".to_owned()
}

/// A path as text, and back.
pub fn escape(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for byte in bytes {
        match byte {
            b'%' | 0..=0x1f | 0x7f..=0xff => text.push_str(&format!("%{byte:02X}")),
            printable => text.push(char::from(*printable)),
        }
    }
    text
}

/// See [`escape`]. What is no escape is taken as it is.
pub fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..2).filter(|_| *first == b'%').and_then(|hex| std::str::from_utf8(hex).ok());
        match code.and_then(|hex| u8::from_str_radix(hex, 16).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = tail.get(2..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn item(path: &str, size: u64) -> Item {
        Item {
            path: path.to_owned(),
            mode: 0o100_644,
            owner: (0, 0),
            size,
            rdev: 0,
            mtime: (1, 2),
            same: None,
            target: None,
            xattrs: BTreeMap::new(),
            digest: None,
        }
    }

    proptest! {
        #[test]
        fn any_name_survives_as_text(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let text = escape(&bytes);
            prop_assert!(text.bytes().all(|b| (0x20..0x7f).contains(&b)));
            prop_assert_eq!(unescape(&text), bytes);
        }
    }

    #[test]
    fn every_difference_is_told_with_its_path() {
        let of = |items: &[Item]| Manifest { items: items.to_vec(), on_disk: 0 };
        let wanted = of(&[item("a", 1), item("b", 2), item("d", 4)]);
        assert_eq!(wanted.differences(&wanted, 9), (vec![], 0));
        let (words, count) = of(&[item("a", 9), item("c", 3), item("d", 4)]).differences(&wanted, 9);
        assert_eq!(words, ["/a: 9 bytes, should be 1", "/b is missing", "/c is there and should not be"]);
        assert_eq!(count, 3);
        assert_eq!(of(&[]).differences(&wanted, 1), (vec!["/a is missing".to_owned()], 3));
        let edits: [fn(&mut Item); 8] = [
            |i| i.mode = 0o100_600,
            |i| i.owner = (0, 1),
            |i| i.rdev = 1,
            |i| i.mtime = (1, 3),
            |i| i.same = Some("x".into()),
            |i| i.target = Some("x".into()),
            |i| i.digest = Some("x".into()),
            |i| i.xattrs = BTreeMap::from([("a".into(), "b".into())]),
        ];
        for edit in edits {
            let mut other = item("a", 1);
            edit(&mut other);
            assert_eq!(of(&[other]).differences(&of(&[item("a", 1)]), 9).1, 1);
        }
    }

    #[test]
    fn a_manifest_survives_its_file() {
        let dir = tempfile::tempdir().unwrap();
        let layer = dir.path().join("layer");
        std::fs::create_dir_all(layer.join("d")).unwrap();
        std::fs::write(layer.join("d/f"), "contents").unwrap();
        std::fs::hard_link(layer.join("d/f"), layer.join("g")).unwrap();
        std::os::unix::fs::symlink("nowhere", layer.join("link")).unwrap();
        let manifest = Manifest::read_layer(&layer, 2, true).unwrap();
        assert_eq!(manifest.items.iter().map(|i| i.path.as_str()).collect::<Vec<_>>(), ["", "d", "d/f", "g", "link"]);
        assert_eq!(manifest.items[3].same.as_deref(), Some("d/f"));
        assert_eq!((manifest.files(), manifest.on_disk > 0), (3, true));
        let path = dir.path().join("manifest");
        manifest.save(&path).unwrap();
        assert_eq!(Manifest::load(&path).unwrap().items, manifest.items);
    }
}
