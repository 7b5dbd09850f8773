//! Tokens that go: their rows of the embedding and of the head.

use super::prune::select;
use crate::error::{Error, Result};
use crate::nn::{Config, Head, Model};
use crate::tensor::Tensor;

/// The model with the tokens `kept`, ids of its vocabulary, ascending; a token's new id is its place among them. A tied head is
/// the embedding; a tagging head has no tokens.
///
/// # Errors
/// `Error::Parameter` for ids that are none, not ascending or out of the vocabulary.
pub fn prune_vocabulary(model: &Model, kept: &[u32]) -> Result<Model> {
    let before = model.config.vocabulary;
    let ascending = kept.windows(2).all(|pair| pair[0] < pair[1]);
    if kept.is_empty() || !ascending || kept.last().is_some_and(|&id| id as usize >= before) {
        let value = format!("{} ids of {before}", kept.len());
        let allowed = "ids of the vocabulary, each once, ascending";
        return Err(Error::Parameter { op: "prune", parameter: "vocabulary", value, allowed });
    }
    let rows: Vec<usize> = kept.iter().map(|&id| id as usize).collect();
    let mut tensors = model.tensors.clone();
    let untied = matches!(model.config.head, Head::Language { tied: false });
    for name in ["embedding.tokens", "head.weight"].into_iter().take(if untied { 2 } else { 1 }) {
        let tensor = model.get(name)?;
        let (values, dims) = select(&tensor.to_vec()?, tensor.dims(), &(Some(rows.clone()), None));
        tensors.insert(name.into(), Tensor::from_slice(model.device(), &dims, &values)?);
    }
    Model::new(Config { vocabulary: kept.len(), ..model.config.clone() }, tensors, model.device())
}
