//! Which of several kernels that fit a problem runs, as measured: a table for each device and driver, filled by `kernels tune`
//! and read by dispatch. Without one the order of the records stands; dispatch measures nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::atomic::write_atomic;
use crate::console;
use crate::device::{Info, cache_place};
use crate::error::{Error, Result};
use crate::json;
use crate::kernel::{Kernel, Problem};

/// What was measured of one kind of problem.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Choice {
    /// [`label`] of the record that runs.
    pub kernel: String,
    /// Microseconds of it, and of the record that runs without a table: medians of one comparison.
    pub us: f64,
    pub first_us: f64,
}

/// The choices for one device, driver and version of the program.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Table {
    pub version: String,
    pub device: String,
    pub driver: String,
    /// By [`kind`] of problem.
    pub choices: BTreeMap<String, Choice>,
}

impl Table {
    pub fn new(info: &Info) -> Self {
        let version = env!("CARGO_PKG_VERSION").into();
        Self { version, device: info.name.clone(), driver: info.driver.clone(), choices: BTreeMap::new() }
    }

    /// Whose it is; not what it says.
    fn owner(&self) -> (&str, &str, &str) {
        (&self.version, &self.device, &self.driver)
    }

    /// The kernel that was chosen for a problem; `None` where nothing was measured, or it no longer fits.
    pub fn choice(&self, problem: &Problem) -> Option<&'static Kernel> {
        let choice = self.choices.get(&kind(problem)?)?;
        problem.fitting().find(|kernel| kernel.label() == choice.kernel)
    }
}

/// What problems share a choice: op, element type, extents up to the next powers of two, and the first record that fits, which
/// tells a product from one of transposed matrices. `None` where no record fits.
pub fn kind(problem: &Problem) -> Option<String> {
    let extent = |n: &usize| n.next_power_of_two().to_string();
    let shape = |dims: &[usize]| dims.iter().map(extent).collect::<Vec<_>>().join("x");
    let shapes: Vec<String> = problem.inputs.iter().map(|m| shape(m.dims())).collect();
    let first = problem.fitting().next()?.label();
    Some(format!("{} {} {}{OF}{first}", problem.op.name(), problem.element, shapes.join(" ")))
}

/// What stands before the first record in a kind.
const OF: &str = " of ";

/// The file of a device's table.
pub fn file(info: &Info) -> PathBuf {
    let mut hasher = blake3::Hasher::new();
    hasher.update(info.name.as_bytes()).update(&[0]).update(info.driver.as_bytes());
    cache_place("tuned").join(format!("{}.json", &hasher.finalize().to_hex()[..16]))
}

/// The table in a file; `None` where there is no file.
///
/// # Errors
/// A file that cannot be read, or is another device's, driver's or version's.
pub fn read(path: &Path, info: &Info) -> Result<Option<Table>> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, e)),
    };
    let table: Table = json::read(path, &bytes)?;
    let wanted = Table::new(info);
    if table.owner() != wanted.owner() {
        let reason = format!("a table of {:?}, not of {:?}", table.owner(), wanted.owner());
        return Err(Error::file(path, "device", reason));
    }
    Ok(Some(table))
}

/// Writes a table, whole or not at all; makes its folder where it is missing.
///
/// # Errors
/// Where it cannot be written.
pub fn write(path: &Path, table: &Table) -> Result<()> {
    let text = serde_json::to_vec_pretty(table).map_err(|e| Error::io(path, e.into()))?;
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    write_atomic(path, &text)
}

static LOADED: AtomicBool = AtomicBool::new(false);
static TABLES: RwLock<BTreeMap<(String, String), Table>> = RwLock::new(BTreeMap::new());

/// Lets dispatch follow a device's table from now on. One that cannot be used is named and ignored.
pub fn load(info: &Info) {
    match read(&file(info), info) {
        Ok(Some(table)) => {
            let mut tables = TABLES.write().unwrap_or_else(std::sync::PoisonError::into_inner);
            tables.insert((table.device.clone(), table.driver.clone()), table);
            LOADED.store(true, Relaxed);
        }
        Ok(None) => {}
        Err(e) => console::warn(format_args!("tuned kernels are ignored: {e}")),
    }
}

