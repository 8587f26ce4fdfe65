use proptest::prelude::*;
use serde_json::json;

use super::*;

fn bot(spec: serde_json::Value) -> BotContainer {
    let mut all = json!({"image": "busybox"});
    all.as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
    serde_json::from_value(json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": "web"}, "spec": all,
    }))
    .unwrap()
}

fn node(name: &str) -> Candidate {
    Candidate {
        name: name.to_owned(),
        not_ready: None,
        cordoned: false,
        labels: BTreeMap::from([("zone".to_owned(), "a".to_owned())]),
        taints: Vec::new(),
        handlers: BTreeSet::from(["runc".to_owned()]),
        snapshotters: BTreeSet::from(["overlayfs".to_owned()]),
        allocatable: Ok(Amount { cpu_milli: 2000, memory: 1 << 30, bots: 10 }),
    }
}

fn taint(key: &str, value: &str, effect: &str) -> Taint {
    Taint { key: key.into(), value: Some(value.into()), effect: effect.into(), ..Taint::default() }
}

fn class() -> RuntimeClass {
    serde_json::from_value(json!({
        "apiVersion": "node.k8s.io/v1", "kind": "RuntimeClass", "metadata": {"name": "small"}, "handler": "runc",
        "overhead": {"podFixed": {"memory": "100Mi"}},
        "scheduling": {"nodeSelector": {"zone": "b"}, "tolerations": [{"key": "sandbox", "operator": "Exists"}]},
    }))
    .unwrap()
}

/// The words that one node is refused with; empty when it is taken.
fn why(spec: serde_json::Value, change: impl FnOnce(&mut Candidate), used: Amount) -> String {
    let bot = bot(spec);
    let class = bot.spec.runtime_class_name.as_ref().map(|_| class());
    let ask = Ask::new(&bot, class.as_ref()).unwrap();
    let mut node = node("node-1");
    change(&mut node);
    match place(&ask, [&node], &Load::from([("node-1".to_owned(), used)])) {
        Ok(_) => String::new(),
        Err(refusals) => refusals[0].1.to_string(),
    }
}

#[test]
fn each_rule_refuses_in_its_own_words() {
    let none = Amount::default();
    let same = |_: &mut Candidate| {};
    let tainted = |effect: &'static str| move |n: &mut Candidate| n.taints = vec![taint("only", "gpu", effect)];
    let limits = |cpu, memory| json!({"resources": {"limits": {"cpu": cpu, "memory": memory}}});
    assert_eq!(why(json!({}), same, none), "");
    assert_eq!(why(json!({"nodeName": "node-1"}), same, none), "");
    assert_eq!(why(json!({"nodeName": "node-2"}), same, none), "not the node asked for (node-2)");
    assert_eq!(why(json!({}), |n| n.not_ready = Some("it has no Lease".into()), none), "not ready (it has no Lease)");
    assert_eq!(why(json!({}), |n| n.cordoned = true, none), "BotNode is unschedulable");
    assert_eq!(why(json!({"nodeSelector": {"zone": "a"}}), same, none), "");
    assert_eq!(why(json!({"nodeSelector": {"zone": "b"}}), same, none), "label zone=a (asks b)");
    assert_eq!(why(json!({"nodeSelector": {"disk": "ssd"}}), same, none), "no label disk (asks ssd)");
    assert_eq!(why(json!({}), tainted("NoSchedule"), none), "taint only=gpu:NoSchedule");
    assert_eq!(why(json!({}), tainted("NoExecute"), none), "taint only=gpu:NoExecute");
    assert_eq!(why(json!({}), tainted("PreferNoSchedule"), none), "");
    assert_eq!(why(json!({"snapshotter": "zfs"}), same, none), "no snapshotter zfs (has overlayfs)");
    assert_eq!(why(limits("3", "1"), same, none), "insufficient cpu (asks 3, free 2)");
    assert_eq!(why(limits("1", "2Gi"), same, none), "insufficient memory (asks 2Gi, free 1Gi)");
    let half = Amount { cpu_milli: 1500, memory: 512 << 20, bots: 1 };
    assert_eq!(why(limits("1", "1"), same, half), "insufficient cpu (asks 1, free 500m)");
    assert_eq!(why(limits("0", "513Mi"), same, half), "insufficient memory (asks 513Mi, free 512Mi)");
    assert_eq!(why(limits("500m", "512Mi"), same, half), "");
    assert_eq!(why(json!({}), same, Amount { bots: 10, ..none }), "full (takes 10 bots)");
    // A request, where there is one, counts in place of the limit, resource by resource.
    let both = json!({"resources": {"requests": {"cpu": "1"}, "limits": {"cpu": "9", "memory": "2Gi"}}});
    assert_eq!(why(both, same, none), "insufficient memory (asks 2Gi, free 1Gi)");
    // A node that shrank below what is bound there.
    let over = Amount { cpu_milli: 9000, memory: 0, bots: 1 };
    assert_eq!(why(limits("1", "0"), same, over), "insufficient cpu (asks 1, free 0)");
    assert_eq!(why(json!({}), same, over), "", "who asks for nothing fits all the same");
    // RuntimeClass: selector, tolerations, overhead, handler.
    let classed = || json!({"runtimeClassName": "small", "resources": {"limits": {"memory": "1000Mi"}}});
    let zone_b = |n: &mut Candidate| {
        n.labels.insert("zone".into(), "b".into());
        n.taints = vec![taint("sandbox", "", "NoSchedule")];
    };
    assert_eq!(why(classed(), same, none), "label zone=a (asks b)");
    assert_eq!(why(classed(), zone_b, none), "insufficient memory (asks 1100Mi, free 1Gi)");
    let no_handler = |n: &mut Candidate| {
        zone_b(n);
        n.handlers.clear();
    };
    assert_eq!(why(classed(), no_handler, none), "no runtime handler runc");
}

