//! Kernel benchmark records (one JSON object per line) and the comparison of two files of them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How a sample was timed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimingSource {
    GpuTimestamp,
    Event,
    #[default]
    Wall,
    /// Processor time of the whole process.
    Cpu,
}

/// The device and everything about it that can change a time.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BenchDevice {
    /// Device kind, for example "cpu" or "wgpu".
    pub backend: String,
    pub name: String,
    pub driver: String,
    /// PCI vendor and device number; 0 where there is none.
    pub vendor_id: u32,
    pub device_id: u32,
    /// A software adapter: never ranked with hardware.
    pub software: bool,
    pub limits: BTreeMap<String, u64>,
    /// Every backend this program was built with.
    pub registry: Vec<String>,
}

/// One benchmarked case.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct BenchRecord {
    /// RFC 3339.
    pub time: String,
    pub version: String,
    pub commit: String,
    pub device: BenchDevice,

    pub op: String,
    /// Shapes and parameters, for example "m=512 n=512 k=512 nt".
    pub params: String,
    /// "forward" or "backward".
    pub mode: String,
    pub dtype: String,
    pub layout: String,
    /// The kernel's rung, and the hash of its source.
    pub kernel: String,
    pub kernel_hash: String,

    pub supported: bool,
    /// The result was right before and after timing.
    pub passed: bool,
    pub error: Option<String>,
    /// For example "nmse", with the worst value seen and the bound it was held to.
    pub error_metric: String,
    pub error_value: Option<f64>,
    pub error_bound: Option<f64>,
    pub seed: u64,
    pub input_hash: String,
    pub output_hash: String,

    pub timing_source: TimingSource,
    pub warmups: u32,
    /// Kernel runs per sample.
    pub runs: u32,
    /// Microseconds per kernel run, in the order they were taken.
    pub samples_us: Vec<f64>,
    pub min_us: f64,
    pub p5_us: f64,
    pub median_us: f64,
    pub p95_us: f64,

    /// Work of one run: operations, bytes moved at least, bytes allocated.
    pub flops: u64,
    pub bytes: u64,
    pub memory: u64,
    pub gflops: f64,
    pub bandwidth_gb: f64,
    /// This run's measured ceiling for the case, in its limiting unit, and the share of it that was reached.
    pub ceiling: Option<f64>,
    pub ceiling_unit: String,
    pub ceiling_share: Option<f64>,
    /// Time of the naive rung over this time.
    pub naive_ratio: Option<f64>,
    /// Clocks drifted while sampling, or GPU and wall time disagree: see `error`.
    pub voided: bool,
}

/// Value at share `q` (0 to 1) of sorted samples, interpolated; `None` without samples.
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let position = q.clamp(0.0, 1.0) * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted.get(position.floor() as usize)?, sorted.get(position.ceil() as usize)?);
    Some(low + (high - low) * position.fract())
}

impl BenchRecord {
    /// Fills the statistics, rates and ceiling share from `samples_us`, `flops`, `bytes`, `ceiling` and
    /// `ceiling_unit` ("GFLOP/s" or "GB/s").
    pub fn summarize(&mut self) {
        let mut sorted = self.samples_us.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |q| quantile(&sorted, q).unwrap_or(0.0);
        (self.min_us, self.p5_us, self.median_us, self.p95_us) = (at(0.0), at(0.05), at(0.5), at(0.95));
        let rate = |work: u64| if self.median_us > 0.0 { work as f64 / self.median_us / 1e3 } else { 0.0 };
        (self.gflops, self.bandwidth_gb) = (rate(self.flops), rate(self.bytes));
        let reached = if self.ceiling_unit == "GB/s" { self.bandwidth_gb } else { self.gflops };
        self.ceiling_share = self.ceiling.filter(|ceiling| *ceiling > 0.0).map(|ceiling| reached / ceiling);
    }

    /// Nothing runs faster than the machine: a result above the ceiling (with 5 % for the ceiling's own noise) is a
    /// measuring error until shown otherwise.
    pub fn suspect(&self) -> bool {
        self.ceiling_share.is_some_and(|share| share > 1.05)
    }

    /// What makes two records the same case.
    pub fn case(&self) -> Case {
        let part = |text: &String| text.clone();
        Case {
            op: part(&self.op),
            params: part(&self.params),
            mode: part(&self.mode),
            dtype: part(&self.dtype),
            layout: part(&self.layout),
        }
    }
}

/// Identity of a case across commits and devices.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Case {
    pub op: String,
    pub params: String,
    pub mode: String,
    pub dtype: String,
    pub layout: String,
}

/// Reads a JSON-lines file of records.
///
/// # Errors
/// `Error::Io`; `Error::File` naming the line and key of the first line that is no record.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<BenchRecord>> {
    let path = path.as_ref();
    let text = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    let mut records = Vec::new();
    for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
        if line.iter().all(u8::is_ascii_whitespace) {
            continue;
        }
        let mut reader = serde_json::Deserializer::from_slice(line);
        records.push(serde_path_to_error::deserialize(&mut reader).map_err(|e| {
            let (line, key) = (index + 1, e.path().to_string());
            let place = if key == "." { format!("line {line}") } else { format!("line {line}: {key}") };
            Error::file(path, place, e.inner())
        })?);
    }
    Ok(records)
}
