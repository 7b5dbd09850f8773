//! What a run leaves: one folder, one subfolder per stage, nothing half-written.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::contents::{self, is_blank};
use super::identity::{self, Difference};
use super::lock::FolderLock;
use crate::atomic::write_atomic;
use crate::compress::fastest::Measured;
use crate::compress::freeze::Form;
use crate::compress::pruning::Pattern;
use crate::compress::quantization::{Format, Phase};
use crate::console;
use crate::data::persist::read_capped;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::json;
use crate::nn::Model;
use crate::report::model::{LossCurve, StageRow};
use crate::train::store;
use std::sync::Arc;

pub const RECORD: &str = "stage.json";
pub const ORIGIN: &str = "origin.json";
pub const RECIPE: &str = "recipe.resolved.toml";
pub const STAGES: &str = "stages";
pub const CHECKPOINTS: &str = "checkpoints";
pub const MODEL: &str = "model";
/// Beside a model with fewer tokens: the ids that they had.
pub const VOCABULARY: &str = "vocabulary.json";
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
    /// What its layers run on where that is not how they are stored: measured, once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub measured: Option<Measured>,
}

/// What is true of a student's weights, and held by later stages.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// The teacher's channels that the student has.
    pub kept: Vec<usize>,
    /// Weights whose zeros are held, and how many each has at least.
    pub sparse: BTreeMap<String, usize>,
    /// What the zeros look like.
    pub pattern: Pattern,
    /// Linears that are quantized, and how.
    pub quantized: Vec<String>,
    pub format: Format,
    /// While the stage that quantizes trains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
}

impl State {
    pub fn form(&self) -> Form {
        let sparse = !self.sparse.is_empty() && self.pattern.is_24();
        Form { sparse, quantized: (!self.quantized.is_empty()).then_some(self.format) }
    }

    /// The promises on a model whose tensors have other names; `None` for what is gone with its promise.
    pub fn renamed(&self, rename: impl Fn(&str) -> Option<String>) -> Self {
        let all = |names: &[String]| names.iter().filter_map(|name| rename(name)).collect();
        let sparse = self.sparse.iter().filter_map(|(name, zeros)| Some((rename(name)?, *zeros))).collect();
        Self { sparse, quantized: all(&self.quantized), ..self.clone() }
    }
}

/// What a stage's work follows from; kept beside it, so that a restart can say why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Hash of everything below and of the stage's settings and predecessors.
    pub fingerprint: String,
    /// Kind of arithmetic; see `device::Info::arithmetic`.
    pub device: String,
    /// Hash of the prepared text.
    pub text: String,
}

/// `stage.json`: the record and what it is held against.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Sealed {
    /// Of the two below.
    blake3: String,
    /// Blake3 of the model's manifest.
    model: String,
    record: StageRecord,
}

impl Sealed {
    fn new(model: String, record: StageRecord) -> Result<Self> {
        let mut sealed = Self { blake3: String::new(), model, record };
        sealed.blake3 = sealed.hash()?;
        Ok(sealed)
    }

    /// Of the compact form, which numbers and names alone decide.
    fn hash(&self) -> Result<String> {
        let text = serde_json::to_string(&self.record).map_err(|e| Error::io(RECORD, e.into()))?;
        Ok(fingerprint(&[&self.model, &text]))
    }
}

pub struct RunFolder {
    pub path: PathBuf,
    _lock: FolderLock,
}

impl RunFolder {
    /// Opens a run's folder and holds it; results of another recipe there are refused unless `overwrite`, which removes
    /// what a run wrote and nothing else.
    pub fn open(path: &Path, recipe: &str, overwrite: bool) -> Result<Self> {
        let refused = |rule: &str| {
            Err(Error::Usage { argument: "--out", value: path.display().to_string(), rule: rule.to_string() })
        };
        if path.symlink_metadata().is_ok() && !path.is_dir() {
            return refused("is no folder");
        }
        let resolved = path.join(RECIPE);
        if path.is_dir() && !resolved.exists() && !is_blank(path)? {
            return refused("is not empty and holds no run; name another folder");
        }
        std::fs::create_dir_all(path).map_err(|e| Error::io(path, e))?;
        let lock = FolderLock::take(path)?;
        if resolved.exists() {
            let before = read_capped(&resolved, MAX_JSON)?;
            if overwrite {
                contents::remove(path)?;
            } else if contents::has_results(path) {
                // A run that ended before any result, on a mistake in its recipe perhaps, holds nothing worth a refusal.
                let way_out = "--overwrite starts anew, --out names another folder";
                match identity::difference(&String::from_utf8_lossy(&before), recipe) {
                    Ok(Difference::None) => {}
                    Ok(Difference::Rounding(key)) => console::warn(format_args!(
                        "{key}: what is trained from here on is rounded otherwise than it would have been before"
                    )),
                    Ok(Difference::Result(key)) => {
                        return refused(&format!("holds a run of another recipe, where {key}; {way_out}"));
                    }
                    Err(_) => return refused(&format!("holds a run of a recipe that cannot be read; {way_out}")),
                }
            }
        }
        contents::sweep(path)?;
        write_atomic(&resolved, recipe.as_bytes())?;
        Ok(Self { path: path.to_path_buf(), _lock: lock })
    }

