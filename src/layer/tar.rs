//! A version as an OCI layer (image-spec v1.1, layer.md): an uncompressed tar, the same bytes whenever the contents are the same.
//!
//! Its facts come from the version's manifest, which it was read back against; its data from the files, and each file's is compared
//! with the manifest on the way. Whiteouts and opaque directories become the spec's `.wh.` entries, what overlayfs notes for itself
//! is left out. Extended attributes, nanoseconds and names of any bytes travel in pax headers (POSIX.1-2001), as Go's and GNU's tar
//! read them. Holes become zeros, as the spec asks; sockets are left out, as by every other tool.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustix::fs::{FileType, Mode, OFlags, major, minor, openat};
use sha2::{Digest as _, Sha256};
use tar::{EntryType, Header};

use super::job::{Failure, FailureKind, Written};
use super::manifest::{Item, Manifest, unescape};
use super::tree::{Hasher, facts_of, open_dir};

/// What the spec puts before the name of a path that is gone.
const WHITEOUT: &[u8] = b".wh.";
/// What the spec puts into a directory that hides what is below it.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// overlayfs's own attributes.
const OVERLAY: &str = "trusted.overlay.";
/// The most that a pax header of ours may hold: Go reads 1 MiB.
const MOST_ATTRIBUTES: usize = 1 << 20;
const BLOCK: u64 = 512;
static ZEROS: [u8; 64 * 1024] = [0; 64 * 1024];

/// An entry's header, what does not fit into it, and whether the file's data follows.
struct Head {
    header: Header,
    pax: BTreeMap<String, Vec<u8>>,
    data: bool,
}

impl Head {
    fn new(type_: EntryType, path: &[u8], item: &Item) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(type_);
        header.set_mode(item.mode & 0o7777);
        header.set_uid(u64::from(item.owner.0));
        header.set_gid(u64::from(item.owner.1));
        header.set_size(0);
        let mut head = Self { header, pax: BTreeMap::new(), data: false };
        head.path(path);
        head.mtime(item.mtime);
        head
    }

    /// An entry of the spec's own, without owner or time: the path is all that it says.
    fn mark(path: &[u8]) -> Self {
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        let mut head = Self { header, pax: BTreeMap::new(), data: false };
        head.path(path);
        head
    }

    fn path(&mut self, path: &[u8]) {
        let name = &mut self.header.as_old_mut().name;
        if !fits(path, name) {
            self.pax.insert("path".to_owned(), path.to_vec());
        }
    }

    fn link(&mut self, target: &[u8]) {
        let name = &mut self.header.as_old_mut().linkname;
        if !fits(target, name) {
            self.pax.insert("linkpath".to_owned(), target.to_vec());
        }
    }

    fn mtime(&mut self, (seconds, nanoseconds): (i64, i64)) {
        self.header.set_mtime(u64::try_from(seconds).unwrap_or(0));
        if seconds < 0 || nanoseconds != 0 {
            self.pax.insert("mtime".to_owned(), decimal(seconds, nanoseconds).into_bytes());
        }
    }

    fn data(&mut self, size: u64) {
        self.data = true;
        self.header.set_size(size);
        // What eleven octal digits hold.
        if size >= 1 << 33 {
            self.pax.insert("size".to_owned(), size.to_string().into_bytes());
        }
    }
}

/// Puts text into a field of a header; what does not fit whole goes into a pax header, and the field has its beginning.
fn fits(text: &[u8], field: &mut [u8]) -> bool {
    field.fill(0);
    for (place, byte) in field.iter_mut().zip(text) {
        *place = if byte.is_ascii() { *byte } else { b'_' };
    }
    text.len() <= field.len() && text.is_ascii()
}

/// A time as pax has it: a decimal fraction, its sign before all of it.
fn decimal(seconds: i64, nanoseconds: i64) -> String {
    // -1 s and 250 ms is -0.75.
    let (sign, seconds, nanoseconds) = match (seconds < 0, nanoseconds) {
        (false, _) => ("", seconds.unsigned_abs(), nanoseconds),
        (true, 0) => ("-", seconds.unsigned_abs(), 0),
        (true, _) => ("-", (seconds + 1).unsigned_abs(), 1_000_000_000 - nanoseconds),
    };
    match nanoseconds {
        0 => format!("{sign}{seconds}"),
        _ => format!("{sign}{seconds}.{nanoseconds:09}").trim_end_matches('0').to_owned(),
    }
}

