//! What the API refuses, and in which words: every rule of `berth::api::rule`, both ways, and every bound of
//! `berth::api::bound` at its edge, on a real API server.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "this is how a test fails")]

mod admit;
#[path = "admit/cases.rs"]
mod cases;

use std::collections::BTreeMap;

use admit::{Cause, causes, cluster, overlay};
use berth::api::bound::{BOUNDS, Limit, Merge, TIME_LENGTH};
use berth::api::rule::{Kind, rules};
use berth::api::{BotContainer, BotNode, BotRecord, BotSnapshot};
use cases::{Case, cases};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool,
};
use kube::api::{Api, DeleteParams, DynamicObject, PostParams};
use serde_json::{Value, json};

/// Nothing is kept: the API server does all but store it.
fn dry() -> PostParams {
    PostParams { dry_run: true, ..PostParams::default() }
}

fn object(value: Value) -> DynamicObject {
    serde_json::from_value(value).unwrap()
}

/// What the API takes our own types must be able to read: one object that can't be read stops every watch of its kind.
fn readable(kind: Kind, object: &DynamicObject) -> Result<(), String> {
    let value = serde_json::to_value(object).unwrap();
    let read = match kind {
        Kind::BotContainer => serde_json::from_value::<BotContainer>(value).map(|_| ()),
        Kind::BotSnapshot => serde_json::from_value::<BotSnapshot>(value).map(|_| ()),
        Kind::BotRecord => serde_json::from_value::<BotRecord>(value).map(|_| ()),
        Kind::BotNode => serde_json::from_value::<BotNode>(value).map(|_| ()),
    };
    read.map_err(|error| format!("accepted, but Berth can't read it: {error}"))
}

/// Creates an object with its status, as the stored one that a change starts from.
async fn store(api: &Api<DynamicObject>, value: &Value) -> DynamicObject {
    let made = api.create(&PostParams::default(), &object(value.clone())).await;
    let made = made.unwrap_or_else(|e| panic!("can't store {value}: {e}"));
    if value.get("status").is_none() {
        return made;
    }
    let mut with_status = serde_json::to_value(&made).unwrap();
    with_status["status"] = value["status"].clone();
    let name = made.metadata.name.as_deref().unwrap();
    let made = api.replace_status(name, &PostParams::default(), &object(with_status)).await;
    made.unwrap_or_else(|e| panic!("can't store the status of {value}: {e}"))
}

/// Sends one value as the case wants it: created, or as a change of what is stored, of spec or status.
async fn send(
    api: &Api<DynamicObject>,
    stored: Option<&DynamicObject>,
    value: &Value,
) -> Result<DynamicObject, kube::Error> {
    let Some(stored) = stored else { return api.create(&dry(), &object(value.clone())).await };
    let mut next = serde_json::to_value(stored).unwrap();
    overlay(&mut next, value);
    let name = stored.metadata.name.as_deref().unwrap();
    if value.get("status").is_some() {
        api.replace_status(name, &dry(), &object(next)).await
    } else {
        api.replace(name, &dry(), &object(next)).await
    }
}

