//! Routers: which experts a token activates, learned from what they do, told by their centres, or looked up.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Settings;
use super::report::{self, BlockReport, masses};
use super::split::normalised;
use crate::device::Device;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Model, Pass};
use crate::ops::binary::{Binary, BinaryFunction, MUL};
use crate::ops::distill::{HiddenMse, Reduction};
use crate::ops::matmul::{Epilogue, Matmul};
use crate::ops::optim::{AdamW, StepRates};
use crate::ops::unary::{Function, Unary};
use crate::shape::Meta;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;
use crate::train::trainer::go_on;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Router {
    /// Two layers, x -> tanh(x W1^T + b1) W2^T + b2, that learn the experts' sums of positive activations.
    #[default]
    Mlp,
    /// -|x / |x| - c_e|, c_e the mean of the expert's normalised rows: nothing is learned.
    Similarity,
    /// The sums themselves, for which all of the in-projection is computed: the bound for every other router.
    Oracle,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Loss {
    /// Squared distance to the normalised sums.
    #[default]
    Mse,
    /// Binary cross-entropy of the scores as logits (MoEfication).
    Bce,
}

impl Router {
    /// The score above which an expert is executed whose activation is expected to be more than `share` of the largest.
    pub(super) fn threshold(self, share: f32, loss: Loss) -> f32 {
        match (self, loss) {
            (Router::Mlp, Loss::Bce) => (share / (1.0 - share)).ln().max(-1e30),
            _ => share,
        }
    }
}

/// Parts of the learned router.
const LEARNED: [&str; 4] = ["in.weight", "in.bias", "out.weight", "out.bias"];
/// How often the learned router is held against the oracle; the best one stays.
const JUDGED: usize = 10;

/// Scores `[rows, E]` of the router of block `i`.
pub(super) fn scores(model: &Model, i: usize, x: &Tensor) -> Result<Vec<f64>> {
    Pass::inference(model).router(i, &Var::constant(x.clone()))?.tensor.to_f64()
}

/// Gives block `i`, split already, its router, and reports on inputs that it did not learn from: the last tenth of the
/// batches, but at least one, which serves both when there is only one.
pub fn train(model: &mut Model, i: usize, inputs: &[Tensor], settings: &Settings) -> Result<BlockReport> {
    let training = (inputs.len() * 9 / 10).max(1);
    let held_out = &inputs[training.min(inputs.len() - 1)..];
    match settings.router {
        Router::Mlp => {
            init(model, i)?;
            learn(model, i, &inputs[..training], held_out, settings)?;
        }
        Router::Similarity => centres(model, i)?,
        Router::Oracle => {}
    }
    report::judge(model, i, held_out)
}

/// Mean of each expert's normalised rows, `[E, d]`.
fn mean_directions(model: &Model, i: usize) -> Result<(usize, usize, Vec<f64>)> {
    let weight = model.get(&format!("blocks.{i}.ffn.experts.in.weight"))?;
    let [experts, n, d] = weight.dims()[..] else {
        return Err(Error::Shape { op: "router", rule: "[E, n, d]", got: weight.meta().to_string() });
    };
    let values: Vec<f32> = weight.to_vec()?;
    let centre = |rows: &[f32]| {
        let mut mean = vec![0.0; d];
        for row in rows.chunks(d) {
            let row: Vec<f64> = row.iter().map(|&x| f64::from(x)).collect();
            mean.iter_mut().zip(normalised(&row)).for_each(|(m, x)| *m += x / n as f64);
        }
        mean
    };
    Ok((experts, d, values.chunks(n * d).flat_map(centre).collect()))
}

/// W1 starts at the experts' mean directions, W2 at the identity.
fn init(model: &mut Model, i: usize) -> Result<()> {
    let (experts, d, centres) = mean_directions(model, i)?;
    // LayerNorm gives |x| about sqrt(d): dividing by it puts the router where MoEfication's x / |x| has it.
    let first: Vec<f32> = centres.into_iter().map(|x| (x / (d as f64).sqrt()) as f32).collect();
    let second: Vec<f32> = (0..experts * experts).map(|k| f32::from(k / experts == k % experts)).collect();
    let zeros = vec![0.0f32; experts];
    let dims = [vec![experts, d], vec![experts], vec![experts, experts], vec![experts]];
    insert(model, i, LEARNED.into_iter().zip(dims).zip([first, zeros.clone(), second, zeros]))
}

/// |x / |x| - c|^2 = 1 - 2 c x / |x| + |c|^2: ranked by c x / |x| - |c|^2 / 2.
fn centres(model: &mut Model, i: usize) -> Result<()> {
    let (experts, d, centres) = mean_directions(model, i)?;
    let half: Vec<f32> = centres.chunks(d).map(|c| (-0.5 * c.iter().map(|x| x * x).sum::<f64>()) as f32).collect();
    // A root-mean-square norm times this is division by the length.
    let unit = vec![(1.0 / (d as f64).sqrt()) as f32; d];
    let centres: Vec<f32> = centres.into_iter().map(|x| x as f32).collect();
    let parts = ["unit.weight", "centre.weight", "centre.bias"];
    let dims = [vec![d], vec![experts, d], vec![experts]];
    insert(model, i, parts.into_iter().zip(dims).zip([unit, centres, half]))
}

fn insert<'p>(
    model: &mut Model,
    i: usize,
    parts: impl Iterator<Item = ((&'p str, Vec<usize>), Vec<f32>)>,
) -> Result<()> {
    for ((part, dims), values) in parts {
        let tensor = Tensor::from_slice(model.device(), &dims, &values)?;
        model.tensors.insert(format!("blocks.{i}.ffn.router.{part}"), tensor);
    }
    Ok(())
}

/// s_e = sum of positive activations of expert e, divided by the largest of the token (MoEfication's router target).
fn targets(model: &Model, i: usize, x: &Tensor, experts: usize) -> Result<Vec<f64>> {
    let (mut scores, _) = masses(model, i, x, experts)?;
    for token in scores.chunks_mut(experts) {
        let most = token.iter().copied().fold(0.0, f64::max);
        token.iter_mut().for_each(|s| *s /= most.max(1e-30));
    }
    Ok(scores)
}

fn learn(model: &mut Model, i: usize, inputs: &[Tensor], held_out: &[Tensor], settings: &Settings) -> Result<()> {
    let device = model.device().clone();
    let names = LEARNED.map(|part| format!("blocks.{i}.ffn.router.{part}"));
    let experts = model.get(&names[1])?.count();
    let aims: Vec<Vec<f64>> = inputs.iter().map(|x| targets(model, i, x, experts)).collect::<Result<_>>()?;
    let mut state: BTreeMap<&str, (Tensor, Tensor)> = BTreeMap::new();
    let one = Tensor::from_slice(&device, &[1], &[1.0f32])?;
    let mut best: Option<(f64, Vec<Tensor>)> = None;
    let every = settings.router_steps.div_ceil(JUDGED).max(1);
    for step in 0..settings.router_steps {
        go_on()?;
        let (x, aim) = (&inputs[step % inputs.len()], &aims[step % inputs.len()]);
        let mut tape = Tape::new();
        let leaves: Vec<Var> = names.iter().map(|n| model.get(n).map(|t| tape.leaf(t))).collect::<Result<_>>()?;
        let predicted = layers(&mut tape, &leaves, &Var::constant(x.clone()))?;
        let target = Tensor::from_f64(&device, predicted.dims(), DType::F32, aim)?;
        let (loss, seed) = match settings.loss {
            Loss::Mse => {
                let ones = Tensor::from_slice(&device, &[x.dims()[0]], &vec![1.0f32; x.dims()[0]])?;
                let op = HiddenMse { reduction: Reduction::Mean, normalised: false };
                let loss = tape.first(op, &[&predicted, &Var::constant(target), &Var::constant(ones)])?;
                let seed = Tensor::from_slice(&device, loss.dims(), &[1.0f32])?;
                (loss, seed)
            }
            Loss::Bce => {
                let slope = slope(&predicted.tensor, &target)?;
                (predicted, slope)
            }
        };
        let grads = tape.backward(&[(&loss, &seed)])?;
        let rate = settings.router_rate * (1.0 - step as f32 / settings.router_steps as f32);
        for (name, leaf) in names.iter().zip(&leaves) {
            if let Some(grad) = grads.of(leaf).transpose()? {
                update(&device, &mut state, name, &leaf.tensor, &grad, (rate, step as u64 + 1), &one)?;
            }
        }
        if (step + 1) % every == 0 || step + 1 == settings.router_steps {
            let captured = report::judge(model, i, held_out)?.captured;
            if best.as_ref().is_none_or(|(most, _)| captured >= *most) {
                let kept = names.iter().map(|n| model.get(n)?.duplicate()).collect::<Result<_>>()?;
                best = Some((captured, kept));
            }
        }
    }
    if let Some((_, kept)) = best {
        model.tensors.extend(names.into_iter().zip(kept));
    }
    Ok(())
}

/// Gradient of the mean over tokens of binary cross-entropies, summed over experts as the squared distances are averaged:
/// (sigmoid(z) - s) / (tokens E).
pub fn slope(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let p = dispatch::run_one(&Unary(Function::Sigmoid), &[logits])?;
    let d = dispatch::run_one(&Binary(BinaryFunction::Sub), &[&p, targets])?;
    let share = Tensor::from_f64(logits.device(), &[1], logits.dtype(), &[1.0 / logits.count().max(1) as f64])?;
    dispatch::run_one(&MUL, &[&d, &share])
}

fn layers(tape: &mut Tape, leaves: &[Var], x: &Var) -> Result<Var> {
    let op = Matmul { epilogue: Epilogue::Bias, ..Matmul::linear() };
    let h = tape.first(op, &[x, &leaves[0], &leaves[1]])?;
    let h = tape.first(Unary(Function::Tanh), &[&h])?;
    tape.first(op, &[&h, &leaves[2], &leaves[3]])
}

/// One AdamW step in place; tensors are flattened, moments made at first use.
fn update<'n>(
    device: &Arc<dyn Device>,
    state: &mut BTreeMap<&'n str, (Tensor, Tensor)>,
    name: &'n str,
    parameter: &Tensor,
    grad: &Tensor,
    (learning_rate, step): (f32, u64),
    factor: &Tensor,
) -> Result<()> {
    let flat = [parameter.count()];
    if !state.contains_key(name) {
        let zeros = || Tensor::zeros(device, Meta::new(&flat, DType::F32)?);
        state.insert(name, (zeros()?, zeros()?));
    }
    let Some((m, v)) = state.get(name) else {
        return Ok(());
    };
    let betas = [0.9, 0.999];
    let rates = StepRates { learning_rate, betas, weight: 1.0, step }.words();
    let rates = Tensor::from_slice(device, &[rates.len()], &rates)?;
    let op = AdamW { beta1: betas[0], beta2: betas[1], epsilon: 1e-8, weight_decay: 0.0, masked: false };
    dispatch::run(&op, &[&parameter.reshape(&flat)?, &grad.reshape(&flat)?, m, v, factor, &rates])?;
    Ok(())
}
