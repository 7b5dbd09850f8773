//! `espalier run`: the stages of a recipe in order, each resumable, each measured, each holding what it promised.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::corpus::Corpus;
use super::evaluate::evaluate;
use super::run_folder::{Origin, RunFolder, StageRecord, State, fingerprint};
use super::schema::{Mask, Recipe, Selection};
use super::source::{Draw, teacher_cache};
use super::stages::{self, Context, Objective};
use crate::compress::freeze::freeze;
use crate::compress::teacher::TeacherCache;
use crate::console;
use crate::data::mixture;
use crate::device::Device;
use crate::error::{Error, Result};
use crate::nn::{Config, Model, Pass};
use crate::pipeline::post::Post;
use crate::report::model::{self as report, LossCurve, RunReport};
use crate::train::lifecycle::Invariant;
use crate::train::store;
use crate::train::trainer::Summary;

/// How a run is carried out.
pub struct Options {
    pub out: PathBuf,
    pub overwrite: bool,
    pub progress: bool,
    /// The command line, for the report.
    pub command: String,
    /// The processes of this run, where there are several.
    pub ranks: Option<Arc<Post>>,
}

/// A student on its way through the stages.
struct Student {
    model: Model,
    state: State,
    fingerprint: String,
}

/// What a stage's work gives.
struct Outcome {
    model: Model,
    state: State,
    curves: Vec<LossCurve>,
    notes: Vec<String>,
    invariants: Vec<Invariant>,
    /// Of sessions that stopped before this stage was finished.
    earlier_seconds: f64,
}

struct Flow<'a> {
    recipe: &'a Recipe,
    corpus: &'a Corpus,
    folder: RunFolder,
    device: Arc<dyn Device>,
    options: &'a Options,
    report: RunReport,
    tokenizer: Vec<u8>,
    /// Spent in earlier sessions on what the report shows.
    earlier_seconds: f64,
}

