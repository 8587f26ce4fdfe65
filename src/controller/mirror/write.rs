//! The transactions. Each begins with the fence (the session's term must be the newest) and leaves the rows of the bots that it is of as
//! the objects say, whatever they were: what is right already is not touched.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use super::super::Name;
use super::error::Error;
use super::row::{ContainerRow, Ended, Rows, container_id, to_json};

mod events;

use events::{Told, events};

/// What the database has of a bot, as far as is known without asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The hash that it was written with; `None`: something of it was changed by somebody else.
    pub hash: Option<i64>,
    /// The same of its versions.
    pub children_hash: i64,
    /// The BotContainer that its row is of.
    pub object_uid: Option<Uuid>,
    /// The last event that was written with it.
    pub last_seq: i64,
    /// The resourceVersion of the BotContainer that it was written from.
    pub resource_version: Option<i64>,
}

/// One bot to be written.
#[derive(Clone, Debug)]
pub struct Change {
    /// The bot; `None` of a row that can't be one's.
    pub bot: Option<Name>,
    /// Its `container_id`.
    pub container_id: String,
    /// What its rows are to be; `None`: nothing of it is there.
    pub rows: Option<Rows>,
    /// The uids of the BotContainers with its botId.
    pub alive: Vec<Uuid>,
    /// Those that are gone, as they were last, oldest first.
    pub ended: Vec<Ended>,
    /// What the database has.
    pub stored: Option<Stored>,
}

impl Change {
    /// What there is to write of a bot; `None`: it is as it should be.
    pub fn new(
        bot: Name,
        rows: Option<Rows>,
        alive: Vec<Uuid>,
        ended: Vec<Ended>,
        stored: Option<&Stored>,
    ) -> Option<Self> {
        let wanted = rows.as_ref().map(|rows| rows.container.hash);
        let right = match (wanted, stored) {
            (Some(wanted), Some(stored)) => stored.hash == Some(wanted),
            (None, None) => true,
            _ => false,
        };
        (!right || !ended.is_empty()).then(|| Self {
            container_id: container_id(&bot),
            bot: Some(bot),
            rows,
            alive,
            ended,
            stored: stored.cloned(),
        })
    }

    /// Of a row that no object and nobody's last words are behind.
    pub fn stranger(container_id: &str, stored: &Stored) -> Self {
        Self {
            bot: None,
            container_id: container_id.to_owned(),
            rows: None,
            alive: Vec::new(),
            ended: Vec::new(),
            stored: Some(stored.clone()),
        }
    }

    /// The BotContainer that the row was of and that went without a word.
    fn vanished(&self) -> Option<Uuid> {
        let now = self.rows.as_ref().and_then(|rows| rows.container.object_uid);
        let stored = self.stored.as_ref()?.object_uid;
        stored.filter(|uid| {
            Some(*uid) != now && !self.alive.contains(uid) && !self.ended.iter().any(|ended| ended.uid == *uid)
        })
    }

    /// Whether versions of it are kept.
    fn has_versions(&self) -> bool {
        self.rows.as_ref().is_some_and(|rows| !rows.snapshots.is_empty())
    }

    /// Whether its versions are to be written, too.
    fn has_children(&self) -> bool {
        match (&self.rows, &self.stored) {
            (Some(rows), Some(stored)) => stored.hash.is_none() || stored.children_hash != rows.container.children_hash,
            _ => true,
        }
    }

    /// What the database has after it was written.
    pub fn outcome(&self) -> Option<Stored> {
        self.rows.as_ref().map(|rows| Stored {
            hash: Some(rows.container.hash),
            children_hash: rows.container.children_hash,
            object_uid: rows.container.object_uid,
            last_seq: rows.container.last_seq,
            resource_version: rows.container.resource_version,
        })
    }

    /// How much it is to write, roughly. Rows.
    pub fn size(&self) -> usize {
        self.rows
            .as_ref()
            .map_or(1, |rows| 1 + rows.events.len() + if self.has_children() { rows.snapshots.len() } else { 0 })
    }

