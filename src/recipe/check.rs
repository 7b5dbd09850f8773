//! Ranges of a recipe's values: everything that could fail late is refused before the first stage runs.

use super::order::Step;
use super::schema::{
    Corpus, Distil, Evaluate, Family, Inputs, MAX_BEAMS, MAX_SEED, Method, Quantize, Recipe, Sparsify, Training,
};
use crate::compress::tuning::Tuning;
use crate::data::tokenizer::is_language;
use crate::error::{Error, Result};
use crate::nn::config::Size;
use crate::train::optimizer::Rule;

/// Above this every weight is gone after one step, whatever the rule.
pub(super) const MAX_RATE: f64 = 1000.0;
/// A step's micro-batches are in memory together.
const MAX_ACCUMULATE: usize = 1024;
pub(super) const MAX_CALIBRATION: usize = 100_000;
/// Entries of one block's rotary tables, as a saved model's config has it.
const MAX_ROTARY: usize = 1 << 26;
const MAX_WIDTH: usize = 65_536;
const MAX_POSITIONS: usize = 1_000_000;
/// Tokens that `data.max_length` must leave room for.
const SHORTEST: usize = 8;

pub(super) fn refuse<T>(key: &str, value: impl ToString, allowed: impl ToString) -> Result<T> {
    Err(Error::Recipe { key: key.into(), value: legible(value.to_string()), allowed: allowed.to_string() })
}

/// A number of hundreds of digits in scientific form.
fn legible(value: String) -> String {
    match value.parse::<f64>() {
        Ok(number) if value.len() > 20 => format!("{number:e}"),
        _ => value,
    }
}

impl Training {
    pub(super) fn check(&self, key: &str) -> Result<()> {
        let rule = |field: &str, value: String, allowed: &str| refuse(&format!("{key}.{field}"), value, allowed);
        if self.steps == 0 || self.steps > 100_000_000 {
            return rule("steps", self.steps.to_string(), "1 to 100000000");
        }
        if self.batch == 0 || self.batch > 65_536 {
            return rule("batch", self.batch.to_string(), "1 to 65536");
        }
        if self.accumulate == 0 || self.accumulate > MAX_ACCUMULATE {
            return rule("accumulate", self.accumulate.to_string(), "1 to 1024");
        }
        if !(self.learning_rate > 0.0 && self.learning_rate <= MAX_RATE) {
            return rule("learning_rate", self.learning_rate.to_string(), "a rate above 0, at most 1000");
        }
        if !(0.0..=1.0).contains(&self.warmup) {
            return rule("warmup", self.warmup.to_string(), "0 to 1, a share of the steps");
        }
        let numbers = [("weight_decay", self.weight_decay), ("clip", self.clip)];
        if let Some((field, x)) = numbers.into_iter().find(|(_, x)| !x.is_finite() || *x < 0.0) {
            return rule(field, x.to_string(), "finite and not negative");
        }
        let shares = match self.rule {
            Rule::Adamw { beta1, beta2, epsilon } => {
                if !(epsilon.is_finite() && epsilon >= 0.0) {
                    return rule("rule.epsilon", epsilon.to_string(), "finite and not negative");
                }
                vec![("rule.beta1", beta1), ("rule.beta2", beta2)]
            }
            Rule::Sgd { momentum } => vec![("rule.momentum", momentum)],
        };
        if let Some((field, x)) = shares.into_iter().find(|(_, x)| !(0.0..1.0).contains(x)) {
            return rule(field, x.to_string(), "0 to below 1");
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return rule("dropout", self.dropout.to_string(), "0 to below 1");
        }
        Ok(())
    }
}

impl Evaluate {
    fn check(&self) -> Result<()> {
        if !(1..=MAX_BEAMS).contains(&self.beams) {
            return refuse("evaluate.beams", self.beams, format!("1 to {MAX_BEAMS}"));
        }
        if self.latency_batches.len() > 32 || self.latency_batches.iter().any(|b| !(1..=4096).contains(b)) {
            let allowed = "at most 32 batch sizes, each 1 to 4096";
            return refuse("evaluate.latency_batches", format!("{:?}", self.latency_batches), allowed);
        }
        // The half of it is a context, which cannot be empty.
        if !(2..=8192).contains(&self.latency_length) {
            return refuse("evaluate.latency_length", self.latency_length, "2 to 8192");
        }
        Ok(())
    }
}

