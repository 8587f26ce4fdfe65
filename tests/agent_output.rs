//! The output of bots on real FIFOs, real processes and a real disk, and on containerd.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use berth::api::ids::{BotUid, ContainerId};
use berth::output::{BotDirName, FoundKind, Output, OutputOptions};

/// A root of its own with an `Output`; takes all of it down, and fails when a process of the pair is left.
struct Scene {
    dir: PathBuf,
    options: OutputOptions,
    output: Option<Output>,
}

impl Scene {
    fn new(change: impl FnOnce(&mut OutputOptions)) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("berth-output-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let mut options = OutputOptions {
            log_root: dir.join("log"),
            run_dir: dir.join("run"),
            cgroup: None,
            program: env!("CARGO_BIN_EXE_berth").into(),
            ..OutputOptions::default()
        };
        change(&mut options);
        Self { dir, output: Some(Output::new(options.clone())), options }
    }

    fn output(&self) -> &Output {
        self.output.as_ref().unwrap()
    }

    /// Processes of this scene's pair.
    fn pair(&self) -> Vec<i32> {
        let run_dir = self.options.run_dir.as_os_str().as_encoded_bytes();
        let is_ours = |pid: &i32| {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words: Vec<&[u8]> = line.split(|&b| b == 0).collect();
            words.get(1) == Some(&&b"logger"[..]) && words.get(2) == Some(&run_dir)
        };
        std::fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
            .filter(is_ours)
            .collect()
    }

    /// The drainer (it has the lock open) and the keeper.
    fn roles(&self) -> Option<(i32, i32)> {
        let holds_lock = |pid: &i32| {
            std::fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|fds| {
                fds.flatten().any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.ends_with("logger.lock")))
            })
        };
        let (drainer, keeper): (Vec<i32>, Vec<i32>) = self.pair().into_iter().partition(holds_lock);
        match (&drainer[..], &keeper[..]) {
            ([drainer], [keeper]) => Some((*drainer, *keeper)),
            _ => None,
        }
    }

    async fn wait_for_pair(&self) -> (i32, i32) {
        wait_for("a drainer and a keeper", || self.roles().ok_or_else(|| format!("pair: {:?}", self.pair()))).await
    }

    fn log_files(&self, bot: &Bot) -> Vec<PathBuf> {
        let dir = self.options.log_root.join(bot.owner.as_str());
        let names = (1..50).rev().map(|n| format!("0.log.{n}")).chain(["0.log".to_owned()]);
        names.map(|name| dir.join(name)).filter(|path| path.exists()).collect()
    }

    fn log(&self, bot: &Bot) -> Vec<u8> {
        self.log_files(bot).iter().flat_map(|path| std::fs::read(path).unwrap()).collect()
    }

    fn log_text(&self, bot: &Bot) -> String {
        String::from_utf8_lossy(&self.log(bot)).into_owned()
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        // What a test did not remove goes the way of a lost node: the directory vanishes, the logger ends by itself.
        self.output = None;
        let _ = std::fs::remove_dir_all(self.options.run_dir.join("io"));
        let limit = Instant::now() + Duration::from_secs(10);
        while !self.pair().is_empty() && Instant::now() < limit {
            std::thread::yield_now();
        }
        let left = self.pair();
        for pid in &left {
            kill(*pid);
        }
        let _ = std::fs::remove_dir_all(&self.dir);
        if !std::thread::panicking() {
            assert!(left.is_empty(), "the pair did not end by itself: {left:?}");
        }
    }
}

struct Bot {
    id: ContainerId,
    owner: BotDirName,
}

fn bot(number: u32) -> Bot {
    let uid = BotUid::parse(&format!("2f0d7c1a-8f0c-4d7e-9a55-{number:012x}")).unwrap();
    Bot { id: uid.container_id(), owner: BotDirName::new("team-a", "web", &uid) }
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Waits for a state and says what was last seen.
async fn wait_for<T>(what: &str, mut look: impl FnMut() -> Result<T, String>) -> T {
    let limit = Instant::now() + Duration::from_secs(15);
    loop {
        match look() {
            Ok(seen) => return seen,
            Err(last) if Instant::now() > limit => panic!("waited 15 s for {what}; last seen: {last}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(2)).await,
        }
    }
}

/// What a shim has open: both ends of the FIFO, so that it is never without a reader.
fn open_as_shim(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

#[tokio::test]
async fn output_is_logged_and_remove_leaves_nothing() {
    let scene = Scene::new(|_| {});
    let bot = bot(1);
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    assert!(std::fs::metadata(&pipes.stdout).unwrap().file_type().is_fifo());
    let (mut out, mut err) = (open_as_shim(&pipes.stdout), open_as_shim(&pipes.stderr));
    out.write_all(b"hello\nno end").unwrap();
    err.write_all(b"\xff trouble\n").unwrap();
    let said = scene.output().last_output(&bot.owner, 2048).unwrap();
    assert_eq!(said, "hello\n\u{fffd} trouble\nno end");
    let log = scene.log(&bot);
    let texts: Vec<&[u8]> = log.split(|&b| b == b'\n').map(|line| line.get(31..).unwrap_or_default()).collect();
    assert_eq!(texts, [&b"stdout F hello"[..], b"stderr F \xff trouble", b"stdout P no end", b""]);

    let state = scene.output().observe(&bot.id).await.unwrap();
    assert!(state.alive && state.pipes && state.dropped_bytes == 0, "{state:?}");
    let found = scene.output().list().await.unwrap();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().any(|f| f.kind == FoundKind::Logs(bot.owner.clone())), "{found:?}");

    out.write_all(b"last words\n").unwrap();
    scene.output().remove(&bot.id, true).await.unwrap();
    scene.output().remove(&bot.id, true).await.unwrap();
    assert!(scene.log_text(&bot).ends_with("stdout F last words\n"), "remove drains first");
    scene.output().remove(&bot.id, false).await.unwrap();
    scene.output().remove(&bot.id, false).await.unwrap();
    assert_eq!(scene.output().list().await.unwrap(), []);
    wait_for(
        "the end of the pair",
        || if scene.pair().is_empty() { Ok(()) } else { Err(format!("{:?}", scene.pair())) },
    )
    .await;
    assert!(!scene.output().observe(&bot.id).await.unwrap().alive);
}
