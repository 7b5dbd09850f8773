//! The deployable form: each linear's weight becomes the representation whose kernel runs it.

use crate::dispatch;
use crate::error::Result;
use crate::nn::Model;
use crate::ops::sparse24::{Compress24, Form24, Mask24};
use crate::tensor::Tensor;

use super::quantization::quantize_weight;

/// What the trained model promises about its weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// 2:4 along the reduction dimension.
    pub sparse: bool,
    pub int8: bool,
}

/// Converts every linear of every block; embeddings, norms, biases, routers and the head stay f32.
pub fn freeze(model: &Model, form: Form) -> Result<Model> {
    let mut frozen = Model::new(model.config.clone(), model.tensors.clone(), model.device())?;
    for linear in model.config.all_linears() {
        convert(&mut frozen, &linear, form)?;
    }
    for i in 0..model.config.blocks.len() {
        for experts in [format!("blocks.{i}.ffn.experts.in"), format!("blocks.{i}.ffn.experts.out")] {
            if form.int8 {
                convert(&mut frozen, &experts, Form { sparse: false, int8: true })?;
            }
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
    let mut put = |part: &str, tensor: Tensor| model.tensors.insert(format!("{linear}.{part}"), tensor);
    if form.sparse && is_24(&weight)? {
        let mask = dispatch::run_one(&Mask24 { form: Form24::OneDimensional }, &[&weight])?;
        let compressed = dispatch::run(&Compress24, &[&weight, &mask])?;
        let (values, metadata) = (compressed[0].clone(), compressed[1].clone());
        if form.int8 {
            // The largest magnitude of a row survives compression, so the scale is the uncompressed row's.
            let (q, scale) = quantize_weight(&values, 8)?;
            put("values", q);
            put("scale", scale);
        } else {
            put("values", values);
        }
        put("metadata", metadata);
    } else if form.int8 {
        let (q, scale) = quantize_weight(&weight, 8)?;
        // One scale per output channel: [n], or [E, n] of experts.
        let dims = weight.dims();
        put("int8", q);
        put("scale", scale.reshape(&dims[..dims.len() - 1])?);
    } else {
        return Ok(());
    }
    model.tensors.remove(&name);
    Ok(())
}

/// Whether at most two of every four along the last axis are non-zero.
fn is_24(weight: &Tensor) -> Result<bool> {
    let values = weight.to_vec::<f32>()?;
    let two = |group: &[f32]| group.iter().filter(|&&w| w != 0.0).count() <= 2;
    Ok(weight.shape().last().is_multiple_of(4) && values.chunks(4).all(two))
}
