//! Manifests and indexes, and which entry of an index is for this machine. Pure.
//!
//! Shapes: OCI image-spec v1.1 (manifest.md, image-index.md, descriptor.md) and Docker's schema 2, which differ in
//! nothing but media types.

use std::fmt;

use serde::Deserialize;

use super::error::Flaw;
use super::reference::Digest;

pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// What is asked of a registry.
pub(crate) const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json";

/// The most layers of one image. Docker makes at most 127; each costs a mount's option length.
pub(crate) const MAX_LAYERS: usize = 128;
const MAX_ENTRIES: usize = 1024;

/// Points to a blob: its digest, its exact size in bytes, and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Descriptor {
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
}

/// Operating system, architecture and variant in Go's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Platform {
    pub os: String,
    pub architecture: String,
    pub variant: String,
}

impl Platform {
    /// Normalises the spellings in use, as containerd's `platforms` package does.
    pub fn new(os: &str, architecture: &str, variant: &str) -> Self {
        let (os, arch, variant) = (short(os), short(architecture), short(variant));
        let (architecture, variant) = match (arch.as_str(), variant.as_str()) {
            ("x86_64" | "x86-64" | "amd64", "v1") => ("amd64", ""),
            ("x86_64" | "x86-64" | "amd64", v) => ("amd64", v),
            ("aarch64" | "arm64", "8" | "v8" | "v8.0") => ("arm64", ""),
            ("aarch64" | "arm64", v) => ("arm64", v),
            ("armhf", _) => ("arm", "v7"),
            ("armel", _) => ("arm", "v6"),
            ("arm", "" | "7") => ("arm", "v7"),
            ("arm", "5" | "6" | "8") => (
                "arm",
                match variant.as_str() {
                    "5" => "v5",
                    "6" => "v6",
                    _ => "v8",
                },
            ),
            (arch, v) => (arch, v),
        };
        Self { os, architecture: architecture.to_owned(), variant: variant.to_owned() }
    }

    /// This machine.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86" => "386",
            "powerpc64" if cfg!(target_endian = "little") => "ppc64le",
            "loongarch64" => "loong64",
            other => other,
        };
        Self::new("linux", architecture, "")
    }

    /// How well an image's platform suits this machine: 0 is best, `None` is not at all.
    ///
    /// A variant is a set of instructions above the architecture's base, so the plain one always runs. Those above it
    /// are taken only where nothing plain is offered and `runs` says that this processor has them.
    fn suits(&self, offered: &Self, runs: &dyn Fn(&str) -> bool) -> Option<u32> {
        if offered.os != self.os || offered.architecture != self.architecture {
            return None;
        }
        match (offered.architecture.as_str(), offered.variant.as_str()) {
            (_, variant) if variant == self.variant => Some(0),
            ("arm", "v6") => Some(1),
            ("arm", "v5") => Some(2),
            (_, variant) if runs(variant) => Some(3),
            _ => None,
        }
    }

    /// Whether an image for `offered` runs on this machine.
    pub fn runs(&self, offered: &Self) -> bool {
        self.suits(offered, &processor_runs).is_some()
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_none = |text: &str| if text.is_empty() { "(none)".to_owned() } else { text.to_owned() };
        write!(f, "{}/{}", or_none(&self.os), or_none(&self.architecture))?;
        if !self.variant.is_empty() {
            write!(f, "/{}", self.variant)?;
        }
        Ok(())
    }
}

/// A platform's words are shown in messages; nobody needs more than this of them.
fn short(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(32).collect::<String>().to_ascii_lowercase()
}

/// Whether this processor has the instructions of an x86-64 micro-architecture level (System V psABI) or ARMv8 minor.
fn processor_runs(variant: &str) -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        let v2 = std::is_x86_feature_detected!("sse4.2") && std::is_x86_feature_detected!("popcnt");
        let v3 = v2
            && std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("bmi2")
            && std::is_x86_feature_detected!("fma");
        match variant {
            "v2" => v2,
            "v3" => v3,
            _ => false,
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = variant;
        false
    }
}

/// What a manifest URL answered with.
#[derive(Clone, Debug)]
pub(crate) enum Manifest {
    Image(ImageManifest),
    Index(Vec<Entry>),
}

/// One image: its config and its layers, lowest first.
#[derive(Clone, Debug)]
pub(crate) struct ImageManifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

