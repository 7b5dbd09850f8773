//! Attention scores and relations of both models at once, a few keys at a time (`ops::relation`).

use super::matches::{Feature, Match, MatchLoss};
use super::scaled;
use crate::error::{Error, Result};
use crate::nn::{AttentionKind, Batch, Heads, Pass};
use crate::ops::attention::Mask;
use crate::ops::relation::{Relation, RelationLoss};
use crate::tape::Var;
use crate::train::trainer::sum;

impl Match {
    /// Loss of a block's attention or relations, averaged over heads, in the unit of the rows' weights `[B, T]`.
    pub(super) fn relation_loss(
        &self,
        pass: &mut Pass,
        student: &Heads,
        teacher: &Heads,
        (batch, weights): (&Batch, &Var),
    ) -> Result<Var> {
        let [(a, b), (c, d)] = [self.pair(student)?, self.pair(teacher)?];
        let scale = |heads: &Heads, x: &Var| match self.feature {
            Feature::Attention => heads.scale,
            _ => 1.0 / (x.tensor.shape().last() as f32).sqrt(),
        };
        let loss = if self.loss == MatchLoss::Kl { RelationLoss::Divergence } else { RelationLoss::SquaredError };
        let (mask, lengths, extra) = visible(pass.model.config.attention, batch)?;
        let op = Relation { loss, mask, lengths, scale: scale(student, &a), teacher_scale: scale(teacher, &c) };
        let heads = a.dims()[2] as f32;
        let inputs: Vec<&Var> = [&a, &b, &c, &d].into_iter().chain(&extra).chain([weights]).collect();
        let losses = pass.tape.first(op, &inputs)?;
        let loss = sum(pass, &losses)?;
        scaled(pass, &loss, 1.0 / heads)
    }

    /// What is held against what, `[B, T, R, D]` each.
    fn pair(&self, heads: &Heads) -> Result<(Var, Var)> {
        let split = |x: &Var| match (self.heads, x.dims()) {
            (0, _) => Ok(x.clone()),
            (r, &[b, t, h, d]) if (h * d) % r == 0 => x.reshape(&[b, t, r, h * d / r]),
            (r, dims) => Err(Error::Parameter {
                op: "match",
                parameter: "heads",
                value: format!("{r} of {dims:?}"),
                allowed: "a divisor of the channels of both models",
            }),
        };
        let (a, b) = match self.feature {
            Feature::Query => (&heads.query, &heads.query),
            Feature::Key => (&heads.key, &heads.key),
            Feature::Value => (&heads.value, &heads.value),
            Feature::Attention | Feature::Hidden => (&heads.query, &heads.key),
        };
        Ok((split(a)?, split(b)?))
    }
}

/// The mask of a model's attention, whether there are lengths, and the tensors of both.
fn visible(kind: AttentionKind, batch: &Batch) -> Result<(Mask, bool, Vec<Var>)> {
    let (mask, context) = match (kind, &batch.context) {
        (AttentionKind::Bidirectional, _) => (Mask::None, None),
        (AttentionKind::Causal, _) => (Mask::Causal, None),
        (AttentionKind::Prefix, Some(context)) => (Mask::Prefix, Some(context)),
        (AttentionKind::Prefix, None) => {
            let rule = "a prefix model needs context lengths";
            return Err(Error::Shape { op: "relation", rule, got: "none".into() });
        }
    };
    let extra = context.into_iter().chain(&batch.lengths).cloned().map(Var::constant).collect();
    Ok((mask, batch.lengths.is_some(), extra))
}

/// Mean squared difference of H Hᵀ / d against all tokens of a sequence.
pub(super) fn mmd(pass: &mut Pass, student: &Var, teacher: &Var, (batch, weights): (&Batch, &Var)) -> Result<Var> {
    let one_head = |x: &Var| {
        let &[b, t, d] = x.dims() else {
            return Err(Error::Shape { op: "mmd", rule: "hidden states [B, T, d]", got: x.meta().to_string() });
        };
        x.reshape(&[b, t, 1, d])
    };
    let (own, other) = (one_head(student)?, one_head(teacher)?);
    let scale = |x: &Var| 1.0 / x.tensor.shape().last() as f32;
    let op = Relation {
        loss: RelationLoss::SquaredError,
        mask: Mask::None,
        lengths: batch.lengths.is_some(),
        scale: scale(&own),
        teacher_scale: scale(&other),
    };
    let lengths = batch.lengths.clone().map(Var::constant);
    let inputs: Vec<&Var> = [&own, &own, &other, &other].into_iter().chain(&lengths).chain([weights]).collect();
    let losses = pass.tape.first(op, &inputs)?;
    sum(pass, &losses)
}
