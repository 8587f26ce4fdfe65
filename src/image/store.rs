//! containerd's side of an image: blobs, snapshots, records, and the lease that holds them until the image does.
//!
//! ```text
//! Image record ─> index ─(m.0)─> manifest ─(config)─> config blob ─(gc.ref.snapshot.overlayfs)─> top snapshot ─> parents
//!                                         └(l.0, l.1 …)─> layer blobs
//! ```
//!
//! The arrows are labels that containerd's collector follows (containerd, docs/garbage-collection.md); what no arrow,
//! lease or container reaches is collected. Labels are made of digests alone: nothing that an image says of itself
//! (labels, annotations) ever becomes one.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info as SnapshotInfo, Kind, PrepareSnapshotRequest, RemoveSnapshotRequest,
    StatSnapshotRequest, UsageRequest,
};
use containerd_client::services::v1::{
    AbortRequest, AddResourceRequest, ApplyRequest, CreateImageRequest, CreateRequest, DeleteImageRequest,
    DeleteRequest, GetImageRequest, Image as ImageRecord, Info as ContentInfo, InfoRequest, ListImagesRequest,
    ListRequest, ReadContentRequest, Resource, UpdateImageRequest, UpdateRequest, WriteAction, WriteContentRequest,
    WriteContentResponse,
};
use containerd_client::types::{Descriptor as WireDescriptor, Mount};
use futures::SinkExt as _;
use futures::channel::mpsc;
use prost_types::FieldMask;
use tonic::{Code, Request, Streaming};

use super::manifest::Descriptor;
use super::reference::Digest;
use crate::containerd::{CallContext as _, CallFailed, Containerd, LeaseId, gone};

/// On image records and snapshots that are ours to collect.
pub(crate) const OURS: &str = "berth.dev/image";
/// On image records of versions: they go with their version, and are no images to be collected.
const EXPORTED: &str = "berth.dev/exported";
/// On leases of pulls.
const LEASE: &str = "berth.dev/image-pull";
const LEASE_PREFIX: &str = "berth-pull-";
/// The collector ends a lease at this time. Ours outlive an agent that died by this much at most.
const LEASE_LIFE: Duration = Duration::from_secs(3600);
const LEASE_RENEWAL: Duration = Duration::from_secs(1200);
const LEASE_RENEWAL_RETRY: Duration = Duration::from_secs(30);
const GC_EXPIRE: &str = "containerd.io/gc.expire";
const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Layers are unpacked under this name and the chain id, and committed under the chain id alone.
pub(crate) const EXTRACT_PREFIX: &str = "berth-extract-";

/// The calls that images need, on one containerd.
#[derive(Clone)]
pub(crate) struct Store {
    containerd: Containerd,
}

/// How an image record came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Made {
    /// From a registry.
    Pulled,
    /// Of a version.
    Exported,
}

/// A small blob, read whole.
pub(crate) struct Blob {
    pub bytes: Vec<u8>,
    pub labels: HashMap<String, String>,
}

/// How a snapshot's use of the disk grew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    pub bytes: u64,
    pub inodes: u64,
}

impl Usage {
    pub fn since(self, before: Self) -> Self {
        Self { bytes: self.bytes.saturating_sub(before.bytes), inodes: self.inodes.saturating_sub(before.inodes) }
    }
    pub fn and(self, more: Self) -> Self {
        Self { bytes: self.bytes.saturating_add(more.bytes), inodes: self.inodes.saturating_add(more.inodes) }
    }
}

/// For calls that move bulk data: they end by progress, not by the clock.
fn unhurried<T>(mut request: Request<T>) -> Request<T> {
    request.metadata_mut().remove("grpc-timeout");
    request
}

fn found<T>(result: Result<T, CallFailed>) -> Result<Option<T>, CallFailed> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.is_not_found() => Ok(None),
        Err(e) => Err(e),
    }
}

impl Store {
    pub fn new(containerd: Containerd) -> Self {
        Self { containerd }
    }

    /// Containerd's namespace that all of it is in.
    pub fn namespace(&self) -> &str {
        self.containerd.namespace()
    }

    // Content

    /// What is known of a blob.
    pub async fn content(&self, digest: &Digest) -> Result<Option<ContentInfo>, CallFailed> {
        let request = self.containerd.request(InfoRequest { digest: digest.to_string() });
        let info = found(self.containerd.content().info(request).await.call("get content", digest.as_str()))?;
        Ok(info.and_then(|i| i.info))
    }

