//! The way to containerd's gRPC API: one channel, our namespace, a deadline on every call, leases.
//!
//! Callers use the generated clients of `containerd-client` through [`Containerd`], which adds what no call may lack:
//! the namespace, the lease and the deadline. Built against containerd 1.6; 1.7 and 2.x answer the same calls.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::containers_client::ContainersClient;
use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::diff_client::DiffClient;
use containerd_client::services::v1::events_client::EventsClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::services::v1::namespaces_client::NamespacesClient;
use containerd_client::services::v1::snapshots::snapshots_client::SnapshotsClient;
use containerd_client::services::v1::snapshots::{Info, ListSnapshotsRequest};
use containerd_client::services::v1::tasks_client::TasksClient;
use containerd_client::services::v1::version_client::VersionClient;
use hyper_util::rt::TokioIo;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// Longest a call may take that moves no bulk data.
pub const CALL_DEADLINE: Duration = Duration::from_secs(30);

/// A connection to one containerd, in one of its namespaces. Cheap to clone; reconnects by itself.
#[derive(Clone, Debug)]
pub struct Containerd {
    channel: Channel,
    namespace: MetadataValue<Ascii>,
    namespace_name: String,
    address: PathBuf,
}

/// What went wrong between us and containerd: which call, on what, and its answer.
#[derive(Debug, thiserror::Error)]
#[error("containerd: {call} {object}: {}", .status.message())]
pub struct CallFailed {
    /// The call, in the words of containerd's API, for example `create task`.
    pub call: &'static str,
    /// What it was called on.
    pub object: String,
    /// containerd's answer. Boxed: it is large, and errors travel far.
    pub status: Box<Status>,
}

impl CallFailed {
    /// Whether the object is not there.
    pub fn is_not_found(&self) -> bool {
        self.status.code() == Code::NotFound
    }

    /// Whether the object is there already.
    pub fn is_already_exists(&self) -> bool {
        self.status.code() == Code::AlreadyExists
    }

    /// Whether containerd itself was away: nothing is known of the call's effect. A status that containerd sent has no
    /// source; one that our side made of a broken connection or a deadline has.
    pub fn is_unavailable(&self) -> bool {
        self.status.code() == Code::Unavailable || std::error::Error::source(&*self.status).is_some()
    }

    /// Whether containerd, its shim or runc failed for the node's disk. gRPC has no code for that (1.6 to 2.x answer
    /// Unknown), so the words of strerror(3) that Go repeats are all there is; a miss only makes the reason less exact.
    pub fn is_storage(&self) -> bool {
        const WORDS: [&str; 5] = [
            "no space left on device",
            "read-only file system",
            "input/output error",
            "disk quota exceeded",
            "structure needs cleaning",
        ];
        WORDS.iter().any(|words| self.status.message().contains(words))
    }
}

/// Deletion of what is gone already is done.
pub fn gone<T>(result: Result<T, CallFailed>) -> Result<(), CallFailed> {
    match result {
        Err(error) if error.is_not_found() => Ok(()),
        done => done.map(drop),
    }
}

/// Adds to a gRPC answer which call it belongs to.
pub trait CallContext<T> {
    /// Names the call and its object.
    fn call(self, call: &'static str, object: impl Into<String>) -> Result<T, CallFailed>;
}

impl<T> CallContext<T> for Result<tonic::Response<T>, Status> {
    fn call(self, call: &'static str, object: impl Into<String>) -> Result<T, CallFailed> {
        match self {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => Err(CallFailed { call, object: object.into(), status: Box::new(status) }),
        }
    }
}

/// A namespace that containerd would not take.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no name for a containerd namespace: use letters, digits, '-', '_' and '.', at most 76")]
pub struct BadNamespace(String);

impl Containerd {
    /// Prepares a connection; it is made at the first call, and made again after containerd was away.
    pub fn new(address: &Path, namespace: &str) -> Result<Self, BadNamespace> {
        let legal = !namespace.is_empty()
            && namespace.len() <= 76
            && namespace.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        let header = namespace.parse().ok().filter(|_| legal).ok_or_else(|| BadNamespace(namespace.to_owned()))?;
        let path = address.to_path_buf();
        let channel = Endpoint::from_static("http://containerd.invalid")
            .connect_timeout(Duration::from_secs(5))
            .connect_with_connector_lazy(tower::service_fn(move |_| {
                let path = path.clone();
                async move { Ok::<_, std::io::Error>(TokioIo::new(tokio::net::UnixStream::connect(path).await?)) }
            }));
        Ok(Self { channel, namespace: header, namespace_name: namespace.to_owned(), address: address.to_path_buf() })
    }

