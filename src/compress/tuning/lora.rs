//! Low-rank updates (Hu et al. 2021): W + (alpha / r) B A with A `[r, k]` and B `[n, r]`. Under a mask the product runs on
//! M o (W + s B A) while it learns, and merging gives that very weight; on a grid of levels merging keeps the grid. Beside a
//! stored weight the update is whole, and what merges into one that is stored without its zeros is the rest of it.

use serde::{Deserialize, Serialize};

use super::{put, refuse, uniform};
use crate::dispatch;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::nn::Model;
use crate::nn::tuning::TUNING;
use crate::nn::ways::{columns, dense_levels, dense_weight};
use crate::ops::binary::{ADD, MUL};
use crate::ops::layout::Fill;
use crate::ops::matmul::Matmul;
use crate::ops::quant_int4::UnpackInt4;
use crate::ops::sparse_bitmap;
use crate::ops::sparse24::{Compress24, Decompress24};
use crate::shape::Shape;
use crate::tensor::Tensor;
use crate::train::lifecycle::Invariant;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    #[serde(default = "default_rank")]
    pub rank: usize,
    #[serde(default = "default_alpha")]
    pub alpha: f32,
    /// Parts of linear names that are updated; empty: query and value of every block's own attention, as in the paper.
    #[serde(default)]
    pub linears: Vec<String>,
}

fn default_rank() -> usize {
    8
}

fn default_alpha() -> f32 {
    16.0
}

impl Default for Lora {
    fn default() -> Self {
        Self { rank: default_rank(), alpha: default_alpha(), linears: Vec::new() }
    }
}

/// What merging did to one weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Merged {
    pub linear: String,
    /// Weights, and zeros of them before and after.
    pub count: usize,
    pub zeros: [usize; 2],
    /// Whether every zero stayed where it was.
    pub kept: bool,
}

impl Merged {
    /// As an invariant of the stage.
    pub fn invariant(merged: &[Merged]) -> Invariant {
        let zeros = |i: usize| merged.iter().map(|m| m.zeros[i]).sum::<usize>();
        Invariant {
            rule: format!("merging {} low-rank updates keeps every mask", merged.len()),
            measured: format!("{} zeros before, {} after", zeros(0), zeros(1)),
            holds: merged.iter().all(|m| m.kept),
        }
    }
}

impl Lora {
    /// Names of the linears that it updates.
    fn targets(&self, model: &Model) -> Vec<String> {
        let usual = ["attention.query".to_string(), "attention.value".to_string()];
        let parts = if self.linears.is_empty() { &usual[..] } else { &self.linears };
        let wanted = |name: &String| parts.iter().any(|part| !part.is_empty() && name.contains(part.as_str()));
        let all = model.config.all_linears().into_iter();
        all.filter(|name| wanted(name) && extents(model, name).is_some()).collect()
    }

    /// B starts at 0, so that the model computes what it did. Dense weights that have zeros keep them: they are a mask.
    pub(super) fn add(&self, model: &mut Model, seed: u64) -> Result<()> {
        if !self.alpha.is_finite() {
            return refuse("alpha", self.alpha.to_string(), "a finite number");
        }
        let targets = self.targets(model);
        if targets.is_empty() {
            let value = format!("{:?}", self.linears);
            return refuse("linears", value, "parts of names of linears that are no experts");
        }
        for (site, linear) in targets.iter().enumerate() {
            let Some([n, k]) = extents(model, linear) else { continue };
            let r = self.rank;
            if r == 0 || r > n.min(k) {
                return refuse("rank", format!("{r} for {n} x {k} weights"), "1 to the smaller extent");
            }
            put(model, format!("{linear}.lora.down"), &[r, k], &uniform(seed, site as u32, [r, k]))?;
            put(model, format!("{linear}.lora.up"), &[n, r], &vec![0.0; n * r])?;
            put(model, format!("{linear}.lora.factor"), &[1], &[self.alpha / r as f32])?;
            if model.tensors.contains_key(&format!("{linear}.weight")) {
                let mask: Vec<f32> =
                    model.values(&format!("{linear}.weight"))?.iter().map(|w| f32::from(*w != 0.0)).collect();
                if mask.contains(&0.0) {
                    put(model, format!("{linear}.lora.mask"), &[n, k], &mask)?;
                }
            }
        }
        Ok(())
    }
}

