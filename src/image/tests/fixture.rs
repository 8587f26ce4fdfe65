//! A containerd of our own, a registry that misbehaves on demand, and images made of plain bytes.

use std::collections::{HashMap, VecDeque};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use containerd_client::services::v1::{
    CreateRequest, DeleteRequest, ListContentRequest, ListImagesRequest, ListRequest, ListStatusesRequest,
};
use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::containerd::Containerd;
use crate::image::store::Store;
use crate::image::{Credentials, Digest, Image, ImageError, ImageOptions, Images, Reference};

pub const SNAPSHOTTER: &str = "overlayfs";
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// A containerd in a folder of its own, gone when dropped.
pub struct Node {
    child: Child,
    root: PathBuf,
    pub containerd: Containerd,
}

impl Node {
    pub async fn start() -> Self {
        // A second test in the same process finds it installed.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("berth-images-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&root).unwrap();
        let socket = root.join("s");
        let config = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\noom_score = 0\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\", \
             \"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \
             \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.devmapper\"]\n\
             [grpc]\n  address = {socket:?}\n",
            root.join("root"),
            root.join("state"),
        );
        std::fs::write(root.join("config.toml"), config).unwrap();
        let child = spawn(&root);
        let containerd = Containerd::new(&socket, "images").unwrap();
        let node = Self { child, root, containerd };
        node.wait_until_up().await;
        node
    }

    async fn wait_until_up(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        while self.containerd.version().version(self.containerd.request(())).await.is_err() {
            assert!(Instant::now() < until, "containerd did not start: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// SIGKILL to containerd.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub async fn start_again(&mut self) {
        self.child = spawn(&self.root);
        self.wait_until_up().await;
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.root.join("log")).unwrap_or_default()
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn store(&self) -> Store {
        Store::new(self.containerd.clone())
    }

    pub fn images(&self, options: ImageOptions) -> Images {
        Images::new(self.containerd.clone(), options)
    }

    /// Runs the collector, and returns when it is done.
    pub async fn collect_garbage(&self) {
        let id = format!("gc-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let create = CreateRequest { id: id.clone(), labels: HashMap::new() };
        self.containerd.leases().create(self.containerd.request(create)).await.unwrap();
        self.containerd.leases().delete(self.containerd.request(DeleteRequest { id, sync: true })).await.unwrap();
    }

    /// How many of each there are: blobs, half-written blobs, snapshots, records, leases.
    pub async fn counts(&self) -> Counts {
        let c = &self.containerd;
        let mut blobs = 0;
        let list = c.request(ListContentRequest::default());
        let mut stream = c.content().list(list).await.unwrap().into_inner();
        while let Some(part) = stream.message().await.unwrap() {
            blobs += part.info.len();
        }
        let statuses = c.request(ListStatusesRequest::default());
        let ingests = c.content().list_statuses(statuses).await.unwrap().into_inner().statuses.len();
        let snapshots = self.store().snapshots(SNAPSHOTTER).await.unwrap().len();
        let records = c.images().list(c.request(ListImagesRequest::default())).await.unwrap().into_inner().images.len();
        let leases = c.leases().list(c.request(ListRequest::default())).await.unwrap().into_inner().leases.len();
        Counts { blobs, ingests, snapshots, records, leases }
    }

    /// Waits until nothing at all is left.
    pub async fn wait_for_nothing(&self) {
        let until = Instant::now() + Duration::from_secs(20);
        loop {
            let counts = self.counts().await;
            if counts == Counts::default() {
                return;
            }
            assert!(Instant::now() < until, "left behind: {counts:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A file of an unpacked image, read from the layers' folders, highest first.
    pub async fn read(&self, image: &Image, path: &str) -> Option<Vec<u8>> {
        let view = containerd_client::services::v1::snapshots::ViewSnapshotRequest {
            snapshotter: SNAPSHOTTER.to_owned(),
            key: format!("view-{}", NUMBER.fetch_add(1, Ordering::Relaxed)),
            parent: image.chain_id.clone(),
            labels: HashMap::new(),
        };
        let key = view.key.clone();
        let mounts = self.containerd.snapshots().view(self.containerd.request(view)).await.unwrap().into_inner().mounts;
        let mount = &mounts[0];
        let folders: Vec<&str> = match mount.r#type.as_str() {
            "bind" => vec![&mount.source],
            _ => mount.options.iter().find_map(|o| o.strip_prefix("lowerdir=")).unwrap().split(':').collect(),
        };
        let found = folders.iter().find_map(|f| std::fs::read(Path::new(f).join(path)).ok());
        self.store().remove_snapshot(SNAPSHOTTER, &key).await.unwrap();
        found
    }
}

fn spawn(root: &Path) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(root.join("log")).unwrap();
    Command::new("containerd")
        .arg("--config")
        .arg(root.join("config.toml"))
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .expect("containerd is installed")
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("containerd's log:\n{}", self.log());
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub blobs: usize,
    pub ingests: usize,
    pub snapshots: usize,
    pub records: usize,
    pub leases: usize,
}

/// What the registry does instead of answering as it should.
#[derive(Clone)]
pub enum Fault {
    Status(u16),
    /// Answers nothing at all.
    Silence,
    /// Sends so many bytes, then nothing.
    Stall(usize),
    /// Sends so many bytes, then hangs up.
    Cut(usize),
    /// Sends other bytes than it should, and their length.
    Bytes(Vec<u8>),
    /// Never stops sending.
    Endless,
    /// Too many requests; come again after so many seconds.
    Later(u64),
    /// Look there.
    Redirect(String),
}

#[derive(Clone)]
pub enum Wants {
    Nothing,
    Basic(String),
    Bearer(String),
}

pub struct Content {
    pub manifests: HashMap<String, (String, Vec<u8>)>,
    pub blobs: HashMap<String, Vec<u8>>,
    /// By the end of the path. The last one stays.
    pub faults: HashMap<String, VecDeque<Fault>>,
    pub wants: Wants,
    pub ranges: bool,
    pub requests: Vec<String>,
    /// What was shown as `Authorization`, in order.
    pub shown: Vec<String>,
}

/// A registry on loopback.
#[derive(Clone)]
pub struct Registry {
    pub host: String,
    content: Arc<Mutex<Content>>,
}

impl Registry {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let content = Content {
            manifests: HashMap::new(),
            blobs: HashMap::new(),
            faults: HashMap::new(),
            wants: Wants::Nothing,
            ranges: true,
            requests: Vec::new(),
            shown: Vec::new(),
        };
        let host = listener.local_addr().unwrap().to_string();
        let registry = Self { host, content: Arc::new(Mutex::new(content)) };
        let router = axum::Router::new().fallback(answer).with_state(registry.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        registry
    }

    pub fn content(&self) -> std::sync::MutexGuard<'_, Content> {
        self.content.lock().unwrap()
    }

    pub fn reference(&self, rest: &str) -> Reference {
        Reference::parse(&format!("{}/{rest}", self.host)).unwrap()
    }

    pub fn fault(&self, path_end: &str, faults: impl IntoIterator<Item = Fault>) {
        self.content().faults.insert(path_end.to_owned(), faults.into_iter().collect());
    }

    /// How often something was asked for, by method and the end of the path.
    pub fn asked(&self, method: &str, path_part: &str) -> usize {
        let content = self.content();
        content.requests.iter().filter(|r| r.starts_with(method) && r.contains(path_part)).count()
    }

    /// Puts an image there, by tag and digest; gives the manifest's digest.
    pub fn push(&self, tag: &str, image: &Made) -> Digest {
        let mut content = self.content();
        for blob in image.layers.iter().map(|l| &l.blob).chain([&image.config]) {
            content.blobs.insert(Digest::of(blob).to_string(), blob.clone());
        }
        put(&mut content, tag, &image.manifest)
    }

    /// Puts an index there: platform and image each.
    pub fn push_index(&self, tag: &str, images: &[(&str, &Made)]) -> Digest {
        let entries: Vec<Value> = images
            .iter()
            .map(|(arch, image)| {
                let digest = self.push(&format!("{tag}-{arch}"), image);
                json!({
                    "mediaType": OCI_MANIFEST, "digest": digest.as_str(), "size": image.manifest.to_string().len(),
                    "platform": {"os": "linux", "architecture": arch},
                })
            })
            .collect();
        let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
        put(&mut self.content(), tag, &index)
    }

    /// Puts an image there below so many indexes, each with the next one alone in it.
    pub fn push_deep(&self, tag: &str, image: &Made, depth: usize) {
        let mut digest = self.push(&format!("{tag}-0"), image);
        let mut below = image.manifest.clone();
        for level in 1..=depth {
            let entry = json!({
                "mediaType": below["mediaType"], "digest": digest.as_str(), "size": below.to_string().len(),
                "platform": {"os": "linux", "architecture": std::env::consts::ARCH},
            });
            below = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry]});
            let name = if level == depth { tag.to_owned() } else { format!("{tag}-{level}") };
            digest = put(&mut self.content(), &name, &below);
        }
    }
}

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

