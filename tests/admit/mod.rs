//! A real API server for the `admit_*` tests: etcd and kube-apiserver on loopback ports of their own, the CRDs applied.
//!
//! ```text
//! test process ── pipe ──> sh ──> etcd, kube-apiserver        all in one temporary folder
//! ```
//!
//! The shell waits for the pipe's end, so the servers go with the test process however it ends, and the folder with them.

#![allow(dead_code, reason = "each test file uses its own part of this")]

use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::Value;

/// The API server of this test process.
pub struct Cluster {
    folder: PathBuf,
    binaries: PathBuf,
    // Holds the pipe's end.
    _shell: Child,
}

/// Started at the first call.
pub fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        // A thread of its own, since callers are inside a runtime already.
        std::thread::spawn(|| {
            let cluster = Cluster::start();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                cluster.until_ready().await;
                cluster.apply(&berth::api::crd::all()).await;
            });
            cluster
        })
        .join()
        .expect("the API server did not come up: see above")
    })
}

const SHELL: &str = r#"
"$BIN/etcd" --data-dir "$DIR/etcd" --unsafe-no-fsync \
    --listen-client-urls "http://127.0.0.1:$ETCD" --advertise-client-urls "http://127.0.0.1:$ETCD" \
    --listen-peer-urls "http://127.0.0.1:$PEER" --initial-advertise-peer-urls "http://127.0.0.1:$PEER" \
    --initial-cluster "default=http://127.0.0.1:$PEER" >"$DIR/etcd.log" 2>&1 &
etcd=$!
"$BIN/kube-apiserver" --etcd-servers "http://127.0.0.1:$ETCD" --bind-address 127.0.0.1 \
    --secure-port "$PORT" --cert-dir "$DIR/certs" --token-auth-file "$DIR/tokens.csv" --authorization-mode RBAC \
    --service-account-issuer https://kubernetes.default.svc --service-account-key-file "$DIR/certs/apiserver.key" \
    --service-account-signing-key-file "$DIR/certs/apiserver.key" --service-cluster-ip-range 10.96.0.0/24 \
    --disable-admission-plugins ServiceAccount \
    --advertise-address 192.0.2.1 --endpoint-reconciler-type none >"$DIR/kube-apiserver.log" 2>&1 &
api=$!
read -r end
kill -9 $api $etcd
wait
rm -rf "$DIR"
"#;

