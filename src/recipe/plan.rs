//! What a run will do (`--dry-run`) and what a report says of the machine.

mod shapes;
mod spread;

use std::path::Path;
use std::sync::Arc;

use super::check::refuse;
use super::corpus::{Corpus, tagging};
use super::order::Step;
use super::schema::{self, PruningMethod, Recipe, Training};
use super::stages::linears;
use crate::compress::pruning::fisher::{self, device_bytes};
use crate::device::{Device, Kind};
use crate::error::{Error, Result};
use crate::nn::Config;
use crate::nn::config::Size;
use crate::report::model::{Latency, Machine, RunReport};
pub use shapes::check_shapes;
pub use spread::{PlannedSpread, check_devices, plan_spread};

/// One line of a plan.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct PlannedStage {
    pub stage: String,
    pub shape: String,
    pub steps: u64,
    pub parameters: usize,
    /// Weights as stored while training, f32.
    pub bytes: usize,
    /// Weights, gradients, two moments, and activations of one micro-batch.
    pub estimated_memory: usize,
    /// How it is spread; see [`plan_spread`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pipeline: Option<PlannedSpread>,
    /// With the model's sizes and its width.
    #[serde(skip)]
    training: Option<((Size, usize), Training)>,
}

/// The stages of a recipe with their shapes; nothing is read or written.
pub fn plan(recipe: &Recipe) -> Vec<PlannedStage> {
    let teacher = (recipe.model.size(), recipe.model.heads * recipe.model.head_size);
    let mut stages = vec![planned("teacher", teacher, recipe, Some(&recipe.teacher))];
    let mut size = teacher;
    for step in recipe.steps() {
        match step {
            Step::Structure => {
                let Some(s) = &recipe.structure else { continue };
                if s.vocabulary.is_some() {
                    // How many tokens the text needs is known when it is read: at most all.
                    stages.push(planned("vocabulary", size, recipe, None));
                }
                if let Some(l0) = &s.l0 {
                    // What stays is not known before: sizes after it are the most that there can be.
                    stages.push(planned("gates", size, recipe, Some(&l0.training)));
                }
                size = (s.pruned(recipe.model.size()), s.width(recipe.model.size()));
                if s.compare_random {
                    stages.push(planned("random (baseline)", size, recipe, Some(&s.training)));
                }
                stages.push(planned("structure", size, recipe, Some(&s.training)));
            }
            Step::Sparsify => {
                let Some(s) = &recipe.sparsify else { continue };
                let mut stage = planned("sparsify", size, recipe, Some(&s.training));
                // Inverse Fisher matrices: f32 on the device, f64 beside it.
                let fisher: u64 =
                    fisher_weights(recipe, size).iter().map(|(_, n)| 3 * device_bytes(*n, s.obs.block)).sum();
                let scoring = fisher as usize + 2 * stage.bytes;
                let training = stage.estimated_memory;
                stage.estimated_memory = if s.at_once() { training.max(scoring) } else { training + fisher as usize };
                stages.push(stage);
            }
            Step::Quantize => {
                let training = recipe.quantize.as_ref().and_then(|q| q.training.as_ref());
                stages.push(planned("quantize", size, recipe, training));
            }
            Step::Experts => {
                let Some(e) = &recipe.experts else { continue };
                let mut stage = planned("experts", size, recipe, e.training.as_ref());
                let share = 100.0 * e.share;
                stage.shape = format!("{}, experts of {}, {share:.0} % per token", stage.shape, e.expert_size);
                stages.push(stage);
            }
            Step::Hybrid => {
                let Some(h) = &recipe.hybrid else { continue };
                stages.push(planned("hybrid teacher", teacher, recipe, Some(&h.teacher)));
                stages.push(planned("hybrid", size, recipe, Some(&h.student)));
            }
            Step::Tune => {
                let training = recipe.tune.as_ref().map(|t| &t.training);
                stages.push(planned("tune", size, recipe, training));
            }
        }
    }
    stages
}

