//! A version as an image: the image that it stands on, and one layer more, in the content store, with an image record from which
//! `ctr images push` takes it.
//!
//! Nothing in it is of today or of this node, so the same contents on the same image have the same digest. The record's name is the
//! version's own: no reference normalises to a name without domain and tag, so no bot, of whatever namespace, can be started from it
//! by naming it. All of it is held by one lease, the version's, until the record is made; both go with the version.

use std::collections::HashMap;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use super::error::Flaw;
use super::manifest::{self, Descriptor, ImageManifest, MAX_LAYERS, Manifest, OCI_LAYER, OCI_MANIFEST};
use super::pull::MAX_CONFIG;
use super::reference::Digest;
use super::store::{BlobWriter, Made, manifest_labels};
use super::{Images, config};
use crate::containerd::{CallFailed, LeaseId};

const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// One message to containerd.
const CHUNK: usize = 512 * 1024;
/// containerd lets one writer at a blob; one that was cut off holds it a moment longer.
const WRITER_GONE: std::time::Duration = std::time::Duration::from_secs(10);

/// A version could not be made an image.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// containerd refused.
    #[error("the runtime refused")]
    Runtime(#[from] CallFailed),
    /// The image below is not whole on this node any more.
    #[error(
        "the image that the version stands on is not whole on this node any more, {missing} is missing: bring it back with \
         `ctr -n {namespace} images pull {reference}`"
    )]
    Missing {
        /// Digest.
        missing: String,
        /// Of containerd.
        namespace: String,
        /// What to pull.
        reference: String,
    },
    /// What containerd has of the image below can't be read.
    #[error("{object} of the image that the version stands on can't be used: {flaw}")]
    Flawed {
        /// Which blob.
        object: String,
        /// What is wrong.
        flaw: Flaw,
    },
    /// The layer could not be read.
    #[error("the layer can't be read")]
    Read(#[source] std::io::Error),
    /// What was read is not what was told.
    #[error("the layer's bytes are not those that were counted before: {digest} was to come")]
    Other {
        /// Digest.
        digest: String,
    },
}

/// The image that a version stands on, whole.
#[derive(Clone, Debug)]
pub struct Base {
    image: ImageManifest,
    config: Value,
}

/// A blob of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerBlob(Descriptor);

impl LayerBlob {
    /// An uncompressed tar, by its digest and its size in bytes; `None` where that is no digest.
    pub fn tar(digest: &str, size: u64) -> Option<Self> {
        Some(Self(Descriptor { media_type: OCI_LAYER.to_owned(), digest: Digest::parse(digest)?, size }))
    }
}

/// Config and manifest of the image that `base` becomes with one layer more. Pure.
fn with_layer(base: &Base, layer: &Descriptor) -> (Vec<u8>, Vec<u8>) {
    let mut config = base.config.clone();
    if let Some(ids) = config.pointer_mut("/rootfs/diff_ids").and_then(Value::as_array_mut) {
        // Nothing is compressed.
        ids.push(json!(layer.digest.as_str()));
    }
    // Where there is a history, each layer has its entry in it.
    if let Some(history) = config.get_mut("history").and_then(Value::as_array_mut).filter(|history| !history.is_empty())
    {
        history.push(json!({"created_by": "berth", "comment": "what a bot wrote"}));
    }
    let config = config.to_string().into_bytes();
    let wire =
        |blob: &Descriptor| json!({"mediaType": blob.media_type, "digest": blob.digest.as_str(), "size": blob.size});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": wire(&blob(OCI_CONFIG, &config)),
        "layers": base.image.layers.iter().chain([layer]).map(wire).collect::<Vec<_>>(),
    });
    (config, manifest.to_string().into_bytes())
}

fn blob(media_type: &str, bytes: &[u8]) -> Descriptor {
    Descriptor { media_type: media_type.to_owned(), digest: Digest::of(bytes), size: bytes.len() as u64 }
}