    /// Folder of a stage, made if missing.
    pub fn stage(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(STAGES).join(name);
        std::fs::create_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        Ok(path)
    }

    /// Marks a stage's folder as working from `origin`; checkpoints of another one go. Returns why the stage starts anew,
    /// where there was something to go on with.
    pub fn claim(&self, stage: &Path, origin: &Origin) -> Result<Option<String>> {
        let marker = stage.join(ORIGIN);
        let old = read_capped(&marker, MAX_JSON).ok().and_then(|b| serde_json::from_slice::<Origin>(&b).ok());
        let checkpoints = stage.join(CHECKPOINTS);
        let mut reason = None;
        if old.as_ref() != Some(origin) {
            if stage.join(RECORD).exists() || contents::has_checkpoints(stage) {
                reason = Some(match &old {
                    Some(old) if old.device != origin.device => {
                        format!("device changed from {} to {}", old.device, origin.device)
                    }
                    Some(old) if old.text != origin.text => "the text changed".to_string(),
                    _ => "what it follows from changed".to_string(),
                });
            }
            if checkpoints.exists() {
                std::fs::remove_dir_all(&checkpoints).map_err(|e| Error::io(&checkpoints, e))?;
            }
        }
        let text = serde_json::to_vec_pretty(origin).map_err(|e| Error::io(&marker, e.into()))?;
        write_atomic(&marker, &text)?;
        Ok(reason)
    }

    /// A finished stage with this fingerprint, with its model in training form.
    pub fn finished(
        &self,
        name: &str,
        fingerprint: &str,
        device: &Arc<dyn Device>,
    ) -> Result<Option<(StageRecord, Model)>> {
        let folder = self.stage(name)?;
        // A damaged stage is not redone unasked: hours of training may be saved by a copy from elsewhere.
        let advice = || format!("delete {} to redo the stage, or start anew with --overwrite", folder.display());
        self.recorded(&folder, fingerprint, device).map_err(|error| match error {
            Error::File { path, position, rule } => {
                Error::File { path, position, rule: format!("{rule}; {}", advice()) }
            }
            Error::Io { path, source } => Error::file(path, "file", format!("{source}; {}", advice())),
            other => other,
        })
    }

    /// The same of another run's folder.
    pub fn finished_elsewhere(
        &self,
        run: &Path,
        name: &str,
        fingerprint: &str,
        device: &Arc<dyn Device>,
    ) -> Result<Option<(StageRecord, Model)>> {
        let found = self.recorded(&run.join(STAGES).join(name), fingerprint, device)?;
        Ok(found.filter(|(record, _)| record.row.invariants.iter().all(|i| i.ok)))
    }

    fn recorded(
        &self,
        folder: &Path,
        fingerprint: &str,
        device: &Arc<dyn Device>,
    ) -> Result<Option<(StageRecord, Model)>> {
        let path = folder.join(RECORD);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = read_capped(&path, MAX_JSON)?;
        let sealed: Sealed = json::read(&path, &bytes)?;
        if sealed.hash()? != sealed.blake3 {
            return Err(Error::file(&path, "content", "its hash is not the recorded one: the file was changed"));
        }
        if sealed.record.fingerprint != fingerprint {
            return Ok(None);
        }
        let folder = folder.join(MODEL);
        if store::manifest_hash(&folder)? != sealed.model {
            return Err(Error::file(&folder, "manifest.json", "is not the one that the stage's record names"));
        }
        Ok(Some((sealed.record, store::load_model(&folder, device)?)))
    }

    /// Saves a finished stage: its model first, its record last.
    pub fn finish(&self, name: &str, record: &StageRecord, model: &Model, extra: &[(&str, Vec<u8>)]) -> Result<()> {
        let folder = self.stage(name)?;
        let path = folder.join(RECORD);
        // An older record must not stand beside the new model, not even for a moment.
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&path, e)),
            _ => {}
        }
        self.save_model(&folder.join(MODEL), name, model, extra)?;
        let sealed = Sealed::new(store::manifest_hash(&folder.join(MODEL))?, record.clone())?;
        let text = serde_json::to_vec_pretty(&sealed).map_err(|e| Error::io(&path, e.into()))?;
        write_atomic(&path, &text)?;
        // The finished model supersedes its checkpoints.
        let checkpoints = folder.join(CHECKPOINTS);
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
        store::save_among(path, &files, summary)
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
