use serde_json::Value;

use super::*;

fn bot(name: &str, status: Value) -> (Arc<BotContainer>, Arc<Tail>) {
    let body = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer",
        "metadata": {"name": name, "namespace": "team-a", "uid": uid(1), "resourceVersion": "7", "generation": 2,
            "creationTimestamp": "2026-11-24T09:00:00Z",
            "managedFields": [{"time": "2026-11-24T10:00:00Z"}, {"time": "2026-11-24T12:00:00Z"}]},
        "spec": {"image": "node:22", "botId": "web"}, "status": status});
    let bot: BotContainer = serde_json::from_value(body).unwrap();
    let tail = Tail::of(&bot);
    (Arc::new(bot), Arc::new(tail))
}

fn uid(n: u128) -> String {
    Uuid::from_u128(n).to_string()
}

fn snapshot(n: u128, version: i64, status: Value) -> Arc<BotSnapshot> {
    let mut all = json!({"phase": "Ready", "version": version, "botId": "web", "runtimeName": format!("berth-v-{n}"),
        "snapshotter": "overlayfs", "takenAt": "2026-11-24T11:00:00Z", "source": "Manual"});
    for (key, value) in status.as_object().unwrap() {
        all[key] = value.clone();
    }
    let body = json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotSnapshot",
        "metadata": {"name": format!("s{n}"), "namespace": "team-a", "uid": uid(n), "creationTimestamp": "2026-11-24T10:30:00Z"},
        "spec": {"botContainerName": "web"}, "status": all});
    Arc::new(serde_json::from_value(body).unwrap())
}

fn name() -> Name {
    Name { namespace: "team-a".into(), name: "web".into() }
}

fn rows(container: Option<(Arc<BotContainer>, Arc<Tail>)>, snapshots: Vec<Arc<BotSnapshot>>) -> Option<Rows> {
    Rows::of(&name(), &Bot { container, alive: Vec::new(), snapshots })
}

#[test]
fn the_status_of_each_phase_is_that_of_the_documents_table() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/mirror.md");
    let text = std::fs::read_to_string(path).unwrap();
    let table = text.split("| `phase` | `status` |").nth(1).unwrap();
    let mut told = 0;
    for line in table.lines().skip(2).take_while(|line| line.starts_with('|')) {
        let mut cells = line.trim_matches('|').split('|').map(str::trim);
        let (phases, wanted) = (cells.next().unwrap(), cells.next().unwrap().trim_matches('`'));
        for phase in phases.split(", ") {
            let phase: Phase = serde_json::from_value(json!(phase)).unwrap();
            assert_eq!(status(phase), wanted, "{phase:?}");
            told += 1;
        }
    }
    assert_eq!(told, 11, "all phases are in the table");
}

#[test]
fn a_bot_that_was_only_applied_has_a_row() {
    let rows = rows(Some(bot("web", json!({}))), vec![]).unwrap();
    let row = serde_json::to_value(&rows.container).unwrap();
    assert_eq!(
        (&row["status"], &row["phase"], &row["auto_start"]),
        (&json!("created"), &json!("Pending"), &json!(true))
    );
    assert_eq!(row["updated_at"], json!("2026-11-24T12:00:00Z"), "the newest of its managed fields");
    assert_eq!((rows.container.last_seq, rows.events.len()), (0, 0));
}

#[test]
fn nothing_has_no_row_and_what_is_not_ready_is_nothing() {
    assert_eq!(rows(None, vec![]), None);
    for phase in ["Pending", "Copying", "Frozen", "Committing", "Failed", "Deleting"] {
        assert_eq!(rows(None, vec![snapshot(5, 1, json!({"phase": phase}))]), None, "{phase}");
    }
}

#[test]
fn of_a_bot_that_is_gone_its_versions_tell() {
    let newest =
        json!({"image": {"reference": "node:23", "digest": "sha256:1"}, "nodeName": "node-1", "source": "Preserved"});
    let kept = rows(None, vec![snapshot(6, 2, newest), snapshot(5, 1, json!({}))]).unwrap();
    let row = serde_json::to_value(&kept.container).unwrap();
    for (column, wanted) in [
        ("status", json!("stopped")),
        ("image", json!("node:23")),
        ("container_name", json!("web")),
        ("object_uid", json!(null)),
        ("last_version", json!(2)),
        ("created_at", json!("2026-11-24T10:30:00Z")),
        ("snapshot_count", json!(2)),
    ] {
        assert_eq!(row[column], wanted, "{column}");
    }
    assert_eq!(kept.versions.iter().map(|v| v.version).collect::<Vec<_>>(), [1, 2]);
    let told: Vec<_> = kept.snapshot_events.iter().map(|e| (e.event_type.as_str(), e.seq)).collect();
    assert_eq!(told, [("snapshot_create", 1), ("snapshot_create", 1), ("preserved", 2)]);
    // The same bot, while it lives: the same identity, whatever its object is called.
    let living = rows(Some(bot("other", json!({}))), vec![]).unwrap();
    let living = serde_json::to_value(&living.container).unwrap();
    for column in ["id", "bot_id", "container_id"] {
        assert_eq!(row[column], living[column], "{column}");
    }
}

