//! What versions cost a bot: how long a snapshot freezes it, how long it is away for a rollback, how long a deletion takes that
//! keeps its files.
//!
//! Each bot prints a line every 10 ms; its log says to the nanosecond when it was not there.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use berth::api::bot_container::{DeletionPolicy, Phase};
use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::{BotContainer, BotContainerSpec, BotSnapshot, BotSnapshotSpec, BotSnapshotStatus};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use crate::ctr::Ctr;
use crate::report::{Better, Figure, Samples};

/// Longer than anything takes that works.
const LIMIT: Duration = Duration::from_secs(600);
/// Rollbacks, restarts and deletions that count.
const TIMES: usize = 8;

/// A megabyte a second, and a line every 10 ms.
const WRITER: &str = "mkdir -p /data/log; n=0; \
    (while :; do dd if=/dev/zero of=/data/log/$((n % 50)) bs=64k count=16 2>/dev/null; n=$((n + 1)); sleep 1; done) & \
    trap 'exit 0' TERM; while :; do echo beat; usleep 10000; done";

/// Objects of one namespace, by question and answer: what is measured here is told by the objects themselves or by a log.
pub struct Versions {
    bots: Api<BotContainer>,
    snapshots: Api<BotSnapshot>,
    image: String,
    logs: PathBuf,
}

impl Versions {
    /// `logs` is the folder of the agent's logs.
    pub fn new(client: &Client, namespace: &str, image: &str, logs: &Path) -> Self {
        Self {
            bots: Api::namespaced(client.clone(), namespace),
            snapshots: Api::namespaced(client.clone(), namespace),
            image: image.to_owned(),
            logs: logs.to_owned(),
        }
    }

    async fn bot(&self, name: &str, policy: DeletionPolicy) -> anyhow::Result<BotContainer> {
        let spec: BotContainerSpec = serde_json::from_value(json!({
            "image": self.image, "command": ["sh", "-c", WRITER], "deletionPolicy": policy,
        }))?;
        self.bots.patch(name, &PatchParams::apply("bench"), &Patch::Apply(&BotContainer::new(name, spec))).await?;
        self.ready(name).await
    }

    /// Waits until a bot is Ready in its newest spec.
    async fn ready(&self, name: &str) -> anyhow::Result<BotContainer> {
        let began = Instant::now();
        loop {
            let bot = self.bots.get(name).await?;
            let status = bot.status.clone().unwrap_or_default();
            let ready = status.conditions.iter().any(|c| c.type_ == "Ready" && c.status == "True");
            if ready && status.phase == Some(Phase::Running) && status.observed_generation == bot.metadata.generation {
                return Ok(bot);
            }
            anyhow::ensure!(began.elapsed() < LIMIT, "bot {name} is not Ready: {status:?}");
            sleep(Duration::from_millis(5)).await;
        }
    }

    async fn edit(&self, name: &str, spec: Value) -> anyhow::Result<BotContainer> {
        let patch = Patch::Merge(json!({"spec": spec}));
        self.bots.patch(name, &PatchParams::default(), &patch).await?;
        self.ready(name).await
    }

    async fn gone(&self, name: &str) -> anyhow::Result<Duration> {
        let began = Instant::now();
        self.bots.delete(name, &DeleteParams::default()).await?;
        while self.bots.get_metadata_opt(name).await?.is_some() {
            anyhow::ensure!(began.elapsed() < LIMIT, "bot {name} does not go");
            sleep(Duration::from_millis(2)).await;
        }
        Ok(began.elapsed())
    }

