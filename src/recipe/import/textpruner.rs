//! TextPruner's JSON configs (airaria/TextPruner): one file holds one `config_class`.

use std::path::Path;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{Draft, Imported, parse, value};
use crate::compress::structure::gates::Absolute;
use crate::compress::structure::{Heads, Neurons, Objective, Order, Score};
use crate::error::{Error, Result};

/// Read before the rest, whose errors then name their keys.
#[derive(Deserialize)]
struct Classed {
    config_class: Class,
}

#[derive(Deserialize)]
enum Class {
    #[serde(rename = "GeneralConfig")]
    General,
    #[serde(rename = "VocabularyPruningConfig")]
    Vocabulary,
    #[serde(rename = "TransformerPruningConfig")]
    Transformer,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct General {
    #[serde(rename = "config_class")]
    _class: IgnoredAny,
    #[serde(default)]
    use_device: Option<String>,
    #[serde(default)]
    output_dir: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vocabulary {
    #[serde(rename = "config_class")]
    _class: IgnoredAny,
    #[serde(default)]
    min_count: Option<u64>,
    #[serde(default)]
    prune_lm_head: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Transformer {
    #[serde(rename = "config_class")]
    _class: IgnoredAny,
    target_ffn_size: Option<usize>,
    target_num_of_heads: Option<usize>,
    pruning_method: Method,
    ffn_even_masking: bool,
    head_even_masking: bool,
    n_iters: usize,
    multiple_of: usize,
    pruning_order: Option<Direction>,
    use_logits: bool,
}

impl Default for Transformer {
    fn default() -> Self {
        Self {
            _class: IgnoredAny,
            target_ffn_size: None,
            target_num_of_heads: None,
            pruning_method: Method::Masks,
            ffn_even_masking: true,
            head_even_masking: true,
            n_iters: 1,
            multiple_of: 1,
            pruning_order: None,
            use_logits: false,
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Method {
    Masks,
    Iterative,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Direction {
    HeadFirst,
    FfnFirst,
}

pub(super) fn import(path: &Path, bytes: &[u8], mut draft: Draft) -> Result<Imported> {
    match parse::<Classed>(path, bytes)?.config_class {
        Class::General => {
            let general: General = parse(path, bytes)?;
            for (key, value, reason) in [
                ("use_device", general.use_device, "espalier run takes --device"),
                ("output_dir", general.output_dir, "espalier run takes --out"),
            ] {
                if let Some(value) = value {
                    draft.ignore(key, value, reason);
                }
            }
        }
        Class::Vocabulary => {
            let Vocabulary { min_count, prune_lm_head, .. } = parse(path, bytes)?;
            if prune_lm_head == Some(false.into()) {
                draft.ignore("prune_lm_head", false, "the head's rows go with the embedding's");
            }
            let mut section = toml::Table::new();
            let vocabulary = toml::Table::from_iter([("min_count".to_string(), value(&min_count.unwrap_or(1))?)]);
            section.insert("vocabulary".into(), toml::Value::Table(vocabulary));
            draft.stage("structure", section, true)?;
        }
        Class::Transformer => structure(path, &parse(path, bytes)?, &mut draft)?,
    }
    draft.finish(path)
}

/// Whole heads and neurons go by TextPruner's importance; what it does otherwise is reported.
fn structure(path: &Path, config: &Transformer, draft: &mut Draft) -> Result<()> {
    let model = draft.base.model;
    let mut section = toml::Table::new();
    if let Some(keep) = config.target_num_of_heads {
        if keep == 0 || keep > model.heads {
            let rule = format!("{keep} where the base recipe's model has {} heads", model.heads);
            return Err(Error::file(path, "target_num_of_heads", rule));
        }
        let heads = Heads {
            keep,
            score: Score::Weights,
            absolute: Absolute::Batch,
            normalise: false,
            even: config.head_even_masking,
            floor: 1,
            per_round: None,
        };
        section.insert("heads".into(), value(&heads)?);
    }
    if let Some(keep) = config.target_ffn_size {
        if keep == 0 || keep > model.ffn_width {
            let rule = format!("{keep} where the base recipe's model has {} neurons", model.ffn_width);
            return Err(Error::file(path, "target_ffn_size", rule));
        }
        let ffn = Neurons {
            keep,
            score: Score::Weights,
            absolute: Absolute::Batch,
            normalise: false,
            even: config.ffn_even_masking,
            floor: config.multiple_of.clamp(1, keep),
            multiple_of: config.multiple_of,
        };
        section.insert("ffn".into(), value(&ffn)?);
    }
    section.insert("rounds".into(), value(&config.n_iters)?);
    let order = match config.pruning_order {
        None => Order::Together,
        Some(Direction::HeadFirst) => Order::HeadsFirst,
        Some(Direction::FfnFirst) => Order::FfnFirst,
    };
    section.insert("order".into(), value(&order)?);
    if config.use_logits {
        section.insert("loss".into(), value(&Objective::DenseKl)?);
        let reason = "until something has gone its gradient is 0, and the entropy of the model's own answers decides";
        draft.ignore("use_logits", true, reason);
    }
    if matches!(config.pruning_method, Method::Masks) {
        draft.ignore("pruning_method", "masks", "structures are chosen by importance on calibration text");
    }
    draft.stage("structure", section, true)
}
