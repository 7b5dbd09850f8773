//! `espalier run`: the stages of a recipe in order, each resumable, each measured, each holding what it promised.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::corpus::{Corpus, Narrowed};
use super::evaluate::evaluate;
use super::order::Step;
use super::promises::{self, Pruned};
use super::run_folder::{Origin, RunFolder, StageRecord, State, VOCABULARY, fingerprint};
use super::schema::Recipe;
use super::source::teacher_cache;
use super::stages::{self, Context, Outcome, Student};
use crate::compress::fastest::{self, Measured};
use crate::compress::freeze::deployable;
use crate::console;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::ways::dense_weight;
use crate::nn::{Model, Pass};
use crate::pipeline::post::Post;
use crate::report::model::{self as report, RunReport};
use crate::train::lifecycle::Invariant;
use crate::train::store;

/// How a run is carried out.
pub struct Options {
    pub out: PathBuf,
    pub overwrite: bool,
    /// Folders of other runs: their finished stages of the same settings, text and predecessors are taken, not done again.
    pub reuse: Vec<PathBuf>,
    pub progress: bool,
    /// The command line, for the report.
    pub command: String,
    /// The processes of this run, where there are several.
    pub ranks: Option<Arc<Post>>,
}

/// A run on its way.
pub(super) struct Flow<'a> {
    pub(super) recipe: &'a Recipe,
    pub(super) corpus: &'a Corpus,
    folder: RunFolder,
    pub(super) device: Arc<dyn Device>,
    options: &'a Options,
    report: RunReport,
    /// Files that stand beside every saved model: the tokenizer, and the map of a smaller vocabulary.
    beside: Vec<(&'static str, Vec<u8>)>,
    /// Spent in earlier sessions on what the report shows.
    earlier_seconds: f64,
    pruned: Pruned,
}

/// Runs a recipe and returns the path of its report.
pub fn run(recipe: &Recipe, device: &Arc<dyn Device>, options: &Options) -> Result<PathBuf> {
    let started = Instant::now();
    super::plan::check_memory(recipe, device)?;
    super::plan::check_files(recipe)?;
    super::plan::check_shapes(recipe)?;
    let ranks = options.ranks.as_ref().map(|post| post.ranks()).filter(|ranks| *ranks > 1);
    super::plan::check_devices(recipe, device, ranks)?;
    let resolved = recipe.to_toml()?;
    let folder = RunFolder::open(&options.out, &resolved, options.overwrite)?;
    say(options, format!("run folder {}  device {} ({})", folder.path.display(), device.info().id, device.info().name));
    let corpus = Corpus::prepare(recipe, &folder.path)?;
    corpus.notes.iter().for_each(|n| say(options, n));
    let path = folder.path.join("tokenizer.json");
    corpus.tokenizer.save(&path)?;
    let tokenizer = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let report = RunReport {
        version: report::VERSION,
        title: format!("Espalier run: {}", recipe.name),
        machine: super::plan::machine(device, &corpus),
        recipe: resolved,
        notes: corpus.notes.clone(),
        reproduce: options.command.clone(),
        ..RunReport::default()
    };
    let device = device.clone();
    let mut flow = Flow {
        recipe,
        corpus: &corpus,
        folder,
        device,
        options,
        report,
        beside: vec![("tokenizer.json", tokenizer)],
        earlier_seconds: 0.0,
        pruned: Pruned::default(),
    };
    flow.stages()?;
    flow.report.seconds = flow.earlier_seconds + started.elapsed().as_secs_f64();
    if flow.earlier_seconds > 0.0 {
        flow.report.notes.push("the run was resumed: times are summed over its sessions".into());
    }
    flow.write_report()
}

fn say(options: &Options, text: impl std::fmt::Display) {
    if options.progress {
        console::tell(text);
    }
}

impl<'a> Flow<'a> {
    fn stages(&mut self) -> Result<()> {
        let teacher = stages::teacher::run(self)?;
        let all = (0..teacher.model.config.width).collect();
        let student = Student {
            model: teacher.model.duplicate()?,
            state: State { kept: all, ..State::default() },
            fingerprint: teacher.fingerprint.clone(),
            measured: teacher.measured.clone(),
        };
        let steps = self.recipe.steps();
        let student = self.follow(&steps, &teacher, student)?;
        self.deploy(&student)
    }

