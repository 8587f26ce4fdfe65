//! Every figure beside its peer, in one run: what `make bench` prints and writes to `target/bench/report.json`.
//!
//! ```text
//! bots.rs     ours: apply, and a watch that says when      server.rs   writes, as the API server counts them
//! versions.rs ours: freezes, rollbacks, what is kept
//! mirror.rs   ours: rows in PostgreSQL
//! pods.rs     another peer: Pods on the same node, in a second cluster of the same run
//! ctr.rs      the peer: `ctr` on the same containerd       machine.rs  processes and machine, as the kernel tells
//! report.rs   percentiles, the table, report.json
//! ```
//!
//! `hack/bench` starts the cluster. Ours and the peer's take turns, so that a busy moment of the machine hits both; on a
//! machine that does other work, believe the ratios. Nothing is asserted about time: a figure that misses its target is
//! shown, a run that can't measure fails.

mod bots;
mod ctr;
mod machine;
mod mirror;
mod pods;
mod report;
mod server;
mod versions;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use berth::api::bot_container::OperatingMode;
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::time::{Instant, sleep};

use bots::{Bots, Start};
use ctr::{Ctr, Life};
use machine::{Machine, Part};
use mirror::Mirror;
use report::{Better, Figure, Samples};
use server::Writes;
use versions::Versions;

/// Lives of one bot that are thrown away: the first starts fill caches on both sides.
const WARM_UP: usize = 3;
/// Lives that count.
const LIVES: usize = 30;
/// Bots of a burst.
const BURST: usize = 40;
/// Bursts of each side.
const BURSTS: usize = 3;
/// Starts whose writes are counted.
const COUNTED: usize = 10;
/// How long a settled cluster is looked at.
const AT_REST: Duration = Duration::from_secs(60);
/// Between a start and the next command, for the bot's own script to come to rest.
const SETTLE: Duration = Duration::from_millis(300);
/// After bursts and counted starts: no late write may be missed, nor counted as one at rest.
const QUIET: Duration = Duration::from_secs(5);

/// What `hack/bench` hands over.
struct Place {
    client: Client,
    /// For results and scratch.
    dir: PathBuf,
    /// Of the cluster's pid files.
    run: PathBuf,
    binary: PathBuf,
    containerd: String,
    image: String,
    /// Where the agent keeps bots' output.
    logs: PathBuf,
}

impl Place {
    async fn from_env() -> anyhow::Result<Self> {
        let var = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set; run `make bench`"));
        Ok(Self {
            client: Client::try_default().await?,
            dir: Path::new(env!("CARGO_MANIFEST_DIR")).join("target/bench"),
            run: var("BERTH_RUN")?.into(),
            binary: Path::new(&var("BERTH_BENCH_BINARY")?).canonicalize()?,
            containerd: var("CONTAINERD_ADDRESS")?,
            image: format!("{}/berth/demo-bot:1", var("BERTH_REGISTRY")?),
            logs: var("BERTH_BENCH_LOGS")?.into(),
        })
    }
}

/// The groups of figures.
const GROUPS: [&str; 8] = ["lives", "bursts", "writes", "rest", "freezes", "keeps", "mirror", "pods"];

/// What of them is measured: those that the command line names, else all but `pods`, which need a kubelet: its own writes would be
/// counted as ours at rest. `hack/bench` runs those after the others, on a cluster with one.
struct Asked(Vec<String>);

impl Asked {
    fn from_args() -> anyhow::Result<Self> {
        // cargo adds a flag of its own.
        let named: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
        for name in &named {
            anyhow::ensure!(GROUPS.contains(&name.as_str()), "{name} is no group of figures; name some of {GROUPS:?}");
        }
        Ok(Self(named))
    }

    fn has(&self, group: &str) -> bool {
        self.0.is_empty() && group != "pods" || self.names(group)
    }