/// The entries that say what one path of a layer is. Pure. `Err` says what an OCI layer has no words for.
fn heads(item: &Item) -> Result<Vec<Head>, String> {
    let path = item.bytes();
    let (parent, name) = match path.iter().rposition(|byte| *byte == b'/') {
        Some(slash) => (path.get(..=slash).unwrap_or_default(), path.get(slash + 1..).unwrap_or_default()),
        None => (&[][..], &path[..]),
    };
    if name.starts_with(WHITEOUT) {
        return Err(format!(
            "/{}: an OCI layer would take its name, which begins with .wh., for a deletion",
            item.path
        ));
    }
    if item.is_whiteout() {
        return Ok(vec![Head::mark(&[parent, WHITEOUT, name].concat())]);
    }
    let type_ = match item.kind() {
        FileType::Socket => return Ok(Vec::new()),
        FileType::Directory => EntryType::Directory,
        _ if item.same.as_ref().is_some_and(|same| *same != item.path) => EntryType::Link,
        FileType::RegularFile => EntryType::Regular,
        FileType::Symlink => EntryType::Symlink,
        FileType::CharacterDevice => EntryType::Char,
        FileType::BlockDevice => EntryType::Block,
        FileType::Fifo => EntryType::Fifo,
        FileType::Unknown => return Err(format!("/{}: mode {:o} is of no known type", item.path, item.mode)),
    };
    let written = match (item.kind(), path.is_empty()) {
        (FileType::Directory, true) => b"./".to_vec(),
        (FileType::Directory, false) => [&path[..], b"/"].concat(),
        _ => path.clone(),
    };
    let mut head = Head::new(type_, &written, item);
    match type_ {
        EntryType::Link => head.link(&unescape(item.same.as_deref().unwrap_or_default())),
        EntryType::Symlink => head.link(&unescape(item.target.as_deref().unwrap_or_default())),
        EntryType::Regular => head.data(item.size),
        EntryType::Char | EntryType::Block => {
            // An ustar header has both fields.
            let _ = head.header.set_device_major(major(item.rdev));
            let _ = head.header.set_device_minor(minor(item.rdev));
        }
        _ => {}
    }
    let mut opaque = false;
    let mut length = 0;
    // A link's attributes are those of the file that it is.
    for (name, value) in item.xattrs.iter().filter(|_| type_ != EntryType::Link) {
        let value = BASE64.decode(value).map_err(|error| format!("/{}: {name}: {error}", item.path))?;
        match name.strip_prefix(OVERLAY) {
            Some("opaque") if value == b"y" => opaque = true,
            // Of use to the overlay alone, and only where it is.
            Some("origin" | "impure" | "nlink" | "uuid" | "protattr" | "upper") => {}
            Some(_) => return Err(format!("/{}: {name} makes it part of what lies below", item.path)),
            None => {
                let bytes = unescape(name);
                let name = String::from_utf8(bytes).ok().filter(|name| !name.contains('='));
                let name = name.ok_or_else(|| format!("/{}: the name of an attribute is no text", item.path))?;
                length += name.len() + value.len();
                head.pax.insert(format!("SCHILY.xattr.{name}"), value);
            }
        }
    }
    if length > MOST_ATTRIBUTES / 2 {
        return Err(format!("/{}: {length} bytes of extended attributes", item.path));
    }
    let mut heads = vec![head];
    if opaque {
        let at = if path.is_empty() { Vec::new() } else { written };
        heads.push(Head::mark(&[&at[..], OPAQUE].concat()));
    }
    Ok(heads)
}

/// Hashes and counts what passes through, and drops the first bytes of it: those that the reader has.
struct Counted<W> {
    out: W,
    skip: u64,
    size: u64,
    hash: Sha256,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let known = usize::try_from(self.skip.saturating_sub(self.size)).unwrap_or(usize::MAX).min(bytes.len());
        self.out.write_all(bytes.get(known..).unwrap_or_default())?;
        self.size += bytes.len() as u64;
        self.hash.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// The directories on the way to the last path: the next is seldom far.
struct Way<'a> {
    root: BorrowedFd<'a>,
    open: Vec<(Vec<u8>, OwnedFd)>,
}

