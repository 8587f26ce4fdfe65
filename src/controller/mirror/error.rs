//! What can go wrong between the mirror and its database, sorted by who can do something about it. Nothing here ends the controller.

use std::time::Duration;

/// Why rows were not written. They are tried again, or found wrong by the next look at all rows.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database could not be reached, or went away.
    #[error(
        "{step}: the database can't be reached; look after it, its address in --database-url and the network between"
    )]
    Unreachable {
        /// What was to be done.
        step: &'static str,
        /// What the driver said.
        source: sqlx::Error,
    },
    /// The database does not let us in, or not do that.
    #[error("{step}: the database refuses; correct user and password in --database-url, or grant the user its schema")]
    Denied {
        /// What was to be done.
        step: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// A standby, or a database that was made read-only.
    #[error("{step}: the database is read-only; point --database-url at the primary")]
    ReadOnly {
        /// What was to be done.
        step: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// Disk, memory or connections are used up there.
    #[error("{step}: the database is full (disk, memory or connections); make room there")]
    Full {
        /// What was to be done.
        step: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// Its tables are not those of the migrations.
    #[error(
        "{step}: the database's tables are not Berth's; give Berth a database or a schema of its own, and leave its tables as they are"
    )]
    Schema {
        /// What was to be done.
        step: &'static str,
        /// What the database said.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Somebody holds a lock, or a statement took too long.
    #[error("{step}: the database is busy; see pg_stat_activity for who holds the lock")]
    Busy {
        /// What was to be done.
        step: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// The database does not take these rows.
    #[error(
        "{step}: the database does not take the row; a trigger, a constraint or a column was changed by hand, or it is a bug of Berth's"
    )]
    Data {
        /// What was to be done.
        step: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// No answer in time. It may have been done all the same: the next session looks.
    #[error("{step}: no answer from the database within {after:?}")]
    Deadline {
        /// What was to be done.
        step: &'static str,
        /// How long was waited.
        after: Duration,
    },
    /// Another session writes now.
    #[error("{step}: another session of a controller writes now")]
    Fenced {
        /// What was to be done.
        step: &'static str,
    },
    /// This replica does not lead, or may not for long enough.
    #[error("{step}: this replica does not lead")]
    NotLeading {
        /// What was to be done.
        step: &'static str,
    },
    /// Anything else.
    #[error("{step} failed")]
    Other {
        /// What was to be done.
        step: &'static str,
        /// What the driver said.
        source: sqlx::Error,
    },
}

impl Error {
    /// Sorts what the driver says (PostgreSQL's appendix A, "Error Codes").
    pub fn of(step: &'static str, source: sqlx::Error) -> Self {
        let sqlx::Error::Database(said) = &source else {
            return match source {
                sqlx::Error::Io(_) | sqlx::Error::Tls(_) | sqlx::Error::Protocol(_) => {
                    Self::Unreachable { step, source }
                }
                _ => Self::Other { step, source },
            };
        };
        let code = said.code().unwrap_or_default().into_owned();
        match (code.get(..2).unwrap_or_default(), code.as_str()) {
            (_, "25006") => Self::ReadOnly { step, source },
            (_, "57014" | "55P03" | "25P03" | "40001" | "40P01") => Self::Busy { step, source },
            (_, "42501") | ("28", _) => Self::Denied { step, source },
            (_, "3D000" | "3F000") | ("42", _) => Self::Schema { step, source: Box::new(source) },
            ("08" | "57", _) => Self::Unreachable { step, source },
            ("53" | "58", _) => Self::Full { step, source },
            ("22" | "23" | "54", _) => Self::Data { step, source },
            _ => Self::Other { step, source },
        }
    }

    /// The same of a migration.
    pub fn of_migration(source: sqlx::migrate::MigrateError) -> Self {
        const STEP: &str = "bringing the tables up to date";
        use sqlx::migrate::MigrateError;
        match source {
            // What already has the name of one of our tables is somebody else's.
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => match Self::of(STEP, error) {
                Self::Data { step, source } | Self::Other { step, source } => {
                    Self::Schema { step, source: Box::new(source) }
                }
                other => other,
            },
            other => Self::Schema { step: STEP, source: Box::new(other) },
        }
    }

    /// The word for metrics and logs: the variant's name.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "Unreachable",
            Self::Denied { .. } => "Denied",
            Self::ReadOnly { .. } => "ReadOnly",
            Self::Full { .. } => "Full",
            Self::Schema { .. } => "Schema",
            Self::Busy { .. } => "Busy",
            Self::Data { .. } => "Data",
            Self::Deadline { .. } => "Deadline",
            Self::Fenced { .. } => "Fenced",
            Self::NotLeading { .. } => "NotLeading",
            Self::Other { .. } => "Other",
        }
    }
}
