//! Copies of a layer, made by the real copier of a real overlay while real processes write in it.
//!
//! Needs root, overlayfs and a freezer. Everything is below temporary folders and cgroups of the tests' own.

// The helpers are test code too, which clippy can't tell outside of `#[test]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use berth::layer::{Copiers, Copy, FailureKind, Hold, Job, Said, Summary, settle_debts};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, mknodat, utimensat};

/// An overlay as a bot has it, a place for its copy, and a cgroup for who writes.
struct Layer {
    top: tempfile::TempDir,
    cgroup: PathBuf,
    writers: Vec<Child>,
    copies: u64,
}

impl Layer {
    fn new(name: &str) -> Self {
        // Upper and lower must not be on an overlay themselves; the build folder is where the sources are.
        Self::below(Path::new(env!("CARGO_TARGET_TMPDIR")), name)
    }

    fn below(dir: &Path, name: &str) -> Self {
        let top = tempfile::tempdir_in(dir).unwrap();
        for dir in ["lower", "upper", "work", "merged", "copies", "debts", "outside"] {
            fs::create_dir(top.path().join(dir)).unwrap();
        }
        let root = Path::new("/sys/fs/cgroup");
        let root = if root.join("cgroup.controllers").exists() { root.to_owned() } else { root.join("freezer") };
        let cgroup = root.join(format!("berth-layer-{name}-{}", std::process::id()));
        fs::create_dir_all(&cgroup).unwrap();
        Self { top, cgroup, writers: Vec::new(), copies: 0 }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.top.path().join(path)
    }

    fn mount(self) -> Self {
        self.mount_at("upper", "work", "merged");
        self
    }

    fn mount_at(&self, upper: &str, work: &str, merged: &str) {
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            self.at("lower").display(),
            self.at(upper).display(),
            self.at(work).display()
        );
        let options = CString::new(options).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("overlay", self.at(merged), "overlay", flags, Some(options.as_c_str())).unwrap();
    }

    /// Starts a process that writes in the mounted overlay until it is killed, once it has begun.
    fn writes(&mut self, what: &str) {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["writer", "--exact", "--nocapture", "--test-threads=1"])
            .env("BERTH_TEST_WRITER", what)
            .env("BERTH_TEST_WRITER_AT", self.at("merged"))
            .env("BERTH_TEST_WRITER_OUT", self.at("outside"))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        fs::write(self.cgroup.join("cgroup.procs"), child.id().to_string()).unwrap();
        // Only now may it begin, and its threads with it.
        child.stdin.take().unwrap().write_all(b"go\n").unwrap();
        self.writers.push(child);
        until("the writer has begun", || self.at("merged/begun").exists());
    }

    fn job(&mut self, max_freeze_millis: u64) -> Job {
        self.copies += 1;
        let copy = self.at(&format!("copies/{}", self.copies));
        fs::create_dir_all(copy.join("fs")).unwrap();
        Job::Take {
            source: self.at("upper"),
            dest: copy.join("fs"),
            stage: copy.join("stage"),
            manifest: copy.join("manifest"),
            cgroup: vec![self.cgroup.clone()],
            debt: self.at("debts/the-bot"),
            max_freeze_millis,
            before: None,
            lower: vec![self.at("lower")],
        }
    }

    /// The copy made last.
    fn copy(&self) -> PathBuf {
        self.at(&format!("copies/{}", self.copies))
    }

    async fn take(&mut self, hold: Hold) -> (u64, Summary) {
        let job = self.job(5000);
        let mut copy = copiers().start(&job).await.unwrap();
        let frozen = held(&mut copy, hold).await;
        match copy.next().await.unwrap() {
            Said::Done(summary) => (frozen, summary),
            other => panic!("{other:?}"),
        }
    }

    async fn verify(&self) -> Summary {
        let job =
            Job::Verify { source: self.copy().join("fs"), manifest: self.copy().join("manifest"), unpacked: false };
        run(&job).await
    }

    fn is_frozen(&self) -> bool {
        let v1 = self.cgroup.join("freezer.state");
        match fs::read_to_string(v1) {
            Ok(state) => state.trim() != "THAWED",
            Err(_) => fs::read_to_string(self.cgroup.join("cgroup.freeze")).unwrap().trim() == "1",
        }
    }

    /// Nothing of a freeze is left, and the writer goes on.
    fn assert_thawed(&self) {
        assert!(!self.is_frozen());
        assert_eq!(fs::read_dir(self.at("debts")).unwrap().count(), 0);
        let beat = || fs::read_to_string(self.at("merged/beat")).unwrap_or_default();
        let before = beat();
        until("the writer goes on", || beat() != before);
    }
}

