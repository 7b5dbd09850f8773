//! Which keys of a recipe decide what comes out, and which only say how it is carried out: those may change between the
//! sessions of a run.

use std::collections::BTreeSet;

use serde::Serialize;
use toml::{Table, Value};

use crate::error::{Error, Result};
use crate::pipeline::Kind;

/// Section that spreads the work over devices.
const PIPELINE: &str = "pipeline";

/// Keys of trainings that say when to look and when to save.
const OCCASIONS: [&str; 2] = ["validate_every", "checkpoint_every"];

/// A part of the recipe as text, for fingerprints: without the keys that do not change its results.
pub fn text(part: &impl Serialize) -> Result<String> {
    let failed = |e: toml::ser::Error| Error::file("recipe", "serialisation", e);
    toml::to_string(&decisive(Table::try_from(part).map_err(failed)?)).map_err(failed)
}

/// The keys that decide, at any depth.
fn decisive(table: Table) -> Table {
    let of_value = |value| match value {
        Value::Table(inner) => Value::Table(decisive(inner)),
        other => other,
    };
    let kept = table.into_iter().filter(|(key, _)| !OCCASIONS.contains(&key.as_str()));
    kept.map(|(key, value)| (key, of_value(value))).collect()
}

/// What two resolved recipes differ in.
#[derive(Debug, PartialEq)]
pub enum Difference {
    /// Nothing, or only how the work is carried out.
    None,
    /// The work is done in an order that rounds otherwise: a key with both values.
    Rounding(String),
    /// Another result: the first key that differs, with both values.
    Result(String),
}

/// Holds a run's recipe against the one that it is to go on with.
///
/// # Errors
/// `File` for text that is no TOML.
pub fn difference(before: &str, now: &str) -> Result<Difference> {
    let read = |text: &str| text.parse::<Table>().map_err(|e| Error::file("recipe", "TOML", e.message()));
    let (mut before, mut now) = (read(before)?, read(now)?);
    let spread = [before.remove(PIPELINE), now.remove(PIPELINE)];
    if let Some(found) = first("", &decisive(before), &decisive(now)) {
        return Ok(Difference::Result(found));
    }
    let [before, now] = spread.each_ref().map(|section| rounding(section.as_ref().and_then(Value::as_table)));
    let differs = before.iter().zip(&now).find(|(before, now)| before != now);
    Ok(differs.map_or(Difference::None, |((key, before), (_, now))| {
        Difference::Rounding(format!("{PIPELINE}.{key} was {before} and is {now}"))
    }))
}

/// The first key below `path` that has another value, with both.
fn first(path: &str, before: &Table, now: &Table) -> Option<String> {
    let keys: BTreeSet<&String> = before.keys().chain(now.keys()).collect();
    keys.into_iter().find_map(|key| {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (before.get(key), now.get(key)) {
            (Some(Value::Table(before)), Some(Value::Table(now))) => first(&path, before, now),
            (before, now) if before == now => None,
            (before, now) => Some(format!("{path} was {} and is {}", shown(before), shown(now))),
        }
    })
}

fn shown(value: Option<&Value>) -> String {
    match value {
        None => "absent".into(),
        Some(Value::Table(_)) => "a section".into(),
        Some(value) => value.to_string(),
    }
}

/// What of a pipeline decides in which order sums are taken and by which kernels. Where it is cut does not.
fn rounding(pipeline: Option<&Table>) -> [(&'static str, String); 5] {
    let get = |key: &str| pipeline.and_then(|p| p.get(key));
    let list = |key: &str| get(key).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let split = get("schedule").and_then(Value::as_str).and_then(|name| name.parse::<Kind>().ok());
    let kinds: BTreeSet<&str> = list("devices").iter().filter_map(|d| d.as_str()?.split(':').next()).collect();
    let backward = if split.is_some_and(Kind::splits_backward) { "one with backward in two parts" } else { "another" };
    // What is chosen by measured times may be one device, whose batches are whole, or stages with replicas.
    let stages = if get("stages").is_some_and(|n| n.is_integer()) { "fixed" } else { "\"auto\"" };
    [
        ("stages", pipeline.map_or("absent", |_| stages).into()),
        ("micro_batches", get("micro_batches").map_or("absent".into(), Value::to_string)),
        ("schedule", backward.into()),
        ("replicas", get("replicas").map_or("absent".into(), Value::to_string)),
        ("devices", format!("of kinds [{}]", kinds.into_iter().collect::<Vec<_>>().join(", "))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::Recipe;

    fn recipe(sets: &[&str]) -> String {
        let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
        Recipe::load(None, &sets).unwrap().to_toml().unwrap()
    }

    #[test]
    fn how_it_is_carried_out_is_no_difference() {
        let spread =
            recipe(&["pipeline={ stages = 2, heartbeat = 3.0, micro_batches = 4 }", "teacher.validate_every=3"]);
        for other in [
            &["pipeline={ stages = 4, recompute = true, micro_batches = 4 }"][..],
            &["pipeline={ schedule = \"gpipe\", micro_batches = 4 }", "teacher.checkpoint_every=7"],
            &[
                "pipeline={ devices = [\"a\", \"b\"], stages = 2, micro_batches = 4 }",
                "structure.training.validate_every=7",
            ],
        ] {
            let found = difference(&spread, &recipe(other)).unwrap();
            assert!(!matches!(found, Difference::Result(_)), "{other:?}: {found:?}");
        }
        assert_eq!(difference(&spread, &spread).unwrap(), Difference::None);
    }

    #[test]
    fn another_order_of_sums_is_said() {
        let plain = recipe(&[]);
        for (set, said) in [
            ("pipeline={ micro_batches = 4 }", "pipeline.stages was absent and is \"auto\""),
            ("pipeline={ micro_batches = 4, stages = 3 }", "pipeline.stages was absent and is fixed"),
        ] {
            assert_eq!(difference(&plain, &recipe(&[set])).unwrap(), Difference::Rounding(said.into()));
        }
        let [gpipe, zero] = ["gpipe", "zb-h1"].map(|kind| recipe(&[&format!("pipeline={{ schedule = \"{kind}\" }}")]));
        let Difference::Rounding(said) = difference(&gpipe, &zero).unwrap() else { panic!("no difference") };
        assert!(said.starts_with("pipeline.schedule was another and is one with backward in two parts"), "{said}");
    }

    #[test]
    fn another_result_names_the_key_and_both_values() {
        let plain = recipe(&["teacher.steps=20"]);
        for (set, said) in [
            ("teacher.steps=30", "teacher.steps was 20 and is 30"),
            ("experts=false", "experts was a section and is absent"),
            ("evaluate.beams=3", "evaluate.beams was "),
        ] {
            let Difference::Result(found) = difference(&plain, &recipe(&["teacher.steps=20", set])).unwrap() else {
                panic!("{set}: no difference")
            };
            assert!(found.starts_with(said), "{found}");
        }
        assert!(difference("[", &plain).is_err());
    }
}
