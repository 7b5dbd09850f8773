//! The tables of a report as text cells, once for Markdown, HTML and CSV.

use super::model::{DirectionScores, Latency, RunReport, StageRow};
use super::quantity::{bytes, count, duration, milliseconds, number, percent};
use super::table::Alignment;

/// A table of finished text that has not been cleaned or escaped for any output yet.
#[derive(Debug)]
pub struct Section {
    pub title: &'static str,
    pub lead: &'static str,
    pub columns: Vec<(String, Alignment)>,
    pub rows: Vec<Row>,
    /// Lines below the table.
    pub below: Vec<String>,
    /// For looking things up: after the pictures.
    pub appendix: bool,
}

#[derive(Debug)]
pub struct Row {
    pub baseline: bool,
    pub cells: Vec<Cell>,
}

/// What a cell says besides its text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Plain,
    /// Not measured.
    Absent,
    Holds,
    Broken,
    /// Long text that may wrap.
    Prose,
}

#[derive(Debug)]
pub struct Cell {
    pub text: String,
    pub mark: Mark,
}

impl Cell {
    fn plain(text: impl Into<String>) -> Self {
        Self { text: text.into(), mark: Mark::Plain }
    }

    fn optional(value: Option<f64>, text: fn(f64) -> String) -> Self {
        match value.filter(|value| value.is_finite()) {
            Some(value) => Self::plain(text(value)),
            None => Self::absent(),
        }
    }

    fn absent() -> Self {
        Self { text: "–".into(), mark: Mark::Absent }
    }
}

/// Every table that has something in it.
pub fn sections(report: &RunReport) -> Vec<Section> {
    let mut sections = vec![stages(report), directions(report), latencies(report), invariants(report)];
    sections.retain(|section| !section.rows.is_empty());
    sections
}

fn columns(first: &[&str], numbers: &[&str]) -> Vec<(String, Alignment)> {
    let left = first.iter().map(|name| (name.to_string(), Alignment::Left));
    left.chain(numbers.iter().map(|name| (name.to_string(), Alignment::Right))).collect()
}

fn score(value: f64) -> String {
    format!("{value:.1}")
}

/// Size and quality, one row per stage.
pub fn stages(report: &RunReport) -> Section {
    let row = |stage: &StageRow| Row {
        baseline: stage.baseline,
        cells: vec![
            Cell::plain(&stage.name),
            Cell::plain(count(stage.parameters)),
            Cell::plain(bytes(stage.activated_bytes)),
            Cell::plain(bytes(stage.total_bytes)),
            Cell::optional(stage.token_accuracy, percent),
            Cell::optional(stage.retained, percent),
            Cell::optional(stage.exact_match, percent),
            Cell::optional(stage.validation_loss, number),
            Cell::optional(stage.peak_memory_bytes.map(|value| value as f64), |value| bytes(value as u64)),
            Cell::optional(stage.seconds, duration),
        ],
    };
    Section {
        title: "Stages",
        lead: "Size in the representation that runs; activated is what one token touches. Validation loss in nats per \
               token. Retained is token accuracy as a share of the teacher's.",
        columns: columns(
            &["Stage"],
            &[
                "Parameters",
                "Activated",
                "Total",
                "Token accuracy",
                "Retained",
                "Exact match",
                "Validation loss",
                "Peak memory",
                "Time",
            ],
        ),
        rows: report.stages.iter().map(row).collect(),
        below: Vec::new(),
        appendix: false,
    }
}

fn directions(report: &RunReport) -> Section {
    let row = |stage: &StageRow, scores: &DirectionScores| Row {
        baseline: stage.baseline,
        cells: vec![
            Cell::plain(&stage.name),
            Cell::plain(&scores.direction),
            Cell::plain(count(scores.sentences)),
            Cell::optional(scores.token_accuracy, percent),
            Cell::optional(scores.exact_match, percent),
            Cell::optional(scores.entity_f1, percent),
            Cell::optional(scores.bleu.as_ref().map(|bleu| bleu.value), score),
            Cell::optional(scores.chrf.as_ref().map(|chrf| chrf.value), score),
            Cell::optional(scores.sequence_probability, number),
            Cell::optional(scores.probability_per_token, number),
            Cell::optional(scores.perplexity, number),
        ],
    };
    let rows = report.stages.iter().flat_map(|stage| stage.directions.iter().map(move |scores| row(stage, scores)));
    let mut below: Vec<String> = Vec::new();
    for scores in report.stages.iter().flat_map(|stage| &stage.directions) {
        for (name, score) in [("BLEU", &scores.bleu), ("chrF", &scores.chrf)] {
            if let Some(score) = score {
                let line = format!("{name} {}: {}", scores.direction, score.signature);
                if !below.contains(&line) {
                    below.push(line);
                }
            }
        }
    }
    Section {
        title: "Translation quality",
        lead: "Sequence probability is the mean probability of the whole reference, and so tiny for long sentences; per \
               token is its geometric mean over tokens.",
        columns: columns(
            &["Stage", "Direction"],
            &[
                "Sentences",
                "Token accuracy",
                "Exact match",
                "Entity F1",
                "BLEU",
                "chrF",
                "Sequence probability",
                "Per token",
                "Perplexity",
            ],
        ),
        rows: rows.collect(),
        below,
        appendix: false,
    }
}