    /// The containerd namespace that all calls are made in.
    pub fn namespace(&self) -> &str {
        &self.namespace_name
    }

    /// The socket.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// A request in our namespace, with the usual deadline.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        request.set_timeout(CALL_DEADLINE);
        request
    }

    /// All layers and versions of a snapshotter that match one of the filters, or all there are.
    pub async fn list_snapshots(&self, snapshotter: &str, filters: Vec<String>) -> Result<Vec<Info>, CallFailed> {
        let object = format!("snapshots of {snapshotter}");
        let failed = |status| CallFailed { call: "list", object: object.clone(), status: Box::new(status) };
        let request = ListSnapshotsRequest { snapshotter: snapshotter.to_owned(), filters };
        let mut pages = self.snapshots().list(self.request(request)).await.map_err(failed)?.into_inner();
        let mut found = Vec::new();
        while let Some(page) = pages.message().await.map_err(failed)? {
            found.extend(page.info);
        }
        Ok(found)
    }

    /// The same under a lease: what the call makes is safe from the collector while the lease lives (containerd #3787).
    pub fn leased<T>(&self, lease: &LeaseId, message: T) -> Request<T> {
        let mut request = self.request(message);
        request.metadata_mut().insert("containerd-lease", lease.0.clone());
        request
    }

    /// Containers: records, not processes.
    pub fn containers(&self) -> ContainersClient<Channel> {
        ContainersClient::new(self.channel.clone())
    }
    /// Tasks: processes.
    pub fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel.clone())
    }
    /// Snapshots: layers.
    pub fn snapshots(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.channel.clone())
    }
    /// Content: blobs.
    pub fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel.clone())
    }
    /// Diff: unpacks blobs into layers.
    pub fn diff(&self) -> DiffClient<Channel> {
        DiffClient::new(self.channel.clone())
    }
    /// Images: names for digests.
    pub fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel.clone())
    }
    /// Leases: what the collector must leave.
    pub fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel.clone())
    }
    /// Events.
    pub fn events(&self) -> EventsClient<Channel> {
        EventsClient::new(self.channel.clone())
    }
    /// Namespaces.
    pub fn namespaces(&self) -> NamespacesClient<Channel> {
        NamespacesClient::new(self.channel.clone())
    }
    /// Which plugins work.
    pub fn introspection(&self) -> IntrospectionClient<Channel> {
        IntrospectionClient::new(self.channel.clone())
    }
    /// Version.
    pub fn version(&self) -> VersionClient<Channel> {
        VersionClient::new(self.channel.clone())
    }
}

/// Id of a lease, known to fit into a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseId(MetadataValue<Ascii>);

impl LeaseId {
    /// The id, if containerd takes it: letters, digits, '-', '_' and '.', at most 76.
    pub fn parse(id: &str) -> Option<Self> {
        let legal = !id.is_empty()
            && id.len() <= 76
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        id.parse().ok().filter(|_| legal).map(Self)
    }

    /// The id as text.
    pub fn as_str(&self) -> &str {
        // `parse` admits ASCII letters, digits and three signs only, all of which are visible.
        self.0.to_str().unwrap_or_default()
    }
}