/// One entry of an index.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    pub descriptor: Descriptor,
    pub platform: Option<Platform>,
}

#[derive(Deserialize)]
struct RawManifest {
    #[serde(rename = "schemaVersion")]
    schema_version: i64,
    #[serde(rename = "mediaType", default)]
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
    manifests: Option<Vec<RawDescriptor>>,
}

#[derive(Deserialize)]
struct RawDescriptor {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: String,
    size: i64,
    platform: Option<RawPlatform>,
}

#[derive(Deserialize)]
struct RawPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: String,
}

/// Parses what a registry sent, or what the content store holds.
///
/// `media_type` is what the header or the descriptor said it is. Where the document says something itself it must be
/// the same kind: else one digest could be a manifest to one client and an index to another (CVE-2021-41190).
pub(crate) fn parse(bytes: &[u8], media_type: Option<&str>) -> Result<(Manifest, String), Flaw> {
    let raw: RawManifest = serde_json::from_slice(bytes).map_err(|e| Flaw::Json(e.to_string()))?;
    if raw.schema_version != 2 {
        return Err(Flaw::Field("schemaVersion", format!("{}, only 2 is taken", raw.schema_version)));
    }
    let known = |t: &str| matches!(t, OCI_INDEX | OCI_MANIFEST | DOCKER_LIST | DOCKER_MANIFEST);
    let said = media_type.map(|t| t.split(';').next().unwrap_or(t).trim().to_owned()).filter(|t| known(t));
    let inner = match raw.media_type {
        Some(inner) if !known(&inner) => return Err(Flaw::MediaType(inner.chars().take(100).collect())),
        other => other,
    };
    let is_index = |t: &str| matches!(t, OCI_INDEX | DOCKER_LIST);
    if let (Some(said), Some(inner)) = (&said, &inner)
        && is_index(said) != is_index(inner)
    {
        return Err(Flaw::Field("mediaType", format!("{inner}, but it was served as {said}")));
    }
    match (raw.config, raw.layers, raw.manifests) {
        (Some(_), _, Some(_)) | (_, Some(_), Some(_)) => {
            Err(Flaw::Field("manifests", "it has both manifests and layers".to_owned()))
        }
        (None, None, Some(entries)) => {
            if entries.len() > MAX_ENTRIES {
                return Err(Flaw::Field(
                    "manifests",
                    format!("{} entries, at most {MAX_ENTRIES} are taken", entries.len()),
                ));
            }
            let media_type = inner.or(said).unwrap_or_else(|| OCI_INDEX.to_owned());
            if !is_index(&media_type) {
                return Err(Flaw::Field("mediaType", format!("{media_type}, but it is an index")));
            }
            let entries = entries.into_iter().filter_map(entry).collect();
            Ok((Manifest::Index(entries), media_type))
        }
        (Some(config), Some(layers), None) => {
            let media_type = inner.or(said).unwrap_or_else(|| OCI_MANIFEST.to_owned());
            if is_index(&media_type) {
                return Err(Flaw::Field("mediaType", format!("{media_type}, but it is no index")));
            }
            if layers.is_empty() || layers.len() > MAX_LAYERS {
                return Err(Flaw::Field("layers", format!("{} layers, 1 to {MAX_LAYERS} are taken", layers.len())));
            }
            let config = descriptor(config, "config")?;
            let layers = layers.into_iter().map(layer).collect::<Result<_, _>>()?;
            Ok((Manifest::Image(ImageManifest { config, layers }), media_type))
        }
        _ => Err(Flaw::Field("layers", "it has neither config and layers nor manifests".to_owned())),
    }
}

fn descriptor(raw: RawDescriptor, field: &'static str) -> Result<Descriptor, Flaw> {
    let digest =
        Digest::parse(&raw.digest).ok_or_else(|| Flaw::Field(field, "its digest is no sha256 digest".to_owned()))?;
    let size = u64::try_from(raw.size).map_err(|_| Flaw::Field(field, format!("its size is {}", raw.size)))?;
    Ok(Descriptor { media_type: raw.media_type, digest, size })
}