    /// A small blob and its labels, or `None` when it is not there or is larger than `max` bytes.
    pub async fn read(&self, digest: &Digest, max: u64) -> Result<Option<Blob>, CallFailed> {
        let Some(info) = self.content(digest).await? else { return Ok(None) };
        let size = u64::try_from(info.size).unwrap_or(u64::MAX);
        if size > max {
            return Ok(None);
        }
        let request = self.containerd.request(ReadContentRequest { digest: digest.to_string(), offset: 0, size: 0 });
        let answer = self.containerd.content().read(request).await.call("read content", digest.as_str());
        let Some(mut stream) = found(answer)? else { return Ok(None) };
        let mut bytes = Vec::new();
        loop {
            let next = stream.message().await.map(tonic::Response::new).call("read content", digest.as_str())?;
            let Some(part) = next else { return Ok(Some(Blob { bytes, labels: info.labels })) };
            bytes.extend_from_slice(&part.data);
            if bytes.len() as u64 > size {
                return Ok(None);
            }
        }
    }

    /// Sets labels on a blob where they are not set already.
    pub async fn label(&self, digest: &Digest, labels: HashMap<String, String>) -> Result<(), CallFailed> {
        let has = self.content(digest).await?.map(|i| i.labels).unwrap_or_default();
        if labels.iter().all(|(name, value)| has.get(name) == Some(value)) {
            return Ok(());
        }
        let paths = labels.keys().map(|name| format!("labels.{name}")).collect();
        let info = ContentInfo { digest: digest.to_string(), labels, ..ContentInfo::default() };
        let request = UpdateRequest { info: Some(info), update_mask: Some(FieldMask { paths }) };
        let request = self.containerd.request(request);
        self.containerd.content().update(request).await.call("label content", digest.as_str()).map(drop)
    }

    /// Opens a blob for writing, going on where an earlier try was cut off. `None`: it is there already, and the lease
    /// now holds it.
    pub async fn write(&self, lease: &LeaseId, blob: &Descriptor) -> Result<Option<BlobWriter>, CallFailed> {
        let reference = ingest_name(&blob.digest);
        let (mut to, stream) = mpsc::channel(1);
        let first = WriteContentRequest {
            action: WriteAction::Stat as i32,
            r#ref: reference.clone(),
            total: i64::try_from(blob.size).unwrap_or(i64::MAX),
            expected: blob.digest.to_string(),
            ..WriteContentRequest::default()
        };
        // The server answers nothing, not even headers, before it has the first message.
        if to.send(first).await.is_err() {
            // Unreachable: we hold the receiving end. Said as what it would be, a call that did not happen.
            let status = tonic::Status::internal("the request ended before it was sent");
            return Err(CallFailed { call: "write content", object: reference, status: Box::new(status) });
        }
        let request = unhurried(self.containerd.leased(lease, stream));
        let answer = self.containerd.content().write(request).await.call("write content", blob.digest.as_str());
        let mut writer = match answer {
            Ok(from) => BlobWriter { to, from, offset: 0, digest: blob.digest.clone(), size: blob.size },
            Err(e) if e.is_already_exists() => return Ok(None),
            Err(e) => return Err(e),
        };
        match writer.answer().await {
            Ok(status) => writer.offset = u64::try_from(status.offset).unwrap_or(0),
            Err(e) if e.is_already_exists() => return Ok(None),
            Err(e) => return Err(e),
        }
        Ok(Some(writer))
    }

