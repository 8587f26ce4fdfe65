//! What chart and overlays render, before a real API server (dry run): `helm lint`, `helm template`, `kubectl kustomize`. Whether it
//! works is for e2e_install.

#![allow(missing_docs)]
// Helpers of tests may panic as tests do; clippy's allowance stops at `#[test]`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use common::{Cluster, go_tool, run};

/// An API that the chart asks for, as an API server has it from Kubernetes 1.36 on.
const MUTATING: [&str; 2] = ["--api-versions", "admissionregistration.k8s.io/v1/MutatingAdmissionPolicy"];

const EVERYTHING: &str = r#"
image: {repository: "registry.example:5000/berth/berth", digest: "sha256:0000000000000000000000000000000000000000000000000000000000000001"}
imagePullSecrets: [{name: of-the-registry}]
crds: {keep: false, deleteTimeoutSeconds: 61}
log: {format: text, filter: "info,berth=debug"}
controller:
  replicas: 3
  tolerations: [{key: of-the-controller, operator: Exists}]
  affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: zone-of-it, operator: Exists}]}]}}}
  topologySpreadConstraints: []
  podAnnotations: {an.example/annotation: of-the-controller}
  extraEnv: [{name: HTTPS_PROXY, value: "http://proxy.example:3128"}]
database: {existingSecret: of-the-database, key: uri, resyncSeconds: 61}
agent:
  nodeSelector: {berth.dev/bots: "true"}
  containerd: {address: /run/k3s/containerd/containerd.sock}
  runtimeHandlers: {gvisor: io.containerd.runsc.v1}
  clusterDNS: [10.96.0.10, 10.96.0.11]
  clusterDomain: cluster.example
  registryMirrors: {docker.io: "https://mirror.example/proxy"}
  registryCA: {configMap: authorities, keys: [one.pem]}
  capacity: {cpu: "2", memory: 4Gi}
  orphanRetention: 36h
metrics: {serviceMonitor: {enabled: true, interval: 61s, labels: {release: prometheus}}}
networkPolicy: {metricsFrom: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}}]}
holder: {priority: 7, drainSeconds: 61, drainOnCordon: true}
"#;

const LEAST: &str = r"
crds: {install: false}
controller: {replicas: 1, podDisruptionBudget: {minAvailable: 1}}
metrics: {services: false}
networkPolicy: {enabled: false}
podSecurity: {enabled: false}
holder: {enabled: false}
";

/// Values, and what they make of the default's objects: what has to be in the text, and what must not.
const CASES: [(&str, &str, &[&str], &[&str]); 3] = [
    (
        "the defaults",
        "",
        &[
            "kind: CustomResourceDefinition",
            "helm.sh/resource-policy: keep",
            "kind: PodDisruptionBudget",
            "kind: NetworkPolicy",
            "kind: PriorityClass",
            "name: berth-pod-security-restricted",
            "ghcr.io/berth-dev/berth:0.1.0",
            "topologyKey: kubernetes.io/hostname",
        ],
        &["kind: ServiceMonitor", "DATABASE_URL", "delete-all"],
    ),
    (
        "everything",
        EVERYTHING,
        &[
            "registry.example:5000/berth/berth@sha256:0000000000000000000000000000000000000000000000000000000000000001",
            "name: of-the-registry",
            "replicas: 3",
            "key: of-the-controller",
            "key: zone-of-it",
            "an.example/annotation: of-the-controller",
            "proxy.example:3128",
            "name: of-the-database",
            "key: uri",
            "berth.dev/bots: \"true\"",
            "/run/k3s/containerd/containerd.sock",
            "io.containerd.runsc.v1",
            "10.96.0.10,10.96.0.11",
            "cluster.example",
            "mirror.example/proxy",
            "name: authorities",
            "one.pem",
            "36h",
            "kind: ServiceMonitor",
            "release: prometheus",
            "interval: 61s",
            "kubernetes.io/metadata.name: monitoring",
            "value: 7",
            "helm.sh/hook: pre-delete",
            "--timeout-seconds=61",
        ],
        &["ghcr.io", "topologyKey", "helm.sh/resource-policy"],
    ),
    (
        "the least",
        LEAST,
        &["kind: Deployment", "kind: DaemonSet", "replicas: 1"],
        &[
            "kind: CustomResourceDefinition",
            "kind: Service\n",
            "kind: NetworkPolicy",
            "kind: PriorityClass",
            "kind: PodDisruptionBudget",
            "berth-pod-security",
        ],
    ),
];

fn helm() -> Command {
    static HELM: OnceLock<PathBuf> = OnceLock::new();
    Command::new(HELM.get_or_init(|| go_tool("helm")))
}

fn template(values: &Path, more: &[&str]) -> Command {
    let mut command = helm();
    command
        .args(["template", "berth", "charts/berth", "--namespace", "berth-system", "--values"])
        .arg(values)
        .args(more);
    command
}

