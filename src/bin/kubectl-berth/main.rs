//! `kubectl berth`: Berth's objects for people, with the rights of whoever calls it. Nothing but `adopt` writes.

mod adopt;
mod versions;

use std::io::Write as _;
use std::process::ExitCode;

use anyhow::Context as _;
use berth::api::condition::Reason;
use berth::api::{BotContainer, BotContainerStatus, BotSnapshot};
use clap::{Parser, Subcommand};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::ListParams;
use kube::config::KubeConfigOptions;
use kube::{Api, Client, Config};

/// Berth's bots for people.
#[derive(Debug, Parser)]
#[command(name = "kubectl-berth", bin_name = "kubectl berth", version)]
struct Command {
    /// The namespace; that of the context without it.
    #[arg(long, short, global = true, value_name = "NAME")]
    namespace: Option<String>,

    /// The context of the kubeconfig; the current one without it.
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,

    #[command(subcommand)]
    question: Question,
}

#[derive(Debug, Subcommand)]
enum Question {
    /// Why a bot is as it is, and what to do about it.
    Explain {
        /// Name of the BotContainer.
        name: String,
    },
    /// What a bot's layer stands on, with its versions, as a tree.
    Lineage {
        /// Name of the BotContainer.
        name: String,
    },
    /// The versions of a namespace or of one bot, what they cost on disk, and who holds what was deleted.
    Snapshots {
        /// Name of the BotContainer; all of them without it.
        name: Option<String>,
    },
    /// Make a version of what a bot left whose namespace was deleted, or list what there is.
    ///
    /// A bot under `deletionPolicy: Retain` leaves its layer on its node when its namespace is deleted, for the agent's
    /// --orphan-retention. A BotContainer of its botId in the namespace that adopts it goes on from it. Takes the right to change
    /// BotNodes, which reaches what was left by all namespaces.
    Adopt {
        /// Name of what was left; all of that is listed without it.
        orphan: Option<String>,
        /// Name of the BotSnapshot that is made; without it that of the bot, and `-adopted`.
        #[arg(long = "as", value_name = "NAME")]
        snapshot: Option<String>,
    },
    /// What each reason of a condition means. Asks no cluster.
    Reasons,
}