    /// Forgets what was written of a blob so far.
    pub async fn abort(&self, digest: &Digest) -> Result<(), CallFailed> {
        let request = self.containerd.request(AbortRequest { r#ref: ingest_name(digest) });
        gone(self.containerd.content().abort(request).await.call("abort content", digest.as_str()))
    }

    // Snapshots

    pub async fn snapshot(&self, snapshotter: &str, key: &str) -> Result<Option<SnapshotInfo>, CallFailed> {
        let request = StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let request = self.containerd.request(request);
        let answer = found(self.containerd.snapshots().stat(request).await.call("stat snapshot", key))?;
        Ok(answer.and_then(|a| a.info))
    }

    /// Whether a layer was unpacked whole: only then is there a committed snapshot of its chain id.
    pub async fn is_unpacked(&self, snapshotter: &str, chain_id: &Digest) -> Result<bool, CallFailed> {
        let info = self.snapshot(snapshotter, chain_id.as_str()).await?;
        Ok(info.is_some_and(|i| i.kind == Kind::Committed as i32))
    }

    pub async fn prepare(
        &self,
        lease: &LeaseId,
        snapshotter: &str,
        key: &str,
        parent: &str,
    ) -> Result<Vec<Mount>, CallFailed> {
        let request = PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: HashMap::from([(OURS.to_owned(), "extract".to_owned())]),
        };
        let request = self.containerd.leased(lease, request);
        Ok(self.containerd.snapshots().prepare(request).await.call("prepare snapshot", key)?.mounts)
    }

    /// Gives an unpacked layer its name. That it has one already is as good: the same layers give the same name.
    pub async fn commit(&self, lease: &LeaseId, snapshotter: &str, key: &str, name: &str) -> Result<(), CallFailed> {
        let request = CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: HashMap::from([(OURS.to_owned(), "layer".to_owned())]),
        };
        let request = unhurried(self.containerd.leased(lease, request));
        match self.containerd.snapshots().commit(request).await.call("commit snapshot", key) {
            Err(e) if e.is_already_exists() => self.remove_snapshot(snapshotter, key).await,
            other => other.map(drop),
        }
    }

    pub async fn remove_snapshot(&self, snapshotter: &str, key: &str) -> Result<(), CallFailed> {
        let request = RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let request = self.containerd.request(request);
        gone(self.containerd.snapshots().remove(request).await.call("remove snapshot", key))
    }

    /// What a snapshot takes on the disk. Walks its tree, so it may take as long as that is large.
    pub async fn usage(&self, snapshotter: &str, key: &str) -> Result<Usage, CallFailed> {
        let request = UsageRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let request = unhurried(self.containerd.request(request));
        let usage = self.containerd.snapshots().usage(request).await.call("measure snapshot", key)?;
        let count = |n: i64| u64::try_from(n).unwrap_or(0);
        Ok(Usage { bytes: count(usage.size), inodes: count(usage.inodes) })
    }

