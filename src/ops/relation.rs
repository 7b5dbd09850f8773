//! How far a student's token-to-token relations are from a teacher's: attention scores (queries against keys) and the
//! value, query and key relations of MiniLM (Wang et al. 2020, 2021). Scores of both models exist for a few keys at a time,
//! forward and backward: no map of tokens times tokens is held.

mod cases;
mod plan;
mod reference;

use std::any::Any;

use crate::cpu;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Params};
use crate::op::{Array, Cost, Family, Gradient, Op, Saves};
use crate::ops::attention::Mask;
use crate::shape::{self, Meta};
use crate::tensor::Tensor;

pub static FAMILY: Family = Family { name: "relation", cases: cases::cases, source: Some(plan::SOURCE) };

/// What two rows of scores are held against each other by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RelationLoss {
    /// KL(p || q) of the teacher's and the student's softmax over the visible keys (MiniLM eq. 5 and 7).
    Divergence,
    /// Mean over the visible keys of the squared difference of the scores before softmax (TinyBERT eq. 7).
    SquaredError,
}

/// loss = w D(teacher's scores, student's scores) per batch element, head and query, over the visible keys; scores are
/// scale a bᵀ and teacher_scale c dᵀ.
///
/// Inputs: a `[B, T, H, D]` and b `[B, S, H, D]` of the student, c `[B, T, H, E]` and d `[B, S, H, E]` of the teacher, of one
/// float type; context u32 `[B]` with [`Mask::Prefix`]; key lengths u32 `[B]` with `lengths`; row weights w f32 `[B, T]`.
/// Outputs: loss f32 `[B, H, T]`, and log-sum-exps of student and teacher f32 `[B, H, T, 2]` (zeros for the squared error).
/// A query that sees no key has loss 0 and log-sum-exps of -1e30. The teacher gets no gradient.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Relation {
    pub loss: RelationLoss,
    pub mask: Mask,
    pub lengths: bool,
    pub scale: f32,
    pub teacher_scale: f32,
}

/// da and db of [`Relation`]. Inputs: the forward's, its log-sum-exps, dloss f32 `[B, H, T]`.
///
/// With dS = w dloss (q - p), or w dloss 2 (difference of scores) / (visible keys): da = scale dS b, db = scale dSᵀ a.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RelationBackward(pub Relation);

/// Extents of one problem.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Extents {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub dim: usize,
    pub teacher_dim: usize,
}

impl Extents {
    fn of(inputs: &[Meta]) -> Option<Self> {
        let [a, b, c, d, ..] = inputs else { return None };
        let (&[batch, queries, heads, dim], &[_, keys, _, _], &[_, _, _, teacher_dim]) = (a.dims(), b.dims(), c.dims())
        else {
            return None;
        };
        let fits = b.dims() == [batch, keys, heads, dim]
            && c.dims() == [batch, queries, heads, teacher_dim]
            && d.dims() == [batch, keys, heads, teacher_dim];
        fits.then_some(Self { batch, queries, keys, heads, dim, teacher_dim })
    }

    fn rows(&self) -> usize {
        self.batch * self.heads * self.queries
    }
}

impl Relation {
    /// Positions of context and lengths among the inputs.
    pub(crate) fn optional(&self) -> [Option<usize>; 2] {
        let mut next = 4;
        [self.mask == Mask::Prefix, self.lengths].map(|present| {
            let position = present.then_some(next);
            next += usize::from(present);
            position
        })
    }

    /// Position of the row weights, the last input.
    pub(crate) fn weights(&self) -> usize {
        4 + self.optional().iter().flatten().count()
    }

    /// The kernels' flag word: mask in bits 0 and 1, lengths in bit 2, squared error in bit 3.
    fn flags(&self) -> usize {
        self.mask.code() | usize::from(self.lengths) << 2 | usize::from(self.loss == RelationLoss::SquaredError) << 3
    }

    fn check(&self, op: &'static str, inputs: &[Meta]) -> Result<Extents> {
        let broken = |rule| Error::Shape { op, rule, got: shape::list(inputs) };
        let extents = Extents::of(inputs)
            .ok_or_else(|| broken("a [B, T, H, D], b [B, S, H, D], teacher [B, T, H, E] and [B, S, H, E]"))?;
        let of_one_type = inputs[..4].iter().all(|m| m.dtype == inputs[0].dtype && m.dtype.is_float());
        if !of_one_type {
            return Err(Error::Dtype {
                op,
                expected: "student and teacher of one float type",
                got: shape::list(inputs),
            });
        }
        if inputs[..4].iter().any(|m| m.count() == 0) {
            return Err(broken("extents of at least 1"));
        }
        for index in self.optional().into_iter().flatten() {
            match inputs.get(index) {
                Some(m) if m.dims() == [extents.batch] && m.dtype == DType::U32 => {}
                _ => return Err(broken("context and key lengths u32 [B]")),
            }
        }
        match inputs.get(self.weights()) {
            Some(m) if m.dims() == [extents.batch, extents.queries] && m.dtype == DType::F32 => {}
            _ => return Err(broken("row weights f32 [B, T] after the rest")),
        }
        for (parameter, value) in [("scale", self.scale), ("teacher_scale", self.teacher_scale)] {
            if !value.is_finite() {
                return Err(Error::Parameter { op, parameter, value: value.to_string(), allowed: "finite numbers" });
            }
        }
        Ok(extents)
    }

