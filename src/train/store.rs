//! Directories that are whole or not there: models and checkpoints as safetensors, config and a manifest of hashes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::tensor::{Dtype, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};

use crate::console;
use crate::data::persist::{put_files, read_capped, write_directory};
use crate::device::Device;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::json;
use crate::nn::{Config, Model};
use crate::shape::Meta;
use crate::tensor::Tensor;

const VERSION: u32 = 1;
/// What a saved model or checkpoint is known by.
pub const MANIFEST: &str = "manifest.json";
pub const CONFIG: &str = "config.json";
pub const WEIGHTS: &str = "model.safetensors";

/// Caps of the readers: a file beyond them is refused before anything is allocated for it.
const MAX_TENSORS: usize = 100_000;
const MAX_NAME: usize = 512;
const MAX_JSON: u64 = 16 << 20;
const MAX_FILE: u64 = 64 << 30;

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    pub bytes: u64,
    pub blake3: String,
}

/// Written last: a directory without a verifying manifest does not count.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub version: u32,
    /// "espalier 0.1.0"
    pub tool: String,
    pub files: BTreeMap<String, FileRecord>,
    /// What the directory holds: step, stage, device, parent, hashes of data and tokenizer.
    pub summary: BTreeMap<String, String>,
}

/// Writes `files` and a manifest as the directory `path`, whole or not at all; an earlier one is replaced.
///
/// # Errors
/// `Error::Io` with the file; an existing directory is then untouched. `Error::File` when `path` exists and holds no
/// manifest, that is when something else wrote it.
pub fn save(path: &Path, files: &[(&str, Vec<u8>)], summary: BTreeMap<String, String>) -> Result<()> {
    write_directory(path, MANIFEST, &with_manifest(path, files, summary)?)
}

/// As [`save`], into a directory that may hold other files: a place inside a folder that is known to be the caller's.
pub fn save_among(path: &Path, files: &[(&str, Vec<u8>)], summary: BTreeMap<String, String>) -> Result<()> {
    put_files(path, MANIFEST, &with_manifest(path, files, summary)?)
}

fn with_manifest<'a>(
    path: &Path,
    files: &[(&'a str, Vec<u8>)],
    summary: BTreeMap<String, String>,
) -> Result<Vec<(&'a str, Vec<u8>)>> {
    let record =
        |bytes: &Vec<u8>| FileRecord { bytes: bytes.len() as u64, blake3: blake3::hash(bytes).to_hex().to_string() };
    let records = files.iter().map(|(name, bytes)| (name.to_string(), record(bytes))).collect();
    let tool = format!("espalier {}", env!("CARGO_PKG_VERSION"));
    let manifest = Manifest { version: VERSION, tool, files: records, summary };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| Error::io(path.join(MANIFEST), e.into()))?;
    let mut all = files.to_vec();
    all.push((MANIFEST, text));
    Ok(all)
}

fn name_of(path: &Path) -> String {
    path.file_name().map_or_else(|| "unnamed".into(), |n| n.to_string_lossy().into_owned())
}

/// The manifest of a directory.
pub fn manifest(path: &Path) -> Result<Manifest> {
    let file = path.join(MANIFEST);
    let manifest: Manifest = json::read(&file, &read_capped(&file, MAX_JSON)?)?;
    if manifest.version != VERSION {
        return Err(Error::file(&file, "version", format!("{} is not {VERSION}", manifest.version)));
    }
    Ok(manifest)
}

/// Blake3 of a directory's manifest, and through it of all its files.
pub fn manifest_hash(path: &Path) -> Result<String> {
    Ok(blake3::hash(&read_capped(&path.join(MANIFEST), MAX_JSON)?).to_hex().to_string())
}

/// Reads a directory that [`save`] wrote; every file's size and hash is held against the manifest.
pub fn load(path: &Path) -> Result<(Manifest, BTreeMap<String, Vec<u8>>)> {
    let manifest = manifest(path)?;
    let mut files = BTreeMap::new();
    for (name, record) in &manifest.files {
        let plain = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if !plain || name.starts_with('.') {
            return Err(Error::file(path.join(MANIFEST), name, "a bare file name of letters, digits, '.', '_', '-'"));
        }
        let file = path.join(name);
        let bytes = read_capped(&file, MAX_FILE)?;
        if bytes.len() as u64 != record.bytes {
            return Err(Error::file(
                &file,
                "size",
                format!("{} bytes where the manifest has {}", bytes.len(), record.bytes),
            ));
        }
        if blake3::hash(&bytes).to_hex().as_str() != record.blake3 {
            return Err(Error::file(&file, "content", "its hash is not the manifest's: the file is damaged"));
        }
        files.insert(name.clone(), bytes);
    }
    Ok((manifest, files))
}

const TYPES: [(DType, Dtype); 5] = [
    (DType::F32, Dtype::F32),
    (DType::F16, Dtype::F16),
    (DType::Bf16, Dtype::BF16),
    (DType::I8, Dtype::I8),
    (DType::U32, Dtype::U32),
];