fn main() -> ExitCode {
    let command = Command::parse();
    let _ = rustls::crypto::ring::default_provider().install_default();
    let text = match &command.question {
        Question::Reasons => Ok(reasons()),
        question => ask(&command, question),
    };
    match text {
        Ok(text) => {
            // A closed pipe (`| head`) is no error of ours.
            let _ = std::io::stdout().write_all(text.as_bytes());
            ExitCode::SUCCESS
        }
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "kubectl berth: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn ask(command: &Command, question: &Question) -> anyhow::Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("can't start tokio")?;
    runtime.block_on(async {
        let options = KubeConfigOptions { context: command.context.clone(), ..KubeConfigOptions::default() };
        let config = Config::from_kubeconfig(&options).await.context("no usable kubeconfig; set KUBECONFIG")?;
        let namespace = command.namespace.clone().unwrap_or_else(|| config.default_namespace.clone());
        let client = Client::try_from(config).context("no way to the API server")?;
        let bots: Api<BotContainer> = Api::namespaced(client.clone(), &namespace);
        let snapshots: Api<BotSnapshot> = Api::namespaced(client.clone(), &namespace);
        let all = async || {
            let list = snapshots.list(&ListParams::default()).await;
            list.map(|list| list.items).with_context(|| format!("can't list the BotSnapshots of {namespace}"))
        };
        match question {
            Question::Explain { name } => Ok(explain(&bot(&bots, &namespace, name).await?)),
            Question::Lineage { name } => Ok(versions::lineage(&bot(&bots, &namespace, name).await?, &all().await?)),
            Question::Snapshots { name } => {
                let list = bots.list(&ListParams::default()).await;
                let bots = list.with_context(|| format!("can't list the BotContainers of {namespace}"))?.items;
                let mut all = all().await?;
                all.retain(|snapshot| name.as_ref().is_none_or(|name| snapshot.spec.bot_container_name == *name));
                Ok(versions::table(&all, &bots))
            }
            Question::Adopt { orphan: None, .. } => adopt::list(&client).await,
            Question::Adopt { orphan: Some(orphan), snapshot } => {
                adopt::adopt(&client, &namespace, orphan, snapshot.as_deref()).await
            }
            Question::Reasons => Ok(reasons()),
        }
    })
}

async fn bot(bots: &Api<BotContainer>, namespace: &str, name: &str) -> anyhow::Result<BotContainer> {
    bots.get_opt(name)
        .await
        .with_context(|| format!("can't read BotContainer {namespace}/{name}"))?
        .with_context(|| format!("there is no BotContainer {name} in the namespace {namespace}"))
}

/// Every reason with its advice.
fn reasons() -> String {
    let width = Reason::ALL.iter().map(|reason| reason.as_str().len()).max().unwrap_or(0);
    Reason::ALL.iter().map(|reason| format!("{:width$}  {}\n", reason.as_str(), reason.advice())).collect()
}

/// What a person wants to know of one bot: where it stands, what is not as it should be, how it last ended.
fn explain(bot: &BotContainer) -> String {
    let none = BotContainerStatus::default();
    let status = bot.status.as_ref().unwrap_or(&none);
    let name = bot.metadata.name.as_deref().unwrap_or("?");
    let phase = status.phase.map_or("not seen by the controller yet".to_owned(), |phase| format!("{phase:?}"));
    let mut text = format!("{name}: {phase}");
    if let Some(node) = &status.node_name {
        text.push_str(&format!(" on {node}"));
    }
    if let Some(ip) = status.network.as_ref().and_then(|network| network.ip.as_ref()) {
        text.push_str(&format!(" at {ip}"));
    }
    text.push('\n');
    if status.observed_generation.is_some() && status.observed_generation != bot.metadata.generation {
        text.push_str("  the last change of its spec has not been looked at yet\n");
    }
    for condition in &status.conditions {
        text.push_str(&line(condition));
    }
    if let Some(last) = &status.last_termination {
        text.push_str(&format!("  last end: exit code {}, {}\n", last.exit_code, last.reason));
        for words in last.message.iter().flat_map(|message| message.lines()) {
            text.push_str(&format!("    | {words}\n"));
        }
    }
    text
}

/// A condition; with what to do, where it is not as it should be.
fn line(condition: &Condition) -> String {
    let Condition { type_, status, reason, message, .. } = condition;
    let mut text = format!("  {type_} is {status}: {message}\n");
    // These two are said only while something is wrong, and repeat Ready.
    let repeats = matches!(type_.as_str(), "Reconciling" | "Stalled");
    if repeats {
        return String::new();
    }
    if status != "True"
        && let Some(reason) = Reason::parse(reason)
    {
        text.push_str(&format!("    {}: {}\n", reason.as_str(), reason.advice()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bot_that_is_not_ready_is_explained_with_advice() {
        let bot: BotContainer = serde_json::from_value(serde_json::json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
            "metadata": {"name": "web", "generation": 2},
            "spec": {"image": "nginx"},
            "status": {
                "observedGeneration": 1, "phase": "BackOff", "nodeName": "node-1",
                "lastTermination": {"exitCode": 1, "reason": "Error", "message": "no token"},
                "conditions": [
                    {"type": "Ready", "status": "False", "reason": "CrashLoopBackOff", "message": "back-off",
                     "lastTransitionTime": "2026-11-24T10:00:00Z"},
                    {"type": "Reconciling", "status": "True", "reason": "CrashLoopBackOff", "message": "back-off",
                     "lastTransitionTime": "2026-11-24T10:00:00Z"},
                ],
            },
        }))
        .unwrap();
        assert_eq!(
            explain(&bot),
            "web: BackOff on node-1\n  the last change of its spec has not been looked at yet\n  \
             Ready is False: back-off\n    CrashLoopBackOff: The process keeps ending; see lastTermination. \
             It is started again after a back-off.\n  last end: exit code 1, Error\n    | no token\n"
        );
    }
}