    /// The events of BotContainers that are to be in the database: of those that are gone, and of the living one.
    fn told(&self) -> Vec<Told> {
        let mut told: Vec<Told> = Vec::new();
        let gone =
            |uid, events| Told { container_id: self.container_id.clone(), uid, events, ended: true, known: None };
        told.extend(self.vanished().map(|uid| gone(uid, Vec::new())));
        for ended in &self.ended {
            // A cluster that went back has it again.
            let is_gone = !self.alive.contains(&ended.uid);
            told.extend(is_gone.then(|| gone(ended.uid, ended.events.clone())));
        }
        if let Some(rows) = &self.rows
            && let Some(uid) = rows.container.object_uid
        {
            let known =
                self.stored.as_ref().filter(|s| s.hash.is_some() && s.object_uid == Some(uid)).map(|s| s.last_seq);
            // Numbers that went back are those of a cluster that did: all of it is looked at.
            let known = known.filter(|known| *known <= rows.container.last_seq);
            let events = rows.events.iter().filter(|e| known.is_none_or(|known| e.seq > known)).cloned().collect();
            told.push(Told { container_id: self.container_id.clone(), uid, events, ended: false, known });
        }
        told
    }
}

/// Ends a session that is not the newest.
async fn fence(conn: &mut PgConnection, term: i64) -> Result<(), Error> {
    const STEP: &str = "asking whether this session may still write";
    // Shared, so that whoever takes the next term waits for the end of this transaction, and this one never comes after it.
    let found = sqlx::query_scalar!("SELECT term FROM berth_mirror WHERE term = $1 FOR SHARE", term)
        .fetch_optional(conn)
        .await
        .map_err(|error| Error::of(STEP, error))?;
    found.map(drop).ok_or(Error::Fenced { step: STEP })
}

/// The newest term.
pub async fn newest_term(conn: &mut PgConnection) -> Result<i64, Error> {
    const STEP: &str = "reading who writes";
    let of = |error| Error::of(STEP, error);
    // Removed by hand, it is made again.
    sqlx::query!("INSERT INTO berth_mirror (term, holder, since) VALUES (0, '', now()) ON CONFLICT DO NOTHING")
        .execute(&mut *conn)
        .await
        .map_err(of)?;
    sqlx::query_scalar!("SELECT term FROM berth_mirror").fetch_one(conn).await.map_err(of)
}

/// Takes the term after `newest`; no session before can write from then on.
pub async fn take_term(conn: &mut PgConnection, newest: i64, holder: &str) -> Result<i64, Error> {
    const STEP: &str = "taking the right to write";
    sqlx::query_scalar!(
        "UPDATE berth_mirror SET term = term + 1, holder = $2, since = now() WHERE term = $1 RETURNING term",
        newest,
        holder
    )
    .fetch_optional(conn)
    .await
    .map_err(|error| Error::of(STEP, error))?
    .ok_or(Error::Fenced { step: STEP })
}

/// What the database has, by `container_id`. A bot of which any row was changed, added or removed by somebody else has no hash.
pub async fn stored(conn: &mut PgConnection) -> Result<HashMap<String, Stored>, Error> {
    let rows = sqlx::query!(
        r#"
        SELECT c.container_id AS "container_id!", c.object_uid, c.last_seq AS "last_seq!", c.children_hash AS "children_hash!",
               c.resource_version,
               CASE WHEN c.xmin = c.written_by::xid
                     AND (SELECT count(*) = c.snapshot_count AND count(*) FILTER (WHERE s.xmin = s.written_by::xid) = c.snapshot_count
                          FROM snapshots s WHERE s.container_id = c.container_id)
                     AND (SELECT count(*) = c.snapshot_count AND count(*) FILTER (WHERE v.xmin = v.written_by::xid) = c.snapshot_count
                          FROM container_versions v WHERE v.container_id = c.container_id)
                     AND (SELECT count(*) = c.last_seq - c.first_seq + 1 FROM lifecycle_events e
                          WHERE e.object_uid = c.object_uid AND e.seq BETWEEN c.first_seq AND c.last_seq
                            AND e.container_id = c.container_id AND e.xmin = e.written_by::xid)
                     AND NOT EXISTS (
                          SELECT FROM snapshots s WHERE s.container_id = c.container_id
                          AND (SELECT count(*) FROM lifecycle_events e
                               WHERE e.object_uid = s.id AND e.container_id = c.container_id AND e.xmin = e.written_by::xid)
                              <> CASE s.source WHEN 'preserved' THEN 2 ELSE 1 END)
                    THEN c.hash END AS hash
        FROM containers c
        "#
    )
    .fetch_all(conn)
    .await
    .map_err(|error| Error::of("reading what the tables have", error))?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let stored = Stored {
                hash: row.hash,
                children_hash: row.children_hash,
                object_uid: row.object_uid,
                last_seq: row.last_seq,
                resource_version: row.resource_version,
            };
            (row.container_id, stored)
        })
        .collect())
}