/// Tensors as a safetensors file, in name order.
pub fn encode(tensors: &BTreeMap<String, Tensor>) -> Result<Vec<u8>> {
    let broken = |e: safetensors::SafeTensorError| Error::file(WEIGHTS, "header", e);
    let mut parts = Vec::new();
    for (name, tensor) in tensors {
        let dtype = TYPES.iter().find(|(d, _)| *d == tensor.dtype()).map_or(Dtype::F32, |(_, t)| *t);
        parts.push((name, tensor.dims().to_vec(), dtype, tensor.to_bytes()?));
    }
    let views = parts.iter().map(|(name, dims, dtype, bytes)| {
        TensorView::new(*dtype, dims.clone(), bytes).map(|view| (name.as_str(), view)).map_err(broken)
    });
    serialize(views.collect::<Result<Vec<_>>>()?, None).map_err(broken)
}

/// Reads a safetensors file under this project's policy: closed set of types, sane names, capped counts.
pub fn decode(path: &Path, bytes: &[u8], device: &Arc<dyn Device>) -> Result<BTreeMap<String, Tensor>> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| Error::file(path, "header", e))?;
    if file.len() > MAX_TENSORS {
        return Err(Error::file(path, "header", format!("{} tensors, at most {MAX_TENSORS}", file.len())));
    }
    let mut tensors = BTreeMap::new();
    for (name, view) in file.tensors() {
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            return Err(Error::file(
                path,
                "header",
                format!("tensor name {name:?} is empty, too long or not printable"),
            ));
        }
        let Some((dtype, _)) = TYPES.iter().find(|(_, t)| *t == view.dtype()) else {
            return Err(Error::file(
                path,
                &name,
                format!("type {:?} is not one of f32, f16, bf16, i8, u32", view.dtype()),
            ));
        };
        let meta = Meta::new(view.shape(), *dtype).map_err(|e| Error::file(path, &name, e))?;
        tensors.insert(name, Tensor::from_bytes(device, meta, view.data())?);
    }
    Ok(tensors)
}

/// A model directory's files, to which a caller may add others (tokenizer, recipe).
pub fn model_files(model: &Model) -> Result<Vec<(&'static str, Vec<u8>)>> {
    let config = serde_json::to_vec_pretty(&model.config).map_err(|e| Error::io(CONFIG, e.into()))?;
    Ok(vec![(CONFIG, config), (WEIGHTS, encode(&model.tensors)?)])
}

/// Reads a model directory; shapes are checked against the config where the representation is dense.
pub fn load_model(path: &Path, device: &Arc<dyn Device>) -> Result<Model> {
    let (_, files) = load(path)?;
    model_from(path, &files, device)
}

/// A model from the verified files of a directory.
pub fn model_from(path: &Path, files: &BTreeMap<String, Vec<u8>>, device: &Arc<dyn Device>) -> Result<Model> {
    let file = |name: &str| files.get(name).ok_or_else(|| Error::file(path, name, "missing from the manifest"));
    let config: Config = json::read(&path.join(CONFIG), file(CONFIG)?)?;
    config.check(&path.join(CONFIG))?;
    let weights = path.join(WEIGHTS);
    let tensors = decode(&weights, file(WEIGHTS)?, device)?;
    config.check_tensors(&weights, &tensors)?;
    Model::new(config, tensors, device)
}

/// Key of a checkpoint's step in its manifest's summary.
pub const STEP: &str = "step";

/// Newest directory `step-N` below `folder` that verifies and whose manifest has the same step, with that step; others
/// are passed over and named on stderr, never deleted.
pub fn latest(folder: &Path) -> Result<Option<(u64, PathBuf)>> {
    for (step, path) in steps(folder)?.into_iter().rev() {
        let saved = load(&path).and_then(|(manifest, _)| match manifest.summary.get(STEP) {
            // A directory can be renamed; only what was saved with the weights says how far they are.
            Some(saved) if saved.parse() != Ok(step) => {
                Err(Error::file(path.join(MANIFEST), STEP, format!("{saved} where the directory's name has {step}")))
            }
            _ => Ok(()),
        });
        match saved {
            Ok(()) => return Ok(Some((step, path))),
            Err(e) => console::warn(format_args!("{}: checkpoint passed over: {e}", path.display())),
        }
    }
    Ok(None)
}

/// All `step-N` directories, oldest first.
fn steps(folder: &Path) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        Err(e) => return Err(Error::io(folder, e)),
    };
    for entry in entries {
        let path = entry.map_err(|e| Error::io(folder, e))?.path();
        if let Some(step) = name_of(&path).strip_prefix("step-").and_then(|n| n.parse().ok()) {
            found.push((step, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Removes all but the newest `keep` checkpoints up to step `newest`. Later ones are damaged leftovers that were passed
/// over; counted, they would push out the one just saved.
pub fn retain(folder: &Path, newest: u64, keep: usize) -> Result<()> {
    let mut all = steps(folder)?;
    all.retain(|(step, _)| *step <= newest);
    all.iter().take(all.len().saturating_sub(keep)).try_for_each(|(_, path)| discard(path))
}

/// Removes whatever has a checkpoint's name, by a rename first so that a torn removal is no checkpoint.
pub fn discard(path: &Path) -> Result<()> {
    let Ok(metadata) = path.symlink_metadata() else { return Ok(()) };
    if !metadata.is_dir() {
        return std::fs::remove_file(path).map_err(|e| Error::io(path, e));
    }
    let trash = path.with_file_name(format!(".removing-{}", name_of(path)));
    if trash.exists() {
        std::fs::remove_dir_all(&trash).map_err(|e| Error::io(&trash, e))?;
    }
    std::fs::rename(path, &trash).map_err(|e| Error::io(path, e))?;
    std::fs::remove_dir_all(&trash).map_err(|e| Error::io(&trash, e))
}
