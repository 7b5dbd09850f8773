//! BMCook's JSON config (OpenBMB/BMCook 0.1.0), by the keys that its code reads; those of its README differ in places.

use std::path::Path;

use serde::Deserialize;

use super::{Draft, Imported, parse, value};
use crate::compress::distillation::Weights;
use crate::compress::pruning::Pattern;
use crate::error::{Error, Result};
use crate::nn::Config as Model;
use crate::recipe::schema::{Distil, HiddenProjection};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    #[serde(default)]
    distillation: Distillation,
    #[serde(default)]
    pruning: Pruning,
    #[serde(default)]
    quantization: Quantization,
    #[serde(default, rename = "MoEfication")]
    moefication: Moefication,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Distillation {
    ce_scale: f32,
    ce_temp: f32,
    mse_hidn_scale: f32,
    mse_hidn_module: Vec<String>,
    mse_hidn_proj: bool,
    mse_att_scale: f32,
    mse_att_module: Vec<String>,
}

impl Default for Distillation {
    fn default() -> Self {
        Self {
            ce_scale: 0.0,
            ce_temp: 1.0,
            mse_hidn_scale: 0.0,
            mse_hidn_module: Vec::new(),
            mse_hidn_proj: false,
            mse_att_scale: 0.0,
            mse_att_module: Vec::new(),
        }
    }
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Pruning {
    is_pruning: bool,
    pruning_mask_path: Option<String>,
    pruned_module: Vec<String>,
    mask_method: Option<MaskMethod>,
    sprune: Option<serde_json::Value>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum MaskMethod {
    M4n2_1d,
    M4n2_2d,
    Sprune,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Quantization {
    is_quant: bool,
    quantized_module: Vec<String>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct Moefication {
    is_moefy: bool,
    #[serde(rename = "first_FFN_module")]
    first_ffn_module: Vec<String>,
}

/// The paper's experts: 32 neurons each, 20 % of them per token (compression.md's defaults; the config has no keys for it).
const EXPERT_SIZE: i64 = 32;
const SHARE: f64 = 0.2;

/// Names of ModelCenter's parameters of a block by the part that they are here.
const NAMES: [(&str, &str); 6] = [
    ("attention.query", "self_att.self_attention.project_q.weight"),
    ("attention.key", "self_att.self_attention.project_k.weight"),
    ("attention.value", "self_att.self_attention.project_v.weight"),
    ("attention.output", "self_att.self_attention.attention_out.weight"),
    ("ffn.in", "ffn.ffn.w_in.w.weight"),
    ("ffn.out", "ffn.ffn.w_out.weight"),
];

pub(super) fn import(path: &Path, bytes: &[u8], mut draft: Draft) -> Result<Imported> {
    let config: Config = parse(path, bytes)?;
    let distil = distil(&config.distillation, &mut draft);
    pruning(path, &config.pruning, &distil, &mut draft)?;
    let quantization = &config.quantization;
    if quantization.is_quant {
        if !quantization.quantized_module.is_empty() {
            let reason = "[quantize] quantizes every linear of every block";
            draft.ignore("quantization.quantized_module", format!("{:?}", quantization.quantized_module), reason);
        }
        let section = toml::Table::from_iter([("distil".to_string(), value(&distil)?)]);
        draft.stage("quantize", section, true)?;
    } else if !quantization.quantized_module.is_empty() {
        off(&mut draft, "quantization.quantized_module", "is_quant");
    }
    let moefication = &config.moefication;
    if !moefication.first_ffn_module.is_empty() {
        let reason = "inputs of every FFN are seen while experts are made: none has to be named";
        draft.ignore("MoEfication.first_FFN_module", format!("{:?}", moefication.first_ffn_module), reason);
    }
    if moefication.is_moefy {
        let section = [("expert_size", toml::Value::Integer(EXPERT_SIZE)), ("share", toml::Value::Float(SHARE))];
        let section = section.map(|(key, value)| (key.to_string(), value));
        draft.stage("experts", toml::Table::from_iter(section), false)?;
    }
    draft.finish(path)
}

fn off(draft: &mut Draft, key: &str, switch: &str) {
    draft.ignore(key, "set", &format!("{switch} is false"));
}

/// BMCook's losses: cross-entropy with the teacher's distribution without T^2 (the same gradient as KL), hidden states each
/// divided by its mean row norm, both beside the model's own loss.
fn distil(config: &Distillation, draft: &mut Draft) -> Distil {
    if !config.mse_hidn_module.is_empty() {
        let reason = "the last hidden states of student and teacher are compared, after the final norm";
        draft.ignore("distillation.mse_hidn_module", format!("{:?}", config.mse_hidn_module), reason);
    }
    for (key, set) in
        [("mse_att_scale", config.mse_att_scale != 0.0), ("mse_att_module", !config.mse_att_module.is_empty())]
    {
        if set {
            draft.ignore(&format!("distillation.{key}"), "set", "BMCook declares attention losses and computes none");
        }
    }
    if config.mse_hidn_proj {
        let reason = "the projection goes from the student to the teacher; BMCook's goes the other way (preset \"bmcook\" has it)";
        draft.ignore("distillation.mse_hidn_proj", "true", reason);
    }
    Distil {
        weights: Weights { hidden: config.mse_hidn_scale, soft: config.ce_scale, hard: 0.0 },
        gold: Some(1.0),
        temperature: config.ce_temp,
        squared: false,
        normalised: true,
        projection: if config.mse_hidn_proj { HiddenProjection::Learned } else { HiddenProjection::Kept },
        ..Distil::default()
    }
}

fn pruning(path: &Path, config: &Pruning, distil: &Distil, draft: &mut Draft) -> Result<()> {
    if !config.is_pruning {
        let set = [
            ("pruning_mask_path", config.pruning_mask_path.is_some()),
            ("pruned_module", !config.pruned_module.is_empty()),
            ("mask_method", config.mask_method.is_some()),
            ("sprune", config.sprune.is_some()),
        ];
        for (key, _) in set.into_iter().filter(|(_, set)| *set) {
            off(draft, &format!("pruning.{key}"), "is_pruning");
        }
        return Ok(());
    }
    if let Some(mask) = &config.pruning_mask_path {
        draft.ignore(
            "pruning.pruning_mask_path",
            mask,
            "masks are made of the weights as they are when the stage starts",
        );
    }
    let pattern = match config.mask_method {
        Some(MaskMethod::Sprune) => {
            let rule = "sprune (L0 gates) has no counterpart in [sparsify]; m4n2_1d and m4n2_2d have";
            return Err(Error::file(path, "pruning.mask_method", rule));
        }
        Some(MaskMethod::M4n2_2d) => Pattern::TwoFour2dGreedy,
        Some(MaskMethod::M4n2_1d) | None => Pattern::TwoFour,
    };
    if config.sprune.is_some() {
        draft.ignore("pruning.sprune", "set", "mask_method is another one");
    }
    let mut section = toml::Table::new();
    section.insert("pattern".into(), value(&pattern)?);
    section.insert("linears".into(), value(&linears(path, config, draft)?)?);
    section.insert("distil".into(), value(distil)?);
    draft.stage("sparsify", section, true)
}

/// Parts of names here that the config's parts of names choose there.
fn linears(path: &Path, config: &Pruning, draft: &Draft) -> Result<Vec<String>> {
    let layers = draft.base.model.layers;
    let all: Vec<(String, String)> = (0..layers)
        .flat_map(|i| Model::linears(i).into_iter().map(move |own| (i, own)))
        .filter_map(|(i, own)| {
            let part = own.split_once('.')?.1.split_once('.')?.1.to_string();
            let (_, foreign) = NAMES.iter().find(|(here, _)| *here == part)?;
            Some((own, format!("encoder.layers.{i}.{foreign}")))
        })
        .collect();
    for part in &config.pruned_module {
        if !all.iter().any(|(_, foreign)| foreign.contains(part)) {
            let names: Vec<&str> = NAMES.iter().map(|(_, foreign)| *foreign).collect();
            let rule =
                format!("{part:?} names no linear of {layers} blocks: encoder.layers.N. with {}", names.join(", "));
            return Err(Error::file(path, "pruning.pruned_module", rule));
        }
    }
    let chosen = |(_, foreign): &&(String, String)| config.pruned_module.iter().any(|part| foreign.contains(part));
    let chosen: Vec<String> = all.iter().filter(chosen).map(|(own, _)| own.clone()).collect();
    // Without a name BMCook prunes nothing.
    if chosen.is_empty() {
        return Err(Error::file(path, "pruning.pruned_module", "is empty: nothing would be pruned"));
    }
    Ok(if chosen.len() == all.len() { Vec::new() } else { chosen })
}
