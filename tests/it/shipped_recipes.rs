//! The recipes that are shipped, and the experiments' runs and claims, are usable as they are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use espalier::recipe::Recipe;
use toml::{Table, Value};

fn recipes() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes")
}

fn texts<'t>(table: &'t Table, key: &str) -> Vec<&'t str> {
    table
        .get(key)
        .and_then(Value::as_array)
        .map(|all| all.iter().filter_map(Value::as_str).collect())
        .unwrap_or_default()
}

#[test]
fn every_shipped_recipe_loads() {
    for name in ["quick.toml", "computer-english.toml", "tagger.toml", "experiments/catalogs.toml"] {
        Recipe::load(Some(&recipes().join(name)), &[]).unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn every_run_of_the_experiments_is_a_recipe_and_every_row_of_a_claim_a_stage_of_one() {
    let folder = recipes().join("experiments");
    let claims: Table = fs::read_to_string(folder.join("claims.toml")).unwrap().parse().unwrap();
    let mut stages: BTreeSet<String> = BTreeSet::new();
    for run in claims["run"].as_array().unwrap() {
        let run = run.as_table().unwrap();
        let name = run["name"].as_str().unwrap();
        let sets: Vec<String> = texts(run, "set").iter().map(|s| s.to_string()).collect();
        let base = run.get("base").unwrap_or(&claims["base"]).as_str().unwrap();
        let recipe = Recipe::load(Some(&folder.join(base)), &sets).unwrap_or_else(|e| panic!("{name}: {e}"));
        stages.insert(format!("{name}/teacher"));
        stages.extend(recipe.steps().iter().map(|step| format!("{name}/{}", step.name())));
        if recipe.structure.as_ref().is_some_and(|s| s.compare_random) {
            stages.insert(format!("{name}/random"));
        }
        for other in texts(run, "reuse") {
            assert!(stages.contains(&format!("{other}/teacher")), "{name} takes stages of {other}, which comes later");
        }
    }
    for claim in claims["claim"].as_array().unwrap() {
        let rows = claim["rows"].as_table().unwrap();
        for (label, row) in rows {
            assert!(stages.contains(row.as_str().unwrap()), "{label}: {row} is no stage of a run");
        }
        for check in claim["check"].as_array().unwrap() {
            let check = check.as_table().unwrap();
            let single = ["row", "of", "minus"].into_iter().filter_map(|key| check.get(key)?.as_str());
            for label in single.chain(texts(check, "order")) {
                assert!(rows.contains_key(label), "{label} is no row of {}", claim["name"]);
            }
        }
    }
}
