//! MoEfication (Zhang et al. 2022): the neurons of a ReLU FFN are clustered into experts of equal size, a small router
//! learns which experts a token activates, and only those are executed. No gate factor: with all experts selected the
//! result is the dense FFN's.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::device::Device;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::{Activation, Batch, Config, Experts, Model, Pass};
use crate::ops::distill::{HiddenMse, Reduction};
use crate::ops::matmul::{Epilogue, Matmul};
use crate::ops::optim::{AdamW, StepRates};
use crate::ops::unary::{Function, Unary};
use crate::shape::Meta;
use crate::tape::{Tape, Var};
use crate::tensor::Tensor;

/// Neurons that move together, so that 2:4 groups of the out-projection stay whole.
pub const GROUP: usize = 4;
/// Expert sizes are multiples of this: 2:4 groups, int8 lanes and tiles stay whole.
pub const SIZE_MULTIPLE: usize = 16;
const CLUSTER_ROUNDS: usize = 20;

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// Neurons per expert, a multiple of [`SIZE_MULTIPLE`].
    pub expert_size: usize,
    /// Share of the experts executed per token.
    pub share: f64,
    pub router_steps: usize,
    pub router_rate: f32,
}

/// What the conversion measured on its calibration tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct BlockReport {
    pub block: usize,
    pub experts: usize,
    pub selected: usize,
    /// Share of positive activation mass in the selected experts, by the router and by the oracle.
    pub captured: f64,
    pub captured_by_oracle: f64,
    /// Share of neurons that are active at all.
    pub active: f64,
}

