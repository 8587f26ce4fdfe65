use proptest::prelude::*;

use super::*;

struct World {
    config_maps: BTreeMap<String, SourceData>,
    secrets: BTreeMap<String, SourceData>,
    labels: BTreeMap<String, String>,
    annotations: BTreeMap<String, String>,
    allocatable: BTreeMap<String, Quantity>,
    resources: Option<BotResources>,
    ips: Vec<String>,
    host_ips: Vec<String>,
}

fn data(pairs: &[(&str, &[u8])]) -> SourceData {
    pairs.iter().map(|(k, v)| ((*k).to_owned(), v.to_vec())).collect()
}

fn world() -> World {
    let pair = |k: &str, v: &str| BTreeMap::from([(k.to_owned(), v.to_owned())]);
    World {
        config_maps: BTreeMap::from([(
            "common".to_owned(),
            data(&[("A", b"map-a"), ("B", b"map-b"), ("bad=key", b"x"), ("file.txt", b"dots are fine")]),
        )]),
        secrets: BTreeMap::from([(
            "bot".to_owned(),
            data(&[("A", b"secret-a"), ("token", b"hunter2"), ("binary", b"\xff\xfe"), ("nul", b"hunter\x003")]),
        )]),
        labels: pair("app", "web"),
        annotations: pair("example.com/x", "note"),
        allocatable: BTreeMap::from([
            ("cpu".to_owned(), Quantity("4".to_owned())),
            ("memory".to_owned(), Quantity("8Gi".to_owned())),
        ]),
        resources: serde_json::from_str(
            r#"{"requests": {"cpu": "250m"}, "limits": {"cpu": "1500m", "memory": "64Mi", "pids": "10"}}"#,
        )
        .unwrap(),
        ips: vec!["10.0.0.5".to_owned(), "fd00::5".to_owned()],
        host_ips: vec!["192.0.2.7".to_owned()],
    }
}

impl World {
    fn resolve(&self, env: &serde_json::Value, from: &serde_json::Value) -> Result<Vec<(String, String)>, EnvError> {
        let env: Vec<EnvVar> = serde_json::from_value(env.clone()).unwrap();
        let from: Vec<EnvFromSource> = serde_json::from_value(from.clone()).unwrap();
        let sources = |kind: SourceKind, name: &str| match kind {
            SourceKind::ConfigMap => self.config_maps.get(name),
            SourceKind::Secret => self.secrets.get(name),
        };
        let context = FieldContext {
            name: "web",
            namespace: "team-a",
            uid: "the-uid",
            labels: &self.labels,
            annotations: &self.annotations,
            node_name: "node-1",
            pod_ips: &self.ips,
            host_ips: &self.host_ips,
            resources: self.resources.as_ref(),
            allocatable: &self.allocatable,
        };
        resolve_env(&env, &from, &sources, &context)
    }

    fn env(&self, env: serde_json::Value) -> Result<Vec<(String, String)>, EnvError> {
        self.resolve(&env, &serde_json::json!([]))
    }
}

fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
    list.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect()
}

#[test]
fn references_are_expanded_as_in_a_pod() {
    let value = |name: &str| match name {
        "A" => Some("1"),
        "LONGER_NAME" => Some("two"),
        "EMPTY" => Some(""),
        "NEST" => Some("$(A)"),
        _ => None,
    };
    for (input, output) in [
        ("", ""),
        ("plain", "plain"),
        ("$(A)", "1"),
        ("-$(A)-$(LONGER_NAME)-", "-1-two-"),
        ("$(A)$(A)", "11"),
        ("$(EMPTY)", ""),
        ("$(UNKNOWN)", "$(UNKNOWN)"),
        ("$$(A)", "$(A)"),
        ("$$$(A)", "$1"),
        ("$$$$(A)", "$$(A)"),
        ("$$", "$"),
        ("$", "$"),
        ("$$$", "$$"),
        ("a$", "a$"),
        ("$A", "$A"),
        ("$(", "$("),
        ("$(A", "$(A"),
        ("$((A))", "$((A))"),
        ("$()", "$()"),
        ("$(NEST)", "$(A)"),
        ("$(A$(A)", "$(A$(A)"),
        ("ü$ü$(A)ü", "ü$ü1ü"),
        ("$(UNKNOWN$(A)", "$(UNKNOWN$(A)"),
    ] {
        assert_eq!(expand("f", input, value).unwrap(), output, "{input:?}");
    }
}

