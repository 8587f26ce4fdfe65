//! What a bot's layer stands on, and its versions, as people read them. Pure: objects -> text.

use std::collections::{BTreeMap, BTreeSet};

use berth::api::bot_snapshot::SnapshotPhase;
use berth::api::{BotContainer, BotSnapshot, BotSnapshotStatus};
use jiff::Timestamp;

/// One layer or version, with the facts that people ask for.
struct Fact {
    parent: Option<String>,
    kind: String,
    created: Option<Timestamp>,
    words: String,
}

/// The lineage of a bot with its versions, as a tree: what stands on what, the lowest layer first; what stands on the same is
/// sorted by time, then name.
pub fn lineage(bot: &BotContainer, snapshots: &[BotSnapshot]) -> String {
    let name = bot.metadata.name.as_deref().unwrap_or("?");
    let Some(status) = bot.status.as_ref().filter(|status| !status.lineage.is_empty()) else {
        return format!("{name} has no layer yet\n");
    };
    let bot_id = status.bot_id.as_deref().unwrap_or_default();
    let mut facts: BTreeMap<String, Fact> = BTreeMap::new();
    for entry in &status.lineage {
        let words = match (entry.kind.as_str(), entry.version) {
            ("Active", Some(version)) => format!("the bot's layer, made from version {version}"),
            ("Active", None) => "the bot's layer".to_owned(),
            (_, Some(version)) => format!("version {version}"),
            (_, None) => "image layer".to_owned(),
        };
        let created = entry.created_at.as_ref().map(|at| at.0);
        let fact = Fact { parent: entry.parent.clone(), kind: entry.kind.clone(), created, words };
        facts.insert(entry.name.clone(), fact);
    }
    let mut unmade = Vec::new();
    for snapshot in snapshots {
        let none = BotSnapshotStatus::default();
        let status = snapshot.status.as_ref().unwrap_or(&none);
        let layer = status.runtime_name.as_ref();
        // Of this bot, or what it is a fork of.
        let its_own = status.bot_id.as_deref() == Some(bot_id);
        if !its_own && layer.is_none_or(|layer| !facts.contains_key(layer)) {
            continue;
        }
        let words = describe(snapshot, status);
        match (layer, &status.parent) {
            (Some(layer), Some(parent)) => {
                let created = status.taken_at.as_ref().map(|at| at.0);
                let fact = Fact { parent: Some(parent.clone()), kind: "Committed".to_owned(), created, words };
                facts.insert(layer.clone(), fact);
            }
            _ => unmade.push((status.version, words)),
        }
    }
    let mut text = format!("{name}, bot {bot_id}\n");
    let known: BTreeSet<&String> = facts.keys().collect();
    let is_root = |fact: &Fact| fact.parent.as_ref().is_none_or(|parent| !known.contains(parent));
    let mut todo: Vec<(usize, &String)> = sorted(&facts, |_, fact| is_root(fact)).into_iter().map(|n| (0, n)).collect();
    todo.reverse();
    while let Some((depth, layer)) = todo.pop() {
        let Some(fact) = facts.get(layer) else { continue };
        let created = fact.created.map_or_else(|| "-".to_owned(), |at| at.to_string());
        let indent = if depth == 0 { String::new() } else { format!("{}└─ ", "   ".repeat(depth - 1)) };
        text.push_str(&format!("{indent}{}  {}  {created}  {}\n", shortened(layer), fact.kind, fact.words));
        let mut above = sorted(&facts, |_, fact| fact.parent.as_ref() == Some(layer));
        above.reverse();
        todo.extend(above.into_iter().map(|above| (depth + 1, above)));
    }
    unmade.sort();
    for (_, words) in unmade {
        text.push_str(&format!("not on a disk: {words}\n"));
    }
    text
}

fn sorted(facts: &BTreeMap<String, Fact>, wanted: impl Fn(&String, &Fact) -> bool) -> Vec<&String> {
    let mut found: Vec<_> = facts.iter().filter(|(name, fact)| wanted(name, fact)).collect();
    found.sort_by_key(|(name, fact)| (fact.created, *name));
    found.into_iter().map(|(name, _)| name).collect()
}

/// A version in words.
fn describe(snapshot: &BotSnapshot, status: &BotSnapshotStatus) -> String {
    let number = status.version.map_or_else(|| "no version yet".to_owned(), |version| format!("version {version}"));
    let shown = shown(snapshot, status);
    let source = status.source.map_or_else(String::new, |source| format!(", {source:?}"));
    let phase = status.phase.unwrap_or_default();
    let size = status.size_bytes.map_or_else(String::new, |size| format!(", {}", bytes(size)));
    let name = snapshot.metadata.name.as_deref().unwrap_or("?");
    format!("{number} \"{shown}\" (BotSnapshot {name}{source}, {phase:?}{size})")
}