fn put(content: &mut Content, tag: &str, manifest: &Value) -> Digest {
    let bytes = manifest.to_string().into_bytes();
    let digest = Digest::of(&bytes);
    let media_type = manifest["mediaType"].as_str().unwrap().to_owned();
    content.manifests.insert(tag.to_owned(), (media_type.clone(), bytes.clone()));
    content.manifests.insert(digest.to_string(), (media_type, bytes));
    digest
}

async fn answer(State(registry): State<Registry>, request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let (fault, wants) = {
        let mut content = registry.content();
        content.requests.push(format!("{} {path}", request.method()));
        let shown = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        content.shown.extend(shown.map(str::to_owned));
        let faults = content.faults.iter_mut().find(|(end, _)| path.ends_with(end.as_str())).map(|(_, f)| f);
        let fault = faults.and_then(|f| if f.len() > 1 { f.pop_front() } else { f.front().cloned() });
        (fault, content.wants.clone())
    };
    if path == "/token" {
        match fault {
            Some(Fault::Bytes(bytes)) => return Response::new(Body::from(bytes)),
            Some(Fault::Endless) => return Response::new(endless()),
            Some(fault) => return serve(&registry, request.method(), &path, request.headers(), Some(fault)).await,
            None => {}
        }
        let shown = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok());
        let Wants::Bearer(login) = wants else { return status(404) };
        return match shown {
            Some(basic) if basic == login => Response::new(Body::from(r#"{"token":"good"}"#)),
            _ => status(401),
        };
    }
    let shown = request.headers().get(header::AUTHORIZATION).and_then(|v| v.to_str().ok()).unwrap_or_default();
    let (welcome, challenge) = match &wants {
        Wants::Nothing => (true, String::new()),
        Wants::Basic(login) => (shown == login, "Basic realm=\"test\"".to_owned()),
        Wants::Bearer(_) => {
            (shown == "Bearer good", format!("Bearer realm=\"http://{}/token\",service=\"test\"", registry.host))
        }
    };
    if !welcome {
        let mut refusal = status(401);
        refusal.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.parse().unwrap());
        return refusal;
    }
    serve(&registry, request.method(), &path, request.headers(), fault).await
}

