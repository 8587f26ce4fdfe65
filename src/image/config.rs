//! The image config: what the image says of how it wants to be run. Hostile bytes, so every value is bounded.
//!
//! Shape: OCI image-spec v1.1, config.md; Docker's schema 2 has the same fields.

use serde::Deserialize;

use super::error::Flaw;
use super::manifest::Platform;
use super::reference::Digest;

/// The kernel takes no longer single argument (MAX_ARG_STRLEN).
const MAX_STRING: usize = 128 * 1024;
/// All of entrypoint, cmd and env together. The kernel's usual bound for a new process is a quarter of its 8 MiB stack.
const MAX_STRINGS: usize = 2 << 20;
const MAX_ITEMS: usize = 4096;
const MAX_PATH: usize = 4096;
const MAX_USER: usize = 256;
const MAX_SIGNAL: usize = 32;

/// How an image wants to be run, every value bounded and free of NUL.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunConfig {
    /// `NAME=value`, in order.
    pub env: Vec<String>,
    /// The program and its first arguments.
    pub entrypoint: Vec<String>,
    /// Arguments, or the program where there is no entrypoint.
    pub cmd: Vec<String>,
    /// Absolute; `/` where the image says none.
    pub working_dir: String,
    /// `user[:group]`, names or numbers; empty means root.
    pub user: String,
    /// A signal's name or number, unparsed.
    pub stop_signal: Option<String>,
}

/// A config as far as a pull needs it.
#[derive(Clone, Debug)]
pub(crate) struct ImageConfig {
    pub platform: Platform,
    /// Digests of the unpacked layers, lowest first.
    pub diff_ids: Vec<Digest>,
    pub run: RunConfig,
}

