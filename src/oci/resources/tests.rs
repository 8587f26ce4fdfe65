use super::*;
use crate::oci::spec::tests::node;
use proptest::prelude::*;

fn resources(json: serde_json::Value) -> BotResources {
    serde_json::from_value(json).unwrap()
}

fn cpu(json: serde_json::Value) -> (u64, i64) {
    let made = linux_resources(Some(&resources(json)), &node()).unwrap();
    let cpu = made.cpu().clone().unwrap();
    assert_eq!(cpu.period(), Some(100_000));
    (cpu.shares().unwrap(), cpu.quota().unwrap())
}

#[test]
fn processors_become_shares_and_quota_by_kubelets_formulas() {
    for (json, result) in [
        (serde_json::json!({}), (2, -1)),
        (serde_json::json!({"requests": {"cpu": "0"}}), (2, -1)),
        (serde_json::json!({"requests": {"cpu": "1m"}}), (2, -1)),
        (serde_json::json!({"requests": {"cpu": "100m"}}), (102, -1)),
        (serde_json::json!({"requests": {"cpu": "1"}}), (1024, -1)),
        (serde_json::json!({"requests": {"cpu": "1000"}}), (262_144, -1)),
        (serde_json::json!({"limits": {"cpu": "1"}}), (1024, 100_000)),
        (serde_json::json!({"limits": {"cpu": "1500m"}}), (1536, 150_000)),
        (serde_json::json!({"limits": {"cpu": "1m"}}), (2, 1000)),
        (serde_json::json!({"limits": {"cpu": "0.0001"}}), (2, 1000)),
        (serde_json::json!({"requests": {"cpu": "250m"}, "limits": {"cpu": "2"}}), (256, 200_000)),
    ] {
        assert_eq!(cpu(json.clone()), result, "{json}");
    }
}

#[test]
fn memory_and_pids_are_limited_or_said_to_be_unlimited() {
    let made =
        linux_resources(Some(&resources(serde_json::json!({"limits": {"memory": "64Mi", "pids": "512"}}))), &node());
    let made = made.unwrap();
    assert_eq!(made.memory().unwrap().limit(), Some(64 << 20));
    assert_eq!(made.memory().unwrap().swap(), Some(64 << 20));
    assert_eq!(made.pids().unwrap().limit(), 512);
    assert!(made.devices().is_none(), "an update must not touch devices");

    let none = linux_resources(None, &node()).unwrap();
    assert_eq!((none.memory().unwrap().limit(), none.memory().unwrap().swap()), (Some(-1), Some(-1)));
    assert_eq!(none.pids().unwrap().limit(), -1);

    let mut node = node();
    node.swap_limit = false;
    node.default_pids_limit = Some(4096);
    let none = linux_resources(None, &node).unwrap();
    assert_eq!(none.memory().unwrap().swap(), None, "runc fails on a limit that the kernel lacks");
    assert_eq!(none.pids().unwrap().limit(), 4096);
}

#[test]
fn what_can_not_be_is_refused_at_its_field() {
    for (json, field) in [
        (serde_json::json!({"limits": {"cpu": "x"}}), "spec.resources.limits.cpu"),
        (serde_json::json!({"limits": {"cpu": "-1"}}), "spec.resources.limits.cpu"),
        (serde_json::json!({"limits": {"cpu": "10E"}}), "spec.resources.limits.cpu"),
        (serde_json::json!({"limits": {"memory": "1Mi"}}), "spec.resources.limits.memory"),
        (serde_json::json!({"limits": {"memory": "100Ei"}}), "spec.resources.limits.memory"),
        (serde_json::json!({"limits": {"pids": "5000000"}}), "spec.resources.limits.pids"),
        (serde_json::json!({"limits": {"nvidia.com/gpu": "1"}}), "spec.resources.limits.nvidia.com/gpu"),
        (serde_json::json!({"requests": {"pids": "1"}}), "spec.resources.requests.pids"),
        (serde_json::json!({"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}), "spec.resources.requests.cpu"),
        (
            serde_json::json!({"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}),
            "spec.resources.requests.memory",
        ),
    ] {
        let refused = linux_resources(Some(&resources(json.clone())), &node()).unwrap_err();
        assert_eq!(refused.field(), field, "{json}");
    }
}

#[test]
fn who_reserves_more_is_ended_later_and_nobody_before_the_agent() {
    let score = |json: serde_json::Value, own: i32| {
        let mut node = node();
        node.oom_score_adj = own;
        oom_score_adj(Some(&resources(json)), &node)
    };
    let half = serde_json::json!({"requests": {"memory": "4Gi"}});
    let all = serde_json::json!({"limits": {"memory": "64Gi", "cpu": "1"}});
    assert_eq!(score(serde_json::json!({}), 0), 1000);
    assert_eq!(score(serde_json::json!({"limits": {"pids": "5"}}), 0), 1000);
    assert_eq!(score(serde_json::json!({"limits": {"cpu": "1"}}), 0), 999);
    assert_eq!(score(half.clone(), 0), 500);
    assert_eq!(score(half.clone(), -997), 500);
    assert_eq!(score(half, 700), 700);
    assert_eq!(score(all.clone(), 0), 3);
    assert_eq!(score(all, -999), 3);
    assert_eq!(oom_score_adj(None, &node()), 1000);
}

proptest! {
    #[test]
    fn numbers_stay_within_what_the_kernel_takes(cpu in "[0-9]{1,12}(m|k|Ki|e3|\\.5)?", memory in "\\PC{0,12}", own in -1000..1000_i32) {
        let resources = resources(serde_json::json!({"limits": {"cpu": cpu, "memory": memory}}));
        let mut node = node();
        node.oom_score_adj = own;
        if let Ok(made) = linux_resources(Some(&resources), &node) {
            let cpu = made.cpu().clone().unwrap();
            prop_assert!((2..=262_144).contains(&cpu.shares().unwrap()));
            prop_assert!(cpu.quota().unwrap() == -1 || cpu.quota().unwrap() >= 1000);
            let memory = made.memory().unwrap().limit().unwrap();
            prop_assert!(memory == -1 || memory >= 6 << 20);
        }
        let score = oom_score_adj(Some(&resources), &node);
        prop_assert!((own.max(3)..=1000).contains(&score));
    }
}