async fn try_case(number: usize, case: &Case) -> Vec<String> {
    let api = cluster().objects(&format!("{:?}", case.kind)).await;
    let mut wrong = Vec::new();
    let base = |value: &Value| {
        let mut whole = case.base(number);
        overlay(&mut whole, value);
        whole
    };
    let stored = match &case.before {
        Some(before) => Some(store(&api, &base(before)).await),
        None => None,
    };
    let prepared = |value: &Value| if stored.is_some() { value.clone() } else { base(value) };
    for good in &case.good {
        match send(&api, stored.as_ref(), &prepared(good)).await {
            Ok(taken) => wrong.extend(readable(case.kind, &taken).err().map(|e| format!("{}: {good}: {e}", case.rule))),
            Err(error) => wrong.push(format!("{}: {good} must be accepted, and: {error}", case.rule)),
        }
    }
    for bad in &case.bad {
        let answer = send(&api, stored.as_ref(), &prepared(&bad.value)).await;
        let told = match answer {
            Ok(_) => {
                wrong.push(format!("{}: {} must be refused", case.rule, bad.value));
                continue;
            }
            answer => causes(case.rule, answer),
        };
        let hit = |c: &Cause| c.field == bad.field && c.message.contains(bad.words);
        if !matches!(&told[..], [only] if hit(only)) {
            let (value, field, words) = (&bad.value, bad.field, bad.words);
            wrong.push(format!("{}: {value}: wanted {field}: …{words}…, and was told {told:#?}", case.rule));
        }
    }
    if let Some(stored) = stored {
        let _ = api.delete(stored.metadata.name.as_deref().unwrap(), &DeleteParams::default()).await;
    }
    wrong
}

#[tokio::test]
async fn every_case_holds() {
    let mut wrong = Vec::new();
    for (number, case) in cases().iter().enumerate() {
        wrong.extend(try_case(number, case).await);
    }
    assert!(wrong.is_empty(), "{} of the cases do not hold:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn every_rule_is_tried_both_ways_and_every_case_is_for_a_rule() {
    let cases = cases();
    for rule in rules() {
        let of_rule = || cases.iter().filter(|c| c.rule == rule.name && c.kind == rule.kind);
        assert!(of_rule().any(|c| !c.good.is_empty()), "nothing tells what {} accepts", rule.name);
        assert!(of_rule().any(|c| !c.bad.is_empty()), "nothing tells what {} refuses", rule.name);
    }
    for case in &cases {
        assert!(rules().iter().any(|r| r.name == case.rule), "there is no rule {}", case.rule);
    }
}

/// Words that any refusal could have had prove nothing: a case asks for words of its rule's text, or, where the rule puts
/// values into it, for more than that.
#[test]
fn every_case_asks_for_words_of_its_rule() {
    for case in cases() {
        let rule = rules().into_iter().find(|r| r.name == case.rule).unwrap();
        for bad in &case.bad {
            assert!(bad.words.len() > 9, "{}: {:?} could be anyone's words", case.rule, bad.words);
            let own = rule.message.contains(bad.words) || rule.says.is_some();
            assert!(own, "{}: {:?} is not in {:?}", case.rule, bad.words, rule.message);
        }
    }
}

// ---- bounds ----

/// A value for each field that the schema knows; its bounds are met, its CEL rules need not be.
fn sample(schema: &JSONSchemaProps) -> Value {
    if let Some(JSON(first)) = schema.enum_.iter().flatten().next() {
        return first.clone();
    }
    if schema.x_kubernetes_int_or_string == Some(true) {
        return json!("1");
    }
    match schema.type_.as_deref() {
        Some("string") if schema.format.as_deref() == Some("date-time") => json!("2026-11-24T10:00:00Z"),
        Some("string") => json!("a"),
        Some("integer") => json!(schema.minimum.unwrap_or(1.0).max(1.0) as i64),
        Some("boolean") => json!(false),
        Some("array") => match &schema.items {
            Some(JSONSchemaPropsOrArray::Schema(item)) => json!([sample(item)]),
            _ => json!([]),
        },
        _ => match (&schema.properties, &schema.additional_properties) {
            (Some(properties), _) => properties.iter().map(|(name, p)| (name.clone(), sample(p))).collect(),
            (None, Some(JSONSchemaPropsOrBool::Schema(value))) => json!({"k": sample(value)}),
            _ => json!({}),
        },
    }
}

/// The value at a path such as `spec.env[].name`: the first of each list, the entry `k` of each map.
fn place<'v>(value: &'v mut Value, path: &str) -> &'v mut Value {
    let steps = path.replace("[]", ".[]").replace("{}", ".{}");
    steps.split('.').fold(value, |here, step| match step {
        "[]" => &mut here[0],
        "{}" => &mut here["k"],
        name => &mut here[name],
    })
}

