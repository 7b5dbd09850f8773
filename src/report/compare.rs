//! Two sets of benchmark records, case by case: decided by interval, not by point.

use std::collections::BTreeMap;

use serde::Serialize;

use super::bench::{BenchRecord, Case, quantile};
use super::plain::{markdown_text, plain_text};
use super::quantity::milliseconds;
use super::table::{Alignment, Table};
use crate::rng::Stream;

/// Resamples per case.
const RESAMPLES: usize = 2000;
/// Fewer samples on either side decide nothing.
const MINIMUM_SAMPLES: usize = 30;
/// Smaller changes are called equal even when the interval excludes 1: two runs of one binary differ by as much.
const MINIMUM_EFFECT: f64 = 0.01;

/// What a comparison may claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// B is faster than A.
    Faster,
    Equal,
    Slower,
    /// The interval straddles 1 or the minimum effect without excluding a change, or there are too few samples.
    Undecided,
    /// Measured, but not to be believed: above the ceiling, or voided by drift.
    Suspect,
    /// A wrong result, an unsupported case, a software adapter against hardware.
    NotComparable,
    OnlyInA,
    OnlyInB,
}

impl Verdict {
    pub fn name(self) -> &'static str {
        match self {
            Self::Faster => "faster",
            Self::Equal => "equal",
            Self::Slower => "slower",
            Self::Undecided => "undecided",
            Self::Suspect => "suspect",
            Self::NotComparable => "not comparable",
            Self::OnlyInA => "only in A",
            Self::OnlyInB => "only in B",
        }
    }
}

/// One case of both files.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    pub case: Case,
    pub a_us: Option<f64>,
    pub b_us: Option<f64>,
    /// Median time of A over median time of B: above 1, B is faster.
    pub ratio: Option<f64>,
    /// 95 % bootstrap interval of the ratio.
    pub interval: Option<(f64, f64)>,
    pub verdict: Verdict,
    /// Why nothing is decided where the numbers themselves do not say it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

impl Comparison {
    /// Whether both files have the case.
    pub fn is_paired(&self) -> bool {
        !matches!(self.verdict, Verdict::OnlyInA | Verdict::OnlyInB)
    }
}

/// Pairs the records of two files by case, in case order. A case that stands twice in one file is taken from its last
/// record, the most recent measurement.
pub fn compare(a: &[BenchRecord], b: &[BenchRecord]) -> Vec<Comparison> {
    let mut cases: BTreeMap<Case, [Option<&BenchRecord>; 2]> = BTreeMap::new();
    for record in a {
        cases.entry(record.case()).or_default()[0] = Some(record);
    }
    for record in b {
        cases.entry(record.case()).or_default()[1] = Some(record);
    }
    cases.into_iter().map(|(case, [a, b])| judge(case, a, b)).collect()
}

fn judge(case: Case, a: Option<&BenchRecord>, b: Option<&BenchRecord>) -> Comparison {
    let time = |record: Option<&BenchRecord>| record.filter(|r| !r.samples_us.is_empty()).map(|r| r.median_us);
    let (a_us, b_us, verdict) = (time(a), time(b), Verdict::NotComparable);
    let mut result = Comparison { case, a_us, b_us, ratio: None, interval: None, verdict, reason: None };
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (a, _) => {
            result.verdict = if a.is_some() { Verdict::OnlyInA } else { Verdict::OnlyInB };
            return result;
        }
    };
    let usable = |r: &BenchRecord| r.supported && r.passed && r.samples_us.iter().all(|s| s.is_finite() && *s > 0.0);
    if !usable(a) || !usable(b) || a.device.software != b.device.software {
        return result;
    }
    let Some((ratio, interval)) = ratio_interval(&a.samples_us, &b.samples_us) else {
        return result;
    };
    (result.ratio, result.interval) = (Some(ratio), Some(interval));
    result.verdict = if a.suspect() || b.suspect() || a.voided || b.voided {
        Verdict::Suspect
    } else if a.samples_us.len().min(b.samples_us.len()) < MINIMUM_SAMPLES {
        let (a, b) = (a.samples_us.len(), b.samples_us.len());
        result.reason = Some(format!("{a} and {b} samples, {MINIMUM_SAMPLES} each are needed"));
        Verdict::Undecided
    } else {
        let (low, high) = interval;
        let (slower, faster) = (1.0 / (1.0 + MINIMUM_EFFECT), 1.0 + MINIMUM_EFFECT);
        if low > faster {
            Verdict::Faster
        } else if high < slower {
            Verdict::Slower
        } else if low <= 1.0 && high >= 1.0 || (low >= slower && high <= faster) {
            Verdict::Equal
        } else {
            Verdict::Undecided
        }
    };
    result
}

