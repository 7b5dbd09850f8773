//! What of a folder a run wrote: all that `--overwrite` removes. Files that a user put beside it stay, and so do the
//! folders and links that hold them.

use std::path::{Path, PathBuf};

use super::lock;
use super::run_folder::{CHECKPOINTS, MODEL, ORIGIN, RECIPE, RECORD, STAGES, VOCABULARY};
use crate::compress::fastest;
use crate::data::collect::CARD_FILE;
use crate::error::{Error, Result};

/// Names end in `*` where a number or a time follows.
const TOP: &[&str] =
    &["report.json", "report.md", "report.html", "report.csv", "tokenizer.json", ".write-*", ".espalier-*"];
/// What is written aside before it gets its name, or on its way out.
const TORN: &[&str] = &[".write-*", ".espalier-*", ".removing-*"];
const SAVED: &[&str] = &[
    "manifest.json",
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    VOCABULARY,
    fastest::FILE,
    "optimizer.safetensors",
    ".espalier-*",
];
const DATA: &[&str] = &[CARD_FILE, "train.tsv", "validation.tsv", "test.tsv", ".espalier-*"];
const STAGE: &[&str] = &[RECORD, ORIGIN, "metrics.jsonl", ".write-*", ".espalier-*"];
const EVENTS: &[&str] = &["events.out.tfevents.*"];
const STEPS: &[&str] = &["step-*", ".removing-*", ".espalier-*"];

/// Whether a folder holds nothing, or only what a run leaves that ended before its first file.
pub fn is_blank(folder: &Path) -> Result<bool> {
    let names = entries(folder)?;
    Ok(names.iter().all(|path| is_one_of(path, &[lock::FILE, ".write-*"])))
}

/// Whether anything was trained in a run folder: a finished stage or a checkpoint.
pub fn has_results(run: &Path) -> bool {
    entries(&run.join(STAGES)).is_ok_and(|all| all.iter().any(|s| s.join(RECORD).exists() || has_checkpoints(s)))
}

pub fn has_checkpoints(stage: &Path) -> bool {
    entries(&stage.join(CHECKPOINTS)).is_ok_and(|all| all.iter().any(|path| is_one_of(path, &["step-*"])))
}

/// Names of the finished stages of a run folder, in the order in which they ended.
pub fn finished_stages(run: &Path) -> Vec<String> {
    let time = |stage: &Path| stage.join(RECORD).metadata().and_then(|m| m.modified()).ok();
    let stages = entries(&run.join(STAGES)).unwrap_or_default();
    let mut finished: Vec<_> = stages.iter().filter_map(|s| Some((time(s)?, name(s)))).collect();
    finished.sort();
    finished.into_iter().map(|(_, name)| name).collect()
}

/// Removes what a run wrote into its folder, the recipe last: until it is gone the folder is known as a run's.
pub fn remove(run: &Path) -> Result<()> {
    for stage in entries(&run.join(STAGES))? {
        remove_training(&stage)?;
        for saved in [MODEL, "deployed"] {
            clear(&stage.join(saved), SAVED)?;
        }
        clear(&stage, STAGE)?;
    }
    clear(&run.join(STAGES), &[])?;
    clear(&run.join(MODEL), SAVED)?;
    clear(&run.join("data"), DATA)?;
    // Not with `clear`: the run's own folder stays, even when it is empty.
    for path in entries(run)?.iter().filter(|path| is_one_of(path, TOP)) {
        remove_entry(path)?;
    }
    let recipe = run.join(RECIPE);
    std::fs::remove_file(&recipe).map_err(|e| Error::io(&recipe, e))
}

/// Removes what killed processes have left half-written. For the one that holds the run's folder: no other writes there.
pub fn sweep(run: &Path) -> Result<()> {
    let mut folders = vec![run.to_path_buf(), run.join(MODEL), run.join("data")];
    for stage in entries(&run.join(STAGES))? {
        folders.extend([CHECKPOINTS, MODEL, "deployed"].map(|part| stage.join(part)));
        folders.push(stage);
    }
    for folder in folders {
        entries(&folder)?.iter().filter(|path| is_one_of(path, TORN)).try_for_each(|path| remove_entry(path))?;
    }
    Ok(())
}

/// Removes what a training wrote into its folder: the log, the events and the checkpoints.
pub fn remove_training(folder: &Path) -> Result<()> {
    clear(&folder.join(CHECKPOINTS), STEPS)?;
    clear(&folder.join("tb"), EVENTS)?;
    let log = folder.join("metrics.jsonl");
    if log.exists() { remove_entry(&log) } else { Ok(()) }
}

/// Removes a saved model's files.
pub fn remove_model(folder: &Path) -> Result<()> {
    clear(folder, SAVED)
}

/// Removes the entries of `folder` that `own` names, then the folder where nothing else is in it.
fn clear(folder: &Path, own: &[&str]) -> Result<()> {
    for path in entries(folder)?.iter().filter(|path| is_one_of(path, own)) {
        remove_entry(path)?;
    }
    // Fails where something else is in it, and on a link: both stay.
    let _ = std::fs::remove_dir(folder);
    Ok(())
}

fn remove_entry(path: &Path) -> Result<()> {
    let directory = path.symlink_metadata().is_ok_and(|m| m.is_dir());
    let removed = if directory { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    removed.map_err(|e| Error::io(path, e))
}

/// Entries of a folder; none where there is no folder.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let found = std::fs::read_dir(folder).map_err(|e| Error::io(folder, e))?;
    found.map(|entry| entry.map(|e| e.path()).map_err(|e| Error::io(folder, e))).collect()
}

fn name(path: &Path) -> String {
    path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default()
}

fn is_one_of(path: &Path, patterns: &[&str]) -> bool {
    let name = name(path);
    patterns.iter().any(|pattern| match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => name == *pattern,
    })
}
