//! TextPruner's JSON configs (airaria/TextPruner): one file holds one `config_class`.

use std::path::Path;

use serde::Deserialize;

use super::{Draft, Imported, parse, value};
use crate::error::{Error, Result};

#[derive(Deserialize)]
#[serde(tag = "config_class")]
enum Config {
    #[serde(rename = "GeneralConfig")]
    General(General),
    #[serde(rename = "VocabularyPruningConfig")]
    Vocabulary(Vocabulary),
    #[serde(rename = "TransformerPruningConfig")]
    Transformer(Transformer),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct General {
    #[serde(default)]
    use_device: Option<String>,
    #[serde(default)]
    output_dir: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vocabulary {
    #[serde(default)]
    min_count: Option<u64>,
    #[serde(default)]
    prune_lm_head: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Transformer {
    target_ffn_size: Option<usize>,
    target_num_of_heads: Option<usize>,
    pruning_method: Method,
    ffn_even_masking: bool,
    head_even_masking: bool,
    n_iters: usize,
    multiple_of: usize,
    pruning_order: Option<Order>,
    use_logits: bool,
}

impl Default for Transformer {
    fn default() -> Self {
        Self {
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
enum Order {
    HeadFirst,
    FfnFirst,
}

pub(super) fn import(path: &Path, bytes: &[u8], mut draft: Draft) -> Result<Imported> {
    match parse(path, bytes)? {
        Config::General(general) => {
            for (key, value, reason) in [
                ("use_device", general.use_device, "espalier run takes --device"),
                ("output_dir", general.output_dir, "espalier run takes --out"),
            ] {
                if let Some(value) = value {
                    draft.ignore(key, value, reason);
                }
            }
        }
        Config::Vocabulary(Vocabulary { min_count, prune_lm_head }) => {
            let (count, head) = (min_count.unwrap_or(1), prune_lm_head.unwrap_or("auto".into()));
            let rule = format!("no stage prunes vocabularies yet (min_count {count}, prune_lm_head {head})");
            return Err(Error::file(path, "config_class", rule));
        }
        Config::Transformer(transformer) => structure(path, &transformer, &mut draft)?,
    }
    draft.finish(path)
}

/// TextPruner takes whole heads and neurons out; `[structure]` narrows every head and, in the same ratio, the FFN. What comes
/// over is the attention width, and everything that this changes is reported.
fn structure(path: &Path, config: &Transformer, draft: &mut Draft) -> Result<()> {
    let model = draft.base.model;
    let heads = config.target_num_of_heads.unwrap_or(model.heads);
    if heads == 0 || heads > model.heads {
        let rule = format!("{heads} where the base recipe's model has {} heads", model.heads);
        return Err(Error::file(path, "target_num_of_heads", rule));
    }
    let ffn = config.target_ffn_size.unwrap_or(model.ffn_width);
    if ffn == 0 || ffn > model.ffn_width {
        let rule = format!("{ffn} where the base recipe's model has {} neurons", model.ffn_width);
        return Err(Error::file(path, "target_ffn_size", rule));
    }
    // Rotary pairs of both halves stay whole in multiples of 4.
    let head_size = (model.head_size * heads / model.heads / 4 * 4).max(4);
    let kept = format!("{heads} of {} heads", model.heads);
    let reason = format!(
        "all {} heads stay, each with {head_size} of {} dimensions: an attention width of {} where whole heads give {}",
        model.heads,
        model.head_size,
        model.heads * head_size,
        heads * model.head_size
    );
    draft.ignore("target_num_of_heads", kept, &reason);
    let width = crate::compress::structure::scaled_ffn(model.ffn_width, model.head_size, head_size);
    if config.target_ffn_size.is_some() {
        draft.ignore("target_ffn_size", ffn, &format!("the FFN follows the heads' ratio: {width} neurons"));
    }
    for (key, set, reason) in [
        (
            "pruning_method",
            matches!(config.pruning_method, Method::Masks),
            "structures are chosen by importance on calibration text",
        ),
        ("ffn_even_masking", !config.ffn_even_masking, "every block keeps as many neurons"),
        ("head_even_masking", !config.head_even_masking, "every block keeps as many dimensions"),
        ("n_iters", config.n_iters != 1, "structures go in one round, then the student recovers by training"),
        ("multiple_of", config.multiple_of != 1, "FFN widths are multiples of 16, head sizes of 4"),
        ("pruning_order", config.pruning_order.is_some(), "heads and neurons are chosen together"),
        ("use_logits", config.use_logits, "importance is that of the labels' loss"),
    ] {
        if set {
            draft.ignore(key, "set", reason);
        }
    }
    let mut section = toml::Table::new();
    section.insert("layers".into(), value(&model.layers)?);
    section.insert("head_size".into(), value(&head_size)?);
    draft.stage("structure", section, true)
}