    async fn snapshot(&self, name: &str, of: &str) -> anyhow::Result<BotSnapshotStatus> {
        self.snapshots.create(&PostParams::default(), &BotSnapshot::new(name, BotSnapshotSpec::of(of))).await?;
        let began = Instant::now();
        loop {
            let status = self.snapshots.get(name).await?.status.unwrap_or_default();
            match status.phase {
                Some(SnapshotPhase::Ready) => return Ok(status),
                Some(SnapshotPhase::Failed) => anyhow::bail!("snapshot {name} failed: {status:?}"),
                _ => anyhow::ensure!(began.elapsed() < LIMIT, "snapshot {name} is not Ready: {status:?}"),
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until no snapshot is under way: what is made of a bot that is gone goes on after it.
    async fn settled(&self) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let all = self.snapshots.list(&ListParams::default()).await?.items;
            let over = |s: &BotSnapshot| {
                let phase = s.status.as_ref().and_then(|status| status.phase);
                matches!(phase, Some(SnapshotPhase::Ready | SnapshotPhase::Failed))
            };
            if all.iter().all(over) {
                return Ok(());
            }
            anyhow::ensure!(began.elapsed() < LIMIT, "a snapshot is still under way");
            sleep(Duration::from_millis(20)).await;
        }
    }

    async fn forget(&self, name: &str) -> anyhow::Result<()> {
        self.snapshots.delete(name, &DeleteParams::default()).await?;
        while self.snapshots.get_metadata_opt(name).await?.is_some() {
            sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    /// The longest time without a line in a bot's log since `since`, in milliseconds.
    fn gap(&self, bot: &BotContainer, since: jiff::Timestamp) -> anyhow::Result<f64> {
        let meta = &bot.metadata;
        let folder = fs::read_dir(&self.logs)?.flatten().map(|entry| entry.path()).find(|path| {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            meta.uid.as_ref().is_some_and(|uid| name.ends_with(uid.as_str()))
        });
        let folder = folder.with_context(|| format!("no log of {:?} in {}", meta.name, self.logs.display()))?;
        let mut files: Vec<PathBuf> = fs::read_dir(folder)?.flatten().map(|entry| entry.path()).collect();
        files.sort();
        let mut times: Vec<jiff::Timestamp> = Vec::new();
        for file in files {
            let text = fs::read_to_string(file)?;
            times.extend(text.lines().filter_map(|line| line.split(' ').next()?.parse::<jiff::Timestamp>().ok()));
        }
        times.retain(|at| *at >= since);
        times.sort_unstable();
        let gaps = times.windows(2).filter_map(|pair| Some(pair.last()?.duration_since(*pair.first()?).as_secs_f64()));
        let longest = gaps.fold(0.0, f64::max);
        anyhow::ensure!(longest > 0.0, "the log of {:?} has no two lines since {since}", meta.name);
        Ok(longest * 1e3)
    }
}

/// Fills `/data` of a running bot or container from outside, as fast as the disk takes it.
fn fill(pid: i64, files: usize, bytes: usize) -> anyhow::Result<()> {
    let data = PathBuf::from(format!("/proc/{pid}/root/data/files"));
    // Not zeros, and not all the same.
    let content: Vec<u8> = (0..bytes).map(|n| (n * 31 % 251) as u8).collect();
    for n in 0..files {
        let dir = data.join((n / 100).to_string());
        if n % 100 == 0 {
            fs::create_dir_all(&dir)?;
        }
        fs::write(dir.join(n.to_string()), &content)?;
    }
    Ok(())
}

fn pid(bot: &BotContainer) -> anyhow::Result<i64> {
    bot.status.as_ref().and_then(|status| status.task.as_ref()).map(|task| task.pid).context("no task")
}

/// Freezes of one bot with so many files.
async fn freezes(
    versions: &Versions,
    name: &str,
    (files, bytes): (usize, usize),
    snapshots: usize,
    mut before: impl FnMut(i64) -> anyhow::Result<()>,
) -> anyhow::Result<Samples> {
    crate::say(&format!("{snapshots} snapshots of {files} files of {bytes} bytes, a writer of 1 MB/s beside"));
    let bot = versions.bot(name, DeletionPolicy::Delete).await?;
    fill(pid(&bot)?, files, bytes)?;
    let mut frozen = Vec::new();
    for n in 0..snapshots {
        before(pid(&bot)?)?;
        let snapshot = format!("{name}-{n}");
        let status = versions.snapshot(&snapshot, name).await?;
        frozen.push(status.frozen_millis.context("no frozenMillis")? as f64);
        versions.forget(&snapshot).await?;
    }
    versions.gone(name).await?;
    Samples::new(frozen)
}

/// Of few samples it is the worst.
fn p95(name: &'static str, samples: &Samples, target: f64) -> Figure {
    let p95 = samples.percentile(95);
    Figure { ours_spread: Some(samples.spread()), ..Figure::new(name, "ms", Better::Lower, p95) }.target(target)
}

/// How long snapshots freeze a bot.
pub async fn freeze_figures(versions: &Versions, ctr: &Ctr) -> anyhow::Result<Vec<Figure>> {
    let nothing = |_| Ok(());
    let one = freezes(versions, "freeze-1gib", (10_000, 107_374), 20, nothing).await?;
    let four = freezes(versions, "freeze-4gib", (10_000, 429_496), 6, nothing).await?;
    let many = freezes(versions, "freeze-100k", (100_000, 1_000), 10, nothing).await?;
    // 2 GB that were just written, and lie in memory only.
    let dirty = |pid: i64| {
        let path = format!("/proc/{pid}/root/data/dirty");
        let data = vec![7_u8; 1 << 20];
        let mut file = fs::File::create(path)?;
        for _ in 0..2000 {
            std::io::Write::write_all(&mut file, &data)?;
        }
        Ok(())
    };
    let dirty = freezes(versions, "freeze-dirty", (1_000, 1_000), 6, dirty).await?;

    crate::say("containerd's own diff of 1 GiB under a freeze");
    let filled = |pid: i32| fill(i64::from(pid), 10_000, 107_374);
    let diff = ctr.frozen_diff("diffed", filled).await?.as_secs_f64() * 1e3;

    crate::say("stop, commit, start, as the old system did, with 1 GiB");
    let old = ctr.old_snapshot("old-system", filled).await?.as_secs_f64() * 1e3;
    Ok(vec![
        p95("freeze_p95_1gib", &one, 60.0)
            .note(format!("10,000 files; containerd's own diff under a freeze took {diff:.0} ms, once")),
        p95("freeze_p95_4gib", &four, 60.0).note("10,000 files"),
        p95("freeze_p95_dirty", &dirty, 60.0).note("2 GB written right before each"),
        p95("freeze_p95_100k_files", &many, 250.0),
        Figure::new("old_system_snapshot_downtime", "ms", Better::Lower, one.percentile(50))
            .beside("stop, commit, prepare, start with ctr", &Samples::new(vec![old])?)
            .note("ours is the freeze, p50"),
    ])
}

/// How long a bot is away for a rollback, and how long a deletion takes that keeps its files.
pub async fn keep_figures(versions: &Versions) -> anyhow::Result<Vec<Figure>> {
    crate::say(&format!("{TIMES} rollbacks and {TIMES} restarts of a bot with 1 GiB"));
    let bot = versions.bot("rolls", DeletionPolicy::Delete).await?;
    fill(pid(&bot)?, 10_000, 107_374)?;
    versions.snapshot("rolls-to", "rolls").await?;
    let (mut rolled, mut restarted) = (Vec::new(), Vec::new());
    for n in 0..TIMES {
        for (spec, into) in [
            (
                json!({"rollback": {"id": n.to_string(), "snapshotName": "rolls-to", "keepReplaced": false}}),
                &mut rolled,
            ),
            (json!({"restartedAt": format!("2026-01-01T00:00:{n:02}Z")}), &mut restarted),
        ] {
            let since = jiff::Timestamp::now();
            let bot = versions.edit("rolls", spec).await?;
            // So that there is a line after it.
            sleep(Duration::from_millis(300)).await;
            into.push(versions.gap(&bot, since)?);
        }
    }
    versions.gone("rolls").await?;

    crate::say(&format!("{TIMES} deletions that keep 100 MiB"));
    let mut kept = Vec::new();
    for n in 0..TIMES {
        let name = format!("kept-{n}");
        let bot = versions.bot(&name, DeletionPolicy::Retain).await?;
        fill(pid(&bot)?, 1_000, 107_374)?;
        kept.push(versions.gone(&name).await?.as_secs_f64() * 1e3);
        versions.settled().await?;
    }
    Ok(vec![
        Figure::median("rollback_downtime", "ms", Better::Lower, &Samples::new(rolled)?)
            .beside("a plain restart of the same bot", &Samples::new(restarted)?)
            .target(1.5)
            .note("1 GiB in 10,000 files; the longest time without a line in the bot's log"),
        Figure::median("retain_delete_p50", "ms", Better::Lower, &Samples::new(kept)?)
            .target(1000.0)
            .note("100 MiB in 1,000 files; until the object is gone"),
    ])
}