/// The path as the API server writes it.
fn told_path(path: &str) -> String {
    path.replace("[]", "[0]").replace("{}", ".k")
}

/// A value of exactly that many characters, items or entries, or that number.
fn filled(limit: Limit, now: &Value, size: i64) -> Value {
    match limit {
        Limit::Text(_) => json!("a".repeat(usize::try_from(size).unwrap())),
        Limit::List(_, merge) => (0..size)
            .map(|i| {
                let mut item = now[0].clone();
                if let Merge::By(key) = merge {
                    item[key] = if item[key].is_number() { json!(i + 1) } else { json!(format!("a{i}")) };
                }
                item
            })
            .collect(),
        Limit::Map(_) | Limit::Whole(_) => (0..size).map(|i| (format!("k{i}"), now["k"].clone())).collect(),
        Limit::Number(..) => json!(size),
        Limit::Reference => now.clone(),
        Limit::Time | Limit::TimeText => json!("2".repeat(usize::try_from(size).unwrap())),
    }
}

/// Each bound: at its edge the API server has nothing to say of its size, one beyond it names the field and the limit.
#[tokio::test]
async fn every_bound_holds_at_its_edge() {
    let mut schemas = BTreeMap::new();
    for crd in berth::api::crd::all() {
        let version = crd.spec.versions.into_iter().next().unwrap();
        schemas.insert(crd.spec.names.kind, version.schema.unwrap().open_api_v3_schema.unwrap());
    }
    let (mut wrong, mut tried) = (Vec::new(), 0);
    for (kind, schema) in schemas {
        let api = cluster().objects(&kind).await;
        let mut full = sample(&schema);
        let name = "bounds";
        overlay(&mut full, &json!({"apiVersion": "berth.dev/v1alpha1", "kind": kind, "metadata": {"name": name}}));
        let spec = match kind.as_str() {
            "BotContainer" => json!({"image": "a"}),
            "BotSnapshot" => json!({"botContainerName": "a"}),
            "BotRecord" => json!({"botId": name}),
            _ => json!({}),
        };
        let kept = json!({"apiVersion": "berth.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec});
        let stored = store(&api, &kept).await;
        for bound in BOUNDS.iter().filter(|b| format!("{:?}", b.kind) == kind) {
            let (least, most) = match bound.limit {
                Limit::Text(n) | Limit::List(n, _) | Limit::Map(n) | Limit::Whole(n) => (None, n),
                Limit::Number(least, most) => (Some(least), most),
                Limit::Time | Limit::TimeText => (None, TIME_LENGTH),
                Limit::Reference => continue,
            };
            let mut edges = vec![(most, true)];
            edges.extend((most < i64::MAX).then(|| (most + 1, false)));
            edges.extend(least.into_iter().flat_map(|n| [(n, true), (n - 1, false)]));
            for (size, fits) in edges {
                let mut value = full.clone();
                let field = place(&mut value, bound.at);
                *field = filled(bound.limit, field, size);
                let answer = if bound.at.starts_with("status") {
                    let mut next = serde_json::to_value(&stored).unwrap();
                    next["status"] = value["status"].clone();
                    api.replace_status(name, &dry(), &object(next)).await
                } else {
                    value["metadata"]["name"] = json!("bounds-other");
                    api.create(&dry(), &object(value)).await
                };
                let told = match answer {
                    Ok(_) => Vec::new(),
                    answer => causes(bound.at, answer),
                };
                let limits = ["Too long", "Too many", "should be less", "should be greater"];
                let of_size =
                    |c: &&Cause| c.field == told_path(bound.at) && limits.iter().any(|l| c.message.contains(l));
                let about: Vec<_> = told.iter().filter(of_size).collect();
                tried += 1;
                let limit = if size < most { least.unwrap_or_default() } else { most };
                let says = |c: &&Cause| c.message.contains(&limit.to_string());
                if fits && !about.is_empty() {
                    wrong.push(format!("{kind} {}: {size} must fit, and: {about:?}", bound.at));
                }
                if !fits && !matches!(&about[..], [one] if says(one)) {
                    wrong.push(format!("{kind} {}: {size} must be refused with its limit, and: {told:?}", bound.at));
                }
            }
        }
        api.delete(name, &DeleteParams::default()).await.unwrap();
    }
    assert!(tried > 300, "only {tried} edges were tried");
    assert!(wrong.is_empty(), "{} bounds do not hold:\n{}", wrong.len(), wrong.join("\n"));
}

/// A time in a status: what our own types can't read never gets in, by whoever's token.
#[tokio::test]
async fn a_status_has_readable_times_only() {
    let api = cluster().objects("BotContainer").await;
    let named = json!({"name": "times"});
    let whole =
        json!({"apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": named, "spec": {"image": "a"}});
    let stored = store(&api, &whole).await;
    let write = async |time: &str| {
        let status = json!({"status": {"task": {"pid": 1, "startedAt": time}}});
        send(&api, Some(&stored), &status).await
    };
    for good in
        ["2026-11-24T10:00:00Z", "2026-11-24T10:00:00.123456789Z", "8999-12-31T23:59:59-23:59", "0000-01-01T00:00:00Z"]
    {
        readable(Kind::BotContainer, &write(good).await.unwrap()).unwrap();
    }
    for bad in ["2026-11-24T10:00:00,5Z", "2026-11-24T10:00:00.1234567891Z", "9999-12-31T23:59:59-23:59"] {
        let told = causes(bad, write(bad).await);
        assert!(told.iter().any(|c| c.field == "status.task.startedAt"), "{bad}: {told:?}");
    }
    api.delete("times", &DeleteParams::default()).await.unwrap();
}

/// The largest object that the rules let in is one that etcd takes, with a status far larger than we write, and though
/// the API server writes a quarter of its characters as six (`<` as `\u003c`).
#[tokio::test]
async fn the_largest_bot_fits_into_etcd() {
    let api = cluster().objects("BotContainer").await;
    let text = |size: usize| "abc<".repeat(size / 4);
    let many = |n: usize, make: &dyn Fn(usize) -> Value| (0..n).map(make).collect::<Value>();
    let spec = json!({
        "image": "a",
        "command": many(4, &|_| json!("x".repeat(32_768))),
        "args": many(4, &|_| json!("x".repeat(32_768))),
        "env": many(4, &|i| json!({"name": format!("E{i}"), "value": "x".repeat(32_768)})),
        "skills": many(2, &|i| json!({"name": format!("s{i}"), "content": text(131_072)})),
        "files": [{"path": "/f", "content": text(131_072)}],
    });
    let transitions = many(
        64,
        &|i| json!({"seq": i + 1, "type": "exited", "at": "2026-11-24T10:00:00Z", "message": "x".repeat(1024)}),
    );
    let conditions = many(16, &|i| {
        json!({"type": format!("C{i}"), "status": "True", "reason": "R", "message": "x".repeat(1024),
               "lastTransitionTime": "2026-11-24T10:00:00Z"})
    });
    let lineage = many(256, &|_| json!({"name": "x".repeat(256), "parent": "x".repeat(256), "kind": "Committed"}));
    let ended = json!({"exitCode": 1, "reason": "Error", "message": "x".repeat(4096)});
    let whole = json!({
        "apiVersion": "berth.dev/v1alpha1", "kind": "BotContainer", "metadata": {"name": "largest"}, "spec": spec,
        "status": {"transitions": transitions, "conditions": conditions, "lineage": lineage, "lastTermination": ended},
    });
    let stored = store(&api, &whole).await;
    readable(Kind::BotContainer, &stored).unwrap();
    api.delete("largest", &DeleteParams::default()).await.unwrap();
}