impl Recipe {
    pub(super) fn check(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if self.name.is_empty() || self.name.len() > 128 || self.name.starts_with('.') || !self.name.chars().all(plain)
        {
            let allowed = "1 to 128 letters, digits, '.', '_', '-', no leading dot";
            return refuse("name", format!("{:?}", self.name), allowed);
        }
        if self.seed > MAX_SEED {
            return refuse("seed", self.seed, format!("0 to {MAX_SEED}"));
        }
        self.check_order()?;
        self.check_data()?;
        self.check_model()?;
        self.check_family()?;
        self.teacher.check("teacher")?;
        self.check_compression()?;
        self.check_listening()?;
        if let Some(pipeline) = &self.pipeline {
            pipeline.check(self.smallest().layers)?;
        }
        self.evaluate.check()
    }

    fn check_data(&self) -> Result<()> {
        let data = &self.data;
        if !(300..=1_000_000).contains(&data.vocabulary) {
            let allowed = "300 to 1000000 (256 bytes and special tokens come first)";
            return refuse("data.vocabulary", data.vocabulary, allowed);
        }
        let positions = self.model.max_positions;
        if positions < SHORTEST {
            return refuse("model.max_positions", positions, format!("{SHORTEST} to {MAX_POSITIONS}"));
        }
        if !(SHORTEST..=positions.min(8192)).contains(&data.max_length) {
            let limit = if positions < 8192 { " (model.max_positions)" } else { "" };
            let allowed = format!("{SHORTEST} to {}{limit}", positions.min(8192));
            return refuse("data.max_length", data.max_length, allowed);
        }
        if !(0.0..=1.0).contains(&data.target_share) {
            return refuse("data.target_share", data.target_share, "0 to 1");
        }
        for (key, language) in [("data.source", &data.source), ("data.target", &data.target)] {
            if !is_language(language) {
                return refuse(key, format!("{language:?}"), "a language code of 1 to 16 letters, digits, '_' or '-'");
            }
        }
        if data.source == data.target {
            return refuse("data.target", &data.target, "another language than data.source");
        }
        // Labels decide which tag a sentence gets; a wrong one trains a model that takes one language for another.
        let (source, target) = (data.source.as_str(), data.target.as_str());
        match &data.corpus {
            Corpus::Terms { pairs } if !(1..=1_000_000).contains(pairs) => {
                refuse("data.corpus.terms.pairs", pairs, "1 to 1000000")
            }
            Corpus::Terms { .. } if (source, target) != ("en", "zh") => {
                let allowed = "source en and target zh: the embedded terms are English and Chinese";
                refuse("data.source, data.target", format!("{source}, {target}"), allowed)
            }
            Corpus::Catalogs { .. } if source != "en" => {
                refuse("data.source", source, "en: catalogs translate from English")
            }
            _ => Ok(()),
        }
    }

    fn check_model(&self) -> Result<()> {
        self.model.check()?;
        let m = self.model.size();
        for (key, value, multiple, most) in [
            ("model.layers", m.layers, 1, 1024),
            ("model.heads", m.heads, 1, 1024),
            // Whole pairs of the 2-D rotary.
            ("model.head_size", m.head_size, 4, 4096),
            ("model.ffn_width", m.ffn_width, 16, 1 << 20),
            ("model.max_positions", m.max_positions, 1, MAX_POSITIONS),
        ] {
            if value == 0 || value > most || !value.is_multiple_of(multiple) {
                let of = if multiple > 1 { format!("a multiple of {multiple}, ") } else { String::new() };
                return refuse(key, value, format!("{of}{multiple} to {most}"));
            }
        }
        if m.heads * m.head_size > MAX_WIDTH {
            let value = format!("{} x {}", m.heads, m.head_size);
            return refuse("model.heads, model.head_size", value, format!("a width of at most {MAX_WIDTH}"));
        }
        if m.max_positions * (m.head_size / 2) > MAX_ROTARY {
            let allowed = format!("at most {} for this head_size", MAX_ROTARY / (m.head_size / 2));
            return refuse("model.max_positions", m.max_positions, allowed);
        }
        Ok(())
    }