/// An entry that can't be read is as good as none: indexes hold signatures, attestations and things not yet thought of.
fn entry(raw: RawDescriptor) -> Option<Entry> {
    let platform = raw.platform.as_ref().map(|p| Platform::new(&p.os, &p.architecture, &p.variant));
    let known = matches!(raw.media_type.as_str(), OCI_INDEX | OCI_MANIFEST | DOCKER_LIST | DOCKER_MANIFEST);
    let descriptor = descriptor(raw, "manifests").ok().filter(|_| known)?;
    Some(Entry { descriptor, platform })
}

/// A layer's media type in the words that containerd's differ knows: Docker's gzip and zstd become OCI's. Foreign layers
/// (to be fetched from elsewhere) and encrypted ones are refused.
fn layer(raw: RawDescriptor) -> Result<Descriptor, Flaw> {
    let media_type = match raw.media_type.as_str() {
        OCI_LAYER => OCI_LAYER.to_owned(),
        // Docker's plain type is used for compressed ones too; containerd looks at the bytes for this one alone.
        DOCKER_LAYER => DOCKER_LAYER.to_owned(),
        "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            format!("{OCI_LAYER}+gzip")
        }
        "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            format!("{OCI_LAYER}+zstd")
        }
        other => return Err(Flaw::MediaType(other.chars().take(100).collect())),
    };
    let mut layer = descriptor(raw, "layers")?;
    layer.media_type = media_type;
    Ok(layer)
}

/// The entry of an index for this machine: the best suited, the first among equals. An entry that names no platform is
/// taken only where no other fits; its config then has to say. `Err` names what is offered.
pub(crate) fn choose<'a>(entries: &'a [Entry], host: &Platform) -> Result<&'a Descriptor, String> {
    choose_with(entries, host, &processor_runs)
}