    /// Unpacks a layer onto mounts and says the digest of what it unpacked. Dropping the future cancels it in containerd
    /// at the next file or the next 32 KiB of one.
    pub async fn apply(
        &self,
        lease: &LeaseId,
        layer: &Descriptor,
        mounts: Vec<Mount>,
    ) -> Result<Option<Digest>, CallFailed> {
        let diff = WireDescriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.to_string(),
            size: i64::try_from(layer.size).unwrap_or(i64::MAX),
            annotations: HashMap::new(),
        };
        let request = ApplyRequest { diff: Some(diff), mounts, ..ApplyRequest::default() };
        let request = unhurried(self.containerd.leased(lease, request));
        let answer = self.containerd.diff().apply(request).await.call("apply layer", layer.digest.as_str())?;
        Ok(answer.applied.and_then(|d| Digest::parse(&d.digest)))
    }

    pub async fn snapshots(&self, snapshotter: &str) -> Result<Vec<SnapshotInfo>, CallFailed> {
        self.containerd.list_snapshots(snapshotter, Vec::new()).await
    }

    // Records

    pub async fn record(&self, name: &str) -> Result<Option<ImageRecord>, CallFailed> {
        let request = self.containerd.request(GetImageRequest { name: name.to_owned() });
        let answer = found(self.containerd.images().get(request).await.call("get image", name))?;
        Ok(answer.and_then(|a| a.image))
    }

    pub async fn records(&self) -> Result<Vec<ImageRecord>, CallFailed> {
        let request = self.containerd.request(ListImagesRequest { filters: Vec::new() });
        Ok(self.containerd.images().list(request).await.call("list images", self.containerd.namespace())?.images)
    }

    /// Makes a name mean a digest. `made`: how it came to be; what was pulled may be collected. A record that is there already
    /// keeps its labels, and so its maker.
    pub async fn set_record(&self, name: &str, target: &Descriptor, made: Made) -> Result<(), CallFailed> {
        let wire = WireDescriptor {
            media_type: target.media_type.clone(),
            digest: target.digest.to_string(),
            size: i64::try_from(target.size).unwrap_or(i64::MAX),
            annotations: HashMap::new(),
        };
        let image = ImageRecord {
            name: name.to_owned(),
            labels: HashMap::from([match made {
                Made::Pulled => (OURS.to_owned(), "pulled".to_owned()),
                Made::Exported => (EXPORTED.to_owned(), "true".to_owned()),
            }]),
            target: Some(wire),
            ..ImageRecord::default()
        };
        let request = CreateImageRequest { image: Some(image.clone()), ..CreateImageRequest::default() };
        match self.containerd.images().create(self.containerd.request(request)).await.call("create image", name) {
            Err(e) if e.is_already_exists() => {}
            other => return other.map(drop),
        }
        let mask = FieldMask { paths: vec!["target".to_owned()] };
        let request =
            UpdateImageRequest { image: Some(image), update_mask: Some(mask), ..UpdateImageRequest::default() };
        let request = self.containerd.request(request);
        self.containerd.images().update(request).await.call("update image", name).map(drop)
    }

    /// Removes a name. `sync`: what no longer belongs to anything is gone from the disk when this returns.
    pub async fn remove_record(&self, name: &str, sync: bool) -> Result<(), CallFailed> {
        let request = DeleteImageRequest { name: name.to_owned(), sync, ..DeleteImageRequest::default() };
        let request = unhurried(self.containerd.request(request));
        gone(self.containerd.images().delete(request).await.call("delete image", name))
    }

    // Leases

    /// Ends the leases of pulls that an agent did not live to end, and lets the collector have what they held.
    pub async fn end_all_leases(&self) -> Result<usize, CallFailed> {
        let request = ListRequest { filters: vec![format!("labels.\"{LEASE}\"")] };
        let answer = self.containerd.leases().list(self.containerd.request(request)).await;
        let leases = answer.call("list leases", LEASE)?.leases;
        let ours: Vec<_> = leases.into_iter().filter(|l| l.labels.contains_key(LEASE)).collect();
        for (i, lease) in ours.iter().enumerate() {
            self.end_lease(&lease.id, i + 1 == ours.len()).await?;
        }
        Ok(ours.len())
    }

    /// Adds to what a lease holds, by kind and id in the words of containerd's leases; whether or not it is there yet.
    pub async fn hold(&self, lease: &LeaseId, kind: &str, id: &str) -> Result<(), CallFailed> {
        let resource = Resource { id: id.to_owned(), r#type: kind.to_owned() };
        let request = AddResourceRequest { id: lease.as_str().to_owned(), resource: Some(resource) };
        self.containerd.leases().add_resource(self.containerd.request(request)).await.call("add to lease", id).map(drop)
    }

    async fn end_lease(&self, id: &str, sync: bool) -> Result<(), CallFailed> {
        let request = unhurried(self.containerd.request(DeleteRequest { id: id.to_owned(), sync }));
        gone(self.containerd.leases().delete(request).await.call("delete lease", id))
    }
}

fn ingest_name(digest: &Digest) -> String {
    format!("berth-{}", digest.hex())
}

/// A blob being written. Dropped, it stays half-written under its lease, for the next try to go on with.
pub(crate) struct BlobWriter {
    to: mpsc::Sender<WriteContentRequest>,
    from: Streaming<WriteContentResponse>,
    digest: Digest,
    size: u64,
    /// How many bytes are written.
    pub offset: u64,
}

impl BlobWriter {
    /// Writes on; returns once containerd has it.
    pub async fn write(&mut self, data: Vec<u8>) -> Result<(), CallFailed> {
        let length = data.len() as u64;
        let message = self.message(WriteAction::Write, data);
        self.send(message).await?;
        self.offset += length;
        Ok(())
    }