    fn names(&self, group: &str) -> bool {
        self.0.iter().any(|named| named == group)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let place = Place::from_env().await?;
    let machine = Machine::read()?;
    let namespace = "bench";
    for name in [namespace, "mirror"] {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        let object = Namespace { metadata, ..Namespace::default() };
        Api::<Namespace>::all(place.client.clone()).create(&PostParams::default(), &object).await?;
    }
    let bots = Bots::watch(&place.client, namespace, &place.image).await?;
    let ctr = Ctr::new(&place.dir, &place.containerd, &place.image).await?;

    let asked = Asked::from_args()?;
    let mut figures = Vec::new();
    if asked.has("lives") {
        figures.extend(lives(&bots, &ctr).await?);
    }
    if asked.has("bursts") {
        figures.extend(bursts(&bots, &ctr).await?);
    }
    let versions = Versions::new(&place.client, namespace, &place.image, &place.logs);
    if asked.has("freezes") {
        figures.extend(versions::freeze_figures(&versions, &ctr).await?);
    }
    ctr.leave().await?;
    if asked.has("keeps") {
        figures.extend(versions::keep_figures(&versions).await?);
    }
    if asked.has("writes") {
        figures.extend(writes_of_starts(&place, &bots).await?);
    }
    if asked.has("rest") {
        figures.extend(at_rest(&place, &bots).await?);
    }
    if asked.has("mirror") {
        figures.extend(mirror::figures(&Mirror::new(&place, "mirror")?).await?);
    }

    if asked.has("pods") {
        figures.extend(pods::figures(&place.client, &bots, namespace, &place.image).await?);
    }

    let machine = machine.ended()?;
    let path = place.dir.join("report.json");
    report::write(&path, &figures, &machine, std::env::var_os("BERTH_BENCH_MORE").is_some())?;
    println!("{}\n\n{}\n{}", machine.describe(), report::table(&figures), path.display());
    Ok(())
}

/// One bot after the other through all its modes, in turns with one container after the other.
async fn lives(bots: &Bots, ctr: &Ctr) -> anyhow::Result<Vec<Figure>> {
    say("starts, pauses, stops and deletions, one after another");
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for i in 0..WARM_UP + LIVES {
        let name = format!("life-{i}");
        // Who goes first changes, in case the one leaves something for the other to wait for.
        let (one, other) = if i % 2 == 0 {
            let one = live(bots, &name).await?;
            (one, ctr.life(&name, SETTLE).await?)
        } else {
            let other = ctr.life(&name, SETTLE).await?;
            (live(bots, &name).await?, other)
        };
        if i >= WARM_UP {
            ours.push(one);
            theirs.push(other);
        }
    }
    let us = |of: fn(&Ours) -> Duration| samples(ours.iter().map(of));
    let them = |of: fn(&Life) -> Duration| samples(theirs.iter().map(of));
    let ms = |name, ours: &Samples| Figure::median(name, "ms", Better::Lower, ours);

    let p50 = |of: fn(&Ours) -> Duration| us(of).map(|samples| samples.percentile(50));
    let confined = them(|t| t.run_with_seccomp)?.percentile(50);
    let stages = format!(
        "with --seccomp, as a bot is, it took {confined:.1} ms; of ours, p50: applied {:.0} ms, finalizer seen {:.0}, bound {:.0}",
        p50(|o| o.start.applied)?,
        p50(|o| o.start.finalizer)?,
        p50(|o| o.start.bound)?
    );
    let resume = them(|t| t.resume)?.percentile(50);
    Ok(vec![
        ms("start_p50", &us(|o| o.start.running)?)
            .beside("ctr run -d --cni", &them(|t| t.run)?)
            .target(1.0)
            .note(stages),
        ms("resume_p50", &us(|o| o.resume)?).target(50.0).note(format!("`ctr tasks resume` took {resume:.1} ms")),
        ms("pause_p50", &us(|o| o.pause)?).beside("ctr tasks pause", &them(|t| t.pause)?),
        ms("stop_p50", &us(|o| o.stop)?).beside("ctr tasks kill (TERM), exit, tasks delete", &them(|t| t.stop)?),
        ms("delete_p50", &us(|o| o.delete)?)
            .beside("the same, and containers delete", &them(|t| t.delete)?)
            .note("of a running bot"),
        ms("start_again_p50", &us(|o| o.again)?).note("of a stopped bot, on its layer"),
    ])
}

/// How long one bot's changes took.
struct Ours {
    start: Start,
    pause: Duration,
    resume: Duration,
    stop: Duration,
    again: Duration,
    delete: Duration,
}

async fn live(bots: &Bots, name: &str) -> anyhow::Result<Ours> {
    let start = bots.start(name).await?;
    sleep(SETTLE).await;
    let pause = bots.change(name, OperatingMode::Paused).await?;
    let resume = bots.change(name, OperatingMode::Running).await?;
    let stop = bots.change(name, OperatingMode::Stopped).await?;
    let again = bots.change(name, OperatingMode::Running).await?;
    sleep(SETTLE).await;
    let delete = bots.delete(name).await?;
    Ok(Ours { start, pause, resume, stop, again, delete })
}

/// Many at once, in turns.
async fn bursts(bots: &Bots, ctr: &Ctr) -> anyhow::Result<Vec<Figure>> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for i in 0..BURSTS {
        say(&format!("burst {} of {BURSTS}, {BURST} bots", i + 1));
        let names = names(&format!("burst-{i}"), BURST);
        ours.push(BURST as f64 / bots.burst(&names).await?.as_secs_f64());
        sleep(QUIET).await;
        bots.clear(&names).await?;
        sleep(QUIET).await;
        theirs.push(BURST as f64 / ctr.burst(&names).await?.as_secs_f64());
        sleep(QUIET).await;
        ctr.clear(&names).await?;
        sleep(QUIET).await;
    }
    let figure = Figure::median("start_burst_40", "1/s", Better::Higher, &Samples::new(ours)?);
    Ok(vec![figure.beside("ctr run -d --cni, 8 at a time", &Samples::new(theirs)?).target(1.0)])
}

