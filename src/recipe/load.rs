//! Reading a recipe: the file, `--set` overrides, and errors that name key, line and what is allowed.

use std::path::Path;

use super::schema::Recipe;
use crate::error::{Error, Result};

/// The recipe that `espalier run` takes without an argument.
pub const QUICK: &str = include_str!("../../recipes/quick.toml");

const MAX_BYTES: u64 = 16 << 20;

impl Recipe {
    /// Reads `path`, or the embedded quick recipe, and applies `--set key=value` overrides.
    pub fn load(path: Option<&Path>, overrides: &[String]) -> Result<Self> {
        match path {
            None => Self::parse(Path::new("quick.toml"), QUICK, overrides),
            Some(path) => {
                // A recipe is an argument: whatever is wrong with it is a matter of usage, not of data.
                let usage = |rule: String| Error::Usage { argument: "RECIPE", value: path.display().to_string(), rule };
                let bytes = crate::data::persist::read_capped(path, MAX_BYTES).map_err(|e| match e {
                    Error::Io { source, .. } => usage(format!("cannot be read: {source}")),
                    Error::File { rule, .. } => usage(rule),
                    other => other,
                })?;
                let text = String::from_utf8(bytes)
                    .map_err(|e| usage(format!("is not UTF-8 from byte {} on", e.utf8_error().valid_up_to() + 1)))?;
                Self::parse(path, &text, overrides)
            }
        }
    }

    pub fn parse(path: &Path, text: &str, overrides: &[String]) -> Result<Self> {
        // Parsed as it stands first, so that its own mistakes are reported with their lines.
        let mut recipe: Recipe = toml::from_str(text).map_err(|e| refused(path, text, &e))?;
        let mut table: toml::Table = toml::from_str(text).map_err(|e| refused(path, text, &e))?;
        if !overrides.is_empty() {
            recipe = overridden(&mut table, overrides)?;
        }
        refuse_rows(
            "",
            &table,
            &toml::Table::try_from(&recipe).map_err(|e| Error::file("recipe", "serialisation", e))?,
        )?;
        recipe.check()?;
        Ok(recipe)
    }

    /// The resolved recipe as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::file("recipe", "serialisation", e))
    }
}

/// Applies all overrides, then reads the whole: one may bring what another needs.
fn overridden(table: &mut toml::Table, overrides: &[String]) -> Result<Recipe> {
    let mut states = Vec::with_capacity(overrides.len());
    for set in overrides {
        apply(table, set)?;
        states.push(table.clone());
    }
    table.clone().try_into().map_err(|error: toml::de::Error| {
        // To blame is the first one behind the last state that reads.
        let sound = states.iter().rposition(|state| state.clone().try_into::<Recipe>().is_ok()).map_or(0, |i| i + 1);
        let blamed = states.get(sound).and_then(|state| state.clone().try_into::<Recipe>().err()).unwrap_or(error);
        let value = overrides.get(sound).cloned().unwrap_or_default();
        Error::Usage { argument: "--set", value, rule: blamed.message().trim().to_string() }
    })
}

/// Refuses arrays where a section stands: its fields could be read from them by position, which says nothing to a reader.
fn refuse_rows(path: &str, written: &toml::Table, read: &toml::Table) -> Result<()> {
    for (key, value) in written {
        let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
        match (value, read.get(key)) {
            (toml::Value::Table(written), Some(toml::Value::Table(read))) => refuse_rows(&path, written, read)?,
            (toml::Value::Array(_), Some(toml::Value::Table(_))) => {
                let allowed = "a table, such as { key = value }".into();
                return Err(Error::Recipe { key: path, value: value.to_string(), allowed });
            }
            _ => {}
        }
    }
    Ok(())
}