/// Refuses a recipe whose largest stage does not fit into the memory of this machine: the allocator would end the process
/// in the middle of it. Devices with memory of their own say so themselves.
pub fn check_memory(recipe: &Recipe, device: &Arc<dyn Device>) -> Result<()> {
    let info = device.info();
    if let Some((s, stage)) = recipe.sparsify.as_ref().zip(plan(recipe).into_iter().find(|p| p.stage == "sparsify"))
        && let Some((size, _)) = stage.training
    {
        fisher::check_memory(info, &fisher_weights(recipe, size), s.obs.block)?;
    }
    if !(matches!(info.kind, Kind::Cpu | Kind::Reference) || info.software) {
        return Ok(());
    }
    let largest = plan(recipe).into_iter().rev().max_by_key(|stage| stage.estimated_memory);
    match (largest, physical_memory()) {
        (Some(stage), Some(memory)) if stage.estimated_memory as u64 > memory => Err(Error::OutOfMemory {
            device: format!("this machine for stage {} (an estimate; see --dry-run)", stage.stage),
            requested: stage.estimated_memory as u64,
            live: 0,
            cap: memory,
        }),
        _ => Ok(()),
    }
}

/// Weights of which OBS holds inverse Fisher matrices, with their elements, in a model of these sizes; none where gates are
/// yet to choose them.
fn fisher_weights(recipe: &Recipe, (size, width): (Size, usize)) -> Vec<(String, usize)> {
    let gated = recipe.structure.as_ref().is_some_and(|s| s.l0.is_some());
    let Some(s) = recipe.sparsify.as_ref().filter(|s| s.method == PruningMethod::Obs && !gated) else {
        return Vec::new();
    };
    let config = Config { width, ..recipe.model.config(size, recipe.data.vocabulary, &[]) };
    let pruned: Vec<String> = linears(&config, &s.linears).iter().map(|linear| format!("{linear}.weight")).collect();
    let weights = config.parameters().into_iter().filter(|(name, _)| pruned.contains(name));
    weights.map(|(name, dims)| (name, dims.iter().product())).collect()
}

/// Refuses a recipe that names files and folders which are not there: its stages would find out after hours.
pub fn check_files(recipe: &Recipe) -> Result<()> {
    let missing = |key: &str, path: &Path, what: &str| {
        refuse(key, format!("\"{}\"", path.display()), format!("{what}; there is none"))
    };
    match &recipe.data.corpus {
        schema::Corpus::Folder { path } => {
            let files = ["train.tsv", "validation.tsv", "test.tsv"].map(|name| Path::new(path).join(name));
            if let Some(file) = files.iter().find(|file| !file.is_file()) {
                return missing("data.corpus.folder.path", file, "a folder with this file");
            }
        }
        schema::Corpus::Catalogs { root } if !Path::new(root).is_dir() => {
            return missing("data.corpus.catalogs.root", Path::new(root), "a folder");
        }
        _ => {}
    }
    let Some(structure) = &recipe.structure else { return Ok(()) };
    let text = structure.vocabulary.as_ref().and_then(|vocabulary| vocabulary.text.as_ref());
    let table = structure.l0.as_ref().and_then(|l0| l0.table.as_ref());
    for (key, path) in [("structure.vocabulary.text", text), ("structure.l0.table", table)] {
        if let Some(path) = path.map(Path::new).filter(|path| !path.is_file()) {
            return missing(key, path, "a file");
        }
    }
    Ok(())
}

/// Bytes of physical memory, where the system tells.
pub fn physical_memory() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("MemTotal:"))?;
    Some(1024 * line.trim().split(' ').next()?.parse::<u64>().ok()?)
}

fn planned(name: &str, (size, width): (Size, usize), recipe: &Recipe, training: Option<&Training>) -> PlannedStage {
    let labels = tagging::labels().unwrap_or_default();
    let config = Config { width, ..recipe.model.config(size, recipe.data.vocabulary, &labels) };
    let parameters: usize = config.parameters().iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
    let tokens = training.map_or(0, |t| t.batch * recipe.data.max_length);
    // Backward holds as much again at its peak.
    let per_token = per_token(size, config.width, config.blocks.len()) + 4 * config.width;
    let training_state = if training.is_some() { 3 * parameters } else { 0 };
    PlannedStage {
        stage: name.into(),
        shape: format!("{} layers, {} heads x {}, ffn {}", size.layers, size.heads, size.head_size, size.ffn_width),
        steps: training.map_or(0, |t| t.steps),
        parameters,
        bytes: 4 * parameters,
        estimated_memory: 4 * (parameters + training_state + 2 * tokens * per_token),
        pipeline: None,
        training: training.map(|training| ((size, width), *training)),
    }
}

/// Values that so many blocks hold of a token: norms, residuals, q, k, v, context and projections (about 10 widths) and the
/// FFN's hidden layer.
fn per_token(size: Size, width: usize, blocks: usize) -> usize {
    blocks * (10 * width + 2 * size.ffn_width)
}