#[test]
fn variables_that_double_each_other_are_stopped() {
    let mut list = vec![serde_json::json!({"name": "V0", "value": "x".repeat(1000)})];
    for i in 1..100 {
        list.push(serde_json::json!({"name": format!("V{i}"), "value": format!("$(V{0})$(V{0})", i - 1)}));
    }
    let refused = world().env(list.into()).unwrap_err();
    assert!(refused.to_string().starts_with("spec.env[8].value:"), "{refused}");
    assert_eq!(refused.reason(), Reason::InvalidSpec);
}

#[test]
fn env_sees_what_stands_before_it_and_wins_over_env_from() {
    let from =
        serde_json::json!([{"configMapRef": {"name": "common"}}, {"secretRef": {"name": "keys"}, "prefix": "S_"}]);
    let mut world = world();
    world.secrets.insert("keys".to_owned(), data(&[("A", b"s")]));
    let env = serde_json::json!([
        {"name": "C", "value": "$(A)+$(B)+$(S_A)+$(LATER)"},
        {"name": "A", "value": "own"},
        {"name": "LATER", "value": "$(A)"},
        {"name": "A", "value": "again"},
        {"name": "EMPTY"},
    ]);
    assert_eq!(
        world.resolve(&env, &from).unwrap(),
        pairs(&[
            ("A", "again"),
            ("B", "map-b"),
            ("file.txt", "dots are fine"),
            ("S_A", "s"),
            ("C", "map-a+map-b+s+$(LATER)"),
            ("LATER", "own"),
            ("EMPTY", ""),
        ])
    );
}

#[test]
fn a_later_source_wins() {
    let mut world = world();
    world.secrets.get_mut("bot").unwrap().retain(|key, _| key == "A");
    let from = serde_json::json!([{"configMapRef": {"name": "common"}}, {"secretRef": {"name": "bot"}}]);
    let made = world.resolve(&serde_json::json!([]), &from).unwrap();
    assert!(made.contains(&("A".to_owned(), "secret-a".to_owned())), "{made:?}");
    // What a source holds is text, not a template.
    world.config_maps.insert("t".to_owned(), data(&[("T", b"$(A)")]));
    let made = world.resolve(&serde_json::json!([]), &serde_json::json!([{"configMapRef": {"name": "t"}}])).unwrap();
    assert_eq!(made, pairs(&[("T", "$(A)")]));
}

#[test]
fn every_source_of_a_value_works() {
    let from = |v: serde_json::Value| world().env(serde_json::json!([{"name": "X", "valueFrom": v}]));
    for (source, value) in [
        (serde_json::json!({"configMapKeyRef": {"name": "common", "key": "A"}}), "map-a"),
        (serde_json::json!({"secretKeyRef": {"name": "bot", "key": "token"}}), "hunter2"),
        (serde_json::json!({"fieldRef": {"fieldPath": "metadata.name"}}), "web"),
        (serde_json::json!({"fieldRef": {"fieldPath": "metadata.namespace"}}), "team-a"),
        (serde_json::json!({"fieldRef": {"fieldPath": "metadata.uid"}}), "the-uid"),
        (serde_json::json!({"fieldRef": {"fieldPath": "metadata.labels['app']"}}), "web"),
        (serde_json::json!({"fieldRef": {"fieldPath": "metadata.labels['none']"}}), ""),
        (serde_json::json!({"fieldRef": {"fieldPath": "metadata.annotations['example.com/x']"}}), "note"),
        (serde_json::json!({"fieldRef": {"fieldPath": "spec.nodeName"}}), "node-1"),
        (serde_json::json!({"fieldRef": {"fieldPath": "status.podIP"}}), "10.0.0.5"),
        (serde_json::json!({"fieldRef": {"fieldPath": "status.podIPs"}}), "10.0.0.5,fd00::5"),
        (serde_json::json!({"fieldRef": {"fieldPath": "status.hostIP"}}), "192.0.2.7"),
        (serde_json::json!({"fieldRef": {"fieldPath": "status.hostIPs"}}), "192.0.2.7"),
        (serde_json::json!({"resourceFieldRef": {"resource": "limits.cpu"}}), "2"),
        (serde_json::json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}), "1500"),
        (serde_json::json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "0"}}), "2"),
        (serde_json::json!({"resourceFieldRef": {"resource": "requests.cpu", "divisor": "1m"}}), "250"),
        (serde_json::json!({"resourceFieldRef": {"resource": "limits.memory"}}), "67108864"),
        (serde_json::json!({"resourceFieldRef": {"resource": "limits.memory", "divisor": "1M"}}), "68"),
        (serde_json::json!({"resourceFieldRef": {"resource": "requests.memory", "divisor": "1Mi"}}), "64"),
        (serde_json::json!({"resourceFieldRef": {"resource": "limits.pids"}}), "10"),
    ] {
        assert_eq!(from(source.clone()).unwrap(), pairs(&[("X", value)]), "{source}");
    }
    let mut unlimited = world();
    unlimited.resources = None;
    let limit = serde_json::json!([{"name": "X", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}]);
    assert_eq!(unlimited.env(limit).unwrap(), pairs(&[("X", "4")]), "an unset limit is the node's allocatable");
}

