//! The one error type. No variant carries free prose: each names the numbers, the place and the rule, so that a
//! message can be acted on and a test can match on it.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Shapes do not satisfy an op's rule.
    #[error("{op}: shapes {got} break the rule: {rule}")]
    Shape { op: &'static str, rule: &'static str, got: String },

    /// A storage type the op does not take.
    #[error("{op}: storage types {got} where {expected} is needed")]
    Dtype { op: &'static str, expected: &'static str, got: String },

    /// An op parameter outside its domain.
    #[error("{op}: {parameter} = {value} is outside {allowed}")]
    Parameter { op: &'static str, parameter: &'static str, value: String, allowed: &'static str },

    /// No kernel record fits.
    #[error("{op}: no kernel for {dtype} on {device} with shapes {shapes}")]
    Unsupported { op: &'static str, device: String, dtype: &'static str, shapes: String },

    #[error("{op}: input {input} lives on {got}, the first input on {expected}")]
    WrongDevice { op: &'static str, input: usize, expected: String, got: String },

    #[error("{op} has no gradient rule")]
    NoGradient { op: &'static str },

    #[error("{file}:{line}: kernel {kernel} does not compile: {log}")]
    Compile { kernel: String, file: String, line: u32, log: String },

    /// A launch that breaks a device limit; found before anything runs.
    #[error("kernel {kernel}: {what} = {got} is above this device's limit of {limit}")]
    Launch { kernel: String, what: &'static str, got: u64, limit: u64 },

    /// A kernel that reached past the end of an array: `past` elements, or a huge number before its start.
    #[error("{file}:{line}: kernel {kernel} goes {past} past the end of {array}")]
    Bounds { kernel: String, file: String, line: u32, array: String, past: u32 },

    #[error("out of memory on {device}: {requested} bytes asked, {live} live, cap {cap}")]
    OutOfMemory { device: String, requested: u64, live: u64, cap: u64 },

    #[error("device {device} was lost: {reason}")]
    DeviceLost { device: String, reason: String },

    /// The driver refused a call that our own checks let through.
    #[error("{device}: {operation} failed: {log}")]
    Driver { device: String, operation: &'static str, log: String },

    /// Work cannot be captured for replay; it has not run, and runs as well without.
    #[error("{device} cannot capture this work: {reason}")]
    Capture { device: String, reason: Uncapturable },

    #[error("device {device} is not available: {reason}")]
    NotAvailable { device: String, reason: String },

    /// Content of a file breaks a rule. `position` is "line 3", "byte 16" or a key path.
    #[error("{path}: {position}: {rule}")]
    File { path: PathBuf, position: String, rule: String },

    #[error("{path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },

    #[error("recipe: {key}: {value} is not allowed; allowed: {allowed}")]
    Recipe { key: String, value: String, allowed: String },

    /// The first NaN or infinity, named before it reaches a checkpoint.
    #[error("step {step}: {layer}: {tensor} holds {count} non-finite values, the first at index {index}")]
    NonFinite { step: u64, layer: String, tensor: String, count: usize, index: usize },

    /// A pipeline schedule that cannot run.
    #[error("schedule {schedule}: stage {stage}, event {position} ({event}): rule broken: {rule}")]
    Schedule { schedule: String, stage: usize, position: usize, event: String, rule: String },

    /// A stage of a pipeline that failed, and where in its schedule it stood; the others have stopped.
    #[error("pipeline stage {stage} failed in step {step} at event {position} ({event}): {what}{}", recorded(record))]
    Fault { stage: usize, step: u64, position: usize, event: String, what: String, record: PathBuf },

    /// A promise of a compression stage does not hold.
    #[error("stage {stage}: invariant broken: {rule}; measured {measured}")]
    Invariant { stage: String, rule: String, measured: String },

    #[error("interrupted; resume with the same command (state in {path})")]
    Interrupted { path: PathBuf },

    /// A command line value that clap could not judge by itself.
    #[error("{argument}: {value} is not usable: {rule}")]
    Usage { argument: &'static str, value: String, rule: String },

    /// Some checks ran and did not pass.
    #[error("{failed} of {total} {what} failed")]
    Failed { what: &'static str, failed: usize, total: usize },
}

/// Why work cannot be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Uncapturable {
    #[error("the device captures nothing")]
    Device,
    #[error("another capture is under way")]
    Nested,
    #[error("it reads device memory on the host")]
    Download,
    #[error("it writes device memory from the host")]
    Upload,
    #[error("it waits for the device")]
    Wait,
    #[error("it needs {0} bytes that the pool does not hold")]
    Memory(usize),
    #[error("{0} of its allocations outlive it")]
    Outlives(usize),
    #[error("the driver ended it with error {0}")]
    Driver(u32),
}

/// Where a fault's events are; a process that lost its leader between trainings has none.
fn recorded(record: &Path) -> String {
    if record.as_os_str().is_empty() { String::new() } else { format!("; events of all stages: {}", record.display()) }
}

impl Error {
    pub fn io(path: impl AsRef<Path>, source: std::io::Error) -> Self {
        Self::Io { path: path.as_ref().to_path_buf(), source }
    }

    pub fn file(path: impl AsRef<Path>, position: impl ToString, rule: impl ToString) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), position: position.to_string(), rule: rule.to_string() }
    }

    /// Stable code, printed with every message and matched by tests and scripts.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Shape { .. } => "E-SHAPE",
            Self::Dtype { .. } => "E-DTYPE",
            Self::Parameter { .. } => "E-PARAMETER",
            Self::Unsupported { .. } => "E-UNSUPPORTED",
            Self::WrongDevice { .. } => "E-WRONG-DEVICE",
            Self::NoGradient { .. } => "E-NO-GRADIENT",
            Self::Compile { .. } => "E-COMPILE",
            Self::Launch { .. } => "E-LAUNCH",
            Self::Bounds { .. } => "E-BOUNDS",
            Self::OutOfMemory { .. } => "E-MEMORY",
            Self::DeviceLost { .. } => "E-DEVICE-LOST",
            Self::Driver { .. } => "E-DRIVER",
            Self::Capture { .. } => "E-CAPTURE",
            Self::NotAvailable { .. } => "E-NO-DEVICE",
            Self::File { .. } => "E-FILE",
            Self::Io { .. } => "E-IO",
            Self::Recipe { .. } => "E-RECIPE",
            Self::NonFinite { .. } => "E-NON-FINITE",
            Self::Schedule { .. } => "E-SCHEDULE",
            Self::Fault { .. } => "E-FAULT",
            Self::Invariant { .. } => "E-INVARIANT",
            Self::Interrupted { .. } => "E-INTERRUPTED",
            Self::Usage { .. } => "E-USAGE",
            Self::Failed { .. } => "E-FAILED",
        }
    }

    /// Process exit code: 1 failure, 2 usage, 3 data or model invalid, 4 device, 5 interrupted and resumable.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Usage { .. } | Self::Recipe { .. } | Self::Parameter { .. } => 2,
            Self::File { .. } | Self::NonFinite { .. } => 3,
            Self::OutOfMemory { .. }
            | Self::DeviceLost { .. }
            | Self::Driver { .. }
            | Self::Capture { .. }
            | Self::NotAvailable { .. }
            | Self::Compile { .. }
            | Self::Launch { .. }
            | Self::Bounds { .. } => 4,
            Self::Schedule { .. } => 3,
            // The run stands at its last checkpoint.
            Self::Interrupted { .. } | Self::Fault { .. } => 5,
            // A full disk or a failing one leaves a resumable run behind.
            Self::Io { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => 5,
            Self::Io { .. } => 3,
            _ => 1,
        }
    }
}