impl Way<'_> {
    /// Opens a regular file, each name in the directory before, and following nothing.
    fn file(&mut self, path: &[u8]) -> io::Result<File> {
        let mut names: Vec<&[u8]> = path.split(|byte| *byte == b'/').collect();
        let last = names.pop().unwrap_or_default();
        let shared = self.open.iter().zip(&names).take_while(|((open, _), name)| open == *name).count();
        self.open.truncate(shared);
        for name in names.into_iter().skip(shared) {
            let at = self.open.last().map_or(self.root, |(_, fd)| fd.as_fd());
            let fd = open_dir(at, &CString::new(name)?)?;
            self.open.push((name.to_vec(), fd));
        }
        let at = self.open.last().map_or(self.root, |(_, fd)| fd.as_fd());
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOATIME | OFlags::CLOEXEC;
        Ok(File::from(openat(at, &CString::new(last)?, flags, Mode::empty())?))
    }
}

/// Writes the layer whose root is open as a tar. `skip`: so many bytes are only counted.
///
/// # Errors
/// `Unsupported` for what an OCI layer has no words for, `Mismatch` where a file is not what the manifest says, else what reading
/// or writing gave.
pub fn write(root: BorrowedFd<'_>, manifest: &Manifest, skip: u64, out: impl Write) -> Result<Written, Failure> {
    let unsupported = |message| Failure { kind: FailureKind::Unsupported, message };
    // All of it is looked at before the first byte is written.
    for item in &manifest.items {
        heads(item).map_err(unsupported)?;
    }
    let mut tar = tar::Builder::new(Counted { out, skip, size: 0, hash: Sha256::new() });
    let mut way = Way { root, open: Vec::new() };
    for item in &manifest.items {
        let at = |error: io::Error| Failure::of(&format!("can't write /{} into a tar", item.path), &error);
        for Head { mut header, pax, data } in heads(item).map_err(unsupported)? {
            header.set_cksum();
            tar.append_pax_extensions(pax.iter().map(|(name, value)| (name.as_str(), &value[..]))).map_err(at)?;
            tar.get_mut().write_all(header.as_bytes()).map_err(at)?;
            if data {
                let file = way.file(&item.bytes()).map_err(at)?;
                contents(&file, item, tar.get_mut())?;
            }
        }
    }
    let end = |error: io::Error| Failure::of("can't end the tar", &error);
    let mut counted = tar.into_inner().map_err(end)?;
    counted.flush().map_err(end)?;
    let digest: String = counted.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Written { size: counted.size, digest: format!("sha256:{digest}") })
}

/// Writes a file's data, padded, and compares it with its manifest.
fn contents(file: &File, item: &Item, out: &mut impl Write) -> Result<(), Failure> {
    let at = |error: io::Error| Failure::of(&format!("can't read /{}", item.path), &error);
    let other = |what: &str| Failure {
        kind: FailureKind::Mismatch,
        message: format!("/{} is not what the version's manifest says: {what}", item.path),
    };
    let facts = facts_of(file.as_fd()).map_err(at)?;
    if facts.mode != item.mode || facts.size != item.size {
        return Err(other(&format!("mode {:o}, {} bytes", facts.mode, facts.size)));
    }
    let mut hasher = Hasher::new();
    let mut written = 0;
    let read = super::tree::data(file, item.size, |offset, bytes| {
        zeros(out, offset.saturating_sub(written))?;
        out.write_all(bytes)?;
        written = offset + bytes.len() as u64;
        hasher.take(offset, bytes);
        Ok(())
    });
    let size = read.map_err(at)?;
    zeros(out, size.saturating_sub(written)).map_err(at)?;
    let digest: String = hasher.end(size).iter().map(|byte| format!("{byte:02x}")).collect();
    if size != item.size || item.digest.as_ref() != Some(&digest) {
        return Err(other("other contents"));
    }
    zeros(out, size.next_multiple_of(BLOCK) - size).map_err(at)
}

fn zeros(out: &mut impl Write, mut count: u64) -> io::Result<()> {
    while count > 0 {
        let part = usize::try_from(count).unwrap_or(usize::MAX).min(ZEROS.len());
        out.write_all(ZEROS.get(..part).unwrap_or_default())?;
        count -= part as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