fn latencies(report: &RunReport) -> Section {
    let mut shapes: Vec<(u32, u32)> = Vec::new();
    for latency in report.stages.iter().flat_map(|stage| &stage.latency) {
        if !shapes.contains(&(latency.batch, latency.length)) {
            shapes.push((latency.batch, latency.length));
        }
    }
    shapes.sort_unstable();
    let cell = |stage: &StageRow, shape: (u32, u32)| {
        let found = stage.latency.iter().find(|latency| (latency.batch, latency.length) == shape);
        found.map_or_else(Cell::absent, |latency: &Latency| {
            let [p5, p50, p95] = [latency.p5_ms, latency.p50_ms, latency.p95_ms].map(milliseconds);
            Cell::plain(format!("{p50} ({p5} to {p95})"))
        })
    };
    let row = |stage: &StageRow| Row {
        baseline: stage.baseline,
        cells: std::iter::once(Cell::plain(&stage.name))
            .chain(shapes.iter().map(|&shape| cell(stage, shape)))
            .collect(),
    };
    let samples = || report.stages.iter().flat_map(|stage| &stage.latency).map(|latency| latency.samples);
    let below = samples().min().zip(samples().max()).map(|(least, most)| match least == most {
        true => format!("{least} samples each"),
        false => format!("{least} to {most} samples each"),
    });
    let names: Vec<String> = shapes.iter().map(|(batch, length)| format!("Batch {batch}, length {length}")).collect();
    Section {
        title: "Latency in numbers",
        lead: "One forward pass over a batch: median, and in brackets the 5th to the 95th percentile.",
        columns: columns(&["Stage"], &names.iter().map(String::as_str).collect::<Vec<_>>()),
        rows: report.stages.iter().filter(|stage| !stage.latency.is_empty()).map(row).collect(),
        below: below.into_iter().collect(),
        appendix: true,
    }
}

fn invariants(report: &RunReport) -> Section {
    let mut rows = Vec::new();
    for stage in &report.stages {
        for invariant in &stage.invariants {
            let (text, mark) = if invariant.ok { ("holds", Mark::Holds) } else { ("broken", Mark::Broken) };
            rows.push(Row {
                baseline: stage.baseline,
                cells: vec![
                    Cell::plain(&stage.name),
                    Cell { text: invariant.name.clone(), mark: Mark::Prose },
                    Cell { text: invariant.measured.clone(), mark: Mark::Prose },
                    Cell { text: text.into(), mark },
                ],
            });
        }
    }
    Section {
        title: "Invariants",
        lead: "Checked on the model itself after every stage; a broken one stops the run.",
        columns: columns(&["Stage", "Promise", "Measured", "Verdict"], &[]),
        rows,
        below: Vec::new(),
        appendix: true,
    }
}

/// The numbers at the top: title, value, detail, and whether it is bad news.
pub fn headline(report: &RunReport) -> Vec<(&'static str, String, String, bool)> {
    let mut cards = Vec::new();
    let Some((teacher, last)) = report.ends() else {
        return cards;
    };
    if let Some(last) = last {
        let accuracies = teacher.token_accuracy.zip(last.token_accuracy);
        if let (Some(retained), Some((before, after))) = (last.retained, accuracies) {
            let detail = format!("token accuracy {} → {}", percent(before), percent(after));
            cards.push(("Quality kept", percent(retained), detail, false));
        }
        if last.activated_bytes > 0 {
            let ratio = teacher.activated_bytes as f64 / last.activated_bytes as f64;
            let (value, bad) = factor(ratio, "smaller", "larger");
            let detail = format!("{} → {}", bytes(teacher.activated_bytes), bytes(last.activated_bytes));
            cards.push(("Activated weights", value, detail, bad));
        }
        let find = |stage: &StageRow| stage.latency.iter().min_by_key(|latency| latency.batch).cloned();
        if let Some((before, after)) =
            find(teacher).zip(find(last)).filter(|(a, b)| a.batch == b.batch && b.p50_ms > 0.0)
        {
            let (value, bad) = factor(before.p50_ms / after.p50_ms, "faster", "slower");
            let detail =
                format!("batch {}: {} → {}", after.batch, milliseconds(before.p50_ms), milliseconds(after.p50_ms));
            cards.push(("Latency", value, detail, bad));
        }
    }
    let invariants = || report.stages.iter().flat_map(|stage| &stage.invariants);
    let (total, hold) = (invariants().count(), invariants().filter(|invariant| invariant.ok).count());
    if total > 0 {
        let detail = if hold == total { "all promises hold".into() } else { format!("{} broken", total - hold) };
        cards.push(("Invariants", format!("{hold} of {total}"), detail, hold < total));
    }
    cards
}

/// "3.4× smaller", or the honest opposite.
fn factor(ratio: f64, better: &str, worse: &str) -> (String, bool) {
    match ratio {
        ratio if ratio >= 9.995 => (format!("{ratio:.1}× {better}"), false),
        ratio if ratio >= 1.005 => (format!("{ratio:.2}× {better}"), false),
        ratio if ratio > 0.995 => ("unchanged".into(), false),
        ratio => (format!("{:.2}× {worse}", 1.0 / ratio), true),
    }
}

/// Machine and versions as name, value and whether the value is a hash.
pub fn facts(report: &RunReport) -> Vec<(String, String, bool)> {
    let machine = &report.machine;
    let mut facts = vec![("Device".to_string(), machine.device.clone(), false)];
    let mut add = |name: &str, value: String| {
        if !value.is_empty() {
            facts.push((name.to_string(), value, false));
        }
    };
    add("Driver", machine.driver.clone());
    add("Processor", machine.processor.clone());
    add("Cores", if machine.cores > 0 { machine.cores.to_string() } else { String::new() });
    add("Memory", if machine.memory_bytes > 0 { bytes(machine.memory_bytes) } else { String::new() });
    add("System", machine.system.clone());
    facts.extend(machine.versions.iter().map(|(name, version)| (name.clone(), version.clone(), false)));
    facts.extend(machine.hashes.iter().map(|(name, hash)| (name.clone(), hash.clone(), true)));
    facts
}