#[test]
fn a_uuid_is_taken_as_it_is_and_another_bot_id_has_one_of_its_own_in_each_namespace() {
    let of = |namespace: &str, name: &str| {
        let name = Name { namespace: namespace.into(), name: name.into() };
        let bot = Bot { container: Some(bot("web", json!({}))), ..Bot::default() };
        Rows::of(&name, &bot).unwrap().container.bot_id
    };
    assert_eq!(of("a", &uid(9)), Uuid::from_u128(9));
    assert_eq!(of("a", "web"), of("a", "web"));
    assert_ne!(of("a", "web"), of("b", "web"));
}

/// The order in which the world's indexes give things is nobody's.
#[test]
fn rows_do_not_depend_on_the_order_of_the_objects() {
    let all = [snapshot(5, 1, json!({})), snapshot(6, 2, json!({})), snapshot(7, 3, json!({}))];
    let status = json!({"transitions": [{"seq": 2, "type": "started", "at": "2026-11-24T10:00:01Z"},
        {"seq": 1, "type": "created", "at": "2026-11-24T10:00:00Z"}]});
    let one = rows(Some(bot("web", status.clone())), all.to_vec()).unwrap();
    let other = rows(Some(bot("web", status)), all.iter().rev().cloned().collect()).unwrap();
    assert_eq!(one, other);
    assert_eq!(one.events.iter().map(|e| e.seq).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn each_change_that_a_reader_could_see_changes_the_hash() {
    let status = |text: &str| {
        json!({"conditions": [{"type": "Ready", "status": "True", "reason": "AsAsked", "message": text,
        "lastTransitionTime": "2026-11-24T10:00:00Z"}]})
    };
    let base = rows(Some(bot("web", status("a"))), vec![snapshot(5, 1, json!({}))]).unwrap().container;
    let same = rows(Some(bot("web", status("a"))), vec![snapshot(5, 1, json!({}))]).unwrap().container;
    assert_eq!((base.hash, base.children_hash), (same.hash, same.children_hash));
    let other_text = rows(Some(bot("web", status("b"))), vec![snapshot(5, 1, json!({}))]).unwrap().container;
    assert_ne!(base.hash, other_text.hash);
    assert_eq!(base.children_hash, other_text.children_hash, "its versions need not be written");
    let other_version =
        rows(Some(bot("web", status("a"))), vec![snapshot(5, 1, json!({"sizeBytes": 1}))]).unwrap().container;
    assert_ne!(base.hash, other_version.hash);
    assert_ne!(base.children_hash, other_version.children_hash);
}

#[test]
fn an_event_is_known_by_what_it_says_not_by_its_number_alone() {
    let at = |text: &str| text.parse::<Timestamp>().unwrap();
    let moment = |type_: &'static str, time: &str| Moment {
        seq: 5,
        type_: Cow::Borrowed(type_),
        at: at(time),
        exit_code: None,
        version: None,
        message: None,
    };
    let id = |moment: Moment| EventRow::told("team-a.web", Uuid::from_u128(1), &[moment])[0].id;
    let one = id(moment("started", "2026-11-24T10:00:00Z"));
    assert_eq!(one, id(moment("started", "2026-11-24T10:00:00Z")));
    assert_ne!(one, id(moment("stopped", "2026-11-24T10:00:00Z")));
    assert_ne!(one, id(moment("started", "2026-11-24T10:00:01Z")));
}

#[test]
fn json_has_no_nul_and_is_else_what_it_was() {
    let text = "a\0b\\u0000 \"c\" 🚀";
    let back: Value = serde_json::from_str(&to_json(&json!({"x": [text]}))).unwrap();
    assert_eq!(back["x"][0], json!("a\u{fffd}b\\u0000 \"c\" 🚀"));
    assert_eq!(to_json(&json!(["plain"])), "[\"plain\"]");
}
