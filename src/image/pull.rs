//! One pull: from a reference to an unpacked image.
//!
//! ```text
//! resolve (HEAD) ─ whole here already? ─ yes ──────────────────────────────────────────────> Image
//!      │ no
//!   lease ─ index ─ manifest ─ config ─┬─ layers, some at once ─┐
//!                                      └─ unpack each in order ─┴─ labels ─ records ─ end of lease ─> Image
//! ```
//!
//! Cut off anywhere, it leaves a lease that expires and what that holds: nothing that [`Images::find`](super::Images)
//! takes for an image, since the record comes last.
//!
//! An unpacked image is bounded by watching the snapshot grow while containerd unpacks, and cancelling the call. To count
//! the bytes that come out of the decompressor instead would cost the work twice and bound less: a tar entry may be
//! sparse, and containerd writes its holes out as zeros.

use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use containerd_client::types::Mount;
use futures::StreamExt as _;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tonic::Code;

use super::config::{self, ImageConfig};
use super::credentials::Credentials;
use super::error::{Flaw, ImageError};
use super::manifest::{self, Descriptor, ImageManifest, Manifest};
use super::reference::{Digest, Reference};
use super::registry::{Session, endpoints};
use super::store::{self, Made, PullLease, Usage};
use super::{Image, Inner};
use crate::containerd::CallFailed;

/// The largest config that is read; image-spec asks for no more than 4 MiB of any manifest-like thing.
pub(super) const MAX_CONFIG: u64 = 4 << 20;
/// Indexes within indexes, at most.
const MAX_NESTING: usize = 3;
/// One message to containerd. gRPC takes 16 MiB; memory held is this, twice, for each layer that comes at once.
const CHUNK: usize = 512 * 1024;
/// How soon after the last look an unpacking layer is measured again, at least.
const MEASURE: Duration = Duration::from_millis(200);

impl Inner {
    /// Looks for an image on the node, without asking anyone else. Whole, or `None`.
    pub(super) async fn find(&self, reference: &Reference, snapshotter: &str) -> Result<Option<Image>, ImageError> {
        let failed = |e| runtime(reference, e);
        let Some(record) = self.store.record(&reference.record_name()).await.map_err(failed)? else { return Ok(None) };
        let Some(target) = record.target.and_then(|t| Digest::parse(&t.digest)) else { return Ok(None) };
        self.whole(reference, &target, snapshotter).await
    }

    /// The manifest behind a digest for this machine, if it is here and can be read.
    pub(super) async fn manifest(&self, target: &Digest) -> Result<Option<ImageManifest>, CallFailed> {
        let mut digest = target.clone();
        for _ in 0..=MAX_NESTING {
            let Some(blob) = self.store.read(&digest, self.options.max_manifest_bytes).await? else { return Ok(None) };
            match manifest::parse(&blob.bytes, None) {
                Ok((Manifest::Image(found), _)) => return Ok(Some(found)),
                Ok((Manifest::Index(entries), _)) => match manifest::choose(&entries, &self.platform) {
                    Ok(chosen) => digest = chosen.digest.clone(),
                    Err(_) => return Ok(None),
                },
                Err(_) => return Ok(None),
            }
        }
        Ok(None)
    }

    /// The image behind a digest, if all of it is here: manifests, config, layer blobs and the unpacked layers.
    pub(super) async fn whole(
        &self,
        reference: &Reference,
        target: &Digest,
        snapshotter: &str,
    ) -> Result<Option<Image>, ImageError> {
        let failed = |e| runtime(reference, e);
        let Some(image) = self.manifest(target).await.map_err(failed)? else { return Ok(None) };
        let Some(blob) = self.store.read(&image.config.digest, MAX_CONFIG).await.map_err(failed)? else {
            return Ok(None);
        };
        let Ok(config) = config::parse(&blob.bytes) else { return Ok(None) };
        let chain = config::chain_ids(&config.diff_ids);
        let Some(top) = chain.last() else { return Ok(None) };
        // Without the label the layers may be there for another image's sake, and go with it.
        let held =
            store::config_labels(snapshotter, top).iter().all(|(name, value)| blob.labels.get(name) == Some(value));
        if !held || !self.platform.runs(&config.platform) || chain.len() != image.layers.len() {
            return Ok(None);
        }
        let blobs = futures::future::try_join_all(image.layers.iter().map(|l| self.store.content(&l.digest)));
        let (unpacked, blobs) = tokio::join!(self.store.is_unpacked(snapshotter, top), blobs);
        if !unpacked.map_err(failed)? || blobs.map_err(failed)?.iter().any(Option::is_none) {
            return Ok(None);
        }
        self.uses.touch(target);
        self.configs.put(target, &config.run);
        Ok(Some(Image {
            reference: reference.to_string(),
            digest: target.to_string(),
            chain_id: top.to_string(),
            config: config.run,
        }))
    }

