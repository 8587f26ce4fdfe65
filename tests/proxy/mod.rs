//! Between one part and the real API server: passes on all but what a test asks it to spoil.
//!
//! Plain HTTP on loopback towards the part; the part's own token goes through to the server, so its rights are its own.

#![allow(dead_code)]

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures::StreamExt as _;
use kube::config::Kubeconfig;
use serde_json::{Value, json};
use tokio::sync::watch;

/// What is done to a call instead of passing it on.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answered with this status, and the server not asked: a right taken away (403), a conflict (409), a server in
    /// trouble (5xx).
    Answer(u16),
    /// Passed on and done; the answer is lost on the way back.
    Lost,
    /// The connection breaks and the server is not asked.
    Broken,
    /// Never answered, and the server not asked.
    Silence,
    /// A list without its items, that says that it is complete.
    Empty,
    /// A watch that begins by saying that its version is too old.
    Gone,
    /// A watch whose events all come twice.
    Twice,
    /// Kept back until it is let go, then passed on.
    Held(watch::Receiver<bool>),
}

/// A call as Kubernetes authorizes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// get, list, watch, create, update, patch, delete.
    pub verb: &'static str,
    /// The plural, with the subresource: `botcontainers/status`.
    pub resource: String,
    pub name: String,
    /// What the server answered, or the fault instead of it; 0 while it is under way, or was never answered.
    pub status: u16,
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}: {}", self.verb, self.resource, self.name, self.status)
    }
}

impl Call {
    fn of(method: &str, path: &str, query: &str) -> Self {
        let mut parts = path.trim_matches('/').split('/');
        let skip = if parts.next() == Some("api") { 1 } else { 2 };
        let mut rest: Vec<&str> = parts.skip(skip).collect();
        if rest.first() == Some(&"namespaces") && rest.len() > 2 {
            rest.drain(..2);
        }
        let name = rest.get(1).copied().unwrap_or_default().to_owned();
        let resource = match (rest.first(), rest.get(2)) {
            (Some(resource), Some(sub)) => format!("{resource}/{sub}"),
            (resource, _) => resource.copied().unwrap_or_default().to_owned(),
        };
        let watched = query.split('&').any(|part| part == "watch=true" || part == "watch=1");
        let verb = match method {
            "GET" if watched => "watch",
            "GET" if name.is_empty() => "list",
            "GET" => "get",
            "POST" => "create",
            "PUT" => "update",
            "PATCH" => "patch",
            "DELETE" => "delete",
            _ => "other",
        };
        Self { verb, resource, name, status: 0 }
    }
}

struct Rule {
    verb: &'static str,
    resource: &'static str,
    fault: Fault,
    /// How often yet; `None` for ever.
    left: Option<usize>,
}

struct Inner {
    rules: Vec<Rule>,
    calls: Vec<Call>,
}

/// The proxy; it ends with the test's runtime.
#[derive(Clone)]
pub struct Proxy {
    inner: Arc<Mutex<Inner>>,
    client: reqwest::Client,
    server: String,
    cut: watch::Sender<u64>,
    kubeconfig: PathBuf,
}

