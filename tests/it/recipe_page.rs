//! `docs/recipes.md` has every key that a recipe may have, with its default and its words, and no others. What a recipe may have
//! is asked of the reader itself: its refusals list what it knows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use espalier::recipe::Recipe;

/// Keys with the words that each may be, by section.
type Sections = BTreeMap<String, BTreeMap<String, BTreeSet<String>>>;

const WRONG: &str = "zzz";
/// Names that are still read and no longer written.
const EARLIER: [&str; 3] = ["mask", "one_dimensional", "two_dimensional"];

enum Known {
    Keys(Vec<String>),
    Words(Vec<String>),
    Nothing(String),
}

/// What the reader knows in the place where `value` has a wrong word. `[]` behind a key: its value is a list.
fn known(path: &[String], value: &str) -> Known {
    let nested = path.iter().rev().fold(value.to_string(), |inner, key| match key.strip_suffix("[]") {
        Some(key) => format!("{{ {key} = [{inner}] }}"),
        None => format!("{{ {key} = {inner} }}"),
    });
    let table: toml::Table = toml::from_str(&format!("all = {nested}")).unwrap();
    let message = match table["all"].clone().try_into::<Recipe>() {
        Err(error) => error.message().to_string(),
        Ok(_) => panic!("{nested} is a recipe"),
    };
    let list = |kind: &str| {
        let rest = message.strip_prefix(&format!("unknown {kind} `{WRONG}`, "))?;
        let words = rest.split('`').skip(1).step_by(2).map(String::from);
        Some(words.filter(|word| !EARLIER.contains(&word.as_str())).collect())
    };
    let known = list("field").map(Known::Keys).or_else(|| list("variant").map(Known::Words));
    known.unwrap_or(Known::Nothing(message))
}

fn under(path: &[String], key: &str) -> Vec<String> {
    path.iter().cloned().chain([key.to_string()]).collect()
}

/// Adds the section at `path`, whose keys are `keys`, and those below it.
fn walk(path: &[String], keys: Vec<String>, sections: &mut Sections) {
    let mut rows = BTreeMap::new();
    for key in keys {
        let place = under(path, &key);
        let table = format!("{{ {WRONG} = 1 }}");
        match known(&place, &table) {
            Known::Keys(inner) => walk(&place, inner, sections),
            Known::Words(words) => {
                for word in &words {
                    if let Known::Keys(own) = known(&under(&place, word), &table) {
                        rows.extend(own.into_iter().map(|k| (format!("{key}.{word}.{k}"), BTreeSet::new())));
                    }
                }
                rows.insert(key, words.into_iter().collect());
            }
            Known::Nothing(message) if message.contains("missing field `kind`") => {
                let Known::Words(kinds) = known(&place, &format!("{{ kind = \"{WRONG}\" }}")) else {
                    panic!("{place:?}")
                };
                for kind in &kinds {
                    if let Known::Keys(own) = known(&place, &format!("{{ kind = \"{kind}\", {WRONG} = 1 }}")) {
                        rows.extend(own.into_iter().map(|k| (format!("{key}.{k}"), BTreeSet::new())));
                    }
                }
                rows.insert(format!("{key}.kind"), kinds.into_iter().collect());
            }
            Known::Nothing(_) => match known(&under(path, &format!("{key}[]")), &table) {
                Known::Keys(inner) => walk(&under(path, &format!("{key}[]")), inner, sections),
                _ => {
                    let words = match known(&under(path, &format!("{key}[]")), &format!("\"{WRONG}\"")) {
                        Known::Words(words) => words,
                        _ => Vec::new(),
                    };
                    rows.insert(key, words.into_iter().collect());
                }
            },
        }
    }
    let kept = sections.insert(path.join(".").replace("[]", ""), rows);
    assert!(kept.is_none());
}

fn schema() -> Sections {
    let mut sections = Sections::new();
    let Known::Keys(top) = known(&[], &format!("{{ {WRONG} = 1 }}")) else { panic!("no keys") };
    walk(&[], top, &mut sections);
    sections
}

/// A row of a table: default and the whole line, by key.
type Rows = BTreeMap<String, (String, String)>;