    /// Takes the student through the stages. Those after hybrid tuning listen to the tuned teacher: the other would take
    /// back what the student learned there.
    fn follow(&mut self, steps: &[Step], teacher: &Student, mut student: Student) -> Result<Student> {
        let recipe = self.recipe;
        let cache = teacher_cache(&teacher.model, self.corpus);
        for (i, step) in steps.iter().enumerate() {
            let corpus = self.corpus;
            if let (Step::Structure, Some(narrowed)) = (step, &corpus.narrowed) {
                // From here on teacher and students share the smaller vocabulary.
                let (teacher, student) = stages::vocabulary::run(self, narrowed, teacher, &student)?;
                return self.follow(&steps[i..], &teacher, student);
            }
            student = match step {
                Step::Structure => stages::structure::run(self, section(step, &recipe.structure)?, &student, &cache)?,
                Step::Sparsify => stages::sparsify::run(self, section(step, &recipe.sparsify)?, &student, &cache)?,
                Step::Quantize => stages::quantize::run(self, section(step, &recipe.quantize)?, &student, &cache)?,
                Step::Experts => stages::experts::run(self, section(step, &recipe.experts)?, &student, &cache)?,
                Step::Tune => stages::tune::run(self, section(step, &recipe.tune)?, &student, &cache)?,
                Step::Hybrid => {
                    let settings = section(step, &recipe.hybrid)?;
                    let (tuned, student) = stages::hybrid::run(self, settings, teacher, &student)?;
                    return self.follow(&steps[i + 1..], &tuned, student);
                }
            };
        }
        Ok(student)
    }

    /// Goes on with text in fewer tokens.
    pub(super) fn narrow(&mut self, narrowed: &'a Narrowed) -> Result<()> {
        let json = |e: serde_json::Error| Error::io(VOCABULARY, e.into());
        let tokenizer = narrowed.corpus.tokenizer.to_json(Path::new("tokenizer.json"))?;
        let map = serde_json::to_vec(&narrowed.map).map_err(json)?;
        self.beside = vec![("tokenizer.json", tokenizer.into_bytes()), (VOCABULARY, map)];
        self.corpus = &narrowed.corpus;
        Ok(())
    }

    /// Runs a stage, or takes it from the folder when it was finished under the same fingerprint.
    pub(super) fn stage(
        &mut self,
        name: &str,
        parts: &[&str],
        baseline: bool,
        work: impl FnOnce(&Context) -> Result<Outcome>,
    ) -> Result<Student> {
        let arithmetic = self.device.info().arithmetic();
        let key = [parts, &[arithmetic.as_str(), env!("CARGO_PKG_VERSION")]].concat();
        let fingerprint = fingerprint(&key);
        if let Some((record, model)) = self.folder.finished(name, &fingerprint, &self.device)?
            && record.row.invariants.iter().all(|i| i.ok)
        {
            say(self.options, format!("{name}: finished before, taken from the run folder"));
            self.earlier_seconds += record.row.seconds.unwrap_or(0.0);
            self.adopt(&record);
            self.remember(&model, &record.state, baseline)?;
            return Ok(Student { model, state: record.state, fingerprint, measured: record.measured });
        }
        if let Some(student) = self.reuse(name, &fingerprint, baseline)? {
            return Ok(student);
        }
        let path = self.folder.stage(name)?;
        let corpus = self.corpus;
        let origin = Origin { fingerprint: fingerprint.clone(), device: arithmetic, text: corpus.hash.clone() };
        if let Some(reason) = self.folder.claim(&path, &origin)? {
            // Said even to a quiet run: work that was done is done again.
            console::warn(format_args!("{reason}: stage {name} starts anew"));
        }
        let progress = self.options.progress;
        let ranks = self.options.ranks.as_ref();
        let context = Context { recipe: self.recipe, corpus, folder: &path, name, progress, ranks };
        let started = Instant::now();
        let mut outcome = work(&context).map_err(|error| in_stage(error, name))?;
        let deployed = deployable(&outcome.model, outcome.state.form())?;
        let (mut row, measured) = self.measured(&deployed, name)?;
        outcome.notes.extend(measured.iter().flat_map(|measured| fastest::notes(&measured.choices)));
        let earlier = self.report.stages.iter().rev().find(|stage| !stage.baseline && stage.name != "hybrid-teacher");
        if let Some(stage) =
            earlier.filter(|s| !baseline && name != "hybrid-teacher" && s.activated_bytes < row.activated_bytes)
        {
            let (now, before) = (row.activated_bytes, stage.activated_bytes);
            outcome.notes.push(format!("activated bytes grew: {now} after {before} of {}", stage.name));
        }
        let before = (!baseline).then_some(&self.pruned);
        let state = (&outcome.model, &outcome.state);
        outcome.invariants.extend(promises::checked(corpus, state, &deployed, before)?);
        outcome.invariants.push(self.reloads(&path.join("deployed"), name, (&deployed, measured.as_ref()))?);
        row.baseline = baseline;
        row.seconds = Some(outcome.earlier_seconds + started.elapsed().as_secs_f64());
        self.earlier_seconds += outcome.earlier_seconds;
        row.sparsity = sparsity(&outcome.model)?;
        row.invariants = outcome.invariants.iter().map(as_reported).collect();
        // Before anything is recorded: a stage that broke its promise is not finished.
        if let Some(broken) = outcome.invariants.iter().find(|i| !i.holds) {
            let (rule, measured) = (broken.rule.clone(), broken.measured.clone());
            return Err(Error::Invariant { stage: name.into(), rule, measured });
        }
        let record = StageRecord {
            fingerprint: fingerprint.clone(),
            row,
            curves: outcome.curves,
            notes: outcome.notes,
            state: outcome.state.clone(),
            measured: measured.clone(),
        };
        self.folder.finish(name, &record, &outcome.model, &self.beside)?;
        self.adopt(&record);
        self.remember(&outcome.model, &outcome.state, baseline)?;
        Ok(Student { model: outcome.model, state: outcome.state, fingerprint, measured })
    }