/// A TOML error with key, line and, for an unknown key, the allowed ones.
fn refused(path: &Path, text: &str, error: &toml::de::Error) -> Error {
    let line = error.span().map(|s| text[..s.start.min(text.len())].matches('\n').count() + 1);
    let place = line.map_or_else(|| path.display().to_string(), |n| format!("{}, line {n}", path.display()));
    let message = error.message();
    let unknown = message.strip_prefix("unknown field `").or(message.strip_prefix("unknown variant `"));
    if let Some((key, rest)) = unknown.and_then(|m| m.split_once('`')) {
        let allowed = rest.trim_start_matches(", expected one of ").trim_start_matches(", expected ");
        return Error::Recipe { key: place, value: key.to_string(), allowed: allowed.to_string() };
    }
    let written = line.and_then(|n| text.lines().nth(n - 1)).unwrap_or("this file").trim();
    Error::Recipe { key: place, value: format!("\"{written}\""), allowed: message.to_string() }
}

/// Sets `a.b.c=value`; the value is TOML, or a string where it does not parse as such.
fn apply(table: &mut toml::Table, set: &str) -> Result<()> {
    let usage = |rule: &str| Error::Usage { argument: "--set", value: set.to_string(), rule: rule.to_string() };
    let (key, value) = set.split_once('=').ok_or_else(|| usage("key=value, for example teacher.steps=100"))?;
    let parsed = toml::from_str::<toml::Table>(&format!("value = {value}")).ok().and_then(|mut t| t.remove("value"));
    let value = parsed.unwrap_or_else(|| toml::Value::String(value.to_string()));
    let mut place = table;
    let parts: Vec<&str> = key.split('.').collect();
    let Some((last, parents)) = parts.split_last() else {
        return Err(usage("a key"));
    };
    for part in parents {
        let next = place.entry(part.to_string()).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        place = next.as_table_mut().ok_or_else(|| usage(&format!("{part} holds no keys")))?;
    }
    // `--set experts=false` leaves a stage out.
    if value.as_bool() == Some(false) && place.get(*last).is_some_and(toml::Value::is_table) {
        place.remove(*last);
    } else {
        place.insert(last.to_string(), value);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_embedded_recipe_parses_and_survives_its_own_form() {
        let recipe = Recipe::load(None, &[]).unwrap();
        let again = Recipe::parse(Path::new("again"), &recipe.to_toml().unwrap(), &[]).unwrap();
        assert_eq!(recipe, again);
    }

    #[test]
    fn unknown_keys_name_line_and_allowed_keys() {
        let text = QUICK.replace("[teacher]\n", "[teacher]\nstepz = 3\n");
        let error = Recipe::parse(Path::new("r.toml"), &text, &[]).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("stepz") && message.contains("line ") && message.contains("`steps`"), "{message}");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn overrides_reach_nested_keys_and_can_leave_a_stage_out() {
        let sets = ["teacher.steps=7".to_string(), "experts=false".to_string(), "name=other".to_string()];
        let recipe = Recipe::load(None, &sets).unwrap();
        assert_eq!((recipe.teacher.steps, recipe.experts.is_none(), recipe.name.as_str()), (7, true, "other"));
        assert!(Recipe::load(None, &["teacher.steps=0".into()]).is_err());
        let sets = ["teacher.stepz=1".to_string(), "seed=3".to_string()];
        let error = Recipe::load(None, &sets).unwrap_err();
        assert!(error.to_string().starts_with("--set: teacher.stepz=1 is not usable: unknown field"), "{error}");
        let error = Recipe::load(None, &["seed=1".into(), "teacher.steps=many".into()]).unwrap_err();
        assert!(error.to_string().contains("--set: teacher.steps=many"), "{error}");
        assert!(Recipe::load(None, &["nonsense".into()]).is_err());
        for (set, key) in [
            ("pipeline=[]", "pipeline"),
            ("pipeline=[3, \"gpipe\", 4]", "pipeline"),
            ("teacher=[10, 8, 1, 0.001]", "teacher"),
        ] {
            let error = Recipe::load(None, &[set.to_string()]).unwrap_err().to_string();
            assert!(error.contains(key) && error.contains("a table"), "{set}: {error}");
        }
    }
}