/// Headings' sections, which may begin with `*`, and their tables.
fn page() -> Vec<(String, Rows)> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/recipes.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut all = Vec::new();
    for part in text.split("\n#").skip(1) {
        let (heading, body) = part.split_once('\n').unwrap();
        let mut rows = Rows::new();
        for line in body.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [key, _, default, _, _] = cells[..] else { panic!("{line}") };
            let before = rows.insert(key.trim_matches('`').into(), (default.into(), line.into()));
            assert!(before.is_none(), "{line}");
        }
        let named = heading.split('`').skip(1).step_by(2).map(|s| s.trim_matches(['[', ']']).to_string());
        let top = heading.contains("Top level").then(String::new);
        all.extend(named.chain(top).map(|section| (section, rows.clone())));
    }
    all
}

fn is_of(section: &str, pattern: &str) -> bool {
    match pattern.strip_prefix('*') {
        Some(end) => section.ends_with(end),
        None => section == pattern,
    }
}

#[test]
fn the_page_has_every_key_and_no_other() {
    let (schema, page) = (schema(), page());
    for (pattern, _) in &page {
        assert!(schema.keys().any(|section| is_of(section, pattern)), "[{pattern}] is no section of a recipe");
    }
    for (section, keys) in &schema {
        let found: Vec<&Rows> = page.iter().filter(|(p, _)| is_of(section, p)).map(|(_, rows)| rows).collect();
        let [rows] = found[..] else { panic!("[{section}] stands {} times in docs/recipes.md", found.len()) };
        let [have, want]: [BTreeSet<&String>; 2] = [rows.keys().collect(), keys.keys().collect()];
        assert_eq!(have, want, "keys of [{section}]: docs/recipes.md, and what a recipe may have");
        for (key, words) in keys {
            for word in words {
                assert!(rows[key].1.contains(&format!("`{word}`")), "[{section}] {key}: {word} is not in its row");
            }
        }
    }
}

/// What has no default, once in every section.
const LEAST: &str = r#"
name = "least"
data = { corpus = { terms = { pairs = 600 } }, vocabulary = 400, max_length = 32 }
model = { layers = 2, heads = 2, head_size = 16, ffn_width = 64, max_positions = 64 }
teacher = { steps = 1, batch = 1, learning_rate = 1.0 }
hybrid = { teacher = { steps = 1, batch = 1, learning_rate = 1.0 }, student = { steps = 1, batch = 1, learning_rate = 1.0 } }
pipeline = {}
[structure]
l0 = { target = 0.5, training = { steps = 1, batch = 1, learning_rate = 1.0 } }
heads = { keep = 1 }
ffn = { keep = 16 }
vocabulary = {}
training = { steps = 1, batch = 1, learning_rate = 1.0 }
[sparsify]
training = { steps = 1, batch = 1, learning_rate = 1.0 }
[quantize]
schedule = { start = 8, period = 1 }
distil = { matches = [{ teacher = 1, student = 1 }], dynamic = { layers = [1] }, logits = {} }
[experts]
expert_size = 16
share = 0.5
drop = { share = 0.5 }
[tune]
method = { kind = "lora" }
distil = {}
training = { steps = 1, batch = 1, learning_rate = 1.0 }
"#;

/// The value at a path; of a list that of its first table.
fn at<'v>(value: &'v toml::Value, path: &str) -> Option<&'v toml::Value> {
    path.split('.').filter(|key| !key.is_empty()).try_fold(value, |value, key| {
        let value = value.as_array().and_then(|list| list.first()).filter(|v| v.is_table()).unwrap_or(value);
        value.get(key)
    })
}

/// Equal, where numbers may be in single precision.
fn same(a: &toml::Value, b: &toml::Value) -> bool {
    match (a.as_float(), b.as_float()) {
        (Some(a), Some(b)) => a as f32 == b as f32,
        _ => a == b,
    }
}

#[test]
fn the_page_tells_the_defaults() {
    let least: toml::Value = toml::from_str(LEAST).unwrap();
    let recipe: Recipe = toml::from_str(LEAST).unwrap();
    let read = toml::Value::try_from(&recipe).unwrap();
    let (schema, mut compared) = (schema(), 0);
    for (pattern, rows) in page() {
        for section in schema.keys().filter(|section| is_of(section, &pattern)) {
            for (key, (default, _)) in &rows {
                let path = format!("{section}.{key}");
                if at(&least, &path).is_some() {
                    assert_eq!(default, "required", "{path}");
                } else if let Some(value) = at(&read, &path) {
                    let cell: toml::Table = toml::from_str(&format!("cell = {}", default.trim_matches('`')))
                        .unwrap_or_else(|_| panic!("{path} is {value} without being set; the page has {default}"));
                    assert!(same(&cell["cell"], value), "{path} is {value} without being set; the page has {default}");
                    compared += 1;
                }
            }
        }
    }
    assert!(compared > 150, "{compared}");
}