    /// A stage that another run finished under the same fingerprint, as this run's own.
    fn reuse(&mut self, name: &str, fingerprint: &str, baseline: bool) -> Result<Option<Student>> {
        let options = self.options;
        for run in &options.reuse {
            let Some((record, model)) = self.folder.finished_elsewhere(run, name, fingerprint, &self.device)? else {
                continue;
            };
            let deployed = deployable(&model, record.state.form())?;
            self.save_deployed(
                &self.folder.stage(name)?.join("deployed"),
                name,
                (&deployed, record.measured.as_ref()),
            )?;
            self.folder.finish(name, &record, &model, &self.beside)?;
            say(options, format!("{name}: taken from {}", run.display()));
            self.earlier_seconds += record.row.seconds.unwrap_or(0.0);
            self.adopt(&record);
            self.remember(&model, &record.state, baseline)?;
            let fingerprint = fingerprint.to_string();
            return Ok(Some(Student { model, state: record.state, fingerprint, measured: record.measured }));
        }
        Ok(None)
    }

    /// Keeps in mind what the next stages may not bring back.
    fn remember(&mut self, model: &Model, state: &State, baseline: bool) -> Result<()> {
        if !baseline {
            self.pruned = Pruned::of(model, state)?;
        }
        Ok(())
    }

    /// What was pruned before goes by other names or sizes from here on.
    pub(super) fn forget(&mut self) {
        self.pruned = Pruned::default();
    }

    fn adopt(&mut self, record: &StageRecord) {
        let row = &record.row;
        say(
            self.options,
            format!(
                "{:<12} token accuracy {:.4}  validation loss {:.4}  activated {:.1} KiB  {:.0} s",
                row.name,
                row.token_accuracy.unwrap_or(f64::NAN),
                row.validation_loss.unwrap_or(f64::NAN),
                row.activated_bytes as f64 / 1024.0,
                row.seconds.unwrap_or(0.0)
            ),
        );
        record.notes.iter().for_each(|n| say(self.options, n));
        self.report.stages.push(row.clone());
        self.report.curves.extend(record.curves.iter().cloned());
        self.report.notes.extend(record.notes.iter().map(|n| format!("{}: {n}", row.name)));
    }