    /// Brings an image here and unpacks it, or finds that it is here already.
    pub(super) async fn pull(
        &self,
        reference: &Reference,
        snapshotter: &str,
        credentials: &Credentials,
    ) -> Result<Image, ImageError> {
        let mut sessions = Vec::new();
        for endpoint in endpoints(reference, &self.options.mirrors) {
            sessions.push(Session::new(&self.clients, endpoint, reference, credentials, self.options.stall_timeout)?);
        }
        let (from, target) = self.resolve(reference, &sessions).await?;
        // Blobs come from whoever knew the manifest, else from those after it.
        let sessions = &sessions[from..];
        if let Resolved::Digest(digest) = &target
            && let Some(image) = self.already_here(reference, digest, snapshotter).await?
        {
            return Ok(image);
        }
        let lease = PullLease::begin(&self.store).await.map_err(|e| runtime(reference, e))?;
        let pulled = {
            let pull = Pull { inner: self, reference, snapshotter, sessions, lease: &lease };
            let work = pin!(pull.run(target));
            let keep = pin!(lease.keep());
            match futures::future::select(work, keep).await {
                futures::future::Either::Left((result, _)) => result,
                futures::future::Either::Right((never, _)) => match never {},
            }
        };
        // What a failed pull unpacked may be what filled the disk: it goes before anybody tries again.
        let ended = lease.end(pulled.is_err()).await;
        if let Err(error) = ended {
            tracing::warn!(%error, image = %reference, "can't end the lease of a pull; it expires by itself");
        }
        pulled
    }

    /// Asks each endpoint in turn what the reference is now; says which of them knew.
    async fn resolve(&self, reference: &Reference, sessions: &[Session]) -> Result<(usize, Resolved), ImageError> {
        let mut last = None;
        for (i, session) in sessions.iter().enumerate() {
            match self.resolve_at(reference, session).await {
                Ok(resolved) => return Ok((i, resolved)),
                Err(error) => {
                    if i + 1 < sessions.len() {
                        tracing::info!(image = %reference, mirror = session.origin(), error = &error as &dyn std::error::Error,
                            "a mirror has no answer; asking the next");
                    }
                    last = Some(error);
                }
            }
        }
        // `endpoints` gives at least the registry itself.
        Err(last.unwrap_or_else(|| ImageError::NotFound {
            image: reference.clone().into(),
            registry: reference.registry().to_owned(),
            object: "endpoint".to_owned(),
        }))
    }

    async fn resolve_at(&self, reference: &Reference, session: &Session) -> Result<Resolved, ImageError> {
        let which = match (reference.digest(), reference.tag()) {
            (Some(digest), _) => digest.as_str(),
            (None, tag) => tag.unwrap_or("latest"),
        };
        // Also for a digest that is here: whether *these* credentials may read it only the registry knows.
        if let Some(digest) = session.resolve(which).await? {
            if let Some(wanted) = reference.digest().filter(|w| **w != digest) {
                let problem = Flaw::Digest { want: wanted.to_string(), got: Some(digest.to_string()) };
                return Err(corrupt(reference, format!("manifest {wanted}"), problem));
            }
            return Ok(Resolved::Digest(digest));
        }
        let (bytes, media_type) = session.manifest(which, self.options.max_manifest_bytes).await?;
        let digest = Digest::of(&bytes);
        if let Some(wanted) = reference.digest().filter(|w| **w != digest) {
            let problem = Flaw::Digest { want: wanted.to_string(), got: Some(digest.to_string()) };
            return Err(corrupt(reference, format!("manifest {wanted}"), problem));
        }
        Ok(Resolved::Manifest { digest, bytes, media_type })
    }

