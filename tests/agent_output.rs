//! The output of bots on real FIFOs, real processes and a real disk, and on containerd.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail as tests do")]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write as _;
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
            program: std::env::var_os("BERTH_PROGRAM").unwrap_or(env!("CARGO_BIN_EXE_berth").into()).into(),
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
        // Of a test that failed while its small disk was mounted; where nothing is, this is refused.
        let _ = rustix::mount::unmount(&self.options.log_root, rustix::mount::UnmountFlags::DETACH);
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

/// Writes `line 0`, `line 1` … as a bot does, until told to stop; tells how many, and how long the slowest write took.
struct Writer {
    stop: std::sync::Arc<std::sync::atomic::AtomicBool>,
    thread: std::thread::JoinHandle<(usize, Duration)>,
}

/// Bytes of one numbered line, so that a loss in bytes is one in lines.
const LINE: usize = 16;

impl Writer {
    fn start(pipe: &Path, pace: Duration) -> Self {
        let mut pipe = open_as_shim(pipe);
        let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            let (mut number, mut slowest) = (0, Duration::ZERO);
            while !stopped.load(Ordering::Relaxed) {
                let begun = Instant::now();
                pipe.write_all(format!("line {number:010}\n").as_bytes()).unwrap();
                slowest = slowest.max(begun.elapsed());
                number += 1;
                if !pace.is_zero() {
                    #[allow(clippy::disallowed_methods, reason = "a thread of its own, no executor's")]
                    std::thread::sleep(pace);
                }
            }
            (number, slowest)
        });
        Self { stop, thread }
    }

    fn stop(self) -> (usize, Duration) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

/// The numbers in the log, which must be whole records in order, none twice.
fn numbers(log: &[u8]) -> BTreeSet<usize> {
    let mut numbers = BTreeSet::new();
    let mut last = None;
    for record in log.split(|&b| b == b'\n').filter(|record| !record.is_empty()) {
        let text = std::str::from_utf8(&record[31..]).unwrap();
        // After a kill the first line may lack its head; that one is no number.
        let Some(number) =
            text.strip_prefix("stdout F line ").and_then(|n| (n.len() == 10).then(|| n.parse().unwrap()))
        else {
            continue;
        };
        assert!(last.is_none_or(|last| number > last), "{number} after {last:?}");
        last = Some(number);
        assert!(numbers.insert(number));
    }
    numbers
}

/// What one death of a drainer may cost one stream: a read and the unfinished line before it.
const LOSS: usize = (64 + 16) * 1024 / LINE + 1;

