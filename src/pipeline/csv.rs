//! Schedules as CSV in the form of PyTorch's pipeline schedules: one row per stage, in order; a cell is an event such as
//! `0F0`, `1I2` or `2SEND_F0`; an empty cell is a time step in which the stage does nothing, and is skipped.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use super::schedule::{Event, MAX_STAGES, Schedule, Work};
use super::validate::validate;
use crate::atomic::write_atomic;
use crate::error::{Error, Result};

/// Longer files are refused: a thousand stages with a thousand micro-batches and all messages have 60 MB.
pub const MAX_BYTES: u64 = 1 << 30;

/// Reads and validates a schedule; it is called as its file is. A chunk belongs to the stage in whose row it stands.
///
/// # Errors
/// `Io`; `File` with line and cell for what is no event, for a chunk in two rows and for sizes that do not fit the number of
/// cells; `Schedule` for events that stand well in the file and make no schedule.
pub fn read(path: impl AsRef<Path>) -> Result<Schedule> {
    let path = path.as_ref();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut bytes = Vec::new();
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(Error::file(path, format!("byte {MAX_BYTES}"), "a schedule's file has at most 1 GiB"));
    }
    parse(path, &bytes)
}

/// As [`read`], from memory; `path` is what messages name.
pub fn parse(path: &Path, bytes: &[u8]) -> Result<Schedule> {
    let mut homes: HashMap<u32, usize> = HashMap::new();
    let mut stages: Vec<Vec<Event>> = Vec::new();
    // The largest chunk and micro-batch, and where they stand.
    let mut largest = [(0, String::new()), (0, String::new())];
    // Line by line: an event has no line break, and a reader of whole files steps over empty lines, which would give the
    // rows behind them to other stages.
    let whole = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    for row in whole.split(|byte| *byte == b'\n') {
        let stage = stages.len();
        let line = stage + 1;
        let record = cells(row).map_err(|e| Error::file(path, format!("line {line}"), e))?;
        if stage == MAX_STAGES {
            return Err(Error::file(path, format!("line {line}"), format!("at most {MAX_STAGES} stages")));
        }
        let mut events = Vec::new();
        for (cell, text) in record.iter().enumerate() {
            let place = || format!("line {line}, cell {}", cell + 1);
            let text = std::str::from_utf8(text).map_err(|_| Error::file(path, place(), "not UTF-8"))?.trim();
            if text.is_empty() {
                continue;
            }
            let event: Event = text.parse().map_err(|rule: String| Error::file(path, place(), rule))?;
            let home = *homes.entry(event.chunk).or_insert(stage);
            if home != stage {
                let rule = format!("chunk {} stands in line {} too; a chunk has one stage", event.chunk, home + 1);
                return Err(Error::file(path, place(), rule));
            }
            for (most, value) in largest.iter_mut().zip([event.chunk, event.micro]) {
                if most.1.is_empty() || value > most.0 {
                    *most = (value, place());
                }
            }
            events.push(event);
        }
        if events.is_empty() {
            return Err(Error::file(path, format!("line {line}"), "a stage has work; this row has no event"));
        }
        stages.push(events);
    }
    let [(chunk, chunk_place), (micro, micro_place)] = largest;
    // Each chunk has a forward for each micro-batch. Held against the file before anything is laid out in these sizes.
    let forwards = stages.iter().flatten().filter(|e| e.work == Work::Forward).count() as u64;
    let (chunks, micros) = (u64::from(chunk) + 1, u64::from(micro) + 1);
    if chunks.saturating_mul(micros) != forwards {
        let place = if chunks > homes.len() as u64 { chunk_place } else { micro_place };
        let rule = format!(
            "with this event there are {chunks} chunks and {micros} micro-batches, which have {} forwards; the file has \
             {forwards}",
            chunks.saturating_mul(micros)
        );
        return Err(Error::file(path, place, rule));
    }
    let home = |chunk: u64| {
        let missing = || Error::file(path, chunk_place.clone(), format!("chunk {chunk} below it stands in no row"));
        homes.get(&(chunk as u32)).copied().ok_or_else(missing)
    };
    let homes = (0..chunks).map(home).collect::<Result<_>>()?;
    let schedule = Schedule { name: path.display().to_string(), micros: micros as usize, homes, stages };
    validate(&schedule)?;
    Ok(schedule)
}

fn cells(row: &[u8]) -> csv::Result<csv::ByteRecord> {
    let mut record = csv::ByteRecord::new();
    csv::ReaderBuilder::new().has_headers(false).from_reader(row).read_byte_record(&mut record)?;
    Ok(record)
}

/// Rows of events, ending in a line break.
pub fn render(schedule: &Schedule) -> String {
    let row = |events: &Vec<Event>| events.iter().map(Event::to_string).collect::<Vec<_>>().join(",") + "\n";
    schedule.stages.iter().map(row).collect()
}