/// Puts aside what somebody else wrote into the events; how many. They may stand where ours belong.
pub async fn put_foreign_events_aside(conn: &mut PgConnection, term: i64) -> Result<u64, Error> {
    const STEP: &str = "putting events aside that are not ours";
    let of = |error| Error::of(STEP, error);
    let mut tx = conn.begin().await.map_err(of)?;
    fence(&mut tx, term).await?;
    let moved = sqlx::query!(
        "WITH moved AS (DELETE FROM lifecycle_events WHERE written_by IS NULL RETURNING *)
         INSERT INTO lifecycle_events_history SELECT now(), false, true, moved.* FROM moved ON CONFLICT (id) DO NOTHING"
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    tx.commit().await.map_err(of)?;
    Ok(moved.rows_affected())
}

/// Notes that all rows were looked at.
pub async fn note_synced(conn: &mut PgConnection, term: i64) -> Result<(), Error> {
    const STEP: &str = "noting that all rows were looked at";
    let noted = sqlx::query!("UPDATE berth_mirror SET synced = now() WHERE term = $1", term)
        .execute(conn)
        .await
        .map_err(|error| Error::of(STEP, error))?;
    if noted.rows_affected() == 1 { Ok(()) } else { Err(Error::Fenced { step: STEP }) }
}

/// Whether this session is still the newest. Writes nothing, not even a lock.
pub async fn ping(conn: &mut PgConnection, term: i64) -> Result<(), Error> {
    const STEP: &str = "asking whether this session is the newest";
    let found = sqlx::query_scalar!("SELECT term FROM berth_mirror WHERE term = $1", term)
        .fetch_optional(conn)
        .await
        .map_err(|error| Error::of(STEP, error))?;
    found.map(drop).ok_or(Error::Fenced { step: STEP })
}

/// Writes bots, all or none. After an error the connection is in no state to go on with, but for [`Error::Data`].
pub async fn write(conn: &mut PgConnection, term: i64, changes: &[Change]) -> Result<(), Error> {
    let mut tx = conn.begin().await.map_err(|error| Error::of("beginning a transaction", error))?;
    fence(&mut tx, term).await?;
    let changes = unheard(&mut tx, changes).await?;
    let changes = changes.as_ref();
    came_back(&mut tx, changes).await?;
    let vanished = changes.iter().filter(|change| change.vanished().is_some());
    write_down(&mut tx, vanished.map(|change| (&change.container_id, change.has_versions()))).await?;
    // One after the other: each was the bot's row before it is the history's.
    for nth in 0.. {
        let some: Vec<_> = changes.iter().filter_map(|change| Some((change, change.ended.get(nth)?))).collect();
        if some.is_empty() {
            break;
        }
        containers(&mut tx, some.iter().map(|(_, ended)| &ended.row)).await?;
        write_down(
            &mut tx,
            some.iter().map(|(change, ended)| (&change.container_id, change.has_versions() || ended.orphaned)),
        )
        .await?;
    }
    // What is neither an object's nor was one's: a bot's whose last version went.
    let nobodys = changes.iter().filter(|c| c.rows.is_none() && c.ended.is_empty() && c.vanished().is_none());
    write_down(&mut tx, nobodys.map(|change| (&change.container_id, false))).await?;
    containers(&mut tx, changes.iter().filter_map(|change| Some(&change.rows.as_ref()?.container))).await?;
    children(&mut tx, changes).await?;
    events(&mut tx, changes).await?;
    gone(&mut tx, changes).await?;
    tx.commit().await.map_err(|error| Error::of("committing", error))
}

/// The changes without what is in the history already: a replica that was not the leader has heard the same last words.
async fn unheard<'a>(tx: &mut PgConnection, changes: &'a [Change]) -> Result<Cow<'a, [Change]>, Error> {
    let uids: Vec<Uuid> = changes.iter().flat_map(|change| change.ended.iter().map(|ended| ended.uid)).collect();
    if uids.is_empty() {
        return Ok(changes.into());
    }
    let heard =
        sqlx::query_scalar!(r#"SELECT object_uid AS "uid!" FROM containers_history WHERE object_uid = ANY($1)"#, &uids)
            .fetch_all(&mut *tx)
            .await
            .map_err(|error| Error::of("asking which ends are known", error))?;
    let heard: HashSet<Uuid> = heard.into_iter().collect();
    let mut changes = changes.to_vec();
    for change in &mut changes {
        let Change { ended, alive, .. } = change;
        ended.retain(|ended| !heard.contains(&ended.uid) && !alive.contains(&ended.uid));
    }
    Ok(changes.into())
}

