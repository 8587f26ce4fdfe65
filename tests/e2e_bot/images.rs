//! Images that can't be had, and their repair.

use std::process::Command;

use berth::api::bot_container::{ImagePullPolicy, Phase};
use berth::api::condition::ConditionType;
use serde_json::json;

use crate::common::{SOON, bot, run, summary};
use crate::stage::{Stage, message, page, says, status};

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_image_is_told_and_mended_by_an_edit_or_a_push() {
    let stage = Stage::set("missing").await;
    let registry = stage.cluster.env("BERTH_REGISTRY");
    let tag = stage.ns.name();
    let missing = format!("{registry}/berth/{tag}:1");
    for name in ["edited", "pushed"] {
        stage.apply(bot(name).image(&missing)).await;
    }
    for name in ["edited", "pushed"] {
        let waits = stage.says(name, Phase::BackOff, "ImageNotFound").await;
        assert_eq!(says(&waits, ConditionType::ImageReady), Some(("False", "ImageNotFound")), "{}", summary(&waits));
        assert!(message(&waits, ConditionType::Ready).contains(&missing), "{}", summary(&waits));
        assert!(stage.told_once(name, "ImageNotFound").await.contains(&missing));
        assert_eq!(status(&waits).restart_count, Some(0), "{}", summary(&waits));
    }
    let mended = stage.edited("edited", json!({"image": stage.cluster.image()}), Phase::Running).await;
    page(&mended).await;
    assert_eq!(status(&mended).image.as_ref().unwrap().reference, stage.cluster.image());
    assert_eq!(says(&mended, ConditionType::Reconciling), None);
    run(Command::new("images/demo-bot/push").arg(&missing));
    let mended = stage.ns.ready("pushed", SOON).await;
    page(&mended).await;
    // Each further try found the same, and nobody was told again.
    for name in ["edited", "pushed"] {
        stage.told_once(name, "ImageNotFound").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bot_whose_image_is_missing_is_stopped_paused_and_deleted_all_the_same() {
    let stage = Stage::set("nopull").await;
    let before = stage.warmed().await;
    let missing = format!("{}/berth/none:1", stage.cluster.env("BERTH_REGISTRY"));
    stage.apply(bot("web").image(&missing)).await;
    stage.says("web", Phase::BackOff, "ImageNotFound").await;
    let stopped = stage.edited("web", json!({"operatingMode": "Stopped"}), Phase::Stopped).await;
    assert_eq!(says(&stopped, ConditionType::Ready).unwrap().0, "True");
    stage.edit("web", json!({"operatingMode": "Running"})).await;
    stage.says("web", Phase::BackOff, "ImageNotFound").await;
    stage.ns.delete("web", SOON).await;
    stage.agent.nothing_left_since(&before, SOON).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_are_none_and_registries_that_are_away_are_told() {
    let stage = Stage::set("names").await;
    // What the API server's own rules let through, the agent refuses in words.
    for (name, image) in [("upper", "127.0.0.1:1/Upper/case:1"), ("tag", "example.com/bot:a b")] {
        match stage.ns.try_apply(bot(name).image(image).on(stage.agent.node())).await {
            Ok(_) => {
                let failed = stage.says(name, Phase::Failed, "InvalidImageName").await;
                assert_eq!(says(&failed, ConditionType::Stalled).unwrap().0, "True");
                assert!(message(&failed, ConditionType::Ready).contains("spec.image"), "{}", summary(&failed));
                stage.edited(name, json!({"image": stage.cluster.image()}), Phase::Running).await;
            }
            Err(kube::Error::Api(status)) => {
                assert_eq!(status.code, 422, "{status:?}");
                assert!(status.message.contains("spec.image"), "{status:?}");
            }
            Err(other) => panic!("{other}"),
        }
    }
    // Nobody listens on port 1.
    stage.apply(bot("away").image("127.0.0.1:1/berth/bot:1")).await;
    let waits = stage.says("away", Phase::BackOff, "RegistryUnavailable").await;
    assert_eq!(says(&waits, ConditionType::ImageReady).unwrap(), ("False", "RegistryUnavailable"));
}

#[tokio::test(flavor = "multi_thread")]
async fn never_pulling_means_never_until_the_image_is_there() {
    let stage = Stage::set("never").await;
    let never = || bot("web").with(|spec| spec.image_pull_policy = Some(ImagePullPolicy::Never));
    stage.apply(never()).await;
    let waits = stage.says("web", Phase::BackOff, "ErrImageNeverPull").await;
    assert_eq!(stage.agent.leaks().count("images"), 0, "{}", summary(&waits));
    // Another bot brings the image; this one goes on by itself.
    stage.runs(bot("other")).await;
    let web = stage.ns.ready("web", SOON).await;
    page(&web).await;
    // And with the image there, at once.
    stage.runs(bot("third").with(|spec| spec.image_pull_policy = Some(ImagePullPolicy::Never))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_found_by_its_digest_as_well() {
    let stage = Stage::set("digest").await;
    let first = stage.runs(bot("first")).await;
    let digest = status(&first).image.as_ref().unwrap().digest.clone().unwrap();
    let by_digest = format!("{}/berth/demo-bot@{digest}", stage.cluster.env("BERTH_REGISTRY"));
    let second = stage.runs(bot("second").image(&by_digest)).await;
    assert_eq!(status(&second).image.as_ref().unwrap().digest.as_ref(), Some(&digest));
    page(&second).await;
}
