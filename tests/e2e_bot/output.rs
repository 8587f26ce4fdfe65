//! The log file: CRI format, rotated, bounded, and there while the agent is not.

use std::path::{Path, PathBuf};
use std::time::Duration;

use berth::api::BotContainer;

use crate::common::{SOON, bot, wait_for};
use crate::stage::{Stage, WAIT, uid};

/// The folder of a bot's log.
fn folder(stage: &Stage, bot: &BotContainer) -> PathBuf {
    let name = bot.metadata.name.as_deref().unwrap();
    Path::new(stage.agent.env("BERTH_LOG_DIR")).join(format!("{}_{name}_{}", stage.ns.name(), uid(bot)))
}

/// Stream, tag and text of each record of a CRI log.
fn records(text: &str) -> Vec<(String, String, String)> {
    text.lines()
        .map(|line| {
            let mut parts = line.splitn(4, ' ');
            let time = parts.next().unwrap();
            time.parse::<jiff::Timestamp>().unwrap_or_else(|e| panic!("{line:?}: {e}"));
            let mut next = || parts.next().unwrap_or_else(|| panic!("{line:?} is no CRI record")).to_owned();
            (next(), next(), next())
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_streams_come_into_a_cri_log_and_stay_over_a_restart() {
    let mut stage = Stage::set("log").await;
    let script = format!("echo out; echo err >&2; printf 'no newline'; {WAIT}");
    let web = stage.runs(bot("web").sh(&script)).await;
    let log = folder(&stage, &web).join("0.log");
    let has = |wanted: (&str, &str, &str), times: usize| {
        let log = log.clone();
        let wanted = (wanted.0.to_owned(), wanted.1.to_owned(), wanted.2.to_owned());
        wait_for(format!("{wanted:?} in {}", log.display()), SOON, move || {
            let (log, wanted) = (log.clone(), wanted.clone());
            async move {
                let text = std::fs::read_to_string(&log).map_err(|e| e.to_string())?;
                match records(&text).iter().filter(|record| **record == wanted).count() {
                    n if n == times => Ok(()),
                    n => Err(format!("{n} times in {text}")),
                }
            }
        })
    };
    has(("stdout", "F", "out"), 1).await;
    has(("stderr", "F", "err"), 1).await;
    // The next process's output comes after it, also when the agent was away in between.
    stage.agent.restart().await;
    stage
        .edited(
            "web",
            serde_json::json!({"restartedAt": "2026-11-24T10:00:00Z"}),
            berth::api::bot_container::Phase::Running,
        )
        .await;
    has(("stdout", "F", "out"), 2).await;
    // It goes with the object.
    stage.ns.delete("web", SOON).await;
    wait_for("the log folder gone", SOON, || async {
        if folder(&stage, &web).exists() { Err("still there".to_owned()) } else { Ok(()) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_is_rotated_bounded_and_goes_on_while_the_agent_is_away() {
    let bounds = [("BERTH_LOG_FILE_BYTES", "131072"), ("BERTH_LOG_FILES", "3")];
    let mut stage = Stage::set_with("flood", &bounds).await;
    let script = "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; \
        [ $((i % 500)) -eq 0 ] && echo $i >/data/new && mv /data/new /data/n; done";
    let flood = stage.runs(bot("flood").sh(script).limit("cpu", "500m")).await;
    let dir = folder(&stage, &flood);
    let sizes = || -> Vec<u64> {
        let all = std::fs::read_dir(&dir).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default();
        all.iter().filter_map(|entry| entry.metadata().ok()).filter(|m| m.is_file()).map(|m| m.len()).collect()
    };
    wait_for("three files", SOON, || async { if sizes().len() == 3 { Ok(()) } else { Err(format!("{:?}", sizes())) } })
        .await;
    stage.agent.kill_9();
    let count = crate::stage::path_in(&flood, "/data/n");
    let lines = || std::fs::read_to_string(&count).ok().and_then(|n| n.trim().parse::<u64>().ok()).unwrap_or(0);
    let at = lines();
    // More than the FIFO and all files hold: whoever is not drained stands still.
    wait_for("10,000 lines more without the agent", Duration::from_secs(120), || async {
        assert!(sizes().len() <= 3 && sizes().iter().sum::<u64>() <= 3 * 131_072, "{:?}", sizes());
        if lines() > at + 10_000 { Ok(()) } else { Err(format!("{} after {at}", lines())) }
    })
    .await;
    stage.agent.start_again(&[]).await;
    let after = stage.ns.ready("flood", SOON).await;
    assert_eq!(crate::stage::pid(&after), crate::stage::pid(&flood));
}