fn choose_with<'a>(
    entries: &'a [Entry],
    host: &Platform,
    runs: &dyn Fn(&str) -> bool,
) -> Result<&'a Descriptor, String> {
    let rank = |entry: &Entry| match &entry.platform {
        Some(platform) => host.suits(platform, runs),
        None => Some(u32::MAX),
    };
    // `min_by_key` keeps the first of equals.
    let best = entries.iter().filter_map(|e| rank(e).map(|r| (r, e))).min_by_key(|(r, _)| *r);
    best.map(|(_, e)| &e.descriptor).ok_or_else(|| {
        let mut offered: Vec<String> =
            entries.iter().filter_map(|e| e.platform.as_ref()).map(|p| p.to_string()).collect();
        offered.dedup();
        offered.truncate(20);
        if offered.is_empty() { "nothing".to_owned() } else { offered.join(", ") }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn digest(n: u8) -> String {
        Digest::of(&[n]).to_string()
    }

    fn image() -> Value {
        json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(0), "size": 2},
            "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest(1), "size": 3}],
        })
    }

    fn index(platforms: &[(&str, &str, &str)]) -> Value {
        let entries: Vec<Value> = platforms
            .iter()
            .enumerate()
            .map(|(i, (os, arch, variant))| {
                let mut entry = json!({"mediaType": OCI_MANIFEST, "digest": digest(i as u8), "size": 1});
                if !os.is_empty() {
                    entry["platform"] = json!({"os": os, "architecture": arch, "variant": variant});
                }
                entry
            })
            .collect();
        json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries})
    }

    #[test]
    fn an_image_of_either_kind_is_read() {
        for (manifest, layer, unpacked) in [
            (OCI_MANIFEST, "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar"),
            (
                OCI_MANIFEST,
                "application/vnd.oci.image.layer.v1.tar+zstd",
                "application/vnd.oci.image.layer.v1.tar+zstd",
            ),
            (
                DOCKER_MANIFEST,
                "application/vnd.docker.image.rootfs.diff.tar.gzip",
                "application/vnd.oci.image.layer.v1.tar+gzip",
            ),
            (
                DOCKER_MANIFEST,
                "application/vnd.docker.image.rootfs.diff.tar.zstd",
                "application/vnd.oci.image.layer.v1.tar+zstd",
            ),
            (DOCKER_MANIFEST, DOCKER_LAYER, DOCKER_LAYER),
        ] {
            let mut value = image();
            value["mediaType"] = json!(manifest);
            value["layers"][0]["mediaType"] = json!(layer);
            match parse(value.to_string().as_bytes(), None).unwrap() {
                (Manifest::Image(image), media_type) => {
                    assert_eq!(media_type, manifest);
                    assert_eq!(image.layers[0].media_type, unpacked);
                    assert_eq!((image.config.size, image.layers[0].size), (2, 3));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        type Edit = fn(&mut Value);
        let edits: [(&str, Edit); 13] = [
            ("schema 1", |v| v["schemaVersion"] = json!(1)),
            ("no layers", |v| v["layers"] = json!([])),
            ("no config", |v| drop(v.as_object_mut().unwrap().remove("config"))),
            ("too many layers", |v| v["layers"] = json!(vec![v["layers"][0].clone(); MAX_LAYERS + 1])),
            ("a foreign layer", |v| {
                v["layers"][0]["mediaType"] = json!("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip")
            }),
            ("an encrypted layer", |v| {
                v["layers"][0]["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar+gzip+encrypted")
            }),
            ("no layer's type", |v| v["layers"][0]["mediaType"] = json!("")),
            ("a wrong digest", |v| v["layers"][0]["digest"] = json!("sha256:../../x")),
            ("another algorithm", |v| v["config"]["digest"] = json!(format!("sha512:{}", "0".repeat(128)))),
            ("a negative size", |v| v["layers"][0]["size"] = json!(-1)),
            ("an artifact", |v| v["mediaType"] = json!("application/vnd.example+json")),
            ("an index by its word", |v| v["mediaType"] = json!(OCI_INDEX)),
            ("both at once", |v| v["manifests"] = json!([])),
        ];
        assert!(parse(image().to_string().as_bytes(), None).is_ok());
        for (name, edit) in edits {
            let mut value = image();
            edit(&mut value);
            assert!(parse(value.to_string().as_bytes(), None).is_err(), "{name} was taken");
        }
        assert!(parse(image().to_string().as_bytes(), Some(OCI_INDEX)).is_err(), "served as an index");
        assert!(parse(b"<html>", Some("text/html")).is_err());
        assert!(parse("[".repeat(100_000).as_bytes(), None).is_err(), "deeply nested");
    }

    #[test]
    fn an_index_gives_this_machines_entry() {
        let amd64 = Platform::new("linux", "amd64", "");
        let arm64 = Platform::new("linux", "arm64", "");
        let arm = Platform::new("linux", "arm", "");
        for (platforms, host, chosen) in [
            (&[("linux", "arm64", "v8"), ("linux", "amd64", "")][..], &amd64, Some(1)),
            (&[("linux", "arm64", "v8"), ("linux", "amd64", "")], &arm64, Some(0)),
            (&[("windows", "amd64", ""), ("unknown", "unknown", "")], &amd64, None),
            (&[("linux", "amd64", "v3"), ("linux", "amd64", "v1")], &amd64, Some(1)),
            (&[("linux", "amd64", "v3"), ("linux", "amd64", "v2")], &amd64, Some(1)),
            (&[("linux", "amd64", "v4")], &amd64, None),
            (&[("linux", "x86_64", "")], &amd64, Some(0)),
            (&[("linux", "arm", "v5"), ("linux", "arm", "v7"), ("linux", "arm", "v6")], &arm, Some(1)),
            (&[("linux", "arm", "v5"), ("linux", "arm", "v6")], &arm, Some(1)),
            (&[("linux", "arm", "v8")], &arm, None),
            (&[("", "", ""), ("linux", "amd64", "")], &amd64, Some(1)),
            (&[("linux", "arm64", ""), ("", "", "")], &amd64, Some(1)),
            (&[("linux", "amd64", ""), ("linux", "amd64", "")], &amd64, Some(0)),
            (&[], &amd64, None),
        ] {
            let (Manifest::Index(entries), _) = parse(index(platforms).to_string().as_bytes(), None).unwrap() else {
                panic!("not an index")
            };
            let got = choose_with(&entries, host, &|variant| variant == "v2").map(|d| d.digest.to_string()).ok();
            assert_eq!(got, chosen.map(digest), "{platforms:?} on {host}");
        }
    }

    #[test]
    fn a_refusal_names_what_is_offered() {
        let (Manifest::Index(entries), _) =
            parse(index(&[("linux", "s390x", ""), ("linux", "arm", "v6")]).to_string().as_bytes(), None).unwrap()
        else {
            panic!("not an index")
        };
        let refusal = choose(&entries, &Platform::new("linux", "amd64", "")).unwrap_err();
        assert_eq!(refusal, "linux/s390x, linux/arm/v6");
    }
}
