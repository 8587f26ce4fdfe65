//! Freezes and thaws one cgroup, v1 or v2, and notes on disk that it is frozen: a debt.
//!
//! The note is locked as long as who froze lives. One that nobody holds the lock of was left behind: whoever finds it thaws.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

/// On cgroup v1 a task that is just being forked can keep the freezer at FREEZING for ever: thawing and freezing again helps, as
/// runc does it (runc #2774).
const AGAIN: Duration = Duration::from_millis(10);
/// Between two looks.
const LOOK: Duration = Duration::from_micros(200);

/// A bot is frozen, and who froze it lives.
#[derive(Debug)]
pub struct Debt {
    path: PathBuf,
    cgroups: Vec<PathBuf>,
    _lock: File,
}

impl Debt {
    /// Notes that the bot of `cgroups` is about to be frozen, before it is.
    pub fn note(path: &Path, cgroups: &[PathBuf]) -> io::Result<Self> {
        let mut file = File::options().create(true).truncate(false).read(true).write(true).open(path)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        file.set_len(0)?;
        file.write_all(&serde_json::to_vec(cgroups)?)?;
        Ok(Self { path: path.to_owned(), cgroups: cgroups.to_vec(), _lock: file })
    }

    /// Freezes; gives up at `deadline`.
    pub fn freeze(&self, deadline: Instant) -> io::Result<()> {
        self.cgroups.iter().try_for_each(|cgroup| freeze(cgroup, deadline))
    }

    /// Thaws, and forgets the debt. One that can't be thawed stays noted.
    pub fn pay(self) -> io::Result<()> {
        thaw_all(&self.cgroups)?;
        fs::remove_file(&self.path)
    }
}

fn freeze(cgroup: &Path, deadline: Instant) -> io::Result<()> {
    let (file, on, off) = switch(cgroup);
    fs::write(&file, on)?;
    let mut again = Instant::now() + AGAIN;
    loop {
        if is_frozen(cgroup)? {
            return Ok(());
        }
        let now = Instant::now();
        if now >= deadline {
            fs::write(&file, off)?;
            return Err(io::Error::new(io::ErrorKind::TimedOut, format!("{} does not freeze", cgroup.display())));
        }
        if now >= again {
            fs::write(&file, off)?;
            fs::write(&file, on)?;
            again = now + AGAIN;
        }
        // A thread of this process has nothing else to do; there is no executor here.
        crate::output::pair::pause(LOOK);
    }
}

fn thaw_all(cgroups: &[PathBuf]) -> io::Result<()> {
    for cgroup in cgroups {
        let (file, _, off) = switch(cgroup);
        match fs::write(&file, off) {
            // Its process is gone, and its cgroup with it: nobody is left to thaw.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound) => {}
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
            done => done?,
        }
    }
    Ok(())
}

/// The file that freezes a cgroup, and what is written into it to freeze and to thaw.
fn switch(cgroup: &Path) -> (PathBuf, &'static str, &'static str) {
    let v1 = cgroup.join("freezer.state");
    if v1.exists() { (v1, "FROZEN", "THAWED") } else { (cgroup.join("cgroup.freeze"), "1", "0") }
}

fn is_frozen(cgroup: &Path) -> io::Result<bool> {
    let v1 = cgroup.join("freezer.state");
    if v1.exists() {
        return Ok(fs::read_to_string(v1)?.trim() == "FROZEN");
    }
    Ok(fs::read_to_string(cgroup.join("cgroup.events"))?.lines().any(|line| line == "frozen 1"))
}

/// Pays a debt whose maker is gone. Whether there was one.
pub fn settle(path: &Path) -> io::Result<bool> {
    let mut file = match File::options().read(true).write(true).open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        opened => opened?,
    };
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
        locked => locked?,
    }
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    // Empty: who was to freeze died before it wrote whom, and so before it froze.
    if let Ok(cgroups) = serde_json::from_str::<Vec<PathBuf>>(&text) {
        thaw_all(&cgroups)?;
    }
    fs::remove_file(path)?;
    Ok(true)
}

/// Thaws every bot that is noted as frozen and whose copier is gone. `dir` holds the debts, a file a bot; gives their names.
///
/// # Errors
/// The folder can't be read, or a bot can't be thawed: the others are, all the same.
pub fn settle_debts(dir: &Path) -> io::Result<Vec<String>> {
    let mut settled = Vec::new();
    let mut failed = Ok(());
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match settle(&entry.path()) {
            Ok(true) => settled.push(entry.file_name().to_string_lossy().into_owned()),
            Ok(false) => {}
            Err(error) => failed = failed.and(Err(error)),
        }
    }
    failed.map(|()| settled)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cgroup of this test's own, with a process in it.
    fn cgroup(name: &str) -> (PathBuf, std::process::Child) {
        let root = Path::new("/sys/fs/cgroup");
        let root = if root.join("cgroup.controllers").exists() { root.to_owned() } else { root.join("freezer") };
        let dir = root.join(format!("berth-test-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        (dir, child)
    }

    #[test]
    fn a_debt_is_paid_by_its_maker_or_by_whoever_finds_it() {
        let (cgroup, mut child) = cgroup("debt");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("the-bot");
        let soon = || Instant::now() + Duration::from_secs(5);
        let debt = Debt::note(&path, std::slice::from_ref(&cgroup)).unwrap();
        debt.freeze(soon()).unwrap();
        assert!(is_frozen(&cgroup).unwrap());
        assert!(settle_debts(dir.path()).unwrap().is_empty(), "its maker lives");
        assert!(is_frozen(&cgroup).unwrap());
        debt.pay().unwrap();
        assert!(!is_frozen(&cgroup).unwrap() && !path.exists());

        let debt = Debt::note(&path, std::slice::from_ref(&cgroup)).unwrap();
        debt.freeze(soon()).unwrap();
        drop(debt);
        assert!(is_frozen(&cgroup).unwrap(), "its maker died");
        assert_eq!(settle_debts(dir.path()).unwrap(), ["the-bot"]);
        assert!(!is_frozen(&cgroup).unwrap() && !path.exists());
        assert!(settle_debts(dir.path()).unwrap().is_empty());

        child.kill().unwrap();
        child.wait().unwrap();
        // Nobody is left in it, and then it is gone: a debt on it is paid all the same.
        fs::write(&path, serde_json::to_vec(std::slice::from_ref(&cgroup)).unwrap()).unwrap();
        fs::remove_dir(&cgroup).unwrap();
        assert_eq!(settle_debts(dir.path()).unwrap(), ["the-bot"]);
        fs::write(&path, "").unwrap();
        assert_eq!(settle_debts(dir.path()).unwrap(), ["the-bot"], "one that was never written");
    }
}
