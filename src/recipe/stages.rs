//! The stages of the flow: each takes the student as it is and gives a changed one with what was measured.

use super::corpus::{Corpus, upload};
use super::evaluate::validation_loss;
use super::run_folder::State;
use super::schema::{self, Distil, HiddenProjection, Recipe, Training};
use super::source::{CorpusSource, Draw, Factors};
use super::staged;
use crate::compress::distil::{Distillation, PROJECTION, Projection, Weights, selection};
use crate::compress::hybrid::StudentLoss;
use crate::compress::quantization::QuantizationAware;
use crate::compress::sparsify::Sparsity24;
use crate::compress::structure::{self, Keep, Target};
use crate::compress::teacher::TeacherCache;
use crate::compress::{experts, hybrid, importance};
use crate::data::batch::{Batch, Example, GmaskPosition};
use crate::error::Result;
use crate::nn::{self, Config, Model};
use crate::ops::distill::Reduction;
use crate::ops::sparse24::Form24;
use crate::pipeline::post::Post;
use crate::rng::Stream;
use crate::tensor::Tensor;
use crate::train::graphs;
use crate::train::lifecycle::{Invariant, Method, Micro};
use crate::train::trainer::{Job, Source, Summary, train};
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

/// Which loss a training uses beside what the state of the weights demands.
pub struct Objective<'a> {
    pub draw: Draw,
    pub gold: f32,
    pub soft_on_target: bool,
    pub teacher: Option<(&'a TeacherCache<'a>, Distillation)>,
}

/// Hooks that keep what earlier stages promised, for the weights that are in `model`: all of them or a pipeline stage's.
pub fn held(model: &Model, state: &State) -> Result<Vec<Box<dyn Method>>> {
    let mut methods: Vec<Box<dyn Method>> = Vec::new();
    let sparse: Vec<String> = state.sparse.iter().filter(|name| model.tensors.contains_key(*name)).cloned().collect();
    if !sparse.is_empty() {
        let form = if state.two_dimensional { Form24::TwoDimensional } else { Form24::OneDimensional };
        methods.push(Box::new(Sparsity24::new(model, sparse, form)?));
    }
    if !state.int8.is_empty() {
        methods.push(Box::new(QuantizationAware { bits: 8, linears: state.int8.clone() }));
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
    let mut methods = held(model, state)?;
    let (cache, distillation) = match objective.teacher {
        Some((cache, distillation)) => (Some(cache), Some(distillation)),
        None => (None, None),
    };
    if let Some(distillation) = &distillation {
        if matches!(distillation.projection, Projection::Learned) {
            add_projection(model, distillation, context.recipe.seed)?;
        }
        methods.push(Box::new(distillation.clone()));
    }
    let factors = Factors { gold: objective.gold, soft_on_target: objective.soft_on_target };
    let source = CorpusSource {
        corpus: context.corpus,
        device: model.device().clone(),
        draw: objective.draw,
        accumulate: training.accumulate,
        parts: context.recipe.pipeline.as_ref().map_or(1, |p| p.micro_batches),
        factors,
        teacher: cache,
        teacher_waits: context.recipe.pipeline.as_ref().is_some_and(|p| p.teacher),
    };
    let beside = cache.filter(|_| source.teacher_waits).map(TeacherCache::teacher);
    let spread = |model: &mut Model| {
        let probe = source.micro_batches(0)?;
        staged::stepper(context, model, training.settings(), &probe, state, (distillation.clone(), beside))
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
    train(model, &job, &mut methods)
}

fn add_projection(model: &mut Model, distillation: &Distillation, seed: u64) -> Result<()> {
    if model.tensors.contains_key(PROJECTION) {
        return Ok(());
    }
    let (from, to) = (model.config.width, distillation.teacher_head.shape().last());
    let mut stream = Stream::new(seed, 0xd157);
    let values: Vec<f32> = (0..from * to).map(|_| (0.02 * stream.normal()) as f32).collect();
    model.tensors.insert(PROJECTION.into(), Tensor::from_slice(model.device(), &[to, from], &values)?);
    Ok(())
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
        parts: 1,
        factors: Factors { gold: 1.0, soft_on_target: false },
        teacher: None,
        teacher_waits: false,
    };
    let micros: Vec<Vec<Micro>> = (0..batches as u64).map(|i| source.micro_batches(i)).collect::<Result<_>>()?;
    Ok(micros.into_iter().flatten().collect())
}

/// Which structures survive.
pub fn choose(context: &Context, teacher: &Model, settings: &schema::Structure, random: bool) -> Result<Keep> {
    let target = Target { layers: settings.layers, head_size: settings.head_size };
    if random {
        return structure::at_random(&teacher.config, target, context.recipe.seed);
    }
    let micros = calibration(context, teacher, settings.calibration_batches)?;
    let scores = importance::score(teacher, &micros)?;
    let blocks = teacher.config.blocks.len();
    // Judged on training text: the validation text is what the comparison with random pruning is read from.
    // Where all blocks stay there is nothing to judge, and a model of one block cannot be run without it.
    let judge = |i: usize| importance::loss(&structure::without_block(teacher, i)?, &micros);
    let losses: Vec<f64> =
        if settings.layers < blocks { (0..blocks).map(judge).collect::<Result<_>>()? } else { vec![0.0; blocks] };
    structure::by_importance(&teacher.config, &scores, &losses, target)
}

/// Linears of all blocks whose name contains one of `parts` (all when empty).
pub fn linears(config: &Config, parts: &[String]) -> Vec<String> {
    let all = (0..config.blocks.len()).flat_map(Config::linears);
    all.filter(|l| parts.is_empty() || parts.iter().any(|p| matches(l, p))).collect()
}

/// Whether a linear's name has this part; an empty one names nothing.
pub fn matches(name: &str, part: &str) -> bool {
    !part.is_empty() && name.contains(part)
}

/// Splits the FFNs into experts; promises on FFN tensors move to the expert tensors.
pub fn moefy(
    context: &Context,
    student: &Model,
    state: &State,
    settings: &schema::Experts,
) -> Result<(Model, State, Vec<String>, Vec<Invariant>)> {
    let batches: Vec<nn::Batch> =
        calibration(context, student, settings.calibration_batches)?.into_iter().map(|m| m.batch).collect();
    let conversion = experts::Settings {
        expert_size: settings.expert_size,
        share: settings.share,
        router_steps: settings.router_steps,
        router_rate: settings.router_rate,
    };
    let (converted, reports) = experts::convert(student, conversion, &batches)?;
    let notes = reports.iter().map(|r| {
        format!(
            "block {}: {} of {} experts per token; {:.1} % of positive activation mass captured by the router, {:.1} % by the oracle; {:.0} % of neurons active",
            r.block, r.selected, r.experts, 100.0 * r.captured, 100.0 * r.captured_by_oracle, 100.0 * r.active
        )
    });
    let difference = experts::difference_with_all_experts(student, &converted, &batches[0])?;
    let equal = Invariant {
        rule: "experts(k = all) equals the dense FFN".into(),
        measured: format!("largest relative difference of hidden states {difference:.1e}"),
        holds: difference < 1e-4,
    };
    let rename = |name: &String| name.replace(".ffn.in", ".ffn.experts.in").replace(".ffn.out", ".ffn.experts.out");
    let moved = State {
        sparse: state.sparse.iter().map(rename).collect(),
        int8: state.int8.iter().map(rename).collect(),
        ..state.clone()
    };
    Ok((converted, moved, notes.collect(), vec![equal]))
}

/// Eq 12: both streams, weighted by alpha.
pub fn hybrid_teacher(context: &Context, settings: &schema::Hybrid, alpha: f64) -> Result<Objective<'static>> {
    let max_length = context.recipe.data.max_length;
    let draw = Draw::two_streams(context.corpus, &settings.teacher, alpha, context.recipe.seed, max_length)?;
    Ok(Objective { draw, gold: 1.0, soft_on_target: false, teacher: None })
}

