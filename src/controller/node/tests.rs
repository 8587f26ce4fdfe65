use std::time::{Duration, Instant};

use serde_json::json;

use super::*;

fn lease(renewed: i64, seconds: i32) -> Lease {
    serde_json::from_value(json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": "node-1"},
        "spec": {"leaseDurationSeconds": seconds, "renewTime": MicroTime(Timestamp::from_second(renewed).unwrap())},
    }))
    .unwrap()
}

use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;

fn bot_node(owned: bool) -> BotNode {
    let owners =
        if owned { json!([{"apiVersion": "v1", "kind": "Node", "name": "node-1", "uid": "n"}]) } else { json!([]) };
    serde_json::from_value(json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotNode",
        "metadata": {"name": "node-1", "uid": "b", "labels": {"of": "BotNode"}, "ownerReferences": owners},
        "spec": {}, "status": {"conditions": [{"type": "Ready", "status": "True", "reason": "AgentReady", "message": "",
            "lastTransitionTime": "2026-11-24T00:00:00Z"}]},
    }))
    .unwrap()
}

fn node(taint: Option<&str>, unschedulable: bool) -> Node {
    let taints: Vec<_> = taint.iter().map(|key| json!({"key": key, "effect": "NoExecute"})).collect();
    serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-1", "uid": "n", "labels": {"of": "Node"}},
        "spec": {"taints": taints, "unschedulable": unschedulable},
    }))
    .unwrap()
}

#[test]
fn a_lease_is_fresh_by_our_own_clock_whatever_the_time_in_it() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let mut beat = Heartbeat::new(start);
    // An old Lease after a restart of ours: one full duration.
    beat.observe(&lease(1000, 40), false, at(0));
    assert_eq!(beat.expires(), at(40));
    // Seen again unchanged (a relist): no renewal.
    beat.observe(&lease(1000, 40), false, at(30));
    assert_eq!(beat.expires(), at(40));
    // Renewed, with a clock that jumped back by years: a renewal all the same.
    beat.observe(&lease(10, 40), true, at(35));
    assert_eq!(beat.expires(), at(75));
    // Deleted: it does not live longer for that.
    beat.lease_deleted();
    assert_eq!(beat.expires(), at(75));
}

#[test]
fn lost_and_gone_need_a_lease_that_ran_out() {
    let start = Instant::now();
    let mut beat = Heartbeat::new(start);
    beat.observe(&lease(1000, 40), false, start);
    let later = start + Duration::from_secs(40);
    let judge = |bot_node: Option<&BotNode>, node: Option<&Node>, now| match state("node-1", bot_node, node, &beat, now)
    {
        NodeState::Alive => "alive",
        NodeState::Lost(why) => {
            assert!(why.contains("node-1") && why.contains("1970-01-01T00:16:40Z"), "{why}");
            "lost"
        }
        NodeState::Gone(_) => "gone",
    };
    let (owned, own, plain, out) =
        (bot_node(true), bot_node(false), node(None, false), node(Some(OUT_OF_SERVICE), false));
    for (bot_node, node, wanted) in [
        (Some(&owned), Some(&plain), "lost"),
        (Some(&owned), None, "gone"),
        (Some(&owned), Some(&out), "gone"),
        (Some(&own), None, "lost"), // never had a Node
        (Some(&own), Some(&plain), "lost"),
        (None, Some(&plain), "lost"), // the BotNode was deleted by hand
        (None, None, "gone"),         // it went with its Node
    ] {
        assert_eq!(judge(bot_node, node, start), "alive", "an agent that lives is never overruled");
        assert_eq!(judge(bot_node, node, later), wanted, "{bot_node:?} {node:?}");
    }
}

#[test]
fn a_candidate_has_labels_and_taints_of_its_node_and_its_reasons_are_stable() {
    let now = Instant::now();
    let wall = Timestamp::from_second(1000).unwrap();
    let mut beat = Heartbeat::new(now);
    let not_ready =
        |bot_node: &BotNode, beat: Option<&Heartbeat>, now| candidate(bot_node, None, beat, now, wall).not_ready;
    let ready = bot_node(true);
    assert_eq!(not_ready(&ready, None, now).as_deref(), Some("it has no Lease"));
    assert_eq!(not_ready(&ready, Some(&beat), now).as_deref(), Some("it has no Lease"));
    // First sight of a Lease that looks a day old: no bots until it is renewed before our eyes.
    beat.observe(&lease(1000 - 86400, 40), false, now);
    assert!(not_ready(&ready, Some(&beat), now).is_some());
    beat.observe(&lease(1001 - 86400, 40), true, now);
    assert_eq!(not_ready(&ready, Some(&beat), now), None, "a clock that is behind is no reason");
    let late = now + Duration::from_secs(40);
    assert!(not_ready(&ready, Some(&beat), late).unwrap().contains("last renewed at"));
    let mut stopping = ready.clone();
    let condition = &mut stopping.status.as_mut().unwrap().conditions[0];
    (condition.status, condition.reason) = ("False".to_owned(), "AgentStopping".to_owned());
    assert_eq!(not_ready(&stopping, Some(&beat), now).as_deref(), Some("Ready is False: AgentStopping"));

    let with = candidate(&ready, Some(&node(Some("t"), true)), Some(&beat), now, wall);
    assert_eq!(with.labels["of"], "Node");
    assert_eq!(with.taints.iter().map(|t| t.key.as_str()).collect::<Vec<_>>(), ["t", UNSCHEDULABLE]);
    assert_eq!(candidate(&ready, None, Some(&beat), now, wall).labels["of"], "BotNode");
}

#[test]
fn a_bot_node_is_owned_by_the_node_that_is_there_now() {
    assert_eq!(owners(&bot_node(true), Some(&node(None, false))), None);
    assert_eq!(owners(&bot_node(false), None), None);
    let mut again = node(None, false);
    again.metadata.uid = Some("n2".to_owned());
    let all = owners(&bot_node(true), Some(&again)).unwrap();
    assert_eq!(all.iter().map(|o| o.uid.as_str()).collect::<Vec<_>>(), ["n2"]);
}