/// Balanced k-means on L2-normalised rows: `groups` rows into `clusters` of equal size. Centres start from evenly
/// spaced rows; each round assigns (row, cluster) pairs from the most similar on while a cluster has room, so the
/// result is deterministic. Returns each row's cluster.
pub fn balanced_clusters(rows: &[Vec<f64>], clusters: usize) -> Vec<usize> {
    let size = rows.len() / clusters.max(1);
    let unit: Vec<Vec<f64>> = rows.iter().map(|r| normalised(r)).collect();
    let mut centres: Vec<Vec<f64>> = (0..clusters).map(|c| unit[c * size].clone()).collect();
    let mut assigned = vec![usize::MAX; rows.len()];
    for _ in 0..CLUSTER_ROUNDS {
        let mut pairs: Vec<(f64, usize, usize)> = Vec::with_capacity(rows.len() * clusters);
        for (r, row) in unit.iter().enumerate() {
            pairs.extend(centres.iter().enumerate().map(|(c, centre)| (dot(row, centre), r, c)));
        }
        pairs.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        let mut next = vec![usize::MAX; rows.len()];
        let mut room = vec![size; clusters];
        for (_, row, cluster) in pairs {
            if next[row] == usize::MAX && room[cluster] > 0 {
                next[row] = cluster;
                room[cluster] -= 1;
            }
        }
        if next == assigned {
            break;
        }
        assigned = next;
        for (c, centre) in centres.iter_mut().enumerate() {
            let mut mean = vec![0.0; centre.len()];
            for (row, _) in unit.iter().zip(&assigned).filter(|(_, a)| **a == c) {
                mean.iter_mut().zip(row).for_each(|(m, x)| *m += x);
            }
            *centre = normalised(&mean);
        }
    }
    assigned
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

fn normalised(row: &[f64]) -> Vec<f64> {
    let length = dot(row, row).sqrt();
    if length > 0.0 { row.iter().map(|x| x / length).collect() } else { row.to_vec() }
}

/// New order of the neurons: experts one after another, groups of [`GROUP`] in their old order within each.
fn neuron_order(w_in: &[f32], neurons: usize, width: usize, experts: usize) -> Vec<usize> {
    let group = |g: usize| -> Vec<f64> {
        let mut mean = vec![0.0; width];
        for n in g * GROUP..(g + 1) * GROUP {
            let row: Vec<f64> = w_in[n * width..(n + 1) * width].iter().map(|&x| f64::from(x)).collect();
            mean.iter_mut().zip(normalised(&row)).for_each(|(m, x)| *m += x);
        }
        mean
    };
    let rows: Vec<Vec<f64>> = (0..neurons / GROUP).map(group).collect();
    let clusters = balanced_clusters(&rows, experts);
    let members = |e: usize| clusters.iter().enumerate().filter(move |(_, c)| **c == e).map(|(g, _)| g);
    (0..experts).flat_map(|e| members(e).collect::<Vec<_>>()).flat_map(|g| g * GROUP..(g + 1) * GROUP).collect()
}

/// Converts every block of `model`; `calibration` batches train and judge the routers.
///
/// # Errors
/// `Error::Recipe` when an FFN is not ReLU (its neurons are never exactly off) or its width is no multiple of the size.
pub fn convert(model: &Model, settings: Settings, calibration: &[Batch]) -> Result<(Model, Vec<BlockReport>)> {
    let inputs = ffn_inputs(model, calibration)?;
    let mut converted = Model::new(model.config.clone(), model.tensors.clone(), model.device())?;
    let mut reports = Vec::new();
    for (i, block) in model.config.blocks.iter().enumerate().filter(|(_, block)| block.feeds()) {
        let refuse = |key: &str, value: String, allowed: &str| {
            Err(Error::Recipe { key: format!("experts.{key}"), value, allowed: format!("block {i}: {allowed}") })
        };
        if block.activation != Activation::Relu {
            return refuse(
                "expert_size",
                format!("{:?} FFN", block.activation),
                "ReLU FFNs only: others have no neurons that are off",
            );
        }
        let size = settings.expert_size;
        if size == 0 || !size.is_multiple_of(SIZE_MULTIPLE) || block.ffn_width % size != 0 {
            return refuse(
                "expert_size",
                size.to_string(),
                &format!("a multiple of {SIZE_MULTIPLE} that divides {}", block.ffn_width),
            );
        }
        let count = block.ffn_width / size;
        let selected = ((count as f64 * settings.share).round() as usize).clamp(1, count);
        split(&mut converted, i, count)?;
        converted.config.blocks[i].experts = Some(Experts { count, selected });
        reports.push(train_router(&mut converted, i, &inputs[i], settings)?);
    }
    Ok((converted, reports))
}

/// FFN inputs `[rows, d]` of each block over all calibration batches.
fn ffn_inputs(model: &Model, calibration: &[Batch]) -> Result<Vec<Vec<Tensor>>> {
    let mut inputs = vec![Vec::new(); model.config.blocks.len()];
    for batch in calibration {
        let mut pass = Pass::inference(model);
        pass.ffn_inputs = Some(Vec::new());
        pass.hidden(batch)?;
        for (block, rows) in inputs.iter_mut().zip(pass.ffn_inputs.take().unwrap_or_default()) {
            block.push(rows);
        }
    }
    Ok(inputs)
}

/// Replaces block `i`'s FFN tensors by expert tensors: in `[E, n, d]` with bias `[E, n]`, out `[E, d, n]`.
fn split(model: &mut Model, i: usize, experts: usize) -> Result<()> {
    let (d, f) = (model.config.width, model.config.blocks[i].ffn_width);
    let n = f / experts;
    let device = model.device().clone();
    let name = |part: &str| format!("blocks.{i}.ffn.{part}");
    let (w_in, b_in, w_out) =
        (model.values(&name("in.weight"))?, model.values(&name("in.bias"))?, model.values(&name("out.weight"))?);
    let order = neuron_order(&w_in, f, d, experts);
    let rows: Vec<f32> = order.iter().flat_map(|&j| w_in[j * d..(j + 1) * d].iter().copied()).collect();
    let bias: Vec<f32> = order.iter().map(|&j| b_in[j]).collect();
    let mut out = Vec::with_capacity(d * f);
    for expert in order.chunks(n) {
        for c in 0..d {
            out.extend(expert.iter().map(|&j| w_out[c * f + j]));
        }
    }
    for part in ["in.weight", "in.bias", "out.weight"] {
        model.tensors.remove(&name(part));
    }
    carry_steps(model, i, &order, experts)?;
    model.tensors.insert(name("experts.in.weight"), Tensor::from_slice(&device, &[experts, n, d], &rows)?);
    model.tensors.insert(name("experts.in.bias"), Tensor::from_slice(&device, &[experts, n], &bias)?);
    model.tensors.insert(name("experts.out.weight"), Tensor::from_slice(&device, &[experts, d, n], &out)?);
    Ok(())
}

/// Quantization steps of block `i`'s FFN go with its rows: those of the neurons in their new order, those of the output
/// channels to every expert. Inputs keep theirs.
///
/// # Errors
/// `Error::Shape` for steps of groups and for `.smooth`: neurons are reordered across them, and routers see inputs unscaled.
fn carry_steps(model: &mut Model, i: usize, order: &[usize], experts: usize) -> Result<()> {
    let d = model.config.width;
    for (part, count) in [("in", order.len()), ("out", d)] {
        let (from, to) = (format!("blocks.{i}.ffn.{part}"), format!("blocks.{i}.ffn.experts.{part}"));
        if let Some(step) = model.tensors.remove(&format!("{from}.input_step")) {
            model.tensors.insert(format!("{to}.input_step"), step);
        }
        let refuse = |rule, got| Err(Error::Shape { op: "experts", rule, got });
        if model.tensors.contains_key(&format!("{from}.smooth")) {
            return refuse("no factor between inputs and weights", format!("{from}.smooth"));
        }
        let Some(step) = model.tensors.remove(&format!("{from}.step")) else {
            continue;
        };
        if step.count() != count {
            return refuse("one step per output channel", format!("{} steps of {from}", step.count()));
        }
        let values = step.to_vec::<f32>()?;
        let carried: Vec<f32> = match part {
            "in" => order.iter().map(|&j| values[j]).collect(),
            _ => values.repeat(experts),
        };
        let carried = Tensor::from_slice(model.device(), &[carried.len()], &carried)?;
        model.tensors.insert(format!("{to}.step"), carried);
    }
    Ok(())
}

/// s_e = sum of positive activations of expert e, divided by the largest of the token (MoEfication's router target).
fn oracle_scores(model: &Model, i: usize, x: &Tensor) -> Result<(Vec<f64>, Vec<f64>, f64)> {
    let name = |part: &str| format!("blocks.{i}.ffn.experts.in.{part}");
    let weight = model.get(&name("weight"))?;
    let [experts, n, d] = weight.dims()[..] else {
        return Err(Error::Shape { op: "experts", rule: "[E, n, d]", got: weight.meta().to_string() });
    };
    let weight = weight.reshape(&[experts * n, d])?;
    let bias = model.get(&name("bias"))?.reshape(&[experts * n])?;
    let h = dispatch::run_one(&Matmul { epilogue: Epilogue::BiasRelu, ..Matmul::linear() }, &[x, &weight, &bias])?
        .to_vec::<f32>()?;
    let mass: Vec<f64> = h.chunks(n).map(|e| e.iter().map(|&a| f64::from(a)).sum()).collect();
    let mut scores = mass.clone();
    for token in scores.chunks_mut(experts) {
        let most = token.iter().copied().fold(0.0, f64::max);
        token.iter_mut().for_each(|s| *s /= most.max(1e-30));
    }
    let active = h.iter().filter(|&&a| a > 0.0).count() as f64 / h.len().max(1) as f64;
    Ok((scores, mass, active))
}

/// Router x -> tanh(x W1^T + b1) W2^T + b2: W1 starts at the experts' mean directions, W2 at the identity.
fn init_router(model: &mut Model, i: usize) -> Result<()> {
    let device = model.device().clone();
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
    // LayerNorm gives |x| about sqrt(d): dividing by it puts the router where MoEfication's x / |x| has it.
    let first: Vec<f32> = values.chunks(n * d).flat_map(centre).map(|x| (x / (d as f64).sqrt()) as f32).collect();
    let second: Vec<f32> = (0..experts * experts).map(|k| f32::from(k / experts == k % experts)).collect();
    let zeros = vec![0.0f32; experts];
    let parts = [
        ("in.weight", vec![experts, d], first),
        ("in.bias", vec![experts], zeros.clone()),
        ("out.weight", vec![experts, experts], second),
        ("out.bias", vec![experts], zeros),
    ];
    for (part, dims, values) in parts {
        model.tensors.insert(format!("blocks.{i}.ffn.router.{part}"), Tensor::from_slice(&device, &dims, &values)?);
    }
    Ok(())
}

const ROUTER: [&str; 4] = ["in.weight", "in.bias", "out.weight", "out.bias"];

fn train_router(model: &mut Model, i: usize, inputs: &[Tensor], settings: Settings) -> Result<BlockReport> {
    init_router(model, i)?;
    let device = model.device().clone();
    let names = ROUTER.map(|part| format!("blocks.{i}.ffn.router.{part}"));
    let mut batches = Vec::new();
    for x in inputs {
        let (scores, mass, active) = oracle_scores(model, i, x)?;
        batches.push((x, scores, mass, active));
    }
    // The last tenth of the batches is kept for the report, but at least one serves both when there is only one.
    let training = (batches.len() * 9 / 10).max(1);
    let mut state: BTreeMap<&str, (Tensor, Tensor)> = BTreeMap::new();
    let one = Tensor::from_slice(&device, &[1], &[1.0f32])?;
    for step in 0..settings.router_steps {
        let (x, scores, ..) = &batches[step % training];
        let rows = x.shape().rows();
        let mut tape = Tape::new();
        let leaves: Vec<Var> = names.iter().map(|n| model.get(n).map(|t| tape.leaf(t))).collect::<Result<_>>()?;
        let predicted = router(&mut tape, &leaves, &Var::constant((*x).clone()))?;
        let target = Tensor::from_f64(&device, predicted.dims(), DType::F32, scores)?;
        let ones = Tensor::from_slice(&device, &[rows], &vec![1.0f32; rows])?;
        let op = HiddenMse { reduction: Reduction::Mean, normalised: false };
        let loss = tape.first(op, &[&predicted, &Var::constant(target), &Var::constant(ones)])?;
        let seed = Tensor::from_slice(&device, loss.dims(), &[1.0f32])?;
        let grads = tape.backward(&[(&loss, &seed)])?;
        let rate = settings.router_rate * (1.0 - step as f32 / settings.router_steps as f32);
        for (name, leaf) in names.iter().zip(&leaves) {
            if let Some(grad) = grads.of(leaf).transpose()? {
                update(&device, &mut state, name, &leaf.tensor, &grad, (rate, step as u64 + 1), &one)?;
            }
        }
    }
    judge_router(model, i, &batches[training.min(batches.len() - 1)..])
}

fn router(tape: &mut Tape, leaves: &[Var], x: &Var) -> Result<Var> {
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

type Judged<'t> = (&'t Tensor, Vec<f64>, Vec<f64>, f64);

fn judge_router(model: &Model, i: usize, batches: &[Judged]) -> Result<BlockReport> {
    let Some(Experts { count, selected }) = model.config.blocks[i].experts else {
        return Err(Error::Shape { op: "router", rule: "a converted block", got: format!("block {i}") });
    };
    let (mut all, mut routed, mut best, mut active) = (0.0, 0.0, 0.0, 0.0);
    for (x, _, mass, share) in batches {
        let mut pass = Pass::inference(model);
        let scores = pass.router(i, &Var::constant((*x).clone()))?.tensor.to_f64()?;
        for (token, scores) in mass.chunks(count).zip(scores.chunks(count)) {
            let of = |by: &[f64]| super::structure::largest(by, selected).into_iter().map(|e| token[e]).sum::<f64>();
            all += token.iter().sum::<f64>();
            routed += of(scores);
            best += of(token);
        }
        active += share / batches.len() as f64;
    }
    let share = |part: f64| if all > 0.0 { part / all } else { 1.0 };
    Ok(BlockReport {
        block: i,
        experts: count,
        selected,
        captured: share(routed),
        captured_by_oracle: share(best),
        active,
    })
}

/// Largest relative difference between the converted model with every expert selected and the dense one.
pub fn difference_with_all_experts(dense: &Model, converted: &Model, batch: &Batch) -> Result<f64> {
    let mut config = converted.config.clone();
    for block in &mut config.blocks {
        block.experts = block.experts.map(|e| Experts { selected: e.count, ..e });
    }
    let all = Model::new(config, converted.tensors.clone(), converted.device())?;
    let want = Pass::inference(dense).hidden(batch)?.tensor.to_f64()?;
    let have = Pass::inference(&all).hidden(batch)?.tensor.to_f64()?;
    let scale = want.iter().fold(0.0f64, |m, x| m.max(x.abs())).max(1e-30);
    Ok(want.iter().zip(&have).fold(0.0f64, |m, (w, h)| m.max((w - h).abs())) / scale)
}

/// Names of a block's expert groups, for hooks and reports.
pub fn groups(config: &Config) -> Vec<String> {
    let blocks = config.blocks.iter().enumerate().filter(|(_, b)| b.experts.is_some());
    blocks.flat_map(|(i, _)| [format!("blocks.{i}.ffn.experts.in"), format!("blocks.{i}.ffn.experts.out")]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_are_balanced_and_find_directions() {
        // Two directions, interleaved.
        let rows: Vec<Vec<f64>> =
            (0..16).map(|i| if i % 2 == 0 { vec![1.0, 0.01 * i as f64] } else { vec![0.01 * i as f64, 1.0] }).collect();
        let clusters = balanced_clusters(&rows, 2);
        assert_eq!(clusters.iter().filter(|&&c| c == 0).count(), 8);
        assert!((0..16).all(|i| clusters[i] == clusters[i % 2]), "{clusters:?}");
    }

    #[test]
    fn neuron_order_is_a_permutation_of_whole_groups() {
        let w: Vec<f32> = (0..64 * 8).map(|i| ((i * 37) % 101) as f32 - 50.0).collect();
        let order = neuron_order(&w, 64, 8, 4);
        let mut sorted = order.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..64).collect::<Vec<_>>());
        assert!(order.chunks(GROUP).all(|g| g[0] % GROUP == 0 && g.windows(2).all(|w| w[1] == w[0] + 1)));
    }
}
