//! SECURITY.md, sentence by sentence, with the tokens that the parts have.

// Helpers of tests may panic as tests do; clippy's allowance stops at `#[test]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use berth::api::bot_node::{BotNode, BotNodeSpec};
use berth::api::{
    BotContainer, BotRecord, BotSnapshot, BotSnapshotSpec, NODE_LEASE_NAMESPACE, NODES_NAMESPACE, SYSTEM_NAMESPACE,
};
use k8s_openapi::api::authentication::v1::TokenRequest;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace as KubeNamespace, Node, Pod, Secret, ServiceAccount};
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use kube::api::{Api, DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

use common::{Agent, Cluster, Controller, Namespace, SOON, bot, refused_or_invalid, token_request, wait_for};

/// That the answer is 403 and nothing else.
#[track_caller]
fn refused<T: std::fmt::Debug>(what: &str, answer: kube::Result<T>) {
    match answer {
        Err(kube::Error::Api(status)) if status.code == 403 => {}
        other => panic!("{what}: expected 403, got {other:?}"),
    }
}

fn object<K: serde::de::DeserializeOwned>(value: Value) -> K {
    serde_json::from_value(value).unwrap()
}

/// Two nodes whose agents do not run, and in a namespace a bot and a version bound to each, and a bot that is bound to none.
struct Scene {
    cluster: &'static Cluster,
    ours: Agent,
    other: Agent,
    ns: Namespace,
    /// As the agent of `ours`.
    thief: Client,
}

impl Scene {
    async fn set(name: &str) -> Self {
        let cluster = Cluster::shared();
        let ours = Agent::prepare(cluster, name);
        let other = Agent::prepare(cluster, &format!("{name}-2"));
        let ns = Namespace::create(cluster, name).await;
        for (bot_name, node) in [("ours", Some(ours.node())), ("others", Some(other.node())), ("nobodys", None)] {
            // A node that is not there: no controller places it.
            ns.apply(bot(bot_name).on("no-such-node")).await;
            let spec = BotSnapshotSpec {
                bot_container_name: bot_name.to_owned(),
                ..object(json!({"botContainerName": bot_name}))
            };
            ns.snapshots().create(&PostParams::default(), &BotSnapshot::new(bot_name, spec)).await.unwrap();
            let Some(node) = node else { continue };
            let bound = json!({"status": {"nodeName": node}});
            let (params, patch) = (PatchParams::default(), Patch::Merge(&bound));
            ns.bots().patch_status(bot_name, &params, &patch).await.unwrap();
            ns.snapshots().patch_status(bot_name, &params, &patch).await.unwrap();
        }
        let thief = ours.client().await;
        Self { cluster, ours, other, ns, thief }
    }

    fn as_thief<K>(&self) -> Api<K>
    where
        K: kube::Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>,
    {
        Api::namespaced(self.thief.clone(), self.ns.name())
    }
}

#[tokio::test]
async fn an_agent_reads_every_bot() {
    let scene = Scene::set("reads").await;
    assert!(scene.as_thief::<BotContainer>().get_opt("others").await.unwrap().is_some());
    assert!(scene.as_thief::<BotSnapshot>().get_opt("others").await.unwrap().is_some());
    Api::<BotNode>::all(scene.thief.clone()).list(&ListParams::default()).await.unwrap();
    Api::<RuntimeClass>::all(scene.thief.clone()).list(&ListParams::default()).await.unwrap();
    refused("Nodes", Api::<Node>::all(scene.thief.clone()).list(&ListParams::default()).await);
    refused("Pods", Api::<Pod>::all(scene.thief.clone()).list(&ListParams::default()).await);
    refused("records", Api::<BotRecord>::all(scene.thief.clone()).list(&ListParams::default()).await);
}

#[tokio::test]
async fn an_agent_writes_the_status_of_its_own() {
    let scene = Scene::set("writes").await;
    let said = json!({"status": {"phase": "Failed"}});
    let (params, patch) = (PatchParams::default(), Patch::Merge(&said));
    scene.as_thief::<BotContainer>().patch_status("ours", &params, &patch).await.unwrap();
    scene.as_thief::<BotSnapshot>().patch_status("ours", &params, &patch).await.unwrap();
    let (nodes, leases) =
        (Api::<BotNode>::all(scene.thief.clone()), Api::<Lease>::namespaced(scene.thief.clone(), NODE_LEASE_NAMESPACE));
    nodes.create(&PostParams::default(), &BotNode::new(scene.ours.node(), BotNodeSpec::default())).await.unwrap();
    let said = json!({"status": {"runtimeHandlers": ["runc"]}});
    nodes.patch_status(scene.ours.node(), &params, &Patch::Merge(&said)).await.unwrap();
    let metadata = ObjectMeta { name: Some(scene.ours.node().to_owned()), ..ObjectMeta::default() };
    leases.create(&PostParams::default(), &Lease { metadata, spec: None }).await.unwrap();
}

#[tokio::test]
async fn an_agent_neither_takes_a_bot_nor_pushes_one_away() {
    let scene = Scene::set("takes").await;
    let (ours, other) = (scene.ours.node(), scene.other.node());
    let cases = [
        ("others", json!({"phase": "Failed"}), "what is bound elsewhere"),
        ("nobodys", json!({"phase": "Failed"}), "what is bound nowhere"),
        ("others", json!({"nodeName": ours}), "a bot of another node taken"),
        ("nobodys", json!({"nodeName": ours}), "a bot of no node taken"),
        ("ours", json!({"nodeName": other}), "a bot pushed away"),
        ("ours", json!({"nodeName": null}), "a bot unbound"),
    ];
    for (name, status, what) in cases {
        let body = json!({"status": status});
        let merge = (PatchParams::default(), Patch::Merge(&body));
        refused_or_invalid(what, scene.as_thief::<BotContainer>().patch_status(name, &merge.0, &merge.1).await);
        refused_or_invalid(what, scene.as_thief::<BotSnapshot>().patch_status(name, &merge.0, &merge.1).await);
        // As an agent writes.
        let mut body = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "status": status});
        let apply = PatchParams::apply("berth-agent").force();
        if status["nodeName"] != Value::Null || status.get("phase").is_some() {
            refused_or_invalid(
                what,
                scene.as_thief::<BotContainer>().patch_status(name, &apply, &Patch::Apply(&body)).await,
            );
            body["kind"] = json!("BotSnapshot");
            refused_or_invalid(
                what,
                scene.as_thief::<BotSnapshot>().patch_status(name, &apply, &Patch::Apply(&body)).await,
            );
        }
    }
    // By a whole update as well.
    let mut taken = scene.ns.bots().get("others").await.unwrap();
    taken.status.as_mut().unwrap().node_name = Some(ours.to_owned());
    refused_or_invalid(
        "a bot taken",
        scene.as_thief::<BotContainer>().replace_status("others", &PostParams::default(), &taken).await,
    );
}

