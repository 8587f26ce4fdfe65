use super::*;
use std::io::Read as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, XattrFlags, lsetxattr, makedev, mknodat, utimensat};

use super::super::tree::open_root;

fn tar_of(layer: &Path) -> Result<Vec<u8>, Failure> {
    let manifest = Manifest::read_layer(layer, 2, false).unwrap();
    let mut bytes = Vec::new();
    let written = write(open_root(layer).unwrap().as_fd(), &manifest, 0, &mut bytes)?;
    assert_eq!(written.size, bytes.len() as u64);
    assert_eq!(written.digest, crate::image::Digest::of(&bytes).to_string());
    Ok(bytes)
}

fn stamp(path: &Path, seconds: i64, nanoseconds: i64) {
    let at = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    let times = Timestamps { last_access: at, last_modification: at };
    utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// A layer with everything in it, the names made in one order or in the other.
fn layer(dir: &Path, backwards: bool) {
    let d = dir.join("d");
    std::fs::create_dir_all(d.join("sub")).unwrap();
    let mut steps: Vec<Box<dyn Fn()>> = vec![
        Box::new(|| std::fs::write(d.join("file"), "contents").unwrap()),
        Box::new(|| symlink("../nowhere", d.join("link")).unwrap()),
        Box::new(|| mknodat(CWD, d.join("gone"), FileType::CharacterDevice, Mode::empty(), 0).unwrap()),
        Box::new(|| mknodat(CWD, d.join("null"), FileType::CharacterDevice, Mode::RUSR, makedev(1, 3)).unwrap()),
        Box::new(|| mknodat(CWD, d.join("pipe"), FileType::Fifo, Mode::RUSR, 0).unwrap()),
        Box::new(|| mknodat(CWD, d.join("socket"), FileType::Socket, Mode::RUSR, 0).unwrap()),
        Box::new(|| std::fs::write(d.join("n".repeat(200)), "long").unwrap()),
        Box::new(|| {
            use std::os::unix::ffi::OsStrExt as _;
            std::fs::write(d.join(std::ffi::OsStr::from_bytes(b"no\xfftext")), "x").unwrap();
        }),
        Box::new(|| {
            let file = File::create(d.join("sparse")).unwrap();
            file.write_all_at(b"end", 3 << 20).unwrap();
        }),
        Box::new(|| {
            lsetxattr(d.join("sub"), c"trusted.overlay.opaque", b"y", XattrFlags::empty()).unwrap();
            lsetxattr(d.join("sub"), c"user.of.the.bot", b"\0\xff=", XattrFlags::empty()).unwrap();
        }),
    ];
    if backwards {
        steps.reverse();
    }
    steps.iter().for_each(|step| step());
    std::fs::hard_link(d.join("file"), d.join("same")).unwrap();
    for entry in std::fs::read_dir(&d).unwrap() {
        stamp(&entry.unwrap().path(), 1_700_000_000, 123_000_000);
    }
    for path in [&d, dir] {
        stamp(path, -2, 500_000_000);
    }
}

#[test]
fn a_tar_says_all_that_a_layer_has_and_the_same_contents_are_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (one, other) = (dir.path().join("one"), dir.path().join("other"));
    for (path, backwards) in [(&one, false), (&other, true)] {
        std::fs::create_dir(path).unwrap();
        layer(path, backwards);
    }
    let bytes = tar_of(&one).unwrap();
    assert!(bytes == tar_of(&other).unwrap(), "it depends on what is not in the layer");

    let mut archive = tar::Archive::new(&bytes[..]);
    let mut told = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let link = entry.link_name_bytes().map(|link| String::from_utf8_lossy(&link).into_owned());
        let mut text = Vec::new();
        entry.read_to_end(&mut text).unwrap();
        let pax: BTreeMap<String, Vec<u8>> = entry
            .pax_extensions()
            .unwrap()
            .into_iter()
            .flatten()
            .map(|e| e.map(|e| (e.key().unwrap().to_owned(), e.value_bytes().to_vec())).unwrap())
            .filter(|(key, _)| key != "path")
            .collect();
        told.push((path, entry.header().entry_type(), link, text, pax));
    }
    let paths: Vec<&str> = told.iter().map(|t| t.0.as_str()).collect();
    let long = format!("d/{}", "n".repeat(200));
    assert_eq!(
        paths,
        [
            "./",
            "d/",
            "d/file",
            "d/.wh.gone",
            "d/link",
            &long,
            "d/no\u{fffd}text",
            "d/null",
            "d/pipe",
            "d/same",
            "d/sparse",
            "d/sub/",
            "d/sub/.wh..wh..opq"
        ]
    );
    let of = |path: &str| told.iter().find(|t| t.0 == path).unwrap();
    assert_eq!(of("d/").4.get("mtime").map(Vec::as_slice), Some(&b"-1.5"[..]));
    assert_eq!(of("d/file").4.get("mtime").map(Vec::as_slice), Some(&b"1700000000.123"[..]));
    assert_eq!((of("d/same").1, of("d/same").2.as_deref()), (EntryType::Link, Some("d/file")));
    assert_eq!((of("d/link").1, of("d/link").2.as_deref()), (EntryType::Symlink, Some("../nowhere")));
    assert_eq!(of("d/file").3, b"contents");
    assert_eq!(of("d/sparse").3.len(), (3 << 20) + 3);
    assert!(of("d/sparse").3.ends_with(b"\0end"));
    let attributes: Vec<&String> = of("d/sub/").4.keys().filter(|key| key.starts_with("SCHILY")).collect();
    assert_eq!(attributes, ["SCHILY.xattr.user.of.the.bot"]);
    assert_eq!(of("d/sub/").4["SCHILY.xattr.user.of.the.bot"], b"\0\xff=");
    assert_eq!((of("d/.wh.gone").1, of("d/.wh.gone").3.len()), (EntryType::Regular, 0));
    assert_eq!(of("d/null").1, EntryType::Char);

    // From the middle on, it is the same.
    let manifest = Manifest::read_layer(&one, 2, false).unwrap();
    for skip in [1, 512, 100_000, bytes.len() - 1, bytes.len()] {
        let mut rest = Vec::new();
        let written = write(open_root(&one).unwrap().as_fd(), &manifest, skip as u64, &mut rest).unwrap();
        assert!(rest == bytes[skip..] && written.size == bytes.len() as u64, "{skip}");
    }
}