impl Images {
    /// The image that a digest names, for this machine, every blob of it held by the lease from now on.
    pub async fn base(&self, lease: &LeaseId, reference: &str, digest: &str) -> Result<Base, ExportError> {
        let store = &self.inner.store;
        let missing = |missing: &str| ExportError::Missing {
            missing: missing.to_owned(),
            namespace: store.namespace().to_owned(),
            reference: format!("{}@{digest}", reference.split('@').next().unwrap_or_default()),
        };
        let flawed = |object: &Digest, flaw| ExportError::Flawed { object: object.to_string(), flaw };
        let target = Digest::parse(digest).ok_or_else(|| missing(digest))?;
        let image = self.inner.manifest(&target).await?.ok_or_else(|| missing(digest))?;
        if image.layers.len() >= MAX_LAYERS {
            let layers = format!("{} layers are as many as an image may have", image.layers.len());
            return Err(flawed(&target, Flaw::Field("layers", layers)));
        }
        for layer in &image.layers {
            store.hold(lease, "content", layer.digest.as_str()).await?;
            if store.content(&layer.digest).await?.is_none() {
                return Err(missing(layer.digest.as_str()));
            }
        }
        let digest = &image.config.digest;
        let bytes = store.read(digest, MAX_CONFIG).await?.ok_or_else(|| missing(digest.as_str()))?.bytes;
        let known = config::parse(&bytes).map_err(|flaw| flawed(digest, flaw))?;
        if known.diff_ids.len() != image.layers.len() {
            return Err(flawed(
                digest,
                Flaw::Field("rootfs.diff_ids", "not as many as the manifest has layers".to_owned()),
            ));
        }
        let config = serde_json::from_slice(&bytes).map_err(|error| flawed(digest, Flaw::Json(error.to_string())))?;
        Ok(Base { image, config })
    }