#[tokio::test(flavor = "multi_thread")]
async fn killing_either_of_the_pair_is_healed_without_the_agent() {
    let scene = Scene::new(|o| o.max_file_bytes = 1 << 30);
    let bot = bot(1);
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let writer = Writer::start(&pipes.stdout, Duration::ZERO);
    let mut slowest = Duration::ZERO;
    let deaths = 10;
    for _ in 0..deaths {
        let (drainer, keeper) = scene.wait_for_pair().await;
        kill(keeper);
        let again = wait_for("a new keeper, the same drainer", || match scene.roles() {
            Some((d, k)) if d == drainer && k != keeper => Ok((d, k)),
            other => Err(format!("{other:?}")),
        })
        .await;
        let begun = Instant::now();
        kill(again.0);
        wait_for("the keeper as drainer and a new keeper", || match scene.roles() {
            Some((d, k)) if d == again.1 && k != again.0 => Ok(()),
            other => Err(format!("{other:?}")),
        })
        .await;
        slowest = slowest.max(begun.elapsed());
    }
    let (written, slowest_write) = writer.stop();
    scene.output().remove(&bot.id, true).await.unwrap();
    let kept = numbers(&scene.log(&bot));
    let lost = written - kept.len();
    println!(
        "{written} lines, {lost} lost in {deaths} deaths, healed within {slowest:?}, slowest write {slowest_write:?}"
    );
    assert!(kept.contains(&(written - 1)), "the last line is there");
    assert!(lost <= deaths * LOSS, "{lost} of {written} lines lost");
    assert!(slowest_write < Duration::from_secs(1), "a write took {slowest_write:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_bot_loses_nothing_when_its_drainer_is_killed() {
    let scene = Scene::new(|_| {});
    let bot = bot(1);
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let mut pipe = open_as_shim(&pipes.stdout);
    for number in 0..20 {
        // A pair that is still being made answers no flush, and what its drainer has read by then dies with it.
        scene.wait_for_pair().await;
        pipe.write_all(format!("line {number:010}\n").as_bytes()).unwrap();
        // In nobody's buffer any more. To ask for the last output flushes it, unless the machine is too busy to do that in time.
        wait_for("the line in the log", || {
            scene.output().last_output(&bot.owner, 10).unwrap();
            let lines = numbers(&scene.log(&bot)).len();
            if lines == number + 1 { Ok(()) } else { Err(format!("{lines} lines")) }
        })
        .await;
        kill(scene.wait_for_pair().await.0);
    }
    scene.wait_for_pair().await;
    scene.output().remove(&bot.id, true).await.unwrap();
    assert_eq!(numbers(&scene.log(&bot)).len(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_both_is_healed_by_ensure_and_what_the_pipe_held_is_kept() {
    let scene = Scene::new(|_| {});
    let bot = bot(1);
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let writer = Writer::start(&pipes.stdout, Duration::from_micros(500));
    for _ in 0..5 {
        let (drainer, keeper) = scene.wait_for_pair().await;
        for pid in [keeper, drainer] {
            // Stopped first: else the one heals the other between the two kills.
            let pid = rustix::process::Pid::from_raw(pid).unwrap();
            rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
        }
        kill(keeper);
        kill(drainer);
        let limit = Instant::now() + Duration::from_secs(15);
        while scene.output().observe(&bot.id).await.unwrap().alive {
            assert!(Instant::now() < limit, "the lock is still held by one of {:?}", scene.pair());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(scene.output().ensure(&bot.id, &bot.owner).await.unwrap(), pipes);
        assert!(scene.output().observe(&bot.id).await.unwrap().alive);
        let before = numbers(&scene.log(&bot)).len();
        wait_for("lines after it was healed", || {
            let now = numbers(&scene.log(&bot)).len();
            if now >= before + 20 { Ok(()) } else { Err(format!("{before} then {now} lines")) }
        })
        .await;
    }
    let (written, slowest_write) = writer.stop();
    scene.output().remove(&bot.id, true).await.unwrap();
    let lost = written - numbers(&scene.log(&bot)).len();
    println!("{written} lines, {lost} lost in 5 deaths of both, slowest write {slowest_write:?}");
    assert!(lost <= 5 * LOSS && written > 100, "{lost} of {written} lines lost");
    assert!(slowest_write < Duration::from_secs(1), "a write took {slowest_write:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_bounded_on_disk_and_in_memory_and_others_are_served() {
    let scene = Scene::new(|o| (o.max_file_bytes, o.max_files) = (256 << 10, 3));
    let (noisy, calm) = (bot(1), bot(2));
    let pipes = scene.output().ensure(&noisy.id, &noisy.owner).await.unwrap();
    let calm_pipes = scene.output().ensure(&calm.id, &calm.owner).await.unwrap();
    let (drainer, _) = scene.wait_for_pair().await;
    let rss = || -> u64 {
        let rollup = std::fs::read_to_string(format!("/proc/{drainer}/smaps_rollup")).unwrap();
        let line = rollup.lines().find(|line| line.starts_with("Pss_Anon:")).unwrap();
        line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let flood = std::process::Command::new("yes").stdout(open_as_shim(&pipes.stdout)).spawn();
    let mut flood = flood.unwrap();
    let mut pipe = open_as_shim(&calm_pipes.stdout);
    let begun = Instant::now();
    let (mut slowest, mut first_rss, mut turns) = (Duration::ZERO, 0, 0);
    while begun.elapsed() < Duration::from_secs(3) {
        let sent = Instant::now();
        pipe.write_all(format!("line {turns:010}\n").as_bytes()).unwrap();
        wait_for("the calm bot's line", || {
            let text = scene.log_text(&calm);
            if text.ends_with(&format!("line {turns:010}\n")) { Ok(()) } else { Err(text) }
        })
        .await;
        slowest = slowest.max(sent.elapsed());
        let total: u64 = scene.log_files(&noisy).iter().flat_map(std::fs::metadata).map(|m| m.len()).sum();
        assert!(total <= 3 * (256 << 10), "{total} bytes on disk");
        turns += 1;
        if turns == 5 {
            first_rss = rss();
        }
    }
    let last_rss = rss();
    assert!(flood.try_wait().unwrap().is_none(), "yes ended");
    flood.kill().unwrap();
    flood.wait().unwrap();
    println!("{turns} lines beside a flood, the slowest {slowest:?}; anonymous memory {first_rss} then {last_rss} KiB");
    assert!(turns > 20 && slowest < Duration::from_secs(1), "{turns} lines, the slowest {slowest:?}");
    assert!(last_rss <= first_rss + 256, "memory grew from {first_rss} to {last_rss} KiB");
    assert_eq!(scene.output().observe(&noisy.id).await.unwrap().dropped_bytes, 0);
    for bot in [noisy, calm] {
        scene.output().remove(&bot.id, false).await.unwrap();
    }
}

#[tokio::test]
async fn an_unfinished_line_is_logged_before_long_and_a_long_one_in_parts() {
    let scene = Scene::new(|_| {});
    let bot = bot(1);
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let mut pipe = open_as_shim(&pipes.stdout);
    pipe.write_all(b"password: ").unwrap();
    wait_for("the prompt", || {
        let text = scene.log_text(&bot);
        if text.ends_with("stdout P password: \n") { Ok(()) } else { Err(text) }
    })
    .await;
    let long = [&vec![b'a'; 16384][..], &vec![b'b'; 16384], b"c\n"].concat();
    pipe.write_all(&long).unwrap();
    scene.output().last_output(&bot.owner, 1).unwrap();
    let tags: Vec<String> = scene
        .log_text(&bot)
        .lines()
        .map(|line| format!("{} {} {}", &line[38..39], &line[40..41], line.len() - 40))
        .collect();
    assert_eq!(tags, ["P p 10", "P a 16384", "P b 16384", "F c 1"]);
    assert_eq!(scene.output().last_output(&bot.owner, 5).unwrap(), "bbbbc");
}

#[tokio::test]
async fn a_full_disk_drops_counts_and_says_so_later_and_the_bot_never_waits() {
    let scene = Scene::new(|_| {});
    std::fs::create_dir_all(&scene.options.log_root).unwrap();
    let mount = scene.options.log_root.clone();
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", &mount, "tmpfs", flags, Some(c"size=256k")).unwrap();
    let bot = bot(1);
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let mut pipe = open_as_shim(&pipes.stdout);
    let mut slowest = Duration::ZERO;
    let total = 100_000;
    for number in 0..total {
        let begun = Instant::now();
        pipe.write_all(format!("line {number:010}\n").as_bytes()).unwrap();
        slowest = slowest.max(begun.elapsed());
    }
    scene.output().last_output(&bot.owner, 1).unwrap();
    let state = scene.output().observe(&bot.id).await.unwrap();
    let kept = numbers(&scene.log(&bot)).len();
    assert_eq!(state.dropped_bytes, ((total - kept) * LINE) as u64, "{kept} lines kept, {state:?}");
    assert!(state.untold_bytes == state.dropped_bytes && slowest < Duration::from_secs(1), "{state:?}, {slowest:?}");
    // The count is not the drainer's memory alone.
    kill(scene.wait_for_pair().await.0);
    scene.wait_for_pair().await;
    rustix::mount::mount_remount(&mount, flags, "size=8m").unwrap();
    let told = format!("stderr F berth: dropped {} bytes of output", state.dropped_bytes);
    wait_for("the count in the log", || {
        let text = scene.log_text(&bot);
        if text.contains(&told) { Ok(()) } else { Err(text.lines().last().unwrap_or_default().to_owned()) }
    })
    .await;
    pipe.write_all(b"well again\n").unwrap();
    scene.output().last_output(&bot.owner, 1).unwrap();
    assert!(scene.log_text(&bot).ends_with("stdout F well again\n"));
    assert_eq!(scene.output().observe(&bot.id).await.unwrap().untold_bytes, 0);

    scene.output().remove(&bot.id, true).await.unwrap();
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[tokio::test]
async fn a_read_only_disk_keeps_nobody_from_starting() {
    let scene = Scene::new(|_| {});
    std::fs::create_dir_all(&scene.options.log_root).unwrap();
    let mount = scene.options.log_root.clone();
    let flags = rustix::mount::MountFlags::RDONLY;
    rustix::mount::mount("tmpfs", &mount, "tmpfs", flags, Some(c"size=256k")).unwrap();
    let bot = bot(1);
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let mut pipe = open_as_shim(&pipes.stdout);
    let begun = Instant::now();
    pipe.write_all("a line of sixty-four bytes, as a bot in good health may write it\n".repeat(1 << 12).as_bytes())
        .unwrap();
    let elapsed = begun.elapsed();
    assert!(elapsed < Duration::from_secs(1), "the bot waited {elapsed:?}");
    assert_eq!(scene.output().last_output(&bot.owner, 100).unwrap(), "");
    assert_eq!(scene.output().observe(&bot.id).await.unwrap().dropped_bytes, 65 << 12);
    rustix::mount::mount_remount(&mount, rustix::mount::MountFlags::empty(), "size=256k").unwrap();
    wait_for("the count in the log", || {
        let text = scene.log_text(&bot);
        if text.contains("dropped 266240 bytes of output: Read-only file system") { Ok(()) } else { Err(text) }
    })
    .await;
    scene.output().remove(&bot.id, false).await.unwrap();
    rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH).unwrap();
}

#[tokio::test]
async fn a_pair_with_other_settings_is_replaced_and_two_agents_make_one_pair() {
    let scene = Scene::new(|_| {});
    let bot = bot(1);
    let others: Vec<Output> = (0..8).map(|_| Output::new(scene.options.clone())).collect();
    let made = futures::future::join_all(others.iter().map(|output| output.ensure(&bot.id, &bot.owner))).await;
    assert!(made.iter().all(Result::is_ok), "{made:?}");
    let (first, _) = scene.wait_for_pair().await;
    let mut pipe = open_as_shim(&scene.output().ensure(&bot.id, &bot.owner).await.unwrap().stdout);
    assert_eq!(scene.wait_for_pair().await.0, first, "it was kept");

    pipe.write_all(b"before\n").unwrap();
    let other = Output::new(OutputOptions { max_files: 2, ..scene.options.clone() });
    other.ensure(&bot.id, &bot.owner).await.unwrap();
    pipe.write_all(b"after\n").unwrap();
    let (second, _) = scene.wait_for_pair().await;
    assert_ne!(second, first);
    assert_eq!(other.last_output(&bot.owner, 100).unwrap(), "before\nafter");
}

#[tokio::test]
async fn an_attached_agent_keeps_the_pair_and_it_ends_with_the_last() {
    let scene = Scene::new(|_| {});
    let agent = Output::new(scene.options.clone());
    agent.attach().await.unwrap();
    let pair = scene.wait_for_pair().await;
    let bot = bot(1);
    scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    scene.output().remove(&bot.id, false).await.unwrap();
    agent.attach().await.unwrap();
    assert_eq!(scene.roles(), Some(pair), "neither the last bot nor a second call changed it");
    kill(pair.0);
    scene.wait_for_pair().await;
    agent.attach().await.unwrap();
    drop(agent);
    wait_for(
        "the end of the pair",
        || if scene.pair().is_empty() { Ok(()) } else { Err(format!("{:?}", scene.pair())) },
    )
    .await;
}

#[tokio::test]
async fn the_pair_has_nothing_of_the_agents() {
    let cgroup = format!("/berth-output-test-{}/logger", std::process::id());
    let scene = Scene::new(|o| o.cgroup = Some(cgroup.clone()));
    // Inheritable on purpose.
    let (mut read, write) = rustix::pipe::pipe().map(|(r, w)| (File::from(r), w)).unwrap();
    let bot = bot(1);
    scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let (drainer, keeper) = scene.wait_for_pair().await;
    // Not by getsid: where a process outside of our PID namespace, or the kernel, leads the session, it is 0, which is no pid.
    let session = |process: &str| {
        let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        let (_, behind_name) = stat.rsplit_once(')').unwrap();
        behind_name.split_whitespace().nth(3).unwrap().to_owned()
    };
    for pid in [drainer, keeper] {
        assert_ne!(session(&pid.to_string()), session("self"));
        assert_eq!(std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap(), "berth-logger\n");
        assert_eq!(std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap(), Path::new("/"));
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(!status.contains(&format!("PPid:\t{}\n", std::process::id())), "no child of the agent's");
        let memberships = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(memberships.lines().count() > 1 || memberships.starts_with("0::"), "{memberships}");
        for line in memberships.lines() {
            assert!(line.ends_with(&cgroup), "{memberships}");
        }
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
        assert!(fds <= if pid == keeper { 4 } else { 16 }, "{pid} has {fds} descriptors");
    }
    drop(write);
    assert_eq!(std::io::Read::read(&mut read, &mut [0]).unwrap(), 0, "nobody else has the other end");
    scene.output().remove(&bot.id, false).await.unwrap();
    wait_for(
        "the end of the pair",
        || if scene.pair().is_empty() { Ok(()) } else { Err(format!("{:?}", scene.pair())) },
    )
    .await;
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().map(|entry| entry.unwrap().path()) {
        let dir = hierarchy.join(cgroup.trim_start_matches('/'));
        if dir.exists() {
            wait_for("an empty cgroup", || std::fs::remove_dir(&dir).map_err(|e| e.to_string())).await;
            std::fs::remove_dir(dir.parent().unwrap()).unwrap();
        }
    }
}

#[tokio::test]
async fn the_pair_ends_by_itself_when_its_folder_is_removed_behind_its_back() {
    let scene = Scene::new(|_| {});
    let (gone, kept) = (bot(1), bot(2));
    let pipes = scene.output().ensure(&gone.id, &gone.owner).await.unwrap();
    scene.output().ensure(&kept.id, &kept.owner).await.unwrap();
    let (drainer, _) = scene.wait_for_pair().await;
    let open = || {
        let fds = std::fs::read_dir(format!("/proc/{drainer}/fd")).unwrap().flatten();
        fds.filter(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains(gone.id.as_str())))
            .count()
    };
    assert!(open() >= 2);
    let mut pipe = open_as_shim(&pipes.stdout);
    pipe.write_all(b"last words\n").unwrap();
    std::fs::remove_dir_all(pipes.stdout.parent().unwrap()).unwrap();
    wait_for("the FIFOs to be let go", || if open() == 0 { Ok(()) } else { Err(format!("{} are open", open())) }).await;
    assert!(scene.log_text(&gone).ends_with("last words\n"));
    // A new bot under the same id is another pipe.
    let pipes = scene.output().ensure(&gone.id, &gone.owner).await.unwrap();
    open_as_shim(&pipes.stdout).write_all(b"again\n").unwrap();
    assert_eq!(scene.output().last_output(&gone.owner, 5).unwrap(), "again");
    std::fs::remove_dir_all(scene.options.run_dir.join("io")).unwrap();
    wait_for(
        "the end of the pair",
        || if scene.pair().is_empty() { Ok(()) } else { Err(format!("{:?}", scene.pair())) },
    )
    .await;
}

#[tokio::test]
async fn what_is_not_a_pipe_is_refused_and_a_foreign_folder_is_not_listed() {
    let scene = Scene::new(|_| {});
    let bot = bot(1);
    let dir = scene.options.run_dir.join("io").join(bot.id.as_str());
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("stdout"), "").unwrap();
    let refused = scene.output().ensure(&bot.id, &bot.owner).await.unwrap_err();
    assert!(!refused.retryable() && refused.to_string().contains("is no FIFO"), "{refused}");
    for foreign in ["journal", "team-a_web_not-a-uid"] {
        std::fs::create_dir_all(scene.options.log_root.join(foreign)).unwrap();
    }
    std::fs::create_dir_all(scene.options.run_dir.join("io/lost+found")).unwrap();
    let found = scene.output().list().await.unwrap();
    assert!(found.len() == 1 && found[0].path == dir, "{found:?}");
    // A program that is no logger.
    let wrong = Output::new(OutputOptions { program: "/bin/false".into(), ..scene.options.clone() });
    std::fs::remove_file(dir.join("stdout")).unwrap();
    let refused = wrong.ensure(&bot.id, &bot.owner).await.unwrap_err();
    assert!(refused.to_string().contains("did not start"), "{refused}");
}

/// Figures for `docs/decisions/output.md`; `BERTH_PROGRAM=target/release/berth cargo test --test agent_output -- --ignored --nocapture`.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "prints figures, asserts nothing that a slow machine could break"]
async fn figures() {
    let mut starts = Vec::new();
    for _ in 0..20 {
        let scene = Scene::new(|_| {});
        let bot = bot(1);
        let begun = Instant::now();
        scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
        starts.push(begun.elapsed());
    }
    let scene = Scene::new(|o| o.max_file_bytes = 4 << 20);
    let mut firsts = Vec::new();
    let mut again = Vec::new();
    scene.output().attach().await.unwrap();
    let mut pipes = Vec::new();
    for number in 0..40 {
        let bot = bot(number);
        let begun = Instant::now();
        pipes.push(scene.output().ensure(&bot.id, &bot.owner).await.unwrap());
        firsts.push(begun.elapsed());
        let begun = Instant::now();
        scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
        again.push(begun.elapsed());
        open_as_shim(&pipes[number as usize].stdout).write_all(b"hello\n").unwrap();
        scene.output().last_output(&bot.owner, 100).unwrap();
    }
    for (what, mut times) in [("starts a pair", starts), ("new bot", firsts), ("nothing to do", again)] {
        times.sort();
        println!("ensure, {what}: p50 {:?}, max {:?}", times[times.len() / 2], times[times.len() - 1]);
    }
    let pss = || -> Vec<(u64, u64)> {
        let field = |text: &str, name: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
        };
        let rollups =
            scene.pair().into_iter().map(|pid| std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap());
        rollups.map(|text| (field(&text, "Pss:"), field(&text, "Private_Dirty:"))).collect()
    };
    println!("40 bots: PSS and private dirty KiB of each of the pair {:?}", pss());
    let (drainer, _) = scene.wait_for_pair().await;
    kill(drainer);
    scene.wait_for_pair().await;
    println!("after a takeover: {:?}", pss());
    for (what, line) in [
        ("100-byte lines", format!("{:0>99}\n", 1)),
        ("1000-byte lines", format!("{:0>999}\n", 1)),
        ("y lines", "y\n".to_owned()),
    ] {
        let bytes = line.repeat(65536 / line.len());
        let mut pipe = open_as_shim(&pipes[0].stdout);
        let begun = Instant::now();
        let mut sent = 0;
        while begun.elapsed() < Duration::from_secs(2) {
            pipe.write_all(bytes.as_bytes()).unwrap();
            sent += bytes.len();
        }
        println!("{what}: {:.0} MB/s", sent as f64 / begun.elapsed().as_secs_f64() / 1e6);
    }
    println!("after floods: {:?}", pss());
    let mut pipe = open_as_shim(&pipes[1].stdout);
    let mut flood = std::process::Command::new("yes").stdout(open_as_shim(&pipes[0].stdout)).spawn().unwrap();
    let mut waits = Vec::new();
    for number in 0..100 {
        let begun = Instant::now();
        pipe.write_all(format!("line {number}\n").as_bytes()).unwrap();
        scene.output().last_output(&bot(1).owner, 10).unwrap();
        waits.push(begun.elapsed());
    }
    flood.kill().unwrap();
    flood.wait().unwrap();
    waits.sort();
    println!("a line beside `yes` is in the log after: p50 {:?}, max {:?}", waits[50], waits[99]);
}

/// A containerd of the test's own.
struct PrivateContainerd {
    dir: PathBuf,
    process: std::process::Child,
    containerd: berth::containerd::Containerd,
}

impl PrivateContainerd {
    fn start(dir: &Path) -> Self {
        let d = dir.display();
        let config = format!(
            "version = 2\nroot = \"{d}/root\"\nstate = \"{d}/state\"\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = \"{d}/containerd.sock\"\n[ttrpc]\naddress = \"{d}/containerd.sock.ttrpc\"\n\
             [plugins.\"io.containerd.internal.v1.opt\"]\npath = \"{d}/opt\"\n"
        );
        std::fs::create_dir_all(dir).unwrap();
        std::fs::write(dir.join("config.toml"), config).unwrap();
        let process = Self::spawn(dir);
        let containerd = berth::containerd::Containerd::new(&dir.join("containerd.sock"), "berth").unwrap();
        Self { dir: dir.to_owned(), process, containerd }
    }

    fn spawn(dir: &Path) -> std::process::Child {
        let log = File::options().create(true).append(true).open(dir.join("containerd.log")).unwrap();
        let mut command = std::process::Command::new("containerd");
        command.arg("--config").arg(dir.join("config.toml")).stdout(log.try_clone().unwrap()).stderr(log);
        command.spawn().unwrap()
    }

    /// As on a node where containerd is upgraded: its shims live on.
    fn restart(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        self.process = Self::spawn(&self.dir);
    }

    async fn wait_until_it_answers(&self) {
        let limit = Instant::now() + Duration::from_secs(30);
        loop {
            match self.containerd.version().version(self.containerd.request(())).await {
                Ok(_) => return,
                Err(status) if Instant::now() > limit => {
                    let log = std::fs::read_to_string(self.dir.join("containerd.log")).unwrap_or_default();
                    panic!("containerd does not answer: {status}\n{log}");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    async fn status(&self, id: &ContainerId) -> i32 {
        use containerd_client::services::v1::GetRequest;
        let request = GetRequest { container_id: id.to_string(), exec_id: String::new() };
        let answer = self.containerd.tasks().get(self.containerd.request(request)).await.unwrap();
        answer.into_inner().process.unwrap().status
    }
}

impl Drop for PrivateContainerd {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // A test that failed half-way leaves shims of this containerd, and below them bots.
        let address = self.dir.join("containerd.sock").display().to_string();
        let mut left: Vec<i32> = Vec::new();
        for pid in std::fs::read_dir("/proc").unwrap().filter_map(|e| e.unwrap().file_name().to_str()?.parse().ok()) {
            let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if String::from_utf8_lossy(&line).contains(&address) {
                let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
                left.extend(children.split_whitespace().filter_map(|child| child.parse::<i32>().ok()));
                left.push(pid);
            }
        }
        left.into_iter().for_each(kill);
        // runc removes the bot's cgroup with the bot, but not the one above it.
        for hierarchy in std::fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = std::fs::remove_dir(hierarchy.path().join(format!("berth-output-{}", std::process::id())));
        }
    }
}

/// A container of busybox with this script, its stdio at `pipes`; the pid of its task.
async fn start_task(
    scene: &Scene,
    server: &PrivateContainerd,
    bot: &Bot,
    pipes: &berth::output::Pipes,
    script: &str,
) -> u32 {
    use containerd_client::services::v1::container::Runtime;
    use containerd_client::services::v1::{Container, CreateContainerRequest, CreateTaskRequest, StartRequest};

    let rootfs = scene.dir.join("rootfs");
    for dir in ["bin", "proc"] {
        std::fs::create_dir_all(rootfs.join(dir)).unwrap();
    }
    std::fs::copy("/bin/busybox", rootfs.join("bin/busybox")).unwrap();
    let spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/busybox", "sh", "-c", script], "cwd": "/",
                    "env": ["PATH=/bin"]},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"cgroupsPath": format!("/berth-output-{}/{}", std::process::id(), bot.id),
                  "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}]},
    });
    let spec = prost_types::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".to_owned(),
        value: spec.to_string().into_bytes(),
    };
    let container = Container {
        id: bot.id.to_string(),
        runtime: Some(Runtime { name: "io.containerd.runc.v2".to_owned(), options: None }),
        spec: Some(spec),
        ..Default::default()
    };
    let containerd = &server.containerd;
    let request = CreateContainerRequest { container: Some(container) };
    containerd.containers().create(containerd.request(request)).await.unwrap();
    let request = CreateTaskRequest {
        container_id: bot.id.to_string(),
        rootfs: vec![containerd_client::types::Mount {
            r#type: "bind".to_owned(),
            source: rootfs.display().to_string(),
            options: vec!["rbind".to_owned(), "rw".to_owned()],
            ..Default::default()
        }],
        stdout: pipes.stdout.display().to_string(),
        stderr: pipes.stderr.display().to_string(),
        ..Default::default()
    };
    let pid = containerd.tasks().create(containerd.request(request)).await.unwrap().into_inner().pid;
    let request = StartRequest { container_id: bot.id.to_string(), exec_id: String::new() };
    containerd.tasks().start(containerd.request(request)).await.unwrap();
    pid
}

/// Ends the task and removes it with its container, as the agent does before it removes the output.
async fn end_task(server: &PrivateContainerd, bot: &Bot, kill: bool) {
    use containerd_client::services::v1::{DeleteContainerRequest, DeleteTaskRequest, KillRequest, WaitRequest};
    let (containerd, container_id) = (&server.containerd, bot.id.to_string());
    if kill {
        let request = KillRequest { container_id: container_id.clone(), signal: 9, all: true, ..Default::default() };
        containerd.tasks().kill(containerd.request(request)).await.unwrap();
    }
    let request = WaitRequest { container_id: container_id.clone(), exec_id: String::new() };
    containerd.tasks().wait(containerd.request(request)).await.unwrap();
    let request = DeleteTaskRequest { container_id: container_id.clone() };
    containerd.tasks().delete(containerd.request(request)).await.unwrap();
    let request = DeleteContainerRequest { id: container_id };
    containerd.containers().delete(containerd.request(request)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn on_containerd_a_bot_survives_the_death_of_the_pair_and_of_containerd() {
    const RUNNING: i32 = containerd_client::types::v1::Status::Running as i32;
    let scene = Scene::new(|o| o.max_file_bytes = 1 << 30);
    let mut server = PrivateContainerd::start(&scene.dir.join("containerd"));
    server.wait_until_it_answers().await;
    let bot = bot(1);
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let script = "i=0; while :; do printf 'line %010d\\n' $i; i=$((i+1)); done";
    let pid = start_task(&scene, &server, &bot, &pipes, script).await;
    let grows = async |what: &str| {
        let before = scene.log(&bot).len();
        wait_for(what, || {
            let now = scene.log(&bot).len();
            if now > before + 100_000 { Ok(()) } else { Err(format!("{before} then {now} bytes")) }
        })
        .await;
    };
    grows("the first output").await;

    let (drainer, _) = scene.wait_for_pair().await;
    kill(drainer);
    grows("output after the drainer's death").await;
    server.restart();
    grows("output after containerd's death").await;
    server.wait_until_it_answers().await;

    // Nobody drains: the FIFO and the pipe behind the shim fill, the bot waits, and lives.
    let (drainer, keeper) = scene.wait_for_pair().await;
    for pid in [keeper, drainer] {
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    }
    kill(keeper);
    kill(drainer);
    wait_for("the bot to wait for its full pipe", || {
        let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap();
        if wchan.contains("pipe_w") { Ok(()) } else { Err(wchan) }
    })
    .await;
    assert_eq!(server.status(&bot.id).await, RUNNING);
    scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    grows("output after ensure").await;
    assert_eq!(server.status(&bot.id).await, RUNNING);

    end_task(&server, &bot, true).await;
    scene.output().remove(&bot.id, true).await.unwrap();
    let kept = numbers(&scene.log(&bot));
    let lost = kept.last().unwrap() + 1 - kept.len();
    println!("{} lines, {lost} lost in two deaths of the drainer", kept.len());
    assert!(lost <= 2 * LOSS, "{lost} lines lost");

    // The next attempt, with the same id, that ends at once: all it said is there when its task is deleted.
    let pipes = scene.output().ensure(&bot.id, &bot.owner).await.unwrap();
    let since = jiff::Timestamp::now();
    start_task(&scene, &server, &bot, &pipes, "echo going down; echo oops >&2; exit 3").await;
    end_task(&server, &bot, false).await;
    let said = scene.output().last_output_since(&bot.owner, Some(since), 2048).unwrap();
    let mut lines: Vec<&str> = said.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["going down", "oops"], "{said:?}");
    scene.output().remove(&bot.id, false).await.unwrap();
}