#[tokio::test]
async fn an_agent_changes_no_spec_and_deletes_nothing() {
    let scene = Scene::set("specs").await;
    let (bots, snapshots) = (scene.as_thief::<BotContainer>(), scene.as_thief::<BotSnapshot>());
    let evil = json!({"spec": {"image": "example.com/evil:1"}, "metadata": {"finalizers": null}});
    let merge = PatchParams::default();
    refused("a bot's spec", bots.patch("ours", &merge, &Patch::Merge(&evil)).await);
    refused("a bot's deletion", bots.delete("ours", &DeleteParams::default()).await);
    refused("a version's deletion", snapshots.delete("ours", &DeleteParams::default()).await);
    let seen = bots.get("ours").await.unwrap();
    refused("a bot of its own", bots.create(&PostParams::default(), &BotContainer::new("mine", seen.spec)).await);
    let spec = snapshots.get("ours").await.unwrap().spec;
    refused("a version of its own", snapshots.create(&PostParams::default(), &BotSnapshot::new("mine", spec)).await);
    let records = scene.as_thief::<BotRecord>();
    refused("a record's deletion", records.delete("any", &DeleteParams::default()).await);
    // Through the status, metadata and spec stay what they are.
    let status = json!({"metadata": {"labels": {"evil": "yes"}}, "spec": {"image": "example.com/evil:1"}, "status": {"phase": "Failed"}});
    let after = bots.patch_status("ours", &merge, &Patch::Merge(&status)).await.unwrap();
    assert!(after.labels().get("evil").is_none() && after.spec.image != "example.com/evil:1");
}

#[tokio::test]
async fn an_agent_writes_no_other_nodes_botnode_or_lease() {
    let scene = Scene::set("nodes").await;
    let other = scene.other.node();
    let admin = scene.cluster.client().await;
    let made = BotNode::new(other, BotNodeSpec::default());
    let (nodes, merge) = (Api::<BotNode>::all(scene.thief.clone()), PatchParams::default());
    refused("another's BotNode", nodes.create(&PostParams::default(), &made).await);
    Api::<BotNode>::all(admin.clone()).create(&PostParams::default(), &made).await.unwrap();
    let said = json!({"status": {"runtimeHandlers": ["runc"]}});
    refused("another's status", nodes.patch_status(other, &merge, &Patch::Merge(&said)).await);
    let cidr = json!({"spec": {"botCIDR": "10.0.0.0/8"}});
    refused("a CIDR", nodes.patch(other, &merge, &Patch::Merge(&cidr)).await);
    refused("a BotNode's deletion", nodes.delete(other, &DeleteParams::default()).await);
    let metadata = ObjectMeta { name: Some(other.to_owned()), ..ObjectMeta::default() };
    let lease = Lease { metadata, spec: None };
    let leases = Api::<Lease>::namespaced(scene.thief.clone(), NODE_LEASE_NAMESPACE);
    refused("another's Lease", leases.create(&PostParams::default(), &lease).await);
    Api::<Lease>::namespaced(admin, NODE_LEASE_NAMESPACE).create(&PostParams::default(), &lease).await.unwrap();
    let renewed = json!({"spec": {"holderIdentity": "thief"}});
    refused("another's heartbeat", leases.patch(other, &merge, &Patch::Merge(&renewed)).await);
    refused("a Lease's deletion", leases.delete(other, &DeleteParams::default()).await);
    let leader = Api::<Lease>::namespaced(scene.thief.clone(), SYSTEM_NAMESPACE);
    refused("the leader's Lease", leader.list(&ListParams::default()).await);
}