/// `[n, k]` of a linear in whatever representation it has.
fn extents(model: &Model, linear: &str) -> Option<[usize; 2]> {
    let dims = |part: &str| match model.tensors.get(&format!("{linear}.{part}"))?.dims() {
        &[n, k] => Some([n, k]),
        _ => None,
    };
    let part = |part: &str, factor: usize| dims(part).map(|[n, k]| [n, k * factor]);
    let bitmap = || Some([model.tensors.get(&format!("{linear}.lists"))?.dims()[1], columns(model, linear)?]);
    part("weight", 1).or(part("int8", 1)).or(part("values", 2)).or(part("int4", 8)).or_else(bitmap)
}

/// Merges every low-rank update into its weight and takes the added parameters away. A dense weight becomes
/// M o (W + s B A), bit for bit what the product ran on; an integer one the nearest levels of its own grid, the scales
/// untouched; a compressed 2:4 one keeps its metadata.
///
/// # Errors
/// `Parameter` where a model has other added parameters, which cannot be merged.
pub fn merge(model: &mut Model) -> Result<Vec<Merged>> {
    let of = |name: &str| name.strip_prefix(TUNING)?.strip_suffix(".lora.down").map(String::from);
    let linears: Vec<String> = model.tensors.keys().filter_map(|name| of(name)).collect();
    let other = model.tensors.keys().find(|name| name.starts_with(TUNING) && !name.contains(".lora."));
    if let Some(name) = other {
        return refuse("merge", name.clone(), "low-rank updates alone: adapters and prefixes are no weights");
    }
    let mut report = Vec::new();
    for linear in linears {
        report.push(merge_one(model, &linear)?);
    }
    super::remove(model);
    Ok(report)
}

/// s B A, with the ops of the forward pass.
fn update(model: &Model, linear: &str) -> Result<Tensor> {
    let part = |part: &str| model.get(&format!("{TUNING}{linear}.lora.{part}"));
    let product = dispatch::run_one(&Matmul::plain(false, false), &[part("up")?, part("down")?])?;
    dispatch::run_one(&MUL, &[&product, part("factor")?])
}

fn merge_one(model: &mut Model, linear: &str) -> Result<Merged> {
    let name = |part: &str| format!("{linear}.{part}");
    let update = update(model, linear)?;
    if let Some(weight) = model.tensors.get(&name("weight")).cloned() {
        let before = weight.to_vec::<f32>()?;
        let mut sum = dispatch::run_one(&ADD, &[&weight, &update])?;
        if let Some(mask) = model.tensors.get(&format!("{TUNING}{linear}.lora.mask")) {
            sum = dispatch::run_one(&MUL, &[&sum, mask])?;
        }
        let mut after = sum.to_vec::<f32>()?;
        keep_alive(&before, &mut after);
        let report = report(linear, before.iter().map(|w| *w == 0.0), after.iter().map(|w| *w == 0.0));
        model.tensors.insert(name("weight"), Tensor::from_slice(model.device(), weight.dims(), &after)?);
        return Ok(report);
    }
    if let Some(packed) = model.tensors.get(&name("int4")).cloned() {
        return merge_int4(model, linear, &packed, &update);
    }
    if let Some(q) = model.tensors.get(&name("int8")).cloned() {
        let scale = model.values(&name("scale"))?;
        let (before, after) = (q.to_vec::<i8>()?, on_grid(&q, &scale, &update)?);
        model.tensors.insert(name("int8"), Tensor::from_slice(model.device(), q.dims(), &after)?);
        // Zeros of a dense integer weight are levels like others.
        let same = before.iter().map(|_| false);
        return Ok(report(linear, same.clone(), same));
    }
    match model.tensors.contains_key(&name("kept")) {
        true => merge_bitmap(model, linear, &update),
        false => merge_24(model, linear, &update),
    }
}

