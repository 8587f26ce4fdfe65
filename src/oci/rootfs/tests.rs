use std::fs::{self, OpenOptions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;

use super::*;
use crate::oci::user::{MAX_FILE, UserError, resolve_user};

/// A bot's root and, beside it, a folder that nothing may touch.
struct Tree {
    top: PathBuf,
}

impl Tree {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("berth-rootfs-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let top = std::env::temp_dir().join(name);
        fs::create_dir_all(top.join("root/etc")).unwrap();
        fs::create_dir_all(top.join("outside")).unwrap();
        fs::write(top.join("outside/passwd"), "bot:x:4242:4242::/outside:\n").unwrap();
        Self { top }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.top.join("root").join(path.trim_start_matches('/'))
    }

    fn fd(&self) -> OwnedFd {
        rustix::fs::open(self.top.join("root"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .unwrap()
    }

    fn link(&self, target: &str, at: &str) -> &Self {
        let at = self.path(at);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        symlink(target, at).unwrap();
        self
    }

    fn file(&self, at: &str, text: &[u8]) -> &Self {
        fs::create_dir_all(self.path(at).parent().unwrap()).unwrap();
        fs::write(self.path(at), text).unwrap();
        self
    }

    fn dir(&self, at: &str) -> &Self {
        fs::create_dir_all(self.path(at)).unwrap();
        self
    }

    fn fifo(&self, at: &str) -> &Self {
        rustix::fs::mknodat(rustix::fs::CWD, self.path(at), FileType::Fifo, Mode::RWXU, 0).unwrap();
        self
    }

    /// Everything outside the root: names with times and contents.
    fn outside(&self) -> Vec<(PathBuf, i64, Vec<u8>)> {
        let mut all: Vec<_> = fs::read_dir(self.top.join("outside"))
            .unwrap()
            .map(|e| e.unwrap().path())
            .map(|p| (p.clone(), fs::metadata(&p).unwrap().mtime_nsec(), fs::read(&p).unwrap_or_default()))
            .collect();
        all.sort();
        all
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.top);
    }
}

#[test]
fn a_usual_image_passes() {
    let tree = Tree::new();
    check_root(tree.fd().as_fd(), "/data").unwrap();
    tree.dir("dev").dir("proc").dir("sys").dir("data");
    check_root(tree.fd().as_fd(), "/data").unwrap();
    check_root(tree.fd().as_fd(), "/data/deep/er").unwrap();
}

#[test]
fn links_and_files_at_mount_points_are_refused() {
    for at in ["dev", "proc", "sys", "srv", "srv/data"] {
        for kind in ["link", "link into the root", "dangling link", "file", "FIFO"] {
            let tree = Tree::new();
            tree.dir("elsewhere");
            fs::create_dir_all(tree.path(at).parent().unwrap()).unwrap();
            match kind {
                "link" => tree.link("/etc", at),
                "link into the root" => tree.link("elsewhere", at),
                "dangling link" => tree.link("/nowhere", at),
                "file" => tree.file(at, b""),
                _ => tree.fifo(at),
            };
            match check_root(tree.fd().as_fd(), "/srv/data") {
                Err(RootError::NotADirectory { path, .. }) => assert_eq!(path, format!("/{at}"), "{kind}"),
                other => panic!("{kind} at {at}: {other:?}"),
            }
            if at.starts_with("srv") {
                let before = tree.outside();
                let refused = ensure_directory(tree.fd().as_fd(), "/srv/data", 0, 0, 0o755);
                assert!(matches!(refused, Err(RootError::NotADirectory { .. })), "{kind} at {at}: {refused:?}");
                assert_eq!(tree.outside(), before);
                assert!(fs::read_dir(tree.path("elsewhere")).unwrap().next().is_none());
            }
        }
    }
}

#[test]
fn paths_that_climb_or_are_none_are_refused() {
    let tree = Tree::new();
    for path in
        ["", "data", "/../x", "/a/../../x", "/a/..", "/a\0", &format!("/{}", "x".repeat(256)), &"/x".repeat(3000)]
    {
        let refused = ensure_directory(tree.fd().as_fd(), path, 0, 0, 0o755);
        assert!(matches!(refused, Err(RootError::BadPath { .. })), "{path:?}: {refused:?}");
        assert!(check_root(tree.fd().as_fd(), path).is_err(), "{path:?}");
        assert!(!refused.unwrap_err().retryable());
    }
    assert_eq!(fs::read_dir(tree.path("")).unwrap().count(), 1, "only etc is there");
}

#[test]
fn a_directory_is_made_with_owner_and_mode_and_again_without_harm() {
    let tree = Tree::new();
    for _ in 0..2 {
        ensure_directory(tree.fd().as_fd(), "/srv//bot/./data/", 1000, 1001, 0o2750).unwrap();
        let data = fs::metadata(tree.path("srv/bot/data")).unwrap();
        assert_eq!((data.uid(), data.gid(), data.mode() & 0o7777), (1000, 1001, 0o2750));
        let above = fs::metadata(tree.path("srv/bot")).unwrap();
        assert_eq!((above.uid(), above.gid(), above.mode() & 0o7777), (0, 0, 0o755));
        assert_eq!(fs::read_dir(tree.path("srv/bot")).unwrap().count(), 1, "nothing passing is left");
    }
    // What the bot made of it stays.
    fs::set_permissions(tree.path("srv/bot/data"), fs::Permissions::from_mode(0o700)).unwrap();
    ensure_directory(tree.fd().as_fd(), "/srv/bot/data", 5, 5, 0o755).unwrap();
    let data = fs::metadata(tree.path("srv/bot/data")).unwrap();
    assert_eq!((data.uid(), data.mode() & 0o7777), (1000, 0o700));
}

#[test]
fn an_attempt_that_was_cut_off_is_made_good() {
    let tree = Tree::new();
    tree.dir(".berth-new-directory");
    ensure_directory(tree.fd().as_fd(), "/data", 7, 7, 0o755).unwrap();
    assert_eq!(fs::metadata(tree.path("data")).unwrap().uid(), 7);
    assert!(!tree.path(".berth-new-directory").exists());
    // An image may hold a trap under the passing name: it is not followed and not renamed into place.
    for trap in ["link", "full directory", "file"] {
        let tree = Tree::new();
        match trap {
            "link" => tree.link("../outside", ".berth-new-directory"),
            "file" => tree.file(".berth-new-directory", b"x"),
            _ => tree.file(".berth-new-directory/x", b"x"),
        };
        let before = tree.outside();
        assert!(ensure_directory(tree.fd().as_fd(), "/data", 7, 7, 0o755).is_err(), "{trap}");
        assert!(!tree.path("data").exists(), "{trap}");
        assert_eq!(tree.outside(), before, "{trap}");
    }
}

#[test]
fn a_hostile_passwd_is_never_the_hosts() {
    let hosts = |tree: &Tree| {
        let made = resolve_user(tree.fd().as_fd(), "bot", None);
        assert!(matches!(made, Err(UserError::NotThere { .. })), "{made:?}");
    };
    let outside = |tree: &Tree, at: &str, target: &str| {
        fs::remove_dir_all(tree.path("etc")).unwrap();
        tree.link(target, at);
        hosts(tree);
    };
    let tree = Tree::new();
    let absolute = tree.top.join("outside").to_string_lossy().into_owned();
    outside(&tree, "etc", &absolute);
    for target in ["../outside", "../../../../../../..", "/", "/nowhere", "/proc/self/root/etc", "/proc/self/cwd"] {
        outside(&Tree::new(), "etc", target);
    }
    for target in ["../../outside/passwd", "/proc/self/environ", "/proc/self/fd/0", "/dev/stdin", "/nowhere", "/etc"] {
        let tree = Tree::new();
        tree.link(target, "etc/passwd");
        match resolve_user(tree.fd().as_fd(), "bot", None) {
            Err(UserError::NotThere { .. } | UserError::Unreadable { source: RootError::NotAFile { .. } }) => {}
            other => panic!("{target}: {other:?}"),
        }
    }
    // A link that stays inside is the image's own business.
    let tree = Tree::new();
    tree.file("lib/passwd", b"bot:x:7:8::/:").link("/lib/passwd", "etc/passwd");
    assert_eq!(resolve_user(tree.fd().as_fd(), "bot", None).unwrap().uid, 7);
}

#[test]
fn a_passwd_that_is_no_file_neither_blocks_nor_is_opened() {
    for (kind, found) in [("FIFO", "FIFO"), ("directory", "directory"), ("device", "device"), ("socket", "socket")] {
        let tree = Tree::new();
        match kind {
            "FIFO" => tree.fifo("etc/passwd"),
            "directory" => tree.dir("etc/passwd"),
            "socket" => {
                let made = std::os::unix::net::UnixListener::bind(tree.path("etc/passwd")).unwrap();
                drop(made);
                &tree
            }
            _ => {
                let zero = rustix::fs::makedev(1, 5);
                rustix::fs::mknodat(
                    rustix::fs::CWD,
                    tree.path("etc/passwd"),
                    FileType::CharacterDevice,
                    Mode::RWXU,
                    zero,
                )
                .unwrap();
                &tree
            }
        };
        match resolve_user(tree.fd().as_fd(), "0", None) {
            Err(UserError::Unreadable { source: RootError::NotAFile { path, found: f } }) => {
                assert_eq!((path.as_str(), f), ("/etc/passwd", found));
            }
            other => panic!("{kind}: {other:?}"),
        }
    }
}

#[test]
fn loops_and_giants_are_refused_in_words() {
    let tree = Tree::new();
    tree.link("group", "etc/passwd").link("passwd", "etc/group");
    let refused = resolve_user(tree.fd().as_fd(), "", None).unwrap_err();
    assert!(matches!(refused, UserError::Unreadable { source: RootError::TooManyLinks { .. } }), "{refused:?}");
    assert!(!refused.retryable());

    let tree = Tree::new();
    // Sparse, a terabyte: reading it through would fill the agent's memory.
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(tree.path("etc/passwd"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let refused = resolve_user(tree.fd().as_fd(), "", None).unwrap_err();
    match refused {
        UserError::Unreadable { source: RootError::TooLarge { limit, .. } } => assert_eq!(limit, MAX_FILE),
        other => panic!("{other:?}"),
    }
    let tree = Tree::new();
    tree.file("etc/passwd", &vec![b'\n'; MAX_FILE as usize]);
    resolve_user(tree.fd().as_fd(), "", None).unwrap();
}

#[test]
fn a_working_directory_that_leads_to_descriptors_is_refused() {
    let tree = Tree::new();
    tree.dir("data/x").dir("proc/self/fd/8").link("/proc/self/fd/8", "data/fd").link("../../proc/self", "data/up");
    tree.link("fd/..", "data/chain").link("/loop", "loop").link("data", "ok").link("/nowhere/../dev/fd", "late");
    tree.link("../../../../../proc", "above");
    for path in ["/data/fd", "/data/up/fd", "/data/chain", "/late/8", "/above/self/fd", "/proc", "/x/../dev/fd"] {
        let refused = check_working_directory(tree.fd().as_fd(), path);
        assert!(matches!(refused, Err(RootError::LeadsOut { .. })), "{path}: {refused:?}");
    }
    let looped = check_working_directory(tree.fd().as_fd(), "/loop/x");
    assert!(matches!(looped, Err(RootError::TooManyLinks { .. })), "{looped:?}");
    for path in ["/", "/data", "/data/x", "/ok/x", "/not/there", "/data/x/../y"] {
        check_working_directory(tree.fd().as_fd(), path).unwrap_or_else(|e| panic!("{path}: {e}"));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever links a root is made of: nothing outside is read or written.
    #[test]
    fn no_tree_of_links_leads_outside(
        links in proptest::collection::vec(("[abc]{1}(/[abc]{1}){0,2}", "(\\.\\./){0,4}(outside|[abc]|/[abc]|/proc/self/root/tmp)(/[abc]){0,2}"), 0..6),
        path in "(/[abc]){1,3}",
    ) {
        let tree = Tree::new();
        for (at, target) in &links {
            let at = tree.path(at);
            // As a bot would: through the host's eyes the parent may be a link already, so only make it where it is none.
            let parent = at.parent().unwrap();
            let plain = parent.ancestors().take_while(|p| **p != tree.top).all(|p| !p.is_symlink());
            if plain && fs::create_dir_all(parent).is_ok() {
                let _ = symlink(target, &at);
            }
        }
        let before = tree.outside();
        let root = tree.fd();
        let _ = ensure_directory(root.as_fd(), &path, 1, 1, 0o755);
        let _ = check_root(root.as_fd(), &path);
        let _ = check_working_directory(root.as_fd(), &path);
        let read = read_file(root.as_fd(), &format!("{path}/passwd"), 100);
        prop_assert!(!matches!(read, Ok(Some(_))), "{:?}", read);
        prop_assert_eq!(tree.outside(), before);
    }
}
