//! Addresses that run out, and those that a crash left given out.

use std::path::Path;
use std::time::Duration;

use berth::api::BotNode;
use berth::api::bot_container::Phase;
use berth::api::condition::{ConditionType, Reason, find};
use kube::Api;
use kube::api::PostParams;

use crate::common::{Agent, Cluster, Controller, Namespace, SOON, wait_for};
use crate::scene::counting;

/// Harm done: an address that nothing but host-local's file told of was found by each sweep and never freed.
#[tokio::test]
async fn addresses_that_run_out_are_told_and_given_again_also_those_that_a_crash_left() {
    let cluster = Cluster::shared();
    Controller::shared(cluster);
    let mut agent = Agent::prepare(cluster, "narrow");
    let nodes: Api<BotNode> = Api::all(cluster.client().await);
    // Five bots: eight addresses less network, broadcast and gateway. Of a net for tests of devices (RFC 2544), which no
    // cluster's bots have.
    let net = format!("198.18.{}", std::process::id() % 256);
    let mut node = BotNode::new(agent.node(), Default::default());
    node.spec.bot_cidr = Some(format!("{net}.0/29"));
    nodes.create(&PostParams::default(), &node).await.unwrap();
    agent.start_again(&[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    let ns = Namespace::create(cluster, "narrow").await;
    let apply = |name: String| {
        let bot = counting(&name).on(agent.node());
        let ns = &ns;
        async move { ns.apply(bot).await }
    };
    for n in 0..5 {
        apply(format!("bot-{n}")).await;
    }
    for n in 0..5 {
        ns.phase(&format!("bot-{n}"), Phase::Running, SOON).await;
    }
    apply("late".to_owned()).await;
    let told = ns
        .until("late", "AddressesExhausted", SOON, |bot| {
            let conditions = bot.status.as_ref().map(|status| status.conditions.as_slice()).unwrap_or_default();
            find(conditions, ConditionType::NetworkReady)
                .is_some_and(|c| c.reason == Reason::AddressesExhausted.as_str())
        })
        .await;
    let status = told.status.unwrap();
    assert_eq!(status.phase, Some(Phase::BackOff));
    let words = &find(&status.conditions, ConditionType::NetworkReady).unwrap().message;
    assert!(words.contains(&format!("all 5 of {net}.0/29")), "{words}");
    ns.delete("bot-2", SOON).await;
    ns.phase("late", Phase::Running, SOON).await;

    // What host-local writes for a plugin whose agent died: an address given to a bot that nobody knows.
    ns.delete("bot-3", SOON).await;
    let leases = Path::new(agent.env("BERTH_STATE_DIR")).join("leases").join(agent.env("BERTH_BRIDGE_NAME"));
    let free = (2..=6).map(|n| leases.join(format!("{net}.{n}"))).find(|lease| !lease.exists()).unwrap();
    std::fs::write(&free, "berth-00000000-0000-4000-8000-00000000dead\r\neth0").unwrap();
    agent.kill_9();
    agent.start_again(&[]).await;
    let bot = counting("last").on(agent.node());
    ns.apply(bot).await;
    ns.phase("last", Phase::Running, SOON).await;
    wait_for("the leases of bots alone", Duration::from_secs(20), || async {
        let left: Vec<_> = std::fs::read_dir(&leases).unwrap().flatten().map(|e| e.file_name()).collect();
        let given = left.iter().filter(|name| name.to_string_lossy().starts_with(&net)).count();
        if given == 5 { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}