/// The accounts that the controller would make.
async fn accounts(scene: &Scene) {
    let api = Api::<ServiceAccount>::namespaced(scene.cluster.client().await, NODES_NAMESPACE);
    for node in [scene.ours.node(), scene.other.node()] {
        let metadata = ObjectMeta { name: Some(node.to_owned()), ..ObjectMeta::default() };
        api.create(&PostParams::default(), &ServiceAccount { metadata, ..ServiceAccount::default() }).await.unwrap();
    }
}

#[tokio::test]
async fn an_agent_gets_tokens_of_its_nodes_account_alone() {
    let scene = Scene::set("tokens").await;
    accounts(&scene).await;
    let (ours, other) = (scene.ours.node(), scene.other.node());
    let api = Api::<ServiceAccount>::namespaced(scene.thief.clone(), NODES_NAMESPACE);
    let asked = async |name: &str, request: TokenRequest| {
        api.create_token_request(name, &PostParams::default(), &request).await
    };
    asked(ours, token_request(Some(ours), 3600)).await.unwrap();
    refused("another's account", asked(other, token_request(Some(other), 3600)).await);
    refused("another's account for our Node", asked(other, token_request(Some(ours), 3600)).await);
    refused("our account for another's Node", asked(ours, token_request(Some(other), 3600)).await);
    refused("a token that is bound to nothing", asked(ours, token_request(None, 3600)).await);
    refused("a token for long", asked(ours, token_request(Some(ours), 7200)).await);
    for (namespace, name) in
        [(SYSTEM_NAMESPACE, "berth-controller"), (SYSTEM_NAMESPACE, "berth-agent"), (scene.ns.name(), "default")]
    {
        let api = Api::<ServiceAccount>::namespaced(scene.thief.clone(), namespace);
        let done = api.create_token_request(name, &PostParams::default(), &token_request(Some(ours), 3600)).await;
        refused(name, done);
    }
    let mine = object::<ServiceAccount>(json!({"metadata": {"name": "mine"}}));
    refused("an account of its own", api.create(&PostParams::default(), &mine).await);
    refused("all accounts", api.list(&ListParams::default()).await);
}

