//! BotRecords: who holds a botId, and where its layer is. Creating one is the lock; every change of one carries the
//! resourceVersion and uid that it was computed from.
//!
//! ```text
//! no record                       the first bot to be placed creates it
//! holder is this bot              go on; nodeName is where its layer is
//! holder lives                    wait (BotIdInUse)
//! holder gone, or none            take it over; its nodeName, if any, is where the layer is
//! no bot, no snapshot left        deleted; at once after an orderly end, after a grace time where the holder vanished
//! ```

use std::time::{Duration, Instant};

use kube::ResourceExt as _;
use kube::api::{Api, DeleteParams, Patch, PostParams, Preconditions};
use serde_json::{Value, json};

use crate::api::bot_container::DeletionPolicy;
use crate::api::bot_record::{Given, Holder};
use crate::api::{BotContainer, BotRecord, BotRecordSpec, CONTROLLER};

use super::error::Error;
use super::snapshot;
use super::{Context, Name, Next};

/// How long a record outlives a holder that vanished without an orderly end (a stripped finalizer, a backup being
/// restored record first): who comes back with the botId within it is bound to the node of its layer.
pub const GRACE: Duration = Duration::from_secs(60);

/// The botId in force: `spec.botId`, or the object's uid.
pub fn bot_id(bot: &BotContainer) -> String {
    bot.spec.bot_id.clone().or_else(|| bot.uid()).unwrap_or_default()
}

/// How a bot stands to the record of its botId.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hold {
    /// There is no record.
    None,
    /// It is the holder, its layer is on that node.
    Mine(Option<String>),
    /// Nobody living is; the layer that the last one left, if any, is on that node.
    Free(Option<String>),
    /// Another BotContainer, by name.
    Other(String),
}

/// How a bot stands to a record. `lives` tells whether a BotContainer of a uid is there.
pub fn hold(uid: &str, record: Option<&BotRecord>, lives: impl FnOnce(&Holder) -> bool) -> Hold {
    let Some(record) = record else { return Hold::None };
    let node = record.spec.node_name.clone();
    match &record.spec.holder {
        None => Hold::Free(node),
        Some(holder) if holder.uid == uid => Hold::Mine(node),
        Some(holder) if lives(holder) => Hold::Other(holder.name.clone()),
        Some(_) => Hold::Free(node),
    }
}

/// The record of a botId that nobody holds, made where there is none.
pub async fn ensure(context: &Context, namespace: &str, bot_id: &str) -> Result<BotRecord, Error> {
    const STEP: &str = "keeping the botId";
    let name = Name { namespace: namespace.to_owned(), name: bot_id.to_owned() };
    if let Some(record) = context.world().record(&name) {
        return Ok((*record).clone());
    }
    let api: Api<BotRecord> = Api::namespaced(context.client.clone(), namespace);
    let object = format!("BotRecord {namespace}/{bot_id}");
    let last_version = context.world().highest_version(namespace, bot_id);
    let spec = BotRecordSpec { bot_id: bot_id.to_owned(), last_version, ..BotRecordSpec::default() };
    let params = PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() };
    let made = match context.write(STEP, &object, api.create(&params, &BotRecord::new(bot_id, spec))).await {
        // Made by another, or by us and its answer lost.
        Err(error @ Error::Conflict { .. }) => context.read(STEP, &object, api.get_opt(bot_id)).await?.ok_or(error)?,
        done => done?,
    };
    let wake = context.world().saw_record(made.clone(), Instant::now());
    context.queue.add_all(wake, "own write");
    Ok(made)
}