    fn params(&self, inputs: &[Meta]) -> Params {
        let e = Extents::of(inputs).unwrap_or_default();
        let sizes = Params::new().u(e.batch).u(e.queries).u(e.keys).u(e.heads).u(e.dim).u(e.teacher_dim);
        sizes.u(self.flags()).f(self.scale).f(self.teacher_scale)
    }

    /// Multiply-adds of scores of both models over every visible pair, times two. A prefix is counted as causal.
    fn score_flops(&self, e: &Extents) -> f64 {
        let pairs: usize = match self.mask {
            Mask::None => e.queries * e.keys,
            _ => (0..e.queries).map(|t| e.keys.min(t + 1)).sum(),
        };
        2.0 * (pairs * e.batch * e.heads * (e.dim + e.teacher_dim)) as f64
    }
}

fn statistics(e: &Extents) -> Result<[Meta; 2]> {
    let rows = [e.batch, e.heads, e.queries];
    Ok([Meta::new(&rows, DType::F32)?, Meta::new(&[rows[0], rows[1], rows[2], 2], DType::F32)?])
}

fn bytes(inputs: &[Meta], outputs: &[Meta]) -> f64 {
    inputs.iter().chain(outputs).map(Meta::bytes).sum::<usize>() as f64
}

impl Op for Relation {
    fn name(&self) -> &'static str {
        "relation"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let extents = self.check("relation", inputs)?;
        if inputs.len() != self.weights() + 1 {
            let rule = "student and teacher pairs, the declared optional inputs, row weights";
            return Err(Error::Shape { op: "relation", rule, got: shape::list(inputs) });
        }
        Ok(statistics(&extents)?.to_vec())
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        reference::forward(self, inputs)
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("relation_fwd", DType::FLOATS, cpu::relation), plan::FORWARD_TILES, plan::FORWARD];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        Relation::params(self, inputs)
    }

    fn saves(&self) -> Saves {
        const INPUTS: &[usize] = &[0, 1, 2, 3, 4, 5, 6];
        Saves { inputs: &INPUTS[..=self.weights()], outputs: &[1] }
    }

    fn gradient(&self, g: &Gradient) -> Result<Vec<Option<Tensor>>> {
        let mut arguments: Vec<&Tensor> = (0..=self.weights()).map(|i| g.input(i)).collect::<Result<_>>()?;
        arguments.extend([g.output(1)?, g.grad(0)?]);
        let grads = g.run(&RelationBackward(*self), &arguments)?;
        Ok(grads.into_iter().map(Some).chain((2..=self.weights()).map(|_| None)).collect())
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        let flops = Extents::of(inputs).map_or(0.0, |e| self.score_flops(&e));
        Cost { flops, bytes: bytes(inputs, outputs) }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Op for RelationBackward {
    fn name(&self) -> &'static str {
        "relation_bwd"
    }

    fn infer(&self, inputs: &[Meta]) -> Result<Vec<Meta>> {
        let extents = self.0.check("relation_bwd", inputs)?;
        let [loss, sums] = statistics(&extents)?;
        if inputs.get(self.0.weights() + 1..) != Some(&[sums, loss]) {
            let rule = "the forward's inputs, then log-sum-exps f32 [B, H, T, 2] and dloss f32 [B, H, T]";
            return Err(Error::Shape { op: "relation_bwd", rule, got: shape::list(inputs) });
        }
        Ok(inputs[..2].to_vec())
    }

    fn reference(&self, inputs: &[Array]) -> Vec<Vec<f64>> {
        reference::backward(&self.0, inputs)
    }

    fn kernels(&self) -> &'static [Kernel] {
        const KERNELS: &[Kernel] =
            &[Kernel::cpu("relation_bwd", DType::FLOATS, cpu::relation_backward), plan::BACKWARD_TILES, plan::BACKWARD];
        KERNELS
    }

    fn params(&self, inputs: &[Meta], _: &[Meta]) -> Params {
        self.0.params(inputs)
    }

    fn differentiable(&self) -> usize {
        0
    }

    fn cost(&self, inputs: &[Meta], outputs: &[Meta]) -> Cost {
        // Scores once, then da and db, which the student's share of a score costs each.
        let share = |e: &Extents| 1.0 + 2.0 * e.dim as f64 / (e.dim + e.teacher_dim) as f64;
        let flops = Extents::of(inputs).map_or(0.0, |e| self.0.score_flops(&e) * share(&e));
        Cost { flops, bytes: bytes(inputs, outputs) }
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}
