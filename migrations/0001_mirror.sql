-- The mirror: rows that repeat what the objects say. docs/mirror.md tells what each column means.
--
-- The columns before the blank line of a table are those of the old system (names, types, constraints), for programs that read
-- them already; those after it are Berth's. Later migrations only add, and what they add may be null: an older controller may
-- still be writing.
--
-- Of every row, written_by is the transaction that wrote it. A row whose xmin is another was changed by somebody else.
-- Unique constraints and references are checked at the end of a transaction, so that the order of its statements is free.

CREATE TABLE containers (
    id               uuid        PRIMARY KEY,
    bot_id           uuid        NOT NULL,
    container_id     text        NOT NULL UNIQUE,
    container_name   text        NOT NULL,
    image            text        NOT NULL,
    status           text        NOT NULL CHECK (status IN ('created', 'running', 'stopped', 'error')),
    namespace        text        NOT NULL,
    auto_start       boolean     NOT NULL,
    container_path   text        NOT NULL,
    created_at       timestamptz NOT NULL,
    updated_at       timestamptz NOT NULL,
    last_started_at  timestamptz,
    last_stopped_at  timestamptz,

    object_uid           uuid,
    object_namespace     text   NOT NULL,
    object_name          text   NOT NULL,
    object_bot_id        text   NOT NULL,
    runtime_container_id text,
    node_name            text,
    image_digest         text,
    phase                text,
    ip                   text,
    restart_count        bigint NOT NULL,
    last_version         bigint,
    current_version      bigint,
    conditions           jsonb  NOT NULL,
    generation           bigint,
    observed_generation  bigint,
    resource_version     bigint,

    snapshot_count bigint NOT NULL,
    first_seq      bigint NOT NULL,
    last_seq       bigint NOT NULL,
    children_hash  bigint NOT NULL,
    hash           bigint NOT NULL,
    written_by     xid8
);
CREATE INDEX containers_bot_id ON containers (bot_id);
CREATE INDEX containers_object_uid ON containers (object_uid);

CREATE TABLE snapshots (
    id                           uuid        PRIMARY KEY,
    container_id                 text        NOT NULL REFERENCES containers (container_id) DEFERRABLE INITIALLY DEFERRED,
    runtime_snapshot_name        text        NOT NULL,
    display_name                 text        NOT NULL,
    parent_runtime_snapshot_name text,
    snapshotter                  text        NOT NULL,
    source                       text        NOT NULL,
    created_at                   timestamptz NOT NULL,

    object_namespace text   NOT NULL,
    object_name      text   NOT NULL,
    node_name        text,
    image            text,
    image_digest     text,
    digest           text,
    size_bytes       bigint,
    files            bigint,
    frozen_millis    bigint,
    taken            text,
    ready_at         timestamptz,
    conditions       jsonb  NOT NULL,
    generation       bigint,
    resource_version bigint,

    hash       bigint NOT NULL,
    written_by xid8,
    UNIQUE (container_id, runtime_snapshot_name) DEFERRABLE INITIALLY DEFERRED
);

CREATE TABLE container_versions (
    id           uuid        PRIMARY KEY,
    container_id text        NOT NULL REFERENCES containers (container_id) DEFERRABLE INITIALLY DEFERRED,
    snapshot_id  uuid        NOT NULL REFERENCES snapshots (id) DEFERRABLE INITIALLY DEFERRED,
    version      int         NOT NULL,
    created_at   timestamptz NOT NULL,

    written_by xid8,
    UNIQUE (container_id, version) DEFERRABLE INITIALLY DEFERRED
);
CREATE INDEX container_versions_snapshot_id ON container_versions (snapshot_id);

CREATE TABLE lifecycle_events (
    id           uuid        PRIMARY KEY,
    container_id text        NOT NULL,
    event_type   text        NOT NULL,
    payload      jsonb       NOT NULL,
    created_at   timestamptz NOT NULL,

    object_uid uuid   NOT NULL,
    seq        bigint NOT NULL,
    last_seq   bigint NOT NULL,
    written_by xid8,
    UNIQUE (object_uid, seq)
);
CREATE INDEX lifecycle_events_container_id ON lifecycle_events (container_id, created_at, seq);
CREATE INDEX lifecycle_events_foreign ON lifecycle_events (id) WHERE written_by IS NULL;

-- What is gone. A column that is added to a table above is added here too, at the same place: rows are moved whole.

CREATE TABLE containers_history (
    gone_at  timestamptz NOT NULL,
    retained boolean     NOT NULL,
    LIKE containers
);
CREATE UNIQUE INDEX containers_history_object_uid ON containers_history (object_uid);
CREATE INDEX containers_history_container_id ON containers_history (container_id, gone_at);

CREATE TABLE snapshots_history (
    gone_at  timestamptz NOT NULL,
    retained boolean     NOT NULL,
    LIKE snapshots,
    PRIMARY KEY (id)
);
CREATE INDEX snapshots_history_container_id ON snapshots_history (container_id, gone_at);

CREATE TABLE container_versions_history (
    gone_at  timestamptz NOT NULL,
    retained boolean     NOT NULL,
    LIKE container_versions,
    PRIMARY KEY (id)
);
CREATE INDEX container_versions_history_container_id ON container_versions_history (container_id, gone_at);

CREATE TABLE lifecycle_events_history (
    gone_at    timestamptz NOT NULL,
    retained   boolean     NOT NULL,
    superseded boolean     NOT NULL,
    LIKE lifecycle_events,
    PRIMARY KEY (id)
);
CREATE INDEX lifecycle_events_history_object_uid ON lifecycle_events_history (object_uid);
CREATE INDEX lifecycle_events_history_container_id ON lifecycle_events_history (container_id, created_at, seq);

-- Who may write: each session of a controller takes a term of its own, and writes only while that is the newest.
CREATE TABLE berth_mirror (
    only_row boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    term     bigint      NOT NULL,
    holder   text        NOT NULL,
    since    timestamptz NOT NULL,
    synced   timestamptz
);
INSERT INTO berth_mirror (term, holder, since) VALUES (0, '', now());