/// Runs a recipe and returns the path of its report.
pub fn run(recipe: &Recipe, device: &Arc<dyn Device>, options: &Options) -> Result<PathBuf> {
    let started = Instant::now();
    super::plan::check_memory(recipe, device)?;
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
    let mut flow = Flow { recipe, corpus: &corpus, folder, device, options, report, tokenizer, earlier_seconds: 0.0 };
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

impl Flow<'_> {
    fn stages(&mut self) -> Result<()> {
        let recipe = self.recipe;
        let teacher = self.teacher()?;
        let all: Vec<usize> = (0..teacher.model.config.width).collect();
        let cache = teacher_cache(&teacher.model, self.corpus);
        let mut student = Student {
            model: teacher.model.duplicate()?,
            state: State { kept: all, ..State::default() },
            fingerprint: teacher.fingerprint.clone(),
        };
        if let Some(settings) = &recipe.structure {
            if settings.compare_random && settings.selection == Selection::Importance {
                self.structure(&student, &cache, true)?;
            }
            student = self.structure(&student, &cache, settings.selection == Selection::Random)?;
        }
        if recipe.sparsify.is_some() {
            student = self.sparsify(&student, &cache)?;
        }
        if recipe.quantize.is_some() {
            student = self.quantize(&student, &cache)?;
        }
        if recipe.experts.is_some() {
            student = self.experts(&student)?;
        }
        if recipe.hybrid.is_some() {
            student = self.hybrid(&teacher, &student)?;
        }
        self.deploy(&student)?;
        Ok(())
    }

    /// Runs a stage, or takes it from the folder when it was finished under the same fingerprint.
    fn stage(
        &mut self,
        name: &str,
        parts: &[&str],
        baseline: bool,
        work: impl FnOnce(&Context) -> Result<Outcome>,
    ) -> Result<(Model, State, String)> {
        let arithmetic = self.device.info().arithmetic();
        let key = [parts, &[arithmetic.as_str(), env!("CARGO_PKG_VERSION")]].concat();
        let fingerprint = fingerprint(&key);
        if let Some((record, model)) = self.folder.finished(name, &fingerprint, &self.device)?
            && record.row.invariants.iter().all(|i| i.ok)
        {
            say(self.options, format!("{name}: finished before, taken from the run folder"));
            self.earlier_seconds += record.row.seconds.unwrap_or(0.0);
            self.adopt(&record);
            return Ok((model, record.state, fingerprint));
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
        let mut outcome = work(&context)?;
        let deployed = freeze(&outcome.model, outcome.state.form())?;
        let mut row = evaluate(&deployed, corpus, &self.recipe.evaluate, name)?;
        outcome.invariants.extend(stages::invariants(&outcome.model, &outcome.state)?);
        outcome.invariants.push(self.reloads(&path.join("deployed"), name, &deployed)?);
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
        };
        self.folder.finish(name, &record, &outcome.model, &[("tokenizer.json", self.tokenizer.clone())])?;
        self.adopt(&record);
        Ok((outcome.model, outcome.state, fingerprint))
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

    fn teacher(&mut self) -> Result<Student> {
        let (recipe, corpus) = (self.recipe, self.corpus);
        let device = self.device.clone();
        let parts = [text(&recipe.data)?, text(&recipe.model)?, text(&recipe.teacher)?, recipe.seed.to_string()];
        let parts: Vec<&str> =
            parts.iter().map(String::as_str).chain([corpus.tokenizer.hash(), &corpus.hash]).collect();
        let (model, state, fingerprint) = self.stage("teacher", &parts, false, |context| {
            let config = Config::glm(recipe.model, corpus.tokenizer.vocabulary());
            let mut model = Model::init(config, &device, recipe.seed)?;
            let draw = Draw::mixed(corpus, &recipe.teacher, recipe.seed, recipe.data.max_length)?;
            let objective = Objective { draw, gold: 1.0, soft_on_target: false, teacher: None };
            let summary = stages::fit(context, &mut model, &State::default(), &recipe.teacher, objective)?;
            Ok(trained(context.name, model, State::default(), summary))
        })?;
        Ok(Student { model, state, fingerprint })
    }

    fn structure(&mut self, student: &Student, cache: &TeacherCache, random: bool) -> Result<Student> {
        let recipe = self.recipe;
        let Some(settings) = &recipe.structure else {
            return Err(missing("structure"));
        };
        let corpus = self.corpus;
        let name = if random { "random" } else { "structure" };
        let parts = [&student.fingerprint, &text(settings)?, name];
        let (model, state, fingerprint) = self.stage(name, &parts, random, |context| {
            let keep = stages::choose(context, cache.teacher(), settings, random)?;
            let state = State { kept: keep.channels.clone(), ..State::default() };
            let mut model = crate::compress::structure::prune(cache.teacher(), &keep)?;
            let draw = Draw::mixed(corpus, &settings.training, recipe.seed, recipe.data.max_length)?;
            // The random baseline learns from the labels alone, as the papers' does.
            let teacher = if random {
                None
            } else {
                Some((cache, stages::distillation(&model, cache.teacher(), &keep.channels, &settings.distil)?))
            };
            let gold = if random { 1.0 } else { settings.distil.gold };
            let objective = Objective { draw, gold, soft_on_target: false, teacher };
            let summary = stages::fit(context, &mut model, &state, &settings.training, objective)?;
            let kept: Vec<usize> = keep.blocks.iter().map(|b| b.index).collect();
            let mut outcome = trained(context.name, model, state, summary);
            outcome.notes.push(format!("blocks kept {kept:?}, {} of {} channels", keep.channels.len(), cache.width()));
            Ok(outcome)
        })?;
        Ok(Student { model, state, fingerprint })
    }

    fn sparsify(&mut self, student: &Student, cache: &TeacherCache) -> Result<Student> {
        let recipe = self.recipe;
        let Some(settings) = &recipe.sparsify else {
            return Err(missing("sparsify"));
        };
        let corpus = self.corpus;
        let parts = [&student.fingerprint, &text(settings)?, "sparsify"];
        let (model, state, fingerprint) = self.stage("sparsify", &parts, false, |context| {
            let mut model = student.model.duplicate()?;
            let chosen = stages::linears(&model.config, &settings.linears);
            let sparse = crate::compress::sparsify::prunable(&model, &chosen);
            let state =
                State { sparse, two_dimensional: settings.mask == Mask::TwoDimensional, ..student.state.clone() };
            let draw = Draw::mixed(corpus, &settings.training, recipe.seed ^ 2, recipe.data.max_length)?;
            let distillation = stages::distillation(&model, cache.teacher(), &student.state.kept, &settings.distil)?;
            let objective = Objective {
                draw,
                gold: settings.distil.gold,
                soft_on_target: false,
                teacher: Some((cache, distillation)),
            };
            let summary = stages::fit(context, &mut model, &state, &settings.training, objective)?;
            Ok(trained(context.name, model, state, summary))
        })?;
        Ok(Student { model, state, fingerprint })
    }

    fn quantize(&mut self, student: &Student, cache: &TeacherCache) -> Result<Student> {
        let recipe = self.recipe;
        let Some(settings) = &recipe.quantize else {
            return Err(missing("quantize"));
        };
        let corpus = self.corpus;
        let parts = [&student.fingerprint, &text(settings)?, "quantize"];
        let (model, state, fingerprint) = self.stage("quantize", &parts, false, |context| {
            let mut model = student.model.duplicate()?;
            let state = State { int8: stages::linears(&model.config, &[]), ..student.state.clone() };
            let draw = Draw::mixed(corpus, &settings.training, recipe.seed ^ 3, recipe.data.max_length)?;
            let distillation = stages::distillation(&model, cache.teacher(), &student.state.kept, &settings.distil)?;
            let objective = Objective {
                draw,
                gold: settings.distil.gold,
                soft_on_target: false,
                teacher: Some((cache, distillation)),
            };
            let summary = stages::fit(context, &mut model, &state, &settings.training, objective)?;
            Ok(trained(context.name, model, state, summary))
        })?;
        Ok(Student { model, state, fingerprint })
    }

    fn experts(&mut self, student: &Student) -> Result<Student> {
        let Some(settings) = &self.recipe.experts else {
            return Err(missing("experts"));
        };
        let parts = [&student.fingerprint, &text(settings)?, "experts"];
        let (model, state, fingerprint) = self.stage("experts", &parts, false, |context| {
            let (model, state, mut notes, invariants) =
                stages::moefy(context, &student.model, &student.state, settings)?;
            if !state.sparse.is_empty() {
                notes.push("expert weights keep their 2:4 zeros but run on the dense grouped kernels".into());
            }
            Ok(Outcome { model, state, curves: Vec::new(), notes, invariants, earlier_seconds: 0.0 })
        })?;
        Ok(Student { model, state, fingerprint })
    }

    fn hybrid(&mut self, teacher: &Student, student: &Student) -> Result<Student> {
        let Some(settings) = &self.recipe.hybrid else {
            return Err(missing("hybrid"));
        };
        let corpus = self.corpus;
        let (n_s, n_d) = (corpus.source.examples.len(), corpus.target.examples.len());
        let alpha = match settings.alpha {
            Some(alpha) => alpha,
            None => mixture::alpha(n_s, n_d, settings.stream_weights.0, settings.stream_weights.1)?,
        };
        let settings_text = text(settings)?;
        let parts = [&teacher.fingerprint, &settings_text, "hybrid teacher"];
        let (tuned, _, tuned_print) = self.stage("hybrid-teacher", &parts, true, |context| {
            let mut model = teacher.model.duplicate()?;
            let objective = stages::hybrid_teacher(context, settings, alpha)?;
            let summary = stages::fit(context, &mut model, &State::default(), &settings.teacher, objective)?;
            let mut outcome = trained(context.name, model, State::default(), summary);
            outcome.notes.push(format!("alpha {alpha:.4} from {n_s} and {n_d} examples (Eq 11)"));
            Ok(outcome)
        })?;
        let cache = teacher_cache(&tuned, corpus);
        let parts = [&student.fingerprint, &tuned_print, &settings_text, "hybrid"];
        let (model, state, fingerprint) = self.stage("hybrid", &parts, false, |context| {
            let mut model = student.model.duplicate()?;
            let objective = stages::hybrid_student(context, &model, &cache, settings, alpha)?;
            let summary = stages::fit(context, &mut model, &student.state, &settings.student, objective)?;
            Ok(trained(context.name, model, student.state.clone(), summary))
        })?;
        Ok(Student { model, state, fingerprint })
    }

    /// Saves a model in its deployable form, loads it again and holds both against each other.
    fn reloads(&self, path: &Path, stage: &str, model: &Model) -> Result<Invariant> {
        self.folder.save_model(path, stage, model, &[("tokenizer.json", self.tokenizer.clone())])?;
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

    /// The run's result: the last stage's model in its deployable form.
    fn deploy(&mut self, student: &Student) -> Result<()> {
        let model = freeze(&student.model, student.state.form())?;
        let path = self.folder.path.join("model");
        self.folder.save_model(&path, "deployed", &model, &[("tokenizer.json", self.tokenizer.clone())])
    }

    fn write_report(mut self) -> Result<PathBuf> {
        self.report.finished = super::plan::now();
        self.report.set_retained();
        self.report.summary = super::plan::summary(&self.report);
        let [_, _, html, _] = crate::report::write(&self.folder.path, &self.report)?;
        Ok(html)
    }
}

fn missing(stage: &str) -> Error {
    Error::Recipe { key: stage.into(), value: "nothing".into(), allowed: "a table of this name".into() }
}

/// A part of the recipe as text, for fingerprints.
fn text(part: &impl serde::Serialize) -> Result<String> {
    toml::to_string(part).map_err(|e| Error::file("recipe", "serialisation", e))
}

fn trained(name: &str, model: Model, state: State, summary: Summary) -> Outcome {
    let curve = LossCurve { stage: name.into(), unit: "nats/token".into(), points: summary.curve };
    let earlier_seconds = summary.earlier_seconds;
    Outcome { model, state, curves: vec![curve], notes: Vec::new(), invariants: Vec::new(), earlier_seconds }
}

fn as_reported(invariant: &Invariant) -> report::Invariant {
    report::Invariant { name: invariant.rule.clone(), measured: invariant.measured.clone(), ok: invariant.holds }
}

/// Share of zeros of every weight matrix of the blocks.
fn sparsity(model: &Model) -> Result<Vec<(String, f64)>> {
    let weights =
        model.tensors.iter().filter(|(n, t)| n.starts_with("blocks.") && n.ends_with(".weight") && t.dims().len() > 1);
    weights
        .filter(|(n, _)| !n.contains(".router."))
        .map(|(name, tensor)| {
            let values = tensor.to_vec::<f32>()?;
            let zeros = values.iter().filter(|&&w| w == 0.0).count();
            Ok((name.trim_end_matches(".weight").to_string(), zeros as f64 / values.len().max(1) as f64))
        })
        .collect()
}
