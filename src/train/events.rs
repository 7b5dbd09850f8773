//! TensorBoard event files, the few messages of them that scalars need.
//!
//! A file is a sequence of records: length (u64), masked CRC-32C of the length bytes, data, masked CRC-32C of the data,
//! all little-endian. The data is a protobuf `Event`: 1 wall_time (double), 2 step (int64), 3 file_version (string), 5
//! summary (message of repeated 1 value: 1 tag (string), 2 simple_value (float)).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Writes scalars for TensorBoard. Each scalar is one record and one write.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Creates the file `events.out.tfevents.<seconds>.<name>` in `directory` (which must exist), where TensorBoard
    /// finds it, and writes the version record. `wall_time` is in seconds since the Unix epoch. A run that is resumed
    /// opens a further file, within the same second one with a number behind its name; TensorBoard reads them in the order
    /// of their names.
    ///
    /// # Errors
    /// `Error::Io`.
    pub fn create(directory: impl AsRef<Path>, name: &str, wall_time: f64) -> Result<Self> {
        // The name becomes part of a path, so only what is safe in one stays.
        let name: String = name.chars().filter(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_')).collect();
        let stem = format!("events.out.tfevents.{:010}.{name}", wall_time as u64);
        let mut path = directory.as_ref().join(&stem);
        let mut more = 0;
        let file = loop {
            match OpenOptions::new().append(true).create_new(true).open(&path) {
                Ok(file) => break file,
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && more < 1000 => {
                    more += 1;
                    path = directory.as_ref().join(format!("{stem}.{more}"));
                }
                Err(e) => return Err(Error::io(&path, e)),
            }
        };
        let mut writer = Self { path, file };
        let mut event = Vec::new();
        double_field(&mut event, 1, wall_time);
        bytes_field(&mut event, 3, b"brain.Event:2");
        writer.write(&event)?;
        Ok(writer)
    }

    /// The file being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one value. `tag` is the curve's name, grouped by what stands before its first "/".
    ///
    /// # Errors
    /// `Error::Io`.
    pub fn scalar(&mut self, tag: &str, step: u64, value: f32, wall_time: f64) -> Result<()> {
        let mut point = Vec::new();
        bytes_field(&mut point, 1, tag.as_bytes());
        key(&mut point, 2, Wire::Fixed32);
        point.extend(value.to_le_bytes());
        let mut summary = Vec::new();
        bytes_field(&mut summary, 1, &point);
        let mut event = Vec::new();
        double_field(&mut event, 1, wall_time);
        key(&mut event, 2, Wire::Varint);
        varint(&mut event, step);
        bytes_field(&mut event, 5, &summary);
        self.write(&event)
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_crc(data).to_le_bytes());
        self.file.write_all(&record).map_err(|source| Error::io(&self.path, source))
    }
}

/// A CRC of data that holds CRCs is weak, hence the rotation and offset of the format.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// Protobuf wire types.
#[derive(Clone, Copy)]
enum Wire {
    Varint = 0,
    Fixed64 = 1,
    Bytes = 2,
    Fixed32 = 5,
}

fn key(out: &mut Vec<u8>, field: u64, wire: Wire) {
    varint(out, (field << 3) | wire as u64);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn double_field(out: &mut Vec<u8>, field: u64, value: f64) {
    key(out, field, Wire::Fixed64);
    out.extend(value.to_le_bytes());
}

fn bytes_field(out: &mut Vec<u8>, field: u64, value: &[u8]) {
    key(out, field, Wire::Bytes);
    varint(out, value.len() as u64);
    out.extend(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reader of its own: bitwise CRC and a general protobuf walk, nothing shared with the writer.
    mod reader {
        pub fn crc32c(data: &[u8]) -> u32 {
            !data.iter().fold(!0, |crc, &byte| {
                (0..8).fold(
                    crc ^ u32::from(byte),
                    |crc: u32, _| {
                        if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 }
                    },
                )
            })
        }

        fn masked(data: &[u8]) -> [u8; 4] {
            let crc = crc32c(data);
            crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
        }

        pub fn records(mut file: &[u8]) -> Vec<Vec<u8>> {
            let mut records = Vec::new();
            while !file.is_empty() {
                let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
                assert_eq!(masked(&file[..8]), file[8..12]);
                let data = &file[12..12 + length];
                assert_eq!(masked(data), file[12 + length..16 + length]);
                records.push(data.to_vec());
                file = &file[16 + length..];
            }
            records
        }

        fn number(data: &mut &[u8]) -> u64 {
            let mut value = 0;
            for shift in (0..).step_by(7) {
                let byte = data[0];
                *data = &data[1..];
                value |= u64::from(byte & 0x7f) << shift;
                if byte < 0x80 {
                    break;
                }
            }
            value
        }

        /// Field numbers with their raw bytes; varints widened to eight bytes.
        pub fn fields(mut data: &[u8]) -> Vec<(u64, Vec<u8>)> {
            let mut fields = Vec::new();
            while !data.is_empty() {
                let key = number(&mut data);
                let length = match key & 7 {
                    0 => {
                        fields.push((key >> 3, number(&mut data).to_le_bytes().to_vec()));
                        continue;
                    }
                    1 => 8,
                    5 => 4,
                    2 => number(&mut data) as usize,
                    other => panic!("wire type {other}"),
                };
                let (value, rest) = data.split_at(length);
                fields.push((key >> 3, value.to_vec()));
                data = rest;
            }
            fields
        }
    }

    #[test]
    fn a_separate_reader_gets_back_what_was_written() {
        assert_eq!(reader::crc32c(b"123456789"), 0xe306_9283);
        let directory = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(directory.path(), "../run 1", 1_700_000_000.25).unwrap();
        assert_eq!(writer.path(), directory.path().join("events.out.tfevents.1700000000.run1"));
        let points = [("train/loss", 0, 3.5f32), ("train/loss", 300, f32::NAN), ("验证/loss", u64::MAX >> 1, -0.0)];
        for (tag, step, value) in points {
            writer.scalar(tag, step, value, 1.5).unwrap();
        }
        let records = reader::records(&std::fs::read(writer.path()).unwrap());
        let version = reader::fields(&records[0]);
        assert_eq!(version[0], (1, 1_700_000_000.25f64.to_le_bytes().to_vec()));
        assert_eq!(version[1], (3, b"brain.Event:2".to_vec()));
        assert_eq!(records.len(), 1 + points.len());
        for (record, (tag, step, value)) in records[1..].iter().zip(points) {
            let event = reader::fields(record);
            assert_eq!(event[0], (1, 1.5f64.to_le_bytes().to_vec()));
            assert_eq!(event[1], (2, step.to_le_bytes().to_vec()));
            let summary = reader::fields(&event[2].1);
            assert_eq!((event[2].0, summary[0].0), (5, 1));
            let point = reader::fields(&summary[0].1);
            assert_eq!(point, [(1, tag.as_bytes().to_vec()), (2, value.to_le_bytes().to_vec())]);
        }
    }

    #[test]
    fn an_existing_file_is_not_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let create = || EventWriter::create(directory.path(), "run", 5.0).unwrap();
        let (mut first, second) = (create(), create());
        first.scalar("loss", 1, 2.0, 5.0).unwrap();
        let names = [&first, &second].map(|w| w.path().file_name().unwrap().to_str().unwrap().to_string());
        assert_eq!(names, ["events.out.tfevents.0000000005.run", "events.out.tfevents.0000000005.run.1"]);
        let read = |w: &EventWriter| reader::records(&std::fs::read(w.path()).unwrap()).len();
        assert_eq!((read(&first), read(&second)), (2, 1));
    }
}
