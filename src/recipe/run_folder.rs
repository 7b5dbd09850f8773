//! What a run leaves: one folder, one subfolder per stage, nothing half-written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::atomic::write_atomic;
use crate::compress::freeze::Form;
use crate::data::persist::read_capped;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::report::model::{LossCurve, StageRow};
use crate::train::store;
use std::sync::Arc;

const RECORD: &str = "stage.json";
const RECIPE: &str = "recipe.resolved.toml";
const MAX_JSON: u64 = 64 << 20;

/// What a finished stage is known by.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StageRecord {
    /// Hash of everything the stage depends on: its part of the recipe and its predecessor's fingerprint.
    pub fingerprint: String,
    pub row: StageRow,
    pub curves: Vec<LossCurve>,
    pub notes: Vec<String>,
    /// Promises that hold on the model from here on.
    pub state: State,
}

/// What is true of a student's weights, and held by later stages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The teacher's channels that the student has.
    pub kept: Vec<usize>,
    /// Weights held 2:4.
    pub sparse: Vec<String>,
    pub two_dimensional: bool,
    /// Linears trained under int8 fake quantization.
    pub int8: Vec<String>,
}

impl State {
    pub fn form(&self) -> Form {
        Form { sparse: !self.sparse.is_empty(), int8: !self.int8.is_empty() }
    }
}

pub struct RunFolder {
    pub path: PathBuf,
}

impl RunFolder {
    /// Opens a run's folder; a run of another recipe there is refused unless `overwrite`.
    pub fn open(path: &Path, recipe: &str, overwrite: bool) -> Result<Self> {
        let resolved = path.join(RECIPE);
        if resolved.exists() {
            let old = read_capped(&resolved, MAX_JSON)?;
            if old != recipe.as_bytes() {
                if !overwrite {
                    let rule = "holds a run of another recipe; --overwrite starts anew, --out names another folder";
                    return Err(Error::file(path, RECIPE, rule));
                }
                std::fs::remove_dir_all(path).map_err(|e| Error::io(path, e))?;
            } else if overwrite {
                std::fs::remove_dir_all(path).map_err(|e| Error::io(path, e))?;
            }
        } else if path.exists() && std::fs::read_dir(path).map_err(|e| Error::io(path, e))?.next().is_some() {
            return Err(Error::file(path, "folder", "is not empty and holds no run; --out names another folder"));
        }
        std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        write_atomic(&resolved, recipe.as_bytes())?;
        Ok(Self { path: path.to_path_buf() })
    }

    /// Folder of a stage, made if missing.
    pub fn stage(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join("stages").join(name);
        std::fs::create_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        Ok(path)
    }

    /// Marks a stage's folder as working under `fingerprint`; checkpoints of another lineage go.
    pub fn claim(&self, stage: &Path, fingerprint: &str) -> Result<()> {
        let marker = stage.join("fingerprint");
        let same = std::fs::read(&marker).is_ok_and(|old| old == fingerprint.as_bytes());
        let checkpoints = stage.join("checkpoints");
        if !same && checkpoints.exists() {
            std::fs::remove_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
        }
        write_atomic(&marker, fingerprint.as_bytes())
    }

    /// A finished stage with this fingerprint, with its model in training form.
    pub fn finished(
        &self,
        name: &str,
        fingerprint: &str,
        device: &Arc<dyn Device>,
    ) -> Result<Option<(StageRecord, Model)>> {
        let folder = self.stage(name)?;
        let path = folder.join(RECORD);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read_capped(&path, MAX_JSON)?;
        let mut reader = serde_json::Deserializer::from_slice(&bytes);
        let record: StageRecord =
            serde_path_to_error::deserialize(&mut reader).map_err(|e| Error::file(&path, e.path(), e.inner()))?;
        if record.fingerprint != fingerprint {
            return Ok(None);
        }
        let model = store::load_model(&folder.join("model"), device)?;
        Ok(Some((record, model)))
    }

    /// Saves a finished stage: its model first, its record last.
    pub fn finish(&self, name: &str, record: &StageRecord, model: &Model, extra: &[(&str, Vec<u8>)]) -> Result<()> {
        let folder = self.stage(name)?;
        self.save_model(&folder.join("model"), name, model, extra)?;
        let text = serde_json::to_vec_pretty(record).map_err(|e| Error::io(folder.join(RECORD), e.into()))?;
        write_atomic(folder.join(RECORD), &text)?;
        // The finished model supersedes its checkpoints.
        let checkpoints = folder.join("checkpoints");
        if checkpoints.exists() {
            std::fs::remove_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
        }
        Ok(())
    }

    pub fn save_model(&self, path: &Path, stage: &str, model: &Model, extra: &[(&str, Vec<u8>)]) -> Result<()> {
        let mut files = store::model_files(model)?;
        files.extend(extra.iter().cloned());
        let summary: BTreeMap<String, String> =
            [("stage".to_string(), stage.to_string()), ("device".into(), model.device().info().name.clone())].into();
        store::save(path, &files, summary)
    }
}

/// Fingerprint of a stage from the parts that decide it.
pub fn fingerprint(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex().to_string()
}
