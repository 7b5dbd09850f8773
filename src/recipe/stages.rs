//! The stages of the flow, a file each: every one takes the student as it is and gives a changed one with what was
//! measured. Here is what they share: the training that keeps what earlier stages promised.

pub mod experts;
pub mod gates;
pub mod hybrid;
pub mod quantize;
pub mod sparsify;
pub mod structure;
pub mod teacher;
pub mod tune;
pub mod vocabulary;

use super::corpus::{Corpus, upload};
use super::evaluate::validation_loss;
use super::identity::text;
use super::run_folder::State;
use super::schema::{Distil, HiddenProjection, Recipe, Training};
use super::source::{CorpusSource, Draw, Factors, teacher_cache};
use super::staged;
use crate::compress::distillation::{
    Distillation, Kept, LayerwiseDistillation, Lessons, PROJECTION, Projection, TeacherCache, Tutor, add_projection,
    selection,
};
use crate::compress::fastest::Measured;
use crate::compress::pruning::Held;
use crate::compress::quantization::QuantizationAware;
use crate::data::batch::Example;
use crate::error::Result;
use crate::nn::{self, Config, Model};
use crate::ops::distill::Reduction;
use crate::pipeline::post::Post;
use crate::report::model::LossCurve;
use crate::train::graphs;
use crate::train::lifecycle::{Invariant, Method, Micro};
use crate::train::store;
use crate::train::trainer::{Job, Source, Summary, train};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Validation examples per direction while training.
const VALIDATION: usize = 100;
const KEPT_CHECKPOINTS: usize = 2;

/// Everything a stage works with.
pub struct Context<'a> {
    pub recipe: &'a Recipe,
    pub corpus: &'a Corpus,
    pub folder: &'a Path,
    pub name: &'a str,
    pub progress: bool,
    /// The processes of this run, where there are several.
    pub ranks: Option<&'a Arc<Post>>,
}

/// A student on its way through the stages.
pub struct Student {
    pub model: Model,
    pub state: State,
    pub fingerprint: String,
    /// On what its layers run fastest once it is deployed, where that was measured.
    pub measured: Option<Measured>,
}

/// What a stage's work gives.
pub struct Outcome {
    pub model: Model,
    pub state: State,
    pub curves: Vec<LossCurve>,
    pub notes: Vec<String>,
    pub invariants: Vec<Invariant>,
    /// Of sessions that stopped before this stage was finished.
    pub earlier_seconds: f64,
}

/// Which loss a training uses beside what the state of the weights demands.
pub struct Objective<'a> {
    pub draw: Draw,
    pub gold: f32,
    pub soft_on_target: bool,
    pub teacher: Option<(&'a TeacherCache<'a>, Listening<'a>)>,
}

/// What of the teacher a student hears.
pub enum Listening<'a> {
    /// Its last hidden states and its words, from the cache.
    LastLayer(Box<Distillation>),
    /// Layer by layer, or its largest logits; and the teacher's channels that the student kept.
    Layerwise(&'a Distil, Vec<usize>),
}

/// Hooks that keep what earlier stages promised, for the weights that are in `model`: all of them or a pipeline stage's.
pub fn held(model: &Model, state: &State) -> Result<Vec<Box<dyn Method>>> {
    let mut methods: Vec<Box<dyn Method>> = Vec::new();
    let here = state.sparse.iter().filter(|(name, _)| model.tensors.contains_key(*name));
    let sparse: BTreeMap<String, usize> = here.map(|(name, zeros)| (name.clone(), *zeros)).collect();
    if !sparse.is_empty() {
        methods.push(Box::new(Held::new(model, sparse, state.pattern)?));
    }
    if !state.quantized.is_empty() {
        methods.push(Box::new(QuantizationAware::new(state.quantized.clone(), state.format, state.phase)));
    }
    Ok(methods)
}

/// Invariants of everything the state promises.
pub fn invariants(model: &Model, state: &State) -> Result<Vec<Invariant>> {
    let mut all = Vec::new();
    for method in held(model, state)? {
        all.extend(method.invariants(model)?);
    }
    Ok(all)
}

/// Trains `model` under the state's hooks and an objective.
pub fn fit(
    context: &Context,
    model: &mut Model,
    state: &State,
    training: &Training,
    objective: Objective,
) -> Result<Summary> {
    Ok(fit_with(context, model, state, training, objective, Vec::new())?.0)
}