#[tokio::test]
async fn an_account_reads_what_bots_of_its_node_name() {
    let cluster = Cluster::shared();
    Controller::shared(cluster);
    let agent = Agent::start(cluster, "grants").await;
    let ns = Namespace::create(cluster, "grants").await;
    for name in ["named", "pull", "unnamed"] {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        let data = [("word", "open"), (".dockerconfigjson", r#"{"auths": {}}"#)];
        let data = Some(data.map(|(key, value)| (key.to_owned(), value.to_owned())).into());
        let secret = Secret { metadata: metadata.clone(), string_data: data.clone(), ..Secret::default() };
        ns.api::<Secret>().create(&PostParams::default(), &secret).await.unwrap();
        let map = ConfigMap { metadata, data, ..ConfigMap::default() };
        ns.api::<ConfigMap>().create(&PostParams::default(), &map).await.unwrap();
    }
    let named = bot("web").on(agent.node()).with(|spec| {
        spec.env_from = object(json!([{"secretRef": {"name": "named"}}, {"configMapRef": {"name": "named"}}]));
        spec.image_pull_secrets = object(json!([{"name": "pull"}]));
    });
    ns.apply(named).await;
    // It starts only with what it names.
    ns.ready("web", SOON).await;

    // As a thief of the agent's token would go about it.
    let thief = agent.client().await;
    let node = agent.node();
    let accounts = Api::<ServiceAccount>::namespaced(thief.clone(), NODES_NAMESPACE);
    let made =
        accounts.create_token_request(node, &PostParams::default(), &token_request(Some(node), 3600)).await.unwrap();
    let mut config = agent.config().await;
    config.auth_info = Default::default();
    config.auth_info.token = made.status.and_then(|status| status.token).map(Into::into);
    let account = Client::try_from(config).unwrap();
    let secrets = |client: &Client| Api::<Secret>::namespaced(client.clone(), ns.name());
    let maps = |client: &Client| Api::<ConfigMap>::namespaced(client.clone(), ns.name());
    secrets(&account).get("named").await.unwrap();
    secrets(&account).get("pull").await.unwrap();
    maps(&account).get("named").await.unwrap();
    refused("an unnamed Secret", secrets(&account).get("unnamed").await);
    refused("an unnamed ConfigMap", maps(&account).get("unnamed").await);
    refused("a ConfigMap of a Secret's name", maps(&account).get("pull").await);
    refused("all Secrets", secrets(&account).list(&ListParams::default()).await);
    refused(
        "a watch of a named one",
        secrets(&account).list(&ListParams::default().fields("metadata.name=named")).await,
    );
    refused("all ConfigMaps", Api::<ConfigMap>::all(account.clone()).list(&ListParams::default()).await);
    refused(
        "a named one in another namespace",
        Api::<Secret>::namespaced(account.clone(), "default").get("named").await,
    );
    let merge = PatchParams::default();
    let word = json!({"stringData": {"word": "shut"}});
    refused("a named one written", secrets(&account).patch("named", &merge, &Patch::Merge(&word)).await);
    refused("a bot", Api::<BotContainer>::namespaced(account.clone(), ns.name()).get("web").await);
    for client in [&thief] {
        refused("a named Secret by the agent itself", secrets(client).get("named").await);
        refused("a named ConfigMap by the agent itself", maps(client).get("named").await);
        refused("all Secrets by the agent itself", secrets(client).list(&ListParams::default()).await);
    }

    // What is named no more is read no more; what is named anew is.
    let other = json!({"spec": {"envFrom": [{"secretRef": {"name": "unnamed"}}], "imagePullSecrets": []}});
    ns.bots().patch("web", &merge, &Patch::Merge(&other)).await.unwrap();
    let changed = |what: &'static str, name: &'static str, readable: bool| {
        let account = account.clone();
        let api = Api::<Secret>::namespaced(account, ns.name());
        wait_for(what, SOON, move || {
            let api = api.clone();
            async move {
                match api.get(name).await {
                    Ok(_) if readable => Ok(()),
                    Err(kube::Error::Api(status)) if !readable && status.code == 403 => Ok(()),
                    other => Err(format!("{:?}", other.map(|secret| secret.name_any()))),
                }
            }
        })
    };
    changed("the new one readable", "unnamed", true).await;
    changed("the old one not", "named", false).await;
    let spec_generation = ns.bots().get("web").await.unwrap().metadata.generation;
    ns.until("web", "started with the new one", SOON, |bot| {
        bot.status.as_ref().is_some_and(|status| {
            status.observed_generation == spec_generation
                && status.phase.is_some_and(|phase| phase == berth::api::bot_container::Phase::Running)
        })
    })
    .await;

    // What somebody makes of the Role is put right.
    let roles = Api::<Role>::namespaced(cluster.client().await, ns.name());
    let wide = json!({"rules": [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "list"]}]});
    roles.patch(&format!("berth:node:{node}"), &merge, &Patch::Merge(&wide)).await.unwrap();
    changed("the old one not, whatever was written", "named", false).await;
    // With the bot goes the grant.
    ns.delete("web", SOON).await;
    changed("nothing readable", "unnamed", false).await;
    wait_for("the Role gone", SOON, || async {
        match roles.list(&ListParams::default()).await {
            Ok(list) if list.items.is_empty() => Ok(()),
            other => Err(format!("{:?}", other.map(|list| list.items.len()))),
        }
    })
    .await;
}

#[tokio::test]
async fn an_agent_tells_events_as_itself() {
    let scene = Scene::set("events").await;
    let (ours, other) = (scene.ours.node(), scene.other.node());
    let events = scene.as_thief::<Event>();
    let regarding =
        |kind: &str, api: &str| json!({"apiVersion": api, "kind": kind, "name": "ours", "namespace": scene.ns.name()});
    let event = |name: &str, controller: &str, instance: &str, regarding: Value| {
        object::<Event>(
            json!({"metadata": {"name": name, "namespace": scene.ns.name()}, "eventTime": "2026-11-26T00:00:00.000000Z",
            "type": "Normal", "reason": "Started", "action": "Start", "note": "x", "reportingController": controller,
            "reportingInstance": instance, "regarding": regarding}),
        )
    };
    let create = async |event: Event| events.create(&PostParams::default(), &event).await;
    let bots = || regarding("BotContainer", "berth.dev/v1alpha1");
    create(event("mine", "berth.dev/berth-agent", ours, bots())).await.unwrap();
    refused("as the controller", create(event("a", "berth.dev/berth-controller", ours, bots())).await);
    refused("as kubelet", create(event("b", "kubernetes.io/kubelet", ours, bots())).await);
    refused("as another's agent", create(event("c", "berth.dev/berth-agent", other, bots())).await);
    refused("of a Pod", create(event("d", "berth.dev/berth-agent", ours, regarding("Pod", "v1"))).await);
    let foreign = event("others", "berth.dev/berth-agent", other, bots());
    scene.ns.api::<Event>().create(&PostParams::default(), &foreign).await.unwrap();
    let again = json!({"series": {"count": 2, "lastObservedTime": "2026-11-26T00:00:00.000000Z"}});
    events.patch("mine", &PatchParams::default(), &Patch::Merge(&again)).await.unwrap();
    refused("another's Event", events.patch("others", &PatchParams::default(), &Patch::Merge(&again)).await);
}