/// Takes out of the history what is there again: a cluster that was restored from a backup, a bot whose botId is used again.
async fn came_back(tx: &mut PgConnection, changes: &[Change]) -> Result<(), Error> {
    let of = |error| Error::of("taking rows back out of the history", error);
    let mut uids: Vec<Uuid> = Vec::new();
    let mut snapshots: Vec<Uuid> = Vec::new();
    for change in changes {
        let Some(rows) = &change.rows else { continue };
        if let Some(uid) = rows.container.object_uid
            && change.stored.as_ref().is_none_or(|stored| stored.object_uid != Some(uid))
        {
            uids.push(uid);
        }
        if change.has_children() {
            snapshots.extend(rows.versions.iter().map(|version| version.snapshot_id));
        }
    }
    if uids.is_empty() && snapshots.is_empty() {
        return Ok(());
    }
    sqlx::query!("DELETE FROM containers_history WHERE object_uid = ANY($1)", &uids)
        .execute(&mut *tx)
        .await
        .map_err(of)?;
    sqlx::query!("DELETE FROM container_versions_history WHERE snapshot_id = ANY($1)", &snapshots)
        .execute(&mut *tx)
        .await
        .map_err(of)?;
    sqlx::query!("DELETE FROM snapshots_history WHERE id = ANY($1)", &snapshots).execute(&mut *tx).await.map_err(of)?;
    let objects: Vec<Uuid> = uids.into_iter().chain(snapshots).collect();
    sqlx::query!(
        "WITH back AS (DELETE FROM lifecycle_events_history WHERE object_uid = ANY($1) AND NOT superseded RETURNING *)
         INSERT INTO lifecycle_events (id, container_id, event_type, payload, created_at, object_uid, seq, last_seq, written_by)
         SELECT id, container_id, event_type, payload, created_at, object_uid, seq, last_seq, pg_current_xact_id() FROM back
         ON CONFLICT DO NOTHING",
        &objects
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    Ok(())
}

/// Writes down in the history what the rows of these bots are, with whether anything is kept of them.
async fn write_down(tx: &mut PgConnection, bots: impl Iterator<Item = (&String, bool)>) -> Result<(), Error> {
    let (ids, retained): (Vec<String>, Vec<bool>) = bots.map(|(id, retained)| (id.clone(), retained)).unzip();
    if ids.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "INSERT INTO containers_history
         SELECT now(), e.retained, c.* FROM containers c JOIN unnest($1::text[], $2::bool[]) e (container_id, retained) USING (container_id)
         ON CONFLICT (object_uid) DO UPDATE SET gone_at = EXCLUDED.gone_at, retained = EXCLUDED.retained",
        &ids,
        &retained
    )
    .execute(&mut *tx)
    .await
    .map_err(|error| Error::of("writing down which bots are gone", error))?;
    Ok(())
}

async fn containers(tx: &mut PgConnection, rows: impl Iterator<Item = &ContainerRow>) -> Result<(), Error> {
    let rows: Vec<_> = rows.collect();
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "INSERT INTO containers (
             id, bot_id, container_id, container_name, image, status, namespace, auto_start, container_path, created_at, updated_at,
             last_started_at, last_stopped_at, object_uid, object_namespace, object_name, object_bot_id, runtime_container_id,
             node_name, image_digest, phase, ip, restart_count, last_version, current_version, conditions, generation,
             observed_generation, resource_version, snapshot_count, first_seq, last_seq, children_hash, hash, written_by)
         SELECT
             id, bot_id, container_id, container_name, image, status, namespace, auto_start, container_path, created_at, updated_at,
             last_started_at, last_stopped_at, object_uid, object_namespace, object_name, object_bot_id, runtime_container_id,
             node_name, image_digest, phase, ip, restart_count, last_version, current_version, conditions, generation,
             observed_generation, resource_version, snapshot_count, first_seq, last_seq, children_hash, hash, pg_current_xact_id()
         FROM jsonb_populate_recordset(NULL::containers, $1::text::jsonb)
         ON CONFLICT (container_id) DO UPDATE SET
             id = EXCLUDED.id, bot_id = EXCLUDED.bot_id, container_name = EXCLUDED.container_name, image = EXCLUDED.image,
             status = EXCLUDED.status, namespace = EXCLUDED.namespace, auto_start = EXCLUDED.auto_start,
             container_path = EXCLUDED.container_path, created_at = EXCLUDED.created_at, updated_at = EXCLUDED.updated_at,
             last_started_at = EXCLUDED.last_started_at, last_stopped_at = EXCLUDED.last_stopped_at,
             object_uid = EXCLUDED.object_uid, object_namespace = EXCLUDED.object_namespace, object_name = EXCLUDED.object_name,
             object_bot_id = EXCLUDED.object_bot_id, runtime_container_id = EXCLUDED.runtime_container_id,
             node_name = EXCLUDED.node_name, image_digest = EXCLUDED.image_digest, phase = EXCLUDED.phase, ip = EXCLUDED.ip,
             restart_count = EXCLUDED.restart_count, last_version = EXCLUDED.last_version,
             current_version = EXCLUDED.current_version, conditions = EXCLUDED.conditions, generation = EXCLUDED.generation,
             observed_generation = EXCLUDED.observed_generation, resource_version = EXCLUDED.resource_version,
             snapshot_count = EXCLUDED.snapshot_count, first_seq = EXCLUDED.first_seq, last_seq = EXCLUDED.last_seq,
             children_hash = EXCLUDED.children_hash, hash = EXCLUDED.hash, written_by = EXCLUDED.written_by
         WHERE containers.hash <> EXCLUDED.hash OR containers.written_by IS NULL OR containers.xmin <> containers.written_by::xid",
        to_json(&rows)
    )
    .execute(&mut *tx)
    .await
    .map_err(|error| Error::of("writing containers", error))?;
    Ok(())
}