#[test]
fn tolerations_are_read_as_kubernetes_reads_them() {
    let taint = taint("only", "gpu", "NoSchedule");
    for (toleration, wanted) in [
        (json!({"key": "only", "value": "gpu"}), true),
        (json!({"key": "only", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}), true),
        (json!({"key": "only", "operator": "Exists"}), true),
        (json!({"operator": "Exists"}), true),
        (json!({"key": "only", "operator": "Exists", "effect": "NoExecute"}), false),
        (json!({"key": "only", "value": "cpu"}), false),
        (json!({"key": "other", "operator": "Exists"}), false),
        (json!({"operator": "Equal", "value": "gpu"}), false),
        (json!({"key": "only", "operator": "Gt", "value": "1"}), false),
    ] {
        assert_eq!(tolerates(&serde_json::from_value(toleration.clone()).unwrap(), &taint), wanted, "{toleration}");
    }
}

#[test]
fn the_least_loaded_wins_then_the_fewest_bots_then_the_name() {
    let ask = Ask::new(&bot(json!({"resources": {"limits": {"cpu": "100m"}}})), None).unwrap();
    let (a, b) = (node("a"), node("b"));
    let on = |cpu_milli, bots| Amount { cpu_milli, memory: 0, bots };
    let choose = |load: &[(&str, Amount)]| {
        let load = load.iter().map(|(n, a)| ((*n).to_owned(), *a)).collect();
        place(&ask, [&b, &a], &load).unwrap()
    };
    assert_eq!(choose(&[]), "a");
    assert_eq!(choose(&[("a", on(1000, 1))]), "b");
    assert_eq!(choose(&[("a", on(1000, 1)), ("b", on(1000, 2))]), "a");
    let mut disliked = node("a");
    disliked.taints = vec![taint("old", "", "PreferNoSchedule")];
    assert_eq!(place(&ask, [&disliked, &b], &Load::from([("b".to_owned(), on(1900, 9))])).unwrap(), "b");
}

#[test]
fn the_message_names_each_node_in_order_and_is_the_same_each_time() {
    let big = bot(json!({"resources": {"limits": {"memory": "2Gi"}}}));
    let ask = Ask::new(&big, None).unwrap();
    let mut tainted = node("node-2");
    tainted.taints = vec![taint("only", "", "NoSchedule")];
    let nodes = [tainted, node("node-1")];
    let refused = place(&ask, &nodes, &Load::new()).unwrap_err();
    let wanted = "0/2 nodes fit: node-1: insufficient memory (asks 2Gi, free 1Gi); node-2: taint only:NoSchedule";
    assert_eq!(explain(&refused, &ask), wanted);
    assert_eq!(explain(&[], &ask), "there is no BotNode yet: no agent runs in this cluster");
    let named = ask.only_on("node-9");
    let refused = place(&named, &nodes, &Load::new()).unwrap_err();
    assert_eq!(explain(&refused, &named), "there is no BotNode node-9, the only node that may take it");
}

#[test]
fn what_cannot_be_counted_or_found_is_said_with_its_field() {
    let bad = bot(json!({"resources": {"requests": {"memory": "much"}}}));
    let said = Ask::new(&bad, None).unwrap_err().to_string();
    assert!(said.starts_with("spec.resources.requests.memory: \"much\""), "{said}");
    let said = Ask::new(&bot(json!({"runtimeClassName": "gone"})), None).unwrap_err().to_string();
    assert!(said.contains("no RuntimeClass gone"), "{said}");
}

proptest! {
    #[test]
    fn bots_placed_one_after_another_never_overcommit_and_stay_only_when_none_fits(
        bots in proptest::collection::vec((0u32..3000, 0u32..700), 1..80),
        nodes in proptest::collection::vec((0i128..4000, 0i128..2000, 0i128..20), 1..6),
    ) {
        let nodes: Vec<_> = nodes.iter().enumerate().map(|(i, (cpu, memory, bots))| Candidate {
            allocatable: Ok(Amount { cpu_milli: *cpu, memory: memory << 20, bots: *bots }), ..node(&format!("n{i}"))
        }).collect();
        let mut load = Load::new();
        for (cpu, memory) in bots {
            let spec = json!({"resources": {"limits": {"cpu": format!("{cpu}m"), "memory": format!("{memory}Mi")}}});
            let ask = Ask::new(&bot(spec), None).unwrap();
            let fits = |n: &Candidate, load: &Load| {
                let (has, mut used) = (n.allocatable.clone().unwrap(), load.get(&n.name).copied().unwrap_or_default());
                used += ask.amount();
                used.cpu_milli <= has.cpu_milli && used.memory <= has.memory && used.bots <= has.bots
            };
            match place(&ask, &nodes, &load) {
                Ok(name) => {
                    prop_assert!(nodes.iter().any(|n| n.name == name && fits(n, &load)));
                    *load.entry(name).or_default() += ask.amount();
                }
                Err(refusals) => {
                    prop_assert_eq!(refusals.len(), nodes.len(), "a reason for each node");
                    prop_assert!(!nodes.iter().any(|n| fits(n, &load)));
                }
            }
        }
    }
}