/// Ratio of medians and its percentile bootstrap interval (Efron 1979), each side resampled on its own. The draws are
/// seeded, so the same files give the same interval. `None` when a side has no samples.
fn ratio_interval(a: &[f64], b: &[f64]) -> Option<(f64, (f64, f64))> {
    let mut stream = Stream::new(0x6573_7061_6c69_6572, 0);
    let ratio = median(a.to_vec())? / median(b.to_vec())?;
    let mut draw = |samples: &[f64]| {
        let picks = (0..samples.len()).filter_map(|_| samples.get(stream.below(samples.len())).copied());
        median(picks.collect())
    };
    let mut ratios = Vec::with_capacity(RESAMPLES);
    for _ in 0..RESAMPLES {
        ratios.push(draw(a)? / draw(b)?);
    }
    ratios.sort_by(f64::total_cmp);
    Some((ratio, (quantile(&ratios, 0.025)?, quantile(&ratios, 0.975)?)))
}

fn median(mut samples: Vec<f64>) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    quantile(&samples, 0.5)
}

/// The comparison as a table for terminals and Markdown alike.
fn table(comparisons: &[Comparison], clean: fn(&str) -> String) -> Table {
    let mut table = Table::new(&[
        ("op", Alignment::Left),
        ("case", Alignment::Left),
        ("A", Alignment::Right),
        ("B", Alignment::Right),
        ("A/B", Alignment::Right),
        ("95 % interval", Alignment::Right),
        ("B is", Alignment::Left),
    ]);
    for comparison in comparisons {
        let case = &comparison.case;
        let parts = [&case.params, &case.mode, &case.dtype, &case.layout];
        let described: Vec<String> = parts.iter().filter(|part| !part.is_empty()).map(|part| clean(part)).collect();
        let time = |us: Option<f64>| us.map_or_else(|| "-".into(), |us| milliseconds(us / 1e3));
        table.row(vec![
            clean(&case.op),
            described.join(" "),
            time(comparison.a_us),
            time(comparison.b_us),
            comparison.ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.3}x")),
            comparison.interval.map_or_else(|| "-".into(), |(low, high)| format!("{low:.3} to {high:.3}")),
            match &comparison.reason {
                Some(reason) => format!("{}: {reason}", comparison.verdict.name()),
                None => comparison.verdict.name().into(),
            },
        ]);
    }
    table
}

/// For a terminal: aligned columns and one line of totals.
pub fn to_terminal(comparisons: &[Comparison]) -> String {
    format!("{}\n{}\n", table(comparisons, plain_text).terminal(), totals(comparisons))
}

/// As a Markdown table with its totals.
pub fn to_markdown(comparisons: &[Comparison]) -> String {
    format!("{}\n{}\n", table(comparisons, markdown_text).markdown(), totals(comparisons))
}

