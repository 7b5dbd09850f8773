//! Parameters added beside a model's own, which alone learn then: low-rank updates (Hu et al. 2021), adapters (Houlsby et al.
//! 2019) and prefixes of keys and values (Li and Liang 2021). They are told by their names, all behind [`TUNING`]:
//!
//! | name | what |
//! | --- | --- |
//! | `tuning.LINEAR.lora.down`, `.up`, `.factor` | A `[r, k]`, B `[n, r]` and s `[1]` of W + s B A |
//! | `tuning.LINEAR.lora.mask` | 0/1 `[n, k]`: the product runs on M o (W + s B A), as the merged weight will |
//! | `tuning.blocks.I.SUBLAYER.adapter.down`, `.up` | linears around a GELU, added to the sublayer's output |
//! | `tuning.blocks.I.prefix.key`, `.value` | `[P, H D]`, in front of the block's keys and values |
//! | `tuning.prefix.counts` | u32 `[N, 1]`, row n holding n + P: what lengths become |

use std::ops::Bound;

use super::forward::{Batch, Pass};
use super::model::Model;
use super::ways::dense_weight;
use crate::dispatch;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::binary::{ADD, MUL};
use crate::ops::layout::{Concat, Fill, GatherRows};
use crate::ops::matmul::Matmul;
use crate::ops::unary::{Function, Unary};
use crate::shape::Shape;
use crate::tape::Var;

/// What the names of added parameters begin with.
pub const TUNING: &str = "tuning.";
/// What the names of parameters begin with that a distillation learns beside the model.
pub const DISTILLED: &str = "distil.";
/// Lengths of prefixed sequences.
pub const COUNTS: &str = "tuning.prefix.counts";

impl Model {
    /// Whether parameters were added: they learn, and the model's own stay as they are.
    pub fn tuned(&self) -> bool {
        let added = self.tensors.range::<str, _>((Bound::Included(TUNING), Bound::Unbounded)).next();
        added.is_some_and(|(name, _)| name.starts_with(TUNING))
    }

    /// Whether training changes a parameter of this name.
    pub fn learns(&self, name: &str) -> bool {
        // Routers are trained on their own, by regression on expert scores.
        let constant = name.contains(".router.") || name.ends_with(".lora.factor") || name.ends_with(".lora.mask");
        !constant && (!self.tuned() || name.starts_with(TUNING) || name.starts_with(DISTILLED))
    }

    /// Keys that stand in front of every sequence's own.
    pub fn prefix_length(&self) -> usize {
        // Blocks without attention have none.
        let own = |i: usize| self.tensors.get(&format!("{TUNING}blocks.{i}.prefix.key"));
        (0..self.config.blocks.len()).find_map(own).map_or(0, |keys| keys.shape().rows())
    }
}