    /// What a family has no form of.
    fn check_family(&self) -> Result<()> {
        let family = self.model.family;
        if family == Family::Tagger && !matches!(self.data.corpus, Corpus::Terms { .. }) {
            let allowed = "terms for a tagger: only generated sentences have known spans";
            return refuse("data.corpus", "without spans", allowed);
        }
        if family == Family::T5 && self.pipeline.is_some() {
            return refuse(
                "pipeline",
                "with model.family t5",
                "glm or tagger: an encoder-decoder is not one chain of blocks",
            );
        }
        let layerwise = [
            ("structure", self.structure.as_ref().map(|s| &s.distil)),
            ("sparsify", self.sparsify.as_ref().map(|s| &s.distil)),
            ("quantize", self.quantize.as_ref().map(|q| &q.distil)),
            ("experts", self.experts.as_ref().map(|e| &e.distil)),
            ("tune", self.tune.as_ref().and_then(|t| t.distil.as_ref())),
        ];
        let layerwise = layerwise.into_iter().find_map(|(stage, distil)| Some((stage, distil?.layerwise_key()?)));
        if let Some((stage, key)) = layerwise.filter(|_| family == Family::T5) {
            let allowed = "absent for model.family t5, whose blocks are no chain: the last layer alone is heard";
            return refuse(&format!("{stage}.distil.{key}"), "layer by layer", allowed);
        }
        if family == Family::T5 && self.tune.as_ref().is_some_and(|t| matches!(t.method, Tuning::Prefix(_))) {
            let allowed = "adapter or lora for model.family t5: a prefix has no distance to the tokens";
            return refuse("tune.method.kind", "prefix", allowed);
        }
        let generated = |q: &&Quantize| q.method == Method::DataFree && q.inputs == Some(Inputs::SelfGenerated);
        if family == Family::Tagger && self.quantize.as_ref().filter(generated).is_some() {
            let allowed = "random for model.family tagger: its logits are labels, not text";
            return refuse("quantize.inputs", "self_generated", allowed);
        }
        // Statistics of inputs are taken by walking one chain of blocks.
        let walked = [
            self.sparsify.as_ref().and_then(Sparsify::walks_blocks),
            self.quantize.as_ref().and_then(Quantize::walks_blocks),
        ];
        match walked.into_iter().flatten().next().filter(|_| family == Family::T5) {
            Some((key, value)) => {
                let allowed = "what needs no calibration on inputs for model.family t5, whose blocks are no chain";
                refuse(key, value, allowed)
            }
            None => Ok(()),
        }
    }

    fn check_compression(&self) -> Result<()> {
        if let Some(s) = &self.structure {
            s.check(self.model.size(), self.model.family, self.pipeline.is_some())?;
        }
        if let Some(s) = &self.sparsify {
            let linears = self.linears(self.smallest());
            s.check(&linears, self.pipeline.is_some())?;
            s.check_grid(self)?;
        }
        if let Some(q) = &self.quantize {
            q.check(self)?;
        }
        if let Some(e) = &self.experts {
            e.check(self.smallest(), self.model.activation())?;
        }
        if let Some(h) = &self.hybrid {
            h.check(self.data.target_share)?;
        }
        Ok(())
    }

    /// Teachers read from files speak in all tokens.
    fn check_vocabulary(&self, key: &str, distil: &Distil) -> Result<()> {
        let narrowed = self.structure.as_ref().is_some_and(|s| s.vocabulary.is_some());
        if narrowed && !distil.teachers.is_empty() {
            let allowed = "none with structure.vocabulary: their logits are of other tokens";
            return refuse(&format!("{key}.teachers"), format!("{:?}", distil.teachers), allowed);
        }
        Ok(())
    }

    /// Layers that students listen to, by the student's sizes when its stage comes; and what is tuned of it.
    fn check_listening(&self) -> Result<()> {
        let (mut size, mut experts, pipeline) = (self.model.size(), false, self.pipeline.is_some());
        let whole = size.heads * size.head_size;
        let mut width = whole;
        for step in self.steps() {
            let distil = match step {
                Step::Structure => {
                    (size, width) =
                        self.structure.as_ref().map_or((size, width), |s| (s.granule(size), s.width_granule(size)));
                    self.structure.as_ref().map(|s| &s.distil)
                }
                Step::Sparsify => self.sparsify.as_ref().map(|s| &s.distil),
                Step::Quantize => self.quantize.as_ref().map(|q| &q.distil),
                Step::Experts => {
                    experts = true;
                    self.experts.as_ref().filter(|e| e.training.is_some()).map(|e| &e.distil)
                }
                Step::Hybrid => None,
                Step::Tune => {
                    if let Some(tune) = &self.tune {
                        let mut linears = self.linears(size);
                        linears.retain(|name| !(experts && name.contains(".ffn.")));
                        tune.check((size, width), &linears, pipeline)?;
                    }
                    self.tune.as_ref().and_then(|t| t.distil.as_ref())
                }
            };
            if let Some(distil) = distil {
                self.check_vocabulary(&format!("{}.distil", step.name()), distil)?;
                let gated = self.structure.as_ref().is_some_and(|s| s.gates_channels());
                // Gates choose how many channels stay.
                let width = (width == whole || !gated).then_some(width);
                let key = format!("{}.distil", step.name());
                distil.check_layers(&key, (size, width), (self.model.size(), whole), pipeline)?;
            }
        }
        Ok(())
    }

    /// Sizes of the model once its structures are pruned: what each block has, and what the sizes of all are multiples of.
    pub fn smallest(&self) -> Size {
        self.structure.as_ref().map_or(self.model.size(), |s| s.granule(self.model.size()))
    }

