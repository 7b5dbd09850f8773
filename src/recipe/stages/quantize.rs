//! Quantization of every linear: steps by calibration, by a method that rounds weights, or by training.

use super::{Context, Outcome, Student, calibration, linears, recover, text};
use crate::compress::distillation::TeacherCache;
use crate::compress::quantization::data_free::{self, Request};
use crate::compress::quantization::{
    Activations, INPUT_STEP, QuantizationAware, awq, calibrate, gptq, learned_step, smooth,
};
use crate::data::batch::{Batch, Example, GmaskPosition};
use crate::error::Result;
use crate::nn::{self, Model, OutputHook, Pass};
use crate::recipe::corpus::upload;
use crate::recipe::flow::Flow;
use crate::recipe::run_folder::State;
use crate::recipe::schema::{Inputs, Method, Observer, Quantize};
use crate::tensor::Tensor;
use crate::train::lifecycle::Invariant;

pub fn run(flow: &mut Flow, settings: &Quantize, student: &Student, cache: &TeacherCache) -> Result<Student> {
    let parts = [&student.fingerprint, &text(settings)?, "quantize"];
    flow.stage("quantize", &parts, false, |context| {
        let mut model = student.model.duplicate()?;
        let (quantized, format) = (linears(&model.config, &[]), settings.format());
        format.check_model(&model, &quantized)?;
        let state = State { quantized, format, ..student.state.clone() };
        prepare(context, &mut model, &state, settings)?;
        let Some(training) = &settings.training else {
            let (curves, invariants) = (Vec::new(), Vec::new());
            return Ok(Outcome { model, state, curves, notes: Vec::new(), invariants, earlier_seconds: 0.0 });
        };
        let trained = State { phase: Some(settings.phase(training.steps)), ..state.clone() };
        let outcome = recover(context, (model, trained), training, &settings.distil, cache, 3)?;
        Ok(Outcome { state, ..outcome })
    })
}

/// Everything before training: factors, rounded weights, steps.
fn prepare(context: &Context, model: &mut Model, state: &State, settings: &Quantize) -> Result<()> {
    let (names, format) = (&state.quantized, &state.format);
    let calibrator = settings.calibrator();
    let tracked = settings.method == Method::Qat && settings.observer() == Observer::MovingAverage;
    let rounds = matches!(settings.method, Method::Gptq | Method::Awq);
    if settings.smooth.is_none() && calibrator.is_none() && !rounds && !settings.learned_steps {
        return Ok(());
    }
    let batches = batches(context, model, settings)?;
    if let Some(alpha) = settings.smooth {
        smooth::smooth(model, &batches, alpha)?;
    }
    match settings.method {
        Method::Gptq => gptq::quantize(model, names, format, &batches)?,
        Method::Awq => awq::quantize(model, names, format, &batches)?,
        _ => {}
    }
    if settings.learned_steps {
        let bits = settings.schedule.map_or(format.bits, |s| s.start);
        let start = crate::compress::quantization::Format { bits, ..*format };
        learned_step::begin(model, names, &start, &batches)?;
    } else if let Some(calibrator) = calibrator.filter(|_| !tracked) {
        calibrate::input_steps(model, names, &batches, calibrator)?;
    } else if tracked {
        for linear in names {
            let unseen = Tensor::from_slice(model.device(), &[1], &[0.0f32])?;
            model.tensors.insert(format!("{linear}.{INPUT_STEP}"), unseen);
        }
    }
    Ok(())
}

/// Calibration batches of text, or of what stands in for it.
fn batches(context: &Context, model: &Model, settings: &Quantize) -> Result<Vec<nn::Batch>> {
    if settings.inputs() == Inputs::Data {
        let micros = calibration(context, model, settings.calibration_batches)?;
        return Ok(micros.into_iter().map(|m| m.batch).collect());
    }
    let special = context.corpus.special();
    let first = [special.pad, special.unk, special.bos, special.eos, special.gmask].into_iter().fold(0, u32::max) + 1;
    let length = context.recipe.data.max_length;
    let assemble = |examples: &[Example]| {
        let examples: Vec<&Example> = examples.iter().collect();
        upload(model.device(), &Batch::assemble(&examples, special, GmaskPosition::MaskIndex))
    };
    let made = |index: usize| {
        let request = Request {
            tokens: first..context.corpus.tokenizer.vocabulary() as u32,
            mark: special.gmask,
            examples: context.recipe.teacher.batch,
            lengths: (length / 2 - 1, length / 4),
            seed: context.recipe.seed ^ (0xdf00 + index as u64),
        };
        match settings.inputs() {
            Inputs::SelfGenerated => assemble(&data_free::self_generated(model, &request, &assemble)?),
            _ => assemble(&data_free::random(&request)),
        }
    };
    (0..settings.calibration_batches).map(made).collect()
}

/// Largest NMSE between the logits of a deployed model and those of the model under simulated quantization. Their sums
/// round differently, and a rounding of an input that falls to the other side moves it by one level.
const DEPLOYED: f64 = 1e-4;
/// As above with experts: a router may decide a near tie the other way.
const DEPLOYED_EXPERTS: f64 = 1e-2;

/// The deployed model does what the trained one does under simulated quantization.
pub fn deployed(model: &Model, state: &State, deployed: &Model, probe: &nn::Batch) -> Result<Option<Invariant>> {
    if state.quantized.is_empty() {
        return Ok(None);
    }
    let hook = QuantizationAware::new(state.quantized.clone(), state.format, None);
    let logits = |model: &Model, hook: Option<&dyn OutputHook>| {
        let mut pass = Pass::inference(model).hooks(hook);
        let hidden = pass.hidden(probe)?;
        pass.logits(&hidden)?.tensor.to_f64()
    };
    let (want, have) = (logits(model, Some(&hook))?, logits(deployed, None)?);
    let error: f64 = want.iter().zip(&have).map(|(w, h)| (w - h).powi(2)).sum();
    let nmse = error / want.iter().map(|w| w * w).sum::<f64>().max(1e-30);
    let experts = model.config.blocks.iter().any(|b| b.experts.is_some());
    let bound = if experts { DEPLOYED_EXPERTS } else { DEPLOYED };
    let inputs = if state.format.activations == Activations::Float { "float" } else { "int8" };
    Ok(Some(Invariant {
        rule: format!(
            "deployed logits equal those of simulated quantization ({inputs} inputs) up to an NMSE of {bound:.0e}"
        ),
        measured: format!("NMSE {nmse:.1e}"),
        holds: nmse <= bound,
    }))
}
