//! The stage table for spreadsheets: raw numbers, names that cannot turn into formulas.

use super::model::{RunReport, StageRow};
use super::plain::csv_text;
use crate::error::{Error, Result};

/// One row per stage; empty cells were not measured.
///
/// # Errors
/// `Error::Io` should the writer fail.
pub fn render(report: &RunReport) -> Result<Vec<u8>> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let fail = |error: csv::Error| Error::io("report.csv", error.into());
    writer
        .write_record([
            "stage",
            "baseline",
            "parameters",
            "activated_bytes",
            "total_bytes",
            "token_accuracy",
            "retained",
            "exact_match",
            "validation_loss",
            "peak_memory_bytes",
            "seconds",
        ])
        .map_err(fail)?;
    for stage in &report.stages {
        writer.write_record(record(stage)).map_err(fail)?;
    }
    writer.into_inner().map_err(|error| Error::io("report.csv", std::io::Error::other(error.to_string())))
}

fn record(stage: &StageRow) -> [String; 11] {
    let optional = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
    [
        csv_text(&stage.name),
        stage.baseline.to_string(),
        stage.parameters.to_string(),
        stage.activated_bytes.to_string(),
        stage.total_bytes.to_string(),
        optional(stage.token_accuracy),
        optional(stage.retained),
        optional(stage.exact_match),
        optional(stage.validation_loss),
        stage.peak_memory_bytes.map(|value| value.to_string()).unwrap_or_default(),
        optional(stage.seconds),
    ]
}