/// Unstructured zeros, which stay where they are: of integers the levels of 0.
fn merge_bitmap(model: &mut Model, linear: &str, update: &Tensor) -> Result<Merged> {
    let name = |part: &str| format!("{linear}.{part}");
    let device = model.device().clone();
    let kept = |w: f32| f32::from(w != 0.0);
    let mask: Vec<f32> = dense_weight(model, linear)?.to_vec::<f32>()?.into_iter().map(kept).collect();
    let mask = Tensor::from_slice(&device, update.dims(), &mask)?;
    let update = dispatch::run_one(&MUL, &[update, &mask])?;
    let (merged, report) = match model.tensors.get(&name("scale")).map(Tensor::to_vec::<f32>).transpose()? {
        Some(scale) => {
            let levels = dense_levels(model, linear)?;
            let before = levels.to_vec::<i8>()?;
            let mut after = on_grid(&levels, &scale, &update)?;
            // A level that would round to 0 keeps the smallest of its sign, so that zeros are counted as declared.
            for (b, a) in before.iter().zip(&mut after).filter(|(b, a)| **b != 0 && **a == 0) {
                *a = b.signum();
            }
            let report = report(linear, before.iter().map(|q| *q == 0), after.iter().map(|q| *q == 0));
            (Tensor::from_slice(&device, levels.dims(), &after)?, report)
        }
        None => {
            let weight = dense_weight(model, linear)?;
            let before = weight.to_vec::<f32>()?;
            let mut after = dispatch::run_one(&ADD, &[&weight, &update])?.to_vec::<f32>()?;
            keep_alive(&before, &mut after);
            let report = report(linear, before.iter().map(|w| *w == 0.0), after.iter().map(|w| *w == 0.0));
            (Tensor::from_slice(&device, weight.dims(), &after)?, report)
        }
    };
    let [kept, lists] = sparse_bitmap::compress(&merged)?;
    model.tensors.insert(name("kept"), kept);
    model.tensors.insert(name("lists"), lists);
    Ok(report)
}

/// A kept weight that a sum has made exactly zero stays in the mask as next to nothing, so that zeros are counted as declared.
fn keep_alive(before: &[f32], after: &mut [f32]) {
    for (w, sum) in before.iter().zip(after).filter(|(w, sum)| **w != 0.0 && **sum == 0.0) {
        *sum = f32::MIN_POSITIVE.copysign(*w);
    }
}

fn report(linear: &str, before: impl Iterator<Item = bool>, after: impl Iterator<Item = bool>) -> Merged {
    let (mut count, mut zeros, mut kept) = (0, [0; 2], true);
    for (b, a) in before.zip(after) {
        count += 1;
        zeros[0] += usize::from(b);
        zeros[1] += usize::from(a);
        kept &= b == a;
    }
    Merged { linear: linear.into(), count, zeros, kept }
}

/// Nearest levels, ties to even, of q s + update on the same scales (of rows, or of groups along them), within the ends of
/// the grid, which are the largest level that is there.
fn on_grid(q: &Tensor, scale: &[f32], update: &Tensor) -> Result<Vec<i8>> {
    let group = (q.count() / scale.len().max(1)).max(1);
    let (q, update) = (q.to_vec::<i8>()?, update.to_vec::<f32>()?);
    let end = f64::from(q.iter().map(|q| q.unsigned_abs()).max().unwrap_or(0).min(127));
    let level = |(i, (q, u)): (usize, (&i8, &f32))| {
        let s = scale.get(i / group).copied().unwrap_or(1.0);
        // A row of zeros has nothing to round to.
        let step = if s > 0.0 { f64::from(*u) / f64::from(s) } else { 0.0 };
        (f64::from(*q) + step).round_ties_even().clamp(-end, end) as i8
    };
    Ok(q.iter().zip(&update).enumerate().map(level).collect())
}