#[tokio::test]
async fn a_token_that_names_no_node_writes_nothing() {
    let scene = Scene::set("nameless").await;
    let accounts = Api::<ServiceAccount>::namespaced(scene.cluster.client().await, SYSTEM_NAMESPACE);
    let made =
        accounts.create_token_request("berth-agent", &PostParams::default(), &token_request(None, 3600)).await.unwrap();
    let mut config = scene.ours.config().await;
    config.auth_info = Default::default();
    config.auth_info.token = made.status.and_then(|status| status.token).map(Into::into);
    let nameless = Client::try_from(config).unwrap();
    let said = json!({"status": {"phase": "Failed"}});
    let merge = (PatchParams::default(), Patch::Merge(&said));
    let bots = Api::<BotContainer>::namespaced(nameless.clone(), scene.ns.name());
    for name in ["ours", "others", "nobodys"] {
        refused(name, bots.patch_status(name, &merge.0, &merge.1).await);
    }
    let nodes = Api::<BotNode>::all(nameless);
    refused("a BotNode", nodes.create(&PostParams::default(), &BotNode::new("any", BotNodeSpec::default())).await);
}

#[tokio::test]
async fn a_controller_may_do_its_work() {
    let scene = Scene::set("work").await;
    let client = scene.cluster.client_of("controller/kubeconfig").await;
    let bots = Api::<BotContainer>::namespaced(client.clone(), scene.ns.name());
    let bound = json!({"status": {"nodeName": scene.ours.node()}});
    bots.patch_status("nobodys", &PatchParams::default(), &Patch::Merge(&bound)).await.unwrap();
    let finalizer = json!({"metadata": {"finalizers": ["berth.dev/bot"]}});
    bots.patch("ours", &PatchParams::default(), &Patch::Merge(&finalizer)).await.unwrap();
    let none = json!({"metadata": {"finalizers": null}});
    bots.patch("ours", &PatchParams::default(), &Patch::Merge(&none)).await.unwrap();
    let snapshots = Api::<BotSnapshot>::namespaced(client, scene.ns.name());
    snapshots.delete("others", &DeleteParams::default()).await.unwrap();
}

#[tokio::test]
async fn a_controller_reads_no_secret_and_gets_no_token() {
    let scene = Scene::set("controller").await;
    accounts(&scene).await;
    let client = scene.cluster.client_of("controller/kubeconfig").await;
    refused("Secrets", Api::<Secret>::all(client.clone()).list(&ListParams::default()).await);
    refused("a Secret", Api::<Secret>::namespaced(client.clone(), SYSTEM_NAMESPACE).get("any").await);
    refused("ConfigMaps", Api::<ConfigMap>::all(client.clone()).list(&ListParams::default()).await);
    let node = scene.ours.node();
    for (namespace, name) in [(NODES_NAMESPACE, node), (SYSTEM_NAMESPACE, "berth-agent")] {
        let api = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
        refused(name, api.create_token_request(name, &PostParams::default(), &token_request(None, 3600)).await);
    }
    let elsewhere = Api::<ServiceAccount>::namespaced(client, SYSTEM_NAMESPACE);
    let made = ServiceAccount {
        metadata: ObjectMeta { name: Some("mine".into()), ..ObjectMeta::default() },
        ..Default::default()
    };
    refused("an account elsewhere", elsewhere.create(&PostParams::default(), &made).await);
}

#[tokio::test]
async fn a_controller_changes_no_bot() {
    let scene = Scene::set("nospec").await;
    let client = scene.cluster.client_of("controller/kubeconfig").await;
    let bots = Api::<BotContainer>::namespaced(client.clone(), scene.ns.name());
    let evil = json!({"spec": {"image": "example.com/evil:1"}});
    let apply =
        json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "spec": {"image": "example.com/evil:1"}});
    refused("a spec", bots.patch("ours", &PatchParams::default(), &Patch::Merge(&evil)).await);
    refused("a spec", bots.patch("ours", &PatchParams::apply("x").force(), &Patch::Apply(&apply)).await);
    let seen = bots.get("ours").await.unwrap();
    refused("a bot", bots.create(&PostParams::default(), &BotContainer::new("mine", seen.spec)).await);
    refused("a deletion", bots.delete("ours", &DeleteParams::default()).await);
    let nodes = Api::<Node>::all(client.clone());
    refused("a Node's deletion", nodes.delete("any", &DeleteParams::default()).await);
    let merge = PatchParams::default();
    let labels = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "privileged"}}});
    let namespaces = Api::<KubeNamespace>::all(client);
    refused("a namespace's labels", namespaces.patch(scene.ns.name(), &merge, &Patch::Merge(&labels)).await);
}