    /// A deployed model's row of the report, and on what its layers run fastest, where the recipe lets that be measured.
    fn measured(&self, deployed: &Model, name: &str) -> Result<(report::StageRow, Option<Measured>)> {
        let settings = &self.recipe.evaluate;
        if !settings.fastest {
            return Ok((evaluate(deployed, self.corpus, settings, name)?, None));
        }
        let (rows, text) = (settings.rows(deployed.config.max_positions), stages::probe(self.corpus, deployed)?);
        let (fast, measured) = fastest::fastest(deployed, &rows, "", &text)?;
        Ok((evaluate(&fast, self.corpus, settings, name)?, Some(measured)))
    }

    /// Saves a model in its deployable form, loads it again and holds both against each other.
    fn reloads(&self, path: &Path, stage: &str, (model, measured): (&Model, Option<&Measured>)) -> Result<Invariant> {
        self.save_deployed(path, stage, (model, measured))?;
        let reloaded = store::load_model(path, &self.device)?;
        let probe = stages::probe(self.corpus, model)?;
        let mut logits = Vec::new();
        for model in [model, &reloaded] {
            let mut pass = Pass::inference(model);
            let hidden = pass.hidden(&probe)?;
            logits.push(pass.logits(&hidden)?.tensor.to_bytes()?);
        }
        let holds = logits[0] == logits[1];
        Ok(Invariant {
            rule: "the saved model reloads and gives the same logits".into(),
            measured: if holds { "equal to the bit".into() } else { "different".into() },
            holds,
        })
    }

    /// A model in its deployable form, with what its layers run on here.
    fn save_deployed(&self, path: &Path, stage: &str, (model, measured): (&Model, Option<&Measured>)) -> Result<()> {
        let mut beside = self.beside.clone();
        beside.extend(measured.map(fastest::file).transpose()?.flatten());
        self.folder.save_model(path, stage, model, &beside)
    }

    /// The run's result: the last stage's model in its deployable form.
    fn deploy(&mut self, student: &Student) -> Result<()> {
        let model = deployable(&student.model, student.state.form())?;
        let path = self.folder.path.join("model");
        self.save_deployed(&path, "deployed", (&model, student.measured.as_ref()))
    }

    fn write_report(mut self) -> Result<PathBuf> {
        self.report.finished = super::plan::now();
        self.report.set_retained();
        self.report.summary = super::plan::summary(&self.report);
        let [_, _, html, _] = crate::report::write(&self.folder.path, &self.report)?;
        Ok(html)
    }
}

/// What is not finite is looked for in a stage's training: its name comes before the layer's.
fn in_stage(error: Error, stage: &str) -> Error {
    match error {
        Error::NonFinite { step, layer, tensor, count, index } => {
            Error::NonFinite { step, layer: format!("stage {stage}: {layer}"), tensor, count, index }
        }
        other => other,
    }
}

/// Settings of a stage.
fn section<'r, T>(step: &Step, settings: &'r Option<T>) -> Result<&'r T> {
    settings.as_ref().ok_or_else(|| Error::Recipe {
        key: step.name().into(),
        value: "nothing".into(),
        allowed: "a table of this name".into(),
    })
}

fn as_reported(invariant: &Invariant) -> report::Invariant {
    report::Invariant { name: invariant.rule.clone(), measured: invariant.measured.clone(), ok: invariant.holds }
}

/// Share of zeros of every weight matrix of the blocks, in whatever form it is stored.
fn sparsity(model: &Model) -> Result<Vec<(String, f64)>> {
    let forms = [".weight", ".int8", ".int4", ".values", ".kept"];
    let blocks = model.tensors.iter().filter(|(name, _)| name.starts_with("blocks.") && !name.contains(".router."));
    blocks
        .filter(|(name, tensor)| tensor.dims().len() > 1 || name.ends_with(".kept"))
        .filter_map(|(name, _)| forms.iter().find_map(|form| name.strip_suffix(form)))
        .map(|name| {
            let values = dense_weight(model, name)?.to_vec::<f32>()?;
            let zeros = values.iter().filter(|&&w| w == 0.0).count();
            Ok((name.to_string(), zeros as f64 / values.len().max(1) as f64))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_finite_names_its_stage() {
        let (layer, tensor) = ("blocks.0.ffn.in".to_string(), "gradient of weight".to_string());
        let error = in_stage(Error::NonFinite { step: 7, layer, tensor, count: 1, index: 0 }, "sparsify").to_string();
        assert!(error.starts_with("step 7: stage sparsify: blocks.0.ffn.in: gradient of weight"), "{error}");
    }
}