    /// Ends the blob; containerd compares size and digest, having hashed all that was written. Answers `false` when
    /// they are not as promised.
    pub async fn commit(mut self) -> Result<bool, CallFailed> {
        let message = self.message(WriteAction::Commit, Vec::new());
        match self.send(message).await {
            Ok(()) => Ok(true),
            Err(e) if e.is_already_exists() => Ok(true),
            Err(e) if e.status.code() == Code::FailedPrecondition => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Stops in the middle, and returns once containerd has let go of it, so that the next try is not refused.
    pub async fn suspend(self) {
        let Self { to, mut from, .. } = self;
        drop(to);
        // The answer to our hanging up says nothing that matters: the next try asks for the offset.
        let _ = tokio::time::timeout(Duration::from_secs(5), async { while let Ok(Some(_)) = from.message().await {} })
            .await;
    }

    fn message(&self, action: WriteAction, data: Vec<u8>) -> WriteContentRequest {
        WriteContentRequest {
            action: action as i32,
            r#ref: ingest_name(&self.digest),
            total: i64::try_from(self.size).unwrap_or(i64::MAX),
            // `expected` is sent at the start alone: with it, containerd looks the digest up at each message.
            expected: if action == WriteAction::Commit { self.digest.to_string() } else { String::new() },
            offset: i64::try_from(self.offset).unwrap_or(i64::MAX),
            data,
            labels: HashMap::new(),
        }
    }

    async fn send(&mut self, message: WriteContentRequest) -> Result<(), CallFailed> {
        // A closed channel means that the call ended; its answer says why.
        let _ = self.to.send(message).await;
        self.answer().await.map(drop)
    }

    async fn answer(&mut self) -> Result<WriteContentResponse, CallFailed> {
        let answer = self.from.message().await.and_then(|a| {
            a.map(tonic::Response::new).ok_or_else(|| tonic::Status::unavailable("the call ended without an answer"))
        });
        answer.call("write content", self.digest.as_str())
    }
}

/// The lease that a pull works under.
///
/// containerd's leases can't be changed once made, so one is renewed by making another and giving it all that the first
/// holds. For that everything is *held* by name before it is made: `hold` first, then the call.
pub(crate) struct PullLease {
    store: Store,
    state: Mutex<LeaseState>,
}

struct LeaseState {
    /// All that were made, or may have been: known before the call, since we may be dropped at any await.
    ids: Vec<LeaseId>,
    /// The one in use: it is there.
    current: Option<LeaseId>,
    /// Type and id, in the words of containerd's leases.
    held: BTreeSet<(String, String)>,
    ended: bool,
}

impl PullLease {
    pub async fn begin(store: &Store) -> Result<Self, CallFailed> {
        let lease = Self {
            store: store.clone(),
            state: Mutex::new(LeaseState { ids: Vec::new(), current: None, held: BTreeSet::new(), ended: false }),
        };
        lease.make().await?;
        Ok(lease)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, LeaseState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn make(&self) -> Result<LeaseId, CallFailed> {
        let id = new_lease_id()?;
        self.state().ids.push(id.clone());
        let expires = jiff::Timestamp::now() + jiff::SignedDuration::try_from(LEASE_LIFE).unwrap_or_default();
        let labels = HashMap::from([
            (LEASE.to_owned(), "true".to_owned()),
            (GC_EXPIRE.to_owned(), expires.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()),
        ]);
        let containerd = &self.store.containerd;
        let request = containerd.request(CreateRequest { id: id.as_str().to_owned(), labels });
        containerd.leases().create(request).await.call("create lease", id.as_str())?;
        self.state().current = Some(id.clone());
        Ok(id)
    }

    /// Holds a resource, made or about to be made, and gives the lease to make it under.
    pub async fn hold(&self, kind: &str, id: &str) -> Result<LeaseId, CallFailed> {
        let lease = {
            let mut state = self.state();
            state.held.insert((kind.to_owned(), id.to_owned()));
            state.current.clone()
        };
        // `begin` made one.
        let Some(lease) = lease else { return self.make().await };
        self.store.hold(&lease, kind, id).await?;
        Ok(lease)
    }

    pub async fn hold_content(&self, digest: &Digest) -> Result<LeaseId, CallFailed> {
        self.hold("content", digest.as_str()).await
    }

    pub async fn hold_ingest(&self, digest: &Digest) -> Result<LeaseId, CallFailed> {
        self.hold("ingests", &ingest_name(digest)).await
    }

    pub async fn hold_snapshot(&self, snapshotter: &str, key: &str) -> Result<LeaseId, CallFailed> {
        self.hold(&format!("snapshots/{snapshotter}"), key).await
    }

    /// Renews for as long as it is polled. Never ends by itself.
    pub async fn keep(&self) -> std::convert::Infallible {
        let mut wait = LEASE_RENEWAL;
        loop {
            tokio::time::sleep(wait).await;
            wait = match self.renew().await {
                Ok(()) => LEASE_RENEWAL,
                Err(error) => {
                    tracing::warn!(%error, "can't renew the lease of a pull; trying again");
                    LEASE_RENEWAL_RETRY
                }
            };
        }
    }

    pub(crate) async fn renew(&self) -> Result<(), CallFailed> {
        let lease = self.make().await?;
        // What is held from here on goes to the new one by itself.
        let held: Vec<_> = self.state().held.iter().cloned().collect();
        for (kind, id) in held {
            self.store.hold(&lease, &kind, &id).await?;
        }
        Ok(())
    }

    /// Ends it. What no image holds by now goes; with `sync`, it is gone from the disk when this returns.
    pub async fn end(self, sync: bool) -> Result<(), CallFailed> {
        let ids = {
            let mut state = self.state();
            state.ended = true;
            state.ids.clone()
        };
        end_leases(&self.store, &ids, sync).await
    }
}

async fn end_leases(store: &Store, ids: &[LeaseId], sync: bool) -> Result<(), CallFailed> {
    for (i, id) in ids.iter().enumerate() {
        store.end_lease(id.as_str(), sync && i + 1 == ids.len()).await?;
    }
    Ok(())
}

impl Drop for PullLease {
    /// A pull that nobody waits for any more is dropped in the middle; its half-made things go now, not at the expiry.
    fn drop(&mut self) {
        let state = self.state();
        if state.ended || state.ids.is_empty() {
            return;
        }
        let (store, ids) = (self.store.clone(), state.ids.clone());
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = end_leases(&store, &ids, true).await {
                    tracing::warn!(%error, "can't end the lease of a cancelled pull; it expires by itself");
                }
            });
        }
    }
}