#[test]
fn what_a_bot_does_not_have_is_refused_at_its_field() {
    for (source, field) in [
        (serde_json::json!({}), "spec.env[0].valueFrom"),
        (
            serde_json::json!({"fieldRef": {"fieldPath": "spec.serviceAccountName"}}),
            "spec.env[0].valueFrom.fieldRef.fieldPath",
        ),
        (serde_json::json!({"fieldRef": {"fieldPath": "metadata.labels"}}), "spec.env[0].valueFrom.fieldRef.fieldPath"),
        (
            serde_json::json!({"fieldRef": {"fieldPath": "metadata.labels['"}}),
            "spec.env[0].valueFrom.fieldRef.fieldPath",
        ),
        (
            serde_json::json!({"resourceFieldRef": {"resource": "limits.gpu"}}),
            "spec.env[0].valueFrom.resourceFieldRef.resource",
        ),
        (
            serde_json::json!({"resourceFieldRef": {"resource": "requests.pids"}}),
            "spec.env[0].valueFrom.resourceFieldRef.resource",
        ),
        (
            serde_json::json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "x"}}),
            "spec.env[0].valueFrom.resourceFieldRef.divisor",
        ),
        (
            serde_json::json!({"resourceFieldRef": {"resource": "limits.cpu", "divisor": "-1"}}),
            "spec.env[0].valueFrom.resourceFieldRef.divisor",
        ),
        (serde_json::json!({"fileKeyRef": {"volumeName": "v", "path": "p", "key": "k"}}), "spec.env[0].valueFrom"),
        (
            serde_json::json!({"secretKeyRef": {"name": "bot", "key": "A"}, "configMapKeyRef": {"name": "common", "key": "A"}}),
            "spec.env[0].valueFrom",
        ),
    ] {
        match world().env(serde_json::json!([{"name": "X", "valueFrom": source}])).unwrap_err() {
            EnvError::InvalidSpec(e) => assert_eq!(e.field(), field, "{source}"),
            other => panic!("{source}: {other}"),
        }
    }
    for name in ["", "A=B", "ü", "a\0", "tab\t"] {
        let refused = world().env(serde_json::json!([{"name": name, "value": "x"}])).unwrap_err();
        assert_eq!(refused.reason(), Reason::InvalidSpec, "{name:?}");
    }
    let both =
        serde_json::json!([{"name": "X", "value": "x", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}]);
    assert_eq!(world().env(both).unwrap_err().reason(), Reason::InvalidSpec);
    for from in
        [serde_json::json!([{}]), serde_json::json!([{"configMapRef": {"name": "a"}, "secretRef": {"name": "b"}}])]
    {
        assert_eq!(world().resolve(&serde_json::json!([]), &from).unwrap_err().reason(), Reason::InvalidSpec);
    }
}

#[test]
fn a_missing_source_is_named_unless_it_is_optional() {
    for (source, kind, key) in [
        (serde_json::json!({"configMapKeyRef": {"name": "gone", "key": "A"}}), SourceKind::ConfigMap, None),
        (
            serde_json::json!({"configMapKeyRef": {"name": "common", "key": "gone"}}),
            SourceKind::ConfigMap,
            Some("gone"),
        ),
        (
            serde_json::json!({"secretKeyRef": {"name": "gone", "key": "A", "optional": false}}),
            SourceKind::Secret,
            None,
        ),
        (serde_json::json!({"secretKeyRef": {"name": "bot", "key": "gone"}}), SourceKind::Secret, Some("gone")),
    ] {
        match world().env(serde_json::json!([{"name": "X", "valueFrom": source}])).unwrap_err() {
            EnvError::ConfigNotFound { field, kind: k, key: missing, .. } => {
                assert_eq!((field.as_str(), k, missing.as_deref()), ("spec.env[0].valueFrom", kind, key), "{source}");
            }
            other => panic!("{source}: {other}"),
        }
        let mut optional = source.clone();
        for reference in optional.as_object_mut().unwrap().values_mut() {
            reference["optional"] = true.into();
        }
        assert_eq!(world().env(serde_json::json!([{"name": "X", "valueFrom": optional}])).unwrap(), []);
    }
    let gone = |optional: bool| serde_json::json!([{"secretRef": {"name": "gone", "optional": optional}}]);
    let refused = world().resolve(&serde_json::json!([]), &gone(false)).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "spec.envFrom[0]: there is no Secret \"gone\" in this namespace; create it, or set optional: true"
    );
    assert_eq!(refused.reason(), Reason::ConfigNotFound);
    assert!(refused.retryable());
    assert_eq!(world().resolve(&serde_json::json!([]), &gone(true)).unwrap(), []);
}

