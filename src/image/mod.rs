//! Images: from a name in a spec to layers that a bot can stand on.
//!
//! ```text
//! reference    `nginx` -> docker.io/library/nginx:latest                         (pure)
//! credentials  pull Secrets -> which logins an image's registry is shown         (pure)
//! manifest     manifests, indexes, which entry is for this machine               (pure)
//! config       how the image wants to be run, bounded                            (pure)
//! registry     HTTP: mirrors, authentication, manifests, blobs
//! store        containerd: blobs, snapshots, records, leases
//! pull         one pull: resolve -> fetch -> unpack -> record
//! export       a version as an image: its base, and one layer more              (with_layer pure)
//! collect      which images go when the disk is full                             (plan pure)
//! ```
//!
//! An image *is there* when its record leads, over labels that containerd's collector follows, to a config and to a
//! committed snapshot of all its layers. The record is made last, so what a pull leaves when it is cut off is never an
//! image. Nothing here remembers that an image is there: containerd is asked each time.

mod collect;
mod config;
mod credentials;
mod error;
mod export;
mod manifest;
mod pull;
mod reference;
mod registry;
mod store;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, WeakShared};

pub use collect::{Collected, CollectionPolicy, FsUsage, InUse};
pub use config::RunConfig;
pub use credentials::{BadCredentials, Credentials};
pub use error::{Flaw, ImageError, Tried};
pub use export::{Base, ExportError, LayerBlob, LayerWriter};
pub use reference::{BadReference, Digest, Reference};
pub use registry::{Authority, BadAuthorities, BadMirror, Mirror};

use crate::containerd::Containerd;
use credentials::Login;

/// What images may cost, and where they are asked for first.
#[derive(Clone, Debug)]
pub struct ImageOptions {
    /// Asked before the registry itself, in order.
    pub mirrors: Vec<Mirror>,
    /// Who registries are trusted by, beside the machine's own authorities.
    pub authorities: Vec<Authority>,
    /// The most that the layers of one image may add on the disk, unpacked, in bytes. Measured while it unpacks, every
    /// 200 ms, so what a bomb writes before it is stopped is that more.
    pub max_unpacked_bytes: u64,
    /// The same in files and folders.
    pub max_unpacked_inodes: u64,
    /// The largest manifest or index that is read, in bytes. Registries take 4 MiB.
    pub max_manifest_bytes: u64,
    /// How many layers of one image come at once.
    pub parallel_layers: usize,
    /// How often one endpoint is tried for a blob that does not come whole; each try goes on where the last ended.
    pub blob_tries: u32,
    /// The pause before the second try, doubled before each further one.
    pub blob_retry_delay: Duration,
    /// How long a registry may send nothing, or next to nothing. A pull that goes on may take as long as it takes.
    pub stall_timeout: Duration,
    /// How long unpacking may add nothing.
    pub unpack_stall_timeout: Duration,
}

impl Default for ImageOptions {
    fn default() -> Self {
        Self {
            mirrors: Vec::new(),
            authorities: Vec::new(),
            max_unpacked_bytes: 64 << 30,
            max_unpacked_inodes: 4_000_000,
            max_manifest_bytes: 4 << 20,
            parallel_layers: 3,
            blob_tries: 5,
            blob_retry_delay: Duration::from_millis(200),
            stall_timeout: Duration::from_secs(60),
            unpack_stall_timeout: Duration::from_secs(120),
        }
    }
}

/// An image on the node, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The normalised reference that it was asked for by.
    pub reference: String,
    /// Of the manifest or index that the reference resolved to, `sha256:…`.
    pub digest: String,
    /// The committed snapshot that a bot's layer stands on.
    pub chain_id: String,
    /// How it wants to be run.
    pub config: RunConfig,
}

/// The images of one node. Cheap to clone; clones share what is under way.
#[derive(Clone)]
pub struct Images {
    inner: Arc<Inner>,
    flights: Arc<Mutex<HashMap<FlightKey, WeakShared<Flight>>>>,
}

/// What one pull at a time is for. The logins are part of it: an image must not reach a bot, through another's pull, that
/// the registry would refuse it.
#[derive(Clone, PartialEq, Eq, Hash)]
struct FlightKey {
    reference: Reference,
    snapshotter: String,
    logins: Vec<Vec<Login>>,
}

type Flight = BoxFuture<'static, Result<Image, ImageError>>;