/// As [`fit`], with methods that act before all others; gives their invariants too.
pub fn fit_with(
    context: &Context,
    model: &mut Model,
    state: &State,
    training: &Training,
    objective: Objective,
    mut methods: Vec<Box<dyn Method>>,
) -> Result<(Summary, Vec<Invariant>)> {
    let own = methods.len();
    methods.extend(held(model, state)?);
    let largest;
    let (cache, distillation) = match objective.teacher {
        Some((cache, Listening::LastLayer(distillation))) => (Some(cache), Some(*distillation)),
        Some((cache, Listening::Layerwise(distil, kept))) => {
            methods.push(Box::new(layerwise(context, model, cache.teacher(), (distil, &kept), training.steps)?));
            largest = distil.lesson(0, 0).logits.filter(|_| distil.top_k > 0).map(|logits| {
                let kept = Kept::Largest { k: distil.top_k, temperature: logits.temperature };
                teacher_cache(cache.teacher(), context.corpus).keeping(kept)
            });
            (Some(largest.as_ref().unwrap_or(cache)), None)
        }
        None => (None, None),
    };
    // Teachers that run in the step need no states beforehand.
    let live = distillation.is_none() && cache.is_some_and(|cache| cache.kept() == Kept::Hidden);
    if let Some(distillation) = &distillation {
        if matches!(distillation.projection, Projection::Learned) {
            let dims = [distillation.teacher_head.shape().last(), model.config.width];
            add_projection(model, PROJECTION, dims, (context.recipe.seed, 0xd157))?;
        }
        methods.push(Box::new(distillation.clone()));
    }
    let factors = Factors { gold: objective.gold, soft_on_target: objective.soft_on_target };
    let source = CorpusSource {
        corpus: context.corpus,
        device: model.device().clone(),
        draw: objective.draw,
        accumulate: training.accumulate,
        parts: Cell::new(1),
        factors,
        teacher: cache,
        teacher_waits: live || context.recipe.pipeline.as_ref().is_some_and(|p| p.teacher),
    };
    let beside = cache.filter(|_| source.teacher_waits && !live).map(TeacherCache::teacher);
    let spread = |model: &mut Model| {
        let probe = |parts: usize| {
            source.parts.set(parts);
            source.micro_batches(0)
        };
        let taught = (distillation.clone(), beside);
        let (stepper, parts) = staged::stepper(context, model, training.settings(), &probe, state, taught)?;
        source.parts.set(parts);
        Ok(stepper)
    };
    let validate =
        |model: &Model, methods: &[Box<dyn Method>]| validation_loss(model, context.corpus, VALIDATION, methods);
    let job = Job {
        stage: context.name,
        steps: training.steps,
        settings: training.settings(),
        dropout: training.dropout,
        seed: context.recipe.seed,
        source: &source,
        validate: &validate,
        validate_every: training.validate_every,
        checkpoint_every: training.checkpoint_every,
        graphs: graphs::shapes(model.device().as_ref()),
        keep_checkpoints: KEPT_CHECKPOINTS,
        folder: context.folder,
        progress: context.progress,
        stepper: context.recipe.pipeline.is_some().then_some(&spread),
    };
    let summary = train(model, &job, &mut methods)?;
    let mut invariants = Vec::new();
    for method in &methods[..own] {
        invariants.extend(method.invariants(model)?);
    }
    Ok((summary, invariants))
}

/// Trains a model that a stage has changed until it has recovered, on labels and on what the teacher says of them.
/// `salt`: so that stages draw different batches.
pub fn recover(
    context: &Context,
    student: (Model, State),
    training: &Training,
    distil: &Distil,
    cache: &TeacherCache,
    salt: u64,
) -> Result<Outcome> {
    recover_with(context, student, (training, distil), cache, salt, Vec::new())
}

/// As [`recover`], with methods that act before all others.
pub fn recover_with(
    context: &Context,
    (mut model, state): (Model, State),
    (training, distil): (&Training, &Distil),
    cache: &TeacherCache,
    salt: u64,
    methods: Vec<Box<dyn Method>>,
) -> Result<Outcome> {
    let recipe = context.recipe;
    let draw = Draw::mixed(context.corpus, training, recipe.seed ^ salt, recipe.data.max_length)?;
    let objective = listening(&model, &state, (draw, distil), cache)?;
    let (summary, invariants) = fit_with(context, &mut model, &state, training, objective, methods)?;
    Ok(Outcome { invariants, ..trained(context.name, model, state, summary) })
}

