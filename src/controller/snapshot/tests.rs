use serde_json::{Value, json};

use super::*;

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(1_790_000_000 + second).unwrap()
}

fn snapshot(change: impl FnOnce(&mut Value)) -> BotSnapshot {
    let mut body = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotSnapshot",
        "metadata": {"name": "before", "namespace": "team-a", "uid": "su", "creationTimestamp": at(0).to_string()},
        "spec": {"botContainerName": "web", "failureDeadlineSeconds": 60},
    });
    change(&mut body);
    serde_json::from_value(body).unwrap()
}

fn web(change: impl FnOnce(&mut Value)) -> BotContainer {
    let mut body = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
        "metadata": {"name": "web", "namespace": "team-a", "uid": "u"},
        "spec": {"image": "busybox"}, "status": {"nodeName": "node-1"},
    });
    change(&mut body);
    serde_json::from_value(body).unwrap()
}

fn deleted(body: &mut Value) {
    body["metadata"]["deletionTimestamp"] = json!(at(5).to_string());
}

fn mine() -> Option<Hold> {
    Some(Hold::Mine(Some("node-1".to_owned())))
}

#[test]
fn a_snapshot_is_given_its_version_once_its_bot_is_placed() {
    let (new, bot) = (snapshot(|_| {}), web(|_| {}));
    let view = |bot, hold| View { snapshot: &new, bot, hold, node: None, adopts: None };
    let given = Plan::Give { node: "node-1".to_owned(), source: SnapshotSource::Manual };
    assert_eq!(decide(&view(Some(&bot), mine()), at(1)), given);

    // What it waits for, and what it fails of when its deadline is over.
    let unplaced = web(|body| body["status"] = json!({}));
    for (bot, hold, reason, over) in [
        (None, None, Reason::BotNotFound, Reason::BotNotFound),
        (Some(&unplaced), Some(Hold::None), Reason::WaitingForBot, Reason::DeadlineExceeded),
        (Some(&bot), Some(Hold::Other("x".to_owned())), Reason::WaitingForBot, Reason::DeadlineExceeded),
    ] {
        let Plan::Wait { reason: said, until, .. } = decide(&view(bot, hold.clone()), at(59)) else { panic!() };
        assert_eq!((said, until), (reason, at(60)));
        let Plan::Fail { reason: said, message } = decide(&view(bot, hold), at(60)) else { panic!() };
        assert_eq!(said, over);
        assert!(message.contains("web") && message.contains("failureDeadlineSeconds (60)"), "{message}");
    }
    let dying = web(deleted);
    let Plan::Fail { reason, .. } = decide(&view(Some(&dying), mine()), at(1)) else { panic!() };
    assert_eq!(reason, Reason::BotTerminating);
}

#[test]
fn a_snapshot_that_has_its_version_or_failed_is_left_to_its_agent() {
    let bot = web(|_| {});
    for status in [json!({"version": 3, "nodeName": "node-1"}), json!({"phase": "Failed"})] {
        let told = snapshot(|body| body["status"] = status);
        let view = View { snapshot: &told, bot: Some(&bot), hold: mine(), node: None, adopts: None };
        assert_eq!(decide(&view, at(100)), Plan::Rest);
    }
}

#[test]
fn of_a_snapshot_on_a_node_that_is_away_nothing_is_claimed_and_its_deadline_ends_it() {
    let bot = web(|_| {});
    let lost = || Some(NodeState::Lost("the agent of node-1 can't be reached".to_owned()));
    let plan = |snapshot: &BotSnapshot, node, now| {
        decide(&View { snapshot, bot: Some(&bot), hold: mine(), node, adopts: None }, at(now))
    };
    // Not given yet: nobody is there to take it.
    let new = snapshot(|_| {});
    assert!(matches!(plan(&new, lost(), 59), Plan::Wait { reason: Reason::NodeUnreachable, .. }));
    assert!(matches!(plan(&new, lost(), 60), Plan::Fail { reason: Reason::DeadlineExceeded, .. }));
    let given = |source: &str, phase: &str| {
        let status = json!({"version": 3, "nodeName": "node-1", "phase": phase, "source": source});
        snapshot(|body| body["status"] = status)
    };
    for phase in ["Pending", "Copying", "Committing"] {
        let Plan::Unknown { reason, until, message } = plan(&given("Manual", phase), lost(), 59) else { panic!() };
        assert_eq!((reason, until), (Reason::NodeUnreachable, Some(at(60))), "{message}");
        let Plan::Fail { reason, message } = plan(&given("Manual", phase), lost(), 60) else { panic!("{phase}") };
        assert!(reason == Reason::DeadlineExceeded && message.contains("can't be reached"), "{message}");
        assert_eq!(plan(&given("Manual", phase), Some(NodeState::Alive), 99), Plan::Rest, "its agent ends it");
        // What is a bot's last version, or what a rollback replaced, is not given up.
        let kept = plan(&given("Preserved", phase), lost(), 99);
        assert!(matches!(kept, Plan::Unknown { .. }), "{kept:?}");
    }
    assert!(matches!(plan(&given("Manual", "Ready"), lost(), 99), Plan::Unknown { until: None, .. }));
    let gone = Some(NodeState::Gone("node-1 was deleted".to_owned()));
    assert!(matches!(plan(&given("Manual", "Ready"), gone, 99), Plan::Unknown { reason: Reason::NodeGone, .. }));
    assert_eq!(plan(&given("Manual", "Failed"), lost(), 99), Plan::Rest, "that is so, wherever its node is");
}

