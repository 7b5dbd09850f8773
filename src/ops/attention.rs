//! Scaled dot-product attention with online softmax (Milakov and Gimelshein 2018; Dao et al. 2022): no score matrix is
//! ever held in memory, forward or backward, but by the rungs for software adapters.

mod cases;
mod groups;
mod plan;
mod reference;
mod tensor;

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params};
use crate::op::{Array, Cost, Family, Gradient, Op, Saves};
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "attention", cases: cases::cases, source: Some(plan::SOURCE) };

/// Which keys a query may see, before key padding. The query at row `t` stands at position `t + query_offset`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// Every key: encoders and cross attention.
    None,
    /// Keys up to the query's own position.
    Causal,
    /// The first `context[b]` keys are seen by everyone, later ones causally: a prefix language model (Du et al. 2022).
    Prefix,
}

impl Mask {
    pub(crate) const fn code(self) -> usize {
        match self {
            Mask::None => 0,
            Mask::Causal => 1,
            Mask::Prefix => 2,
        }
    }
}

/// y = softmax(scale q kᵀ + bias) v per head, over the visible keys.
///
/// Inputs: q `[B, T, H, D]`; k, v `[B, S, H, D]`; context u32 `[B]` with [`Mask::Prefix`]; key lengths u32 `[B]` with
/// `lengths` (keys from there on are hidden); bias `[H, T, S]` with `bias` (of q's type).
/// Outputs: y `[B, T, H, D]` and the log-sum-exp of each row's scores, lse f32 `[B, H, T]`.
///
/// A row that sees no key gives y = 0 and lse = -1e30. `query_offset` is the position of the first query: decoding with a
/// key-value cache is T = 1 with the offset at the number of tokens already cached; the cache may be longer than what is
/// valid when `lengths` hides the rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    pub mask: Mask,
    pub lengths: bool,
    pub bias: bool,
    pub scale: f32,
    pub query_offset: usize,
}

/// Gradient of [`Attention`]: inputs q, k, v, (context), (lengths), (bias), y, lse, dy; outputs dq, dk, dv, (dbias).
///
/// With P = exp(scores - lse) and delta = rowsum(dy y): dv = Pᵀ dy, dS = P (dy vᵀ - delta), dq = scale dS k,
/// dk = scale dSᵀ q, dbias = dS summed over the batch (Dao et al. 2022, appendix B).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionBackward(pub Attention);

pub use crate::cpu::MASKED;

/// Extents of one problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Extents {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub dim: usize,
}

impl Extents {
    fn of(q: &Meta, k: &Meta) -> Option<Self> {
        match (q.dims(), k.dims()) {
            (&[batch, queries, heads, dim], &[kb, keys, kh, kd]) if (batch, heads, dim) == (kb, kh, kd) => {
                Some(Self { batch, queries, keys, heads, dim })
            }
            _ => None,
        }
    }
}

impl Attention {
    /// Positions of context, lengths and bias among the inputs.
    pub(crate) fn optional(&self) -> [Option<usize>; 3] {
        let mut next = 3;
        [self.mask == Mask::Prefix, self.lengths, self.bias].map(|present| {
            let position = present.then_some(next);
            next += usize::from(present);
            position
        })
    }

    /// How many inputs there are.
    pub(crate) fn inputs(&self) -> usize {
        3 + self.optional().iter().flatten().count()
    }

    /// The kernels' flag word: mask in bits 0 and 1, lengths in bit 2, bias in bit 3.
    fn flags(&self) -> usize {
        self.mask.code() | usize::from(self.lengths) << 2 | usize::from(self.bias) << 3
    }

    /// Extents after every rule on q, k, v, context, lengths and bias was checked.
    fn check(&self, op: &'static str, inputs: &[Meta]) -> Result<Extents> {
        let broken = |rule| Error::Shape { op, rule, got: shape::list(inputs) };
        let [q, k, v, ..] = inputs else { return Err(broken("inputs q, k and v")) };
        if !q.dtype.is_float() || k.dtype != q.dtype || v.dtype != q.dtype {
            return Err(Error::Dtype { op, expected: "q, k and v of one float type", got: shape::list(inputs) });
        }
        let extents = Extents::of(q, k).ok_or_else(|| broken("q [B, T, H, D] and k [B, S, H, D]"))?;
        if k != v {
            return Err(broken("k and v of one shape"));
        }
        if q.count() == 0 || k.count() == 0 {
            return Err(broken("extents of at least 1"));
        }
        let [context, lengths, bias] = self.optional();
        for index in [context, lengths].into_iter().flatten() {
            match inputs.get(index) {
                Some(m) if m.dims() == [extents.batch] && m.dtype == DType::U32 => {}
                _ => return Err(broken("context and key lengths u32 [B]")),
            }
        }
        if let Some(index) = bias {
            match inputs.get(index) {
                Some(m) if m.dims() == [extents.heads, extents.queries, extents.keys] && m.dtype == q.dtype => {}
                _ => return Err(broken("bias [H, T, S] of q's type")),
            }
        }
        if !self.scale.is_finite() {
            return Err(Error::Parameter {
                op,
                parameter: "scale",
                value: self.scale.to_string(),
                allowed: "finite numbers",
            });
        }
        if self.query_offset > i32::MAX as usize {
            return Err(Error::Parameter {
                op,
                parameter: "query_offset",
                value: self.query_offset.to_string(),
                allowed: "0 to 2^31 - 1",
            });
        }
        Ok(extents)
    }

