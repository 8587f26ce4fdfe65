use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::api::ids::BotUid;

/// A log below a folder of its own, which goes with it.
struct Scene {
    dir: PathBuf,
    owner: BotDirName,
}

impl Scene {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("berth-log-file-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(dir.join("io")).unwrap();
        let uid = BotUid::parse("2f0d7c1a-8f0c-4d7e-9a55-0f6a3d1f2b11").unwrap();
        Self { dir, owner: BotDirName::new("team-a", "web", &uid) }
    }

    fn open(&self, max_file_bytes: u64, max_files: u32) -> LogFile {
        let io = fs::openat(CWD, self.dir.join("io"), OFlags::DIRECTORY, Mode::empty()).unwrap();
        let drops = Drops::open(&io, "dropped");
        LogFile::new(self.dir.join("log"), self.owner.clone(), Bounds { max_file_bytes, max_files }, drops)
    }

    fn logs(&self) -> PathBuf {
        self.dir.join("log").join(self.owner.as_str())
    }

    /// The lines of all files, the oldest first.
    fn lines(&self) -> Vec<String> {
        let names = (1..20).rev().map(|n| format!("{CURRENT}.{n}")).chain([CURRENT.to_owned()]);
        let texts = names.filter_map(|name| std::fs::read_to_string(self.logs().join(name)).ok());
        texts.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn stamp() -> Stamp {
    Stamp::of("2026-11-24T10:00:00Z".parse().unwrap())
}

fn record(text: &str) -> Vec<u8> {
    let mut out = Vec::new();
    record::write(&mut out, &stamp(), Stream::Stdout, Tag::Full, text.as_bytes(), &[]);
    out
}

#[test]
fn rotation_keeps_every_line_that_fits_and_never_a_byte_too_many() {
    let scene = Scene::new("rotation");
    let (max_file_bytes, max_files) = (MAX_RECORD as u64, 3);
    let mut log = scene.open(max_file_bytes, max_files);
    let total = 20_000;
    for number in 0..total {
        log.append(Instant::now(), &stamp(), &record(&format!("line {number}")));
        if number % 97 == 0 {
            let sizes: Vec<u64> =
                std::fs::read_dir(scene.logs()).unwrap().map(|e| e.unwrap().metadata().unwrap().len()).collect();
            assert!(sizes.len() <= max_files as usize, "{} files after line {number}", sizes.len());
            assert!(sizes.iter().all(|size| *size <= max_file_bytes), "{sizes:?} after line {number}");
        }
    }
    let lines = scene.lines();
    let numbers: Vec<usize> = lines.iter().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
    assert_eq!(numbers.last(), Some(&(total - 1)));
    assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "no line is missing or twice");
    assert!(numbers.len() > 2 * max_file_bytes as usize / 60, "only {} lines were kept", numbers.len());
    let mode = std::fs::metadata(scene.logs().join(CURRENT)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o640);
}

#[test]
fn an_interrupted_rotation_is_gone_on_with_and_loses_nothing() {
    let scene = Scene::new("interrupted");
    let mut log = scene.open(MAX_RECORD as u64, 5);
    log.append(Instant::now(), &stamp(), &record("now"));
    for n in [1, 2, 4] {
        std::fs::write(scene.logs().join(format!("{CURRENT}.{n}")), record(&format!("old {n}"))).unwrap();
    }
    // Killed after .3 became .4. The next rotation closes the gap and moves .4 no further.
    log.append(Instant::now(), &stamp(), &record(&"x".repeat(MAX_TEXT_OF_ONE)));
    let texts: Vec<String> =
        scene.lines().iter().map(|line| line[record::HEADER..].chars().take(5).collect()).collect();
    assert_eq!(texts, ["old 4", "old 2", "old 1", "now", "xxxxx"]);
}
const MAX_TEXT_OF_ONE: usize = record::MAX_TEXT;

#[test]
fn one_file_is_a_legal_bound() {
    let scene = Scene::new("one");
    let mut log = scene.open(0, 1);
    for number in 0..1000 {
        log.append(Instant::now(), &stamp(), &record(&format!("line {number}")));
    }
    assert_eq!(std::fs::read_dir(scene.logs()).unwrap().count(), 1);
    assert!(scene.lines().last().unwrap().ends_with("line 999"));
}

#[test]
fn half_a_record_of_a_killed_predecessor_is_cut_off() {
    let scene = Scene::new("torn");
    std::fs::create_dir_all(scene.logs()).unwrap();
    let whole = record("whole");
    std::fs::write(scene.logs().join(CURRENT), [&whole[..], &record("torn")[..30]].concat()).unwrap();
    scene.open(1 << 20, 2).append(Instant::now(), &stamp(), &record("after"));
    let texts: Vec<String> = scene.lines().iter().map(|line| line[record::HEADER..].to_owned()).collect();
    assert_eq!(texts, ["whole", "after"]);
}

#[test]
fn a_removed_directory_is_made_again() {
    let scene = Scene::new("removed");
    let mut log = scene.open(1 << 20, 2);
    let now = Instant::now();
    log.append(now, &stamp(), &record("before"));
    std::fs::remove_dir_all(scene.logs()).unwrap();
    log.append(now + CHECK, &stamp(), &record("after"));
    assert!(scene.lines().last().unwrap().ends_with("after"));
    assert_eq!(log.drops().total, 0);
}

#[test]
fn a_link_in_place_of_the_directory_or_the_file_is_not_followed() {
    let scene = Scene::new("link");
    let elsewhere = scene.dir.join("elsewhere");
    std::fs::create_dir_all(&elsewhere).unwrap();
    std::fs::create_dir_all(scene.dir.join("log")).unwrap();
    std::os::unix::fs::symlink(&elsewhere, scene.logs()).unwrap();
    let mut log = scene.open(1 << 20, 2);
    let mut now = Instant::now();
    log.append(now, &stamp(), &record("12345"));
    assert_eq!(log.drops().total, 6, "five bytes and the newline");
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);

