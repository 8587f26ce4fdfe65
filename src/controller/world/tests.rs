use proptest::prelude::*;
use serde_json::json;

use super::*;

fn name(name: &str) -> Name {
    Name { namespace: "team-a".to_owned(), name: name.to_owned() }
}

fn bot(name: &str, uid: &str, version: u32, node: Option<&str>) -> BotContainer {
    serde_json::from_value(json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
        "metadata": {"name": name, "namespace": "team-a", "uid": uid, "resourceVersion": version.to_string(),
            "creationTimestamp": format!("2026-11-24T00:00:{:02}Z", version % 60)},
        "spec": {"image": "busybox", "resources": {"requests": {"cpu": "1"}}}, "status": {"nodeName": node},
    }))
    .unwrap()
}

fn with_node(world: &mut World, node: &str, cpu: u32, now: Instant) {
    let lease = json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": node},
        "spec": {"leaseDurationSeconds": 40, "renewTime": "2026-11-24T00:00:00.000000Z"}});
    let _ = world.saw_lease(serde_json::from_value(lease).unwrap(), true, now);
    let body = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotNode",
        "metadata": {"name": node, "uid": node, "resourceVersion": "1"}, "spec": {},
        "status": {"allocatable": {"cpu": cpu.to_string(), "memory": "1Gi", "bots": "100"}, "conditions": [{"type": "Ready",
            "status": "True", "reason": "AgentReady", "message": "", "lastTransitionTime": "2026-11-24T00:00:00Z"}]}});
    let _ = world.saw_bot_node(serde_json::from_value(body).unwrap(), now);
}

#[test]
fn an_older_version_never_replaces_a_newer_one() {
    let (mut world, now) = (World::default(), Instant::now());
    assert!(!world.saw_bot(bot("web", "u1", 5, Some("node-1")), now).is_empty());
    assert!(world.saw_bot(bot("web", "u1", 4, None), now).is_empty());
    assert!(world.saw_bot(bot("web", "u1", 5, None), now).is_empty());
    assert_eq!(world.bots.get(&name("web")).and_then(|b| bound_to(b)), Some("node-1"));
    // Deleted and made again under the same name is another bot, and the end of the first comes late.
    assert!(!world.saw_bot(bot("web", "u2", 9, None), now).is_empty());
    assert!(world.bot_gone(&name("web"), Some("u1"), now).is_empty());
    assert!(world.saw_bot(bot("web", "u1", 6, Some("node-1")), now).is_empty());
    assert_eq!(world.load.get("node-1"), None, "the first one's seat was given back");
}

#[test]
fn what_was_decided_counts_before_it_is_seen_and_the_oldest_goes_first() {
    let (mut world, now) = (World::default(), Instant::now());
    for (n, version) in [("young", 30), ("old", 10), ("middle", 20)] {
        let _ = world.saw_bot(bot(n, n, version, None), now);
    }
    with_node(&mut world, "node-1", 2, now);
    let order = world.place_waiting(now);
    assert_eq!(order, ["old", "middle", "young"].map(|n| Key::Bot(name(n))));
    assert_eq!(world.reserved.keys().cloned().collect::<BTreeSet<_>>(), BTreeSet::from([name("old"), name("middle")]));
    let young = world.bots[&name("young")].clone();
    let said = world.place(&name("young"), &young, None, now).unwrap_err();
    assert_eq!(said, "0/1 nodes fit: node-1: insufficient cpu (asks 1, free 0)");
    // Seen at last: counted once.
    let _ = world.saw_bot(bot("old", "old", 40, Some("node-1")), now);
    assert_eq!(world.load["node-1"].bots, 2);
    let keys = world.bot_gone(&name("old"), Some("old"), now);
    assert!(keys.contains(&Key::Pending), "who waits for room is woken");
    assert_eq!(world.place(&name("young"), &young, None, now).as_deref(), Ok("node-1"));
}

#[test]
fn a_node_whose_lease_ran_out_takes_no_bots_even_before_its_timer() {
    let (mut world, now) = (World::default(), Instant::now());
    with_node(&mut world, "node-1", 2, now);
    let _ = world.saw_bot(bot("web", "u", 1, None), now);
    let web = world.bots[&name("web")].clone();
    assert!(world.place(&name("web"), &web, None, now).is_ok());
    let said = world.place(&name("web"), &web, None, now + Duration::from_secs(40)).unwrap_err();
    assert!(said.contains("last renewed at"), "{said}");
}

proptest! {
    /// The accounts are those of the objects, whatever order things are seen in.
    #[test]
    fn load_is_the_sum_of_what_is_bound(
        steps in proptest::collection::vec((0usize..6, 0usize..4), 1..60),
    ) {
        let (mut world, now) = (World::default(), Instant::now());
        let mut truth: BTreeMap<String, Option<String>> = BTreeMap::new();
        for (version, (which, what)) in steps.into_iter().enumerate() {
            let n = format!("b{which}");
            if what == 3 {
                let _ = world.bot_gone(&name(&n), None, now);
                truth.remove(&n);
            } else {
                let node = (what > 0).then(|| format!("node-{what}"));
                let _ = world.saw_bot(bot(&n, &n, version as u32 + 1, node.as_deref()), now);
                truth.insert(n, node);
            }
        }
        for node in ["node-1", "node-2"] {
            let wanted = truth.values().filter(|n| n.as_deref() == Some(node)).count() as i128;
            let has = world.load.get(node).copied().unwrap_or_default();
            prop_assert_eq!((has.bots, has.cpu_milli), (wanted, wanted * 1000));
        }
        prop_assert_eq!(world.unbound.len(), truth.values().filter(|n| n.is_none()).count());
    }
}
