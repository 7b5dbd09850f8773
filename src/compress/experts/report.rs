//! What a conversion measured on tokens that its routers did not learn from, before anything runs on it.

use super::router::scores;
use crate::compress::structure::largest;
use crate::device::turns::{median, take_turns};
use crate::dispatch;
use crate::error::{Error, Result};
use crate::nn::{Batch, Experts, Model, Pass};
use crate::ops::layout::GatherRows;
use crate::ops::matmul::{Epilogue, Matmul};
use crate::tape::Var;
use crate::tensor::Tensor;
use crate::train::trainer::go_on;

/// Shares of the experts that the captured mass is told for beside the recipe's own.
const SHARES: [f64; 4] = [0.1, 0.2, 0.3, 0.5];

/// Share of positive activation mass in the best experts of each token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Captured {
    pub selected: usize,
    /// As the router ranks them, and as they are.
    pub router: f64,
    pub oracle: f64,
}

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
    /// Experts executed per token: fewer than selected where there is a threshold.
    pub executed: f64,
    /// Captured mass for other numbers of experts.
    pub curve: Vec<Captured>,
}

/// FFN inputs `[rows, d]` of each block over all calibration batches.
pub fn ffn_inputs(model: &Model, calibration: &[Batch]) -> Result<Vec<Vec<Tensor>>> {
    let mut inputs = vec![Vec::new(); model.config.blocks.len()];
    for batch in calibration {
        go_on()?;
        let mut pass = Pass::inference(model);
        pass.ffn_inputs = Some(Vec::new());
        pass.hidden(batch)?;
        for (block, rows) in inputs.iter_mut().zip(pass.ffn_inputs.take().unwrap_or_default()) {
            block.push(rows);
        }
    }
    Ok(inputs)
}

/// So many rows of x `[m, d]`, which begins again where it has fewer.
pub fn repeated(x: &Tensor, rows: usize) -> Result<Tensor> {
    let indices: Vec<u32> = (0..rows).map(|row| (row % x.dims()[0].max(1)) as u32).collect();
    dispatch::run_one(&GatherRows, &[x, &Tensor::from_slice(x.device(), &[rows], &indices)?])
}

/// relu(x W_in + b) of block `i` for x `[rows, d]`, split into experts or not: `[rows, f]`.
pub(super) fn activations(model: &Model, i: usize, x: &Tensor) -> Result<Vec<f32>> {
    let experts = model.config.blocks[i].experts.is_some();
    let name = |part: &str| format!("blocks.{i}.ffn.{}in.{part}", if experts { "experts." } else { "" });
    let (weight, bias) = (model.get(&name("weight"))?, model.get(&name("bias"))?);
    let weight = weight.reshape(&[bias.count(), x.shape().last()])?;
    let op = Matmul { epilogue: Epilogue::BiasRelu, ..Matmul::linear() };
    dispatch::run_one(&op, &[x, &weight, &bias.reshape(&[bias.count()])?])?.to_vec()
}

/// Share of the neurons of each FFN that are above 0 over the batches: how sparse activations are.
pub fn active_shares(model: &Model, batches: &[Batch]) -> Result<Vec<f64>> {
    let share = |(i, inputs): (usize, &Vec<Tensor>)| {
        let (mut active, mut all) = (0, 0);
        for x in inputs {
            let h = activations(model, i, x)?;
            active += h.iter().filter(|&&a| a > 0.0).count();
            all += h.len();
        }
        Ok(active as f64 / all.max(1) as f64)
    };
    let inputs = ffn_inputs(model, batches)?;
    inputs.iter().enumerate().filter(|(i, _)| model.config.blocks[*i].feeds()).map(share).collect()
}

/// Sum of positive activations of each expert, `[rows, E]`, and the share of neurons that are active.
pub(super) fn masses(model: &Model, i: usize, x: &Tensor, experts: usize) -> Result<(Vec<f64>, f64)> {
    let h = activations(model, i, x)?;
    let n = model.config.blocks[i].ffn_width / experts.max(1);
    let mass = h.chunks(n.max(1)).map(|e| e.iter().map(|&a| f64::from(a)).sum()).collect();
    Ok((mass, h.iter().filter(|&&a| a > 0.0).count() as f64 / h.len().max(1) as f64))
}

