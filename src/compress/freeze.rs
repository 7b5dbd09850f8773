//! The deployable form: each linear's weight becomes the representation whose kernel runs it.

use crate::dispatch;
use crate::dtype::DType;
use crate::error::Result;
use crate::nn::Model;
use crate::ops::quant::GridFrom;
use crate::ops::sparse_bitmap;
use crate::ops::sparse24::{Compress24, Form24, Mask24};
use crate::tensor::Tensor;

use super::quantization::{Activations, Format, STEP, stored};

/// What the trained model promises about its weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// 2:4 along the reduction dimension.
    pub sparse: bool,
    pub quantized: Option<Format>,
}

/// Converts every linear of every block; embeddings, norms, biases, routers and the head stay f32.
pub fn freeze(model: &Model, form: Form) -> Result<Model> {
    let mut frozen = Model::new(model.config.clone(), model.tensors.clone(), model.device())?;
    for linear in model.config.all_linears() {
        convert(&mut frozen, &linear, form)?;
    }
    for i in 0..model.config.blocks.len() {
        for experts in [format!("blocks.{i}.ffn.experts.in"), format!("blocks.{i}.ffn.experts.out")] {
            convert(&mut frozen, &experts, Form { sparse: false, ..form })?;
        }
    }
    Ok(frozen)
}

fn convert(model: &mut Model, linear: &str, form: Form) -> Result<()> {
    let name = format!("{linear}.weight");
    if form == Form::default() || !model.tensors.contains_key(&name) {
        return Ok(());
    }
    let weight = model.get(&name)?.clone();
    let integers = form.quantized.map(|format| stored(model, linear, &format)).transpose()?;
    // Zeros are skipped by the float and the integer kernels; weight-only ones multiply them.
    let skipped = form.quantized.is_none_or(|format| format.activations != Activations::Float);
    let parts = match (form.quantized, integers) {
        (_, integers) if form.sparse && skipped && is_24(&weight)? => compressed(&weight, integers)?,
        (Some(format), Some(integers)) => dense(&weight, integers, &format)?,
        _ => return Ok(()),
    };
    for (part, tensor) in parts {
        model.tensors.insert(format!("{linear}.{part}"), tensor);
    }
    model.tensors.remove(&name);
    model.tensors.remove(&format!("{linear}.{STEP}"));
    Ok(())
}

/// What a model is deployed as: [`freeze`], and linears whose zeros follow no pattern without these, where that saves bytes.
///
/// # Errors
/// Those of the device.
pub fn deployable(model: &Model, form: Form) -> Result<Model> {
    let mut frozen = freeze(model, form)?;
    for linear in model.config.all_linears() {
        skip_zeros(&mut frozen, &linear, WORTH)?;
    }
    Ok(frozen)
}

/// Share of a dense weight's bytes that its bitmap form may take at most: a tenth must be saved.
const WORTH: f64 = 0.9;

/// Zeros that follow no pattern, skipped: the float or int8 weight of a linear of a frozen model becomes the words that are not
/// zero and bitmaps (`ops/sparse_bitmap.rs`), `.kept` and `.lists`, where they take at most `share` of its bytes. Int8 has one
/// scale per output channel.
pub fn skip_zeros(frozen: &mut Model, linear: &str, share: f64) -> Result<()> {
    let groups = frozen.tensors.get(&format!("{linear}.scale")).is_some_and(|scale| scale.dims().len() != 1);
    for name in ["weight", "int8"].map(|part| format!("{linear}.{part}")) {
        let Some(weight) = frozen.tensors.get(&name).filter(|w| w.dims().len() == 2 && !groups) else { continue };
        let words = match weight.dtype() {
            DType::F32 => true,
            DType::I8 => weight.shape().last().is_multiple_of(4),
            _ => false,
        };
        if !words || weight.count() == 0 {
            continue;
        }
        let [kept, lists] = sparse_bitmap::compress(weight)?;
        if (kept.meta().bytes() + lists.meta().bytes()) as f64 <= share * weight.meta().bytes() as f64 {
            frozen.tensors.remove(&name);
            frozen.tensors.insert(format!("{linear}.kept"), kept);
            frozen.tensors.insert(format!("{linear}.lists"), lists);
        }
    }
    Ok(())
}

type Parts = Vec<(&'static str, Tensor)>;

/// 2:4 storage of a weight, or of the integers that stand for it.
fn compressed(weight: &Tensor, integers: Option<(Tensor, Tensor)>) -> Result<Parts> {
    let mask = dispatch::run_one(&Mask24 { form: Form24::OneDimensional }, &[weight])?;
    let Some((q, scale)) = integers else {
        let parts = dispatch::run(&Compress24, &[weight, &mask])?;
        return Ok(vec![("values", parts[0].clone()), ("metadata", parts[1].clone())]);
    };
    // The integers travel as floats, which hold them exactly, and come back by a step of 1.
    let ones = Tensor::from_slice(weight.device(), &[1], &[1.0f32])?;
    let levels: Vec<f32> = q.to_vec::<i8>()?.into_iter().map(f32::from).collect();
    let levels = Tensor::from_slice(weight.device(), weight.dims(), &levels)?;
    let parts = dispatch::run(&Compress24, &[&levels, &mask])?;
    let store = Format::default().store(GridFrom::Step);
    let values = dispatch::run(&store, &[&parts[0], &ones])?[0].clone();
    Ok(vec![("values", values), ("metadata", parts[1].clone()), ("scale", scale)])
}

/// Integers with their scales: one per output channel (`[n]`, or `[E, n]` of experts) where inputs are integers too, else
/// one per group, and then of at most four bits two to a byte.
fn dense(weight: &Tensor, (q, scale): (Tensor, Tensor), format: &Format) -> Result<Parts> {
    let dims = weight.dims();
    let (channels, k) = dims.split_at(dims.len() - 1);
    if format.activations != Activations::Float {
        return Ok(vec![("int8", q), ("scale", scale.reshape(channels)?)]);
    }
    let groups = scale.count() / channels.iter().product::<usize>().max(1);
    let scale = scale.reshape(&[channels, &[groups]].concat())?;
    let length = k[0] / groups.max(1);
    if format.weight_bits() > 4 || !length.is_multiple_of(8) {
        return Ok(vec![("int8", q), ("scale", scale)]);
    }
    // As `ops/quant_int4.rs` stores them: plus 8, the lowest column in the lowest four bits.
    let nibble = |(b, q): (usize, &i8)| u32::from((q + 8).unsigned_abs() & 15) << (4 * b);
    let words: Vec<u32> = q.to_vec::<i8>()?.chunks(8).map(|w| w.iter().enumerate().map(nibble).sum()).collect();
    let packed = Tensor::from_slice(weight.device(), &[channels, &[k[0] / 8]].concat(), &words)?;
    Ok(vec![("int4", packed), ("scale", scale)])
}

/// Whether at most two of every four along the last axis are non-zero.
fn is_24(weight: &Tensor) -> Result<bool> {
    let values = weight.to_vec::<f32>()?;
    let two = |group: &[f32]| group.iter().filter(|&&w| w != 0.0).count() <= 2;
    Ok(weight.shape().last().is_multiple_of(4) && values.chunks(4).all(two))
}