/// What `with` says of the loaded table of a device.
fn of<R>(info: &Info, with: impl FnOnce(&Table) -> R) -> Option<R> {
    if !LOADED.load(Relaxed) {
        return None;
    }
    let tables = TABLES.read().unwrap_or_else(std::sync::PoisonError::into_inner);
    tables.get(&(info.name.clone(), info.driver.clone())).map(with)
}

/// The kernel that the loaded table names for a problem.
pub fn choice(problem: &Problem) -> Option<&'static Kernel> {
    of(problem.info, |table| table.choice(problem)).flatten()
}

/// What the loaded table adds to a device's arithmetic, where it takes other kernels than the first: they add in other orders.
pub fn mark(info: &Info) -> String {
    let kernels = |table: &Table| {
        let others = table.choices.iter().filter(|(kind, choice)| !kind.ends_with(&format!("{OF}{}", choice.kernel)));
        let others: Vec<String> = others.map(|(kind, choice)| format!("{kind}: {}\n", choice.kernel)).collect();
        let hash = blake3::hash(others.concat().as_bytes()).to_hex();
        if others.is_empty() { String::new() } else { format!(", tuned {}", &hash[..16]) }
    };
    of(info, kernels).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Class, Device, Kind, Limits, NullDevice};
    use crate::dtype::DType;
    use crate::op::Op;
    use crate::ops::matmul::Matmul;
    use crate::shape::Meta;

    fn info() -> Info {
        NullDevice::new(Kind::Wgpu, Class::Cpu, Limits::webgpu()).info().clone()
    }

    fn with_problem<R>(transpose_b: bool, extent: usize, work: impl FnOnce(&Problem) -> R) -> R {
        let op = Matmul::plain(false, transpose_b);
        let inputs = [Meta::new(&[extent, extent], DType::F32).unwrap(); 2];
        let outputs = op.infer(&inputs).unwrap();
        work(&Problem { op: &op, inputs: &inputs, outputs: &outputs, element: DType::F32, info: &info() })
    }

    fn chosen(kind: &str, kernel: &str) -> Table {
        let choice = Choice { kernel: kernel.into(), us: 1.0, first_us: 2.0 };
        Table { choices: BTreeMap::from([(kind.into(), choice)]), ..Table::new(&info()) }
    }

    #[test]
    fn a_table_chooses_for_its_kind_alone() {
        let last = |problem: &Problem| chosen(&kind(problem).unwrap(), &problem.fitting().last().unwrap().label());
        let table = with_problem(false, 96, last);
        let taken = |problem: &Problem| table.choice(problem).map(|kernel| kernel.name);
        assert_eq!(with_problem(false, 96, taken), Some("matmul_fwd"));
        assert_eq!(with_problem(false, 128, taken), Some("matmul_fwd"), "the same power of two");
        assert_eq!(with_problem(false, 132, taken), None);
        assert_eq!(with_problem(true, 96, taken), None, "other constants");
        with_problem(false, 96, |problem| {
            assert!(chosen(&kind(problem).unwrap(), "a rung that is gone").choice(problem).is_none());
        });
    }

    #[test]
    fn files_that_cannot_be_used_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("of").join("table.json");
        assert_eq!(read(&path, &info()).unwrap(), None);
        let table = chosen("a kind", "a kernel");
        write(&path, &table).unwrap();
        assert_eq!(read(&path, &info()).unwrap(), Some(table.clone()));
        write(&path, &Table { driver: "another".into(), ..table }).unwrap();
        let error = read(&path, &info()).unwrap_err().to_string();
        assert!(error.contains("table.json") && error.contains("another"), "{error}");
        for damaged in ["", "{\"version\": 1}", "[]"] {
            std::fs::write(&path, damaged).unwrap();
            assert!(read(&path, &info()).unwrap_err().to_string().contains("table.json"));
        }
    }
}