    fn params(&self, q: &Meta, k: &Meta) -> Params {
        let e = Extents::of(q, k).unwrap_or(Extents { batch: 0, queries: 0, keys: 0, heads: 0, dim: 0 });
        let sizes = Params::new().u(e.batch).u(e.queries).u(e.keys).u(e.heads).u(e.dim);
        sizes.u(self.flags()).u(self.query_offset).f(self.scale)
    }

    /// Multiply-adds of one pass over every visible pair and head dimension, times two. A prefix is counted as causal,
    /// since its context is data.
    fn pair_flops(&self, e: &Extents) -> f64 {
        let pairs = match self.mask {
            Mask::None => e.queries * e.keys,
            _ => (0..e.queries).map(|t| e.keys.min(t + self.query_offset + 1)).sum(),
        };
        2.0 * (pairs * e.batch * e.heads * e.dim) as f64
    }
}

impl Op for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let e = self.check("attention", inputs)?;
        if inputs.len() != self.inputs() {
            return Err(Error::Shape {
                op: "attention",
                rule: "q, k, v and the declared optional inputs",
                got: shape::list(inputs),
            });
        }
        Ok(vec![inputs[0], Meta::new(&[e.batch, e.heads, e.queries], DType::F32)?])
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        reference::forward(self, inputs)
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("attention_fwd", DType::FLOATS, cpu::attention),
            groups::forward::<64>(),
            groups::forward::<128>(),
            tensor::forward::<32>(),
            tensor::forward::<64>(),
            tensor::forward::<96>(),
            tensor::forward::<128>(),
            plan::LANES,
            plan::FORWARD,
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Attention::params(self, &inputs[0], &inputs[1])
    }

    fn saves(&self) -> Saves {
        const INPUTS: &[usize] = &[0, 1, 2, 3, 4, 5];
        Saves { inputs: &INPUTS[..self.inputs()], outputs: &[0, 1] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let mut arguments: Vec<&Tensor> = (0..self.inputs()).map(|i| g.input(i)).collect::<Result<_>>()?;
        arguments.extend([g.output(0)?, g.output(1)?, g.grad(0)?]);
        let mut grads = g.run(&AttentionBackward(*self), &arguments)?.into_iter();
        let mut result: Vec<Option<Tensor>> = grads.by_ref().take(3).map(Some).collect();
        let [context, lengths, bias] = self.optional();
        result.extend([context, lengths].into_iter().flatten().map(|_| None));
        result.extend(bias.map(|_| grads.next()));
        Ok(result)
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        let flops = Extents::of(&inputs[0], &inputs[1]).map_or(0.0, |e| 2.0 * self.pair_flops(&e));
        Cost { flops, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for AttentionBackward {
    fn name(&self) -> &'static str {
        "attention_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let e = self.0.check("attention_bwd", inputs)?;
        let broken = |rule| Error::Shape { op: "attention_bwd", rule, got: shape::list(inputs) };
        let Some([y, lse, dy]) = inputs.get(self.0.inputs()..) else {
            return Err(broken("the forward's inputs, then y, lse and dy"));
        };
        if *y != inputs[0] || *dy != inputs[0] {
            return Err(broken("y and dy like q"));
        }
        if lse.dims() != [e.batch, e.heads, e.queries] || lse.dtype != DType::F32 {
            return Err(broken("lse f32 [B, H, T]"));
        }
        let mut outputs = inputs[..3].to_vec();
        outputs.extend(self.0.optional()[2].map(|bias| inputs[bias]));
        Ok(outputs)
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        reference::backward(&self.0, inputs)
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] = &[
            Kernel::cpu("attention_bwd", DType::FLOATS, cpu::attention_backward),
            groups::backward::<64>(),
            groups::backward::<128>(),
            tensor::backward::<32>(),
            tensor::backward::<64>(),
            tensor::backward::<96>(),
            tensor::backward::<128>(),
            plan::BACKWARD_LANES,
            plan::BACKWARD,
        ];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.0.params(&inputs[0], &inputs[1])
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let bytes = inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64;
        // Scores, dy vᵀ, dv, dk and dq.
        let flops = Extents::of(&inputs[0], &inputs[1]).map_or(0.0, |e| 5.0 * self.0.pair_flops(&e));
        Cost { flops, bytes }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[cfg(test)]
mod tests;
