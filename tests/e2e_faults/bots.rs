//! Bots that behave badly: their trouble stays their own.

use std::time::Duration;

use berth::api::bot_container::Phase;

use crate::common::wait_for;
use crate::scene::{Scene, diarist};

/// Harm done: the logs of a bot that was stopped before it was deleted stayed until the sweeper took them for an orphan's.
#[tokio::test]
async fn the_logs_of_a_bot_deleted_while_stopped_go_with_it() {
    let scene = Scene::new("logs").await;
    let talks = || diarist("talks", "echo hello; trap 'exit 0' TERM; sleep 100000 & wait");
    scene.apply(talks()).await;
    scene.phase("talks", Phase::Running).await;
    assert!(!scene.files().is_empty(), "there is something to remove");
    scene.apply(talks().stopped()).await;
    scene.phase("talks", Phase::Stopped).await;
    scene.ns.delete("talks", Duration::from_secs(10)).await;
    wait_for("no file left", Duration::from_secs(5), || async {
        let left = scene.files();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
    scene.end().await;
}
