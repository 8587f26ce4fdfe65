//! The mirror: rows in PostgreSQL that repeat what the objects say, for programs that read a database. Optional, and never in the way:
//! no reconcile waits for it, and what it can't write waits in bounded memory.
//!
//! ```text
//! world.rs ── changed.rs: whose rows wait ──┐
//!     │                                     v
//!     └── row.rs: objects -> rows (pure) -> write.rs: one transaction for many bots
//!
//! a session:  connect ─ migrate ─ take the next term ─ look at all rows ─ write what changes, until anything fails
//! ```
//!
//! A session is one connection with a term of its own. Its transactions write only while no newer term was taken, so what a stopped
//! leader or a lost connection still had under way is refused or comes before. Since a new session can't know what the last one's
//! unanswered writes did (or what a failover lost), it looks at all rows first; that costs little where they are right: of each row the
//! database tells whether it is the one that was written (`xmin`), and with which hash. See docs/decisions/mirror.md.

mod changed;
mod error;
mod row;
mod write;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Api;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions as _, Executor as _, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::api::condition::{Reason, chain};
use crate::api::{BotContainer, resource_version};

use super::event::Note;
use super::{Context, Name};
use write::{Change, Stored};

pub use changed::{Changed, LastWords};
pub use error::Error;
pub use row::{Bot, Tail, uid_of};

/// For how long one transaction may take, and anything else that is asked of the database. The first transaction of a session has some
/// thirty round trips in it.
const CALL: Duration = Duration::from_secs(30);

/// For how long bringing the tables up to date may take.
const MIGRATE: Duration = Duration::from_secs(300);

/// First and longest wait between two sessions.
const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(15);

/// How many bots a transaction is for, and how many rows it has, at most.
const BOTS: usize = 256;
const ROWS: usize = 4096;

/// A change waits so long for more of its kind: a start is five writes of one object within 100 ms.
const LINGER: Duration = Duration::from_millis(20);

/// So often is asked whether the database is there when nothing is to be written.
const PING: Duration = Duration::from_secs(10);

/// A lag is told in an Event when it is as long as this, and again after that time.
const LAG: Duration = Duration::from_secs(10);
const LAG_AGAIN: Duration = Duration::from_secs(600);

/// Where the database is, as libpq's URLs say it.
#[derive(Clone)]
pub struct DatabaseUrl(PgConnectOptions);

/// The flag's value: an empty one, as an unset value of a chart gives it, is none.
#[derive(Clone, Debug)]
pub struct MaybeDatabaseUrl(pub Option<DatabaseUrl>);

impl FromStr for MaybeDatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.is_empty() { Ok(Self(None)) } else { text.parse().map(|url| Self(Some(url))) }
    }
}

impl fmt::Debug for DatabaseUrl {
    /// Without the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(options) = self;
        let database = options.get_database().unwrap_or(options.get_username());
        write!(f, "postgres://{}:{}/{database}", options.get_host(), options.get_port())
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let right = "expected postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=verify-full";
        if !text.starts_with("postgres://") && !text.starts_with("postgresql://") {
            // Not the text itself: it may hold a password.
            return Err(format!("not a URL of PostgreSQL; {right}"));
        }
        let options = PgConnectOptions::from_str(text).map_err(|error| format!("{error}; {right}"))?;
        Ok(Self(options.application_name("berth-controller").disable_statement_logging()))
    }
}

/// What the database is known to have.
type Known = HashMap<String, Stored>;

/// Why the mirror is behind, for the one who tells of it.
type Trouble = Mutex<Option<String>>;

/// Keeps the rows true while this replica leads. Looks at all of them at the start, after each trouble, and every `resync`.
pub async fn run(context: Arc<Context>, url: DatabaseUrl, resync: Duration, shift: CancellationToken) {
    if let Some(changed) = context.world().changed() {
        changed.fall_behind(Instant::now());
    }
    let trouble = Trouble::default();
    tokio::select! {
        // The database may be in the middle of a transaction then; what became of it is seen by the next session.
        () = shift.cancelled() => {}
        () = sessions(&context, &url, resync, &trouble) => {}
        () = tell(&context, &url, &trouble) => {}
    }
    context.metrics.mirror_connected(false);
}

