//! Derives the CustomResourceDefinitions: schema from the types, then bounds and CEL rules from tables.
//!
//! ```text
//! types (kube, schemars) -> schema -> plain()  no nulls, as core types have it
//!                                  -> bind()   each line of bound::BOUNDS
//!                                  -> rule()   each line of rule::rules()
//! ```
//!
//! A line whose path the schema does not have is left out by [`all`] and named by [`strays`]: a test fails on it, so that
//! no rule is lost by a renamed field. `berth crds` writes the result; a test fails when `crds/` differs.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::{
    CustomResourceDefinition, JSON, JSONSchemaProps, JSONSchemaPropsOrArray, JSONSchemaPropsOrBool, ValidationRule,
};
use kube::CustomResourceExt;

use super::bound::{BOUNDS, Bound, Limit, Merge, TIME, TIME_LENGTH};
use super::rule::{Kind, Rule, rules};
use super::{BotContainer, BotNode, BotRecord, BotSnapshot};

/// All CRDs, ready to be applied.
pub fn all() -> Vec<CustomResourceDefinition> {
    build().0
}

/// Lines of the tables that no schema has a place for, as `Kind path`: none, or a test fails.
pub fn strays() -> Vec<String> {
    build().1
}

fn build() -> (Vec<CustomResourceDefinition>, Vec<String>) {
    let derived = [
        (Kind::BotContainer, BotContainer::crd()),
        (Kind::BotSnapshot, BotSnapshot::crd()),
        (Kind::BotRecord, BotRecord::crd()),
        (Kind::BotNode, BotNode::crd()),
    ];
    let rules = rules();
    let mut strays = Vec::new();
    let mut crds = Vec::new();
    for (kind, mut crd) in derived {
        let schemas = crd.spec.versions.iter_mut().filter_map(|v| v.schema.as_mut()?.open_api_v3_schema.as_mut());
        for schema in schemas {
            plain(schema);
            for bound in BOUNDS.iter().filter(|b| b.kind == kind) {
                match at(schema, bound.at) {
                    Some(field) => bind(field, bound),
                    None => strays.push(format!("{kind:?} {}", bound.at)),
                }
            }
            for rule in rules.iter().filter(|r| r.kind == kind) {
                // The API server refuses a CRD whose fieldPath leads nowhere; so does the test.
                let leads = at(schema, &format!("{}{}", rule.at, rule.field)).is_some();
                match at(schema, rule.at) {
                    Some(field) if leads => {
                        field.x_kubernetes_validations.get_or_insert_default().push(written(rule));
                    }
                    _ => strays.push(format!("{kind:?} {}{} ({})", rule.at, rule.field, rule.name)),
                }
            }
        }
        crds.push(crd);
    }
    (crds, strays)
}

/// The schema at a path such as `spec.env[].valueFrom` or `spec.nodeSelector{}`; the empty path is the root. Below a map
/// any name leads to the value.
fn at<'s>(schema: &'s mut JSONSchemaProps, path: &str) -> Option<&'s mut JSONSchemaProps> {
    let steps = path.replace("[]", ".[]").replace("{}", ".{}");
    steps.split('.').filter(|step| !step.is_empty()).try_fold(schema, |here, step| match step {
        "[]" => match here.items.as_mut()? {
            JSONSchemaPropsOrArray::Schema(item) => Some(&mut **item),
            JSONSchemaPropsOrArray::Schemas(_) => None,
        },
        name => match (here.properties.as_mut(), here.additional_properties.as_mut()) {
            (Some(properties), _) => properties.get_mut(name),
            (None, Some(JSONSchemaPropsOrBool::Schema(value))) => Some(&mut **value),
            _ => None,
        },
    })
}

/// Everything below a schema and itself, with its path as [`at`] reads it.
fn walk(schema: &mut JSONSchemaProps, path: &str, visit: &mut impl FnMut(&str, &mut JSONSchemaProps)) {
    visit(path, schema);
    let dot = if path.is_empty() { "" } else { "." };
    for (name, property) in schema.properties.iter_mut().flatten() {
        walk(property, &format!("{path}{dot}{name}"), visit);
    }
    if let Some(JSONSchemaPropsOrArray::Schema(item)) = &mut schema.items {
        walk(item, &format!("{path}[]"), visit);
    }
    if let Some(JSONSchemaPropsOrBool::Schema(value)) = &mut schema.additional_properties {
        walk(value, &format!("{path}{{}}"), visit);
    }
}

/// schemars writes `Option` as nullable. Core types know no null: the API server then drops `field: null` as it does for
/// a Pod, instead of storing it.
fn plain(schema: &mut JSONSchemaProps) {
    walk(schema, "", &mut |_, field| {
        field.nullable = None;
        if let Some(values) = &mut field.enum_ {
            values.retain(|JSON(value)| !value.is_null());
        }
    });
}

fn bind(field: &mut JSONSchemaProps, bound: &Bound) {
    match bound.limit {
        Limit::Text(most) => field.max_length = Some(most),
        Limit::List(most, merge) => {
            field.max_items = Some(most);
            field.x_kubernetes_list_type = Some(if merge == Merge::Atomic { "atomic" } else { "map" }.to_owned());
            field.x_kubernetes_list_map_keys = match merge {
                Merge::Atomic => None,
                Merge::By(key) => Some(vec![key.to_owned()]),
            };
        }
        Limit::Map(most) => field.max_properties = Some(most),
        Limit::Whole(most) => {
            field.max_properties = Some(most);
            field.x_kubernetes_map_type = Some("atomic".to_owned());
        }
        Limit::Reference => field.x_kubernetes_map_type = Some("atomic".to_owned()),
        Limit::Time => {
            field.max_length = Some(TIME_LENGTH);
            field.pattern = Some(TIME.to_owned());
        }
        Limit::TimeText => {
            field.max_length = Some(TIME_LENGTH);
            field.format = None;
        }
        Limit::Number(least, most) => {
            field.minimum = Some(least as f64);
            // 2^63 - 1 has no exact f64; the format int64 says it already.
            field.maximum = (most < i64::MAX).then_some(most as f64);
        }
    }
}

fn written(rule: &Rule) -> ValidationRule {
    let now = &rule.cel;
    let cel = if rule.spares_old {
        let before = now.replace("self.", "oldSelf.value().");
        format!("({now}) || (oldSelf.hasValue() && !({before}))")
    } else {
        now.to_string()
    };
    ValidationRule {
        rule: cel,
        message: Some(rule.message.to_string()),
        message_expression: rule.says.as_ref().map(ToString::to_string),
        reason: Some(rule.why.as_str().to_owned()),
        field_path: (!rule.field.is_empty()).then(|| rule.field.to_owned()),
        optional_old_self: rule.spares_old.then_some(true),
    }
}

#[cfg(test)]
mod tests;