/// Eq 13. Corrected: lambda CE + (1 - lambda) T^2 KL(tuned teacher || student), on both streams weighted as in Eq 12, because
/// the target-language stream alone forgets the other direction. Literal: the target-language stream alone, where the
/// teacher's term is constant.
pub fn hybrid_student<'a>(
    context: &Context,
    student: &Model,
    teacher: &'a TeacherCache<'a>,
    settings: &schema::Hybrid,
    alpha: f64,
) -> Result<Objective<'a>> {
    let (soft, gold) = hybrid::student_factors(settings.student_loss, settings.lambda);
    let (seed, max_length) = (context.recipe.seed, context.recipe.data.max_length);
    let draw = match settings.student_loss {
        StudentLoss::Corrected => Draw::two_streams(context.corpus, &settings.student, alpha, seed, max_length)?,
        StudentLoss::Literal => Draw::target(context.corpus, &settings.student, seed, max_length)?,
    };
    let distil = Distil {
        weights: Weights { hidden: 0.0, soft: soft as f32, hard: 0.0 },
        temperature: settings.temperature,
        projection: HiddenProjection::Kept,
        ..Distil::default()
    };
    let all: Vec<usize> = (0..teacher.width()).collect();
    let distillation = distillation(student, teacher.teacher(), &all, &distil)?;
    let teacher = (soft > 0.0).then_some((teacher, distillation));
    Ok(Objective { draw, gold: gold as f32, soft_on_target: true, teacher })
}

/// A held-out batch for checks that compare two forms of a model.
pub fn probe(corpus: &Corpus, model: &Model) -> Result<nn::Batch> {
    let examples: Vec<&Example> = corpus.held_out.iter().flat_map(|h| h.validation.iter().take(8)).collect();
    upload(model.device(), &Batch::assemble(&examples, corpus.special(), GmaskPosition::MaskIndex))
}
