//! Versions on this node: each is a committed snapshot in containerd, and a folder beside with its manifest and the facts of
//! its taking.
//!
//! ```text
//! berth-v-SNAPSHOT_UID.copy   active      being copied into; nothing that may be used
//! berth-v-SNAPSHOT_UID        committed   the version; its labels say whose it is, and on which image it stands
//! STATE_DIR/snapshots/SNAPSHOT_UID/manifest, taken.json
//! ```
//!
//! All names are computed from the BotSnapshot's uid, so that what a death left is found again. What has to do with many bytes
//! is done by a copier (`src/layer`), a process of its own.

use std::collections::HashMap;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use containerd_client::services::v1::snapshots::{
    CommitSnapshotRequest, Info, MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
    UpdateSnapshotRequest, ViewSnapshotRequest,
};
use containerd_client::services::v1::{
    AddResourceRequest, CreateRequest as CreateLeaseRequest, DeleteImageRequest, DeleteRequest as DeleteLeaseRequest,
    Resource,
};
use containerd_client::types::Mount;
use jiff::Timestamp;
use prost_types::FieldMask;
use serde::{Deserialize, Serialize};
use tonic::Code;

use crate::api::bot_snapshot::{Changes, Taken as TakenState};
use crate::api::condition::Reason;
use crate::api::ids::ContainerId;
use crate::containerd::{CallContext as _, CallFailed, Containerd};
use crate::layer::{CopierError, Copiers, Failure, FailureKind, Job, Said, Summary};

use super::labels;
use super::observe::Layer;
use super::root::{self, MountFailed};

/// Longest that a commit may take: containerd counts what is in the layer meanwhile.
const COMMIT_DEADLINE: std::time::Duration = std::time::Duration::from_secs(300);

/// The BotSnapshot that a version is of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    /// Its uid, which its names are computed from.
    pub uid: String,
    /// Its name.
    pub name: String,
    /// Its namespace.
    pub namespace: String,
    /// The bot that it belongs to.
    pub bot_id: String,
    /// Its number.
    pub number: i64,
    /// Whether there is no BotSnapshot of it: the namespace of its bot was being deleted. Uid and name are the bot's then.
    #[serde(default)]
    pub orphan: bool,
}

impl Version {
    /// Name in containerd.
    pub fn runtime_name(&self) -> String {
        labels::version(&self.uid)
    }

    /// Labels of the version, and of the copy that becomes it. `image` and `digest` are what it stands on.
    pub fn labels(&self, image: &str, digest: &str) -> HashMap<String, String> {
        let orphaned = self.orphan.then(|| (labels::ORPHANED, Timestamp::now().to_string()));
        [
            (labels::SNAPSHOT_UID, self.uid.clone()),
            (labels::SNAPSHOT, self.name.clone()),
            (labels::NAMESPACE, self.namespace.clone()),
            (labels::BOT_ID, self.bot_id.clone()),
            (labels::VERSION, self.number.to_string()),
            (labels::IMAGE, image.to_owned()),
            (labels::IMAGE_DIGEST, digest.to_owned()),
            (labels::GC_ROOT, Timestamp::now().to_string()),
        ]
        .into_iter()
        .chain(orphaned)
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
    }
}

/// The facts of a version's taking.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Taken {
    /// Whose it is.
    pub version: Version,
    /// The instant that it holds.
    pub taken_at: Timestamp,
    /// How long the bot was frozen for it. Milliseconds.
    pub frozen_millis: u64,
    /// In which state the bot was.
    pub taken: TakenState,
    /// What it stands on in containerd.
    pub parent: String,
    /// The snapshotter that holds it.
    pub snapshotter: String,
    /// Normalised reference of the image below.
    pub image: String,
    /// Its digest.
    pub digest: String,
    /// Size on disk. Bytes. `None` until it was counted.
    pub size_bytes: Option<u64>,
    /// Paths that are no directories.
    pub files: Option<u64>,
    /// Against the version before.
    pub changes: Option<Changes>,
    /// The OCI image that was made of it.
    #[serde(default)]
    pub exported: Option<Exported>,
    /// Whether containerd's own diff made it, so that what was copied could not be compared with what the bot had.
    #[serde(default)]
    pub by_diff: bool,
}

