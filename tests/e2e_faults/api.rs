//! The API server refuses, forgets, hangs and lies: no bot notices, nothing is removed, and all is made good.

use std::path::Path;
use std::time::Duration;

use berth::api::BotContainer;
use berth::api::bot_container::Phase;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, PostParams};

use crate::common::{SOON, bot, wait_for};
use crate::proxy::{Fault, Proxy};
use crate::scene::{Scene, counting};

/// Waits until so many calls were refused with a status.
async fn refused(proxy: &Proxy, verb: &str, resource: &str, status: u16, times: usize) {
    wait_for(format!("{times} refusals to {verb} {resource}"), SOON, || async {
        let calls = proxy.calls(verb, resource);
        let refused = calls.iter().filter(|call| call.status == status).count();
        if refused >= times { Ok(()) } else { Err(format!("{refused} of {} calls", calls.len())) }
    })
    .await;
}

fn alive(pid: i64) -> bool {
    Path::new(&format!("/proc/{pid}/exe")).exists()
}

impl Scene {
    async fn steady(&self) -> (BotContainer, i64) {
        let bot = self.apply(counting("steady")).await;
        self.phase("steady", Phase::Running).await;
        self.started(&bot, 1).await;
        (bot, self.pid("steady").await)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_taken_away_is_told_costs_no_bot_and_is_used_again_when_it_is_back() {
    let (scene, proxy) = Scene::behind("rights", &[]).await;
    let (_, pid) = scene.steady().await;
    let secret = Secret {
        metadata: ObjectMeta { name: Some("held".to_owned()), ..ObjectMeta::default() },
        data: Some([("key".to_owned(), ByteString(b"value".to_vec()))].into()),
        ..Secret::default()
    };
    scene.ns.api::<Secret>().create(&PostParams::default(), &secret).await.unwrap();
    let agent = scene.agent.pid();

    for (verb, resource, counted) in [
        ("list", "botcontainers", "berth_agent_api_errors_total{call=\"watch\"}"),
        ("watch", "botcontainers", "berth_agent_api_errors_total{call=\"watch\"}"),
        ("patch", "botcontainers/status", "berth_agent_api_errors_total{call=\"status\"}"),
        ("create", "events", "berth_agent_api_errors_total{call=\"event\"}"),
        ("get", "secrets", "berth_agent_errors_total{reason=\"ConfigUnreadable\"}"),
        ("watch", "botnodes", "berth_agent_api_errors_total{call=\"watch node\"}"),
        ("get", "botnodes", "berth_agent_api_errors_total{call=\"node\"}"),
        ("update", "leases", "berth_agent_api_errors_total{call=\"node\"}"),
    ] {
        let told = scene.metric(counted).await;
        proxy.spoil(verb, resource, Fault::Answer(403));
        // Where the watch of the object has to be made anew to meet the refusal.
        if verb == "list" {
            proxy.spoil_next("watch", resource, [Fault::Gone]);
        }
        proxy.cut_watches();
        let name = format!("{verb}-{}", resource.replace('/', "-"));
        let from = serde_json::json!({"name": "HELD", "valueFrom": {"secretKeyRef": {"name": "held", "key": "key"}}});
        let started =
            scene.apply(counting(&name).with(|spec| spec.env.push(serde_json::from_value(from).unwrap()))).await;
        let seen = proxy.calls(verb, resource).iter().filter(|call| call.status == 403).count();
        // An Event is told once, and is not worth a second try.
        refused(&proxy, verb, resource, 403, if resource == "events" { seen.max(1) } else { seen + 2 }).await;
        wait_for(format!("{counted} counting"), SOON, || async {
            let now = scene.metric(counted).await;
            if now > told { Ok(()) } else { Err(format!("{told} -> {now}")) }
        })
        .await;
        assert!(alive(pid), "{verb} {resource}: the steady bot ended");
        assert_eq!(scene.agent.get("/healthz").await.unwrap().0, 200, "{verb} {resource}");
        proxy.heal();
        scene.phase(&name, Phase::Running).await;
        scene.started(&started, 1).await;
        scene.diary(&started).assert_starts(1, &name);
        scene.ns.delete(&name, SOON).await;
    }
    assert_eq!((scene.agent.pid(), scene.pid("steady").await), (agent, pid));
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_that_are_refused_lost_or_cut_off_are_made_in_the_end() {
    let (scene, proxy) = Scene::behind("writes", &[]).await;
    let (steady, pid) = scene.steady().await;
    use Fault::{Answer, Broken, Lost};
    proxy.spoil_next("create", "events", [Lost, Broken, Answer(500)]);
    proxy.spoil_next("update", "leases", [Lost, Answer(409), Broken]);
    proxy.spoil_next("get", "botnodes", [Broken, Answer(500)]);
    let mut web = scene.apply(counting("web").stopped()).await;
    scene.phase("web", Phase::Stopped).await;
    let mut starts = 0;
    for (turn, fault) in
        [Lost, Answer(409), Broken, Answer(500), Answer(503), Answer(429), Answer(403), Lost].into_iter().enumerate()
    {
        let resource = "botcontainers/status";
        proxy.spoil_next("patch", resource, [fault]);
        if turn % 2 == 0 {
            web = scene.apply(counting("web")).await;
            scene.phase("web", Phase::Running).await;
            starts += 1;
            scene.started(&web, starts).await;
        } else {
            scene.apply(counting("web").stopped()).await;
            scene.phase("web", Phase::Stopped).await;
        }
        let calls = proxy.calls("patch", resource).len();
        assert!(calls > turn, "turn {turn}: {calls} statuses were written in all");
    }
    scene.diary(&web).assert_starts(starts, "web");
    let status = scene.ns.bots().get("web").await.unwrap().status.unwrap();
    let times = |what: &str| status.transitions.iter().filter(|t| t.type_ == what).count();
    assert_eq!(
        (times("started"), times("stopped")),
        (starts, starts + 1),
        "told once, however often it was written; it was made stopped"
    );
    wait_for("every fault come", SOON, || async { proxy.spent() }).await;
    assert!(alive(pid));
    scene.diary(&steady).assert_starts(1, "steady");
    scene.end().await;
}

/// Harm done: a client without a limit on an answer. A bot whose status was being written when the server hung was looked
/// after by nobody until TCP gave up, a quarter of an hour later.
#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_is_never_answered_does_not_hold_up_its_bot_for_ever() {
    let (scene, proxy) = Scene::behind("silence", &[]).await;
    let (steady, _) = scene.steady().await;
    proxy.spoil("patch", "botcontainers/status", Fault::Silence);
    for edit in 2..=3 {
        scene.apply(counting("steady").env("EDIT", &edit.to_string())).await;
        scene.started(&steady, edit).await;
    }
    proxy.heal();
    scene.phase("steady", Phase::Running).await;
    scene.diary(&steady).assert_starts(3, "steady");
    scene.end().await;
}

/// Harm that could have been done: bots that two lists in a row lack would have been taken for orphans, with their data.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_comes_short_and_does_not_say_so_removes_nothing() {
    let (mut scene, proxy) = Scene::behind("short", &[("BERTH_ORPHAN_GRACE_SECONDS", "1")]).await;
    let (steady, pid) = scene.steady().await;
    let parked = scene.apply(counting("parked")).await;
    scene.phase("parked", Phase::Running).await;
    scene.started(&parked, 1).await;
    scene.apply(counting("parked").stopped()).await;
    scene.phase("parked", Phase::Stopped).await;

    scene.agent.kill_9();
    proxy.spoil("list", "botcontainers", Fault::Empty);
    scene.agent.start_again(&[]).await;
    // The sweeper has found both for the second time, and asks.
    wait_for("the sweeper's doubts", SOON, || async {
        let asked = proxy.calls("get", "botcontainers");
        let about = |name: &str| asked.iter().any(|call| call.name == name);
        if about("steady") && about("parked") { Ok(()) } else { Err(format!("{asked:?}")) }
    })
    .await;
    assert!(alive(pid), "removed because it was not listed");
    proxy.heal();
    proxy.spoil_next("watch", "botcontainers", [Fault::Gone]);
    proxy.cut_watches();
    scene.apply(counting("parked")).await;
    scene.phase("parked", Phase::Running).await;
    scene.started(&parked, 2).await;
    scene.diary(&parked).assert_starts(2, "parked");
    scene.apply(counting("steady").paused()).await;
    scene.phase("steady", Phase::Paused).await;
    scene.diary(&steady).assert_starts(1, "steady");
    scene.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_dropped_refused_too_old_or_stutters_misses_no_edit() {
    let (scene, proxy) = Scene::behind("watch", &[]).await;
    let (steady, _) = scene.steady().await;
    let faults = [
        Fault::Broken,
        Fault::Gone,
        Fault::Answer(410),
        Fault::Answer(500),
        Fault::Answer(429),
        Fault::Lost,
        Fault::Twice,
    ];
    for (edit, fault) in faults.into_iter().enumerate() {
        proxy.spoil_next("watch", "botcontainers", [fault]);
        proxy.cut_watches();
        scene.apply(counting("steady").env("EDIT", &edit.to_string())).await;
        scene.started(&steady, edit + 2).await;
        scene.phase("steady", Phase::Running).await;
        proxy.spent().unwrap();
        scene.diary(&steady).assert_starts(edit + 2, edit);
    }
    // Missed while nobody watched: a deletion, and another bot under the same name.
    proxy.spoil("watch", "botcontainers", Fault::Answer(500));
    proxy.cut_watches();
    refused(&proxy, "watch", "botcontainers", 500, 2).await;
    scene.ns.bots().delete("steady", &Default::default()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    proxy.heal();
    wait_for("it gone", SOON, || async {
        match scene.ns.bots().get_opt("steady").await {
            Ok(None) => Ok(()),
            other => Err(format!("{:?}", other.map(|b| b.map(|b| crate::common::summary(&b))))),
        }
    })
    .await;
    let another = scene.apply(bot("steady").sh("exec sleep 100000").grace(0)).await;
    assert_ne!(another.metadata.uid, steady.metadata.uid);
    scene.phase("steady", Phase::Running).await;
    scene.end().await;
}
