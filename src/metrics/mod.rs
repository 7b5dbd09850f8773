//! Quality measures over plain data: token ids, strings, log-probabilities and tags. No device, no model.
//!
//! BLEU and chrF equal sacreBLEU 2.6.0 and entity F1 equals seqeval 1.2.2; the goldens are in `tests/golden`.

mod accuracy;
mod bleu;
mod chrf;
mod entity;
mod mls;
mod probability;
mod tokenize;

pub use accuracy::{ExactMatch, TokenAccuracy};
pub use bleu::{Bleu, bleu};
pub use chrf::{Chrf, chrf};
pub use entity::{EntityCounts, EntityReport, EntityRule, TagScheme, entity_f1};
pub use mls::mls;
pub use probability::SequenceProbability;
pub use tokenize::BleuTokenizer;

/// The reference program whose scores these equal; it ends every signature.
const SACREBLEU_VERSION: &str = "2.6.0";

/// What Python's `str.split()` and `str.strip()` take for white space: Unicode `White_Space` and the four information
/// separators, which Unicode leaves out.
fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&character)
}

/// Hypotheses and references pair up one to one and there is at least one pair.
fn check_pairs(op: &'static str, hypotheses: usize, references: usize) -> crate::Result<()> {
    if hypotheses == 0 || hypotheses != references {
        return Err(crate::Error::Shape {
            op,
            rule: "one reference per hypothesis, at least one of each",
            got: format!("{hypotheses} hypotheses, {references} references"),
        });
    }
    Ok(())
}