impl Taken {
    /// Of a bot's layer, before anything is known of what is in it.
    pub fn of(
        version: &Version,
        snapshotter: &str,
        layer: &Layer,
        taken_at: Timestamp,
        frozen_millis: u64,
        taken: TakenState,
    ) -> Self {
        Self {
            version: version.clone(),
            taken_at,
            frozen_millis,
            taken,
            parent: layer.parent.clone(),
            snapshotter: snapshotter.to_owned(),
            image: layer.image.clone(),
            digest: layer.digest.clone(),
            size_bytes: None,
            files: None,
            changes: None,
            exported: None,
            by_diff: false,
        }
    }

    /// The same, once its layer was read.
    pub fn described(self, summary: Summary) -> Self {
        Self { size_bytes: Some(summary.size_bytes), files: Some(summary.files), changes: summary.changes, ..self }
    }
}

/// An OCI image in the content store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Exported {
    /// Of its manifest.
    pub digest: String,
    /// What it costs beside the version. Bytes.
    pub bytes: u64,
}

/// Something could not be done with a version.
#[derive(Debug, thiserror::Error)]
pub enum VersionError {
    /// containerd refused.
    #[error("the runtime refused")]
    Runtime(#[from] CallFailed),
    /// The copier could not be run, or died.
    #[error("the copier can't be used")]
    Copier(#[from] CopierError),
    /// The copier gave up.
    #[error("{}", .0.message)]
    Failed(Failure),
    /// A file of ours could not be read or written.
    #[error("can't write {}; see to the node's disk", .path.display())]
    Files {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A layer could not be mounted to be read.
    #[error("a layer can't be opened")]
    Mount(#[from] MountFailed),
    /// The snapshotter keeps no directory of a layer's own.
    #[error("the snapshotter {snapshotter} has no directory of a layer's own that could be copied; use overlayfs")]
    NoDirectory {
        /// Its name.
        snapshotter: String,
    },
    /// It is not there.
    #[error("{name} is not in containerd on this node")]
    Missing {
        /// Name in containerd.
        name: String,
    },
    /// It is not what its manifest says.
    #[error("{name} is not what its manifest says, in {count} places, first: {first}")]
    Corrupt {
        /// Name in containerd.
        name: String,
        /// How many differences there are.
        count: u64,
        /// One of them.
        first: String,
    },
}

impl VersionError {
    /// The condition's reason.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Runtime(error) if error.is_unavailable() => Reason::RuntimeUnavailable,
            Self::Runtime(error) if error.is_storage() => Reason::StorageFailed,
            Self::Runtime(_) | Self::Copier(_) => Reason::RuntimeFailed,
            Self::Failed(failure) => match failure.kind {
                FailureKind::TooManyChanges => Reason::TooManyChanges,
                FailureKind::Storage => Reason::StorageFailed,
                FailureKind::Mismatch => Reason::SnapshotCorrupt,
                FailureKind::Unsupported => Reason::ExportUnsupported,
                FailureKind::Freezer | FailureKind::Aborted | FailureKind::Other => Reason::RuntimeFailed,
            },
            Self::Files { .. } | Self::Mount(_) => Reason::StorageFailed,
            Self::NoDirectory { .. } => Reason::SnapshotsUnsupported,
            Self::Missing { .. } => Reason::SnapshotLost,
            Self::Corrupt { .. } => Reason::SnapshotCorrupt,
        }
    }

    /// Whether trying again can help.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Runtime(_) | Self::Copier(_) | Self::Files { .. } | Self::Mount(_) | Self::Missing { .. } => true,
            Self::Failed(failure) => {
                !matches!(failure.kind, FailureKind::TooManyChanges | FailureKind::Mismatch | FailureKind::Unsupported)
            }
            Self::NoDirectory { .. } | Self::Corrupt { .. } => false,
        }
    }
}

