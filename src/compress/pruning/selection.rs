//! Which units stay: exactly the declared count, lower index first on ties, chosen on the device.

use serde::{Deserialize, Serialize};

use super::pattern::{Pattern, matrix_dims};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::binary::{Binary, BinaryFunction};
use crate::ops::layout::{Concat, Fill, Slice};
use crate::ops::reduce::CountNonFinite;
use crate::ops::select::KeepLargest;
use crate::ops::sparse24::{Form24, Mask24, mask24_greedy};
use crate::shape::Shape;
use crate::tensor::Tensor;

/// What units are compared with (the papers differ: Wanda a row, SparseGPT's magnitude baseline a layer, oBERT everything).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    Row,
    #[default]
    Layer,
    /// All weights that are pruned: layers may end at different sparsities.
    Global,
}

/// Units pruned of `units` at a sparsity: the nearest whole number, halves away from zero.
pub fn pruned(units: usize, sparsity: f64) -> usize {
    ((units as f64 * sparsity).round() as usize).min(units)
}

/// Units pruned of grids of these extents, in all.
pub fn declared(grids: &[[usize; 2]], pattern: Pattern, scope: Scope, sparsity: f64) -> usize {
    let counts = grids.iter().map(|[r, c]| r * c);
    match scope {
        _ if pattern.is_24() => counts.map(|count| count / 2).sum(),
        Scope::Row => grids.iter().map(|&[r, c]| r * pruned(c, sparsity)).sum(),
        Scope::Layer => counts.map(|count| pruned(count, sparsity)).sum(),
        Scope::Global => pruned(counts.sum(), sparsity),
    }
}

/// Grids of zeros and ones of the scores' shapes: of scores f32 `[r, c]` (one per unit) the largest are kept. For 2:4
/// patterns the units are weights, and groups of four decide whatever scope and sparsity.
///
/// # Errors
/// `Error::NonFinite` naming the weight whose scores are no numbers.
pub fn select(
    names: &[String],
    scores: &[Tensor],
    pattern: Pattern,
    scope: Scope,
    sparsity: f64,
) -> Result<Vec<Tensor>> {
    for (name, scores) in names.iter().zip(scores) {
        check_finite(name, scores)?;
    }
    if pattern.is_24() {
        return scores.iter().map(|s| groups_of_four(s, pattern)).collect();
    }
    let keep = |scores: &Tensor, [rows, n]: [usize; 2]| {
        let op = KeepLargest { keep: n - pruned(n, sparsity), magnitude: false };
        dispatch::run_one(&op, &[&scores.reshape(&[rows, n])?])?.reshape(scores.dims())
    };
    match scope {
        Scope::Row => scores.iter().map(|s| keep(s, matrix_dims(s))).collect(),
        Scope::Layer => scores.iter().map(|s| keep(s, [1, s.count()])).collect(),
        Scope::Global => {
            let Some(flat) = join(scores)? else {
                return Ok(Vec::new());
            };
            split(&keep(&flat, [1, flat.count()])?, scores)
        }
    }
}

/// Units that are pruned already are ranked below all others: scores s >= 0 become s where `units` is 1, -1 where it is 0.
pub fn demote(scores: &Tensor, units: &Tensor) -> Result<Tensor> {
    let run = |f, a: &Tensor, b: &Tensor| dispatch::run_one(&Binary(f), &[a, b]);
    let one = Fill { value: 1.0, dims: Shape::new(&[1])?, dtype: DType::F32 };
    let one = dispatch::one(dispatch::run_on(scores.device(), &one, &[])?, "one")?;
    // Adding (mask - 1) = 0 leaves a kept score as it is, to the bit.
    let beneath = run(BinaryFunction::Sub, units, &one)?;
    run(BinaryFunction::Add, &run(BinaryFunction::Mul, scores, units)?, &beneath)
}

fn groups_of_four(scores: &Tensor, pattern: Pattern) -> Result<Tensor> {
    let dims = matrix_dims(scores);
    pattern.grid(dims)?;
    let matrix = scores.reshape(&dims)?;
    if pattern == Pattern::TwoFour {
        let groups = matrix.reshape(&[scores.count() / 4, 4])?;
        return dispatch::run_one(&KeepLargest { keep: 2, magnitude: false }, &[&groups])?.reshape(&dims);
    }
    let exhaustive = || dispatch::run_one(&Mask24 { form: Form24::TwoDimensional }, &[&matrix]);
    if pattern == Pattern::TwoFour2d {
        return exhaustive();
    }
    let greedy = mask24_greedy(&matrix.to_vec::<f32>()?, dims[0], dims[1])?;
    let mut mask: Vec<f32> = greedy.into_iter().map(|kept| f32::from(u8::from(kept))).collect();
    if pattern == Pattern::TwoFour2dFilled {
        fill_up(&mut mask, &exhaustive()?.to_vec::<f32>()?, dims[1]);
    }
    Tensor::from_slice(scores.device(), &dims, &mask)
}

/// Takes a 4 x 4 block from `full` where `mask` keeps fewer than 8 of it.
fn fill_up(mask: &mut [f32], full: &[f32], k: usize) {
    for (mask, full) in mask.chunks_mut(4 * k).zip(full.chunks(4 * k)) {
        for left in (0..k).step_by(4) {
            let block = || (0..4).flat_map(|r| (0..4).map(move |c| r * k + left + c));
            if block().map(|i| mask[i]).sum::<f32>() < 8.0 {
                block().for_each(|i| mask[i] = full[i]);
            }
        }
    }
}

fn check_finite(name: &str, scores: &Tensor) -> Result<()> {
    if scores.count() == 0 {
        return Ok(());
    }
    let found = dispatch::run_one(&CountNonFinite, &[scores])?.to_vec::<u32>()?;
    match found[..] {
        [0, ..] => Ok(()),
        [count, index, ..] => Err(Error::NonFinite {
            step: 0,
            layer: name.rsplit_once('.').map_or("model", |(layer, _)| layer).into(),
            tensor: format!("pruning scores of {name}"),
            count: count as usize,
            index: index as usize,
        }),
        _ => Ok(()),
    }
}

/// All elements end to end.
fn join(parts: &[Tensor]) -> Result<Option<Tensor>> {
    let mut flat = parts.iter().map(|part| part.reshape(&[part.count()])).collect::<Result<Vec<_>>>()?;
    while flat.len() > 1 {
        let concat = |some: &[Tensor]| match some {
            [one] => Ok(one.clone()),
            _ => dispatch::run_one(&Concat { axis: 0 }, &some.iter().collect::<Vec<_>>()),
        };
        flat = flat.chunks(MOST_JOINED).map(concat).collect::<Result<_>>()?;
    }
    Ok(flat.pop())
}

/// Inputs of [`Concat`] at most.
const MOST_JOINED: usize = 7;

/// The inverse of [`join`].
fn split(flat: &Tensor, like: &[Tensor]) -> Result<Vec<Tensor>> {
    let mut start = 0;
    let take = |part: &Tensor| {
        let length = part.count();
        start += length;
        let op = Slice { axis: 0, start: start - length, length };
        dispatch::run_one(&op, &[&flat.reshape(&[flat.count()])?])?.reshape(part.dims())
    };
    like.iter().map(take).collect()
}