/// The API server takes all of it, but for kinds that it does not know.
fn taken(cluster: &Cluster, what: &str, objects: &str) {
    let known: Vec<&str> = objects.split("\n---\n").filter(|object| !object.contains("kind: ServiceMonitor")).collect();
    assert!(known.len() > 20, "{what}: {} objects", known.len());
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("objects.yaml");
    fs::write(&file, known.join("\n---\n")).unwrap();
    let words = ["apply", "--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict", "--filename"];
    cluster.kubectl(words.into_iter().chain([file.to_str().unwrap()]));
}

#[test]
fn the_chart_renders_what_its_values_say_and_an_api_server_takes_it() {
    let cluster = Cluster::shared();
    let dir = tempfile::tempdir().unwrap();
    let values = dir.path().join("values.yaml");
    for (what, text, there, not) in CASES {
        fs::write(&values, text).unwrap();
        run(helm().args(["lint", "charts/berth", "--strict", "--namespace", "berth-system", "--values"]).arg(&values));
        let objects = run(&mut template(&values, &MUTATING));
        for wanted in there {
            assert!(objects.contains(wanted), "{what}: no {wanted:?} in\n{objects}");
        }
        for unwanted in not {
            assert!(!objects.contains(unwanted), "{what}: {unwanted:?} in\n{objects}");
        }
        taken(cluster, what, &objects);
    }
}

#[test]
fn the_account_of_the_uninstall_may_list_and_delete_bots_and_versions_alone() {
    let dir = tempfile::tempdir().unwrap();
    let values = dir.path().join("values.yaml");
    fs::write(&values, "crds: {keep: false}").unwrap();
    let objects = run(&mut template(&values, &MUTATING));
    let roles: Vec<&str> = objects
        .split("\n---\n")
        .filter(|object| object.contains("\nkind: ClusterRole\n") && object.contains("\n  name: berth-delete-all\n"))
        .collect();
    let [role] = roles[..] else { panic!("{} roles in\n{objects}", roles.len()) };
    let (_, rules) = role.split_once("\nrules:\n").unwrap();
    assert_eq!(
        rules.trim_end(),
        "- apiGroups: [berth.dev]\n  resources: [botcontainers, botsnapshots]\n  verbs: [list, watch, delete]"
    );
}

/// What an API server does not know it is not sent.
#[test]
fn finalizers_from_birth_are_for_api_servers_that_can() {
    let cluster = Cluster::shared();
    let dir = tempfile::tempdir().unwrap();
    let values = dir.path().join("values.yaml");
    fs::write(&values, "").unwrap();
    let count = |objects: &str| objects.matches("\nkind: MutatingAdmissionPolicy").count();
    assert_eq!(count(&run(&mut template(&values, &MUTATING))), 4);
    assert_eq!(count(&run(&mut template(&values, &[]))), 0);
    for (overlay, mutating) in [("before-1.36", 0), ("registry", 4), ("some-nodes", 4)] {
        let objects = cluster.kubectl(["kustomize", &format!("deploy/overlays/{overlay}")]);
        assert_eq!(count(&objects), mutating, "{overlay}");
        taken(cluster, overlay, &objects);
    }
    let overlays = fs::read_dir("deploy/overlays").unwrap().count();
    assert_eq!(overlays, 3, "an overlay that this test does not know");
}

#[test]
fn values_that_are_wrong_or_unknown_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let values = dir.path().join("values.yaml");
    fs::write(&values, "").unwrap();
    for (set, named) in [
        ("nonsense=1", "nonsense"),
        ("controller.replica=2", "replica"),
        ("controller.replicas=two", "replicas"),
        ("controller.workers=0", "workers"),
        ("controller.clusterCIDR=10.208.0.0", "clusterCIDR"),
        ("controller.nodeCIDRMaskSize=33", "nodeCIDRMaskSize"),
        ("image.digest=sha256:1", "digest"),
        ("crds.keep=perhaps", "keep"),
        ("crds.deleteTimeoutSeconds=0", "deleteTimeoutSeconds"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("log.format=xml", "format"),
        ("agent.maxBots=many", "maxBots"),
        ("agent.bridgeName=longer-than-a-name-of-linux", "bridgeName"),
        ("agent.containerd.address=containerd.sock", "address"),
        ("agent.imageGC.highPercent=101", "highPercent"),
        ("database.existingSecret=1", "existingSecret"),
        ("holder.drainOnCordon=perhaps", "drainOnCordon"),
        ("metrics.serviceMonitor.enabled=1", "enabled"),
    ] {
        let Output { status, stderr, .. } = template(&values, &["--set", set]).output().unwrap();
        let said = String::from_utf8_lossy(&stderr);
        assert!(!status.success(), "{set} is taken");
        assert!(said.contains(named), "{set}: {said}");
    }
}