    /// The image if nothing is left to do for it but, at most, to move its tag.
    async fn already_here(
        &self,
        reference: &Reference,
        digest: &Digest,
        snapshotter: &str,
    ) -> Result<Option<Image>, ImageError> {
        let pinned = reference.pinned(digest.clone()).record_name();
        let failed = |e| runtime(reference, e);
        let target_of = |record: Option<containerd_client::services::v1::Image>| record.and_then(|r| r.target);
        // A digest that no record of this name holds may be collected while we look at it.
        let Some(target) = target_of(self.store.record(&pinned).await.map_err(failed)?) else { return Ok(None) };
        if target.digest != digest.as_str() {
            return Ok(None);
        }
        let Some(image) = self.whole(reference, digest, snapshotter).await? else { return Ok(None) };
        let name = reference.record_name();
        if name != pinned {
            let now = target_of(self.store.record(&name).await.map_err(failed)?);
            if now.is_none_or(|t| t.digest != digest.as_str()) {
                let size = u64::try_from(target.size).unwrap_or(0);
                let target = Descriptor { media_type: target.media_type, digest: digest.clone(), size };
                self.store.set_record(&name, &target, Made::Pulled).await.map_err(failed)?;
            }
        }
        Ok(Some(image))
    }
}

/// What a registry said that a reference is.
enum Resolved {
    Digest(Digest),
    Manifest { digest: Digest, bytes: Vec<u8>, media_type: Option<String> },
}

/// A pull under way.
struct Pull<'a> {
    inner: &'a Inner,
    reference: &'a Reference,
    snapshotter: &'a str,
    sessions: &'a [Session],
    lease: &'a PullLease,
}