struct Inner {
    store: store::Store,
    clients: registry::Clients,
    options: ImageOptions,
    platform: manifest::Platform,
    turns: store::Turns,
    uses: collect::Uses,
    configs: Configs,
}

/// The run configs of the images last seen, by the digest that was asked for.
#[derive(Default)]
struct Configs(Mutex<HashMap<Digest, RunConfig>>);

impl Configs {
    /// How many are kept: a node runs bots of few images, and a hostile config may have megabytes.
    const MOST: usize = 16;

    fn get(&self, digest: &Digest) -> Option<RunConfig> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(digest).cloned()
    }

    fn put(&self, digest: &Digest, config: &RunConfig) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= Self::MOST && !kept.contains_key(digest) {
            kept.clear();
        }
        kept.insert(digest.clone(), config.clone());
    }
}

impl Images {
    /// Images on this containerd. A TLS provider must be installed process-wide before the first pull by https.
    pub fn new(containerd: Containerd, options: ImageOptions) -> Self {
        let inner = Inner {
            store: store::Store::new(containerd),
            clients: registry::Clients::new(options.authorities.clone()),
            options,
            platform: manifest::Platform::host(),
            turns: store::Turns::default(),
            uses: collect::Uses::default(),
            configs: Configs::default(),
        };
        Self { inner: Arc::new(inner), flights: Arc::default() }
    }

    /// The image if it is on the node: whole, unpacked for this snapshotter, for this machine. Asks no registry.
    pub async fn find(&self, reference: &Reference, snapshotter: &str) -> Result<Option<Image>, ImageError> {
        self.inner.find(reference, snapshotter).await
    }

    /// How the image that a digest names wants to be run, whatever the reference names by now. `None` when it is no longer
    /// on the node, and for a text that is no digest. What a digest names never changes, so the last answers are kept.
    pub async fn run_config(
        &self,
        reference: &Reference,
        digest: &str,
        snapshotter: &str,
    ) -> Result<Option<RunConfig>, ImageError> {
        let Some(digest) = Digest::parse(digest) else { return Ok(None) };
        if let Some(config) = self.inner.configs.get(&digest) {
            return Ok(Some(config));
        }
        Ok(self.inner.whole(reference, &digest, snapshotter).await?.map(|image| image.config))
    }

    /// Asks the registry what the reference is now, and brings what is missing of it. Where nothing is, this costs one
    /// HEAD. All who ask for one image with the same logins share one pull, which ends when the last of them is dropped.
    pub async fn pull(
        &self,
        reference: &Reference,
        snapshotter: &str,
        credentials: &Credentials,
    ) -> Result<Image, ImageError> {
        let logins = registry::endpoints(reference, &self.inner.options.mirrors);
        let logins = logins.iter().map(|e| e.logins(credentials)).collect();
        let key = FlightKey { reference: reference.clone(), snapshotter: snapshotter.to_owned(), logins };
        let flight = {
            let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
            flights.retain(|_, flight| flight.upgrade().is_some());
            match flights.get(&key).and_then(WeakShared::upgrade) {
                // One that has ended says how it was then; who asks now wants to know how it is now.
                Some(flight) if flight.peek().is_none() => flight,
                _ => {
                    let (inner, credentials) = (self.inner.clone(), credentials.clone());
                    let (reference, snapshotter) = (reference.clone(), snapshotter.to_owned());
                    let flight: Flight =
                        async move { inner.pull(&reference, &snapshotter, &credentials).await }.boxed();
                    let flight = flight.shared();
                    if let Some(weak) = flight.downgrade() {
                        flights.insert(key, weak);
                    }
                    flight
                }
            }
        };
        flight.await
    }

    /// Ends what pulls of an earlier agent left behind: their leases, and with them everything half-made. To be called
    /// at start, once this agent holds the node's lock. Gives the number of leases.
    pub async fn clear_interrupted(&self) -> Result<usize, ImageError> {
        self.inner.store.end_all_leases().await.map_err(|e| ImageError::RuntimeList(Arc::new(e)))
    }

    /// Removes images that nobody uses, the longest unused first, while the file system is fuller than the policy's
    /// high mark and until it is at the low one. Never one that a bot's layer stands on, in whatever snapshotter.
    pub async fn collect(
        &self,
        policy: &CollectionPolicy,
        file_system: &Path,
        in_use: &InUse,
    ) -> Result<Collected, ImageError> {
        self.inner.collect(policy, &|| FsUsage::of(file_system), in_use).await
    }
}
