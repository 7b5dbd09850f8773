//! Configs of other systems: what comes over, what is reported, what is refused.

use std::path::Path;

use espalier::compress::pruning::Pattern;
use espalier::compress::structure::{Objective, Order, Score};
use espalier::recipe::Recipe;
use espalier::recipe::import::{Imported, System, from_bytes};

fn import(system: System, text: &str) -> espalier::Result<Imported> {
    from_bytes(system, Path::new("config.json"), text.as_bytes(), &Recipe::load(None, &[]).unwrap())
}

fn keys(imported: &Imported) -> Vec<&str> {
    imported.ignored.iter().map(|i| i.key.as_str()).collect()
}

const BMCOOK: &str = r#"{
  "distillation": { "ce_scale": 0.5, "ce_temp": 2, "mse_hidn_scale": 1, "mse_hidn_proj": true,
    "mse_hidn_module": ["[post]encoder.output_layernorm:[post]encoder.output_layernorm"] },
  "pruning": { "is_pruning": true, "pruning_mask_path": "prune_mask.bin", "mask_method": "m4n2_1d",
    "pruned_module": ["ffn.ffn.w_in.w.weight", "layers.1.self_att.self_attention.project_q"] },
  "quantization": { "is_quant": true },
  "MoEfication": { "is_moefy": true, "first_FFN_module": ["ffn.layernorm_before_ffn"] }
}"#;

#[test]
fn bmcook_becomes_a_recipe_and_says_what_it_left() {
    let imported = import(System::Bmcook, BMCOOK).unwrap();
    let recipe = &imported.recipe;
    assert!(recipe.structure.is_none() && recipe.hybrid.is_none());
    let sparsify = recipe.sparsify.as_ref().unwrap();
    assert_eq!(sparsify.pattern, Pattern::TwoFour);
    assert_eq!(
        sparsify.linears,
        ["blocks.0.ffn.in", "blocks.1.attention.query", "blocks.1.ffn.in", "blocks.2.ffn.in", "blocks.3.ffn.in"]
    );
    let distil = &recipe.quantize.as_ref().unwrap().distil;
    assert_eq!((distil.weights.hidden, distil.weights.soft, distil.temperature), (1.0, 0.5, 2.0));
    assert!(!distil.squared && distil.normalised);
    assert_eq!(recipe.experts.as_ref().unwrap().expert_size, 32);
    assert_eq!(
        keys(&imported),
        [
            "distillation.mse_hidn_module",
            "distillation.mse_hidn_proj",
            "pruning.pruning_mask_path",
            "MoEfication.first_FFN_module"
        ]
    );
    // What is emitted is a recipe.
    let text = recipe.to_toml().unwrap();
    assert_eq!(&Recipe::parse(Path::new("again.toml"), &text, &[]).unwrap(), recipe);
}

#[test]
fn bmcook_is_read_strictly() {
    for (from, to, place) in [
        ("\"ce_temp\"", "\"ce_temperature\"", "ce_temperature"),
        ("m4n2_1d", "m4n2_3d", "pruning.mask_method"),
        ("m4n2_1d", "sprune", "pruning.mask_method"),
        ("\"is_quant\": true", "\"is_quant\": \"yes\"", "quantization.is_quant"),
        ("layers.1.self_att", "layers.9.self_att", "pruning.pruned_module"),
        ("\"MoEfication\"", "\"moefication\"", "moefication"),
    ] {
        let error = import(System::Bmcook, &BMCOOK.replace(from, to)).unwrap_err();
        assert!(error.to_string().contains(place), "{to}: {error}");
    }
    assert!(import(System::Bmcook, &format!("{BMCOOK} {{}}")).is_err());
    assert!(import(System::Bmcook, "").is_err());
}

#[test]
fn what_bmcook_switches_off_is_no_stage() {
    let off = BMCOOK.replace("true", "false");
    let imported = import(System::Bmcook, &off).unwrap();
    assert!(
        imported.recipe.sparsify.is_none() && imported.recipe.quantize.is_none() && imported.recipe.experts.is_none()
    );
    assert!(keys(&imported).contains(&"pruning.pruned_module"));
}