async fn sessions(context: &Arc<Context>, url: &DatabaseUrl, resync: Duration, trouble: &Trouble) {
    let mut wait = FIRST;
    loop {
        let began = Instant::now();
        let error = match session(context, url, resync, trouble).await {
            Err(error) => error,
            Ok(never) => match never {},
        };
        context.metrics.mirror_connected(false);
        context.metrics.mirror_failed(error.label());
        let text = chain(&error);
        if let Some(changed) = context.world().changed() {
            changed.fall_behind(Instant::now());
        }
        if began.elapsed() > LONGEST {
            wait = FIRST;
        }
        match error {
            Error::NotLeading { .. } => tracing::debug!("the mirror rests: {text}"),
            _ => tracing::warn!(database = ?url, reason = error.label(), ?wait, "the mirror is not written: {text}"),
        }
        *trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(text);
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST);
    }
}

/// Says by metrics and Events how far behind the mirror is, whatever the one who writes waits for.
async fn tell(context: &Context, url: &DatabaseUrl, trouble: &Trouble) {
    let mut tick = tokio::time::interval(Duration::from_secs(1));
    let mut told: Option<Instant> = None;
    loop {
        tick.tick().await;
        let (since, waiting) = {
            let mut world = context.world();
            let Some(changed) = world.changed() else { return };
            (changed.since(), changed.len())
        };
        let lag = since.map(|since| since.elapsed()).unwrap_or_default();
        context.metrics.mirror_lags(lag, waiting);
        let why = trouble.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if lag < LAG {
            if told.take().is_some() {
                let text = format!("the rows in {url:?} are again what the objects say");
                context.events.send(Note::normal(context.lease(), Reason::MirrorCaughtUp, "Mirror", text, once()));
            }
        } else if told.is_none_or(|at| at.elapsed() >= LAG_AGAIN) {
            told = Some(Instant::now());
            context.events.send(lags(context, url, lag, waiting, why));
        }
    }
}

fn lags(context: &Context, url: &DatabaseUrl, lag: Duration, waiting: usize, why: Option<String>) -> Note {
    let why = why.map_or_else(String::new, |why| format!(": {why}"));
    let text = format!("the rows in {url:?} are {} s behind the objects, {waiting} bots wait{why}", lag.as_secs());
    Note::warning(context.lease(), Reason::MirrorLags, "Mirror", text, once())
}

/// Each outage is another.
fn once() -> String {
    k8s_openapi::jiff::Timestamp::now().to_string()
}

/// One connection, from its start to its end.
async fn session(
    context: &Arc<Context>,
    url: &DatabaseUrl,
    resync: Duration,
    trouble: &Trouble,
) -> Result<std::convert::Infallible, Error> {
    let mut conn = within("connecting", CALL, connect(url)).await?;
    within("bringing the tables up to date", MIGRATE, migrate(url)).await?;
    let term = within("taking the right to write", CALL, begin(context, &mut conn)).await?;
    let bell = context.world().changed().map(|changed| changed.bell()).unwrap_or_default();
    let mut known = all_rows(context, &mut conn, term).await?;
    context.metrics.mirror_connected(true);
    *trouble.lock().unwrap_or_else(PoisonError::into_inner) = None;
    let mut looked = tokio::time::Instant::now();
    loop {
        let waits = context.world().changed().is_some_and(|changed| changed.len() > 0);
        if !waits {
            tokio::select! {
                // Cancel-safe: a ring that nobody waits for is kept.
                () = bell.notified() => {}
                () = tokio::time::sleep(PING) => {
                    within("asking after the database", CALL, write::ping(&mut conn, term)).await?;
                }
                () = tokio::time::sleep_until(looked + resync) => {}
            }
        }
        if looked.elapsed() >= resync {
            if let Some(changed) = context.world().changed() {
                changed.fall_behind(Instant::now());
            }
            known = all_rows(context, &mut conn, term).await?;
            looked = tokio::time::Instant::now();
            continue;
        }
        tokio::time::sleep(LINGER).await;
        some_rows(context, &mut conn, term, &mut known).await?;
    }
}