/// What people call it.
fn shown(snapshot: &BotSnapshot, status: &BotSnapshotStatus) -> String {
    let numbered = || status.version.map_or_else(|| "?".to_owned(), |version| format!("Version {version}"));
    snapshot.spec.display_name.clone().unwrap_or_else(numbered)
}

/// Digests are long, and their first digits tell them apart.
fn shortened(name: &str) -> String {
    match name.strip_prefix("sha256:") {
        Some(digest) => format!("sha256:{}", digest.chars().take(12).collect::<String>()),
        None => name.to_owned(),
    }
}

/// A size as people read it.
fn bytes(size: i64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut size, mut unit) = (size as f64, 0);
    while size >= 1024.0 && unit + 1 < UNITS.len() {
        size /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{size} B") } else { format!("{size:.1} {}", UNITS.get(unit).copied().unwrap_or("TiB")) }
}

/// The snapshots of a namespace, what they cost on disk, and who holds the bytes of what was deleted.
pub fn table(snapshots: &[BotSnapshot], bots: &[BotContainer]) -> String {
    let mut rows: Vec<Vec<String>> = vec![
        ["NAME", "BOT", "VERSION", "SOURCE", "PHASE", "TAKEN", "FROZEN", "SIZE", "EXPORTED", "FILES", "CHANGES"]
            .map(str::to_owned)
            .to_vec(),
    ];
    let mut sorted: Vec<(&BotSnapshot, BotSnapshotStatus)> =
        snapshots.iter().map(|snapshot| (snapshot, snapshot.status.clone().unwrap_or_default())).collect();
    sorted.sort_by(|(a, sa), (b, sb)| {
        let key = |snapshot: &BotSnapshot, status: &BotSnapshotStatus| {
            let version = status.version.unwrap_or(i64::MAX);
            (snapshot.spec.bot_container_name.clone(), version, snapshot.metadata.name.clone())
        };
        key(a, sa).cmp(&key(b, sb))
    });
    for (snapshot, status) in &sorted {
        let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let changes = status.changes.as_ref().map(|c| format!("+{} ~{} -{}", c.added, c.modified, c.removed));
        rows.push(vec![
            snapshot.metadata.name.clone().unwrap_or_default(),
            snapshot.spec.bot_container_name.clone(),
            or_dash(status.version.map(|version| version.to_string())),
            or_dash(status.source.map(|source| format!("{source:?}"))),
            format!("{:?}", status.phase.unwrap_or_default()),
            or_dash(status.taken_at.as_ref().map(|at| at.0.to_string())),
            or_dash(status.frozen_millis.map(|millis| format!("{millis} ms"))),
            or_dash(status.size_bytes.map(bytes)),
            or_dash(status.export_bytes.map(bytes)),
            or_dash(status.files.map(|files| files.to_string())),
            or_dash(changes),
        ]);
    }
    let mut text = aligned(&rows);
    let whole = sorted.iter().filter(|(_, status)| status.phase == Some(SnapshotPhase::Ready));
    let (count, size) = whole.fold((0, 0_i64), |(count, size), (_, status)| {
        (count + 1, size.saturating_add(status.size_bytes.unwrap_or(0)))
    });
    // The same contents are one blob, however many versions were exported as it.
    let images: BTreeMap<&str, i64> =
        sorted.iter().filter_map(|(_, status)| Some((status.digest.as_deref()?, status.export_bytes?))).collect();
    let exported = match images.values().fold(0_i64, |sum, size| sum.saturating_add(*size)) {
        0 => String::new(),
        size => format!(", {} more as OCI images", bytes(size)),
    };
    let size = bytes(size);
    text.push_str(&format!("{count} on disk, {size} in all{exported}; what forks share with them is counted once\n"));
    // A version that a bot stands on and that has no object: its bytes go with the last of these.
    let named: BTreeSet<&str> = sorted.iter().filter_map(|(_, status)| status.runtime_name.as_deref()).collect();
    let mut held: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for bot in bots {
        for entry in bot.status.iter().flat_map(|status| &status.lineage) {
            if entry.kind == "Committed" && entry.version.is_some() && !named.contains(entry.name.as_str()) {
                held.entry(&entry.name).or_default().push(bot.metadata.name.as_deref().unwrap_or("?"));
            }
        }
    }
    for (version, bots) in held {
        text.push_str(&format!("deleted, but its bytes are held by its forks: {version}, by {}\n", bots.join(", ")));
    }
    text
}