#[test]
fn no_error_tells_a_value_of_a_secret() {
    let secret =
        |key: &str| serde_json::json!([{"name": "X", "valueFrom": {"secretKeyRef": {"name": "bot", "key": key}}}]);
    for key in ["binary", "nul"] {
        let refused = world().env(secret(key)).unwrap_err();
        let words = format!("{refused} {refused:?}");
        assert!(words.contains(key) && !words.contains("hunter"), "{words}");
        // Was told as what only an edit of the bot helps against, though the Secret is what is wrong.
        assert!(refused.retryable() && refused.reason() == Reason::InvalidSpec, "{words}");
    }
    let mut world = world();
    world.secrets.insert("bot".to_owned(), data(&[("token", "hunter2".repeat(20_000).as_bytes())]));
    let words = format!("{:?}", world.env(secret("token")).unwrap_err());
    assert!(words.contains("131071") && !words.contains("hunter"), "{words}");
    // Also where the process's environment is put together: a value is too long only with its name.
    let env = vec![("NAME".to_owned(), "hunter2".repeat(MAX_STRING / 7))];
    let words = format!(
        "{:?}",
        process_env(&[], &Surroundings { hostname: "h", home: None, timezone: None }, &env).unwrap_err()
    );
    assert!(words.contains("NAME") && !words.contains("hunter"), "{words}");
    // And where an expansion grows too long.
    let list = serde_json::json!([
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "bot", "key": "half"}}}, {"name": "B", "value": "$(A)$(A)"},
    ]);
    world.secrets.insert("bot".to_owned(), data(&[("half", "hunter2".repeat(10_000).as_bytes())]));
    let words = format!("{:?}", world.env(list).unwrap_err());
    assert!(words.contains("spec.env[1].value") && !words.contains("hunter"), "{words}");
}

#[test]
fn the_bots_variables_go_over_the_images_and_those_over_the_defaults() {
    let process = |image: &[&str], timezone: Option<&str>, bot: &[(&str, &str)]| {
        let image: Vec<String> = image.iter().map(|&e| e.to_owned()).collect();
        process_env(&image, &Surroundings { hostname: "web", home: Some("/root"), timezone }, &pairs(bot)).unwrap()
    };
    let path = format!("PATH={DEFAULT_PATH}");
    assert_eq!(process(&[], None, &[]), [path.as_str(), "HOSTNAME=web", "HOME=/root"]);
    assert_eq!(
        process(&["PATH=/img", "A=image", "B=b=c", "HOME=/h", "nothing", "=x", ""], None, &[("A", "bot"), ("Z", "")]),
        ["PATH=/img", "HOSTNAME=web", "HOME=/h", "A=bot", "B=b=c", "Z="]
    );
    assert!(process(&["TZ=UTC"], Some("Europe/Berlin"), &[]).contains(&"TZ=Europe/Berlin".to_owned()));
    assert!(process(&[], Some("Europe/Berlin"), &[("TZ", "Asia/Tokyo")]).contains(&"TZ=Asia/Tokyo".to_owned()));
}

#[test]
fn an_image_with_a_nul_in_its_environment_is_refused() {
    let around = Surroundings { hostname: "h", home: None, timezone: None };
    assert!(process_env(&["A=\0".to_owned()], &around, &[]).is_err());
    assert!(process_env(&["A\0=".to_owned()], &around, &[]).is_err());
    assert!(process_env(&[format!("A={}", "x".repeat(MAX_STRING))], &around, &[]).is_err());
}

#[test]
fn kinds_are_told_apart() {
    // A Secret and a ConfigMap of one name are two objects.
    let mut world = world();
    world.config_maps.insert("bot".to_owned(), data(&[("token", b"public")]));
    let made = world
        .env(serde_json::json!([{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "bot", "key": "token"}}}]));
    assert_eq!(made.unwrap(), pairs(&[("X", "public")]));
}

proptest! {
    #[test]
    fn text_without_dollars_stays_and_escaping_is_undone(text in "[^$]{0,40}", any in "\\PC{0,40}") {
        prop_assert_eq!(expand("f", &text, |_| Some("x")).unwrap(), text);
        prop_assert_eq!(expand("f", &any.replace('$', "$$"), |_| Some("x")).unwrap(), any);
    }

    #[test]
    fn no_text_panics(text in "[$()Aü]{0,40}") {
        let _ = expand("f", &text, |name| (name == "A").then_some("1"));
    }
}