async fn within<T>(
    step: &'static str,
    most: Duration,
    call: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(most, call).await.unwrap_or(Err(Error::Deadline { step, after: most }))
}

async fn connect(url: &DatabaseUrl) -> Result<PgConnection, Error> {
    url.0.connect().await.map_err(|error| Error::of("connecting", error))
}

/// Takes a term for this session.
async fn begin(context: &Context, conn: &mut PgConnection) -> Result<i64, Error> {
    // The server ends what we no longer wait for, so that it holds no lock against the next session. To compile the look at all rows
    // takes it 700 ms, the look itself 100.
    conn.execute(
        "SET timezone = 'UTC'; SET jit = off; SET statement_timeout = '10s'; SET lock_timeout = '5s'; \
         SET idle_in_transaction_session_timeout = '10s'",
    )
    .await
    .map_err(|error| Error::of("preparing the session", error))?;
    let newest = write::newest_term(conn).await?;
    // A leader that was stopped meanwhile never gets past this, so the term is the leader's alone.
    context.leadership.confirmed_after(Instant::now()).await;
    write::take_term(conn, newest, &context.me).await
}

/// Forward only, under the advisory lock that sqlx takes, on a connection of its own.
async fn migrate(url: &DatabaseUrl) -> Result<(), Error> {
    let mut migrations = sqlx::migrate!("./migrations");
    // What a newer controller did is only more, and is left as it is.
    migrations.set_ignore_missing(true).dangerous_set_table_name("berth_migrations");
    // That its own table is there already is what PostgreSQL would tell each time.
    let quiet = "SET client_min_messages = warning";
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(CALL)
        .after_connect(move |conn, _| Box::pin(async move { conn.execute(quiet).await.map(drop) }))
        .connect_lazy_with(url.0.clone());
    let done = migrations.run(&pool).await.map_err(Error::of_migration);
    pool.close().await;
    done
}

/// Makes all rows right; what the database has then.
async fn all_rows(context: &Arc<Context>, conn: &mut PgConnection, term: i64) -> Result<Known, Error> {
    let began = Instant::now();
    let (here, ended) = {
        let mut world = context.world();
        let ended = world.changed().map(Changed::begin_all).unwrap_or_default();
        (world.bot_ids(), ended.into_iter().collect::<HashSet<_>>())
    };
    let expected = tokio::task::spawn_blocking({
        let context = context.clone();
        let names: HashSet<Name> = here.into_iter().chain(ended.iter().cloned()).collect();
        move || expected(&context, names)
    });
    let foreign =
        within("putting events aside that are not ours", CALL, write::put_foreign_events_aside(conn, term)).await?;
    let mut known = within("reading what the tables have", CALL, write::stored(conn)).await?;
    let expected = match expected.await {
        Ok(expected) => expected,
        // A bug of ours, which is told as any other is.
        Err(died) => std::panic::resume_unwind(died.into_panic()),
    };
    let (mut written, mut went_back) = (0, false);
    // What nobody knows goes first: it may stand where another's row belongs.
    let strangers = known.iter().filter(|(id, _)| !expected.contains_key(*id));
    let strangers: Vec<Change> = strangers.map(|(id, stored)| Change::stranger(id, stored)).collect();
    let bots = expected.len();
    let wrong = |(id, (name, hash)): (String, (Name, Option<i64>))| {
        let right = known.get(&id).and_then(|stored| stored.hash) == hash && !ended.contains(&name);
        (!right).then_some(name)
    };
    let wrong: Vec<Name> = expected.into_iter().filter_map(wrong).collect();
    for some in strangers.chunks(BOTS) {
        written += write_some(context, conn, term, &mut known, some.to_vec()).await?;
    }
    for names in wrong.chunks(BOTS) {
        let ahead =
            names.iter().filter(|name| !went_back && is_ahead(context, name, &known)).cloned().collect::<Vec<_>>();
        went_back = went_back || look_again(context, &ahead, &known).await?;
        let changes = changes(context, names.iter().cloned(), &known);
        written += write_some(context, conn, term, &mut known, changes).await?;
    }
    within("noting that all rows were looked at", CALL, write::note_synced(conn, term)).await?;
    if let Some(changed) = context.world().changed() {
        changed.all_written();
    }
    let took = began.elapsed();
    context.metrics.mirror_looked(written, took);
    tracing::info!(bots, written, foreign, term, went_back, ?took, "the mirror is what the objects say");
    Ok(known)
}