/// Where a layer's own files are, and those below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dirs {
    /// The layer's own.
    pub own: PathBuf,
    /// The layers below, the top one first.
    pub lower: Vec<PathBuf>,
}

impl Dirs {
    /// What the mounts of a layer say; `None` for a snapshotter that has no such directory. `writable`: the mounts are of an
    /// active layer, not of a view on top of a committed one.
    fn of(mounts: &[Mount], writable: bool) -> Option<Self> {
        let [mount] = mounts else { return None };
        let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
        let lower =
            || option("lowerdir=").unwrap_or_default().split(':').filter(|dir| !dir.is_empty()).map(PathBuf::from);
        match mount.r#type.as_str() {
            "overlay" if writable => Some(Self { own: option("upperdir=")?.into(), lower: lower().collect() }),
            "overlay" => {
                let mut lower = lower();
                Some(Self { own: lower.next()?, lower: lower.collect() })
            }
            // overlayfs's own way for a layer that stands on nothing; others bind a whole tree.
            "bind" if mount.source.ends_with("/fs") => {
                Some(Self { own: mount.source.clone().into(), lower: Vec::new() })
            }
            _ => None,
        }
    }

    /// Where a copier may keep what it has copied, on the same file system: containerd removes it with the layer.
    pub fn stage(&self) -> PathBuf {
        self.own.parent().unwrap_or(Path::new("/")).join("berth-stage")
    }
}

/// A committed layer's files, opened.
#[derive(Debug)]
pub struct Opened {
    /// Where they are.
    pub dirs: Dirs,
    /// Of a tree that has the layers below in it: what keeps it open.
    root: Option<OwnedFd>,
    /// Snapshotter and key of a view that is there as long.
    view: Option<(String, String)>,
}

impl Opened {
    /// Whether the files of the layers below are among them, the snapshotter having no directory of a layer's own.
    pub fn is_whole(&self) -> bool {
        self.root.is_some()
    }
}

/// The versions of this node.
#[derive(Clone, Debug)]
pub struct Versions {
    pub(super) containerd: Containerd,
    copiers: Copiers,
    dir: PathBuf,
    mnt_dir: PathBuf,
}

impl Versions {
    /// `dir` is where manifests are kept, a folder a version; `mnt_dir` where layers are mounted for a moment.
    pub fn new(containerd: Containerd, copiers: Copiers, dir: PathBuf, mnt_dir: PathBuf) -> Self {
        Self { containerd, copiers, dir, mnt_dir }
    }

    /// The copiers.
    pub fn copiers(&self) -> &Copiers {
        &self.copiers
    }

    fn folder(&self, uid: &str) -> PathBuf {
        self.dir.join(uid)
    }

    /// Where a version's manifest is, whether or not it is there.
    pub fn manifest(&self, uid: &str) -> PathBuf {
        self.folder(uid).join("manifest")
    }

    /// The facts of a version's taking, if they are there and whole.
    pub fn taken(&self, uid: &str) -> Option<Taken> {
        serde_json::from_slice(&fs::read(self.folder(uid).join("taken.json")).ok()?).ok()
    }

    /// Makes a version's folder.
    pub fn make_folder(&self, uid: &str) -> Result<(), VersionError> {
        let path = self.folder(uid);
        fs::create_dir_all(&path).map_err(|source| VersionError::Files { path, source })
    }

