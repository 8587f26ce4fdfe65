use k8s_openapi::jiff::Timestamp;
use proptest::prelude::*;

use super::*;

fn time(seconds: i64) -> Time {
    Time(Timestamp::from_second(seconds).unwrap())
}

fn bot() -> BotContainer {
    serde_json::from_value(json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
        "metadata": {"name": "web", "namespace": "team-a", "uid": "u", "resourceVersion": "7", "generation": 3},
        "spec": {"image": "busybox"},
    }))
    .unwrap()
}

/// What the API server makes of an apply, as far as values go: what is applied is set, what was ours and is left out
/// goes, the rest stays.
fn applied(mut bot: BotContainer, before: Option<&Value>, body: &Value) -> BotContainer {
    let mut status = serde_json::to_value(bot.status.take().unwrap_or_default()).unwrap();
    let ours = |value: Option<&Value>| value.map(|v| v["status"].clone()).unwrap_or(json!({}));
    let (old, new) = (ours(before), ours(Some(body)));
    for key in old.as_object().unwrap().keys().filter(|k| *k != "conditions") {
        status.as_object_mut().unwrap().remove(key);
    }
    for (key, value) in new.as_object().unwrap().iter().filter(|(k, _)| *k != "conditions") {
        status[key] = value.clone();
    }
    let list = |v: &Value| v["conditions"].as_array().cloned().unwrap_or_default();
    let mut conditions = list(&status);
    conditions.retain(|c| ![list(&old), list(&new)].iter().flatten().any(|o| o["type"] == c["type"]));
    conditions.extend(list(&new));
    status["conditions"] = json!(conditions);
    bot.status = serde_json::from_value(status).unwrap();
    bot
}

fn pending(message: &str) -> Wanted {
    Wanted::Pending { reason: Reason::Unschedulable, message: message.to_owned() }
}

fn bound(claim: Claim) -> Wanted {
    Wanted::Bound {
        node: "node-1".to_owned(),
        bot_id: "u".to_owned(),
        claim,
        restored_from: None,
        last_version: 0,
        orphaned: false,
    }
}

fn unknown() -> Claim {
    Claim::Unknown { reason: Reason::NodeUnreachable, message: "since noon".to_owned() }
}

fn words(body: &Value) -> Vec<String> {
    let list = body["status"]["conditions"].as_array().unwrap();
    list.iter().map(|c| format!("{}={} {}", c["type"], c["status"], c["reason"]).replace('"', "")).collect()
}

#[test]
fn a_patch_carries_its_preconditions_and_what_kstatus_wants() {
    let body = patch(&bot(), &pending("no node"), &time(1)).unwrap();
    assert_eq!(body["metadata"], json!({"name": "web", "namespace": "team-a", "uid": "u", "resourceVersion": "7"}));
    assert_eq!(body["status"]["phase"], "Pending");
    assert_eq!(body["status"]["observedGeneration"], 3);
    let wanted = ["Ready=False Unschedulable", "Scheduled=False Unschedulable", "Reconciling=True Unschedulable"];
    assert_eq!(words(&body), wanted);
}

#[test]
fn binding_says_where_and_leaves_the_rest_to_the_agent() {
    let body = patch(&bot(), &bound(Claim::Keep), &time(1)).unwrap();
    assert_eq!(body["status"]["nodeName"], "node-1");
    assert_eq!(body["status"].as_object().unwrap().keys().collect::<Vec<_>>(), ["botId", "conditions", "nodeName"]);
    assert_eq!(words(&body), ["Scheduled=True Scheduled"]);
}

#[test]
fn a_condition_keeps_its_time_while_its_status_stays() {
    let first = patch(&bot(), &pending("a"), &time(1)).unwrap();
    let live = applied(bot(), None, &first);
    let second = patch(&live, &pending("b"), &time(2)).unwrap();
    assert_eq!(second["status"]["conditions"][0]["lastTransitionTime"], "1970-01-01T00:00:01Z");
    let third = patch(&applied(live, Some(&first), &second), &bound(Claim::Keep), &time(3)).unwrap();
    assert_eq!(third["status"]["conditions"][0]["lastTransitionTime"], "1970-01-01T00:00:03Z");
}

#[test]
fn a_claim_stands_until_the_agent_takes_it_back_entry_by_entry() {
    let bind = patch(&bot(), &bound(Claim::Keep), &time(1)).unwrap();
    let live = applied(bot(), None, &bind);
    let claim = patch(&live, &bound(unknown()), &time(2)).unwrap();
    let wanted = ["Scheduled=True Scheduled", "Ready=Unknown NodeUnreachable", "Running=Unknown NodeUnreachable"];
    assert_eq!((words(&claim), &claim["status"]["phase"]), (wanted.map(str::to_owned).to_vec(), &json!("Unknown")));
    let mut live = applied(live, Some(&bind), &claim);
    assert!(claimed(&live));
    assert_eq!(patch(&live, &bound(Claim::Keep), &time(3)), None, "the Lease is fresh: nothing new is said");

    // Should something else have to be written before the agent is back, the claim is repeated, not left out.
    live.status.as_mut().unwrap().bot_id = None;
    let again = patch(&live, &bound(Claim::Keep), &time(4)).unwrap();
    assert_eq!(words(&again), wanted);

    // The agent has taken back Ready and phase, not yet Running: only that is repeated.
    let status = live.status.as_mut().unwrap();
    status.phase = Some(Phase::Running);
    for c in status.conditions.iter_mut().filter(|c| c.type_ == "Ready") {
        (c.status, c.reason) = ("True".to_owned(), "AsAsked".to_owned());
    }
    let again = patch(&live, &bound(Claim::Keep), &time(5)).unwrap();
    assert_eq!(words(&again), ["Scheduled=True Scheduled", "Running=Unknown NodeUnreachable"]);
    assert_eq!(again["status"].get("phase"), None);
}

proptest! {
    /// What was just written is not written again, whatever was there before and whatever the time is.
    #[test]
    fn no_difference_no_write(steps in proptest::collection::vec(0u8..5, 1..8), t in 0i64..100) {
        let (mut live, mut before) = (bot(), None);
        for step in steps {
            let wanted = match step {
                0 => pending("a"),
                1 => pending("b"),
                2 => bound(Claim::Keep),
                3 => bound(unknown()),
                _ => bound(Claim::Unknown { reason: Reason::NodeGone, message: "gone".to_owned() }),
            };
            if let Some(body) = patch(&live, &wanted, &time(t)) {
                live = applied(live, before.as_ref(), &body);
                before = Some(body);
            }
            prop_assert_eq!(patch(&live, &wanted, &time(t + 1)), None);
        }
    }
}
