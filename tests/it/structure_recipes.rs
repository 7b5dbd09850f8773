//! `[structure]` in whole flows: uneven blocks and a smaller vocabulary through every later stage, in every family.

use espalier::data::tokenizer::Tokenizer;
use espalier::data::vocabulary::VocabularyMap;
use espalier::nn::{Config, Model};
use espalier::recipe::{self, Recipe};
use espalier::report::{self, RunReport};
use espalier::train::store;

use crate::model::cpu;
use crate::training::{options, tiny};

fn run(recipe: &Recipe) -> (RunReport, Model, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let html = recipe::run(recipe, &cpu(), &options(&out)).unwrap();
    let report = report::read(html.with_file_name("report.json")).unwrap();
    for stage in &report.stages {
        assert!(stage.invariants.iter().all(|i| i.ok), "{}: {:?}", stage.name, stage.invariants);
    }
    let model = store::load_model(&out.join("model"), &cpu()).unwrap();
    (report, model, folder)
}

/// Without a line of the usual sizes.
const SIZES: [&str; 4] = [
    "structure.head_size=16",
    "structure.rounds=2",
    "structure.heads={ keep = 1 }",
    "structure.ffn={ keep = 32, floor = 16 }",
];

fn uneven(sets: &[&str]) -> Recipe {
    tiny(&[&SIZES[..], sets].concat())
}

#[test]
fn uneven_blocks_and_fewer_tokens_go_through_every_stage() {
    let sets = [
        "structure.vocabulary={ min_count = 20 }",
        "data.max_length=64",
        "data.vocabulary=1500",
        "structure.distil={ preset = \"tiny_bert\" }",
    ];
    let recipe = uneven(&[&sets[..3], &["model.heads=4", "structure.heads={ keep = 2 }"]].concat());
    let (report, model, folder) = run(&recipe);
    let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
    let usual = ["random", "structure", "sparsify", "quantize", "experts", "hybrid-teacher", "hybrid"];
    assert_eq!(names, [&["teacher", "vocabulary"][..], &usual].concat());
    let [teacher, fewer, structure] = [0, 1, 3].map(|stage: usize| &report.stages[stage]);
    assert!(fewer.total_bytes < teacher.total_bytes && structure.total_bytes < fewer.total_bytes);
    let heads: Vec<usize> = model.config.blocks.iter().map(|b| b.heads).collect();
    assert_eq!((heads.iter().sum::<usize>(), model.config.width), (4, 64));
    // The saved model's vocabulary, tokenizer and map are one.
    let saved = folder.path().join("run/model");
    let tokenizer = Tokenizer::load(&saved.join("tokenizer.json")).unwrap();
    let map: VocabularyMap = serde_json::from_slice(&std::fs::read(saved.join("vocabulary.json")).unwrap()).unwrap();
    let before = Tokenizer::load(&folder.path().join("run/tokenizer.json")).unwrap();
    assert_eq!((tokenizer.vocabulary(), map.before), (model.config.vocabulary, before.vocabulary()));
    assert_eq!(map.kept.len(), model.config.vocabulary);
    let mut same = 0;
    for text in ["The router opened the file.", "A network", "重启路由器", "zebra quux 🦀"] {
        let (old, new) = (before.encode(text).unwrap(), tokenizer.encode(text).unwrap());
        assert_eq!(tokenizer.decode(&new).unwrap(), text);
        if old.iter().all(|&id| map.id(id).is_some()) {
            assert_eq!(map.ids(&old, 1), new);
            same += 1;
        }
    }
    assert!(same > 0);
    // Everything is taken from the folder when it runs again.
    recipe::run(&recipe, &cpu(), &options(&folder.path().join("run"))).unwrap();
    // Layer by layer from a teacher with the same tokens.
    let alone = ["sparsify=false", "quantize=false", "experts=false", "hybrid=false", "structure.heads=false"];
    run(&uneven(&[&sets[..], &alone].concat()));
}

#[test]
fn heads_and_neurons_of_an_encoder_decoder_go() {
    let sets = ["model.family=t5", "model.heads=3", "structure.heads={ keep = 2 }", "structure.vocabulary={}"];
    let sets = [&sets[..], &["model.head_size=16", "structure.layers=2", "structure.compare_random=false"]].concat();
    let (report, model, _folder) = run(&uneven(&sets));
    let names: Vec<&str> = report.stages.iter().map(|s| s.name.as_str()).collect();
    let usual = ["structure", "sparsify", "quantize", "experts", "hybrid-teacher", "hybrid"];
    assert_eq!(names, [&["teacher", "vocabulary"][..], &usual].concat());
    let config = &model.config;
    let heads: usize = config.blocks.iter().map(|b| b.heads).sum();
    let across: usize = config.blocks[2..].iter().map(|b| b.heads_across()).sum();
    assert_eq!((config.encoder, config.blocks.len(), heads + across), (2, 4, 12));
    assert_eq!(config.blocks.iter().map(|b| b.ffn_width).sum::<usize>(), 4 * 32);
}

#[test]
fn a_taggers_structures_go_by_every_rule() {
    let sets = [
        "model.family=tagger",
        "model.activation=relu",
        "structure.layers=1",
        "structure.layers_method=top",
        "structure.order=heads_first",
        "structure.progress=cubic",
        "structure.loss=dense_kl",
        "structure.width=24",
        "structure.head_size=12",
        "structure.vocabulary={}",
        "structure.heads={ keep = 1, score = \"weights\", even = true }",
        "structure.ffn={ keep = 48, score = \"gate\", absolute = \"example\", even = true }",
    ];
    let (report, model, _folder) = run(&uneven(&sets));
    assert_eq!(report.stages.last().unwrap().name, "hybrid");
    let block = &model.config.blocks[0];
    assert_eq!((model.config.blocks.len(), model.config.width), (1, 24));
    assert_eq!((block.heads, block.head_size, block.ffn_width), (1, 12, 48));
    assert!(
        report.notes.iter().any(|note| note.starts_with("structure: blocks kept [0], 24 of 32 channels, heads [1]"))
    );
}