/// The hash that each bot's rows are to have, by its `container_id`.
fn expected(context: &Context, names: HashSet<Name>) -> HashMap<String, (Name, Option<i64>)> {
    let hash = |name: Name| {
        let mut world = context.world();
        let mut hash = world.changed().and_then(|changed| changed.hash(&name));
        if hash.is_none() {
            hash = row::Rows::of(&name, &world.rows_of(&name)).map(|rows| rows.container.hash);
            if let (Some(changed), Some(hash)) = (world.changed(), hash) {
                changed.reckoned(&name, hash);
            }
        }
        (row::container_id(&name), (name, hash))
    };
    names.into_iter().map(hash).collect()
}

/// Whether the database has a newer state of a bot than this replica has seen.
fn is_ahead(context: &Context, name: &Name, known: &Known) -> bool {
    let Some(stored) = known.get(&row::container_id(name)).filter(|stored| stored.hash.is_some()) else { return false };
    let Some((bot, _)) = context.world().rows_of(name).container else { return false };
    stored.object_uid == Some(uid_of(&bot.metadata)) && stored.resource_version > resource_version(&bot.metadata)
}

/// Asks the API server for bots that the database has a newer state of: this replica's watch is behind, or the cluster went back to
/// a backup. Whether it did: what the API server has is older, too.
async fn look_again(context: &Context, ahead: &[Name], known: &Known) -> Result<bool, Error> {
    const STEP: &str = "reading a bot of which the database has a newer state";
    for name in ahead {
        let Some((bot, _)) = context.world().rows_of(name).container else { continue };
        let api: Api<BotContainer> = Api::namespaced(context.client.clone(), &name.namespace);
        let object = bot.metadata.name.clone().unwrap_or_default();
        let live = context.read(STEP, &object, api.get_opt(&object)).await;
        // Its absence comes by the watch.
        let Some(live) = live.map_err(|_| Error::NotLeading { step: STEP })? else { continue };
        let stored = known.get(&row::container_id(name)).and_then(|stored| stored.resource_version);
        if resource_version(&live.metadata) < stored {
            tracing::warn!(bot = %name, "the database is newer than the cluster, which was restored: the cluster counts");
            return Ok(true);
        }
        let _ = context.keep(live);
    }
    Ok(false)
}

/// Writes those that wait longest.
async fn some_rows(context: &Context, conn: &mut PgConnection, term: i64, known: &mut Known) -> Result<(), Error> {
    let taken = context.world().changed().map(|changed| changed.take(BOTS)).unwrap_or_default();
    let changes = changes(context, taken.iter().map(|(_, name)| name.clone()), known);
    match write_some(context, conn, term, known, changes).await {
        Ok(_) => {
            if let Some(changed) = context.world().changed() {
                changed.written();
            }
            Ok(())
        }
        Err(error) => {
            if let Some(changed) = context.world().changed() {
                changed.put_back(taken);
            }
            Err(error)
        }
    }
}

