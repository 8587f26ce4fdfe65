use serde_json::{Value, json};

use super::*;

fn bot(change: impl FnOnce(&mut Value)) -> BotContainer {
    let mut body = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
        "metadata": {"name": "web", "namespace": "team-a", "uid": "u"},
        "spec": {"image": "busybox", "botId": "the-bot"},
    });
    change(&mut body);
    serde_json::from_value(body).unwrap()
}

fn held(body: &mut Value) {
    body["metadata"]["finalizers"] = json!(["other/one", FINALIZER]);
}

fn on_1(body: &mut Value) {
    held(body);
    body["status"] = json!({"nodeName": "node-1"});
}

fn deleted(body: &mut Value) {
    body["metadata"]["deletionTimestamp"] = json!("2026-11-24T00:00:00Z");
}

fn removed(body: &mut Value) {
    body["status"]["conditions"] = json!([{"type": "Running", "status": "False", "reason": "Removed", "message": "",
        "lastTransitionTime": "2026-11-24T00:00:00Z"}]);
}

fn view(bot: &BotContainer, hold: Hold, home: Option<NodeState>) -> View<'_> {
    View { bot, hold, home, restore: Restore::Nothing, rolled_back: None }
}

/// Decides with a placement that gives node-2, or the node of the layer.
fn plan(bot: &BotContainer, hold: Hold, home: Option<NodeState>) -> Plan {
    decide(&view(bot, hold, home), |layer| Ok(layer.unwrap_or("node-2").to_owned()))
}

fn mine(node: &str) -> Hold {
    Hold::Mine(Some(node.to_owned()))
}

fn free(node: &str) -> Hold {
    Hold::Free(Some(node.to_owned()))
}

fn place(node: &str, take: bool, finalizer: bool) -> Plan {
    Plan::Place { node: node.to_owned(), take, finalizer, beside: false, restore: None }
}

fn keep(take: bool, finalizer: bool, claim: Claim) -> Plan {
    Plan::Keep { node: "node-1".to_owned(), take, finalizer, claim }
}

fn lost() -> Option<NodeState> {
    Some(NodeState::Lost("lost".to_owned()))
}

fn gone() -> Option<NodeState> {
    Some(NodeState::Gone("gone".to_owned()))
}

fn unknown(reason: Reason, message: &str) -> Claim {
    Claim::Unknown { reason, message: message.to_owned() }
}

#[test]
fn an_unbound_bot_is_placed_where_it_fits_or_where_its_layer_is() {
    let new = bot(|_| {});
    assert_eq!(plan(&new, Hold::None, None), place("node-2", true, true));
    assert_eq!(plan(&bot(held), Hold::None, None), place("node-2", true, false));
    assert_eq!(plan(&new, Hold::Free(None), None), place("node-2", true, true));
    assert_eq!(plan(&new, free("node-1"), lost()), place("node-1", true, true), "the layer of the same botId");
    assert_eq!(plan(&new, free("node-1"), gone()), place("node-2", true, true), "what is lost holds nobody back");
    assert_eq!(plan(&new, mine("node-1"), lost()), place("node-1", false, true), "its own, whatever the node is like");
}

#[test]
fn an_unbound_bot_that_can_not_be_placed_says_why() {
    let new = bot(|_| {});
    let Plan::Wait { reason, message } = plan(&new, Hold::Other("old".to_owned()), None) else { panic!() };
    assert_eq!(reason, Reason::BotIdInUse);
    assert!(message.contains("the-bot") && message.contains("BotContainer old"), "{message}");
    let full = |hold| decide(&view(&new, hold, None), |_| Err("0/1 nodes fit".to_owned()));
    let wait = |message: &str| Plan::Wait { reason: Reason::Unschedulable, message: message.to_owned() };
    assert_eq!(full(Hold::None), wait("0/1 nodes fit"));
    assert_eq!(full(free("node-1")), wait("the layer of botId the-bot is on node-1: 0/1 nodes fit"));
}

#[test]
fn a_bound_bot_is_kept_right_and_never_moved() {
    let bound = bot(on_1);
    let alive = Some(NodeState::Alive);
    assert_eq!(plan(&bound, mine("node-1"), alive.clone()), keep(false, false, Claim::Keep));
    assert_eq!(plan(&bound, mine("node-2"), alive.clone()), keep(true, false, Claim::Keep));
    assert_eq!(plan(&bound, Hold::None, alive.clone()), keep(true, false, Claim::Keep));
    assert_eq!(plan(&bound, free("node-2"), alive.clone()), keep(true, false, Claim::Keep));
    assert_eq!(plan(&bound, Hold::Other("old".to_owned()), alive.clone()), keep(false, false, Claim::Keep));
    let stripped = bot(|b| b["status"] = json!({"nodeName": "node-1"}));
    assert_eq!(plan(&stripped, mine("node-1"), alive), keep(false, true, Claim::Keep));
    let claim = unknown(Reason::NodeUnreachable, "lost");
    assert_eq!(plan(&bound, mine("node-1"), lost()), keep(false, false, claim));
    let claim = unknown(Reason::NodeGone, "gone");
    assert_eq!(plan(&bound, mine("node-1"), gone()), keep(false, false, claim));
    assert_eq!(
        plan(
            &bot(|b| {
                on_1(b);
                removed(b)
            }),
            mine("node-1"),
            Some(NodeState::Alive)
        ),
        keep(false, false, Claim::Keep),
        "Removed means something only to a bot that is being deleted"
    );
}