/// The objective of a student that hears its teacher beside the labels.
pub fn listening<'a>(
    model: &Model,
    state: &State,
    (draw, distil): (Draw, &'a Distil),
    cache: &'a TeacherCache<'a>,
) -> Result<Objective<'a>> {
    let teacher = cache.teacher();
    let gold = distil.gold(model.config.blocks.len(), teacher.config.blocks.len());
    let layerwise = distil.layerwise();
    let hears = match layerwise {
        true => Listening::Layerwise(distil, state.kept.clone()),
        false => Listening::LastLayer(Box::new(distillation(model, teacher, &state.kept, distil)?)),
    };
    // Layer by layer there are no streams: soft labels are heard on every labelled row.
    Ok(Objective { draw, gold, soft_on_target: layerwise, teacher: Some((cache, hears)) })
}

fn layerwise(
    context: &Context,
    student: &mut Model,
    teacher: &Model,
    (distil, kept): (&Distil, &[usize]),
    steps: u64,
) -> Result<LayerwiseDistillation> {
    let lesson = distil.lesson(student.config.blocks.len(), teacher.config.blocks.len());
    let mut tutors = Vec::new();
    if distil.top_k == 0 {
        tutors.push(Tutor { model: Arc::new(teacher.clone()), weight: 1.0 });
        for path in &distil.teachers {
            let model = store::load_model(Path::new(path), student.device())?;
            tutors.push(Tutor { model: Arc::new(model), weight: 1.0 });
        }
    }
    let (matches, dynamic, logits) = (lesson.matches.as_slice(), lesson.dynamic.as_ref(), lesson.logits);
    let lessons = Lessons { tutors, matches, dynamic, logits, kept: Some(kept), steps, seed: context.recipe.seed };
    LayerwiseDistillation::new(student, lessons)
}

/// What a training gives.
pub fn trained(name: &str, model: Model, state: State, summary: Summary) -> Outcome {
    let curve = LossCurve { stage: name.into(), unit: "nats/token".into(), points: summary.curve };
    let earlier_seconds = summary.earlier_seconds;
    Outcome { model, state, curves: vec![curve], notes: Vec::new(), invariants: Vec::new(), earlier_seconds }
}

/// The distillation hook of a recipe's settings. `kept`: the teacher's channels that the student has.
pub fn distillation(student: &Model, teacher: &Model, kept: &[usize], settings: &Distil) -> Result<Distillation> {
    let projection = match settings.projection {
        HiddenProjection::Learned => Projection::Learned,
        HiddenProjection::Kept if kept.len() == teacher.config.width => Projection::None,
        HiddenProjection::Kept => Projection::Kept(selection(student, kept, teacher.config.width)?),
    };
    Ok(Distillation {
        weights: settings.weights,
        temperature: settings.temperature,
        squared: settings.squared,
        reduction: if settings.literal_sum { Reduction::HalfSum } else { Reduction::Mean },
        normalised: settings.normalised,
        projection,
        teacher_head: teacher.get("head.weight")?.clone(),
        teacher_bias: teacher.tensors.get("head.bias").cloned(),
    })
}

/// First micro-batches of the mixed corpus, for calibration.
pub fn calibration(context: &Context, model: &Model, batches: usize) -> Result<Vec<Micro>> {
    let training = &context.recipe.teacher;
    let source = CorpusSource {
        corpus: context.corpus,
        device: model.device().clone(),
        draw: Draw::mixed(context.corpus, training, context.recipe.seed ^ 0xca11, context.recipe.data.max_length)?,
        accumulate: 1,
        parts: Cell::new(1),
        factors: Factors { gold: 1.0, soft_on_target: false },
        teacher: None,
        teacher_waits: false,
    };
    let micros: Vec<Vec<Micro>> = (0..batches as u64).map(|i| source.micro_batches(i)).collect::<Result<_>>()?;
    Ok(micros.into_iter().flatten().collect())
}

/// Linears of all blocks whose name contains one of `parts` (all when empty).
pub fn linears(config: &Config, parts: &[String]) -> Vec<String> {
    let all = config.all_linears().into_iter();
    all.filter(|l| parts.is_empty() || parts.iter().any(|p| matches(l, p))).collect()
}

/// Whether a linear's name has this part; an empty one names nothing.
pub fn matches(name: &str, part: &str) -> bool {
    !part.is_empty() && name.contains(part)
}

/// A held-out batch for checks that compare two forms of a model.
pub fn probe(corpus: &Corpus, model: &Model) -> Result<nn::Batch> {
    let examples: Vec<&Example> = corpus.held_out.iter().flat_map(|h| h.validation.iter().take(8)).collect();
    upload(model.device(), &corpus.assemble(&examples))
}