#[test]
fn a_deleted_snapshot_is_let_go_when_nothing_of_it_is_left() {
    let held = |change: fn(&mut Value)| {
        snapshot(|body| {
            deleted(body);
            body["metadata"]["finalizers"] = json!([SNAPSHOT_FINALIZER]);
            change(body);
        })
    };
    let plan =
        |snapshot: &BotSnapshot, node| decide(&View { snapshot, bot: None, hold: None, node, adopts: None }, at(9));
    let bound = held(|body| body["status"] = json!({"version": 1, "nodeName": "node-1"}));
    assert_eq!(plan(&held(|_| {}), None), Plan::LetGo { lost: None }, "it never had a node");
    assert_eq!(plan(&bound, Some(NodeState::Alive)), Plan::Rest);
    assert_eq!(plan(&bound, Some(NodeState::Lost("away".to_owned()))), Plan::Rest);
    let gone = || Some(NodeState::Gone("node-1 is gone".to_owned()));
    assert_eq!(plan(&bound, gone()), Plan::LetGo { lost: Some("node-1 is gone".to_owned()) });
    let removed = held(|body| {
        body["status"] = json!({"version": 1, "nodeName": "node-1", "conditions": [{"type": "Ready", "status": "False",
            "reason": "Removed", "message": "", "lastTransitionTime": at(6).to_string()}]});
    });
    assert_eq!(plan(&removed, Some(NodeState::Alive)), Plan::LetGo { lost: None });
    assert_eq!(plan(&snapshot(deleted), gone()), Plan::Rest, "without our finalizer it is not ours to let go");
}

#[test]
fn a_version_is_given_once_and_without_gaps() {
    let record = |last_version, given: Option<&str>| {
        let last_given = given.map(|uid| Given { name: "s".to_owned(), uid: uid.to_owned() });
        let spec = crate::api::BotRecordSpec { bot_id: "u".into(), last_version, last_given, ..Default::default() };
        BotRecord::new("u", spec)
    };
    assert_eq!(number(&record(0, None), "me", 0, false), Number::Gets(1));
    assert_eq!(number(&record(4, Some("other")), "me", 0, false), Number::Gets(5));
    assert_eq!(number(&record(4, Some("other")), "me", 9, false), Number::Gets(10), "the record came from a backup");
    // Cut off between the two writes, by us or another.
    assert_eq!(number(&record(4, Some("me")), "me", 9, false), Number::Has(4));
    let other = Given { name: "s".to_owned(), uid: "other".to_owned() };
    assert_eq!(number(&record(4, Some("other")), "me", 0, true), Number::After(other));
}

#[test]
fn what_the_controller_made_is_told_by_its_name() {
    let bot = web(|_| {});
    let cause = Cause::Rollback("monday".to_owned());
    let named =
        |bot: &BotContainer, source, cause: &str| automatic_name(&bot.name_any(), &bot.uid().unwrap(), source, cause);
    let name = named(&bot, cause.source(), &cause.words());
    assert_eq!(name, named(&bot, cause.source(), "monday"));
    assert!(name.starts_with("web-rollback-") && name.len() == "web-rollback-".len() + 10, "{name}");
    assert_ne!(name, named(&bot, cause.source(), "tuesday"));
    let other = web(|body| body["metadata"]["uid"] = json!("u2"));
    assert_ne!(name, named(&other, cause.source(), "monday"), "the same name later is another bot");

    let made = |name: &str, label: &str, cause: &str| {
        snapshot(|body| {
            body["metadata"]["name"] = json!(name);
            body["metadata"]["labels"] = json!({SOURCE_LABEL: label});
            body["metadata"]["annotations"] = json!({CAUSE: cause});
        })
    };
    assert_eq!(source(&made(&name, "Rollback", "monday"), &bot), SnapshotSource::Rollback);
    // A label alone says nothing: retention would remove what somebody made by hand.
    for (name, label, cause) in [
        ("mine", "Scheduled", ""),
        (name.as_str(), "Scheduled", "monday"),
        (&name, "Rollback", "x"),
        (&name, "?", "monday"),
    ] {
        assert_eq!(source(&made(name, label, cause), &bot), SnapshotSource::Manual, "{name} {label} {cause}");
    }
    let long = web(|body| body["metadata"]["name"] = json!("w".repeat(253)));
    assert!(named(&long, SnapshotSource::PreImageChange, "").len() <= 253);
}

