//! A real PostgreSQL that this process starts, and a database of its own for each test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions as _, PgConnection, Row as _};

use crate::fixture::{eventually, free_port};

static SERVER: OnceLock<u16> = OnceLock::new();
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Starts a server with its data in `dir`; it dies with this process. Its port.
pub fn start(dir: &Path, options: &[&str]) -> u16 {
    let port = free_port();
    std::fs::create_dir_all(dir).unwrap();
    let log = std::fs::File::create(dir.with_extension("log")).unwrap();
    let mut command = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("hack/postgres"));
    command.arg("run").arg(dir).arg(port.to_string()).args(options).env("PDEATHSIG", "KILL");
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    // The signal comes at the death of the thread that forked, so that one stays.
    std::thread::spawn(move || {
        let mut child = command.spawn().expect("hack/postgres");
        let _ = child.wait();
        loop {
            std::thread::park();
        }
    });
    port
}

/// Where this process keeps its servers' data; what the one before left is gone.
pub fn root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("e2e_mirror");
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).unwrap();
        root
    })
}

/// One database.
pub struct Database {
    port: u16,
    name: String,
}

impl Database {
    /// A new one on the shared server.
    pub async fn new() -> Self {
        let port = *SERVER.get_or_init(|| start(&root().join("pg"), &["-c", "max_connections=50"]));
        let name = format!("test_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let server = Self { port, name: "berth".into() };
        server.run(&format!("CREATE DATABASE {name}")).await;
        Self { port, name }
    }

    /// The one of a server that was started for a test.
    pub fn of(port: u16) -> Self {
        Self { port, name: "berth".into() }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// What the controller is given; through a relay, with its port.
    pub fn url(&self, port: u16) -> String {
        format!("postgres://berth@127.0.0.1:{port}/{}?sslmode=disable", self.name)
    }

    pub async fn connect(&self) -> PgConnection {
        let options: PgConnectOptions = self.url(self.port).parse().unwrap();
        eventually("PostgreSQL", Duration::from_secs(60), || async {
            options.connect().await.map_err(|error| {
                let log = std::fs::read_to_string(root().join("pg.log")).unwrap_or_default();
                format!("{error}; its log: {log}")
            })
        })
        .await
    }

    /// Runs statements.
    pub async fn run(&self, sql: &str) {
        let done = sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut self.connect().await).await;
        done.unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    /// The first column of what a query gives, as text.
    pub async fn texts(&self, sql: &str) -> Vec<String> {
        self.try_texts(sql).await.unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    pub async fn try_texts(&self, sql: &str) -> Result<Vec<String>, String> {
        let sql = format!("SELECT t.x::text FROM ({sql}) AS t (x)");
        let rows = sqlx::raw_sql(AssertSqlSafe(sql)).fetch_all(&mut self.connect().await).await;
        let rows = rows.map_err(|error| error.to_string())?;
        Ok(rows.iter().map(|row| row.get::<Option<String>, _>(0).unwrap_or_else(|| "NULL".into())).collect())
    }

    /// Waits until a query gives this.
    pub async fn gives(&self, sql: &str, wanted: &[&str]) {
        eventually(sql, Duration::from_secs(30), || async {
            let found = self.try_texts(sql).await?;
            if found == wanted { Ok(()) } else { Err(format!("{found:?}, wanted {wanted:?}")) }
        })
        .await;
    }
}