/// 2:4: the update is added where the metadata has a value.
fn merge_24(model: &mut Model, linear: &str, update: &Tensor) -> Result<Merged> {
    let name = |part: &str| format!("{linear}.{part}");
    let (values, metadata) = (model.get(&name("values"))?.clone(), model.get(&name("metadata"))?.clone());
    let [n, half] = values.dims()[..] else {
        return Err(Error::Shape { op: "merge", rule: "2:4 values [n, k/2]", got: values.meta().to_string() });
    };
    let ones = Fill { value: 1.0, dims: Shape::new(&[n, half])?, dtype: DType::F32 };
    let ones = dispatch::one(dispatch::run_on(model.device(), &ones, &[])?, "fill")?;
    let mask = dispatch::run_one(&Decompress24 { k: 2 * half }, &[&ones, &metadata])?;
    let kept = dispatch::run(&Compress24, &[update, &mask])?;
    let (update, same) = (&kept[0], kept[1].to_vec::<u32>()? == metadata.to_vec::<u32>()?);
    if !same {
        return Err(Error::file("model", name("metadata"), "is no 2:4 metadata that compression gives"));
    }
    let (before, after): (Vec<bool>, Vec<bool>);
    if let Some(scale) = model.tensors.get(&name("scale")).map(Tensor::to_vec::<f32>).transpose()? {
        let levels = on_grid(&values, &scale, update)?;
        (before, after) = (vec![false; levels.len()], vec![false; levels.len()]);
        model.tensors.insert(name("values"), Tensor::from_slice(model.device(), values.dims(), &levels)?);
    } else {
        let own = values.to_vec::<f32>()?;
        let mut sum = dispatch::run_one(&ADD, &[&values, update])?.to_vec::<f32>()?;
        keep_alive(&own, &mut sum);
        // A kept place that was zero is no zero of the mask.
        (before, after) = (vec![false; own.len()], vec![false; own.len()]);
        model.tensors.insert(name("values"), Tensor::from_slice(model.device(), values.dims(), &sum)?);
    }
    let mut merged = report(linear, before.into_iter(), after.into_iter());
    // The other half of every group is not even stored.
    (merged.count, merged.zeros) = (2 * merged.count, [merged.count; 2]);
    Ok(merged)
}

/// Weight-only int4 in groups: nearest of the levels -7 to 7 on the same scales.
fn merge_int4(model: &mut Model, linear: &str, packed: &Tensor, update: &Tensor) -> Result<Merged> {
    let name = |part: &str| format!("{linear}.{part}");
    let scales = model.get(&name("scale"))?.clone();
    let [n, words] = packed.dims()[..] else {
        return Err(Error::Shape { op: "merge", rule: "packed [n, k/8]", got: packed.meta().to_string() });
    };
    let k = 8 * words;
    let group = k / scales.shape().last().max(1);
    let weight = dispatch::run_one(&UnpackInt4 { group }, &[packed, &scales])?.to_vec::<f32>()?;
    let (scales, update) = (scales.to_vec::<f32>()?, update.to_vec::<f32>()?);
    let mut levels = vec![0u32; n * words];
    for (i, (w, u)) in weight.iter().zip(&update).enumerate() {
        let s = scales[i / group];
        let level = if s > 0.0 { ((f64::from(*w) + f64::from(*u)) / f64::from(s)).round_ties_even() } else { 0.0 };
        levels[i / 8] |= ((level.clamp(-7.0, 7.0) + 8.0) as u32) << (4 * (i % 8));
    }
    model.tensors.insert(name("int4"), Tensor::from_slice(model.device(), &[n, words], &levels)?);
    Ok(report(linear, weight.iter().map(|_| false), weight.iter().map(|_| false)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_weight_that_a_sum_makes_zero_is_still_kept() {
        let mut after = [0.0, 0.0, 1.0, -0.0];
        keep_alive(&[0.0, -0.5, 0.5, 0.25], &mut after);
        assert_eq!(after, [0.0, -f32::MIN_POSITIVE, 1.0, f32::MIN_POSITIVE]);
    }

    #[test]
    fn levels_stay_on_the_grid() {
        let device = crate::device::open("cpu").unwrap();
        let q = Tensor::from_slice(&device, &[2, 3], &[0i8, 126, -127, 5, 0, 1]).unwrap();
        // Half steps round to even, rows of scale 0 stay, ends hold.
        let update = Tensor::from_slice(&device, &[2, 3], &[0.25f32, 2.0, -3.0, 1.0, 1.0, 1.0]).unwrap();
        assert_eq!(on_grid(&q, &[0.5, 0.0], &update).unwrap(), [0, 127, -127, 5, 0, 1]);
        let update = Tensor::from_slice(&device, &[2, 3], &[0.75f32, 0.0, 0.0, f32::NAN, 0.0, 0.0]).unwrap();
        assert_eq!(on_grid(&q, &[0.5, 1.0], &update).unwrap()[0], 2);
    }
}