fn new_lease_id() -> Result<LeaseId, CallFailed> {
    let mut random = [0u8; 16];
    let failed = |words: String| CallFailed {
        call: "create lease",
        object: LEASE_PREFIX.to_owned(),
        status: Box::new(tonic::Status::internal(words)),
    };
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty()).map_err(|e| failed(e.to_string()))?;
    let id = format!("{LEASE_PREFIX}{:032x}", u128::from_be_bytes(random));
    LeaseId::parse(&id).ok_or_else(|| failed(format!("{id} is no name for a lease")))
}

/// Labels of an index, for the one entry that was chosen.
pub(crate) fn index_labels(child: &Digest) -> HashMap<String, String> {
    HashMap::from([("containerd.io/gc.ref.content.m.0".to_owned(), child.to_string())])
}

/// Labels of a manifest.
pub(crate) fn manifest_labels(config: &Digest, layers: &[Descriptor]) -> HashMap<String, String> {
    let layers = layers.iter().enumerate();
    layers
        .map(|(i, layer)| (format!("containerd.io/gc.ref.content.l.{i}"), layer.digest.to_string()))
        .chain([("containerd.io/gc.ref.content.config".to_owned(), config.to_string())])
        .collect()
}

/// Labels of a config, once its layers are unpacked.
pub(crate) fn config_labels(snapshotter: &str, chain_id: &Digest) -> HashMap<String, String> {
    HashMap::from([(format!("containerd.io/gc.ref.snapshot.{snapshotter}"), chain_id.to_string())])
}

/// Labels of a layer, once it is known what it unpacks to.
pub(crate) fn layer_labels(diff_id: &Digest) -> HashMap<String, String> {
    HashMap::from([(UNCOMPRESSED.to_owned(), diff_id.to_string())])
}

/// The folder that mounts write to, where it can be told: an overlay's upper folder, or what is bound.
pub(crate) fn written_folder(mounts: &[Mount]) -> Option<&str> {
    let [mount] = mounts else { return None };
    match mount.r#type.as_str() {
        "overlay" => mount.options.iter().find_map(|o| o.strip_prefix("upperdir=")),
        "bind" => Some(&mount.source),
        _ => None,
    }
}

/// Keeps two pulls from fetching one blob or unpacking one layer at the same time: the second waits, and finds it there.
#[derive(Default)]
pub(crate) struct Turns(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Turns {
    /// While the guard lives the others wait.
    pub async fn take(&self, name: String) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // Whoever holds or awaits a turn has a share in it.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            turns.entry(name).or_default().clone()
        };
        turn.lock_owned().await
    }
}
