//! The events of a bot: what the objects tell, beside what the database has of it, each once and in order.

use std::collections::HashMap;

use k8s_openapi::jiff::Timestamp;
use sqlx::PgConnection;
use uuid::Uuid;

use super::super::error::Error;
use super::super::row::{EventRow, to_json};
use super::Change;

/// What one BotContainer tells.
#[derive(Clone, Debug)]
pub(super) struct Told {
    pub(super) container_id: String,
    pub(super) uid: Uuid,
    /// Oldest first.
    pub(super) events: Vec<EventRow>,
    /// Whether it is gone.
    pub(super) ended: bool,
    /// The last of its events that the database is known to have; `None`: it has to be asked.
    pub(super) known: Option<i64>,
}

impl Told {
    /// The first of the numbers that are told now; past the last one where none is.
    fn first(&self) -> i64 {
        self.events.first().map_or(i64::MAX, |event| event.seq)
    }

    /// Whether what the database has can be told without asking it.
    fn is_plain(&self) -> bool {
        !self.ended
            && (self.events.is_empty() && self.known.is_some()
                || self.known.is_some_and(|known| known + 1 == self.first()))
    }

    /// The rows for it, those that say what is missing among them. `before` is the last number that the database has below the
    /// first one told, `last` the last one that it has at all, `deleted` whether its end is told there.
    fn rows(mut self, before: i64, last: i64, deleted: bool, now: Timestamp) -> Vec<EventRow> {
        let newest = self.events.last().map_or(last, |event| event.last_seq);
        if self.ended && !deleted && !self.events.iter().any(|event| event.event_type == "deleted") {
            let seq = newest.max(last) + 1;
            self.events.push(EventRow::deleted(&self.container_id, self.uid, seq, now));
        }
        if let Some(first) = self.events.first().filter(|first| before + 1 < first.seq) {
            let lost = EventRow::lost(&self.container_id, self.uid, before + 1, first.seq - 1, first.created_at);
            self.events.insert(0, lost);
        }
        self.events
    }
}

/// Writes what these bots tell and the database does not have.
pub(super) async fn events(tx: &mut PgConnection, changes: &[Change]) -> Result<(), Error> {
    let of = |error| Error::of("writing lifecycle events", error);
    let mut rows: Vec<EventRow> = Vec::new();
    let mut asked: Vec<Told> = Vec::new();
    for change in changes {
        if change.has_children() {
            rows.extend(change.rows.iter().flat_map(|rows| rows.snapshot_events.clone()));
        }
        for told in change.told() {
            if told.is_plain() { rows.extend(told.events) } else { asked.push(told) }
        }
    }
    if !asked.is_empty() {
        rows.extend(reconciled(tx, asked).await?);
    }
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "INSERT INTO lifecycle_events AS e (id, container_id, event_type, payload, created_at, object_uid, seq, last_seq, written_by)
         SELECT id, container_id, event_type, payload, created_at, object_uid, seq, last_seq, pg_current_xact_id()
         FROM jsonb_populate_recordset(NULL::lifecycle_events, $1::text::jsonb)
         ON CONFLICT (object_uid, seq) DO UPDATE SET
             id = EXCLUDED.id, container_id = EXCLUDED.container_id, event_type = EXCLUDED.event_type, payload = EXCLUDED.payload,
             created_at = EXCLUDED.created_at, last_seq = EXCLUDED.last_seq, written_by = EXCLUDED.written_by
         WHERE e.id <> EXCLUDED.id OR e.written_by IS NULL OR e.xmin <> e.written_by::xid",
        to_json(&rows)
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    Ok(())
}