/// What there is to write of bots.
fn changes(context: &Context, names: impl Iterator<Item = Name>, known: &Known) -> Vec<Change> {
    names
        .filter_map(|name| {
            let (bot, words) = {
                let mut world = context.world();
                let bot = world.rows_of(&name);
                (bot, world.changed().map(|changed| changed.last_words(&name)).unwrap_or_default())
            };
            let rows = row::Rows::of(&name, &bot);
            let words =
                words.iter().map(|words| row::Ended::of(&name, words.uid, &words.object, &words.tail)).collect();
            let stored = known.get(&row::container_id(&name));
            Change::new(name, rows, bot.alive, words, stored)
        })
        .collect()
}

/// Writes bots, in as many transactions as it takes; how many were written. What the database does not take of one bot holds up no
/// other: it is told, and tried again when the bot changes or all rows are looked at.
async fn write_some(
    context: &Context,
    conn: &mut PgConnection,
    term: i64,
    known: &mut Known,
    changes: Vec<Change>,
) -> Result<usize, Error> {
    let mut written = 0;
    let mut left: Vec<Vec<Change>> = Vec::new();
    let mut some: Vec<Change> = Vec::new();
    let mut rows = 0;
    for change in changes {
        if !some.is_empty() && rows + change.size() > ROWS {
            left.push(std::mem::take(&mut some));
            rows = 0;
        }
        rows += change.size();
        some.push(change);
    }
    left.extend(Some(some).filter(|some| !some.is_empty()));
    left.reverse();
    while let Some(mut some) = left.pop() {
        // Whether it leads until the end is the fence's to say.
        if context.leadership.write_until(Instant::now()).is_none() {
            return Err(Error::NotLeading { step: "writing rows" });
        }
        match within("writing rows", CALL, write::write(conn, term, &some)).await {
            Ok(()) => {
                written += some.len();
                context.metrics.mirror_wrote(some.len());
                let mut world = context.world();
                for change in some {
                    if let (Some(bot), Some(changed)) = (&change.bot, world.changed()) {
                        change.ended.iter().for_each(|ended| changed.heard(bot, ended.uid));
                    }
                    match change.outcome() {
                        Some(stored) => known.insert(change.container_id, stored),
                        None => known.remove(&change.container_id),
                    };
                }
            }
            Err(Error::Data { step, source }) => {
                within("going back", CALL, write::ping(conn, term)).await?;
                if some.len() > 1 {
                    let rest = some.split_off(some.len() / 2);
                    left.extend([rest, some]);
                    continue;
                }
                let error = Error::Data { step, source };
                for change in some {
                    context.metrics.mirror_failed(error.label());
                    let text = format!("bot {} is not mirrored: {}", change.container_id, chain(&error));
                    tracing::error!("{text}");
                    context.events.send(Note::warning(
                        context.lease(),
                        Reason::MirrorRefused,
                        "Mirror",
                        text,
                        change.container_id,
                    ));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Ok(written)
}

impl Context {
    /// What Events of the mirror are about: it has no object of its own.
    fn lease(&self) -> ObjectReference {
        ObjectReference {
            api_version: Some("coordination.k8s.io/v1".to_owned()),
            kind: Some("Lease".to_owned()),
            name: Some(self.lease.name.clone()),
            namespace: Some(self.lease.namespace.clone()),
            ..ObjectReference::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_shown_without_its_password_and_a_wrong_one_not_at_all() {
        let url = "postgres://berth:s3cret@db.example:5433/platform?sslmode=verify-full";
        let parsed: MaybeDatabaseUrl = url.parse().unwrap();
        assert_eq!(format!("{:?}", parsed.0.unwrap()), "postgres://db.example:5433/platform");
        for wrong in [
            "mysql://u:s3cret@h/d",
            "host=h password=s3cret",
            "postgres://u:s3cret@h:port/d",
            "postgres://u:s3cret@h/d?sslmode=maybe",
        ] {
            let error = wrong.parse::<MaybeDatabaseUrl>().unwrap_err();
            assert!(error.contains("postgres://USER") && !error.contains("s3cret"), "{wrong}: {error}");
        }
        assert!("".parse::<MaybeDatabaseUrl>().unwrap().0.is_none());
    }
}