#[test]
fn textpruner_becomes_structure_with_everything_reported_that_differs() {
    let text = r#"{ "config_class": "TransformerPruningConfig", "target_num_of_heads": 2, "target_ffn_size": 256,
        "pruning_method": "iterative", "n_iters": 8, "ffn_even_masking": false, "pruning_order": "head-first" }"#;
    let imported = import(System::Textpruner, text).unwrap();
    let structure = imported.recipe.structure.as_ref().unwrap();
    let (heads, ffn) = (structure.heads.unwrap(), structure.ffn.unwrap());
    assert_eq!((heads.keep, heads.even, heads.score, heads.normalise), (2, true, Score::Weights, false));
    assert_eq!((ffn.keep, ffn.even, ffn.multiple_of, ffn.score), (256, false, 1, Score::Weights));
    assert_eq!((structure.rounds, structure.order, structure.layers), (8, Order::HeadsFirst, None));
    assert!(keys(&imported).is_empty());
    let masks = r#"{ "config_class": "TransformerPruningConfig", "target_ffn_size": 256, "use_logits": true }"#;
    let imported = import(System::Textpruner, masks).unwrap();
    assert_eq!(imported.recipe.structure.as_ref().unwrap().loss, Objective::DenseKl);
    assert_eq!(keys(&imported), ["use_logits", "pruning_method"]);
    let words = r#"{ "config_class": "VocabularyPruningConfig", "min_count": 3 }"#;
    let imported = import(System::Textpruner, words).unwrap();
    let vocabulary = imported.recipe.structure.as_ref().unwrap().vocabulary.clone().unwrap();
    assert_eq!((vocabulary.min_count, vocabulary.text), (3, None));
    let general = r#"{ "config_class": "GeneralConfig", "use_device": "auto", "output_dir": "out" }"#;
    assert_eq!(keys(&import(System::Textpruner, general).unwrap()), ["use_device", "output_dir"]);
    for (text, place) in [
        (r#"{ "config_class": "VocabularyPruningConfig", "min_count": 0 }"#, "min_count"),
        (r#"{ "config_class": "TransformerPruningConfig", "target_heads": 3 }"#, "target_heads"),
        (r#"{ "config_class": "TransformerPruningConfig", "target_num_of_heads": 40 }"#, "target_num_of_heads"),
        (r#"{ "config_class": "OtherConfig" }"#, "OtherConfig"),
        ("{}", "config_class"),
    ] {
        let error = import(System::Textpruner, text).unwrap_err();
        assert!(error.to_string().contains(place), "{text}: {error}");
    }
}

#[test]
fn mistakes_name_their_key() {
    let pruning = r#"{ "config_class": "TransformerPruningConfig", "n_iters": "many" }"#;
    for (system, text, key) in [
        (System::Textpruner, pruning, "n_iters"),
        (System::Textpruner, &pruning.replace("n_iters", "n_rounds"), "n_rounds"),
        (System::Textpruner, &pruning.replace("TransformerPruning", "Other"), "config_class"),
        (System::Textpruner, "{}", "config_class"),
        (System::Bmcook, r#"{ "quantisation": {} }"#, "quantisation"),
        (System::Bmcook, r#"{ "pruning": { "is_prune": true } }"#, "pruning.is_prune"),
        (System::Bmcook, "3", "config"),
    ] {
        match import(system, text) {
            Err(espalier::Error::File { position, .. }) => assert_eq!(position, key, "{text}"),
            other => panic!("{text}: {other:?}"),
        }
    }
}

#[test]
fn arrays_are_no_sections() {
    for (system, text) in
        [(System::Bmcook, "[]"), (System::Bmcook, r#"{"quantization": [true]}"#), (System::Textpruner, "[]")]
    {
        let Err(error) = import(system, text) else { panic!("{text} is taken") };
        assert!(error.to_string().contains("config.json") && error.exit_code() == 3, "{text}: {error}");
    }
}