#[test]
fn a_deleted_bot_is_let_go_when_its_node_has_nothing_of_it() {
    let (release, lost_words) = (true, |words: &str| Some(words.to_owned()));
    let unbound = bot(|b| {
        held(b);
        deleted(b)
    });
    let bound = bot(|b| {
        on_1(b);
        deleted(b)
    });
    let done = bot(|b| {
        on_1(b);
        deleted(b);
        removed(b)
    });
    let never = bot(deleted);
    let alive = Some(NodeState::Alive);
    assert_eq!(plan(&never, Hold::None, None), Plan::Rest, "others hold it");
    assert_eq!(plan(&unbound, Hold::None, None), Plan::LetGo { release: false, lost: None });
    assert_eq!(plan(&unbound, Hold::Other("x".to_owned()), None), Plan::LetGo { release: false, lost: None });
    assert_eq!(plan(&unbound, mine("node-1"), alive.clone()), keep(false, false, Claim::Keep), "its status was lost");
    assert_eq!(plan(&bound, mine("node-1"), alive), keep(false, false, Claim::Keep));
    let claim = unknown(Reason::NodeUnreachable, "lost");
    assert_eq!(plan(&bound, mine("node-1"), lost()), keep(false, false, claim), "lost is not gone");
    assert_eq!(plan(&bound, mine("node-1"), gone()), Plan::LetGo { release, lost: lost_words("gone") });
    assert_eq!(plan(&done, mine("node-1"), lost()), Plan::LetGo { release, lost: None });
    assert_eq!(plan(&done, Hold::None, gone()), Plan::LetGo { release: false, lost: None }, "cut off half-way");
}

/// Where another may hold the botId the record is the lock, and where the finalizer is missing a deletion would pass the bind by.
#[test]
fn a_bot_of_its_own_uid_is_bound_beside_its_record() {
    let own = |change: fn(&mut Value)| {
        bot(|body| {
            change(body);
            body["spec"]["botId"] = json!(null);
        })
    };
    let beside = |hold| match plan(&own(held), hold, None) {
        Plan::Place { beside, take, .. } => (beside, take),
        other => panic!("{other:?}"),
    };
    assert_eq!(beside(Hold::None), (true, true));
    assert_eq!(beside(Hold::Free(None)), (false, true), "a record that is there may be changed by others");
    assert_eq!(beside(mine("node-1")), (false, false), "a pass that was cut off");
    assert_eq!(plan(&own(|_| {}), Hold::None, None), place("node-2", true, true), "no finalizer yet");
    assert_eq!(plan(&bot(held), Hold::None, None), place("node-2", true, false), "a botId that another may have");
}

#[test]
fn a_bot_is_placed_where_the_version_is_that_it_starts_from() {
    let (new, from) = (
        bot(|_| {}),
        RestoredFrom { snapshot_name: "s".to_owned(), uid: "su".to_owned(), bot_id: "the-bot".to_owned(), version: 3 },
    );
    let there = Restore::From { from: from.clone(), node: "node-7".to_owned() };
    let decided =
        |hold, restore| decide(&View { restore, ..view(&new, hold, None) }, |at| Ok(at.unwrap_or("node-2").to_owned()));
    let placed = |node: &str, take, restore| {
        let node = node.to_owned();
        Plan::Place { node, take, finalizer: true, beside: false, restore }
    };
    assert_eq!(decided(Hold::None, there.clone()), placed("node-7", true, Some(from.clone())));
    assert_eq!(decided(free("node-1"), there.clone()), placed("node-7", true, Some(from.clone())));
    assert_eq!(decided(mine("node-7"), there.clone()), placed("node-7", false, Some(from)), "a pass that was cut off");
    assert_eq!(decided(mine("node-1"), there), placed("node-1", false, None), "it has a layer of its own");
    let wait = Restore::Wait { reason: Reason::RestoreWaiting, message: "not yet".to_owned() };
    let waits = Plan::Wait { reason: Reason::RestoreWaiting, message: "not yet".to_owned() };
    assert_eq!(decided(Hold::None, wait.clone()), waits, "never without its data");
    assert_eq!(decided(Hold::Other("old".to_owned()), wait), {
        let message = "botId the-bot is held by BotContainer old; this one goes on when that is gone".to_owned();
        Plan::Wait { reason: Reason::BotIdInUse, message }
    });
}

#[test]
fn a_rollback_that_was_done_is_noted_in_the_record() {
    let done = bot(|body| {
        on_1(body);
        body["status"]["rollback"] = json!({"id": "monday"});
    });
    let noted = |rolled_back| decide(&View { rolled_back, ..view(&done, mine("node-1"), None) }, |_| panic!());
    assert_eq!(noted(Some("monday")), keep(false, false, Claim::Keep));
    assert_eq!(noted(Some("sunday")), keep(true, false, Claim::Keep));
    assert_eq!(noted(None), keep(true, false, Claim::Keep));
}