/// Writes what [`read`] and PyTorch's `_load_csv` read.
///
/// # Errors
/// `Io`.
pub fn write(path: impl AsRef<Path>, schedule: &Schedule) -> Result<()> {
    write_atomic(path, render(schedule).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::Kind;

    fn parsed(text: impl AsRef<[u8]>) -> Result<Schedule> {
        parse(Path::new("plan.csv"), text.as_ref())
    }

    #[test]
    fn every_kind_comes_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("schedule.csv");
        for kind in Kind::ALL {
            for (stages, micros) in [(1, 1), (2, 3), (4, 8), (3, 2)] {
                let schedule = Schedule::new(kind, stages, micros).unwrap();
                for schedule in [schedule.with_messages(), schedule] {
                    write(&path, &schedule).unwrap();
                    let back = read(&path).unwrap();
                    let named = Schedule { name: back.name.clone(), ..schedule };
                    assert_eq!(back, named, "{kind}, {stages} stages, {micros} micro-batches");
                }
            }
        }
    }

    #[test]
    fn a_grid_with_empty_cells_and_spaces_is_read() {
        let grid = "0F0,0F1,,, 0B0 ,,0B1\r\n,1F0,1B0,1F1,1B1,,\n";
        let schedule = parsed(grid).unwrap();
        assert_eq!((schedule.micros, schedule.homes.as_slice()), (2, &[0, 1][..]));
        assert_eq!(render(&schedule), "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n");
        // Chunks in a V, all on the rows they stand in.
        assert_eq!(parsed("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n").unwrap().homes, [0, 1, 1, 0]);
    }

    #[test]
    fn what_is_no_schedule_is_refused_with_its_place() {
        for (text, place, part) in [
            ("", "line 1", "has work"),
            ("0F0,0B0,0X1\n", "line 1, cell 3", "no event"),
            ("0F0,0B0\n1F0,UNSHARD,1B0\n", "line 2, cell 2", "no event"),
            ("0F0,0B0\n\n1F0,1B0\n", "line 2", "has work"),
            ("0F0,0B0\n1F0,1B0\n\n", "line 3", "has work"),
            ("0F0,0B0\n,,\n", "line 2", "has work"),
            ("0F0,\"0B\n0\"\n", "line 1, cell 2", "no event"),
            ("0F0,0B0\n0F1,0B1\n", "line 2, cell 1", "in line 1 too"),
            ("0F0,0B0,4294967295F0\n", "line 1, cell 3", "4294967296 chunks"),
            ("0F0,0B0,0F4294967295\n", "line 1, cell 3", "4294967296 micro-batches"),
            ("0F0,0B0,4294967296F0\n", "line 1, cell 3", "no event"),
            ("0F0,0B0\n2F0,2B0\n", "line 2, cell 1", "3 chunks"),
            // As many forwards as two chunks and two micro-batches would have, but all of chunk 1.
            ("1F0,1F0,1F1,1F1,1B0,1B1\n", "line 1, cell 1", "chunk 0"),
        ] {
            let Err(Error::File { path, position, rule }) = parsed(text) else { panic!("{text:?} is read") };
            assert_eq!((path.to_str(), position.as_str()), (Some("plan.csv"), place), "{text:?}: {rule}");
            assert!(rule.contains(part), "{text:?}: {rule}");
        }
        assert!(matches!(parsed(b"0F0,\xff\n"), Err(Error::File { .. })));
        // Well written, but no order that can run.
        for text in ["0B0,0F0\n", "0F0,0F0,0B0\n", "0F0,0B0,0B0\n", "0F0,0F1,0B0\n", "0F0,0B0\n1F0\n"] {
            assert!(parsed(text).is_err(), "{text:?}");
        }
        assert!(matches!(parsed("0B0,0F0\n"), Err(Error::Schedule { schedule, .. }) if schedule == "plan.csv"));
        assert!(matches!(read("no such file.csv"), Err(Error::Io { .. })));
    }

    #[test]
    fn no_file_makes_it_panic() {
        let mut stream = crate::rng::Stream::new(4, 0);
        let good = render(&Schedule::new(Kind::ZeroBubbleV, 2, 4).unwrap().with_messages());
        for _ in 0..2000 {
            let mut bytes = good.clone().into_bytes();
            for _ in 0..1 + stream.below(4) {
                let at = stream.below(bytes.len());
                if bytes.len() < 2 {
                    break;
                }
                match stream.below(3) {
                    0 => bytes[at] = b"0123456789FBIW_,\"\n\r\0\xff"[stream.below(21)],
                    1 => drop(bytes.remove(at)),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            if let Ok(schedule) = parsed(&bytes) {
                validate(&schedule).unwrap();
            }
        }
    }
}
