//! The embedded set as it is documented, and the tokenizer file as a reader of foreign bytes.

use std::path::Path;
use std::sync::LazyLock;

use espalier::data::split::Fractions;
use espalier::data::terms::{DEFAULT_COUNT, FRAMES_TSV, TERMS_TSV, TermSet};
use espalier::data::tokenizer::Tokenizer;
use proptest::prelude::*;

const README: &str = include_str!("../../../datasets/README.md");

#[test]
fn the_readme_states_rows_and_checksums() {
    for (name, text) in [("terms.en-zh.tsv", TERMS_TSV), ("frames.en-zh.tsv", FRAMES_TSV)] {
        let row = format!("| `{name}` | {} | `{}` |", text.lines().count() - 1, blake3::hash(text.as_bytes()).to_hex());
        assert!(README.contains(&row), "datasets/README.md should hold\n{row}");
    }
}

#[test]
fn expansion_never_changes() {
    let set = TermSet::embedded().unwrap();
    let mut hasher = blake3::Hasher::new();
    for sentence in set.expand(1, DEFAULT_COUNT, Fractions::default()).unwrap() {
        hasher.update(format!("{}\t{}\t{:?}\n", sentence.pair.source, sentence.pair.target, sentence.split).as_bytes());
    }
    assert_eq!(hasher.finalize().to_hex().as_str(), "ef38a446d02d6cbc94d29af1b958af8499c589d7f2c39aa3cd114ce5ffe9c733");
}

static TOKENIZER: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("tokenizer.json");
    Tokenizer::train(TERMS_TSV.lines(), 600, &["en", "zh"]).unwrap().save(&path).unwrap();
    std::fs::read(path).unwrap()
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn damaged_tokenizer_files_never_panic(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        cut in any::<prop::sample::Index>(),
        truncate: bool,
    ) {
        let mut bytes = TOKENIZER.clone();
        for (position, value) in damage {
            *position.get_mut(&mut bytes) = value;
        }
        if truncate {
            bytes.truncate(cut.index(bytes.len()));
        }
        match Tokenizer::parse(Path::new("tokenizer.json"), &bytes) {
            Ok(tokenizer) => {
                let ids = tokenizer.encode("The router 路由器 [eos]").unwrap();
                prop_assert!(ids.iter().all(|&id| (id as usize) < tokenizer.vocabulary()));
                tokenizer.decode(&ids).unwrap();
            }
            Err(error) => prop_assert_eq!(error.code(), "E-FILE"),
        }
    }
}