/// Columns as wide as their widest cell.
pub fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|c| c.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("   ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn web() -> BotContainer {
        serde_json::from_value(json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
            "metadata": {"name": "web"}, "spec": {"image": "nginx"},
            "status": {"botId": "the-bot", "lineage": [
                {"name": "sha256:1111111111111111", "kind": "Committed", "createdAt": "2026-11-24T08:00:00Z"},
                {"name": "sha256:2222222222222222", "parent": "sha256:1111111111111111", "kind": "Committed", "createdAt": "2026-11-24T08:00:01Z"},
                {"name": "berth-u.2", "parent": "sha256:2222222222222222", "kind": "Active", "version": 1, "createdAt": "2026-11-24T12:00:00Z"},
            ]},
        }))
        .unwrap()
    }

    fn snapshot(name: &str, display: Option<&str>, status: serde_json::Value) -> BotSnapshot {
        serde_json::from_value(json!({
            "apiVersion": "berth.dev/v1alpha1", "kind": "BotSnapshot", "metadata": {"name": name},
            "spec": {"botContainerName": "web", "displayName": display}, "status": status,
        }))
        .unwrap()
    }

    fn snapshots() -> Vec<BotSnapshot> {
        let on_image = |version: i64, more: serde_json::Value| {
            let mut status = json!({"botId": "the-bot", "version": version, "phase": "Ready", "source": "Manual",
                "runtimeName": format!("berth-v-{version}"), "parent": "sha256:2222222222222222",
                "takenAt": format!("2026-11-24T1{version}:00:00Z"), "sizeBytes": 3 << 19, "files": 7, "frozenMillis": 12});
            status.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            status
        };
        vec![
            snapshot(
                "second",
                None,
                on_image(
                    2,
                    json!({"source": "Rollback", "digest": "sha256:1", "exportBytes": 2048, "changes": {"added": 1, "modified": 2, "removed": 3, "bytes": 9}}),
                ),
            ),
            snapshot(
                "first",
                Some("before the upgrade"),
                on_image(1, json!({"digest": "sha256:1", "exportBytes": 2048})),
            ),
            snapshot(
                "third",
                None,
                json!({"botId": "the-bot", "version": 3, "phase": "Failed", "source": "Scheduled"}),
            ),
            snapshot(
                "of-another",
                None,
                json!({"botId": "another", "version": 1, "phase": "Ready", "runtimeName": "berth-v-x", "parent": "sha256:9"}),
            ),
        ]
    }

    #[test]
    fn a_lineage_is_a_tree_that_people_can_read() {
        assert_eq!(
            lineage(&web(), &snapshots()),
            "\
web, bot the-bot
sha256:111111111111  Committed  2026-11-24T08:00:00Z  image layer
└─ sha256:222222222222  Committed  2026-11-24T08:00:01Z  image layer
   └─ berth-v-1  Committed  2026-11-24T11:00:00Z  version 1 \"before the upgrade\" (BotSnapshot first, Manual, Ready, 1.5 MiB)
   └─ berth-u.2  Active  2026-11-24T12:00:00Z  the bot's layer, made from version 1
   └─ berth-v-2  Committed  2026-11-24T12:00:00Z  version 2 \"Version 2\" (BotSnapshot second, Rollback, Ready, 1.5 MiB)
not on a disk: version 3 \"Version 3\" (BotSnapshot third, Scheduled, Failed)
"
        );
        let bare = BotContainer { status: None, ..web() };
        assert_eq!(lineage(&bare, &snapshots()), "web has no layer yet\n");
    }

    #[test]
    fn a_table_tells_what_versions_cost_and_who_holds_what_was_deleted() {
        let mut fork = web();
        fork.metadata.name = Some("fork".to_owned());
        let lineage = &mut fork.status.as_mut().unwrap().lineage;
        lineage[1].name = "berth-v-gone".to_owned();
        lineage[1].version = Some(4);
        assert_eq!(
            table(&snapshots()[..3], &[web(), fork]),
            "\
NAME     BOT   VERSION   SOURCE      PHASE    TAKEN                  FROZEN   SIZE      EXPORTED   FILES   CHANGES
first    web   1         Manual      Ready    2026-11-24T11:00:00Z   12 ms    1.5 MiB   2.0 KiB    7       -
second   web   2         Rollback    Ready    2026-11-24T12:00:00Z   12 ms    1.5 MiB   2.0 KiB    7       +1 ~2 -3
third    web   3         Scheduled   Failed   -                      -        -         -          -       -
2 on disk, 3.0 MiB in all, 2.0 KiB more as OCI images; what forks share with them is counted once
deleted, but its bytes are held by its forks: berth-v-gone, by fork
"
        );
    }

    #[test]
    fn sizes_are_read_by_people() {
        for (size, words) in
            [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 << 30, "5.0 GiB"), (i64::MAX, "8388608.0 TiB")]
        {
            assert_eq!(bytes(size), words);
        }
    }
}
