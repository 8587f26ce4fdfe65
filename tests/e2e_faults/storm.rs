//! The agent, and containerd with it, die at random while bots change; then it is quiet, and all is as the objects say.

use std::time::{Duration, Instant};

use berth::api::BotContainer;
use berth::api::bot_container::{OperatingMode, Phase, RestartPolicy};
use kube::api::DeleteParams;

use crate::common::{BotBuilder, Cluster, SOON, wait_for};
use crate::scene::{QUICK_SWEEP, Scene, counting};

const BOTS: usize = 10;
const STORM: Duration = Duration::from_secs(20);

/// Numbers that look random and are the same for a seed (Knuth's MMIX constants).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// What a bot is to be at last.
#[derive(Clone)]
enum Wanted {
    Gone,
    Mode(OperatingMode, u64),
}

impl Wanted {
    fn bot(&self, n: usize) -> Option<BotBuilder> {
        match self {
            Self::Gone => None,
            Self::Mode(mode, edit) => Some(counting(&name(n)).mode(*mode).env("EDIT", &edit.to_string())),
        }
    }
}

fn name(n: usize) -> String {
    format!("bot-{n}")
}

/// Every third runs once at most: it is only paused and resumed.
fn once(n: usize) -> bool {
    n.is_multiple_of(3)
}

fn policy(bot: BotBuilder, n: usize) -> BotBuilder {
    if once(n) { bot.restart(RestartPolicy::Never) } else { bot }
}

async fn change(scene: &Scene, dice: &mut Dice, n: usize, wanted: &mut Wanted) {
    let mode = match dice.roll(3) {
        0 => OperatingMode::Paused,
        1 if !once(n) => OperatingMode::Stopped,
        _ => OperatingMode::Running,
    };
    *wanted = match wanted {
        _ if once(n) => Wanted::Mode(mode, 0),
        Wanted::Mode(..) if dice.roll(4) == 0 => Wanted::Gone,
        Wanted::Mode(_, edit) if dice.roll(3) == 0 => Wanted::Mode(mode, *edit + 1),
        Wanted::Mode(_, edit) => Wanted::Mode(mode, *edit),
        Wanted::Gone => Wanted::Mode(mode, 0),
    };
    apply(scene, n, wanted).await;
}

async fn apply(scene: &Scene, n: usize, wanted: &Wanted) {
    match wanted.bot(n) {
        Some(bot) => {
            // One that is being deleted takes it and goes all the same; `settle` makes it anew.
            scene.apply(policy(bot, n)).await;
        }
        None => {
            let _ = scene.ns.bots().delete(&name(n), &DeleteParams::default()).await;
        }
    }
}

/// What is wanted at last is reached.
async fn settle(scene: &Scene, wanted: &[Wanted]) {
    for (n, wanted) in wanted.iter().enumerate() {
        let name = name(n);
        wait_for(format!("{name} not being deleted"), SOON, || async {
            match scene.ns.bots().get_opt(&name).await {
                Ok(Some(bot)) if bot.metadata.deletion_timestamp.is_some() => Err(crate::common::summary(&bot)),
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            }
        })
        .await;
        apply(scene, n, wanted).await;
    }
    for (n, wanted) in wanted.iter().enumerate() {
        let name = name(n);
        let bot: Option<BotContainer> = match wanted {
            Wanted::Gone => None,
            Wanted::Mode(OperatingMode::Running, _) => Some(scene.phase(&name, Phase::Running).await),
            Wanted::Mode(OperatingMode::Paused, _) => Some(scene.phase(&name, Phase::Paused).await),
            Wanted::Mode(OperatingMode::Stopped, _) => Some(scene.phase(&name, Phase::Stopped).await),
        };
        let Some(bot) = bot else { continue };
        if matches!(wanted, Wanted::Mode(OperatingMode::Stopped, _)) && bot.status.unwrap().image.is_none() {
            // Made anew as Stopped: it never had a layer.
            continue;
        }
        let bot = scene.ns.bots().get(&name).await.unwrap();
        let diary = scene.diary(&bot);
        diary.assert_whole(&name);
        if once(n) {
            assert!(diary.starts <= 1, "{name}: {diary:?}");
        }
    }
}

async fn storm(scene: &mut Scene, seed: u64, servers: bool) {
    println!("seed {seed}");
    let mut dice = Dice(seed);
    let mut wanted: Vec<Wanted> = (0..BOTS).map(|_| Wanted::Mode(OperatingMode::Running, 0)).collect();
    for (n, wanted) in wanted.iter().enumerate() {
        apply(scene, n, wanted).await;
    }
    let began = Instant::now();
    let mut kills = 0;
    let mut broken = servers.then(|| tokio::task::spawn_blocking(containerd_dies));
    while began.elapsed() < STORM {
        tokio::time::sleep(Duration::from_millis(50 + dice.roll(350))).await;
        scene.agent.kill_9();
        scene.agent.spawn_again(&[]);
        kills += 1;
        for _ in 0..2 {
            let n = usize::try_from(dice.roll(BOTS as u64)).unwrap();
            change(scene, &mut dice, n, &mut wanted[n]).await;
        }
        if broken.as_ref().is_some_and(|broken| broken.is_finished()) {
            broken = Some(tokio::task::spawn_blocking(containerd_dies));
        }
    }
    assert!(kills > 20, "only {kills} kills: no storm");
    if let Some(broken) = broken {
        broken.await.unwrap();
    }
    settle(scene, &wanted).await;
}

fn containerd_dies() {
    let cluster = Cluster::shared();
    crate::common::run(std::process::Command::new("kill").args(["-KILL", &cluster.pid("containerd").to_string()]));
    cluster.up_again();
    std::thread::park_timeout(Duration::from_secs(2));
}

fn seed() -> u64 {
    let given = std::env::var("BERTH_SEED").ok().and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| u64::from(std::process::id()))
}

#[tokio::test]
async fn an_agent_killed_at_random_leaves_what_the_objects_say() {
    let mut scene = Scene::new_with("storm", &[QUICK_SWEEP]).await;
    storm(&mut scene, seed(), false).await;
    scene.end().await;
}

#[tokio::test]
async fn agent_and_containerd_killed_at_random_leave_what_the_objects_say() {
    let mut scene = Scene::alone("tempest").await;
    storm(&mut scene, seed(), true).await;
    scene.end().await;
}