    /// Notes the facts of a version's taking; whole or not at all.
    pub fn note(&self, uid: &str, taken: &Taken) -> Result<(), VersionError> {
        self.make_folder(uid)?;
        let path = self.folder(uid).join("taken.json");
        let write = || -> io::Result<()> {
            let new = path.with_extension("new");
            let mut file = fs::File::create(&new)?;
            file.write_all(&serde_json::to_vec(taken)?)?;
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(|source| VersionError::Files { path: path.clone(), source })
    }

    /// Gives a version the manifest of another, whose contents it has.
    pub fn inherit(&self, from: &str, uid: &str) -> Result<(), VersionError> {
        self.make_folder(uid)?;
        let (path, new) = (self.manifest(uid), self.manifest(uid).with_extension("new"));
        let copied = fs::copy(self.manifest(from), &new).and_then(|_| {
            fs::File::open(&new)?.sync_all()?;
            fs::rename(&new, &path)
        });
        copied.map_err(|source| VersionError::Files { path, source })
    }

    /// Forgets a version's manifest and facts.
    pub fn forget(&self, uid: &str) -> Result<(), VersionError> {
        let path = self.folder(uid);
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(VersionError::Files { path, source: error }),
            _ => Ok(()),
        }
    }

    /// The versions, by uid, of which there is something beside containerd.
    pub fn folders(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        names.collect()
    }

    /// Whether there is something of a version beside containerd.
    pub fn has_folder(&self, uid: &str) -> bool {
        self.folder(uid).exists()
    }