    /// Where a layer's blob is to be written, or `None` where it is there; the lease holds it. One that was cut off is gone on with.
    pub async fn begin_layer(&self, lease: &LeaseId, layer: &LayerBlob) -> Result<Option<LayerWriter>, ExportError> {
        let until = tokio::time::Instant::now() + WRITER_GONE;
        loop {
            match self.inner.store.write(lease, &layer.0).await {
                Err(error)
                    if error.status.code() == tonic::Code::Unavailable && tokio::time::Instant::now() < until =>
                {
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
                other => return Ok(other?.map(|writer| LayerWriter { writer, layer: layer.clone() })),
            }
        }
    }

    /// Writes config and manifest of `base` with one layer more, under the lease, and gives it a name. Gives the manifest's digest.
    /// Safe twice.
    pub async fn put_image(
        &self,
        lease: &LeaseId,
        name: &str,
        base: &Base,
        layer: &LayerBlob,
    ) -> Result<String, ExportError> {
        let (config, manifest) = with_layer(base, &layer.0);
        let (config_blob, manifest_blob) = (blob(OCI_CONFIG, &config), blob(OCI_MANIFEST, &manifest));
        self.put(lease, &config_blob, config, HashMap::new()).await?;
        let layers: Vec<Descriptor> = base.image.layers.iter().chain([&layer.0]).cloned().collect();
        self.put(lease, &manifest_blob, manifest, manifest_labels(&config_blob.digest, &layers)).await?;
        self.inner.store.set_record(name, &manifest_blob, Made::Exported).await?;
        Ok(manifest_blob.digest.to_string())
    }

    async fn put(
        &self,
        lease: &LeaseId,
        blob: &Descriptor,
        bytes: Vec<u8>,
        labels: HashMap<String, String>,
    ) -> Result<(), ExportError> {
        let store = &self.inner.store;
        if let Some(mut writer) = store.write(lease, blob).await? {
            let rest = bytes.get(usize::try_from(writer.offset).unwrap_or(usize::MAX)..).unwrap_or_default();
            writer.write(rest.to_vec()).await?;
            if !writer.commit().await? {
                store.abort(&blob.digest).await?;
                return Err(ExportError::Other { digest: blob.digest.to_string() });
            }
        }
        if !labels.is_empty() {
            store.label(&blob.digest, labels).await?;
        }
        Ok(())
    }

    /// Whether all that an export made is there.
    pub async fn has_image(&self, name: &str, digest: &str) -> Result<bool, CallFailed> {
        let Some(digest) = Digest::parse(digest) else { return Ok(false) };
        let store = &self.inner.store;
        let target = store.record(name).await?.and_then(|record| record.target);
        if target.is_none_or(|target| target.digest != digest.as_str()) {
            return Ok(false);
        }
        let Some(blob) = store.read(&digest, self.inner.options.max_manifest_bytes).await? else { return Ok(false) };
        let Ok((Manifest::Image(image), _)) = manifest::parse(&blob.bytes, None) else { return Ok(false) };
        for blob in image.layers.iter().chain([&image.config]) {
            if store.content(&blob.digest).await?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A layer's blob that is being written. Dropped, what was written stays, for the next to go on with.
pub struct LayerWriter {
    writer: BlobWriter,
    layer: LayerBlob,
}

impl LayerWriter {
    /// The byte that is to come next.
    pub fn offset(&self) -> u64 {
        self.writer.offset
    }

    /// Writes the rest; containerd compares size and digest with what was told before.
    pub async fn fill(mut self, images: &Images, mut rest: impl AsyncRead + Unpin) -> Result<(), ExportError> {
        loop {
            let mut part = Vec::with_capacity(CHUNK);
            let read = (&mut rest).take(CHUNK as u64).read_to_end(&mut part).await;
            if read.map_err(ExportError::Read)? == 0 {
                break;
            }
            if self.writer.offset + part.len() as u64 > self.layer.0.size {
                break;
            }
            self.writer.write(part).await?;
        }
        let digest = &self.layer.0.digest;
        if self.writer.offset == self.layer.0.size && self.writer.commit().await? {
            return Ok(());
        }
        // What is half-written is of something else: from the beginning, the next time.
        images.inner.store.abort(digest).await?;
        Err(ExportError::Other { digest: digest.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(history: Value) -> Base {
        let image =
            ImageManifest { config: blob("x", b"config"), layers: vec![blob(OCI_LAYER, b"1"), blob(OCI_LAYER, b"22")] };
        let diff_ids = [Digest::of(b"a").to_string(), Digest::of(b"b").to_string()];
        let config = json!({
            "os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "config": {"Cmd": ["run"], "Labels": {"containerd.io/gc.root": "x"}}, "created": "2026-01-01T00:00:00Z",
            "history": history,
        });
        Base { image, config }
    }

    #[test]
    fn an_exported_image_is_its_base_with_one_layer_more() {
        let layer = blob(OCI_LAYER, b"what a bot wrote");
        for (history, entries) in [(json!([{"created_by": "x"}]), Some(2)), (json!([]), Some(0)), (Value::Null, None)] {
            let base = base(history);
            let (config, image) = with_layer(&base, &layer);
            let (parsed, media_type) = manifest::parse(&image, None).unwrap();
            let Manifest::Image(parsed) = parsed else { panic!("{parsed:?}") };
            assert_eq!(media_type, OCI_MANIFEST);
            assert_eq!(parsed.config, blob(OCI_CONFIG, &config));
            assert_eq!(parsed.layers.len(), 3);
            assert_eq!(parsed.layers[2], layer);
            let said: Value = serde_json::from_slice(&config).unwrap();
            assert_eq!(said["rootfs"]["diff_ids"][2], layer.digest.as_str());
            assert_eq!(said["config"], base.config["config"], "it runs as its base does");
            assert_eq!(said["history"].as_array().map(Vec::len), entries);
            assert_eq!((config, image), with_layer(&base, &layer), "the same again");
        }
    }
}