/// Makes `bot` the holder of its botId with its layer on `node`: creates the record or changes `before`.
pub async fn take(context: &Context, bot: &BotContainer, before: Option<&BotRecord>, node: &str) -> Result<(), Error> {
    const STEP: &str = "taking the botId";
    let namespace = bot.namespace().unwrap_or_default();
    let id = bot_id(bot);
    let object = format!("BotRecord {namespace}/{id}");
    let api: Api<BotRecord> = Api::namespaced(context.client.clone(), &namespace);
    let holder = Holder { name: bot.name_any(), uid: bot.uid().unwrap_or_default() };
    // A rollback that is there at creation counts as done, also where the object goes on from another's record.
    let done = bot.status.as_ref().and_then(|s| s.rollback.as_ref()).map(|r| r.id.clone());
    let done = done.or_else(|| bot.spec.rollback.as_ref().map(|r| r.id.clone()));
    let written = match before {
        None => {
            let spec = BotRecordSpec {
                bot_id: id.clone(),
                holder: Some(holder),
                node_name: Some(node.to_owned()),
                last_version: context.world().highest_version(&namespace, &id),
                last_given: None,
                last_scheduled: None,
                last_rollback_id: done,
            };
            let params = PostParams { field_manager: Some(CONTROLLER.to_owned()), ..PostParams::default() };
            context.write(STEP, &object, api.create(&params, &BotRecord::new(&id, spec))).await
        }
        Some(record) => {
            if let Some(old) = record.spec.holder.as_ref().filter(|old| old.uid != holder.uid) {
                ensure_gone(context, &namespace, old).await?;
            }
            let mut body = json!({
                "metadata": {"uid": record.uid(), "resourceVersion": record.resource_version()},
                "spec": {"holder": holder, "nodeName": node},
            });
            if let Some(done) = done {
                body["spec"]["lastRollbackId"] = json!(done);
            }
            context.write(STEP, &object, api.patch(&id, &super::merge_params(), &Patch::Merge(&body))).await
        }
    };
    match written {
        Ok(record) => {
            let wake = context.world().saw_record(record, Instant::now());
            context.queue.add_all(wake, "own write");
            Ok(())
        }
        Err(error) => {
            // Another took it first, or our own write was repeated after its answer was lost: the live one tells.
            if let (Error::Conflict { .. }, Ok(Some(live))) =
                (&error, context.read(STEP, &object, api.get_opt(&id)).await)
            {
                let mine = live.spec.holder.as_ref().is_some_and(|h| Some(&h.uid) == bot.uid().as_ref())
                    && live.spec.node_name.as_deref() == Some(node);
                let wake = context.world().saw_record(live, Instant::now());
                context.queue.add_all(wake, "live record");
                if mine {
                    return Ok(());
                }
            }
            Err(error)
        }
    }
}

/// A holder that the cache does not have is asked for: an incomplete list is not an empty list.
async fn ensure_gone(context: &Context, namespace: &str, holder: &Holder) -> Result<(), Error> {
    let object = format!("BotContainer {namespace}/{}", holder.name);
    let api: Api<BotContainer> = Api::namespaced(context.client.clone(), namespace);
    match context.read("looking for the holder", &object, api.get_metadata_opt(&holder.name)).await? {
        Some(live) if live.metadata.uid.as_deref() == Some(&holder.uid) => Err(Error::StillThere { what: object }),
        _ => Ok(()),
    }
}

/// Notes that a version was given to a snapshot.
pub async fn count(context: &Context, record: &BotRecord, version: i64, given: &Given) -> Result<(), Error> {
    note(context, record, "counting a version", json!({"lastVersion": version, "lastGiven": given})).await
}

/// Notes the last time of the schedule that was seen to.
pub async fn scheduled(context: &Context, record: &BotRecord, at: &str) -> Result<(), Error> {
    note(context, record, "noting the schedule", json!({"lastScheduled": at})).await
}

async fn note(context: &Context, record: &BotRecord, step: &'static str, spec: Value) -> Result<(), Error> {
    let (namespace, id) = (record.namespace().unwrap_or_default(), record.name_any());
    let api: Api<BotRecord> = Api::namespaced(context.client.clone(), &namespace);
    let body = json!({
        "metadata": {"uid": record.uid(), "resourceVersion": record.resource_version()},
        "spec": spec,
    });
    let object = format!("BotRecord {namespace}/{id}");
    let (params, patch) = (super::merge_params(), Patch::Merge(&body));
    match context.write(step, &object, api.patch(&id, &params, &patch)).await {
        Ok(written) => {
            let wake = context.world().saw_record(written, Instant::now());
            context.queue.add_all(wake, "own write");
            Ok(())
        }
        Err(error) => {
            // It may have been done and its answer lost; the next look works from what is there.
            if let Ok(Some(live)) = context.read(step, &object, api.get_opt(&id)).await {
                let wake = context.world().saw_record(live, Instant::now());
                context.queue.add_all(wake, "live record");
            }
            Err(error)
        }
    }
}

/// Ends the hold of a bot that its node has nothing of any more: the record goes, or stays for what is left of the botId.
/// Under `Delete` the bot's snapshots go with it.
pub async fn release(context: &Context, record: &BotRecord, policy: DeletionPolicy) -> Result<(), Error> {
    let others = context.world().bots_of(record) > 1;
    let (namespace, id) = (record.namespace().unwrap_or_default(), record.name_any());
    let left = snapshot::all_of(context, &namespace, &id).await?;
    if policy == DeletionPolicy::Delete && !others {
        for snapshot in &left {
            snapshot::delete(context, snapshot).await?;
        }
    }
    if others || !left.is_empty() {
        let api: Api<BotRecord> = Api::namespaced(context.client.clone(), &namespace);
        let body = json!({
            "metadata": {"uid": record.uid(), "resourceVersion": record.resource_version()},
            "spec": {"holder": null, "nodeName": null},
        });
        let object = format!("BotRecord {namespace}/{id}");
        let (params, patch) = (super::merge_params(), Patch::Merge(&body));
        let written = context.write("giving up the botId", &object, api.patch(&id, &params, &patch)).await?;
        let wake = context.world().saw_record(written, Instant::now());
        context.queue.add_all(wake, "own write");
        Ok(())
    } else {
        delete(context, record).await
    }
}