#[tokio::test]
async fn a_controller_grants_reads_by_name_to_accounts_of_nodes_alone() {
    let scene = Scene::set("escalation").await;
    let client = scene.cluster.client_of("controller/kubeconfig").await;
    let (ns, node) = (scene.ns.name(), scene.ours.node());
    let name = format!("berth:node:{node}");
    let roles = Api::<Role>::namespaced(client.clone(), ns);
    let bindings = Api::<RoleBinding>::namespaced(client.clone(), ns);
    let rule = |resource: &str, verb: &str, names: Value| json!({"apiGroups": [""], "resources": [resource], "verbs": [verb], "resourceNames": names});
    let role = |name: &str, rules: Value| object::<Role>(json!({"metadata": {"name": name}, "rules": rules}));
    let create = async |role: Role| roles.create(&PostParams::default(), &role).await;
    refused("a Role of another name", create(role("mine", json!([rule("secrets", "get", json!(["a"]))]))).await);
    refused(
        "without names",
        create(role(&name, json!([{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]))).await,
    );
    refused("an empty list of names", create(role(&name, json!([rule("secrets", "get", json!([]))]))).await);
    refused("another verb", create(role(&name, json!([rule("secrets", "list", json!(["a"]))]))).await);
    refused("every verb", create(role(&name, json!([rule("secrets", "*", json!(["a"]))]))).await);
    refused("another resource", create(role(&name, json!([rule("pods", "get", json!(["a"]))]))).await);
    refused("every resource", create(role(&name, json!([rule("*", "get", json!(["a"]))]))).await);
    let group = json!([{"apiGroups": ["*"], "resources": ["secrets"], "verbs": ["get"], "resourceNames": ["a"]}]);
    refused("every group", create(role(&name, group)).await);
    create(role(&name, json!([rule("secrets", "get", json!(["a"]))]))).await.unwrap();
    let wider = json!({"rules": [rule("secrets", "list", json!(["a"]))]});
    refused("made wider", roles.patch(&name, &PatchParams::default(), &Patch::Merge(&wider)).await);

    let account = json!({"kind": "ServiceAccount", "name": node, "namespace": NODES_NAMESPACE});
    let binding = |name: &str, role: Value, subjects: Value| {
        object::<RoleBinding>(json!({"metadata": {"name": name}, "roleRef": role, "subjects": subjects}))
    };
    let of = |kind: &str, name: &str| json!({"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name});
    let bind = async |binding: RoleBinding| bindings.create(&PostParams::default(), &binding).await;
    refused("a binding of another name", bind(binding("mine", of("Role", &name), json!([account]))).await);
    refused("a ClusterRole", bind(binding(&name, of("ClusterRole", "cluster-admin"), json!([account]))).await);
    refused("another Role", bind(binding(&name, of("Role", "admin"), json!([account]))).await);
    for subject in [
        json!({"kind": "ServiceAccount", "name": "berth-controller", "namespace": SYSTEM_NAMESPACE}),
        json!({"kind": "ServiceAccount", "name": scene.other.node(), "namespace": NODES_NAMESPACE}),
        json!({"kind": "User", "name": "eve", "apiGroup": "rbac.authorization.k8s.io"}),
        json!({"kind": "Group", "name": "system:authenticated", "apiGroup": "rbac.authorization.k8s.io"}),
    ] {
        refused("another subject", bind(binding(&name, of("Role", &name), json!([subject]))).await);
        refused("another subject besides", bind(binding(&name, of("Role", &name), json!([account, subject]))).await);
    }
    bind(binding(&name, of("Role", &name), json!([account]))).await.unwrap();
    let merge = PatchParams::default();
    let more = json!({"subjects": [account, {"kind": "User", "name": "eve", "apiGroup": "rbac.authorization.k8s.io"}]});
    refused("given to more", bindings.patch(&name, &merge, &Patch::Merge(&more)).await);
    let foreign = role("foreign", json!([rule("secrets", "get", json!(["a"]))]));
    scene.ns.api::<Role>().create(&PostParams::default(), &foreign).await.unwrap();
    refused("a foreign Role's deletion", roles.delete("foreign", &DeleteParams::default()).await);
    let cluster_roles = Api::<ClusterRole>::all(client.clone());
    let all = object::<ClusterRole>(json!({"metadata": {"name": "berth:node:x"}, "rules": []}));
    refused("a ClusterRole", cluster_roles.create(&PostParams::default(), &all).await);
    let all = object::<ClusterRoleBinding>(
        json!({"metadata": {"name": "berth:node:x"}, "roleRef": of("ClusterRole", "cluster-admin")}),
    );
    refused("a ClusterRoleBinding", Api::<ClusterRoleBinding>::all(client).create(&PostParams::default(), &all).await);
    bindings.delete(&name, &DeleteParams::default()).await.unwrap();
    roles.delete(&name, &DeleteParams::default()).await.unwrap();
}

type Change<'a> = &'a dyn Fn(&mut Value);

#[tokio::test]
async fn a_controller_makes_holder_pods_alone() {
    let scene = Scene::set("pods").await;
    let client = scene.cluster.client_of("controller/kubeconfig").await;
    let node = scene.ours.node();
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let holder = |change: &dyn Fn(&mut Value)| {
        let mut pod = json!({"metadata": {"name": node}, "spec": {"nodeName": node, "automountServiceAccountToken": false,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "hold", "image": "berth", "args": ["hold"],
                "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}]}});
        change(&mut pod);
        object::<Pod>(pod)
    };
    let pods = Api::<Pod>::namespaced(client.clone(), NODES_NAMESPACE);
    // Its account is made by a controller of Kubernetes a moment after the namespace.
    wait_for("a holder let in", SOON, || async {
        pods.create(&dry, &holder(&|_| {})).await.map(drop).map_err(|error| error.to_string())
    })
    .await;
    let cases: [(&str, Change<'_>); 9] = [
        ("another name", &|pod| pod["metadata"]["name"] = json!("mine")),
        ("a token", &|pod| pod["spec"]["automountServiceAccountToken"] = json!(true)),
        ("an account", &|pod| pod["spec"]["serviceAccountName"] = json!(node)),
        ("a volume", &|pod| pod["spec"]["volumes"] = json!([{"name": "x", "emptyDir": {}}])),
        ("an environment", &|pod| {
            pod["spec"]["containers"][0]["envFrom"] = json!([{"secretRef": {"name": "x"}}]);
        }),
        ("a second container", &|pod| {
            let mut one = pod["spec"]["containers"][0].clone();
            one["name"] = json!("second");
            pod["spec"]["initContainers"] = json!([one]);
        }),
        ("the host's network", &|pod| pod["spec"]["hostNetwork"] = json!(true)),
        ("a privileged container", &|pod| {
            pod["spec"]["containers"][0]["securityContext"] = json!({"privileged": true})
        }),
        ("root", &|pod| pod["spec"]["securityContext"] = json!({"runAsUser": 0})),
    ];
    for (what, change) in cases {
        refused(what, pods.create(&dry, &holder(change)).await);
    }
    let elsewhere = Api::<Pod>::namespaced(client, scene.ns.name());
    refused("another namespace", elsewhere.create(&dry, &holder(&|_| {})).await);
}

#[tokio::test]
async fn pod_security_is_enforced_for_bots() {
    let cluster = Cluster::shared();
    let ns = Namespace::create(cluster, "podsecurity").await;
    let namespaces = Api::<KubeNamespace>::all(ns.client());
    let enforce = async |level: Option<&str>| {
        let label = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": level}}});
        namespaces.patch(ns.name(), &PatchParams::default(), &Patch::Merge(&label)).await.unwrap();
    };
    let of = |name: &str, spec: Value| {
        let mut body = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": name},
            "spec": {"image": "busybox", "nodeName": "no-such-node"}});
        for (key, value) in spec.as_object().unwrap() {
            body["spec"][key] = value.clone();
        }
        object::<BotContainer>(body)
    };
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    let create = async |spec: Value| ns.bots().create(&dry, &of("web", spec)).await;
    let security = |value: Value| json!({"securityContext": value});
    let beyond_baseline = [
        security(json!({"privileged": true})),
        json!({"network": {"mode": "Host"}}),
        security(json!({"capabilities": {"add": ["SYS_ADMIN"]}})),
        security(json!({"capabilities": {"add": ["NET_RAW"]}})),
        security(json!({"seccompProfile": {"type": "Unconfined"}})),
        security(json!({"appArmorProfile": {"type": "Unconfined"}})),
        security(json!({"procMount": "Unmasked"})),
        security(json!({"seLinuxOptions": {"type": "spc_t"}})),
        security(json!({"seLinuxOptions": {"user": "root"}})),
    ];
    let good = json!({"runAsNonRoot": true, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}, "seccompProfile": {"type": "RuntimeDefault"}});
    let but = |field: &str, value: Value| {
        let mut changed = good.clone();
        changed[field] = value;
        security(changed)
    };
    let beyond_restricted = [
        json!({}),
        but("runAsNonRoot", json!(null)),
        but("runAsUser", json!(0)),
        but("allowPrivilegeEscalation", json!(null)),
        but("capabilities", json!({"drop": ["NET_RAW"]})),
        but("capabilities", json!({"drop": ["ALL"], "add": ["CHOWN"]})),
        but("seccompProfile", json!(null)),
    ];
    // Which of them CRD rules refuse whatever the namespace is not of interest here.
    let mut allowed = Vec::new();
    for spec in beyond_baseline.iter().chain(&beyond_restricted) {
        match create(spec.clone()).await {
            Ok(_) => allowed.push(spec.clone()),
            Err(kube::Error::Api(status)) if status.code == 422 => {}
            other => panic!("{spec}: {other:?}"),
        }
    }
    assert!(allowed.len() >= 12, "{allowed:?}");
    // Before there were labels.
    ns.bots().create(&PostParams::default(), &of("old", json!({"network": {"mode": "Host"}}))).await.unwrap();

    enforce(Some("baseline")).await;
    wait_for("the policy in force", SOON, || async {
        match create(json!({"network": {"mode": "Host"}})).await {
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    for spec in beyond_baseline.iter().filter(|spec| allowed.contains(spec)) {
        refused(&spec.to_string(), create(spec.clone()).await);
    }
    for spec in beyond_restricted.iter().filter(|spec| allowed.contains(spec)) {
        create(spec.clone()).await.unwrap();
    }
    enforce(Some("restricted")).await;
    wait_for("the policy in force", SOON, || async {
        match create(json!({})).await {
            Err(kube::Error::Api(status)) if status.code == 403 => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    for spec in beyond_baseline.iter().chain(&beyond_restricted).filter(|spec| allowed.contains(spec)) {
        refused(&spec.to_string(), create(spec.clone()).await);
    }
    create(security(good.clone())).await.unwrap();
    let mut with_bind = good.clone();
    with_bind["capabilities"]["add"] = json!(["NET_BIND_SERVICE"]);
    create(security(with_bind)).await.unwrap();

    // What is there already may be edited, but not for the worse.
    let merge = PatchParams::default();
    let edit = json!({"spec": {"operatingMode": "Stopped"}});
    ns.bots().patch("old", &merge, &Patch::Merge(&edit)).await.unwrap();
    let worse = json!({"spec": {"securityContext": {"privileged": true}}});
    refused("for the worse", ns.bots().patch("old", &merge, &Patch::Merge(&worse)).await);
    // The message names the field. Where two policies refuse, the API server tells of either: this one breaks one rule.
    let mut host = security(good);
    host["network"] = json!({"mode": "Host"});
    let error = create(host).await.unwrap_err().to_string();
    assert!(error.contains("spec.network.mode must not be Host"), "{error}");
}

/// What docs/quota.md shows, as it stands there.
#[tokio::test]
async fn the_documented_quota_and_policy_bound_a_namespace() {
    let cluster = Cluster::shared();
    let ns = Namespace::create(cluster, "quota").await;
    let page = std::fs::read_to_string("docs/quota.md").unwrap();
    let blocks: Vec<&str> = page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(blocks.len(), 2);
    let quota = blocks[0].replace("team-a", ns.name()).replace("\"20\"", "\"1\"");
    let dir = tempfile::tempdir().unwrap();
    for (name, text) in [("quota.yaml", quota.as_str()), ("policy.yaml", blocks[1])] {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        cluster.kubectl(["apply", "--filename", path.to_str().unwrap()]);
    }
    cluster.kubectl(["label", "namespace", ns.name(), "berth.dev/small-bots=true"]);
    let of = |name: &str, limits: Value| {
        object::<BotContainer>(
            json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": name},
            "spec": {"image": "busybox", "nodeName": "no-such-node", "resources": {"limits": limits}}}),
        )
    };
    let dry = PostParams { dry_run: true, ..PostParams::default() };
    wait_for("the policy in force", SOON, || async {
        match ns.bots().create(&dry, &of("large", json!({"cpu": "2", "memory": "1Gi"}))).await {
            Err(error) if error.to_string().contains("need spec.resources.limits.cpu of 500m or less") => Ok(()),
            other => Err(format!("{:?}", other.map(|bot| bot.name_any()))),
        }
    })
    .await;
    for limits in [
        json!({}),
        json!({"cpu": "500m"}),
        json!({"cpu": "500m", "memory": "2Gi"}),
        json!({"cpu": "501m", "memory": "1Gi"}),
    ] {
        assert!(ns.bots().create(&dry, &of("large", limits.clone())).await.is_err(), "{limits}");
    }
    wait_for("the first bot let in", SOON, || async {
        // Until the quota was counted, nothing is.
        ns.bots()
            .create(&PostParams::default(), &of("one", json!({"cpu": "500m", "memory": "1Gi"})))
            .await
            .map(drop)
            .map_err(|e| e.to_string())
    })
    .await;
    let second = ns.bots().create(&PostParams::default(), &of("two", json!({"cpu": "500m", "memory": "1Gi"}))).await;
    refused("a second bot", second);
    cluster.kubectl(["delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", "small-bots"]);
}