impl Drop for Layer {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("freezer.state"), "THAWED");
        let _ = fs::write(self.cgroup.join("cgroup.freeze"), "0");
        for writer in &mut self.writers {
            let _ = writer.kill();
            let _ = writer.wait();
        }
        for merged in ["merged", "again"] {
            let _ = rustix::mount::unmount(self.at(merged), rustix::mount::UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir(&self.cgroup);
    }
}

fn copiers() -> Copiers {
    Copiers::new(env!("CARGO_BIN_EXE_berth").into(), None)
}

/// Holds the bot whenever the copier is ready for it, until it has taken; gives how long that was.
async fn held(copy: &mut Copy, hold: Hold) -> u64 {
    loop {
        match copy.next().await.unwrap() {
            Said::Precopied { .. } => copy.go(hold).await.unwrap(),
            Said::TooMuch { .. } => {}
            Said::Taken { frozen_millis, .. } => return frozen_millis,
            other => panic!("{other:?}"),
        }
    }
}

async fn run(job: &Job) -> Summary {
    match copiers().start(job).await.unwrap().next().await.unwrap() {
        Said::Done(summary) => summary,
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(30), "{what}: not within 30 s");
        std::thread::park_timeout(Duration::from_millis(1));
    }
}

/// Everything below a directory, by a walk of this test's own.
fn all_of(root: &Path) -> BTreeMap<OsString, String> {
    let mut found = BTreeMap::new();
    let mut inodes: BTreeMap<u64, OsString> = BTreeMap::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let path = root.join(&relative);
        let meta = fs::symlink_metadata(&path).unwrap();
        let kind = meta.file_type();
        let mut words = format!(
            "{:o} {}:{} rdev {} mtime {}.{:09}",
            meta.mode(),
            meta.uid(),
            meta.gid(),
            if kind.is_dir() || kind.is_file() { 0 } else { meta.rdev() },
            meta.mtime(),
            meta.mtime_nsec(),
        );
        if kind.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|entry| relative.join(entry.unwrap().file_name())));
        } else if kind.is_symlink() {
            words.push_str(&format!(" -> {:?}", fs::read_link(&path).unwrap()));
        } else if kind.is_file() {
            let data = fs::read(&path).unwrap();
            words.push_str(&format!(" {} bytes {}", data.len(), sum(&data)));
        }
        if meta.nlink() > 1 && kind.is_file() {
            let first = inodes.entry(meta.ino()).or_insert_with(|| relative.clone().into_os_string());
            words.push_str(&format!(" linked with {first:?}"));
        }
        words.push_str(&format!(" {:?}", xattrs_of(&path)));
        found.insert(relative.into_os_string(), words);
        todo.sort();
        todo.reverse();
    }
    found
}

fn sum(data: &[u8]) -> u64 {
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

fn xattrs_of(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0_u8; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap();
    // An overlay's own number is none of what is in it.
    let own = b"trusted.overlay.uuid";
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty() && name != own);
    let value = |name: &[u8]| {
        let mut value = vec![0_u8; 65536];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(length);
        value
    };
    names.map(|name| (String::from_utf8_lossy(name).into_owned(), value(name))).collect()
}

