//! The FFN of a block whose neurons are split into experts: a router scores them for each token, and only the best are
//! executed. A few tokens read their experts where they lie; many are sorted by expert.

use super::config::Experts;
use super::forward::Pass;
use super::model::{Model, missing};
use super::ways::Way;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::binary::ADD;
use crate::ops::matmul::{Epilogue, Matmul};
use crate::ops::moe::{GroupedMatmul, GroupedMatmulInt8, MoeCombine, MoeDispatch, MoeGate};
use crate::ops::moe_gather::{Gathered, GatheredMatmul, GatheredMatmulInt8};
use crate::ops::norm::RmsNorm;
use crate::ops::quant::MatmulInt8;
use crate::ops::reduce::{Axis, Reduce, ReduceFunction};
use crate::ops::select::Above;
use crate::ops::unary::{Function, Unary};
use crate::shape::Meta;
use crate::tape::Var;

/// What a router decided for m tokens: `indices u32 [m, k]` and their scores `gates f32 [m, k]`.
struct Choice {
    indices: Var,
    gates: Var,
    threshold: Option<f32>,
}

/// Slots in the order of their experts.
struct Sorted {
    order: Var,
    offsets: Var,
}

impl Pass<'_> {
    /// Tokens are sorted by expert also where few could do without: how the two ways are compared.
    #[must_use]
    pub fn grouped(mut self, grouped: bool) -> Self {
        self.grouped = grouped;
        self
    }

    /// Whether block `i` of `model` reads its experts where they lie for so many tokens.
    pub fn gathers_tokens(model: &Model, i: usize, tokens: usize) -> bool {
        let name = |part: &str| format!("blocks.{i}.ffn.experts.{part}");
        let Some(Experts { selected: k, threshold, .. }) = model.config.blocks[i].experts else { return false };
        if !Pass::inference(model).gathers(&name("in"), &name("out")) {
            return false;
        }
        let metas = |part: &str, rows: usize, bias: &str| -> Result<(bool, Vec<Meta>)> {
            let float = model.tensors.get(&name(&format!("{part}.weight")));
            let weight = float.map_or_else(|| model.get(&name(&format!("{part}.int8"))), Ok)?.meta();
            let [x, bias] = [Meta::new(&[rows, weight.shape.last()], weight.dtype)?, model.get(bias)?.meta()];
            let (scales, indices) = (Meta::new(&[rows], DType::F32)?, Meta::new(&[tokens, k], DType::U32)?);
            let mut all = match float {
                Some(_) => vec![x, weight, bias, indices],
                None => vec![x, scales, weight, model.get(&name(&format!("{part}.scale")))?.meta(), bias, indices],
            };
            all.extend(threshold.map(|_| Meta::new(&[tokens, k], DType::F32)).transpose()?);
            Ok((float.is_some(), all))
        };
        let fits = |part: &str, rows: usize, bias: &str, op: Gathered| {
            metas(part, rows, bias).is_ok_and(|(float, metas)| match float {
                true => dispatch::supports(model.device(), &GatheredMatmul(op), &metas),
                false => dispatch::supports(model.device(), &GatheredMatmulInt8(op), &metas),
            })
        };
        fits("in", tokens, &name("in.bias"), Gathered { sum: false, relu: true, threshold })
            && fits(
                "out",
                tokens * k,
                &format!("blocks.{i}.ffn.out.bias"),
                Gathered { sum: true, relu: false, threshold },
            )
    }

    /// Scores of the experts of block `i` for rows x `[rows, d]`, `[rows, E]`, by the tensors that its router has: two
    /// layers (MoEfication's MLP), the distance of x / |x| to the experts' centres (similarity), or none, which is the
    /// oracle: each expert's sum of positive activations, for which all of the in-projection is computed.
    pub fn router(&mut self, i: usize, x: &Var) -> Result<Var> {
        let name = |part: &str| format!("blocks.{i}.ffn.router.{part}");
        if let Some(unit) = self.optional(&name("unit.weight"))? {
            // -|x / |x| - c|^2 / 2 without the part that all experts share.
            let x = self.tape.first(RmsNorm { epsilon: 1e-12 }, &[x, &unit])?;
            return self.linear(&name("centre"), &x);
        }
        if !self.model.tensors.contains_key(&name("in.weight")) {
            return self.masses(i, x);
        }
        let h = self.linear(&name("in"), x)?;
        let h = self.tape.first(Unary(Function::Tanh), &[&h])?;
        self.linear(&name("out"), &h)
    }

    /// Sum of the positive activations of each expert, `[rows, E]`.
    fn masses(&mut self, i: usize, x: &Var) -> Result<Var> {
        let name = format!("blocks.{i}.ffn.experts.in");
        let bias = self.parameter(&format!("{name}.bias"))?;
        let [e, n] = bias.dims()[..] else {
            return Err(missing(&format!("{name}.bias")));
        };
        let (bias, d) = (bias.reshape(&[e * n])?, x.dims()[1]);
        let h = if let Some(weight) = self.optional(&format!("{name}.weight"))? {
            let op = Matmul { epilogue: Epilogue::BiasRelu, ..Matmul::linear() };
            self.tape.first(op, &[x, &weight.reshape(&[e * n, d])?, &bias])?
        } else {
            let scale = self.parameter(&format!("{name}.scale"))?;
            let packed = self.optional(&format!("{name}.int4"))?;
            if packed.is_some() || scale.dims().len() == 3 {
                let weight = self.unpacked(&name, packed, &scale)?.reshape(&[e * n, d])?;
                let op = Matmul { epilogue: Epilogue::BiasRelu, ..Matmul::linear() };
                self.tape.first(op, &[x, &weight, &bias])?
            } else {
                let (q, weight) = (self.quantized(&name, x)?, self.parameter(&format!("{name}.int8"))?);
                let (weight, scale) = (weight.reshape(&[e * n, d])?, scale.reshape(&[e * n])?);
                let h = self.tape.first(MatmulInt8 { bias: true }, &[&q[0], &q[1], &weight, &scale, &bias])?;
                self.tape.first(Unary(Function::Relu), &[&h])?
            }
        };
        let rows = x.dims()[0];
        let sums = Reduce { function: ReduceFunction::Sum, axis: Axis::Last };
        self.tape.first(sums, &[&h.reshape(&[rows * e, n])?])?.reshape(&[rows, e])
    }

    /// y = sum over the k selected experts of relu(x W_in,e + b) W_out,e, plus the output bias; no gate factor, so that
    /// k = E is the dense FFN (MoEfication).
    pub(super) fn experts(&mut self, i: usize, x: &Var) -> Result<Var> {
        let Some(Experts { count, selected: k, threshold }) = self.model.config.blocks[i].experts else {
            return Err(missing(&format!("blocks.{i}.experts")));
        };
        let rows = self.rows(x)?;
        let way = self.way(&format!("blocks.{i}.ffn"), rows.dims()[0]).cloned();
        let scores = self.router(i, &rows.detach())?;
        if let Some(Way::AllExperts { inner, outer }) = &way {
            return self.all_experts(i, (&rows, &scores), (inner, outer))?.reshape(x.dims());
        }
        let gated = self.tape.run(MoeGate { k }, &[&scores])?;
        let choice = Choice { indices: gated[0].clone(), gates: gated[1].clone(), threshold };
        let bias = self.parameter(&format!("blocks.{i}.ffn.out.bias"))?;
        let (inner, outer) = (format!("blocks.{i}.ffn.experts.in"), format!("blocks.{i}.ffn.experts.out"));
        if !matches!(way, Some(Way::Sorted)) && self.gathers(&inner, &outer) {
            let first = Gathered { sum: false, relu: true, threshold };
            let inner_bias = self.parameter(&format!("{inner}.bias"))?;
            if let Some(h) = self.gathered(&inner, &rows, &inner_bias, &choice, first)? {
                let second = Gathered { sum: true, relu: false, threshold };
                if let Some(y) = self.gathered(&outer, &h, &bias, &choice, second)? {
                    return y.reshape(x.dims());
                }
            }
        }
        let dispatch = self.tape.run(MoeDispatch { experts: count }, &[&choice.indices])?;
        let sorted = Sorted { order: dispatch[0].clone(), offsets: dispatch[1].clone() };
        let h = self.grouped_linear(&inner, &rows, k, true, &sorted)?;
        let y = self.grouped_linear(&outer, &h, k, false, &sorted)?;
        let y = match threshold {
            None => self.tape.first(MoeCombine { k, weighted: false }, &[&y, &sorted.order])?,
            Some(threshold) => {
                // Sorted rows are computed all: what is not above the threshold counts nothing.
                let counts = self.tape.first(Above { threshold }, &[&choice.gates.detach()])?;
                self.tape.first(MoeCombine { k, weighted: true }, &[&y, &sorted.order, &counts])?
            }
        };
        let y = self.tape.first(ADD, &[&y, &bias])?;
        y.reshape(x.dims())
    }

    /// Whether nothing is recorded or changed on the way, and the weights are what gathered products take.
    fn gathers(&self, inner: &str, outer: &str) -> bool {
        let stored = |name: &&str| {
            let has = |part: &str| self.model.tensors.get(&format!("{name}.{part}"));
            has("weight").is_some() || (has("int8").is_some() && has("scale").is_some_and(|s| s.dims().len() == 2))
        };
        !self.tape.recording() && self.hooks.is_empty() && !self.grouped && [inner, outer].iter().all(stored)
    }

    /// A product with the experts where they lie, where the device has a kernel for so many tokens.
    fn gathered(&mut self, name: &str, x: &Var, bias: &Var, choice: &Choice, op: Gathered) -> Result<Option<Var>> {
        let gates = choice.threshold.map(|_| &choice.gates);
        let after = [bias, &choice.indices].into_iter().chain(gates);
        if let Some(weight) = self.optional(&format!("{name}.weight"))? {
            let inputs: Vec<&Var> = [x, &weight].into_iter().chain(after).collect();
            let op = GatheredMatmul(op);
            let metas: Vec<_> = inputs.iter().map(|v| v.meta()).collect();
            let fits = dispatch::supports(x.tensor.device(), &op, &metas);
            return fits.then(|| self.tape.first(op, &inputs)).transpose();
        }
        let (weight, scale) = (self.parameter(&format!("{name}.int8"))?, self.parameter(&format!("{name}.scale"))?);
        let q = self.quantized(name, x)?;
        let inputs: Vec<&Var> = [&q[0], &q[1], &weight, &scale].into_iter().chain(after).collect();
        let op = GatheredMatmulInt8(op);
        let metas: Vec<_> = inputs.iter().map(|v| v.meta()).collect();
        let fits = dispatch::supports(x.tensor.device(), &op, &metas);
        fits.then(|| self.tape.first(op, &inputs)).transpose()
    }

    /// Grouped linear over experts, dense or int8; `first`: reads token rows and applies ReLU.
    fn grouped_linear(&mut self, name: &str, x: &Var, k: usize, first: bool, sorted: &Sorted) -> Result<Var> {
        let (order, offsets) = (&sorted.order, &sorted.offsets);
        let bias = self.optional(&format!("{name}.bias"))?;
        // Integer products have no gradient for what is tuned before them.
        let learnable = if self.tuned && self.tape.recording() { self.learnable(name, x)? } else { None };
        let float = match self.optional(&format!("{name}.weight"))? {
            Some(weight) => Some(self.hooked(name, x.clone(), weight)?),
            None if learnable.is_some() => learnable,
            None => {
                let scale = self.parameter(&format!("{name}.scale"))?;
                let packed = self.optional(&format!("{name}.int4"))?;
                // Weight-only experts run on the float kernels.
                let weight_only = packed.is_some() || scale.dims().len() == 3;
                weight_only.then(|| Ok((x.clone(), self.unpacked(name, packed, &scale)?))).transpose()?
            }
        };
        if let Some((x, weight)) = float {
            let experts = weight.dims()[0];
            let op = GroupedMatmul { k, relu: first, bias: bias.is_some(), gather: first, experts };
            let inputs: Vec<&Var> = [&x, &weight].into_iter().chain(&bias).chain([order, offsets]).collect();
            return self.tape.first(op, &inputs);
        }
        let (weight, scale) = (self.parameter(&format!("{name}.int8"))?, self.parameter(&format!("{name}.scale"))?);
        let experts = weight.dims()[0];
        let q = self.quantized(name, x)?;
        let op = GroupedMatmulInt8 { k, relu: first, bias: bias.is_some(), gather: first, experts };
        let inputs: Vec<&Var> =
            [&q[0], &q[1], &weight, &scale].into_iter().chain(&bias).chain([order, offsets]).collect();
        self.tape.first(op, &inputs)
    }
}
