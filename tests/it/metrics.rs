//! The metrics against the programs they must equal: sacreBLEU 2.6.0 and seqeval 1.2.2.

use std::path::Path;

use espalier::metrics::{BleuTokenizer, EntityRule, TagScheme, bleu, chrf, entity_f1};
use serde::Deserialize;

const BOUND: f64 = 1e-6;

fn golden<T: serde::de::DeserializeOwned>(name: &str) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[derive(Deserialize)]
struct Translations {
    signatures: Signatures,
    cases: Vec<Translation>,
}

#[derive(Deserialize)]
struct Signatures {
    #[serde(rename = "13a")]
    mteval13a: String,
    zh: String,
    char: String,
    intl: String,
    chrf: String,
    #[serde(rename = "chrf++")]
    chrf_words: String,
}

#[derive(Deserialize)]
struct Translation {
    hypotheses: Vec<String>,
    references: Vec<String>,
    #[serde(rename = "13a")]
    mteval13a: f64,
    zh: f64,
    char: f64,
    intl: f64,
    chrf: f64,
    #[serde(rename = "chrf++")]
    chrf_words: f64,
}

#[test]
fn bleu_and_chrf_equal_sacrebleu() {
    let Translations { signatures, cases } = golden("translation.json");
    assert!(cases.len() >= 250);
    for (index, case) in cases.iter().enumerate() {
        for (tokenizer, expected, signature) in [
            (BleuTokenizer::Mteval13a, case.mteval13a, &signatures.mteval13a),
            (BleuTokenizer::Zh, case.zh, &signatures.zh),
            (BleuTokenizer::Char, case.char, &signatures.char),
            (BleuTokenizer::Intl, case.intl, &signatures.intl),
        ] {
            let got = bleu(&case.hypotheses, &case.references, tokenizer).unwrap();
            assert!(
                (got.score - expected).abs() < BOUND,
                "case {index}, {tokenizer:?}: {} instead of {expected} for {:?} against {:?}",
                got.score,
                case.hypotheses,
                case.references
            );
            assert_eq!(&got.signature, signature);
        }
        for (word_order, expected, signature) in
            [(0, case.chrf, &signatures.chrf), (2, case.chrf_words, &signatures.chrf_words)]
        {
            let got = chrf(&case.hypotheses, &case.references, word_order).unwrap();
            assert!(
                (got.score - expected).abs() < BOUND,
                "case {index}, word order {word_order}: {} instead of {expected} for {:?} against {:?}",
                got.score,
                case.hypotheses,
                case.references
            );
            assert_eq!(&got.signature, signature);
        }
    }
}

/// Values noted independently of the golden file, so that a wrong regeneration cannot move both.
#[test]
fn three_lines_with_known_scores() {
    let hypotheses = ["无法打开文件：权限不够", "请输入新的 UNIX 密码：", "The file 'a.txt' is missing."];
    let references = ["无法打开文件：权限不足", "输入新的 UNIX 密码：", "The file 'a.txt' was not found."];
    for (tokenizer, expected) in [
        (BleuTokenizer::Zh, 79.0471048),
        (BleuTokenizer::Mteval13a, 46.1836926),
        (BleuTokenizer::Char, 71.5000631),
        (BleuTokenizer::Intl, 57.0542020),
    ] {
        let score = bleu(&hypotheses, &references, tokenizer).unwrap().score;
        assert!((score - expected).abs() < BOUND, "{tokenizer:?}: {score}");
    }
    assert!((chrf(&hypotheses, &references, 0).unwrap().score - 68.7561509).abs() < BOUND);
    assert!((chrf(&hypotheses, &references, 2).unwrap().score - 64.6738854).abs() < BOUND);
}

#[derive(Deserialize)]
struct Taggings {
    cases: Vec<Tagging>,
}

#[derive(Deserialize)]
struct Tagging {
    actual: Vec<Vec<String>>,
    predicted: Vec<Vec<String>>,
    conlleval: Option<Scores>,
    #[serde(rename = "IOB1")]
    iob1: Option<Scores>,
    #[serde(rename = "IOB2")]
    iob2: Option<Scores>,
    #[serde(rename = "IOBES")]
    iobes: Option<Scores>,
}

#[derive(Deserialize)]
struct Scores {
    /// Precision, recall, F1.
    micro: [f64; 3],
    macro_f1: Option<f64>,
    support: Vec<u64>,
}

#[test]
fn entity_f1_equals_seqeval() {
    let mut compared = [0; 4];
    for (index, case) in golden::<Taggings>("entities.json").cases.iter().enumerate() {
        for (slot, rule, expected) in [
            (0, EntityRule::Conlleval, &case.conlleval),
            (1, EntityRule::Strict(TagScheme::Iob1), &case.iob1),
            (2, EntityRule::Strict(TagScheme::Iob2), &case.iob2),
            (3, EntityRule::Strict(TagScheme::Iobes), &case.iobes),
        ] {
            let got = entity_f1(&case.actual, &case.predicted, rule);
            let Some(expected) = expected else {
                assert!(got.is_err(), "case {index}: {rule:?} took a tag outside its scheme");
                continue;
            };
            let got = got.unwrap();
            let micro = got.micro();
            for (got, expected) in [micro.precision(), micro.recall(), micro.f1()].iter().zip(expected.micro) {
                assert!((got - expected).abs() < BOUND, "case {index}, {rule:?}: {got} instead of {expected}");
            }
            assert_eq!(got.macro_f1().is_some(), expected.macro_f1.is_some());
            if let (Some(got), Some(expected)) = (got.macro_f1(), expected.macro_f1) {
                assert!((got - expected).abs() < BOUND, "case {index}, {rule:?}: macro {got} instead of {expected}");
            }
            assert_eq!(got.types.values().map(|counts| counts.actual).collect::<Vec<_>>(), expected.support);
            compared[slot] += 1;
        }
    }
    assert!(compared.iter().all(|&count| count >= 100), "{compared:?}");
}