/// Holds the router of block `i` against what its experts do for inputs `[rows, d]`.
pub fn judge(model: &Model, i: usize, inputs: &[Tensor]) -> Result<BlockReport> {
    let Some(Experts { count, selected, threshold }) = model.config.blocks[i].experts else {
        return Err(Error::Shape { op: "router", rule: "a converted block", got: format!("block {i}") });
    };
    let of_share = |share: f64| ((count as f64 * share).round() as usize).clamp(1, count);
    let mut sizes: Vec<usize> = SHARES.into_iter().map(of_share).chain([selected]).collect();
    sizes.sort_unstable();
    sizes.dedup();
    let (mut all, mut active, mut executed, mut tokens) = (0.0, 0.0, 0.0, 0);
    let mut sums = vec![(0.0, 0.0); sizes.len()];
    for x in inputs {
        let (mass, share) = masses(model, i, x, count)?;
        active += share / inputs.len() as f64;
        for (token, scores) in mass.chunks(count).zip(scores(model, i, x)?.chunks(count)) {
            all += token.iter().sum::<f64>();
            tokens += 1;
            for (&k, (routed, best)) in sizes.iter().zip(&mut sums) {
                let of = |by: &[f64]| largest(by, k).into_iter().map(|e| token[e]).sum::<f64>();
                *routed += of(scores);
                *best += of(token);
            }
            let above = |e: &usize| threshold.is_none_or(|t| scores[*e] > f64::from(t));
            executed += largest(scores, selected).iter().filter(|e| above(e)).count() as f64;
        }
    }
    let share = |part: f64| if all > 0.0 { part / all } else { 1.0 };
    let curve: Vec<Captured> = sizes
        .iter()
        .zip(&sums)
        .map(|(&selected, sums)| Captured { selected, router: share(sums.0), oracle: share(sums.1) })
        .collect();
    let own = curve.iter().find(|c| c.selected == selected);
    let (captured, captured_by_oracle) = own.map_or((1.0, 1.0), |c| (c.router, c.oracle));
    let executed = executed / f64::from(tokens.max(1));
    Ok(BlockReport { block: i, experts: count, selected, captured, captured_by_oracle, active, executed, curve })
}

impl BlockReport {
    /// One line for the run's record.
    pub fn note(&self) -> String {
        let percent = |share: f64| format!("{:.1}", 100.0 * share);
        let others = self.curve.iter().filter(|c| c.selected != self.selected);
        let others: Vec<String> =
            others.map(|c| format!("{}: {} ({})", c.selected, percent(c.router), percent(c.oracle))).collect();
        let fewer = if self.executed < self.selected as f64 {
            format!("; {:.1} are executed on average, the others are below the threshold", self.executed)
        } else {
            String::new()
        };
        format!(
            "block {}: {} of {} experts per token; {} % of positive activation mass captured by the router, {} % by the oracle; \
             {:.0} % of neurons active{fewer}; with other numbers of experts {}",
            self.block,
            self.selected,
            self.experts,
            percent(self.captured),
            percent(self.captured_by_oracle),
            100.0 * self.active,
            others.join(", ")
        )
    }
}

/// Times of the FFNs of a dense model and of its experts on the model's device.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speed {
    /// Tokens at once.
    pub rows: usize,
    /// Medians, microseconds.
    pub dense: f64,
    pub experts: f64,
}

/// Rounds of a comparison.
const ROUNDS: usize = 9;

/// The FFN of the first block that was split, as it is deployed, against the dense one, for so many tokens.
pub fn speed(dense: &Model, split: &Model, rows: &[usize], text: &Batch) -> Result<Vec<Speed>> {
    let Some(i) = split.config.blocks.iter().position(|b| b.experts.is_some()) else {
        return Ok(Vec::new());
    };
    let device = split.device().clone();
    let fed = ffn_inputs(split, std::slice::from_ref(text))?;
    let mut all = Vec::new();
    for &rows in rows {
        let x = repeated(&fed[i][0], rows)?;
        let run = |model: &Model| Pass::inference(model).ffn(i, &Var::constant(x.clone())).map(drop);
        let times = take_turns(&device, &[&|| run(dense), &|| run(split)], ROUNDS)?;
        let [dense, experts] = [0, 1].map(|i| 1e6 * median(&times[i]));
        all.push(Speed { rows, dense, experts });
    }
    Ok(all)
}

/// One line for the run's record.
pub fn speed_note(speeds: &[Speed]) -> String {
    let parts = speeds.iter().map(|s| {
        let slower = if s.experts > s.dense { ", slower" } else { "" };
        format!("{} tokens {:.0} us, dense {:.0} us ({:.2}x{slower})", s.rows, s.experts, s.dense, s.dense / s.experts)
    });
    format!("time of an FFN as experts on this device: {}", parts.collect::<Vec<_>>().join("; "))
}