    /// Names of all linears of this recipe's model, were it of these sizes.
    fn linears(&self, size: Size) -> Vec<String> {
        // Neither tokens nor labels have any.
        self.model.config(size, 1, &[]).all_linears()
    }

    /// Channels of the model once its structures are pruned.
    pub fn smallest_width(&self) -> usize {
        let size = self.model.size();
        self.structure.as_ref().map_or(size.heads * size.head_size, |s| s.width_granule(size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each of these was accepted once and failed, or was aborted, after hours of training.
    #[test]
    fn what_would_fail_late_is_refused_with_its_key() {
        for (set, key) in [
            ("evaluate.latency_batches=[0]", "evaluate.latency_batches"),
            ("evaluate.latency_length=0", "evaluate.latency_length"),
            ("evaluate.beams=0", "evaluate.beams"),
            ("evaluate.beams=1000000", "evaluate.beams"),
            ("model.max_positions=1048576", "model.max_positions"),
            ("model.max_positions=4", "model.max_positions"),
            ("model.head_size=30", "model.head_size"),
            ("teacher.clip=-1.0", "teacher.clip"),
            ("teacher.rule={ kind = \"sgd\", momentum = 1.0 }", "teacher.rule.momentum"),
            ("teacher.learning_rate=1e300", "teacher.learning_rate"),
            ("teacher.accumulate=100000", "teacher.accumulate"),
            ("structure.distil={ weights = { hidden = 0.0, soft = 0.0, hard = 0.0 }, gold = 0.0 }", "structure.distil"),
            ("sparsify.linears=[\"nonsense\"]", "sparsify.linears"),
            ("sparsify.linears=[\"\"]", "sparsify.linears"),
            ("data.target=de", "data.source, data.target"),
            ("data.target=en", "data.target"),
            ("data.corpus={ terms = { pairs = 100000000000 } }", "data.corpus.terms.pairs"),
            ("hybrid.alpha=2.0", "hybrid.alpha"),
            ("experts.router_rate=1e30", "experts.router_rate"),
            ("structure.distil={ preset = \"tiny_bert\", temperature = 4.0 }", "structure.distil"),
            ("structure.distil={ matches = [{ teacher = 9, student = 1 }] }", "structure.distil.matches[0].teacher"),
            (
                "structure.distil={ matches = [{ teacher = 1, student = 1, tutor = 1 }] }",
                "structure.distil.matches[0].tutor",
            ),
            ("structure.distil={ matches = [{ teacher = 1, student = -9 }] }", "structure.distil.matches[0].student"),
            (
                "structure.distil={ matches = [{ teacher = -1, student = -1, projection = \"none\" }] }",
                "structure.distil.matches[0].projection",
            ),
            (
                "structure.distil={ matches = [{ teacher = 1, student = 1, feature = \"query\", heads = 5 }] }",
                "structure.distil.matches[0].heads",
            ),
            ("structure.distil={ logits = { temperature = 0.0 } }", "structure.distil.logits.temperature"),
            ("sparsify.distil={ top_k = 8, preset = \"mini_lm\" }", "sparsify.distil.top_k"),
            (
                "tune={ method = { kind = \"lora\", rank = 0 }, training = { steps = 1, batch = 1, learning_rate = 1.0 } }",
                "tune.method.rank",
            ),
            (
                "tune={ method = { kind = \"lora\", linears = [\"ffn\"] }, training = { steps = 1, batch = 1, learning_rate = 1.0 } }",
                "tune.method.linears",
            ),
            (
                "tune={ method = { kind = \"adapter\", width = 100000 }, training = { steps = 1, batch = 1, learning_rate = 1.0 } }",
                "tune.method.width",
            ),
            (
                "tune={ method = { kind = \"prefix\", length = 0 }, training = { steps = 1, batch = 1, learning_rate = 1.0 } }",
                "tune.method.length",
            ),
        ] {
            match Recipe::load(None, &[set.to_string()]) {
                Err(Error::Recipe { key: found, .. }) => assert_eq!(found, key, "{set}"),
                other => panic!("{set}: {other:?}"),
            }
        }
        let error = Recipe::load(None, &["teacher.learning_rate=1e300".into()]).unwrap_err().to_string();
        assert!(error.contains(" 1e300"), "{error}");
        assert!(Recipe::load(None, &["sparsify.linears=[\"ffn\", \"blocks.2.attention\"]".into()]).is_ok());
        // The last block of the teacher is gone by then.
        assert!(Recipe::load(None, &["sparsify.linears=[\"blocks.3\"]".into()]).is_err());
    }
}
