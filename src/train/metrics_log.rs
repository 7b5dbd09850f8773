//! `metrics.jsonl`: one JSON object per event, appended as it happens.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::console;
use crate::error::{Error, Result};

/// One measured value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricEvent {
    pub step: u64,
    /// "train", "validation", "test".
    pub split: String,
    /// For example "loss" or "teacher/learning_rate".
    pub name: String,
    /// JSON has no NaN or infinity: a value that is not finite is written as null and read back as NaN.
    #[serde(deserialize_with = "null_is_nan")]
    pub value: f64,
    /// For example "nats/token", "tokens/s", "bytes"; empty for a pure number.
    pub unit: String,
    /// Seconds since the Unix epoch.
    pub wall_time: f64,
}

fn null_is_nan<'de, D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::NAN))
}

/// Appends events to a log file. Every record is one write of one whole line, so that a crash can tear only the last.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
}

impl MetricsLog {
    /// Opens or creates `path` for appending. A torn last line of an interrupted run is cut off first; otherwise the
    /// next record would be glued to it and lost with it.
    ///
    /// # Errors
    /// `Error::Io`.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let fail = |source| Error::io(&path, source);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(&path).map_err(fail)?;
        let mut content = Vec::new();
        file.read_to_end(&mut content).map_err(fail)?;
        let whole = whole_lines(&content).len() as u64;
        file.set_len(whole).map_err(fail)?;
        file.seek(SeekFrom::Start(whole)).map_err(fail)?;
        Ok(Self { path, file })
    }

    /// Opens the log after cutting it back to the events with `step` at most `last`, so that a resumed run does not
    /// log its repeated steps twice; returns those events. A damaged line costs the events from there on and a warning:
    /// this is only a log, and training goes on without it.
    ///
    /// # Errors
    /// `Error::Io`; the old log is then untouched.
    pub fn open_after(path: impl AsRef<Path>, last: u64) -> Result<(Self, Vec<MetricEvent>)> {
        let path = path.as_ref();
        let mut events = Vec::new();
        if path.exists() {
            let damage;
            (events, damage) = parse(path, &std::fs::read(path).map_err(|source| Error::io(path, source))?);
            if let Some(error) = damage {
                console::warn(format_args!("{error}; the log is cut off there"));
            }
            events.retain(|event| event.step <= last);
            let mut kept = Vec::new();
            for event in &events {
                kept.extend(line(path, event)?);
            }
            crate::atomic::write_atomic(path, &kept)?;
        }
        Ok((Self::open(path)?, events))
    }

    /// Writes one event.
    ///
    /// # Errors
    /// `Error::Io`; a full disk keeps its kind.
    pub fn append(&mut self, event: &MetricEvent) -> Result<()> {
        let line = line(&self.path, event)?;
        self.file.write_all(&line).map_err(|source| Error::io(&self.path, source))
    }
}

fn line(path: &Path, event: &MetricEvent) -> Result<Vec<u8>> {
    let mut line = serde_json::to_vec(event).map_err(|error| Error::io(path, error.into()))?;
    line.push(b'\n');
    Ok(line)
}

/// Reads every whole event of a log; a torn last line is dropped.
///
/// # Errors
/// `Error::Io`, or `Error::File` with the line number when a whole line is not an event.
pub fn read(path: impl AsRef<Path>) -> Result<Vec<MetricEvent>> {
    let path = path.as_ref();
    let content = std::fs::read(path).map_err(|source| Error::io(path, source))?;
    match parse(path, &content) {
        (events, None) => Ok(events),
        (_, Some(error)) => Err(error),
    }
}

/// The events up to the first damaged line, and what is wrong with that.
fn parse(path: &Path, content: &[u8]) -> (Vec<MetricEvent>, Option<Error>) {
    let mut events = Vec::new();
    for (index, line) in whole_lines(content).split(|&byte| byte == b'\n').enumerate() {
        if !line.is_empty() {
            match serde_json::from_slice(line) {
                Ok(event) => events.push(event),
                Err(error) => return (events, Some(Error::file(path, format!("line {}", index + 1), error))),
            }
        }
    }
    (events, None)
}

/// The content up to the last line break.
fn whole_lines(content: &[u8]) -> &[u8] {
    content.iter().rposition(|&byte| byte == b'\n').map_or(&[], |last| &content[..=last])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(step: u64, value: f64) -> MetricEvent {
        MetricEvent {
            step,
            split: "train".into(),
            name: "loss \"\n名".into(),
            value,
            unit: "nats/token".into(),
            wall_time: 1.5,
        }
    }

    #[test]
    fn what_is_appended_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let events = [event(1, 2.5), event(2, -1e-300)];
        MetricsLog::open(&path).unwrap().append(&events[0]).unwrap();
        MetricsLog::open(&path).unwrap().append(&events[1]).unwrap();
        assert_eq!(read(&path).unwrap(), events);
    }

    #[test]
    fn a_torn_last_line_costs_only_itself() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut log = MetricsLog::open(&path).unwrap();
        log.append(&event(1, 0.5)).unwrap();
        log.append(&event(2, 0.25)).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let first = whole.iter().position(|&byte| byte == b'\n').unwrap() + 1;
        for cut in first..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(read(&path).unwrap(), [event(1, 0.5)], "cut at byte {cut}");
            MetricsLog::open(&path).unwrap().append(&event(3, 0.125)).unwrap();
            assert_eq!(read(&path).unwrap(), [event(1, 0.5), event(3, 0.125)], "appended after a cut at byte {cut}");
        }
    }

    #[test]
    fn a_broken_whole_line_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        std::fs::write(&path, b"\n{\"step\": 1}\n").unwrap();
        let error = read(&path).unwrap_err();
        assert!(matches!(&error, Error::File { position, .. } if position == "line 2"), "{error}");
    }

    #[test]
    fn values_that_are_not_finite_survive_as_nan() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        MetricsLog::open(&path).unwrap().append(&event(1, f64::INFINITY)).unwrap();
        assert!(read(&path).unwrap()[0].value.is_nan());
    }

    #[test]
    fn resuming_forgets_the_steps_to_be_repeated() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut log = MetricsLog::open_after(&path, 0).unwrap().0;
        for step in 1..=5 {
            log.append(&event(step, 1.0)).unwrap();
        }
        let (mut log, kept) = MetricsLog::open_after(&path, 3).unwrap();
        assert_eq!(kept.len(), 3);
        log.append(&event(4, 2.0)).unwrap();
        let steps: Vec<_> = read(&path).unwrap().iter().map(|event| event.step).collect();
        assert_eq!(steps, [1, 2, 3, 4]);
    }

    #[test]
    fn a_damaged_line_does_not_stop_a_training() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("metrics.jsonl");
        let mut content = line(&path, &event(1, 0.5)).unwrap();
        content.extend(b"{\"step\": \xff}\n");
        content.extend(line(&path, &event(2, 0.25)).unwrap());
        std::fs::write(&path, content).unwrap();
        let (mut log, kept) = MetricsLog::open_after(&path, 2).unwrap();
        assert_eq!(kept, [event(1, 0.5)]);
        log.append(&event(3, 0.125)).unwrap();
        assert_eq!(read(&path).unwrap(), [event(1, 0.5), event(3, 0.125)]);
    }
}