impl Cluster {
    fn start() -> Self {
        let binaries = binaries();
        let folder = std::env::temp_dir().join(format!("berth-admit-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        // Held until the servers are about to start, so that no two are the same.
        let ports: Vec<_> = (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let [etcd, peer, port] = [0, 1, 2].map(|i: usize| ports[i].local_addr().unwrap().port().to_string());
        fs::write(folder.join("tokens.csv"), "admit,admin,admin,system:masters\n").unwrap();
        fs::write(
            folder.join("kubeconfig"),
            format!(
                "{{apiVersion: v1, kind: Config, current-context: c, contexts: [{{name: c, context: {{cluster: c, user: u}}}}], \
                 clusters: [{{name: c, cluster: {{server: 'https://127.0.0.1:{port}', insecure-skip-tls-verify: true}}}}], \
                 users: [{{name: u, user: {{token: admit}}}}]}}"
            ),
        )
        .unwrap();
        drop(ports);
        let shell = Command::new("sh")
            .args(["-c", SHELL])
            .env("BIN", &binaries)
            .env("DIR", &folder)
            .envs([("ETCD", &etcd), ("PEER", &peer), ("PORT", &port)])
            .stdin(Stdio::piped())
            // Not the terminal's group: on Ctrl-C the shell must live until it has cleaned up.
            .process_group(0)
            .spawn()
            .expect("no sh");
        Self { folder, binaries, _shell: shell }
    }

    async fn until_ready(&self) {
        let limit = Instant::now() + Duration::from_secs(120);
        loop {
            let answer = self.client().await.request_text(http("/readyz")).await;
            let Err(error) = answer else { return };
            let log = |name: &str| fs::read_to_string(self.folder.join(name)).unwrap_or_default();
            let (etcd, api) = (log("etcd.log"), log("kube-apiserver.log"));
            if api.contains("\"command failed\"") || Instant::now() > limit {
                let last = |text: &str| text.lines().rev().take(9).map(|l| format!("    {l}\n")).collect::<String>();
                let (etcd, api) = (last(&etcd), last(&api));
                panic!("kube-apiserver is not ready: {error}\netcd, newest first:\n{etcd}kube-apiserver:\n{api}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Applies CRDs and waits until each is Established.
    pub async fn apply(&self, crds: &[CustomResourceDefinition]) {
        let api: Api<CustomResourceDefinition> = Api::all(self.client().await);
        for crd in crds {
            let name = crd.metadata.name.as_deref().unwrap();
            let params = PatchParams::apply("admit").force();
            api.patch(name, &params, &Patch::Apply(crd)).await.unwrap_or_else(|e| panic!("{name} is refused: {e:#}"));
        }
        for crd in crds {
            let name = crd.metadata.name.as_deref().unwrap();
            eventually(&format!("{name} Established"), async || {
                let conditions = api.get(name).await.unwrap().status.unwrap_or_default().conditions.unwrap_or_default();
                let established = conditions.iter().any(|c| c.type_ == "Established" && c.status == "True");
                established.then_some(()).ok_or(format!("{conditions:?}"))
            })
            .await;
        }
    }

    /// A client for the runtime that calls this.
    pub async fn client(&self) -> Client {
        // Another test may have been first.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let text = fs::read_to_string(self.folder.join("kubeconfig")).unwrap();
        let kubeconfig = Kubeconfig::from_yaml(&text).unwrap();
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await.unwrap();
        Client::try_from(config).unwrap()
    }

    /// Objects of one of our kinds; in the namespace `default` where the kind has namespaces.
    pub async fn objects(&self, kind: &str) -> Api<DynamicObject> {
        let resource = ApiResource::from_gvk(&GroupVersionKind::gvk(berth::api::GROUP, "v1alpha1", kind));
        match kind {
            "BotNode" => Api::all_with(self.client().await, &resource),
            _ => Api::namespaced_with(self.client().await, "default", &resource),
        }
    }

    /// Runs kubectl with the text on its standard input.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Output {
        let file = self.folder.join(format!("input-{:?}", std::thread::current().id()));
        fs::write(&file, input).unwrap();
        Command::new(self.binaries.join("kubectl"))
            .env("KUBECONFIG", self.folder.join("kubeconfig"))
            .env("HOME", &self.folder)
            .args(arguments)
            .stdin(fs::File::open(file).unwrap())
            .output()
            .unwrap()
    }
}

fn http(path: &str) -> axum::http::Request<Vec<u8>> {
    axum::http::Request::get(path).body(Vec::new()).unwrap()
}

/// KUBEBUILDER_ASSETS, else the newest build in the cache.
fn binaries() -> PathBuf {
    if let Some(folder) = std::env::var_os("KUBEBUILDER_ASSETS") {
        return folder.into();
    }
    let home = std::env::var_os("HOME").expect("HOME is not set");
    let cache = Path::new(&home).join(".cache/berth/control-plane");
    let whole = |folder: &PathBuf| ["etcd", "kube-apiserver", "kubectl"].iter().all(|b| folder.join(b).exists());
    let built = fs::read_dir(&cache).into_iter().flatten().map(|entry| entry.unwrap().path()).filter(whole);
    built.max_by_key(|folder| fs::metadata(folder).unwrap().modified().unwrap()).unwrap_or_else(|| {
        panic!("no control plane in {}: run `make test`, which builds it, or set KUBEBUILDER_ASSETS", cache.display())
    })
}

/// Asks until it is so, for at most 30 s; then says what was last seen.
pub async fn eventually(what: &str, mut ask: impl AsyncFnMut() -> Result<(), String>) {
    let limit = Instant::now() + Duration::from_secs(30);
    loop {
        match ask().await {
            Ok(()) => return,
            Err(seen) if Instant::now() > limit => panic!("not {what} after 30 s; last seen: {seen}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

/// One cause of a refusal, as the API server tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Cause {
    pub field: String,
    pub reason: String,
    pub message: String,
}

/// The causes of a refusal; any other answer is a failure of the test.
pub fn causes<T: std::fmt::Debug>(what: &str, answer: Result<T, kube::Error>) -> Vec<Cause> {
    match answer {
        Ok(object) => panic!("{what}: accepted, as {object:?}"),
        Err(kube::Error::Api(status)) if status.code == 422 => {
            let told = status.details.iter().flat_map(|d| &d.causes);
            told.map(|c| Cause { field: c.field.clone(), reason: c.reason.clone(), message: c.message.clone() })
                .collect()
        }
        Err(error) => panic!("{what}: refused, but not as invalid: {error:?}"),
    }
}

/// Lays one value over another: objects are merged, all else is replaced, null removes.
pub fn overlay(base: &mut Value, over: &Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                if value.is_null() {
                    base.remove(key);
                } else if value.is_object() {
                    overlay(base.entry(key).or_insert_with(|| Value::Object(Default::default())), value);
                } else {
                    base.insert(key.clone(), value.clone());
                }
            }
        }
        (base, over) => *base = over.clone(),
    }
}