impl Pass<'_> {
    /// A linear's weight with its low-rank update, where the product must run on the sum: under a mask, or where hooks
    /// change weights. `None`: the update is added to the output instead.
    pub(super) fn updated(&mut self, name: &str, weight: &Var) -> Result<Option<Var>> {
        let mask = self.optional(&format!("{TUNING}{name}.lora.mask"))?;
        if (mask.is_none() && self.hooks.is_empty()) || !self.has_update(name) {
            return Ok(None);
        }
        let update = self.update(name)?;
        let sum = self.tape.first(ADD, &[weight, &update])?;
        match mask {
            Some(mask) => self.tape.first(MUL, &[&sum, &mask]).map(Some),
            None => Ok(Some(sum)),
        }
    }

    /// s B A, `[n, k]`.
    fn update(&mut self, name: &str) -> Result<Var> {
        let [down, up, factor] = self.low_rank_parts(name)?;
        let update = self.tape.first(Matmul::plain(false, false), &[&up, &down])?;
        self.tape.first(MUL, &[&update, &factor])
    }

    /// A, B and s.
    fn low_rank_parts(&mut self, name: &str) -> Result<[Var; 3]> {
        let mut part = |part: &str| self.parameter(&format!("{TUNING}{name}.lora.{part}"));
        Ok([part("down")?, part("up")?, part("factor")?])
    }

    /// The twin of an int8 product that gradients go through, for what lies before it: the input on its grid of levels and
    /// the weight as its levels say, which is fixed.
    pub(super) fn learnable(&mut self, name: &str, x: &Var) -> Result<Option<(Var, Var)>> {
        let stored = |part: &str| self.model.tensors.contains_key(&format!("{name}.{part}"));
        if !(stored("kept") || stored("scale") && (stored("int8") || stored("values"))) {
            return Ok(None);
        }
        let weight = self.constant(&dense_weight(self.model, name)?)?;
        Ok(Some((self.as_multiplied(name, x)?, weight)))
    }

    fn has_update(&self, name: &str) -> bool {
        self.model.tensors.contains_key(&format!("{TUNING}{name}.lora.down"))
    }

    /// y + s (x Aᵀ) Bᵀ, where the linear has a low-rank update; under a mask y + x (M o s B A)ᵀ: a weight that is stored without
    /// its zeros is M o W already.
    pub(super) fn low_rank(&mut self, name: &str, x: &Var, y: Var) -> Result<Var> {
        if !self.has_update(name) {
            return Ok(y);
        }
        if let Some(mask) = self.optional(&format!("{TUNING}{name}.lora.mask"))? {
            let update = self.update(name)?;
            let update = self.tape.first(MUL, &[&update, &mask])?;
            let update = self.tape.first(Matmul::linear(), &[x, &update])?;
            return self.tape.first(ADD, &[&y, &update]);
        }
        let [down, up, factor] = self.low_rank_parts(name)?;
        let narrow = self.tape.first(Matmul::linear(), &[x, &down])?;
        let update = self.tape.first(Matmul::linear(), &[&narrow, &up])?;
        let update = self.tape.first(MUL, &[&update, &factor])?;
        self.tape.first(ADD, &[&y, &update])
    }

    /// y + W_up gelu(W_down y + b) + b', where the sublayer (`attention` or `ffn`) has an adapter.
    pub(super) fn adapted(&mut self, block: usize, sublayer: &str, y: Var) -> Result<Var> {
        if !self.tuned {
            return Ok(y);
        }
        let name = |part: &str| format!("{TUNING}blocks.{block}.{sublayer}.adapter.{part}");
        if !self.model.tensors.contains_key(&format!("{}.weight", name("down"))) {
            return Ok(y);
        }
        let narrow = self.linear(&name("down"), &y)?;
        let narrow = self.tape.first(Unary(Function::GeluTanh), &[&narrow])?;
        let update = self.linear(&name("up"), &narrow)?;
        self.tape.first(ADD, &[&y, &update])
    }

    /// Keys and values `[B, P + T, H, D]` behind the block's prefix, and the context and lengths that count it.
    pub(super) fn prefixed(&mut self, block: usize, key: Var, value: Var, batch: &Batch) -> Result<(Var, Var, Batch)> {
        let length = self.model.prefix_length();
        let [b, _, h, d] = key.dims()[..] else {
            return Ok((key, value, batch.clone()));
        };
        let device = self.model.device();
        let zeros = Fill { value: 0.0, dims: Shape::new(&[b])?, dtype: DType::U32 };
        let first = Var::constant(dispatch::one(dispatch::run_on(device, &zeros, &[])?, "fill")?);
        let mut joined = Vec::with_capacity(2);
        for (part, own) in [("key", &key), ("value", &value)] {
            let prefix = self.parameter(&format!("{TUNING}blocks.{block}.prefix.{part}"))?;
            // Every sequence gets row 0 of a table of one row; its gradient is their sum.
            let rows = self.tape.first(GatherRows, &[&prefix.reshape(&[1, length * h * d])?, &first])?;
            joined.push(self.tape.first(Concat { axis: 1 }, &[&rows.reshape(&[b, length, h, d])?, own])?);
        }
        let counts = self.model.get(COUNTS)?;
        let longer = |lengths: &Option<crate::tensor::Tensor>| {
            lengths.as_ref().map(|own| dispatch::run_one(&GatherRows, &[counts, own])?.reshape(&[b])).transpose()
        };
        let batch = Batch { context: longer(&batch.context)?, lengths: longer(&batch.lengths)?, ..batch.clone() };
        let [key, value] = [0, 1].map(|i| joined[i].clone());
        Ok((key, value, batch))
    }
}