/// Counts per verdict and the geometric mean of the ratios that may be believed.
fn totals(comparisons: &[Comparison]) -> String {
    let mut parts = Vec::new();
    for verdict in [
        Verdict::Faster,
        Verdict::Equal,
        Verdict::Slower,
        Verdict::Undecided,
        Verdict::Suspect,
        Verdict::NotComparable,
        Verdict::OnlyInA,
        Verdict::OnlyInB,
    ] {
        let count = comparisons.iter().filter(|comparison| comparison.verdict == verdict).count();
        if count > 0 {
            parts.push(format!("{count} {}", verdict.name()));
        }
    }
    let logs: Vec<f64> = comparisons
        .iter()
        .filter(|c| matches!(c.verdict, Verdict::Faster | Verdict::Equal | Verdict::Slower | Verdict::Undecided))
        .filter_map(|c| c.ratio.map(f64::ln))
        .collect();
    if !logs.is_empty() {
        let mean = (logs.iter().sum::<f64>() / logs.len() as f64).exp();
        parts.push(format!("geometric mean of A/B {mean:.3}x over {} cases", logs.len()));
    }
    if parts.is_empty() { "no cases".into() } else { parts.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(op: &str, center: f64, spread: f64, samples: usize) -> BenchRecord {
        let mut stream = Stream::new(3, op.len() as u32);
        let mut record = BenchRecord { op: op.into(), supported: true, passed: true, ..BenchRecord::default() };
        record.samples_us = (0..samples).map(|_| center * (1.0 + spread * (stream.uniform() - 0.5))).collect();
        record.summarize();
        record
    }

    fn verdict(a: BenchRecord, b: BenchRecord) -> Verdict {
        compare(&[a], &[b])[0].verdict
    }

    #[test]
    fn verdicts_follow_the_interval() {
        let base = || record("matmul", 100.0, 0.1, 60);
        assert_eq!(verdict(base(), record("matmul", 50.0, 0.1, 60)), Verdict::Faster);
        assert_eq!(verdict(base(), record("matmul", 150.0, 0.1, 60)), Verdict::Slower);
        assert_eq!(verdict(base(), base()), Verdict::Equal);
        assert_eq!(verdict(base(), record("matmul", 50.0, 0.1, 29)), Verdict::Undecided, "too few samples");
        // A half per cent that is clearly there is still no news.
        assert_eq!(verdict(record("m", 100.0, 1e-5, 60), record("m", 99.5, 1e-5, 60)), Verdict::Equal);
        // A change around the minimum effect, which the interval straddles without touching 1.
        assert_eq!(verdict(record("m", 101.0, 0.004, 60), record("m", 100.0, 0.0, 60)), Verdict::Undecided);
    }

    #[test]
    fn the_interval_holds_the_ratio_and_repeats() {
        let (a, b) = (record("matmul", 120.0, 0.4, 80), record("matmul", 100.0, 0.4, 80));
        let first = compare(std::slice::from_ref(&a), std::slice::from_ref(&b));
        let (low, high) = first[0].interval.unwrap();
        let ratio = first[0].ratio.unwrap();
        assert!(low < ratio && ratio < high && low > 1.0 && high < 1.5, "{low} {ratio} {high}");
        assert_eq!(first, compare(&[a], &[b]));
    }

    #[test]
    fn nothing_wrong_or_impossible_wins() {
        let base = || record("matmul", 100.0, 0.1, 60);
        let mut wrong = record("matmul", 1.0, 0.1, 60);
        wrong.passed = false;
        assert_eq!(verdict(base(), wrong), Verdict::NotComparable);

        let mut impossible = record("matmul", 1.0, 0.1, 60);
        (impossible.flops, impossible.ceiling, impossible.ceiling_unit) = (1_000_000, Some(100.0), "GFLOP/s".into());
        impossible.summarize();
        assert!(impossible.ceiling_share.unwrap() > 9.0);
        assert_eq!(verdict(base(), impossible), Verdict::Suspect);

        let mut software = base();
        software.device.software = true;
        assert_eq!(verdict(base(), software), Verdict::NotComparable);

        let mut poisoned = base();
        poisoned.samples_us[3] = f64::NAN;
        assert_eq!(verdict(base(), poisoned), Verdict::NotComparable);
        assert_eq!(verdict(base(), record("matmul", 1.0, 0.0, 0)), Verdict::NotComparable);
    }

    #[test]
    fn unpaired_cases_are_listed_and_excluded_from_the_mean() {
        let rows = compare(&[record("a", 1.0, 0.0, 30)], &[record("b", 1.0, 0.0, 30)]);
        assert_eq!(rows.iter().map(|row| row.verdict).collect::<Vec<_>>(), [Verdict::OnlyInA, Verdict::OnlyInB]);
        assert!(to_terminal(&rows).contains("1 only in A, 1 only in B\n"));
        assert!(to_markdown(&[]).contains("no cases"));
    }
}