/// Blocks and heads take their masks along: zeros of what stays are held, in groups of four too.
#[test]
fn masks_go_with_blocks_and_heads() {
    for pattern in ["two_four", "unstructured"] {
        let pattern = format!("sparsify.pattern={pattern}");
        let sets = [
            "structure.ffn=false",
            "structure.layers=1",
            "structure.compare_random=false",
            "order=[\"sparsify\", \"structure\", \"quantize\"]",
            "experts=false",
            "hybrid=false",
            &pattern,
        ];
        let (report, model, _folder) = run(&uneven(&sets));
        let structure = report.stages.iter().find(|s| s.name == "structure").unwrap();
        let zeros = structure.invariants.iter().find(|i| i.name.contains("2:4") || i.name.contains("zero"));
        assert!(zeros.is_some(), "{:?}", structure.invariants);
        assert_eq!((model.config.blocks.len(), model.config.blocks[0].heads), (1, 1));
        assert_eq!(model.tensors.contains_key("blocks.0.attention.output.metadata"), pattern.ends_with("two_four"));
    }
    let refused =
        uneven(&["order=[\"structure\", \"sparsify\", \"quantize\", \"experts\", \"hybrid\"]"]).to_toml().unwrap();
    let order = "order=[\"sparsify\", \"structure\", \"quantize\", \"experts\", \"hybrid\"]".to_string();
    let error = Recipe::parse(std::path::Path::new("r.toml"), &refused, &[order]).unwrap_err().to_string();
    assert!(error.contains("groups"), "{error}");
}

#[test]
fn what_structure_cannot_do_is_refused_with_its_key() {
    for (set, key) in [
        ("structure.heads={ keep = 9 }", "structure.heads.keep"),
        ("structure.heads={ keep = 1, floor = 2 }", "structure.heads.floor"),
        ("structure.heads={ keep = 1, per_round = 0 }", "structure.heads.per_round"),
        ("structure.heads={ keep = 1, per_round = 1, even = true }", "structure.heads.per_round"),
        ("structure.ffn={ keep = 20 }", "structure.ffn.keep"),
        ("structure.ffn={ keep = 32, multiple_of = 24 }", "structure.ffn.multiple_of"),
        ("structure.ffn={ keep = 16, floor = 32 }", "structure.ffn.floor"),
        ("structure.rounds=0", "structure.rounds"),
        ("structure.width=33", "structure.width"),
        ("structure.width=100", "structure.width"),
        ("structure.layers_method={ subset = [0] }", "structure.layers_method.subset"),
        ("structure.layers_method={ subset = [0, 7] }", "structure.layers_method.subset"),
        ("structure.vocabulary={ min_count = 0 }", "structure.vocabulary.min_count"),
        ("structure.loss=entropy", "structure.loss"),
        ("structure.distil={ preset = \"tiny_bert\" }", "structure.distil.matches[3].feature"),
        ("experts.expert_size=32", "experts.expert_size"),
    ] {
        let mut table: toml::Table = toml::from_str(&uneven(&[]).to_toml().unwrap()).unwrap();
        if key == "structure.loss" {
            let structure = table.get_mut("structure").unwrap().as_table_mut().unwrap();
            structure.retain(|key, _| key != "heads" && key != "ffn");
        }
        let text = toml::to_string(&table).unwrap();
        let error = Recipe::parse(std::path::Path::new("r.toml"), &text, &[set.to_string()]).unwrap_err().to_string();
        assert!(error.contains(key), "{set}: {error}");
    }
}

/// Sizes of other teachers are read with the recipe.
#[test]
fn other_teachers_are_held_against_the_student() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tutor");
    let tutor = Model::init(Config::glm(crate::model::SIZE, 37), &cpu(), 1).unwrap();
    store::save(&path, &store::model_files(&tutor).unwrap(), Default::default()).unwrap();
    for (matched, key) in [
        ("teacher = -1, student = -1", None),
        ("teacher = 99, student = 1", Some("structure.distil.matches[0].teacher")),
        ("teacher = 1, student = 1, projection = \"none\"", Some("structure.distil.matches[0].projection")),
        ("teacher = 1, student = 1, projection = \"kept\"", Some("structure.distil.matches[0].projection")),
    ] {
        let distil = format!("{{ teachers = [{path:?}], matches = [{{ tutor = 1, {matched} }}] }}");
        let read = Recipe::load(None, &[format!("structure.distil={distil}")]);
        match (read, key) {
            (Ok(_), None) => {}
            (Err(error), Some(key)) => assert!(error.to_string().contains(key), "{matched}: {error}"),
            (read, _) => panic!("{matched}: {read:?}"),
        }
    }
}

/// Both spellings of today's keys are one recipe.
#[test]
fn keys_survive_the_resolved_recipe() {
    let recipe = uneven(&["structure.vocabulary={ min_count = 2 }", "structure.layers_method={ subset = [0, 1] }"]);
    let again = Recipe::parse(std::path::Path::new("again"), &recipe.to_toml().unwrap(), &[]).unwrap();
    assert_eq!(again, recipe);
}