#[test]
fn what_changed_since_its_manifest_is_not_written_as_if_it_were_the_version() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("file"), "contents").unwrap();
    let manifest = Manifest::read_layer(dir.path(), 1, false).unwrap();
    let root = open_root(dir.path()).unwrap();
    for text in ["CONTENTS", "content", "contents "] {
        std::fs::write(dir.path().join("file"), text).unwrap();
        let error = write(root.as_fd(), &manifest, 0, Vec::new()).unwrap_err();
        assert!(error.kind == FailureKind::Mismatch && error.message.contains("/file"), "{text}: {error:?}");
    }
    // A link in its place is not followed.
    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("file"), "contents").unwrap();
    std::fs::remove_file(dir.path().join("file")).unwrap();
    symlink(other.path().join("file"), dir.path().join("file")).unwrap();
    assert!(write(root.as_fd(), &manifest, 0, Vec::new()).is_err());
}

#[test]
fn what_an_oci_layer_has_no_words_for_is_refused_by_its_path() {
    type Make = fn(&Path);
    let cases: [(&str, Make); 4] = [
        ("d/.wh.file", |d| std::fs::write(d.join("d/.wh.file"), "x").unwrap()),
        ("d/.wh..wh..opq", |d| std::fs::create_dir(d.join("d/.wh..wh..opq")).unwrap()),
        ("d: trusted.overlay.redirect", |d| {
            lsetxattr(d.join("d"), c"trusted.overlay.redirect", b"/x", XattrFlags::empty()).unwrap();
        }),
        ("d: trusted.overlay.opaque", |d| {
            lsetxattr(d.join("d"), c"trusted.overlay.opaque", b"x", XattrFlags::empty()).unwrap();
        }),
    ];
    for (named, make) in cases {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        assert!(tar_of(dir.path()).is_ok());
        make(dir.path());
        let error = tar_of(dir.path()).unwrap_err();
        assert!(error.kind == FailureKind::Unsupported && error.message.contains(named), "{error:?}");
    }
}

proptest! {
    #[test]
    fn a_time_is_written_as_the_number_that_it_is(seconds in -1000_i64..1000, nanoseconds in 0_i64..1_000_000_000) {
        let text = decimal(seconds, nanoseconds);
        let exact = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
        let (whole, part) = text.split_once('.').unwrap_or((&text, ""));
        let part: i128 = format!("{part:0<9}").parse().unwrap();
        let magnitude = whole.trim_start_matches('-').parse::<i128>().unwrap() * 1_000_000_000 + part;
        prop_assert_eq!(if text.starts_with('-') { -magnitude } else { magnitude }, exact);
    }
}
