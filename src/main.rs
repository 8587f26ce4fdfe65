//! The `berth` command: a subcommand a part. First what was typed, then what it means; errors become exit codes here.

use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use berth::agent::AgentArgs;
use berth::agent::host::{Host, Pod};
use berth::controller::ControllerArgs;
use berth::delete_all::DeleteAllArgs;
use berth::telemetry::{LogFormat, init_logs};
use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Declared AI bots on Kubernetes, run directly on containerd.
#[derive(Debug, Parser)]
#[command(name = "berth", version)]
struct Command {
    #[command(subcommand)]
    part: Part,

    /// How log lines look.
    #[arg(long, env = "BERTH_LOG_FORMAT", value_enum, default_value_t, global = true)]
    log_format: LogFormat,

    /// What is logged, in the syntax of RUST_LOG.
    #[arg(long, env = "BERTH_LOG_FILTER", value_name = "FILTER", default_value = "info", global = true)]
    log_filter: String,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Write the CustomResourceDefinitions. Needs no cluster.
    Crds {
        /// Write one file a kind into this folder instead of all to standard output.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
    /// Place bots on nodes, hold their finalizers and records, watch over nodes. Several may run; one leads.
    Controller(Box<ControllerArgs>),
    /// List all that changed between two versions of this node. A version is named NAMESPACE/BOTSNAPSHOT.
    Diff {
        /// The older one.
        before: String,
        /// The newer one.
        now: String,
        /// The agent's folder.
        #[arg(long, env = "BERTH_STATE_DIR", value_name = "DIR", default_value = "/var/lib/berth")]
        state_dir: PathBuf,
    },
    /// Run the bots of one node on its containerd. Ended by TERM; its bots run on.
    Agent(Box<AgentArgs>),
    /// Wait, on TERM until the node's bots have stopped: what a node's holder Pod does.
    #[command(hide = true)]
    Hold {
        /// Where the node's agent serves /drained.
        agent: Option<SocketAddr>,
    },
    /// Delete all bots and versions of the cluster, and wait until their nodes have removed them. Says how many there are; does it with
    /// --yes. What `helm uninstall` runs first where the chart was installed with crds.keep=false.
    DeleteAll(DeleteAllArgs),
    /// Take all that Berth has off a node: bots, their files, versions, images, network. After its agent is gone. Says what there is;
    /// does it with --yes.
    NodeCleanup {
        /// The agent's, as it was started.
        #[command(flatten)]
        agent: Box<AgentArgs>,
        /// Do it. What bots wrote on this node is lost.
        #[arg(long)]
        yes: bool,
    },
}

fn main() -> ExitCode {
    // Logger and copier are started by the agent, fork, and have to stay small: nothing is parsed or built before them.
    let mut arguments = std::env::args_os().skip(1);
    match arguments.next() {
        Some(first) if first == berth::output::pair::SUBCOMMAND => return berth::output::pair::main(arguments),
        Some(first) if first == berth::layer::copier::SUBCOMMAND => return berth::layer::copier::main(arguments),
        _ => {}
    }
    let command = Command::parse();
    let done = match command.part {
        Part::Crds { dir } => write_crds(dir),
        Part::Diff { before, now, state_dir } => diff(&before, &now, &state_dir),
        Part::Controller(args) => {
            serve(command.log_format, &command.log_filter, |stop| berth::controller::run(*args, stop))
        }
        Part::DeleteAll(args) => {
            serve(command.log_format, &command.log_filter, |stop| berth::delete_all::run(args, stop))
        }
        Part::Hold { agent } => hold(agent),
        Part::NodeCleanup { agent, yes } => cleanup(*agent, yes, command.log_format, &command.log_filter),
        Part::Agent(args) => agent(*args, command.log_format, &command.log_filter),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The whole chain: each error tells its own step, its source the cause.
            let _ = writeln!(std::io::stderr(), "berth: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a part that serves until SIGTERM or SIGINT.
fn serve<F>(format: LogFormat, filter: &str, part: impl FnOnce(CancellationToken) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>>,
{
    use anyhow::Context;
    init_logs(format, filter)?;
    // An error means that a provider is there already, which serves as well.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("can't start tokio")?;
    runtime.block_on(async {
        let stop = CancellationToken::new();
        let mut term = signal(SignalKind::terminate()).context("can't listen to SIGTERM")?;
        let mut int = signal(SignalKind::interrupt()).context("can't listen to SIGINT")?;
        let signalled = stop.clone();
        tokio::spawn(async move {
            // Cancel-safe: a signal is told once, and the first of the two ends this.
            let name = tokio::select! { _ = term.recv() => "SIGTERM", _ = int.recv() => "SIGINT" };
            tracing::info!(signal = name, "stopping");
            signalled.cancel();
        });
        part(stop).await
    })
}

/// First what only a process of one thread can do.
fn agent(args: AgentArgs, format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let host = Host::settle(args.enter_host)?;
    serve(format, filter, |stop| berth::agent::run(args, host, stop))
}

/// Waits for TERM, and then until the agent says that all bots of the node have stopped. Whoever evicted the Pod waits with it; kubelet
/// ends it when its grace is over.
fn hold(agent: Option<SocketAddr>) -> anyhow::Result<()> {
    use anyhow::Context;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("can't start tokio")?;
    runtime.block_on(async {
        let mut term = signal(SignalKind::terminate()).context("can't listen to SIGTERM")?;
        term.recv().await;
        let Some(agent) = agent else { return std::future::pending().await };
        while !is_drained(agent).await {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    })
}

/// Asks the agent; no answer is a no.
async fn is_drained(agent: SocketAddr) -> bool {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let asking = async {
        let mut stream = tokio::net::TcpStream::connect(agent).await?;
        stream.write_all(format!("GET /drained HTTP/1.0\r\nHost: {agent}\r\n\r\n").as_bytes()).await?;
        let mut answer = String::new();
        stream.take(1024).read_to_string(&mut answer).await?;
        Ok::<_, std::io::Error>(answer.split(' ').nth(1) == Some("200"))
    };
    matches!(tokio::time::timeout(Duration::from_secs(5), asking).await, Ok(Ok(true)))
}

fn cleanup(args: AgentArgs, yes: bool, format: LogFormat, filter: &str) -> anyhow::Result<()> {
    let pod = args.enter_host.then(Pod::leave).transpose()?;
    let args = match &pod {
        Some(pod) => args.of_pod(pod),
        None => args,
    };
    serve(format, filter, |_| berth::agent::cleanup::run(args, yes))
}

fn diff(before: &str, now: &str, state_dir: &std::path::Path) -> anyhow::Result<()> {
    use anyhow::Context;
    let find = |named: &str| -> anyhow::Result<PathBuf> {
        let wanted = named.split_once('/').with_context(|| format!("{named} must be NAMESPACE/BOTSNAPSHOT"))?;
        let dir = state_dir.join("snapshots");
        let entries =
            std::fs::read_dir(&dir).with_context(|| format!("can't read {}; is this a node?", dir.display()))?;
        for entry in entries.flatten() {
            let taken = std::fs::read(entry.path().join("taken.json")).unwrap_or_default();
            let taken: Option<berth::agent::version::Taken> = serde_json::from_slice(&taken).ok();
            if taken.is_some_and(|taken| (taken.version.namespace.as_str(), taken.version.name.as_str()) == wanted) {
                return Ok(entry.path().join("manifest"));
            }
        }
        anyhow::bail!(
            "there is no version of BotSnapshot {named} on this node; `kubectl get bsnap -o wide` tells where it is"
        )
    };
    let (before, now) = (find(before)?, find(now)?);
    match berth::layer::diff(&before, &now, &mut std::io::stdout().lock()) {
        // A closed pipe (`berth diff … | head`) is no error of ours.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        done => done.context("can't compare the manifests"),
    }
}

fn write_crds(dir: Option<PathBuf>) -> anyhow::Result<()> {
    use anyhow::Context;
    for crd in berth::api::crd::all() {
        let yaml = serde_yaml_ng::to_string(&crd).context("can't write a CRD as YAML")?;
        match &dir {
            None => {
                // A closed pipe (`berth crds | head`) is no error of ours.
                if writeln!(std::io::stdout(), "---\n{}", yaml.trim_end()).is_err() {
                    return Ok(());
                }
            }
            Some(dir) => {
                let name = crd.metadata.name.as_deref().unwrap_or_default();
                let path = dir.join(format!("{name}.yaml"));
                std::fs::write(&path, yaml).with_context(|| format!("can't write {}", path.display()))?;
            }
        }
    }
    Ok(())
}
