//! Layers of a snapshotter that keeps no directory of a layer's own (block devices, `native`): containerd's own diff makes a tar of
//! what a layer has beyond the one below, and unpacks that onto another.
//!
//! It sees what moves a file's size or time, or its mode and owner; what it can't see is not in the version. So `Verified` is Unknown
//! of what was taken by it from a bot (docs/decisions/snapshots.md).

use std::collections::HashMap;
use std::time::Duration;

use containerd_client::services::v1::{
    ApplyRequest, CreateRequest as CreateLeaseRequest, DeleteRequest as DeleteLeaseRequest, DiffRequest,
};
use containerd_client::types::{Descriptor, Mount};
use jiff::{SignedDuration, Timestamp};

use crate::containerd::{CallContext as _, CallFailed, LeaseId};

use super::labels;
use super::version::{VersionError, Versions};

/// Nothing compresses it: it is unpacked again at once.
const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// Longest that reading or unpacking may take where no bot is frozen for it.
const LONGEST: Duration = Duration::from_secs(3600);

/// What a layer has beyond the one below, in the content store, under a lease of its own.
#[derive(Debug)]
pub struct Diff {
    blob: Descriptor,
    lease: LeaseId,
}

impl Versions {
    /// Makes the diff between `parent` and what `mounts` show. `key` names it: nobody else's at the same time. Safe twice.
    pub async fn diff(
        &self,
        snapshotter: &str,
        parent: &str,
        mounts: Vec<Mount>,
        key: &str,
        longest: Option<Duration>,
    ) -> Result<Diff, VersionError> {
        let name = format!("berth-diff-{key}");
        let bad = || VersionError::Missing { name: name.clone() };
        let lease = LeaseId::parse(&name).ok_or_else(bad)?;
        self.drop_lease(&lease).await?;
        // It ends by itself where nobody comes back.
        let until = Timestamp::now() + SignedDuration::from_hours(2);
        let expires = until.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let labels = HashMap::from([("containerd.io/gc.expire".to_owned(), expires)]);
        let create = CreateLeaseRequest { id: name.clone(), labels };
        let created = self.containerd.leases().create(self.containerd.request(create)).await;
        created.call("create lease", name.clone())?;
        let below = labels::below(key);
        let left = self.view(snapshotter, &below, parent).await?;
        let request = DiffRequest {
            left,
            right: mounts,
            media_type: TAR.to_owned(),
            r#ref: name.clone(),
            ..DiffRequest::default()
        };
        let mut request = self.containerd.leased(&lease, request);
        request.set_timeout(longest.unwrap_or(LONGEST));
        let made = self.containerd.diff().diff(request).await.call("diff", key);
        self.remove(snapshotter, &below).await?;
        let blob = made?.diff.ok_or_else(bad)?;
        Ok(Diff { blob, lease })
    }

    /// Unpacks a diff onto an active layer, and frees it. containerd says what it unpacked, which must be what was made.
    pub async fn apply(&self, snapshotter: &str, key: &str, diff: Diff) -> Result<(), VersionError> {
        let mounts = self.mounts(snapshotter, key).await?;
        let request = ApplyRequest { diff: Some(diff.blob.clone()), mounts, ..ApplyRequest::default() };
        let mut request = self.containerd.leased(&diff.lease, request);
        request.set_timeout(LONGEST);
        let applied = self.containerd.diff().apply(request).await.call("apply diff", key)?.applied;
        let (made, unpacked) = (diff.blob.digest, applied.map(|applied| applied.digest).unwrap_or_default());
        if made != unpacked {
            let first = format!("containerd unpacked {unpacked} of {made}");
            return Err(VersionError::Corrupt { name: key.to_owned(), count: 1, first });
        }
        Ok(self.drop_lease(&diff.lease).await?)
    }

    /// Fills the active layer `key`, which stands on `parent` as `version` does, with what that has beyond it.
    pub(super) async fn copy_by_diff(
        &self,
        snapshotter: &str,
        parent: &str,
        version: &str,
        key: &str,
    ) -> Result<(), VersionError> {
        let above = format!("{key}.above");
        let mounts = self.view(snapshotter, &above, version).await?;
        let diff = self.diff(snapshotter, parent, mounts, key, None).await;
        self.remove(snapshotter, &above).await?;
        self.apply(snapshotter, key, diff?).await
    }

    async fn drop_lease(&self, lease: &LeaseId) -> Result<(), CallFailed> {
        let request = DeleteLeaseRequest { id: lease.as_str().to_owned(), sync: true };
        let deleted = self.containerd.leases().delete(self.containerd.request(request)).await;
        match deleted.call("delete lease", lease.as_str()) {
            Err(error) if error.is_not_found() => Ok(()),
            done => done.map(drop),
        }
    }
}