/// What has to be in the database of BotContainers of which it is not known what is there. What is there and contradicts them (numbers
/// that a restored cluster gave again, rows changed by hand) goes to the history first.
async fn reconciled(tx: &mut PgConnection, asked: Vec<Told>) -> Result<Vec<EventRow>, Error> {
    let of = |error| Error::of("comparing lifecycle events", error);
    let living: Vec<_> = asked.iter().filter(|told| !told.ended && told.known.is_none()).collect();
    let (uids, lasts): (Vec<Uuid>, Vec<i64>) =
        living.iter().map(|told| (told.uid, told.events.last().map_or(0, |event| event.seq))).unzip();
    let told: Vec<_> = asked.iter().flat_map(|told| &told.events).collect();
    sqlx::query!(
        "WITH moved AS (
             DELETE FROM lifecycle_events e
             USING (SELECT uid, last FROM unnest($1::uuid[], $2::bigint[]) AS w (uid, last)) w
             WHERE e.object_uid = w.uid AND e.last_seq > w.last RETURNING e.*)
         INSERT INTO lifecycle_events_history SELECT now(), true, true, moved.* FROM moved ON CONFLICT (id) DO NOTHING",
        &uids,
        &lasts
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    sqlx::query!(
        "WITH told AS (SELECT id, object_uid, seq FROM jsonb_populate_recordset(NULL::lifecycle_events, $1::text::jsonb)),
         moved AS (
             DELETE FROM lifecycle_events e USING told t
             WHERE (e.object_uid = t.object_uid AND e.seq = t.seq AND e.id <> t.id)
                OR (e.id = t.id AND (e.object_uid, e.seq) <> (t.object_uid, t.seq))
             RETURNING e.*)
         INSERT INTO lifecycle_events_history SELECT now(), true, true, moved.* FROM moved
         WHERE id NOT IN (SELECT id FROM told) ON CONFLICT (id) DO NOTHING",
        to_json(&told)
    )
    .execute(&mut *tx)
    .await
    .map_err(of)?;
    // What is told again, by a cluster that only seemed to have gone back, is not beside itself in the history.
    let ids: Vec<Uuid> = told.iter().map(|event| event.id).collect();
    sqlx::query!("DELETE FROM lifecycle_events_history WHERE id = ANY($1)", &ids)
        .execute(&mut *tx)
        .await
        .map_err(of)?;
    let (uids, firsts): (Vec<Uuid>, Vec<i64>) = asked.iter().map(|told| (told.uid, told.first())).unzip();
    let there = sqlx::query!(
        r#"
        SELECT w.uid AS "uid!",
               coalesce(max(e.last_seq) FILTER (WHERE e.seq < w.first), 0) AS "before!",
               coalesce(max(e.last_seq), 0) AS "last!",
               coalesce(bool_or(e.event_type = 'deleted'), false) AS "deleted!"
        FROM unnest($1::uuid[], $2::bigint[]) AS w (uid, first)
        LEFT JOIN lifecycle_events e ON e.object_uid = w.uid
        GROUP BY w.uid
        "#,
        &uids,
        &firsts
    )
    .fetch_all(&mut *tx)
    .await
    .map_err(of)?;
    let mut there: HashMap<Uuid, _> =
        there.into_iter().map(|row| (row.uid, (row.before, row.last, row.deleted))).collect();
    let now = Timestamp::now();
    Ok(asked
        .into_iter()
        .flat_map(|told| {
            let (before, last, deleted) = there.remove(&told.uid).unwrap_or_default();
            told.rows(before, last, deleted, now)
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::super::super::row::Moment;
    use super::*;

    fn event(seq: i64) -> EventRow {
        let mut events = EventRow::told(
            "a.b",
            Uuid::from_u128(1),
            &[Moment {
                seq,
                type_: "started".into(),
                at: Timestamp::UNIX_EPOCH,
                exit_code: None,
                version: None,
                message: None,
            }],
        );
        events.remove(0)
    }

    fn told(seqs: std::ops::Range<i64>, ended: bool, known: Option<i64>) -> Told {
        Told { container_id: "a.b".into(), uid: Uuid::from_u128(1), events: seqs.map(event).collect(), ended, known }
    }

    fn words(rows: &[EventRow]) -> Vec<String> {
        rows.iter().map(|row| format!("{} {}-{}", row.event_type, row.seq, row.last_seq)).collect()
    }

    #[test]
    fn what_is_missing_between_what_is_there_and_what_is_told_is_one_row() {
        // (told, the last below the first told, the last of all, its end is told) -> what is added
        for (seqs, ended, there, wanted) in [
            (1..3, false, (0, 0, false), vec!["started 1-1", "started 2-2"]),
            (9..11, false, (8, 8, false), vec!["started 9-9", "started 10-10"]),
            (9..11, false, (5, 5, false), vec!["lost 6-8", "started 9-9", "started 10-10"]),
            (9..10, false, (0, 0, false), vec!["lost 1-8", "started 9-9"]),
            // Told again.
            (3..5, false, (2, 4, false), vec!["started 3-3", "started 4-4"]),
            // Gone: its end is told once, after all else.
            (3..5, true, (2, 2, false), vec!["started 3-3", "started 4-4", "deleted 5-5"]),
            (3..5, true, (2, 5, true), vec!["started 3-3", "started 4-4"]),
            (1..1, true, (7, 7, false), vec!["deleted 8-8"]),
            (1..1, true, (7, 8, true), vec![]),
            (1..1, false, (7, 7, false), vec![]),
        ] {
            let rows = told(seqs.clone(), ended, None).rows(there.0, there.1, there.2, Timestamp::UNIX_EPOCH);
            assert_eq!(words(&rows), wanted, "{seqs:?} ended={ended} {there:?}");
        }
    }

    #[test]
    fn the_database_is_asked_only_where_it_is_not_known_what_it_has() {
        assert!(told(5..7, false, Some(4)).is_plain());
        assert!(told(1..1, false, Some(4)).is_plain());
        assert!(!told(6..7, false, Some(4)).is_plain(), "one is missing");
        assert!(!told(5..7, false, None).is_plain());
        assert!(!told(5..7, true, Some(4)).is_plain(), "its end may be there already");
    }
}
