use std::collections::BTreeSet;

use super::*;

fn schemas() -> Vec<(String, JSONSchemaProps)> {
    all()
        .into_iter()
        .map(|crd| {
            let version = crd.spec.versions.into_iter().next().unwrap();
            (crd.spec.names.kind, version.schema.unwrap().open_api_v3_schema.unwrap())
        })
        .collect()
}

#[test]
fn every_line_of_the_tables_has_its_place() {
    assert_eq!(strays(), Vec::<String>::new(), "these bounds and rules lead nowhere: correct their paths");
}

#[test]
fn no_bound_and_no_rule_stands_twice() {
    let mut seen = BTreeSet::new();
    for bound in BOUNDS {
        assert!(seen.insert((bound.kind, bound.at)), "{:?} {} is bounded twice", bound.kind, bound.at);
    }
    let mut seen = BTreeSet::new();
    for rule in rules() {
        assert!(seen.insert(rule.name), "two rules are called {}", rule.name);
    }
}

#[test]
fn nothing_is_unbounded() {
    let mut open = Vec::new();
    for (kind, mut schema) in schemas() {
        walk(&mut schema, "", &mut |path, field| {
            let text = field.type_.as_deref() == Some("string") || field.x_kubernetes_int_or_string == Some(true);
            let text_open = text && field.max_length.is_none() && field.enum_.is_none();
            let list_open = field.type_.as_deref() == Some("array") && field.max_items.is_none();
            let map_open = field.additional_properties.is_some() && field.max_properties.is_none();
            if text_open || list_open || map_open {
                open.push(format!("{kind} {path}"));
            }
        });
    }
    assert_eq!(open, Vec::<String>::new(), "add these to bound::BOUNDS");
}

#[test]
fn every_list_says_how_it_is_merged() {
    for (kind, mut schema) in schemas() {
        walk(&mut schema, "", &mut |path, field| {
            if field.type_.as_deref() == Some("array") {
                assert!(field.x_kubernetes_list_type.is_some(), "{kind} {path} has no x-kubernetes-list-type");
            }
        });
    }
}

#[test]
fn nothing_is_nullable_and_nothing_keeps_unknown_fields() {
    for (kind, mut schema) in schemas() {
        walk(&mut schema, "", &mut |path, field| {
            assert_eq!(field.nullable, None, "{kind} {path} is nullable");
            assert_eq!(field.x_kubernetes_preserve_unknown_fields, None, "{kind} {path} keeps unknown fields");
            let nulls = field.enum_.iter().flatten().filter(|JSON(value)| value.is_null()).count();
            assert_eq!(nulls, 0, "{kind} {path} lists null");
        });
    }
}

#[test]
fn every_field_is_explained() {
    for (kind, mut schema) in schemas() {
        walk(&mut schema, "", &mut |path, field| {
            let named = !path.is_empty() && !path.ends_with("[]") && !path.ends_with("{}");
            assert!(!named || field.description.is_some(), "kubectl explain says nothing of {kind} {path}");
        });
    }
}

#[test]
fn messages_are_for_people() {
    for rule in rules() {
        assert!(rule.message.len() > 15, "{}: say what is right", rule.name);
        assert!(!rule.message.contains('\n'), "{}: one line", rule.name);
        assert!(!rule.message.ends_with('.'), "{}: the API server's messages have no full stop", rule.name);
        assert!(!rule.cel.is_empty(), "{} checks nothing", rule.name);
    }
}

#[test]
fn the_files_are_what_the_types_say() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("crds");
    let mut wanted = BTreeSet::new();
    for crd in all() {
        let name = format!("{}.yaml", crd.metadata.name.as_deref().unwrap());
        let on_disk = std::fs::read_to_string(folder.join(&name)).unwrap_or_default();
        let made = serde_yaml_ng::to_string(&crd).unwrap();
        assert!(on_disk == made, "crds/{name} is not what the types say: run `cargo run -- crds --dir crds`");
        wanted.insert(name);
    }
    let found: BTreeSet<_> =
        folder.read_dir().unwrap().map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(found, wanted, "crds/ has files that no type makes");
}