fn set_time(path: &Path, seconds: i64, nanos: i64) {
    let time = Timespec { tv_sec: seconds, tv_nsec: nanos };
    let times = Timestamps { last_access: time, last_modification: time };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn odd_name() -> OsString {
    OsString::from_vec(vec![b'o', b'd', b'd', 0xff, 0xfe, b'%', b'\n', b' '])
}

/// One of each kind of thing that a layer can hold.
fn fill(layer: &Layer) {
    let at = |path: &str| layer.at("merged").join(path);
    fs::remove_file(at("etc/gone")).unwrap();
    fs::remove_dir_all(at("etc/replaced")).unwrap();
    fs::create_dir(at("etc/replaced")).unwrap();
    fs::write(at("etc/replaced/own"), "own").unwrap();
    fs::write(at("etc/changed"), "by the bot").unwrap();
    fs::create_dir_all(at("data/a/b/c")).unwrap();
    fs::write(at("data/empty"), "").unwrap();
    fs::write(at("data/plain"), vec![7; 300_000]).unwrap();
    fs::hard_link(at("data/plain"), at("data/a/linked")).unwrap();
    fs::hard_link(at("data/plain"), at("data/zzz")).unwrap();
    fs::write(at("data").join(odd_name()), "odd").unwrap();
    symlink("/nowhere/at/all", at("data/link")).unwrap();
    symlink("a", at("data/relative")).unwrap();
    fs::write(at("data/setuid"), "x").unwrap();
    fs::set_permissions(at("data/setuid"), fs::Permissions::from_mode(0o6755)).unwrap();
    fs::set_permissions(at("data/a"), fs::Permissions::from_mode(0o1777)).unwrap();
    std::os::unix::fs::chown(at("data/plain"), Some(1234), Some(56_789)).unwrap();
    std::os::unix::fs::lchown(at("data/link"), Some(4), Some(5)).unwrap();
    for (name, kind, device) in [
        ("pipe", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
        ("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3)),
        ("disk", FileType::BlockDevice, rustix::fs::makedev(7, 99)),
    ] {
        mknodat(CWD, at("data").join(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
    }
    let sparse = File::create(at("data/sparse")).unwrap();
    sparse.set_len(1 << 30).unwrap();
    sparse.write_all_at(b"in the middle", 123_456_789).unwrap();
    // Capabilities: CAP_NET_RAW permitted and effective. The ACL: user::rw-, user:7:r--, group::r--, mask::r--, other::---.
    let capability = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let acl = [
        2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 4, 0, 7, 0, 0, 0, 4, 0, 4, 0, 255, 255, 255, 255, 16, 0, 4,
        0, 255, 255, 255, 255, 32, 0, 0, 0, 255, 255, 255, 255,
    ];
    for (path, name, value) in [
        ("data/setuid", "security.capability", &capability[..]),
        ("data/empty", "system.posix_acl_access", &acl[..]),
        ("data/empty", "user.of-the-bot", b"\x00value\xff"),
        ("data/a", "user.on-a-directory", b""),
        ("data/null", "trusted.on-a-device", b"1"),
    ] {
        rustix::fs::setxattr(at(path), name, value, XattrFlags::empty()).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
    rustix::fs::lsetxattr(at("data/link"), "trusted.on-a-link", b"1", XattrFlags::empty()).unwrap();
    set_time(&at("data/plain"), 1_000_000_000, 123_456_789);
    set_time(&at("data/link"), -5, 999_999_999);
    set_time(&at("data/pipe"), 4_000_000_000, 1);
    set_time(&at("data/a/b"), 7, 7);
    // Deeper than a path may be long.
    let mut dir = File::open(at("data")).unwrap();
    for _ in 0..60 {
        let name = CString::new(vec![b'd'; 100]).unwrap();
        rustix::fs::mkdirat(&dir, name.as_c_str(), Mode::RWXU).unwrap();
        let next = rustix::fs::openat(&dir, name.as_c_str(), rustix::fs::OFlags::DIRECTORY, Mode::empty()).unwrap();
        dir = next.into();
    }
    let deep =
        rustix::fs::openat(&dir, c"deep", rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY, Mode::RUSR).unwrap();
    File::from(deep).write_all(b"deep").unwrap();
}

fn with_everything(name: &str) -> Layer {
    let layer = Layer::new(name);
    for dir in ["lower/etc/replaced", "lower/data"] {
        fs::create_dir_all(layer.at(dir)).unwrap();
    }
    for file in ["lower/etc/gone", "lower/etc/changed", "lower/etc/kept", "lower/etc/replaced/of-the-image"] {
        fs::write(layer.at(file), "of the image").unwrap();
    }
    let layer = layer.mount();
    fill(&layer);
    layer
}

/// The same, but for the deep tree, which paths can't name.
fn without_deep(root: &Path) -> BTreeMap<OsString, String> {
    let deep = root.join("data").join("d".repeat(100));
    let aside = root.parent().unwrap().join(format!("deep-of-{}", root.file_name().unwrap().to_string_lossy()));
    let (meta, times) = (fs::metadata(root.join("data")).unwrap(), |m: &fs::Metadata| (m.mtime(), m.mtime_nsec()));
    fs::rename(&deep, &aside).unwrap();
    let data = times(&meta);
    set_time(&root.join("data"), data.0, data.1);
    let found = all_of(root);
    fs::rename(&aside, &deep).unwrap();
    set_time(&root.join("data"), data.0, data.1);
    found
}

#[tokio::test]
async fn every_kind_of_file_comes_through_with_every_fact() {
    let mut layer = with_everything("kinds");
    let (frozen, summary) = layer.take(Hold::Held).await;
    assert_eq!(frozen, 0);
    let copy = layer.copy().join("fs");
    let deepest = |root: &Path| {
        let mut dir = File::open(root.join("data")).unwrap();
        let (name, directory) = (CString::new(vec![b'd'; 100]).unwrap(), rustix::fs::OFlags::DIRECTORY);
        for _ in 0..60 {
            dir = rustix::fs::openat(&dir, name.as_c_str(), directory, Mode::empty()).unwrap().into();
        }
        let deep = rustix::fs::openat(&dir, c"deep", rustix::fs::OFlags::RDONLY, Mode::empty()).unwrap();
        let meta = |file: &File| file.metadata().map(|m| (m.mode(), m.mtime(), m.mtime_nsec())).unwrap();
        let (deep, mut text) = (File::from(deep), String::new());
        std::io::Read::read_to_string(&mut &deep, &mut text).unwrap();
        (text, meta(&deep), meta(&dir))
    };
    assert_eq!(deepest(&copy).0, "deep");
    assert_eq!(deepest(&copy), deepest(&layer.at("upper")));
    rustix::mount::unmount(layer.at("merged"), rustix::mount::UnmountFlags::empty()).unwrap();
    let (is, was) = (without_deep(&copy), without_deep(&layer.at("upper")));
    for (path, words) in &was {
        assert_eq!(is.get(path), Some(words), "{path:?}");
    }
    assert_eq!(is.len(), was.len());
    assert!(was.len() > 20, "{was:#?}");
    assert!(
        was[OsStr::new("etc/gone")].starts_with("20000 ") || was[OsStr::new("etc/gone")].contains("rdev 0"),
        "no whiteout"
    );
    assert!(
        was[OsStr::new("etc/replaced")].contains("trusted.overlay.opaque"),
        "{:?}",
        was[OsStr::new("etc/replaced")]
    );
    let sparse = fs::metadata(copy.join("data/sparse")).unwrap();
    assert!(sparse.blocks() * 512 < 1 << 20, "the hole was filled: {} bytes", sparse.blocks() * 512);
    assert_eq!(layer.verify().await.mismatches, [""; 0]);
    let changes = summary.changes.unwrap();
    let said = |path: &str| changes.paths.iter().find(|c| c.path == path).map(|c| format!("{:?}", c.change));
    assert_eq!(said("/etc/gone").as_deref(), Some("Removed"), "{changes:#?}");
    assert_eq!(said("/etc/changed").as_deref(), Some("Modified"));
    assert_eq!(said("/data/plain").as_deref(), Some("Added"));
    assert_eq!(said("/etc"), None, "a directory that was copied up for what is in it");

    // What the copy shows as a layer is what the original shows.
    fs::create_dir(layer.at("again")).unwrap();
    fs::create_dir(layer.copy().join("work")).unwrap();
    let number = layer.copies;
    layer.mount_at(&format!("copies/{number}/fs"), &format!("copies/{number}/work"), "again");
    assert!(!layer.at("again/etc/gone").exists() && !layer.at("again/etc/replaced/of-the-image").exists());
    assert_eq!(fs::read_to_string(layer.at("again/etc/kept")).unwrap(), "of the image");
    assert_eq!(fs::read_to_string(layer.at("again/etc/replaced/own")).unwrap(), "own");
}

#[tokio::test]
async fn a_copy_of_a_version_is_that_version() {
    let mut layer = with_everything("clone");
    layer.take(Hold::Held).await;
    let version = layer.copy();
    let to = layer.at("copies/clone");
    fs::create_dir_all(to.join("fs")).unwrap();
    let manifest = Some(version.join("manifest"));
    let job = Job::Clone { source: version.join("fs"), dest: to.join("fs"), stage: to.join("stage"), manifest };
    assert_eq!(run(&job).await.mismatch_count, 0);
    assert!(!to.join("stage").exists());
    assert_eq!(without_deep(&version.join("fs")), without_deep(&to.join("fs")));
    // Described where it is it is the same as well.
    let described = to.join("described");
    let job = Job::Describe { source: to.join("fs"), manifest: described.clone(), before: None, lower: vec![] };
    run(&job).await;
    assert_eq!(fs::read(described).unwrap(), fs::read(version.join("manifest")).unwrap());
    // One that is not what its manifest says is not copied.
    fs::write(version.join("fs/data/plain"), "garbled").unwrap();
    let bad = layer.at("copies/bad");
    fs::create_dir_all(bad.join("fs")).unwrap();
    let manifest = Some(version.join("manifest"));
    let job = Job::Clone { source: version.join("fs"), dest: bad.join("fs"), stage: bad.join("stage"), manifest };
    assert!(run(&job).await.mismatch_count > 0);
    assert_eq!(fs::read_dir(bad.join("fs")).unwrap().count(), 0);
}

#[tokio::test]
async fn whatever_is_not_as_it_was_is_found() {
    let mut layer = with_everything("verify");
    layer.take(Hold::Held).await;
    let file = |name: &str| layer.copy().join("fs").join(name);
    let flip = |path: &Path, offset: u64| {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let (mut byte, meta) = ([0], file.metadata().unwrap());
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
        set_time(path, meta.mtime(), meta.mtime_nsec());
    };
    type Spoil<'a> = (&'a str, Box<dyn Fn() + 'a>, &'a str);
    let spoils: Vec<Spoil<'_>> = vec![
        ("a flipped bit", Box::new(|| flip(&file("data/plain"), 200_000)), "other contents"),
        (
            "another mode",
            Box::new(|| fs::set_permissions(file("data/empty"), fs::Permissions::from_mode(0o604)).unwrap()),
            "mode",
        ),
        ("another time", Box::new(|| set_time(&file("data/sparse"), 1_000_000_000, 123_456_788)), "mtime"),
        (
            "another owner",
            Box::new(|| std::os::unix::fs::lchown(file("data/link"), Some(4), Some(6)).unwrap()),
            "owner",
        ),
        (
            "another attribute",
            Box::new(|| rustix::fs::setxattr(file("data/a"), "user.more", b"1", XattrFlags::empty()).unwrap()),
            "attributes",
        ),
        ("a surplus file", Box::new(|| fs::write(file("data/surplus"), "").unwrap()), "should not be"),
        ("a missing file", Box::new(|| fs::remove_file(file("data/pipe")).unwrap()), "is missing"),
        (
            "a link that leads elsewhere",
            Box::new(|| {
                fs::remove_file(file("data/relative")).unwrap();
                symlink("b", file("data/relative")).unwrap();
            }),
            "/data/relative",
        ),
    ];
    let mut before = 0;
    for (what, spoil, words) in spoils {
        spoil();
        let found = layer.verify().await;
        assert!(found.mismatch_count > before, "{what} is not found");
        assert!(found.mismatches.iter().any(|m| m.contains(words)), "{what}: {:?}", found.mismatches);
        before = found.mismatch_count;
    }
}

/// What a writer does in lockstep, so that a copy of one instant can be told from any other: see [`writer`].
#[track_caller]
fn assert_one_instant(copy: &Path) {
    let number = |name: &str| {
        let bytes = fs::read(copy.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        u64::from_le_bytes(bytes[..8].try_into().unwrap())
    };
    let there = |name: &str| copy.join(name).exists();
    for pair in [["mapped-a", "mapped-b"], ["written-a", "written-b"]] {
        let (a, b) = (number(pair[0]), number(pair[1]));
        assert!(a == b || a == b + 1, "{pair:?}: {a} and {b} were never there together");
    }
    let tokens = [there("left/token"), there("right/token")];
    assert_eq!(tokens.iter().filter(|there| **there).count(), 1, "the token is on both sides or on none: {tokens:?}");
    assert!(there("link-a") || there("link-b"), "one of the names was always there");
    let mut files: Vec<u64> = fs::read_dir(copy.join("made"))
        .unwrap()
        .map(|e| e.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    files.sort_unstable();
    assert!(matches!(files[..], [_] | [_, _]) && files.windows(2).all(|w| w[1] == w[0] + 1), "{files:?}");
    for n in files {
        // One that is just being made is empty still.
        let text = fs::read_to_string(copy.join(format!("made/{n}"))).unwrap();
        assert!(text.is_empty() || text == n.to_string(), "made/{n}: {text:?}");
    }
}

#[tokio::test]
async fn a_copy_is_of_one_instant_however_the_bot_writes() {
    let mut layer = Layer::new("instant").mount();
    layer.writes("lockstep");
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..20 {
        layer.take(Hold::Freeze).await;
        let copy = layer.copy().join("fs");
        assert_one_instant(&copy);
        seen.insert(fs::read(copy.join("mapped-a")).unwrap()[..8].to_vec());
        assert_eq!(layer.verify().await.mismatches, [""; 0]);
        layer.assert_thawed();
        fs::remove_dir_all(layer.copy()).unwrap();
    }
    assert!(seen.len() > 15, "it hardly wrote: {seen:?}");
}

#[tokio::test]
async fn nothing_outside_is_read_whatever_the_bot_puts_in_the_way() {
    let mut layer = Layer::new("outside").mount();
    fs::write(layer.at("outside/canary"), "of the host").unwrap();
    layer.writes("swap");
    let (mut as_link, mut as_dir) = (0, 0);
    for _ in 0..30 {
        layer.take(Hold::Freeze).await;
        let copy = layer.copy().join("fs");
        for path in all_of(&copy).keys() {
            let path = copy.join(path);
            if path.is_file() && !path.is_symlink() {
                assert_ne!(fs::read(&path).unwrap(), b"of the host", "{}", path.display());
            }
        }
        if copy.join("dir").is_symlink() {
            as_link += 1
        } else {
            as_dir += 1
        }
        fs::remove_dir_all(layer.copy()).unwrap();
    }
    println!("as a link {as_link} times, as a directory {as_dir} times");
}

#[tokio::test]
async fn a_bot_that_changes_too_much_is_left_as_it_is() {
    let mut layer = Layer::new("much").mount();
    layer.writes("much");
    let job = layer.job(1);
    let mut copy = copiers().start(&job).await.unwrap();
    let failure = loop {
        match copy.next().await.unwrap() {
            Said::Precopied { .. } => copy.go(Hold::Freeze).await.unwrap(),
            Said::TooMuch { .. } => layer.assert_thawed(),
            Said::Failed(failure) => break failure,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(failure.kind, FailureKind::TooManyChanges, "{failure:?}");
    assert!(failure.message.contains("maxFreezeMillis"), "{failure:?}");
    layer.assert_thawed();
    let copy = layer.copy();
    assert!(!copy.join("stage").exists() && !copy.join("manifest").exists());
    assert_eq!(fs::read_dir(copy.join("fs")).unwrap().count(), 0);
}

/// A file system of a test's own, in a file.
struct Disk {
    dir: tempfile::TempDir,
}

impl Disk {
    fn make(mkfs: &[&str], megabytes: u64) -> Self {
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("mounted"));
        File::create(&image).unwrap().set_len(megabytes << 20).unwrap();
        fs::create_dir(&at).unwrap();
        let (program, options) = mkfs.split_first().unwrap();
        for (program, arguments) in [
            (*program, [options, &[image.to_str().unwrap()]].concat()),
            ("mount", vec!["-o", "loop", image.to_str().unwrap(), at.to_str().unwrap()]),
        ] {
            let done = Command::new(program).args(arguments).output().unwrap();
            assert!(done.status.success(), "{program}: {}", String::from_utf8_lossy(&done.stderr));
        }
        Self { dir }
    }

    fn at(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }

    /// Bytes in use, once all of it is on the disk.
    fn used(&self) -> u64 {
        let root = File::open(self.at()).unwrap();
        rustix::fs::syncfs(&root).unwrap();
        let disk = rustix::fs::fstatvfs(&root).unwrap();
        (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.at(), rustix::mount::UnmountFlags::DETACH);
    }
}

#[tokio::test]
async fn where_blocks_can_be_shared_ten_versions_cost_what_changed() {
    const DATA: u64 = 24 << 20;
    let xfs = Disk::make(&["mkfs.xfs", "-q", "-m", "reflink=1"], 400);
    let mut layer = Layer::below(&xfs.at(), "shared").mount();
    layer.writes("slow");
    let noise = (0..DATA / 8).flat_map(|i: u64| i.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    fs::write(layer.at("merged/large"), noise.collect::<Vec<_>>()).unwrap();
    let before = xfs.used();
    for n in 0..10 {
        let file = File::options().write(true).open(layer.at("merged/large")).unwrap();
        file.write_all_at(b"changed", n * 4096).unwrap();
        layer.take(Hold::Freeze).await;
        assert_eq!(layer.verify().await.mismatch_count, 0);
    }
    let grown = xfs.used() - before;
    assert!(grown < DATA / 2, "ten copies of {DATA} bytes took {grown}");
    // What is shared is not tied together.
    fs::write(layer.at("merged/large"), "all of it is other now").unwrap();
    assert_eq!(layer.verify().await.mismatch_count, 0);
    assert_eq!(fs::metadata(layer.copy().join("fs/large")).unwrap().len(), DATA);
}

/// Processes whose command line has a path in it, with their parents.
fn processes(of: &Path) -> Vec<(i32, i32)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((_, rest)) = stat.rsplit_once(')') else { continue };
        let mut fields = rest.split_whitespace();
        let (state, parent) = (fields.next().unwrap(), fields.next().unwrap().parse().unwrap());
        let is_it = line.windows(of.as_os_str().len()).any(|part| part == of.as_os_str().as_bytes());
        if is_it && !matches!(state, "Z" | "X") {
            found.push((pid, parent));
        }
    }
    found
}

fn kill(pid: i32) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid).unwrap(), rustix::process::Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_frozen_bot_is_thawed_whoever_dies() {
    let mut layer = Layer::new("dies").mount();
    layer.writes("lockstep");
    // A copier that stays in the middle of a freeze, under a name by which it is found.
    let link = layer.at("berth-of-this-test");
    symlink(env!("CARGO_BIN_EXE_berth"), &link).unwrap();
    let program = layer.at("copier.sh");
    let script = format!("#!/bin/sh\nBERTH_COPIER_SLOW_FREEZE_MILLIS=60000 exec {} \"$@\"\n", link.display());
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let slow = Copiers::new(program, None);
    for who in ["worker", "guardian", "agent", "both"] {
        let job = layer.job(60_000);
        let mut copy = slow.start(&job).await.unwrap();
        let Said::Precopied { .. } = copy.next().await.unwrap() else { panic!() };
        copy.go(Hold::Freeze).await.unwrap();
        until("frozen", || layer.is_frozen() && layer.at("debts/the-bot").exists());
        let all = processes(&link);
        let (worker, guardian) = match all[..] {
            [(a, _), (b, parent)] if parent == a => (b, a),
            [(a, parent), (b, _)] if parent == b => (a, b),
            _ => panic!("{all:?}"),
        };
        let began = Instant::now();
        match who {
            "worker" => kill(worker),
            "guardian" => kill(guardian),
            "agent" => drop(copy),
            _ => {
                // Stopped first, so that it has no time to see the other's death.
                let pid = rustix::process::Pid::from_raw(guardian).unwrap();
                rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
                kill(worker);
                kill(guardian);
            }
        }
        if who == "both" {
            until("both gone", || processes(&link).is_empty());
            assert!(layer.is_frozen(), "somebody else thawed it");
            // A process loses its command line before its locks.
            until("a debt without a maker", || settle_debts(&layer.at("debts")).unwrap() == ["the-bot"]);
        }
        until("thawed", || !layer.is_frozen());
        let took = began.elapsed();
        assert!(took < Duration::from_secs(1), "{who} died, and the bot was frozen for {took:?} more");
        until("nobody left", || processes(&link).is_empty());
        layer.assert_thawed();
    }
}

/// Not a test: what the tests start as a process of its own, which writes until it is killed.
#[test]
fn writer() {
    let Ok(what) = std::env::var("BERTH_TEST_WRITER") else { return };
    let mut go = String::new();
    std::io::stdin().read_line(&mut go).unwrap();
    let at = PathBuf::from(std::env::var("BERTH_TEST_WRITER_AT").unwrap());
    let out = PathBuf::from(std::env::var("BERTH_TEST_WRITER_OUT").unwrap());
    let beat = File::create(at.join("beat")).unwrap();
    match what.as_str() {
        "lockstep" => lockstep(&at, &beat),
        "swap" => swap(&at, &out),
        "much" => much(&at, &beat),
        "slow" => slow(&at),
        other => panic!("{other}"),
    }
}

fn begun(at: &Path) {
    fs::write(at.join("begun"), "").unwrap();
}

/// A page of a file, shared with it.
fn mapped(path: &Path) -> &'static AtomicU64 {
    let file = File::options().create(true).truncate(false).read(true).write(true).open(path).unwrap();
    file.set_len(4096).unwrap();
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a page of a file that stays as long as this process; 8 bytes at its begin are a number.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), 4096, protection, libc::MAP_SHARED, file.as_raw_fd(), 0);
        assert_ne!(page, libc::MAP_FAILED);
        &*page.cast::<AtomicU64>()
    }
}

fn lockstep(at: &Path, beat: &File) {
    let (a, b) = (mapped(&at.join("mapped-a")), mapped(&at.join("mapped-b")));
    let file = |name: &str| {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(at.join(name)).unwrap();
        file.write_all_at(&[0; 8], 0).unwrap();
        file
    };
    let (c, d) = (file("written-a"), file("written-b"));
    for dir in ["left", "right", "made"] {
        fs::create_dir(at.join(dir)).unwrap();
    }
    fs::write(at.join("left/token"), "x").unwrap();
    fs::write(at.join("link-a"), "x").unwrap();
    fs::write(at.join("made/0"), "0").unwrap();
    begun(at);
    for n in 1_u64.. {
        a.store(n, Ordering::SeqCst);
        b.store(n, Ordering::SeqCst);
        c.write_all_at(&n.to_le_bytes(), 0).unwrap();
        d.write_all_at(&n.to_le_bytes(), 0).unwrap();
        let (from, to) = if n % 2 == 1 { ("left/token", "right/token") } else { ("right/token", "left/token") };
        fs::rename(at.join(from), at.join(to)).unwrap();
        let (old, new) = if n % 2 == 1 { ("link-a", "link-b") } else { ("link-b", "link-a") };
        fs::hard_link(at.join(old), at.join(new)).unwrap();
        fs::remove_file(at.join(old)).unwrap();
        fs::write(at.join(format!("made/{n}")), n.to_string()).unwrap();
        fs::remove_file(at.join(format!("made/{}", n - 1))).unwrap();
        beat.write_all_at(n.to_string().as_bytes(), 0).unwrap();
        for _ in 0..50 {
            // Many stores into pages that are dirty already, which move no time.
            let n = a.load(Ordering::SeqCst);
            a.store(n, Ordering::SeqCst);
        }
    }
}

fn swap(at: &Path, out: &Path) {
    for name in ["dir", "other"] {
        fs::create_dir(at.join(name)).unwrap();
        fs::write(at.join(name).join("canary"), "of the bot").unwrap();
    }
    begun(at);
    loop {
        fs::rename(at.join("dir"), at.join("aside")).unwrap();
        symlink(out, at.join("dir")).unwrap();
        fs::remove_file(at.join("dir")).unwrap();
        fs::rename(at.join("aside"), at.join("dir")).unwrap();
        // A file, too, is a link to one outside now and then.
        fs::remove_file(at.join("dir/canary")).unwrap();
        symlink(out.join("canary"), at.join("dir/canary")).unwrap();
        fs::remove_file(at.join("dir/canary")).unwrap();
        fs::write(at.join("dir/canary"), "of the bot").unwrap();
    }
}

fn much(at: &Path, beat: &File) {
    let files: Vec<File> = (0..8).map(|n| File::create(at.join(format!("big-{n}"))).unwrap()).collect();
    for file in &files {
        file.set_len(8 << 20).unwrap();
    }
    let data = vec![1_u8; 1 << 20];
    begun(at);
    for n in 0_u64.. {
        for file in &files {
            file.write_all_at(&data, (n % 8) << 20).unwrap();
        }
        beat.write_all_at(n.to_string().as_bytes(), 0).unwrap();
    }
}

/// About a megabyte a second, in 20 pieces.
fn slow(at: &Path) {
    let data = vec![1_u8; 50 << 10];
    begun(at);
    for n in 0_u64.. {
        fs::write(at.join(format!("log-{}", n % 100)), &data).unwrap();
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

/// A million files: beyond what the longest freeze allows it is said so; with more of it, they are copied. Minutes, and gigabytes.
#[tokio::test]
#[ignore = "it takes minutes"]
async fn a_million_files_are_copied_or_it_is_said_why_not() {
    let mut layer = Layer::new("million").mount();
    layer.writes("slow");
    for dir in 0..1000 {
        let dir = layer.at(&format!("merged/many/{dir}"));
        fs::create_dir_all(&dir).unwrap();
        (0..1000).for_each(|n| fs::write(dir.join(n.to_string()), "x").unwrap());
    }
    for most in [100, 30_000] {
        let began = Instant::now();
        let job = layer.job(most);
        let mut copy = copiers().start(&job).await.unwrap();
        let said = loop {
            match copy.next().await.unwrap() {
                Said::Precopied { .. } => copy.go(Hold::Freeze).await.unwrap(),
                Said::Taken { frozen_millis, .. } => println!("frozen {frozen_millis} ms"),
                said @ (Said::Done(_) | Said::Failed(_)) => break said,
                Said::TooMuch { .. } | Said::Still => {}
            }
        };
        let peak = processes(Path::new(env!("CARGO_BIN_EXE_berth")));
        println!("{:?}, {peak:?}: {}", began.elapsed(), format!("{said:?}").chars().take(200).collect::<String>());
        match (most, said) {
            (100, Said::Failed(failure)) => assert_eq!(failure.kind, FailureKind::TooManyChanges),
            (_, Said::Done(summary)) => assert!(summary.files > 1_000_000),
            (_, said) => panic!("{said:?}"),
        }
        assert!(!layer.is_frozen());
    }
    let began = Instant::now();
    assert_eq!(layer.verify().await.mismatch_count, 0);
    println!("read back in {:?}", began.elapsed());
}

/// Not a test: `cargo test --release --test agent_layer measure -- --ignored --nocapture` tells how long a freeze is.
#[tokio::test]
#[ignore = "it measures"]
async fn measure() {
    for (files, bytes) in [(10_000, 100 << 10), (100_000, 1 << 10)] {
        let mut layer = Layer::new(&format!("measure-{files}")).mount();
        let data = vec![3_u8; bytes];
        for n in 0..files {
            let dir = layer.at(&format!("merged/data/{}", n / 100));
            if n % 100 == 0 {
                fs::create_dir_all(&dir).unwrap();
            }
            fs::write(dir.join(n.to_string()), &data).unwrap();
        }
        layer.writes("slow");
        let mut frozen = Vec::new();
        for _ in 0..10 {
            let began = Instant::now();
            let (millis, _) = layer.take(Hold::Freeze).await;
            println!("{files} files of {bytes} bytes: frozen {millis} ms, in all {:?}", began.elapsed());
            frozen.push(millis);
            fs::remove_dir_all(layer.copy()).unwrap();
        }
        frozen.sort_unstable();
        println!("{files} files of {bytes} bytes: {frozen:?}");
    }
}
