//! One watch a kind, into the world. A watch that begins again lists anew, and what the complete list does not have is
//! gone: a missed deletion is found as a set difference, and never from a list that was cut short.

use std::collections::HashSet;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

use futures::StreamExt as _;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use k8s_openapi::api::node::v1::RuntimeClass;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Resource, ResourceExt as _};
use serde::de::DeserializeOwned;
use tokio::sync::watch::Sender;

use crate::api::{BotContainer, BotNode, BotRecord, BotSnapshot};

use super::access;
use super::holder;
use super::world::World;
use super::{Context, Key, Name};

/// A kind that the world keeps.
pub trait Kept: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static {
    /// One was seen; `live`: by the watch, not in a list.
    fn seen(self, world: &mut World, live: bool, now: Instant) -> Vec<Key>;
    /// One is gone; with `uid`, only if it is that one.
    fn gone(world: &mut World, name: &Name, uid: Option<&str>, now: Instant) -> Vec<Key>;
    /// All that are known.
    fn known(world: &World) -> Vec<Name>;
}

macro_rules! kept {
    ($kind:ty, |$object:ident, $w:ident, $live:ident, $now:ident| $seen:expr,
     |$world:ident, $name:ident, $uid:ident, $at:ident| $gone:expr, $known:ident) => {
        impl Kept for $kind {
            fn seen(self, $w: &mut World, $live: bool, $now: Instant) -> Vec<Key> {
                let $object = self;
                $seen
            }
            fn gone($world: &mut World, $name: &Name, $uid: Option<&str>, $at: Instant) -> Vec<Key> {
                $gone
            }
            fn known(world: &World) -> Vec<Name> {
                world.$known()
            }
        }
    };
}

kept!(BotContainer, |o, w, _live, now| w.saw_bot(o, now), |w, name, uid, now| w.bot_gone(name, uid, now), bot_names);
kept!(
    BotRecord,
    |o, w, _live, now| w.saw_record(o, now),
    |w, name, uid, now| w.record_gone(name, uid, now),
    record_names
);
kept!(
    BotSnapshot,
    |o, w, _live, now| w.saw_snapshot(o, now),
    |w, name, uid, now| w.snapshot_gone(name, uid, now),
    snapshot_names
);
kept!(
    BotNode,
    |o, w, _live, now| w.saw_bot_node(o, now),
    |w, name, _uid, now| w.bot_node_gone(&name.name, now),
    bot_node_names
);
kept!(Node, |o, w, _live, now| w.saw_node(o, now), |w, name, _uid, now| w.node_gone(&name.name, now), node_names);
kept!(
    Lease,
    |o, w, live, now| w.saw_lease(o, live, now),
    |w, name, _uid, now| w.lease_gone(&name.name, now),
    lease_names
);
kept!(
    Pod,
    |o, w, _live, _now| w.saw_holder(&o.name_any(), holder::Seen::of(&o)),
    |w, name, _uid, _now| w.holder_gone(&name.name),
    holder_names
);
kept!(Role, |o, w, _live, _now| w.saw_role(&o), |w, name, _uid, _now| w.role_gone(name), role_names);
kept!(RoleBinding, |o, w, _live, _now| w.saw_binding(&o), |w, name, _uid, _now| w.binding_gone(name), binding_names);
kept!(
    ServiceAccount,
    |o, w, _live, _now| w.saw_account(o.name_any()),
    |w, name, _uid, _now| w.account_gone(&name.name),
    account_names
);
kept!(RuntimeClass, |o, w, _live, _now| w.saw_class(o), |w, name, _uid, _now| w.class_gone(&name.name), class_names);

/// Watches a kind for ever; counts itself into `synced` after its first complete list.
pub async fn watch<K: Kept>(context: Arc<Context>, api: Api<K>, kind: &'static str, synced: Sender<usize>) {
    // What is a node's has no namespace in the world: a node has one name.
    let by_namespace = !matches!(kind, "Lease" | "ServiceAccount" | "Pod");
    let name_of = |object: &K| Name {
        namespace: object.namespace().filter(|_| by_namespace).unwrap_or_default(),
        name: object.name_any(),
    };
    // Of those that the cluster has for its own ends only ours are of interest.
    let config = match kind {
        "Pod" => watcher::Config::default().labels(holder::SELECTOR),
        "Role" | "RoleBinding" => watcher::Config::default().labels(access::LABEL),
        _ => watcher::Config::default(),
    };
    let mut events = watcher(api, config).default_backoff().boxed();
    let mut listed: HashSet<Name> = HashSet::new();
    let mut first = true;
    while let Some(event) = events.next().await {
        let now = Instant::now();
        let keys = match event {
            Ok(watcher::Event::Init) => {
                listed.clear();
                Vec::new()
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed.insert(name_of(&object));
                object.seen(&mut context.world(), false, now)
            }
            Ok(watcher::Event::InitDone) => {
                let mut world = context.world();
                let missing: Vec<Name> = K::known(&world).into_iter().filter(|n| !listed.contains(n)).collect();
                let keys = missing.iter().flat_map(|name| K::gone(&mut world, name, None, now)).collect();
                drop(world);
                listed = HashSet::new();
                if std::mem::take(&mut first) {
                    synced.send_modify(|n| *n += 1);
                }
                keys
            }
            Ok(watcher::Event::Apply(object)) => object.seen(&mut context.world(), true, now),
            Ok(watcher::Event::Delete(object)) => {
                let uid = object.uid();
                K::gone(&mut context.world(), &name_of(&object), uid.as_deref(), now)
            }
            Err(error) => {
                context.metrics.watch_failed(kind);
                tracing::warn!(kind, error = &error as &dyn std::error::Error, "the watch broke; it begins again");
                Vec::new()
            }
        };
        context.queue.add_all(keys, kind);
    }
}
