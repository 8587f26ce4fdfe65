//! The `berth` command: a subcommand a part. First what was typed, then what it means; errors become exit codes here.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Declared AI bots on Kubernetes, run directly on containerd.
#[derive(Debug, Parser)]
#[command(name = "berth", version)]
struct Command {
    #[command(subcommand)]
    part: Part,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Write the CustomResourceDefinitions. Needs no cluster.
    Crds {
        /// Write one file a kind into this folder instead of all to standard output.
        #[arg(long, value_name = "DIR")]
        dir: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    // The logger of bots' output is started by the agent and has to stay small: nothing is parsed or built before it.
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_some_and(|first| first == berth::output::pair::SUBCOMMAND) {
        return berth::output::pair::main(arguments);
    }
    let command = Command::parse();
    let done = match command.part {
        Part::Crds { dir } => write_crds(dir),
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