#[test]
fn the_newest_version_is_what_a_bot_goes_on_from() {
    let kept = |name: &str, version: i64, phase: &str| {
        snapshot(|body| {
            body["metadata"]["name"] = json!(name);
            body["status"] = json!({"version": version, "phase": phase, "botId": "b", "nodeName": "node-1"});
        })
    };
    let from = |restore| match restore {
        Restore::From { from, node } => (from.snapshot_name, from.version, node),
        other => panic!("{other:?}"),
    };
    let all = [kept("a", 1, "Ready"), kept("c", 3, "Ready"), kept("b", 2, "Ready"), kept("d", 4, "Failed")];
    assert_eq!(from(newest(&all)), ("c".to_owned(), 3, "node-1".to_owned()));
    assert_eq!(newest(&[] as &[BotSnapshot]), Restore::Nothing);
    assert_eq!(newest(&all[3..]), Restore::Nothing);
    let unfinished = [kept("a", 1, "Ready"), kept("e", 5, "Committing")];
    let Restore::Wait { reason, message } = newest(&unfinished) else { panic!("older data in its place") };
    assert_eq!((reason, message.as_str()), (Reason::RestoreWaiting, "the BotSnapshot e is not Ready yet: Committing"));
    let going = snapshot(|body| {
        body["status"] = json!({"version": 1, "phase": "Ready", "botId": "b", "nodeName": "node-1"});
        deleted(body);
    });
    for (snapshot, words) in
        [(None, "there is no BotSnapshot"), (Some(&going), "being deleted"), (Some(&all[3]), "failed")]
    {
        let Restore::Wait { reason, message } = usable("x", snapshot) else { panic!() };
        assert!(reason == Reason::RestoreFailed && message.contains(words), "{message}");
    }
}

#[test]
fn what_an_agent_waits_for_is_read_from_spec_and_status() {
    let waiting = |change: &dyn Fn(&mut Value)| {
        web(|body| {
            body["status"] = json!({
                "nodeName": "node-1", "image": {"reference": "docker.io/library/busybox:latest"},
                "lineage": [{"name": "berth-u.1", "kind": "Active"}],
                "conditions": [{"type": "Ready", "status": "False", "reason": "WaitingForSnapshot", "message": "",
                    "lastTransitionTime": at(1).to_string()}],
            });
            change(body);
        })
    };
    let awaited = |change: &dyn Fn(&mut Value)| Cause::awaited(&waiting(change));
    assert_eq!(awaited(&|_| {}), None, "nothing asks for one");
    let asks =
        |body: &mut Value| body["spec"]["rollback"] = json!({"id": "monday", "toVersion": 1, "keepReplaced": true});
    assert_eq!(awaited(&asks), Some(Cause::Rollback("monday".to_owned())));
    let done = |body: &mut Value| {
        asks(body);
        body["status"]["rollback"] = json!({"id": "monday"});
    };
    assert_eq!(awaited(&done), None);
    let moves = |body: &mut Value| body["spec"]["image"] = json!("busybox:2");
    let change = Cause::ImageChange { image: "busybox:2".to_owned(), layer: "berth-u.1".to_owned() };
    assert_eq!(awaited(&moves), Some(change));
    let retained = |body: &mut Value| {
        deleted(body);
        body["spec"]["deletionPolicy"] = json!("Retain");
    };
    assert_eq!(awaited(&retained), Some(Cause::Preserved));
    assert_eq!(awaited(&deleted), None);
    let busy = |body: &mut Value| {
        asks(body);
        body["status"]["conditions"][0]["reason"] = json!("StoppedForSnapshot");
    };
    assert_eq!(awaited(&busy), None, "it is stopped for one that is there");
}
