//! Configs of other systems as recipes. Every key is read by its type; unknown ones are refused with their place, and what
//! has no counterpart here is reported with the reason, never dropped in silence.

mod bmcook;
mod textpruner;

use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::schema::Recipe;
use crate::data::persist::read_capped;
use crate::error::{Error, Result};

const MAX_BYTES: u64 = 1 << 20;

/// Whose config it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum System {
    Bmcook,
    Textpruner,
}

/// A key that did not come over as it stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ignored {
    pub key: String,
    pub value: String,
    pub reason: String,
}

/// A recipe made of a foreign config.
#[derive(Clone, Debug)]
pub struct Imported {
    pub recipe: Recipe,
    pub ignored: Vec<Ignored>,
}

/// What an import has so far: the recipe as a table without any stage, and what was said about keys.
struct Draft {
    table: toml::Table,
    base: Recipe,
    ignored: Vec<Ignored>,
}

impl Draft {
    /// Data, model, teacher and measuring come from `base`; so do the trainings of stages.
    fn new(base: &Recipe) -> Result<Self> {
        let mut table: toml::Table =
            toml::from_str(&base.to_toml()?).map_err(|e| Error::file("recipe", "base", e.message()))?;
        for section in ["structure", "sparsify", "quantize", "experts", "hybrid", "tune", "order"] {
            table.remove(section);
        }
        Ok(Self { table, base: base.clone(), ignored: Vec::new() })
    }

    fn ignore(&mut self, key: &str, value: impl ToString, reason: &str) {
        self.ignored.push(Ignored { key: key.into(), value: value.to_string(), reason: reason.into() });
    }

    /// Adds a stage; its training is the base's of that stage, or the teacher's.
    fn stage(&mut self, name: &str, mut section: toml::Table, trains: bool) -> Result<()> {
        if trains {
            let own = match name {
                "structure" => self.base.structure.as_ref().map(|s| s.training),
                "sparsify" => self.base.sparsify.as_ref().map(|s| s.training),
                _ => self.base.quantize.as_ref().and_then(|s| s.training),
            };
            section.insert("training".into(), value(&own.unwrap_or(self.base.teacher))?);
        }
        self.table.insert(name.into(), toml::Value::Table(section));
        Ok(())
    }

    fn finish(self, path: &Path) -> Result<Imported> {
        let text = toml::to_string(&self.table).map_err(|e| Error::file(path, "recipe", e))?;
        Ok(Imported { recipe: Recipe::parse(path, &text, &[])?, ignored: self.ignored })
    }
}

fn value(part: &impl Serialize) -> Result<toml::Value> {
    toml::Value::try_from(part).map_err(|e| Error::file("recipe", "import", e))
}

/// A config by its type: unknown keys, wrong types and missing values are errors that name their place.
fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    refuse_rows(path, bytes)?;
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut reader)
        .map_err(|e| Error::file(path, place(&e.path().to_string(), &e.inner().to_string()), e.inner()))
}

/// The key that an error is about: where the reader stood, or a key that is missing there.
fn place(section: &str, message: &str) -> String {
    let key = message.strip_prefix("missing field `").and_then(|rest| rest.split_once('`')).map(|(key, _)| key);
    let section = Some(section).filter(|section| *section != ".");
    let parts: Vec<&str> = section.into_iter().chain(key).collect();
    if parts.is_empty() { "config".into() } else { parts.join(".") }
}

/// Refuses arrays where the config or a section of it stands: they would be read by position. Neither system has an array
/// at these places.
fn refuse_rows(path: &Path, bytes: &[u8]) -> Result<()> {
    let rule = "an object, such as { \"key\": value }, not an array";
    let whole: serde_json::Value = serde_json::from_slice(bytes).map_err(|e| Error::file(path, "config", e))?;
    let Some(sections) = whole.as_object() else {
        return Err(Error::file(path, "config", rule));
    };
    match sections.iter().find(|(_, section)| section.is_array()) {
        Some((key, _)) => Err(Error::file(path, key, rule)),
        None => Ok(()),
    }
}

/// Reads a config file of `system` and makes a recipe of it on the data, model and trainings of `base`.
///
/// # Errors
/// `Error::File` with the key for what is no such config, `Error::Recipe` for what a recipe cannot say.
pub fn import(system: System, path: &Path, base: &Recipe) -> Result<Imported> {
    from_bytes(system, path, &read_capped(path, MAX_BYTES)?, base)
}

/// As [`import`], of bytes; `path` is named in errors.
///
/// # Errors
/// As [`import`].
pub fn from_bytes(system: System, path: &Path, bytes: &[u8], base: &Recipe) -> Result<Imported> {
    let draft = Draft::new(base)?;
    match system {
        System::Bmcook => bmcook::import(path, bytes, draft),
        System::Textpruner => textpruner::import(path, bytes, draft),
    }
}