impl Pull<'_> {
    async fn run(&self, resolved: Resolved) -> Result<Image, ImageError> {
        let store = &self.inner.store;
        let (target, indexes, manifest_digest, image) = self.manifests(resolved).await?;
        if image.config.size > MAX_CONFIG {
            let (what, got) = ("its config in bytes", Some(image.config.size));
            return Err(ImageError::TooLarge { image: self.image(), what, limit: MAX_CONFIG, got });
        }
        let compressed = image.layers.iter().fold(0u64, |sum, l| sum.saturating_add(l.size));
        if compressed > self.inner.options.max_unpacked_bytes {
            let (what, limit) = ("its compressed layers in bytes", self.inner.options.max_unpacked_bytes);
            return Err(ImageError::TooLarge { image: self.image(), what, limit, got: Some(compressed) });
        }
        self.blob(&image.config).await?;
        let config = self.config(&image).await?;
        let chain = config::chain_ids(&config.diff_ids);

        // A layer is unpacked as soon as it and those below it are there, while those above still come.
        let (arrived, arrivals): (Vec<_>, Vec<_>) = image.layers.iter().map(|_| oneshot::channel::<()>()).unzip();
        let mut fetches = Vec::with_capacity(image.layers.len());
        for (layer, arrived) in image.layers.iter().zip(arrived) {
            fetches.push(async move {
                self.blob(layer).await?;
                // Nobody waits any more where unpacking failed, which ends us too.
                let _ = arrived.send(());
                Ok::<_, ImageError>(())
            });
        }
        let fetching = async {
            let mut running =
                futures::stream::iter(fetches).buffer_unordered(self.inner.options.parallel_layers.max(1));
            while let Some(done) = running.next().await {
                done?;
            }
            Ok::<_, ImageError>(())
        };
        let unpacking = async {
            let mut used = Usage::default();
            for (i, arrival) in arrivals.into_iter().enumerate() {
                if arrival.await.is_err() {
                    // The fetch failed; its error is the one to tell.
                    return std::future::pending().await;
                }
                let parent = i.checked_sub(1).map(|below| &chain[below]);
                let unpacked = self.unpack(&image.layers[i], &config.diff_ids[i], parent, &chain[i], used).await?;
                used = used.and(unpacked);
            }
            Ok::<_, ImageError>(())
        };
        tokio::try_join!(fetching, unpacking)?;

        // From the leaves up: whoever follows a label finds what it points to.
        let top = chain.last().cloned().ok_or_else(|| self.wrong_layers(&image, &config))?;
        let label = async |digest: &Digest, labels| store.label(digest, labels).await.map_err(|e| self.runtime(e));
        label(&image.config.digest, store::config_labels(self.snapshotter, &top)).await?;
        label(&manifest_digest, store::manifest_labels(&image.config.digest, &image.layers)).await?;
        for (index, child) in indexes.iter().rev() {
            label(index, store::index_labels(child)).await?;
        }
        let pinned = self.reference.pinned(target.digest.clone()).record_name();
        store.set_record(&pinned, &target, Made::Pulled).await.map_err(|e| self.runtime(e))?;
        let name = self.reference.record_name();
        if name != pinned {
            store.set_record(&name, &target, Made::Pulled).await.map_err(|e| self.runtime(e))?;
        }
        self.inner.uses.touch(&target.digest);
        self.inner.configs.put(&target.digest, &config.run);
        Ok(Image {
            reference: self.reference.to_string(),
            digest: target.digest.to_string(),
            chain_id: top.to_string(),
            config: config.run,
        })
    }

    /// Fetches and keeps the manifest, through indexes where it stands in one. Gives the target of the record, each
    /// index with what was chosen in it, and the image's manifest.
    async fn manifests(
        &self,
        resolved: Resolved,
    ) -> Result<(Descriptor, Vec<(Digest, Digest)>, Digest, ImageManifest), ImageError> {
        let (mut digest, mut bytes, mut said) = match resolved {
            Resolved::Digest(digest) => {
                let (bytes, said) = self.manifest(&digest, None).await?;
                (digest, bytes, said)
            }
            Resolved::Manifest { digest, bytes, media_type } => (digest, bytes, media_type),
        };
        let mut target = None;
        let mut indexes = Vec::new();
        loop {
            let (manifest, media_type) = manifest::parse(&bytes, said.as_deref())
                .map_err(|flaw| corrupt(self.reference, format!("manifest {digest}"), flaw))?;
            let descriptor = Descriptor { media_type, digest: digest.clone(), size: bytes.len() as u64 };
            self.keep_bytes(&descriptor, &bytes).await?;
            target.get_or_insert(descriptor.clone());
            let entries = match manifest {
                Manifest::Image(image) => {
                    // The first round set it.
                    return Ok((target.unwrap_or(descriptor), indexes, digest, image));
                }
                Manifest::Index(entries) => entries,
            };
            if indexes.len() >= MAX_NESTING {
                let flaw = Flaw::Field("manifests", format!("more than {MAX_NESTING} indexes within each other"));
                return Err(corrupt(self.reference, format!("index {digest}"), flaw));
            }
            let chosen =
                manifest::choose(&entries, &self.inner.platform).map_err(|offered| self.wrong_platform(offered))?;
            indexes.push((digest, chosen.digest.clone()));
            digest = chosen.digest.clone();
            let (child, child_said) = self.manifest(&digest, Some(chosen.size)).await?;
            bytes = child;
            said = child_said.or_else(|| Some(chosen.media_type.clone()));
        }
    }

    /// The bytes of a manifest by digest: from the node, else from the first endpoint that has the right ones.
    async fn manifest(&self, digest: &Digest, size: Option<u64>) -> Result<(Vec<u8>, Option<String>), ImageError> {
        self.lease.hold_content(digest).await.map_err(|e| self.runtime(e))?;
        let max = self.inner.options.max_manifest_bytes;
        if let Some(blob) = self.inner.store.read(digest, max).await.map_err(|e| self.runtime(e))? {
            return Ok((blob.bytes, None));
        }
        let mut last = None;
        for session in self.sessions {
            match self.manifest_from(session, digest, size).await {
                Ok(found) => return Ok(found),
                Err(error) => last = Some(error),
            }
        }
        Err(last.unwrap_or_else(|| self.no_endpoint()))
    }

    async fn manifest_from(
        &self,
        session: &Session,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<(Vec<u8>, Option<String>), ImageError> {
        let max = self.inner.options.max_manifest_bytes;
        let (bytes, media_type) = session.manifest(digest.as_str(), max).await?;
        let flaw = |flaw| corrupt(self.reference, format!("manifest {digest}"), flaw);
        let got = Digest::of(&bytes);
        if got != *digest {
            return Err(flaw(Flaw::Digest { want: digest.to_string(), got: Some(got.to_string()) }));
        }
        if let Some(want) = size.filter(|s| *s != bytes.len() as u64) {
            return Err(flaw(Flaw::Size { want, got: bytes.len() as u64 }));
        }
        Ok((bytes, media_type))
    }

    /// Writes a small blob that is in memory.
    async fn keep_bytes(&self, blob: &Descriptor, bytes: &[u8]) -> Result<(), ImageError> {
        let _turn = self.inner.turns.take(blob.digest.to_string()).await;
        let lease = self.lease.hold_content(&blob.digest).await.map_err(|e| self.runtime(e))?;
        self.lease.hold_ingest(&blob.digest).await.map_err(|e| self.runtime(e))?;
        let Some(mut writer) = self.open(&lease, blob).await? else { return Ok(()) };
        // Far from as large as what could have been cut off before; but it may be.
        let rest = bytes.get(usize::try_from(writer.offset).unwrap_or(usize::MAX)..).unwrap_or_default().to_vec();
        if !rest.is_empty() {
            writer.write(rest).await.map_err(|e| self.runtime(e))?;
        }
        if writer.commit().await.map_err(|e| self.runtime(e))? {
            return Ok(());
        }
        self.inner.store.abort(&blob.digest).await.map_err(|e| self.runtime(e))?;
        let flaw = Flaw::Digest { want: blob.digest.to_string(), got: None };
        Err(corrupt(self.reference, format!("manifest {}", blob.digest), flaw))
    }

    async fn config(&self, image: &ImageManifest) -> Result<ImageConfig, ImageError> {
        let digest = &image.config.digest;
        let flaw = |flaw| corrupt(self.reference, format!("config {digest}"), flaw);
        let blob = self.inner.store.read(digest, MAX_CONFIG).await.map_err(|e| self.runtime(e))?;
        // It was fetched a moment ago, under our lease: only an outsider can have taken it.
        let blob = blob.ok_or_else(|| flaw(Flaw::Field("bytes", "they were removed from containerd".to_owned())))?;
        let config = config::parse(&blob.bytes).map_err(flaw)?;
        if !self.inner.platform.runs(&config.platform) {
            return Err(self.wrong_platform(config.platform.to_string()));
        }
        if config.diff_ids.len() != image.layers.len() {
            return Err(self.wrong_layers(image, &config));
        }
        Ok(config)
    }

    /// Fetches a blob unless it is here.
    async fn blob(&self, blob: &Descriptor) -> Result<(), ImageError> {
        let _turn = self.inner.turns.take(blob.digest.to_string()).await;
        self.lease.hold_content(&blob.digest).await.map_err(|e| self.runtime(e))?;
        if let Some(info) = self.inner.store.content(&blob.digest).await.map_err(|e| self.runtime(e))? {
            let got = u64::try_from(info.size).unwrap_or(0);
            if got != blob.size {
                let flaw = Flaw::Size { want: blob.size, got };
                return Err(corrupt(self.reference, format!("blob {}", blob.digest), flaw));
            }
            return Ok(());
        }
        self.lease.hold_ingest(&blob.digest).await.map_err(|e| self.runtime(e))?;
        let mut last = None;
        for session in self.sessions {
            for attempt in 1..=self.inner.options.blob_tries.max(1) {
                match self.blob_from(session, blob, attempt).await {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        let again = passing(&error);
                        tracing::info!(image = %self.reference, registry = session.origin(), blob = %blob.digest, attempt,
                            error = &error as &dyn std::error::Error, "a blob did not come whole");
                        // Our own disk or containerd fails for every endpoint.
                        if matches!(error, ImageError::Runtime { .. }) {
                            return Err(error);
                        }
                        last = Some(error);
                        if !again {
                            break;
                        }
                    }
                }
                if attempt < self.inner.options.blob_tries {
                    tokio::time::sleep(self.inner.options.blob_retry_delay * 2u32.saturating_pow(attempt - 1).min(64))
                        .await;
                }
            }
        }
        Err(last.unwrap_or_else(|| self.no_endpoint()))
    }

    /// One try at a blob, going on from where the last one ended.
    async fn blob_from(&self, session: &Session, blob: &Descriptor, attempt: u32) -> Result<(), ImageError> {
        let failed = |e| self.runtime(e);
        let lease = self.lease.hold_ingest(&blob.digest).await.map_err(failed)?;
        let Some(mut writer) = self.open(&lease, blob).await? else { return Ok(()) };
        let object = || format!("blob {}", blob.digest);
        if writer.offset < blob.size {
            let mut stream = match session.blob(&blob.digest, blob.size, writer.offset).await {
                Ok(stream) => stream,
                Err(error) => {
                    writer.suspend().await;
                    return Err(error);
                }
            };
            // A registry that knows no ranges sends what we have again.
            let mut skip = writer.offset.saturating_sub(stream.start);
            loop {
                let mut buffer = Vec::with_capacity(CHUNK);
                let more = stream.fill(&mut buffer, CHUNK).await;
                let skipped = skip.min(buffer.len() as u64);
                skip -= skipped;
                buffer.drain(..usize::try_from(skipped).unwrap_or(usize::MAX).min(buffer.len()));
                let got = writer.offset.saturating_add(buffer.len() as u64);
                if got > blob.size {
                    writer.suspend().await;
                    self.inner.store.abort(&blob.digest).await.map_err(failed)?;
                    return Err(corrupt(self.reference, object(), Flaw::Size { want: blob.size, got }));
                }
                if !buffer.is_empty() {
                    writer.write(buffer).await.map_err(failed)?;
                    stream.waited_for_us();
                }
                match more {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        writer.suspend().await;
                        return Err(error);
                    }
                }
            }
        }
        if writer.offset < blob.size {
            let got = writer.offset;
            writer.suspend().await;
            return Err(ImageError::CutOff {
                image: self.image(),
                registry: session.origin().to_owned(),
                object: object(),
                got,
                want: blob.size,
                tries: attempt,
            });
        }
        if writer.commit().await.map_err(failed)? {
            return Ok(());
        }
        self.inner.store.abort(&blob.digest).await.map_err(failed)?;
        Err(corrupt(self.reference, object(), Flaw::Digest { want: blob.digest.to_string(), got: None }))
    }

    /// Opens a blob for writing. containerd lets one writer at a blob; one that was cut off holds it a moment longer.
    async fn open(
        &self,
        lease: &crate::containerd::LeaseId,
        blob: &Descriptor,
    ) -> Result<Option<store::BlobWriter>, ImageError> {
        let until = Instant::now() + self.inner.options.stall_timeout.min(Duration::from_secs(10));
        loop {
            match self.inner.store.write(lease, blob).await {
                Err(e) if e.status.code() == Code::Unavailable && Instant::now() < until => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                other => return other.map_err(|e| self.runtime(e)),
            }
        }
    }

    /// Unpacks a layer onto those below it, unless it is there unpacked. Says what it added on the disk.
    async fn unpack(
        &self,
        layer: &Descriptor,
        diff_id: &Digest,
        parent: Option<&Digest>,
        chain_id: &Digest,
        used: Usage,
    ) -> Result<Usage, ImageError> {
        let failed = |e| self.runtime(e);
        let store = &self.inner.store;
        let snapshotter = self.snapshotter;
        let _turn = self.inner.turns.take(format!("{snapshotter} {chain_id}")).await;
        self.lease.hold_snapshot(snapshotter, chain_id.as_str()).await.map_err(failed)?;
        let mut added = Usage::default();
        if !store.is_unpacked(snapshotter, chain_id).await.map_err(failed)? {
            let key = format!("{}{}", store::EXTRACT_PREFIX, chain_id.hex());
            let lease = self.lease.hold_snapshot(snapshotter, &key).await.map_err(failed)?;
            // Half a layer that somebody left: nobody else is at it, since we hold the turn and the node its lock.
            store.remove_snapshot(snapshotter, &key).await.map_err(failed)?;
            let parent = parent.map(Digest::as_str).unwrap_or_default();
            let mounts = store.prepare(&lease, snapshotter, &key, parent).await.map_err(failed)?;
            let before = store.usage(snapshotter, &key).await.map_err(failed)?;
            let applied = self.apply_bounded(&lease, layer, &mounts, &key, before, used).await;
            let checked = match applied {
                Ok(Some(got)) if got == *diff_id => Ok(()),
                Ok(got) => {
                    let flaw = Flaw::Digest { want: diff_id.to_string(), got: got.map(|d| d.to_string()) };
                    Err(corrupt(self.reference, format!("layer {}, unpacked,", layer.digest), flaw))
                }
                Err(error) => Err(error),
            };
            let after = match checked {
                Ok(()) => self.settle(layer, &mounts, &key, before, used).await,
                Err(error) => Err(error),
            };
            added = match after {
                Ok(added) => added,
                Err(error) => {
                    // The first error is the one to tell; the lease takes what this leaves.
                    let _ = store.remove_snapshot(snapshotter, &key).await;
                    return Err(error);
                }
            };
            store.commit(&lease, snapshotter, &key, chain_id.as_str()).await.map_err(failed)?;
        }
        store.label(&layer.digest, store::layer_labels(diff_id)).await.map_err(failed)?;
        Ok(added)
    }

    /// Has containerd unpack, and watches it: it may grow to the limit, and may not stand still for too long.
    async fn apply_bounded(
        &self,
        lease: &crate::containerd::LeaseId,
        layer: &Descriptor,
        mounts: &[Mount],
        key: &str,
        before: Usage,
        used: Usage,
    ) -> Result<Option<Digest>, ImageError> {
        let store = &self.inner.store;
        let mut applying = pin!(store.apply(lease, layer, mounts.to_vec()));
        let mut seen = before;
        let mut grew = Instant::now();
        let mut wait = MEASURE;
        loop {
            // Dropping `applying` on the way out is what cancels it in containerd.
            tokio::select! {
                result = &mut applying => return result.map_err(|e| self.unpack_failed(layer, e)),
                () = tokio::time::sleep(wait) => {}
            }
            let started = Instant::now();
            let now = tokio::select! {
                result = &mut applying => return result.map_err(|e| self.unpack_failed(layer, e)),
                now = store.usage(self.snapshotter, key) => now.map_err(|e| self.runtime(e))?,
            };
            self.within_limits(used.and(now.since(before)))?;
            if now != seen {
                (seen, grew) = (now, Instant::now());
            } else if grew.elapsed() > self.inner.options.unpack_stall_timeout {
                return Err(ImageError::UnpackStalled {
                    image: self.image(),
                    layer: layer.digest.clone(),
                    within: self.inner.options.unpack_stall_timeout,
                });
            }
            // Measuring walks the tree: a fifth of the time at most goes into it.
            wait = MEASURE.max(started.elapsed() * 4);
        }
    }

    /// What comes between unpacked and named: the limits once more, since the last look may have been before the end,
    /// and the bytes on the disk, since after a power cut a committed layer is taken for whole.
    async fn settle(
        &self,
        layer: &Descriptor,
        mounts: &[Mount],
        key: &str,
        before: Usage,
        used: Usage,
    ) -> Result<Usage, ImageError> {
        let now = self.inner.store.usage(self.snapshotter, key).await.map_err(|e| self.runtime(e))?;
        let added = now.since(before);
        self.within_limits(used.and(added))?;
        if let Some(folder) = store::written_folder(mounts).map(PathBuf::from) {
            let synced = tokio::task::spawn_blocking(move || sync(&folder)).await;
            match synced {
                Ok(Ok(())) => {}
                Ok(Err(e)) if e == rustix::io::Errno::NOENT => {
                    tracing::debug!(layer = %layer.digest, "the layer's folder can't be seen from here; not synced");
                }
                Ok(Err(e)) => {
                    return Err(ImageError::DiskUsage {
                        path: format!("layer {}", layer.digest),
                        source: Arc::new(e.into()),
                    });
                }
                // Only a panic or the runtime's end: nothing was synced, and the next try starts over.
                Err(e) => {
                    let source = Arc::new(std::io::Error::other(e));
                    return Err(ImageError::DiskUsage { path: format!("layer {}", layer.digest), source });
                }
            }
        }
        Ok(added)
    }

    fn within_limits(&self, used: Usage) -> Result<(), ImageError> {
        let options = &self.inner.options;
        let too_large =
            |what, limit, got| Err(ImageError::TooLarge { image: self.image(), what, limit, got: Some(got) });
        if used.bytes > options.max_unpacked_bytes {
            return too_large("its unpacked size in bytes", options.max_unpacked_bytes, used.bytes);
        }
        if used.inodes > options.max_unpacked_inodes {
            return too_large("its number of files", options.max_unpacked_inodes, used.inodes);
        }
        Ok(())
    }

    /// containerd could not unpack: for its own disk, or because these bytes are no layer.
    fn unpack_failed(&self, layer: &Descriptor, error: CallFailed) -> ImageError {
        // What it can't decode comes as Unknown; what it means by itself has a code.
        if error.status.code() == Code::Unknown && !error.is_unavailable() && !error.is_storage() {
            let words = crate::api::condition::cut(error.status.message(), 300);
            return corrupt(self.reference, format!("layer {}", layer.digest), Flaw::Unpack(words));
        }
        self.runtime(error)
    }

    fn wrong_layers(&self, image: &ImageManifest, config: &ImageConfig) -> ImageError {
        let counts = format!("{} diff ids for {} layers", config.diff_ids.len(), image.layers.len());
        corrupt(self.reference, format!("config {}", image.config.digest), Flaw::Field("rootfs.diff_ids", counts))
    }

    fn wrong_platform(&self, offered: String) -> ImageError {
        ImageError::WrongPlatform { image: self.image(), wanted: self.inner.platform.to_string(), offered }
    }

    fn no_endpoint(&self) -> ImageError {
        ImageError::NotFound {
            image: self.image(),
            registry: self.reference.registry().to_owned(),
            object: "endpoint".to_owned(),
        }
    }

    fn image(&self) -> Box<Reference> {
        self.reference.clone().into()
    }

    fn runtime(&self, error: CallFailed) -> ImageError {
        runtime(self.reference, error)
    }
}

/// Whether the same endpoint may do better in a moment.
fn passing(error: &ImageError) -> bool {
    match error {
        ImageError::Unreachable { .. } | ImageError::CutOff { .. } | ImageError::Stalled { .. } => true,
        // Not if it says when it wants to be asked again: then the whole pull waits.
        ImageError::RegistryRefused { status, retry_after, .. } => {
            retry_after.is_none() && (*status == 429 || *status >= 500)
        }
        _ => false,
    }
}

fn sync(folder: &std::path::Path) -> Result<(), rustix::io::Errno> {
    use rustix::fs::{Mode, OFlags};
    let folder = rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::fs::syncfs(folder)
}

fn corrupt(image: &Reference, object: String, problem: Flaw) -> ImageError {
    ImageError::Corrupt { image: image.clone().into(), object, problem }
}

pub(super) fn runtime(image: &Reference, error: CallFailed) -> ImageError {
    ImageError::Runtime { image: image.clone().into(), source: Arc::new(error) }
}