/// The machine block of a report.
pub fn machine(device: &Arc<dyn Device>, corpus: &Corpus) -> Machine {
    let info = device.info();
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str| {
        let line = text.lines().find(|l| l.starts_with(key)).and_then(|l| l.split_once(':'));
        line.map(|(_, value)| value.trim().to_string())
    };
    Machine {
        device: format!("{}: {}", info.id, info.name),
        driver: info.driver.clone(),
        software: info.software,
        processor: field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.into()),
        cores: std::thread::available_parallelism().map_or(1, |n| n.get() as u32),
        memory_bytes: physical_memory().unwrap_or(0),
        system: field(&read("/etc/os-release").replace('=', ":"), "PRETTY_NAME")
            .map_or_else(|| std::env::consts::OS.into(), |n| n.trim_matches('"').to_string()),
        versions: vec![("espalier".into(), env!("CARGO_PKG_VERSION").into())],
        hashes: vec![("text".into(), corpus.hash.clone()), ("tokenizer".into(), corpus.tokenizer.hash().into())],
    }
}

/// One sentence: what was kept and what was won.
pub fn summary(report: &RunReport) -> String {
    let Some((teacher, Some(student))) = report.ends() else {
        return "A teacher was trained; nothing was compressed.".into();
    };
    let ratio = teacher.activated_bytes as f64 / student.activated_bytes.max(1) as f64;
    let retained = student.retained.map_or("an unknown share".into(), |r| format!("{:.1} %", 100.0 * r));
    let tuned = report.stages.iter().find(|s| s.name == "hybrid-teacher").and_then(|t| t.token_accuracy);
    let tuned = tuned.zip(student.token_accuracy).filter(|(t, _)| *t > 0.0);
    let tuned = tuned.map_or(String::new(), |(t, s)| format!(" ({:.1} % of the tuned teacher's)", 100.0 * s / t));
    if student.activated_bytes == 0 {
        return format!("Nothing is left of attention and FFNs; {retained} of the teacher's token accuracy is.");
    }
    // A teacher of another run may have been timed for other sizes.
    let both = student.latency.iter().find_map(|s| {
        let same = |t: &&Latency| (t.batch, t.length) == (s.batch, s.length);
        teacher.latency.iter().find(same).map(|t| (t, s))
    });
    let speed = both.map_or(String::new(), |(t, s)| {
        format!(" and its forward pass takes {:.2}x the teacher's time at batch {}", s.p50_ms / t.p50_ms, s.batch)
    });
    let bytes = if ratio < 1.0 { format!("{:.1}x more", 1.0 / ratio) } else { format!("{ratio:.1}x fewer") };
    format!(
        "The compressed model keeps {retained} of the teacher's token accuracy{tuned} with {bytes} activated bytes \
         (attention and FFN weights that one token touches, as stored; the teacher's are f32){speed}."
    )
}

/// Now as RFC 3339 text in UTC.
pub fn now() -> String {
    let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    rfc3339(seconds)
}

/// Days to a civil date (Hinnant's algorithm).
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = ((seconds / 86_400) as i64 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", rest / 3600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_795_132_800), "2026-11-20T00:00:00Z");
    }

    #[test]
    fn the_quick_plan_shrinks() {
        let recipe = Recipe::load(None, &[]).unwrap();
        let stages = plan(&recipe);
        let find = |name: &str| stages.iter().find(|s| s.stage == name).unwrap();
        assert!(find("structure").parameters < find("teacher").parameters);
    }

    #[test]
    fn inverse_fisher_matrices_are_planned() {
        let memory = |sets: &[&str]| {
            let sets: Vec<String> = sets.iter().map(|s| s.to_string()).collect();
            let stages = plan(&Recipe::load(None, &sets).unwrap());
            stages.iter().find(|s| s.stage == "sparsify").unwrap().estimated_memory
        };
        // While masks grow the matrices are there beside the training, for 12 bytes each element.
        let grown = ["sparsify.pattern=unstructured", "sparsify.linears=[\"blocks.0.ffn.in\"]"];
        let weights = 384 * 96;
        let obs = memory(&[&grown[..], &["sparsify.method=obs"]].concat());
        assert_eq!(obs - memory(&grown), 12 * 64 * weights);
        assert!(memory(&["sparsify.method=obs", "sparsify.obs.block=128"]) >= 12 * 128 * weights);
    }
}