/// Versions and their numbers: those of bots whose versions are others than they were.
async fn children(tx: &mut PgConnection, changes: &[Change]) -> Result<(), Error> {
    let changes: Vec<_> = changes.iter().filter(|change| change.has_children()).collect();
    if changes.is_empty() {
        return Ok(());
    }
    let of = |error| Error::of("writing snapshots", error);
    let (ids, retained): (Vec<String>, Vec<bool>) =
        changes.iter().map(|c| (c.container_id.clone(), c.has_versions())).unzip();
    let rows: Vec<_> = changes.iter().filter_map(|change| change.rows.as_ref()).collect();
    let snapshots: Vec<_> = rows.iter().flat_map(|rows| &rows.snapshots).collect();
    let versions: Vec<_> = rows.iter().flat_map(|rows| &rows.versions).collect();
    let kept: Vec<Uuid> = versions.iter().map(|version| version.snapshot_id).collect();
    let numbers: Vec<Uuid> = versions.iter().map(|version| version.id).collect();
    sqlx::query!(
        "WITH gone AS (DELETE FROM container_versions WHERE container_id = ANY($1) AND id <> ALL($3) RETURNING *)
         INSERT INTO container_versions_history
         SELECT now(), e.retained, gone.* FROM gone JOIN unnest($1::text[], $2::bool[]) e (container_id, retained) USING (container_id)
         ON CONFLICT (id) DO UPDATE SET gone_at = EXCLUDED.gone_at",
        &ids,
        &retained,
        &numbers
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    sqlx::query!(
        "WITH gone AS (DELETE FROM snapshots WHERE container_id = ANY($1) AND id <> ALL($3) RETURNING *)
         INSERT INTO snapshots_history
         SELECT now(), e.retained, gone.* FROM gone JOIN unnest($1::text[], $2::bool[]) e (container_id, retained) USING (container_id)
         ON CONFLICT (id) DO UPDATE SET gone_at = EXCLUDED.gone_at",
        &ids,
        &retained,
        &kept
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    if snapshots.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "INSERT INTO snapshots (
             id, container_id, runtime_snapshot_name, display_name, parent_runtime_snapshot_name, snapshotter, source, created_at,
             object_namespace, object_name, node_name, image, image_digest, digest, size_bytes, files, frozen_millis, taken, ready_at,
             conditions, generation, resource_version, hash, written_by)
         SELECT
             id, container_id, runtime_snapshot_name, display_name, parent_runtime_snapshot_name, snapshotter, source, created_at,
             object_namespace, object_name, node_name, image, image_digest, digest, size_bytes, files, frozen_millis, taken, ready_at,
             conditions, generation, resource_version, hash, pg_current_xact_id()
         FROM jsonb_populate_recordset(NULL::snapshots, $1::text::jsonb)
         ON CONFLICT (id) DO UPDATE SET
             container_id = EXCLUDED.container_id, runtime_snapshot_name = EXCLUDED.runtime_snapshot_name,
             display_name = EXCLUDED.display_name, parent_runtime_snapshot_name = EXCLUDED.parent_runtime_snapshot_name,
             snapshotter = EXCLUDED.snapshotter, source = EXCLUDED.source, created_at = EXCLUDED.created_at,
             object_namespace = EXCLUDED.object_namespace, object_name = EXCLUDED.object_name, node_name = EXCLUDED.node_name,
             image = EXCLUDED.image, image_digest = EXCLUDED.image_digest, digest = EXCLUDED.digest,
             size_bytes = EXCLUDED.size_bytes, files = EXCLUDED.files, frozen_millis = EXCLUDED.frozen_millis,
             taken = EXCLUDED.taken, ready_at = EXCLUDED.ready_at, conditions = EXCLUDED.conditions,
             generation = EXCLUDED.generation, resource_version = EXCLUDED.resource_version, hash = EXCLUDED.hash,
             written_by = EXCLUDED.written_by
         WHERE snapshots.hash <> EXCLUDED.hash OR snapshots.written_by IS NULL OR snapshots.xmin <> snapshots.written_by::xid",
        to_json(&snapshots)
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    sqlx::query!(
        "INSERT INTO container_versions AS v (id, container_id, snapshot_id, version, created_at, written_by)
         SELECT id, container_id, snapshot_id, version, created_at, pg_current_xact_id()
         FROM jsonb_populate_recordset(NULL::container_versions, $1::text::jsonb)
         ON CONFLICT (id) DO UPDATE SET
             container_id = EXCLUDED.container_id, snapshot_id = EXCLUDED.snapshot_id, version = EXCLUDED.version,
             created_at = EXCLUDED.created_at, written_by = EXCLUDED.written_by
         WHERE (v.container_id, v.snapshot_id, v.version, v.created_at)
                <> (EXCLUDED.container_id, EXCLUDED.snapshot_id, EXCLUDED.version, EXCLUDED.created_at)
            OR v.written_by IS NULL OR v.xmin <> v.written_by::xid",
        to_json(&versions)
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    Ok(())
}

/// Takes out of the tables what nothing is there of any more: events of BotContainers that left no version, and bots.
async fn gone(tx: &mut PgConnection, changes: &[Change]) -> Result<(), Error> {
    let of = |error| Error::of("moving rows to the history", error);
    let left = changes.iter().filter(|change| change.rows.is_some() && !change.has_versions());
    let ended: Vec<Uuid> =
        left.flat_map(|change| change.ended.iter().map(|ended| ended.uid).chain(change.vanished())).collect();
    let ids: Vec<String> =
        changes.iter().filter(|change| change.rows.is_none()).map(|change| change.container_id.clone()).collect();
    if ids.is_empty() && ended.is_empty() {
        return Ok(());
    }
    let orphaned: Vec<Uuid> = changes.iter().flat_map(|c| &c.ended).filter(|e| e.orphaned).map(|e| e.uid).collect();
    sqlx::query!(
        "WITH gone AS (DELETE FROM lifecycle_events WHERE container_id = ANY($1) OR object_uid = ANY($2) RETURNING *)
         INSERT INTO lifecycle_events_history SELECT now(), object_uid = ANY($3), false, gone.* FROM gone
         ON CONFLICT (id) DO UPDATE SET gone_at = EXCLUDED.gone_at, superseded = false",
        &ids,
        &ended,
        &orphaned
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    sqlx::query!("DELETE FROM containers WHERE container_id = ANY($1)", &ids).execute(&mut *tx).await.map_err(of)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bot_that_is_as_it_should_be_is_not_written() {
        let name = || Name { namespace: "a".into(), name: "b".into() };
        let stored = Stored { hash: Some(1), children_hash: 1, object_uid: None, last_seq: 0, resource_version: None };
        assert!(Change::new(name(), None, vec![], vec![], None).is_none(), "nothing, and no row");
        let gone = Change::new(name(), None, vec![], vec![], Some(&stored)).unwrap();
        assert!(gone.has_children() && gone.outcome().is_none() && !gone.has_versions());
        let uid = Uuid::from_u128(1);
        let held = Stored { object_uid: Some(uid), ..stored };
        let gone = Change::new(name(), None, vec![], vec![], Some(&held)).unwrap();
        assert_eq!(gone.vanished(), Some(uid));
        let alive = Change::new(name(), None, vec![uid], vec![], Some(&held)).unwrap();
        assert_eq!(alive.vanished(), None, "its row goes to another, it is not gone");
    }
}