    /// What containerd says of a layer.
    pub async fn stat(&self, snapshotter: &str, key: &str) -> Result<Option<Info>, CallFailed> {
        let request = StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.containerd.snapshots().stat(self.containerd.request(request)).await;
        match answer.call("stat snapshot", key) {
            Ok(answer) => Ok(answer.info),
            Err(error) if error.is_not_found() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All layers and versions that match a filter of containerd's.
    pub async fn list(&self, snapshotter: &str, filter: String) -> Result<Vec<Info>, CallFailed> {
        let filters = if filter.is_empty() { Vec::new() } else { vec![filter] };
        self.containerd.list_snapshots(snapshotter, filters).await
    }

    /// Where an active layer's files are.
    pub async fn active_dirs(&self, snapshotter: &str, key: &str) -> Result<Dirs, VersionError> {
        let mounts = self.mounts(snapshotter, key).await?;
        Dirs::of(&mounts, true).ok_or_else(|| VersionError::NoDirectory { snapshotter: snapshotter.to_owned() })
    }

    /// Opens a committed layer's files: its own where there is a directory of these, else all that is seen through it. To be given back
    /// to [`Self::close`].
    pub async fn open_committed(&self, snapshotter: &str, name: &str) -> Result<Opened, VersionError> {
        let key = format!("{name}.view");
        let mounts = self.view(snapshotter, &key, name).await?;
        if let Some(dirs) = Dirs::of(&mounts, false) {
            // Nothing but its mounts was wanted.
            self.remove(snapshotter, &key).await?;
            return Ok(Opened { dirs, root: None, view: None });
        }
        let (dirs, root) = self.open_tree(&mounts, &key).await?;
        Ok(Opened { dirs, root: Some(root), view: Some((snapshotter.to_owned(), key)) })
    }

    /// Ends what [`Self::open_committed`] began. What was opened and never closed goes with the next look, or with its version.
    pub async fn close(&self, opened: Opened) -> Result<(), CallFailed> {
        let Opened { dirs: _, root, view } = opened;
        drop(root);
        match view {
            Some((snapshotter, key)) => self.remove(&snapshotter, &key).await,
            None => Ok(()),
        }
    }

    /// Makes a view of a committed layer anew, and gives its mounts.
    pub async fn view(&self, snapshotter: &str, key: &str, parent: &str) -> Result<Vec<Mount>, VersionError> {
        let view = || async {
            let labels = HashMap::from([(labels::GC_ROOT.to_owned(), Timestamp::now().to_string())]);
            let (snapshotter, key_, parent) = (snapshotter.to_owned(), key.to_owned(), parent.to_owned());
            let request = ViewSnapshotRequest { snapshotter, key: key_, parent, labels };
            let answer = self.containerd.snapshots().view(self.containerd.request(request)).await;
            answer.call("view snapshot", key).map(|answer| answer.mounts)
        };
        match view().await {
            // Of a look that was cut off.
            Err(error) if error.is_already_exists() => {
                self.remove(snapshotter, key).await?;
                Ok(view().await?)
            }
            Err(error) if error.is_not_found() => Err(VersionError::Missing { name: parent.to_owned() }),
            done => Ok(done?),
        }
    }

    /// Opens the tree that mounts make, for copiers to read or to fill.
    pub async fn open_tree(&self, mounts: &[Mount], name: &str) -> Result<(Dirs, OwnedFd), VersionError> {
        let (mounts, dir, at) = (mounts.to_vec(), self.mnt_dir.clone(), name.to_owned());
        let opened = tokio::task::spawn_blocking(move || root::open(&mounts, &dir, &at)).await;
        let root = opened.unwrap_or_else(|error| Err(MountFailed::Unknown(error.to_string())))?;
        let own = format!("/proc/{}/fd/{}", std::process::id(), root.as_raw_fd()).into();
        Ok((Dirs { own, lower: Vec::new() }, root))
    }

    /// The mounts of an active layer.
    pub async fn mounts(&self, snapshotter: &str, key: &str) -> Result<Vec<Mount>, CallFailed> {
        let request = MountsRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.containerd.snapshots().mounts(self.containerd.request(request)).await;
        answer.call("get mounts of snapshot", key).map(|answer| answer.mounts)
    }

    /// Makes an active layer.
    pub async fn prepare(
        &self,
        snapshotter: &str,
        key: &str,
        parent: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), CallFailed> {
        let (snapshotter, key_, parent) = (snapshotter.to_owned(), key.to_owned(), parent.to_owned());
        let request = PrepareSnapshotRequest { snapshotter, key: key_, parent, labels };
        let answer = self.containerd.snapshots().prepare(self.containerd.request(request)).await;
        answer.call("prepare snapshot", key).map(|_| ())
    }

    /// Makes a committed layer of an active one. Safe twice.
    pub async fn commit(
        &self,
        snapshotter: &str,
        key: &str,
        name: &str,
        labels: HashMap<String, String>,
    ) -> Result<(), CallFailed> {
        let (snapshotter_, key_, name_) = (snapshotter.to_owned(), key.to_owned(), name.to_owned());
        let request = CommitSnapshotRequest { snapshotter: snapshotter_, name: name_, key: key_, labels };
        let mut request = self.containerd.request(request);
        request.set_timeout(COMMIT_DEADLINE);
        match self.containerd.snapshots().commit(request).await.call("commit snapshot", key) {
            Ok(_) => Ok(()),
            // Done before, and its answer was lost.
            Err(error) if error.is_not_found() || error.is_already_exists() => {
                match self.stat(snapshotter, name).await? {
                    Some(_) => Ok(()),
                    None => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// Keeps the collector from what a version needs besides its layers: the config of its image, which whatever is started from it
    /// reads. A lease of the version's name. Safe twice.
    pub async fn hold(&self, name: &str, digest: &str) -> Result<(), CallFailed> {
        let create = CreateLeaseRequest { id: name.to_owned(), labels: HashMap::new() };
        let created = self.containerd.leases().create(self.containerd.request(create)).await;
        match created.call("create lease", name) {
            Err(error) if error.is_already_exists() => {}
            done => drop(done?),
        }
        let content = Resource { id: digest.to_owned(), r#type: "content".to_owned() };
        let add = AddResourceRequest { id: name.to_owned(), resource: Some(content) };
        let added = self.containerd.leases().add_resource(self.containerd.request(add)).await;
        added.call("add to lease", name).map(|_| ())
    }

    /// Ends a version's lease, and the name of an image that was made of it. That is as large as the version, so its bytes are
    /// waited for.
    async fn let_go(&self, name: &str) -> Result<(), CallFailed> {
        let request = DeleteImageRequest { name: name.to_owned(), ..DeleteImageRequest::default() };
        let exported =
            match self.containerd.images().delete(self.containerd.request(request)).await.call("delete image", name) {
                Ok(_) => true,
                Err(error) if error.is_not_found() => false,
                Err(error) => return Err(error),
            };
        let request = DeleteLeaseRequest { id: name.to_owned(), sync: exported };
        match self.containerd.leases().delete(self.containerd.request(request)).await.call("delete lease", name) {
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map(|_| ()),
        }
    }

    /// Removes a layer, if it is there.
    pub async fn remove(&self, snapshotter: &str, key: &str) -> Result<(), CallFailed> {
        let request = RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
        let answer = self.containerd.snapshots().remove(self.containerd.request(request)).await;
        match answer.call("remove snapshot", key) {
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map(|_| ()),
        }
    }

    /// Writes the manifest of a committed layer, the version `uid`'s, and says what changed against the one before.
    pub async fn describe(
        &self,
        snapshotter: &str,
        name: &str,
        uid: &str,
        before: Option<PathBuf>,
    ) -> Result<Summary, VersionError> {
        let opened = self.open_committed(snapshotter, name).await?;
        // Against the layers below nothing can be told of a tree that has them in it.
        let told = before.is_some() || !opened.is_whole();
        let Dirs { own, lower } = opened.dirs.clone();
        let summary = self.run(&Job::Describe { source: own, manifest: self.manifest(uid), before, lower }).await?;
        self.close(opened).await?;
        Ok(Summary { changes: summary.changes.filter(|_| told), ..summary })
    }

    /// Reads an active layer that no process uses against a manifest of the whole tree that is seen through it.
    async fn compare(&self, snapshotter: &str, key: &str, manifest: Option<PathBuf>) -> Result<Summary, VersionError> {
        let Some(manifest) = manifest else { return Ok(Summary::default()) };
        let mounts = self.mounts(snapshotter, key).await?;
        // Open until the copier has ended, which reads through it.
        let (dirs, _root) = self.open_tree(&mounts, key).await?;
        self.run(&Job::Verify { source: dirs.own, manifest, unpacked: true }).await
    }

    /// Frees a version's bytes, or, where a fork stands on it, notes that they go with the last of these. Whether they went.
    pub async fn release(&self, snapshotter: &str, name: &str) -> Result<bool, CallFailed> {
        // Forks have leases of their own.
        self.let_go(name).await?;
        // Of a look that was cut off.
        self.remove(snapshotter, &format!("{name}.view")).await?;
        match self.remove(snapshotter, name).await {
            Ok(()) => Ok(true),
            Err(error) if error.status.code() == Code::FailedPrecondition => {
                self.label(snapshotter, name, labels::RELEASED, &Timestamp::now().to_string()).await?;
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Sets one label of a layer; an empty value removes it.
    pub async fn label(&self, snapshotter: &str, key: &str, label: &str, value: &str) -> Result<(), CallFailed> {
        let labels = HashMap::from([(label.to_owned(), value.to_owned())]);
        let info = Info { name: key.to_owned(), labels, ..Info::default() };
        let update_mask = Some(FieldMask { paths: vec![format!("labels.{label}")] });
        let request = UpdateSnapshotRequest { snapshotter: snapshotter.to_owned(), info: Some(info), update_mask };
        let answer = self.containerd.snapshots().update(self.containerd.request(request)).await;
        answer.call("update snapshot", key).map(|_| ())
    }

    /// Makes the active layer `key` of a bot with what a version holds, on what that stands on. Cut off: the layer has the label
    /// [`labels::FILLING`], and the next time begins again.
    pub async fn copy_out(
        &self,
        snapshotter: &str,
        version_uid: &str,
        key: &str,
        mut labels: HashMap<String, String>,
    ) -> Result<(), VersionError> {
        let name = labels::version(version_uid);
        let Some(info) = self.stat(snapshotter, &name).await? else { return Err(VersionError::Missing { name }) };
        let from = self.open_committed(snapshotter, &name).await?;
        self.remove(snapshotter, key).await?;
        labels.insert(labels::FILLING.to_owned(), version_uid.to_owned());
        self.prepare(snapshotter, key, &info.parent, labels).await?;
        let manifest = Some(self.manifest(version_uid)).filter(|path| path.exists());
        let summary = if from.is_whole() {
            self.close(from).await?;
            self.copy_by_diff(snapshotter, &info.parent, &name, key).await?;
            self.compare(snapshotter, key, manifest).await?
        } else {
            let to = self.active_dirs(snapshotter, key).await?;
            let stage = to.stage();
            self.run(&Job::Clone { source: from.dirs.own, dest: to.own, stage, manifest }).await?
        };
        intact(&name, &summary)?;
        Ok(self.label(snapshotter, key, labels::FILLING, "").await?)
    }

    /// Runs a copier to its end. Dropped: the copier ends.
    pub async fn run(&self, job: &Job) -> Result<Summary, VersionError> {
        let mut copy = self.copiers.start(job).await?;
        loop {
            match copy.next().await? {
                Said::Done(summary) => return Ok(summary),
                Said::Failed(failure) => return Err(VersionError::Failed(failure)),
                Said::Precopied { .. } | Said::Taken { .. } | Said::TooMuch { .. } | Said::Still => {}
            }
        }
    }
}

/// Whether a copier found a version to be what its manifest says.
pub fn intact(name: &str, summary: &Summary) -> Result<(), VersionError> {
    if summary.mismatch_count == 0 {
        return Ok(());
    }
    let first = summary.mismatches.first().cloned().unwrap_or_default();
    Err(VersionError::Corrupt { name: name.to_owned(), count: summary.mismatch_count, first })
}

/// Whether a layer's label says that it is still being filled.
pub fn is_filling(labels: &HashMap<String, String>) -> bool {
    labels.get(labels::FILLING).is_some_and(|version| !version.is_empty())
}

/// The active layers of a bot among `infos`.
pub fn layers_of<'a>(id: &'a ContainerId, infos: &'a [Info]) -> impl Iterator<Item = &'a Info> {
    infos.iter().filter(move |info| labels::layer_number(id, &info.name).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(type_: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            r#type: type_.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn a_layers_own_directory_is_read_from_its_mounts() {
        let dirs = |own: &str, lower: &[&str]| {
            Some(Dirs { own: own.into(), lower: lower.iter().map(PathBuf::from).collect() })
        };
        let active = mount(
            "overlay",
            "overlay",
            &["index=off", "workdir=/s/9/work", "upperdir=/s/9/fs", "lowerdir=/s/2/fs:/s/1/fs"],
        );
        assert_eq!(Dirs::of(&[active], true), dirs("/s/9/fs", &["/s/2/fs", "/s/1/fs"]));
        let view = mount("overlay", "overlay", &["lowerdir=/s/9/fs:/s/2/fs"]);
        assert_eq!(Dirs::of(&[view], false), dirs("/s/9/fs", &["/s/2/fs"]));
        let alone = mount("bind", "/s/9/fs", &["rw", "rbind"]);
        assert_eq!(Dirs::of(&[alone], true), dirs("/s/9/fs", &[]));
        // `native` binds a tree that is the image's as well.
        assert_eq!(Dirs::of(&[mount("bind", "/native/snapshots/9", &["rbind"])], true), None);
        assert_eq!(Dirs::of(&[mount("ext4", "/dev/dm-3", &[])], true), None);
        assert_eq!(Dirs::of(&[], true), None);
        assert_eq!(dirs("/s/9/fs", &[]).unwrap().stage(), Path::new("/s/9/berth-stage"));
    }
}