    std::fs::remove_file(scene.logs()).unwrap();
    std::fs::create_dir_all(scene.logs()).unwrap();
    std::os::unix::fs::symlink(elsewhere.join("passwd"), scene.logs().join(CURRENT)).unwrap();
    now += RETRY;
    log.append(now, &stamp(), &record("12345"));
    assert_eq!(log.drops().total, 12);
    assert_eq!(std::fs::read_dir(&elsewhere).unwrap().count(), 0);

    std::fs::remove_file(scene.logs().join(CURRENT)).unwrap();
    now += RETRY;
    log.append(now, &stamp(), &record("well"));
    let lines = scene.lines();
    assert!(lines[0].contains("stderr F berth: dropped 12 bytes of output"), "{lines:?}");
    assert!(lines[1].ends_with("stdout F well"), "{lines:?}");
}

#[test]
fn a_file_larger_than_it_may_be_is_refused_counted_and_told() {
    // RLIMIT_FSIZE would kill the test's process; a full small tmpfs is the real thing and needs the right to mount.
    let scene = Scene::new("full");
    let mount = scene.dir.join("log");
    std::fs::create_dir_all(&mount).unwrap();
    rustix::mount::mount("tmpfs", &mount, "tmpfs", rustix::mount::MountFlags::empty(), Some(c"size=64k")).unwrap();
    let mut log = scene.open(1 << 20, 2);
    let mut now = Instant::now();
    let mut sent = 0;
    for number in 0..4000 {
        let record = record(&format!("line {number:06}"));
        sent += record::payload(&record);
        log.append(now, &stamp(), &record);
    }
    let lines = scene.lines();
    let kept: u64 = lines.iter().map(|line| (line.len() - record::HEADER + 1) as u64).sum();
    assert!(log.drops().total > 0 && log.drops().total == sent - kept, "{sent} sent, {kept} kept, {:?}", log.drops());
    assert!(lines.iter().all(|line| line.len() == record::HEADER + 11), "only whole records");

    // The count outlives the drainer.
    let total = log.drops().total;
    let mut log = scene.open(1 << 20, 2);
    assert_eq!((log.drops().total, log.drops().untold), (total, total));
    now += RETRY;
    assert!(!log.settle_drops(now, &stamp()), "still full");
    rustix::mount::mount_remount(&mount, rustix::mount::MountFlags::empty(), "size=1m").unwrap();
    now += RETRY;
    assert!(log.settle_drops(now, &stamp()));
    log.append(now, &stamp(), &record("room again"));
    let lines = scene.lines();
    let told = format!("stderr F berth: dropped {total} bytes of output: No space left on device (os error 28)");
    assert!(lines[lines.len() - 2].ends_with(&told), "{:?}", &lines[lines.len() - 2]);
    assert!(lines[lines.len() - 1].ends_with("stdout F room again"));
    drop(log);
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
}