/// What starts cost the API server.
async fn writes_of_starts(place: &Place, bots: &Bots) -> anyhow::Result<Vec<Figure>> {
    say("writes of starts");
    let names = names("counted", COUNTED);
    let before = Writes::read(&place.client).await?;
    for name in &names {
        bots.start(name).await?;
    }
    sleep(QUIET).await;
    let grown = Writes::read(&place.client).await?.since(&before);
    bots.clear(&names).await?;
    let each = |writes: &Writes| writes.total() as f64 / COUNTED as f64;
    let (objects, events) = (grown.objects(), grown.events());
    let own = "the user's own apply is one of them";
    Ok(vec![
        Figure::new("object_writes_per_start", "writes", Better::Lower, each(&objects))
            .target(5.0)
            .note(format!("{own}: {}", objects.describe(COUNTED))),
        Figure::new("events_per_start", "writes", Better::Lower, each(&events))
            .target(3.0)
            .note(events.describe(COUNTED)),
    ])
}

/// What 40 running bots cost while nothing happens.
async fn at_rest(place: &Place, bots: &Bots) -> anyhow::Result<Vec<Figure>> {
    say(&format!("{BURST} bots at rest, for {AT_REST:?}"));
    let names = names("rest", BURST);
    bots.burst(&names).await?;
    sleep(QUIET * 2).await;

    let cpu =
        |parts: &[(u32, Part)]| parts.iter().map(|(pid, _)| machine::cpu_seconds(*pid)).sum::<anyhow::Result<f64>>();
    let parts: Vec<(u32, Part)> = machine::parts(&place.run, &place.binary)?.into_iter().collect();
    let (before, cpu_before, began) = (Writes::read(&place.client).await?, cpu(&parts)?, Instant::now());
    sleep(AT_REST).await;
    let (cpu, took) = (cpu(&parts)? - cpu_before, began.elapsed().as_secs_f64());
    let grown = Writes::read(&place.client).await?.since(&before);

    let mut memory = [(Part::Agent, 0, 0), (Part::Controller, 0, 0), (Part::Logger, 0, 0)];
    for (pid, part) in &parts {
        let pss = machine::pss(*pid)?;
        for (of, count, bytes) in &mut memory {
            if of == part {
                (*count, *bytes) = (*count + 1, *bytes + pss);
            }
        }
    }
    bots.clear(&names).await?;
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let [(_, _, agent), (_, _, controller), (_, loggers, logging)] = memory;
    anyhow::ensure!(loggers > 0, "no logger was found beside {BURST} running bots");
    let (rest, leases) = (grown.but_leases(), grown.leases());
    Ok(vec![
        Figure::new("agent_rss_40_bots", "MB", Better::Lower, mb(agent + logging)).target(30.0).note(format!(
            "PSS: agent {:.1}, {loggers} logger(s) {:.1}; beside them the controller {:.1}",
            mb(agent),
            mb(logging),
            mb(controller)
        )),
        Figure::new("writes_at_rest", "writes", Better::Lower, rest.total() as f64).target(0.0).note(format!(
            "in {took:.0} s, {}; beside them {} of Leases",
            if rest.total() == 0 { "none".to_owned() } else { rest.describe(1) },
            leases.total()
        )),
        Figure::new("cpu_at_rest", "% of core", Better::Lower, cpu / took * 100.0)
            .target(1.0)
            .note("agent, loggers and controller, with 40 bots"),
    ])
}

fn names(prefix: &str, count: usize) -> Vec<String> {
    (0..count).map(|i| format!("{prefix}-{i}")).collect()
}

/// In milliseconds.
fn samples(took: impl Iterator<Item = Duration>) -> anyhow::Result<Samples> {
    Samples::new(took.map(|took| took.as_secs_f64() * 1e3).collect())
}

fn say(what: &str) {
    eprintln!("bench: {what}");
}
