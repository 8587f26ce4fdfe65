//! Each call of containerd fails, hangs, or is done and its answer lost: a proxy stands between the agent and containerd.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::response::Response;
use berth::api::bot_container::Phase;
use hyper_util::rt::TokioIo;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint, Server};
use tower::Service as _;

use crate::common::{Agent, Cluster, SOON, wait_for};
use crate::scene::{Scene, counting};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    /// Refused, in words that tell nothing (gRPC's Unknown).
    Fails,
    /// containerd is not asked, and seems to be away.
    Away,
    /// Done, and the answer lost.
    Lost,
    /// Answered only after a while.
    Slow,
}

/// What is called on a bot's way, and what is done to the next calls of each.
#[derive(Clone)]
struct GrpcProxy {
    containerd: Channel,
    faults: Arc<Mutex<BTreeMap<String, Vec<Fault>>>>,
    seen: Arc<Mutex<BTreeMap<String, usize>>>,
}

impl GrpcProxy {
    /// On a socket of its own, in front of a containerd.
    async fn start(containerd: &Path, socket: PathBuf) -> Self {
        let containerd = containerd.to_owned();
        let connect = tower::service_fn(move |_| {
            let path = containerd.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?)) }
        });
        let containerd = Endpoint::from_static("http://containerd.invalid").connect_with_connector_lazy(connect);
        let proxy = Self { containerd, faults: Arc::default(), seen: Arc::default() };
        let listener = tokio::net::UnixListener::bind(socket).unwrap();
        let incoming = futures::stream::unfold(listener, |listener| async move {
            let accepted = listener.accept().await.map(|(stream, _)| stream);
            Some((accepted, listener))
        });
        let router = axum::Router::new().fallback(pass).with_state(proxy.clone());
        tokio::spawn(Server::builder().add_routes(Routes::from(router)).serve_with_incoming(incoming));
        proxy
    }

    /// Does these to the next calls of every method that was called so far.
    fn spoil(&self, faults: &[Fault]) {
        let seen = self.seen.lock().unwrap();
        let faults = seen.keys().map(|method| (method.clone(), faults.iter().rev().copied().collect()));
        *self.faults.lock().unwrap() = faults.collect();
    }

    /// Methods that were not called since they were spoiled.
    fn untouched(&self, faults: usize) -> Vec<String> {
        let all = self.faults.lock().unwrap();
        all.iter().filter(|(_, left)| left.len() == faults).map(|(method, _)| method.clone()).collect()
    }

    fn next(&self, method: &str) -> Option<Fault> {
        *self.seen.lock().unwrap().entry(method.to_owned()).or_default() += 1;
        self.faults.lock().unwrap().get_mut(method).and_then(Vec::pop)
    }
}

async fn pass(State(mut proxy): State<GrpcProxy>, request: Request) -> Response {
    let fault = proxy.next(request.uri().path());
    match fault {
        // Trailers alone, as gRPC answers what fails at once.
        Some(Fault::Fails) => return refusal("2", "the proxy of the test says no"),
        Some(Fault::Away) => return refusal("14", "the proxy of the test is away"),
        Some(Fault::Slow) => tokio::time::sleep(Duration::from_millis(1500)).await,
        Some(Fault::Lost) | None => {}
    }
    let asked = async {
        std::future::poll_fn(|cx| proxy.containerd.poll_ready(cx)).await?;
        proxy.containerd.call(request.map(tonic::body::Body::new)).await
    };
    match asked.await {
        Ok(answer) if fault == Some(Fault::Lost) => {
            // To its end, so that it is done.
            let _ = axum::body::to_bytes(Body::new(answer.into_body()), 64 << 20).await;
            refusal("14", "the proxy of the test lost the answer")
        }
        Ok(answer) => answer.map(Body::new),
        Err(error) => refusal("14", &error.to_string()),
    }
}

fn refusal(code: &'static str, words: &str) -> Response {
    let mut response = Response::new(Body::empty());
    let headers = response.headers_mut();
    headers.insert("content-type", HeaderValue::from_static("application/grpc"));
    headers.insert("grpc-status", HeaderValue::from_static(code));
    headers.insert("grpc-message", HeaderValue::from_str(words).unwrap());
    response
}

/// A whole life of a bot, every kind of step in it.
async fn life(scene: &Scene, name: &str) {
    let limit = SOON * 3;
    let phase = |phase| scene.ns.phase(name, phase, limit);
    let bot = scene.apply(counting(name)).await;
    phase(Phase::Running).await;
    scene.started(&bot, 1).await;
    scene.apply(counting(name).paused()).await;
    phase(Phase::Paused).await;
    scene.apply(counting(name).limit("pids", "77")).await;
    phase(Phase::Running).await;
    let seen = scene.ns.bots().get(name).await.unwrap().status.unwrap();
    assert_eq!(seen.resources.unwrap().limits["pids"].0, "77");
    scene.apply(counting(name).env("EDIT", "1")).await;
    scene.started(&bot, 2).await;
    phase(Phase::Running).await;
    scene.apply(counting(name).env("EDIT", "1").stopped()).await;
    phase(Phase::Stopped).await;
    scene.diary(&bot).assert_whole(name);
    scene.ns.delete(name, limit).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_call_of_containerd_may_fail_hang_or_lose_its_answer() {
    let cluster = Cluster::shared();
    let agent = Agent::prepare(cluster, "calls");
    let socket = Path::new(agent.env("KUBECONFIG")).parent().unwrap().join("proxy.sock");
    let proxy = GrpcProxy::start(Path::new(agent.env("BERTH_CONTAINERD_ADDRESS")), socket.clone()).await;
    let socket = socket.to_str().unwrap().to_owned();
    let env = [("BERTH_CONTAINERD_ADDRESS", socket.as_str()), ("BERTH_ORPHAN_GRACE_SECONDS", "5")];
    let scene = Scene::prepared("calls", agent, &env).await;
    life(&scene, "learns").await;
    assert!(proxy.seen.lock().unwrap().len() > 15, "{:?}", proxy.seen);
    for (round, faults) in [[Fault::Away, Fault::Fails], [Fault::Lost, Fault::Slow]].iter().enumerate() {
        proxy.spoil(faults);
        life(&scene, &format!("round-{round}")).await;
        let left = proxy.untouched(faults.len());
        println!("round {round}: spoiled all methods but {left:?}");
        for method in [
            "Tasks/Create",
            "Tasks/Start",
            "Tasks/Get",
            "Tasks/Kill",
            "Tasks/Pause",
            "Tasks/Resume",
            "Tasks/Update",
            "Tasks/Delete",
            "Containers/Create",
            "Containers/Update",
            "Containers/Delete",
            "Snapshots/Prepare",
            "Snapshots/Remove",
        ] {
            assert!(!left.iter().any(|left| left.ends_with(method)), "{method} was not spoiled: {left:?}");
        }
        proxy.spoil(&[]);
        wait_for("the node as it was", SOON, || async {
            let left = scene.agent.ctr(["containers", "list", "-q"]) + &scene.agent.ctr(["tasks", "list", "-q"]);
            if left.is_empty() { Ok(()) } else { Err(left) }
        })
        .await;
    }
    scene.end().await;
}