impl Proxy {
    /// In front of the server that a kubeconfig names. Its own kubeconfig is written beside that.
    pub async fn start(kubeconfig: &Path) -> Self {
        let mut config = Kubeconfig::read_from(kubeconfig).unwrap();
        let cluster = config.clusters[0].cluster.as_mut().unwrap();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let own = format!("http://{}", listener.local_addr().unwrap());
        let server = cluster.server.replace(own).unwrap();
        cluster.certificate_authority = None;
        cluster.insecure_skip_tls_verify = None;
        let path = kubeconfig.with_extension(format!("proxy-{}", listener.local_addr().unwrap().port()));
        std::fs::write(&path, serde_yaml_ng::to_string(&config).unwrap()).unwrap();
        let _ = rustls::crypto::ring::default_provider().install_default();
        // On loopback the server's certificate proves nothing more than its port does.
        let client = reqwest::Client::builder().tls_danger_accept_invalid_certs(true).http1_only().build().unwrap();
        let inner = Arc::new(Mutex::new(Inner { rules: Vec::new(), calls: Vec::new() }));
        let proxy = Self { inner, client, server, cut: watch::Sender::new(0), kubeconfig: path };
        let router = axum::Router::new().fallback(serve).with_state(proxy.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        proxy
    }

    /// For the part.
    pub fn kubeconfig(&self) -> &str {
        self.kubeconfig.to_str().unwrap()
    }

    /// Does this to the calls of a verb and resource from now on; `*` is any. The rule made last wins.
    pub fn spoil(&self, verb: &'static str, resource: &'static str, fault: Fault) {
        self.inner.lock().unwrap().rules.insert(0, Rule { verb, resource, fault, left: None });
    }

    /// Does these to the next calls, one after another.
    pub fn spoil_next(&self, verb: &'static str, resource: &'static str, faults: impl IntoIterator<Item = Fault>) {
        let rules = faults.into_iter().map(|fault| Rule { verb, resource, fault, left: Some(1) });
        self.inner.lock().unwrap().rules.extend(rules);
    }

    /// Whether all faults that were to come once have come.
    pub fn spent(&self) -> Result<(), String> {
        let inner = self.inner.lock().unwrap();
        let left: Vec<_> = inner.rules.iter().filter(|rule| rule.left.is_some()).collect();
        match left.as_slice() {
            [] => Ok(()),
            [first, ..] => Err(format!("{} faults to come, first at {} {}", left.len(), first.verb, first.resource)),
        }
    }

    /// Passes on everything again.
    pub fn heal(&self) {
        self.inner.lock().unwrap().rules.clear();
    }

    /// Ends every watch that is under way, as a server that is restarted does.
    pub fn cut_watches(&self) {
        self.cut.send_modify(|n| *n += 1);
    }

    /// The calls of a verb and resource so far; `*` is any.
    pub fn calls(&self, verb: &str, resource: &str) -> Vec<Call> {
        let inner = self.inner.lock().unwrap();
        inner.calls.iter().filter(|call| fits(verb, call.verb) && fits(resource, &call.resource)).cloned().collect()
    }

    fn begin(&self, call: &Call) -> (usize, Option<Fault>) {
        let mut inner = self.inner.lock().unwrap();
        let found =
            inner.rules.iter().position(|rule| fits(rule.verb, call.verb) && fits(rule.resource, &call.resource));
        let fault = found.map(|at| match inner.rules[at].left {
            None => inner.rules[at].fault.clone(),
            Some(_) => inner.rules.remove(at).fault,
        });
        inner.calls.push(call.clone());
        (inner.calls.len() - 1, fault)
    }

    fn end(&self, at: usize, status: u16) {
        self.inner.lock().unwrap().calls[at].status = status;
    }
}

fn fits(wanted: &str, found: &str) -> bool {
    wanted == "*" || wanted == found
}

async fn serve(State(proxy): State<Proxy>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let path_and_query = parts.uri.path_and_query().map_or("/", |p| p.as_str()).to_owned();
    let call = Call::of(parts.method.as_str(), parts.uri.path(), parts.uri.query().unwrap_or_default());
    let (at, fault) = proxy.begin(&call);
    match fault {
        Some(Fault::Answer(code)) => {
            proxy.end(at, code);
            return refusal(code, &call);
        }
        Some(Fault::Broken) => return broken(),
        Some(Fault::Silence) => std::future::pending().await,
        Some(Fault::Held(ref until)) => {
            let mut until = until.clone();
            let _ = until.wait_for(|go| *go).await;
        }
        Some(Fault::Gone) => {
            proxy.end(at, 410);
            let event = json!({"type": "ERROR", "object": status(410, &call)}).to_string() + "\n";
            return ([(header::CONTENT_TYPE, "application/json")], event).into_response();
        }
        _ => {}
    }
    let body = axum::body::to_bytes(body, 64 << 20).await.unwrap_or_default();
    let mut headers = parts.headers;
    headers.remove(header::HOST);
    headers.remove(header::ACCEPT_ENCODING);
    let url = format!("{}{path_and_query}", proxy.server.trim_end_matches('/'));
    let sent = proxy.client.request(parts.method, url).headers(headers).body(body).send().await;
    let Ok(answer) = sent else { return broken() };
    proxy.end(at, answer.status().as_u16());
    if let Some(Fault::Lost) = fault {
        let _ = answer.bytes().await;
        return broken();
    }
    let mut response = Response::builder().status(answer.status());
    for (name, value) in answer.headers() {
        if name != header::TRANSFER_ENCODING && name != header::CONTENT_LENGTH {
            response = response.header(name, value);
        }
    }
    let body = match fault {
        Some(Fault::Empty) => {
            let mut list: Value = serde_json::from_slice(&answer.bytes().await.unwrap_or_default()).unwrap();
            list["items"] = json!([]);
            if let Some(metadata) = list["metadata"].as_object_mut() {
                metadata.remove("continue");
            }
            Body::from(list.to_string())
        }
        _ if call.verb == "watch" => {
            let mut cut = proxy.cut.subscribe();
            cut.mark_unchanged();
            let twice = matches!(fault, Some(Fault::Twice));
            let events = lines(answer)
                .flat_map(move |line| futures::stream::iter(std::iter::repeat_n(line, if twice { 2 } else { 1 })));
            let cut = Box::pin(async move {
                let _ = cut.changed().await;
            });
            Body::from_stream(events.map(Ok::<_, std::io::Error>).take_until(cut))
        }
        _ => Body::from_stream(answer.bytes_stream()),
    };
    response.body(body).unwrap()
}

/// An answer's lines, as they come.
fn lines(answer: reqwest::Response) -> impl futures::Stream<Item = Bytes> {
    futures::stream::unfold((answer, Vec::new()), |(mut answer, mut buffer)| async move {
        loop {
            if let Some(end) = buffer.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=end).collect();
                return Some((Bytes::from(line), (answer, buffer)));
            }
            match answer.chunk().await {
                Ok(Some(chunk)) => buffer.extend_from_slice(&chunk),
                _ => return None,
            }
        }
    })
}

fn status(code: u16, call: &Call) -> Value {
    let reason = match code {
        403 => "Forbidden",
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        429 => "TooManyRequests",
        503 => "ServiceUnavailable",
        504 => "Timeout",
        _ => "InternalError",
    };
    let message = format!("the proxy of the test refuses to {} {} {}", call.verb, call.resource, call.name);
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "code": code, "message": message})
}

fn refusal(code: u16, call: &Call) -> Response {
    let code_of_http = StatusCode::from_u16(code).unwrap();
    (code_of_http, [(header::CONTENT_TYPE, "application/json")], status(code, call).to_string()).into_response()
}

/// An answer that breaks off before its first byte.
fn broken() -> Response {
    let error = std::io::Error::new(std::io::ErrorKind::ConnectionReset, "the proxy of the test broke it");
    Response::new(Body::from_stream(futures::stream::once(async move {
        // The head is out by then or not: neither is an answer.
        tokio::time::sleep(Duration::from_millis(1)).await;
        Err::<Bytes, _>(error)
    })))
}