#[derive(Deserialize)]
struct RawConfig {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
    rootfs: RawRootfs,
    config: Option<RawRun>,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

/// Go writes an empty list as null.
#[derive(Deserialize, Default)]
#[serde(default)]
struct RawRun {
    #[serde(rename = "Env")]
    env: Option<Vec<String>>,
    #[serde(rename = "Entrypoint")]
    entrypoint: Option<Vec<String>>,
    #[serde(rename = "Cmd")]
    cmd: Option<Vec<String>>,
    #[serde(rename = "WorkingDir")]
    working_dir: Option<String>,
    #[serde(rename = "User")]
    user: Option<String>,
    #[serde(rename = "StopSignal")]
    stop_signal: Option<String>,
}

/// Parses a config blob.
pub(crate) fn parse(bytes: &[u8]) -> Result<ImageConfig, Flaw> {
    let raw: RawConfig = serde_json::from_slice(bytes).map_err(|e| Flaw::Json(e.to_string()))?;
    let diff_ids = raw
        .rootfs
        .diff_ids
        .unwrap_or_default()
        .iter()
        .map(|id| {
            Digest::parse(id).ok_or_else(|| Flaw::Field("rootfs.diff_ids", "not all are sha256 digests".to_owned()))
        })
        .collect::<Result<_, _>>()?;
    Ok(ImageConfig {
        platform: Platform::new(&raw.os, &raw.architecture, &raw.variant),
        diff_ids,
        run: bounded(raw.config.unwrap_or_default())?,
    })
}

fn bounded(raw: RawRun) -> Result<RunConfig, Flaw> {
    let run = RunConfig {
        env: raw.env.unwrap_or_default(),
        entrypoint: raw.entrypoint.unwrap_or_default(),
        cmd: raw.cmd.unwrap_or_default(),
        working_dir: raw.working_dir.filter(|d| !d.is_empty()).unwrap_or_else(|| "/".to_owned()),
        user: raw.user.unwrap_or_default(),
        stop_signal: raw.stop_signal.filter(|s| !s.is_empty()),
    };
    let mut total = 0;
    for (field, items) in [("config.Env", &run.env), ("config.Entrypoint", &run.entrypoint), ("config.Cmd", &run.cmd)] {
        if items.len() > MAX_ITEMS {
            return Err(Flaw::Field(field, format!("{} entries, at most {MAX_ITEMS} are taken", items.len())));
        }
        for item in items {
            string(field, item, MAX_STRING)?;
            total += item.len();
        }
    }
    if total > MAX_STRINGS {
        return Err(Flaw::Field(
            "config",
            format!("Env, Entrypoint and Cmd have {total} bytes, at most {MAX_STRINGS} are taken"),
        ));
    }
    if let Some(bad) = run.env.iter().find(|e| e.split_once('=').is_none_or(|(name, _)| name.is_empty())) {
        let start: String = bad.chars().take(40).collect();
        return Err(Flaw::Field("config.Env", format!("{start:?} is not NAME=value")));
    }
    string("config.WorkingDir", &run.working_dir, MAX_PATH)?;
    if !run.working_dir.starts_with('/') {
        return Err(Flaw::Field("config.WorkingDir", "it is not absolute".to_owned()));
    }
    string("config.User", &run.user, MAX_USER)?;
    string("config.StopSignal", run.stop_signal.as_deref().unwrap_or_default(), MAX_SIGNAL)?;
    Ok(run)
}

fn string(field: &'static str, value: &str, max: usize) -> Result<(), Flaw> {
    if value.len() > max {
        return Err(Flaw::Field(field, format!("{} bytes, at most {max} are taken", value.len())));
    }
    if value.contains('\0') {
        return Err(Flaw::Field(field, "it has a NUL".to_owned()));
    }
    Ok(())
}

/// The name under which the topmost of some layers is committed (image-spec config.md, "ChainID"). Everyone who unpacks
/// the same layers gets the same name, so images share what they have in common.
pub(crate) fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(below) => Digest::of(format!("{below} {diff_id}").as_bytes()),
        };
        chain.push(next);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn config(run: serde_json::Value) -> Result<ImageConfig, Flaw> {
        parse(
            json!({"os": "linux", "architecture": "amd64", "rootfs": {"diff_ids": null}, "config": run})
                .to_string()
                .as_bytes(),
        )
    }

    #[test]
    fn what_an_image_says_is_read() {
        let run = config(json!({
            "Env": ["A=b", "C="], "Entrypoint": ["/bin/a"], "Cmd": null, "WorkingDir": "/data", "User": "1000:1000",
            "StopSignal": "SIGINT", "Labels": {"containerd.io/gc.root": "x"}, "Volumes": {"/x": {}},
        }))
        .unwrap()
        .run;
        assert_eq!(run.env, ["A=b", "C="]);
        assert_eq!(run.entrypoint, ["/bin/a"]);
        assert!(run.cmd.is_empty());
        assert_eq!((run.working_dir.as_str(), run.user.as_str()), ("/data", "1000:1000"));
        assert_eq!(run.stop_signal.as_deref(), Some("SIGINT"));
        let bare = parse(br#"{"os":"linux","architecture":"amd64","rootfs":{}}"#).unwrap().run;
        assert_eq!(bare, RunConfig { working_dir: "/".to_owned(), ..RunConfig::default() });
    }

    #[test]
    fn what_can_not_be_run_is_refused_by_its_field() {
        for (run, field) in [
            (json!({"Env": ["=x"]}), "config.Env"),
            (json!({"Env": ["NOVALUE"]}), "config.Env"),
            (json!({"Env": ["A=\u{0}"]}), "config.Env"),
            (json!({"Env": vec!["A=b"; MAX_ITEMS + 1]}), "config.Env"),
            (json!({"Cmd": ["x".repeat(MAX_STRING + 1)]}), "config.Cmd"),
            (json!({"Cmd": vec!["x".repeat(MAX_STRING); 17]}), "config"),
            (json!({"WorkingDir": "data"}), "config.WorkingDir"),
            (json!({"WorkingDir": format!("/{}", "x".repeat(MAX_PATH))}), "config.WorkingDir"),
            (json!({"User": "x".repeat(MAX_USER + 1)}), "config.User"),
            (json!({"StopSignal": "x".repeat(MAX_SIGNAL + 1)}), "config.StopSignal"),
        ] {
            match config(run) {
                Err(Flaw::Field(named, _)) => assert_eq!(named, field),
                other => panic!("{field}: {other:?}"),
            }
        }
        for bytes in [&b"{}"[..], b"[]", b"", b"\xff", br#"{"rootfs":{"diff_ids":["sha512:00"]}}"#] {
            assert!(parse(bytes).is_err());
        }
    }

    #[test]
    fn chain_ids_are_those_of_the_spec() {
        let a = Digest::of(b"a");
        let b = Digest::of(b"b");
        let chain = chain_ids(&[a.clone(), b.clone()]);
        assert_eq!(chain[0], a);
        assert_eq!(chain[1], Digest::of(format!("{a} {b}").as_bytes()));
        assert!(chain_ids(&[]).is_empty());
    }
}
