//! What bots left whose namespace was deleted: told by the BotNodes, and made versions of by an entry in a BotNode's spec.

use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use berth::api::bot_node::{Adoption, OrphanedLayer};
use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::condition::{ConditionType, find};
use berth::api::{BotNode, BotSnapshot};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::{ListParams, Patch, PatchParams};
use kube::runtime::wait::await_condition;
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;

use super::versions::aligned;

/// Longest that is waited for: the agent copies the layer and reads it back.
const LONGEST: Duration = Duration::from_secs(600);

async fn nodes(client: &Client) -> anyhow::Result<Vec<BotNode>> {
    let list = Api::<BotNode>::all(client.clone()).list(&ListParams::default()).await;
    Ok(list.context("can't list the BotNodes")?.items)
}

fn orphans(node: &BotNode) -> &[OrphanedLayer] {
    node.status.as_ref().map(|status| status.orphans.as_slice()).unwrap_or_default()
}

/// All that was left, as a table.
pub async fn list(client: &Client) -> anyhow::Result<String> {
    Ok(table(&nodes(client).await?))
}

fn table(nodes: &[BotNode]) -> String {
    let mut rows = vec![["NAME", "NODE", "NAMESPACE", "BOT", "BOTID", "LEFT", "EXPIRES"].map(str::to_owned).to_vec()];
    for node in nodes {
        rows.extend(orphans(node).iter().map(|left| {
            vec![
                left.name.clone(),
                node.name_any(),
                left.namespace.clone(),
                left.bot_container_name.clone(),
                left.bot_id.clone(),
                left.left_at.0.to_string(),
                left.expires_at.0.to_string(),
            ]
        }));
    }
    match rows.len() {
        1 => "no bot left anything in a namespace that was deleted\n".to_owned(),
        _ => aligned(&rows),
    }
}

/// Makes a version of what was left, and waits until it is one.
pub async fn adopt(client: &Client, namespace: &str, orphan: &str, name: Option<&str>) -> anyhow::Result<String> {
    let nodes = nodes(client).await?;
    let found = nodes.iter().find_map(|node| Some((node, orphans(node).iter().find(|left| left.name == orphan)?)));
    let Some((node, left)) = found else {
        bail!("no node has {orphan}; `kubectl berth adopt` lists what there is");
    };
    let name = name.map_or_else(|| format!("{}-adopted", left.bot_container_name), str::to_owned);
    let at = Api::<Namespace>::all(client.clone()).get_opt(namespace).await;
    if let Ok(None) = at {
        bail!("there is no namespace {namespace}; name one with -n");
    }
    let snapshots: Api<BotSnapshot> = Api::namespaced(client.clone(), namespace);
    let there = snapshots.get_opt(&name).await.with_context(|| format!("can't read BotSnapshot {namespace}/{name}"))?;
    ensure!(there.is_none(), "BotSnapshot {namespace}/{name} is there already; give another name with --as");
    let mut wanted = node.spec.adopt.clone();
    if let Some(asked) = wanted.iter().find(|entry| entry.orphan == orphan) {
        bail!("{orphan} is being adopted already, by {}/{}", asked.namespace, asked.snapshot_name);
    }
    let (orphan, snapshot_name) = (orphan.to_owned(), name.clone());
    wanted.push(Adoption { orphan, namespace: namespace.to_owned(), snapshot_name });
    // With the resourceVersion that it was read at: another's entry is never lost.
    let body = json!({"metadata": {"resourceVersion": node.resource_version()}, "spec": {"adopt": wanted}});
    let api: Api<BotNode> = Api::all(client.clone());
    let written = api.patch(&node.name_any(), &PatchParams::default(), &Patch::Merge(&body)).await;
    written.with_context(|| format!("can't write the entry into BotNode {}", node.name_any()))?;

    let over = |snapshot: Option<&BotSnapshot>| {
        let phase = snapshot.and_then(|s| s.status.as_ref()?.phase);
        matches!(phase, Some(SnapshotPhase::Ready | SnapshotPhase::Failed))
    };
    let waited = tokio::time::timeout(LONGEST, await_condition(snapshots, &name, over)).await;
    let waited = waited.with_context(|| {
        format!(
            "BotSnapshot {namespace}/{name} is not Ready after {} s; `kubectl describe bnode,bsnap` says why",
            LONGEST.as_secs()
        )
    })?;
    let snapshot = waited.context("can't watch the BotSnapshots")?.context("the BotSnapshot was deleted")?;
    let status = snapshot.status.unwrap_or_default();
    if status.phase == Some(SnapshotPhase::Failed) {
        let why = find(&status.conditions, ConditionType::Ready).map(|c| c.message.clone()).unwrap_or_default();
        bail!("BotSnapshot {namespace}/{name} failed: {why}");
    }
    let (version, bot_id) = (status.version.unwrap_or_default(), status.bot_id.unwrap_or_default());
    Ok(format!(
        "BotSnapshot {namespace}/{name} is version {version} of botId {bot_id}; a BotContainer of that spec.botId in {namespace} goes on \
         from it\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_is_a_table() {
        let node = |name: &str, orphans: serde_json::Value| -> BotNode {
            serde_json::from_value(json!({
                "apiVersion": "berth.dev/v1alpha1", "kind": "BotNode", "metadata": {"name": name}, "spec": {},
                "status": {"orphans": orphans},
            }))
            .unwrap()
        };
        let left = json!([{
            "name": "berth-v-u", "namespace": "team-a", "botContainerName": "web", "botUid": "u", "botId": "the-bot",
            "image": "docker.io/library/node:22", "version": 3, "leftAt": "2026-11-24T10:00:00Z",
            "expiresAt": "2026-12-01T10:00:00Z",
        }]);
        assert_eq!(
            table(&[node("node-1", json!([])), node("node-2", left)]),
            "\
NAME        NODE     NAMESPACE   BOT   BOTID     LEFT                   EXPIRES
berth-v-u   node-2   team-a      web   the-bot   2026-11-24T10:00:00Z   2026-12-01T10:00:00Z
"
        );
        assert_eq!(table(&[node("node-1", json!([]))]), "no bot left anything in a namespace that was deleted\n");
    }
}