async fn serve(
    registry: &Registry,
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    fault: Option<Fault>,
) -> Response {
    match &fault {
        Some(Fault::Status(code)) => return status(*code),
        Some(Fault::Silence) => return std::future::pending().await,
        Some(Fault::Later(seconds)) => {
            let mut refusal = status(429);
            refusal.headers_mut().insert(header::RETRY_AFTER, (*seconds).into());
            return refusal;
        }
        Some(Fault::Redirect(to)) => {
            let mut away = status(307);
            away.headers_mut().insert(header::LOCATION, to.parse().unwrap());
            return away;
        }
        _ => {}
    }
    let name = path.rsplit('/').next().unwrap();
    let (media_type, bytes, ranges) = {
        let content = registry.content();
        if path.contains("/manifests/") {
            match content.manifests.get(name) {
                Some((media_type, bytes)) => (media_type.clone(), bytes.clone(), false),
                None => return status(404),
            }
        } else {
            match content.blobs.get(name) {
                Some(bytes) => ("application/octet-stream".to_owned(), bytes.clone(), content.ranges),
                None => return status(404),
            }
        }
    };
    let digest = Digest::of(&bytes).to_string();
    let mut response =
        Response::builder().header(header::CONTENT_TYPE, media_type).header("docker-content-digest", digest);
    if method == Method::HEAD {
        return response.header(header::CONTENT_LENGTH, bytes.len()).body(Body::empty()).unwrap();
    }
    let from = headers
        .get(header::RANGE)
        .and_then(|v| v.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let from: usize = from.filter(|_| ranges).unwrap_or(0);
    if from > 0 {
        let range = format!("bytes {from}-{}/{}", bytes.len() - 1, bytes.len());
        response = response.status(StatusCode::PARTIAL_CONTENT).header(header::CONTENT_RANGE, range);
    }
    let rest = bytes[from..].to_vec();
    let part = |n: usize| rest[..n.min(rest.len())].to_vec();
    let body = match fault {
        Some(Fault::Bytes(other)) => Body::from(other),
        Some(Fault::Endless) => endless(),
        Some(Fault::Stall(n)) => {
            response = response.header(header::CONTENT_LENGTH, rest.len());
            let first = futures::stream::iter([Ok::<_, std::io::Error>(part(n))]);
            Body::from_stream(first.chain(futures::stream::pending()))
        }
        Some(Fault::Cut(n)) => {
            response = response.header(header::CONTENT_LENGTH, rest.len());
            let first = futures::stream::iter([Ok(part(n)), Err(std::io::Error::other("cut"))]);
            // The error must not overtake the bytes.
            Body::from_stream(first.then(|item| async move {
                tokio::time::sleep(Duration::from_millis(100)).await;
                item
            }))
        }
        _ => Body::from(rest),
    };
    response.body(body).unwrap()
}

fn endless() -> Body {
    Body::from_stream(futures::stream::repeat(vec![b' '; 64 * 1024]).map(Ok::<_, std::io::Error>))
}

fn status(code: u16) -> Response {
    Response::builder().status(code).body(Body::from("no")).unwrap()
}

/// An image as bytes, ready to be pushed.
#[derive(Clone)]
pub struct Made {
    pub layers: Vec<Layer>,
    pub config: Vec<u8>,
    pub manifest: Value,
}

#[derive(Clone)]
pub struct Layer {
    pub media_type: String,
    pub blob: Vec<u8>,
    pub diff_id: Digest,
}

#[derive(Clone, Copy)]
pub enum Packed {
    Plain,
    Gzip,
    Zstd,
}

/// A layer of some files.
pub fn layer(packed: Packed, files: &[(&str, &[u8])]) -> Layer {
    let mut tar = Vec::new();
    for (path, content) in files {
        tar.extend(tar_header(path, content.len() as u64));
        tar.extend_from_slice(content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + 1024, 0);
    layer_of_tar(packed, &tar)
}

pub fn layer_of_tar(packed: Packed, tar: &[u8]) -> Layer {
    let (kind, blob) = match packed {
        Packed::Plain => ("", tar.to_vec()),
        Packed::Gzip => ("+gzip", through("gzip", &["-1", "-n", "-c"], tar)),
        Packed::Zstd => ("+zstd", through("zstd", &["-q", "-1", "-c"], tar)),
    };
    Layer { media_type: format!("application/vnd.oci.image.layer.v1.tar{kind}"), blob, diff_id: Digest::of(tar) }
}

fn through(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program).args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writing = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    writing.join().unwrap().unwrap();
    assert!(output.status.success(), "{program} failed");
    output.stdout
}

/// One ustar header of a regular file (POSIX.1-2017, pax, "ustar Interchange Format").
pub fn tar_header(path: &str, size: u64) -> [u8; 512] {
    let mut header = [0u8; 512];
    header[..path.len()].copy_from_slice(path.as_bytes());
    header[100..107].copy_from_slice(b"0000755");
    header[108..115].copy_from_slice(b"0000000");
    header[116..123].copy_from_slice(b"0000000");
    header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[148..156].copy_from_slice(b"        ");
    header[156] = b'0';
    header[257..263].copy_from_slice(b"ustar\0");
    header[263..265].copy_from_slice(b"00");
    let sum: u32 = header.iter().map(|&b| u32::from(b)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

pub fn image(layers: &[Layer]) -> Made {
    image_for(std::env::consts::ARCH, layers)
}

pub fn image_for(architecture: &str, layers: &[Layer]) -> Made {
    let diff_ids: Vec<&str> = layers.iter().map(|l| l.diff_id.as_str()).collect();
    let config = json!({
        "os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "config": {
            "Entrypoint": ["/bin/app"], "Env": ["PATH=/bin"],
            "Labels": {"containerd.io/gc.root": "true", "evil": "true"},
        },
    });
    assemble(config, layers)
}

pub fn assemble(config: Value, layers: &[Layer]) -> Made {
    let config = config.to_string().into_bytes();
    let descriptors: Vec<Value> = layers
        .iter()
        .map(|l| {
            json!({
                "mediaType": l.media_type, "digest": Digest::of(&l.blob).as_str(), "size": l.blob.len(),
                "annotations": {"containerd.io/gc.root": "true"},
            })
        })
        .collect();
    let manifest = json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config).as_str(),
            "size": config.len(),
        },
        "layers": descriptors, "annotations": {"containerd.io/gc.root": "true"},
    });
    Made { layers: layers.to_vec(), config, manifest }
}

/// Options that fail soon.
pub fn hasty() -> ImageOptions {
    ImageOptions {
        stall_timeout: Duration::from_secs(1),
        blob_retry_delay: Duration::from_millis(10),
        blob_tries: 3,
        max_unpacked_bytes: 64 << 20,
        ..ImageOptions::default()
    }
}

/// Pulls without credentials.
pub async fn pull(images: &Images, reference: &Reference) -> Result<Image, ImageError> {
    images.pull(reference, SNAPSHOTTER, &Credentials::anonymous()).await
}

/// Bytes that don't compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(length)
    .collect()
}