/// Whether a BotSnapshot of the botId is left, by a complete list taken now: a version number is never given twice.
async fn has_snapshots(context: &Context, record: &BotRecord) -> Result<bool, Error> {
    if context.world().has_snapshots(record) {
        return Ok(true);
    }
    let (namespace, id) = (record.namespace().unwrap_or_default(), record.name_any());
    Ok(!snapshot::all_of(context, &namespace, &id).await?.is_empty())
}

async fn delete(context: &Context, record: &BotRecord) -> Result<(), Error> {
    let (namespace, id) = (record.namespace().unwrap_or_default(), record.name_any());
    let api: Api<BotRecord> = Api::namespaced(context.client.clone(), &namespace);
    let params = DeleteParams::default()
        .preconditions(Preconditions { uid: record.uid(), resource_version: record.resource_version() });
    let object = format!("BotRecord {namespace}/{id}");
    match context.write("deletion", &object, api.delete(&id, &params)).await {
        Ok(_) => {}
        Err(error) => {
            // Gone already is as good; changed meanwhile is not.
            if context.read("deletion", &object, api.get_opt(&id)).await?.is_some() {
                return Err(error);
            }
        }
    }
    let wake = context.world().record_gone(&Name { namespace, name: id }, record.uid().as_deref(), Instant::now());
    context.queue.add_all(wake, "own write");
    Ok(())
}

/// What to do about a record that no reconcile of a bot cares for. Pure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Upkeep {
    /// It is in use.
    Rest,
    /// Nobody may come back for it any more.
    Delete,
    /// Its holder vanished; it is kept until then.
    KeepUntil(Instant),
}

/// `vanished`: since when neither a bot nor a snapshot of the botId is there.
pub fn upkeep(bots: usize, snapshots: bool, has_holder: bool, vanished: Instant, now: Instant) -> Upkeep {
    if bots > 0 || snapshots {
        Upkeep::Rest
    } else if !has_holder || now >= vanished + GRACE {
        Upkeep::Delete
    } else {
        Upkeep::KeepUntil(vanished + GRACE)
    }
}

/// Deletes a record when no BotContainer and no BotSnapshot of its botId is left.
pub async fn reconcile(context: &Context, name: &Name) -> Result<Next, Error> {
    let now = Instant::now();
    let (record, step) = {
        let mut world = context.world();
        let Some(record) = world.record(name) else { return Ok(Next::Done) };
        let (bots, snapshots) = (world.bots_of(&record), world.has_snapshots(&record));
        let vanished = world.vanished(name, bots == 0 && !snapshots, now);
        let step = upkeep(bots, snapshots, record.spec.holder.is_some(), vanished, now);
        (record, step)
    };
    match step {
        Upkeep::Rest => Ok(Next::Resync),
        Upkeep::KeepUntil(at) => Ok(Next::At(at)),
        Upkeep::Delete => {
            if let Some(holder) = &record.spec.holder {
                ensure_gone(context, &name.namespace, holder).await?;
            }
            if has_snapshots(context, &record).await? {
                return Ok(Next::Resync);
            }
            delete(context, &record).await?;
            Ok(Next::Done)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(holder: Option<(&str, &str)>, node: Option<&str>) -> BotRecord {
        let holder = holder.map(|(name, uid)| Holder { name: name.into(), uid: uid.into() });
        BotRecord::new(
            "id",
            BotRecordSpec { bot_id: "id".into(), holder, node_name: node.map(str::to_owned), ..Default::default() },
        )
    }

    #[test]
    fn who_holds_a_bot_id() {
        let on_1 = || Some("node-1".to_owned());
        for (record, lives, wanted) in [
            (None, false, Hold::None),
            (Some(record(Some(("web", "me")), Some("node-1"))), true, Hold::Mine(on_1())),
            (Some(record(Some(("web", "old")), Some("node-1"))), false, Hold::Free(on_1())),
            (Some(record(Some(("web", "other")), Some("node-1"))), true, Hold::Other("web".into())),
            (Some(record(None, None)), true, Hold::Free(None)),
        ] {
            assert_eq!(hold("me", record.as_ref(), |_| lives), wanted, "{record:?}");
        }
    }

    #[test]
    fn a_record_goes_when_nothing_of_its_bot_is_left() {
        let t = Instant::now();
        for (bots, snapshots, holder, now, wanted) in [
            (1, false, true, t, Upkeep::Rest),
            (0, true, true, t + GRACE * 2, Upkeep::Rest),
            (0, true, false, t, Upkeep::Rest),
            (0, false, false, t, Upkeep::Delete),
            (0, false, true, t, Upkeep::KeepUntil(t + GRACE)),
            (0, false, true, t + GRACE, Upkeep::Delete),
        ] {
            assert_eq!(upkeep(bots, snapshots, holder, t, now), wanted);
        }
    }
}
