//! Kernel and launch records: pure data that says what runs where, for which shapes, with which geometry.

pub mod cuda;
mod tensor_map;

use crate::cpu;
use crate::device::{Info, Kind};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::op::Op;
use crate::shape::Meta;

pub use tensor_map::TensorMap;

/// Where a kernel's code comes from.
#[derive(Clone, Copy)]
pub enum Code {
    /// A Rust function over typed slices.
    Cpu(fn(&cpu::Args) -> Result<()>),
    /// An entry that a family's WGSL and CUDA files both have, under one name, with one geometry.
    Gpu { source: Source, entry: &'static str, constants: Constants },
    /// An entry of the WGSL file alone: register tiles for software adapters.
    Wgsl { source: Source, entry: &'static str, constants: Constants },
    /// An entry of the CUDA file alone, for compute capability `arch` (80 is 8.0) and later, that must contain the tensor
    /// instructions `tensor`, by their PTX names.
    Cuda { source: Source, entry: &'static str, constants: Constants, arch: u32, tensor: &'static [&'static str] },
}

/// Numbers fixed when a kernel is compiled: WGSL overrides, CUDA defines.
pub type Constants = &'static [(&'static str, f64)];

/// A file of kernels.
#[derive(Clone, Copy, Debug)]
pub struct File {
    pub name: &'static str,
    pub text: &'static str,
    /// Part of the program: what the table's tests know all accesses of.
    pub(crate) own: bool,
}

impl File {
    pub const fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, own: false }
    }

    pub(crate) const fn own(name: &'static str, text: &'static str) -> Self {
        Self { name, text, own: true }
    }

    pub(crate) const NONE: Self = Self::own("", "");
}

/// The kernel files of one op family: `shaders/STEM.wgsl` and its twin `cuda/STEM.cu`.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    pub wgsl: File,
    pub cuda: File,
}

impl Source {
    /// A WGSL file without a twin: probes and tests.
    pub const fn wgsl(name: &'static str, text: &'static str) -> Self {
        Self { wgsl: File::new(name, text), cuda: File::NONE }
    }

    /// A CUDA file without a twin.
    pub const fn cuda(name: &'static str, text: &'static str) -> Self {
        Self { wgsl: File::NONE, cuda: File::new(name, text) }
    }
}

/// The twin files of one stem.
macro_rules! source {
    ($stem:literal) => {
        $crate::kernel::Source {
            wgsl: $crate::kernel::File::own(
                concat!($stem, ".wgsl"),
                include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $stem, ".wgsl")),
            ),
            cuda: $crate::kernel::File::own(
                concat!($stem, ".cu"),
                include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/", $stem, ".cu")),
            ),
        }
    };
}
pub(crate) use source;

/// A rung in a file of its own: `shaders/STEM.wgsl` alone.
macro_rules! wgsl_source {
    ($stem:literal) => {
        $crate::kernel::Source {
            wgsl: $crate::kernel::File::own(
                concat!($stem, ".wgsl"),
                include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/shaders/", $stem, ".wgsl")),
            ),
            cuda: $crate::kernel::File::NONE,
        }
    };
}
pub(crate) use wgsl_source;

/// A rung in a file of its own: `cuda/STEM.cu` alone.
macro_rules! cuda_source {
    ($stem:literal) => {
        $crate::kernel::Source {
            wgsl: $crate::kernel::File::NONE,
            cuda: $crate::kernel::File::own(
                concat!($stem, ".cu"),
                include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/cuda/", $stem, ".cu")),
            ),
        }
    };
}
pub(crate) use cuda_source;

/// A kernel's entry in one file.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub file: File,
    pub entry: &'static str,
    pub constants: Constants,
}

/// One way to run an op on one kind of device.
#[derive(Clone, Copy)]
pub struct Kernel {
    /// Names the rung: `matmul_fwd`, `matmul_fwd_v2`.
    pub name: &'static str,
    pub code: Code,
    /// Element types of the op this record takes (see [`Op::element`]).
    pub dtypes: &'static [DType],
    /// Shapes and adapter features this record takes.
    pub fits: fn(&Problem) -> bool,
    pub plan: fn(&Problem) -> Plan,
}

impl Kernel {
    pub const fn cpu(name: &'static str, dtypes: &'static [DType], run: fn(&cpu::Args) -> Result<()>) -> Self {
        Self { name, code: Code::Cpu(run), dtypes, fits: always, plan: Plan::once }
    }

    /// The name and constants, which tell the records of one op apart.
    pub fn label(&self) -> String {
        let constants = match self.code {
            Code::Gpu { constants, .. } | Code::Wgsl { constants, .. } | Code::Cuda { constants, .. } => constants,
            Code::Cpu(_) => &[],
        };
        constants.iter().fold(self.name.to_string(), |label, (name, value)| format!("{label} {name}={value}"))
    }

    /// The WGSL entry, where there is one.
    pub fn wgsl(&self) -> Option<Entry> {
        match self.code {
            Code::Gpu { source, entry, constants } | Code::Wgsl { source, entry, constants } => {
                Some(Entry { file: source.wgsl, entry, constants })
            }
            Code::Cpu(_) | Code::Cuda { .. } => None,
        }
    }

    /// The CUDA entry, where there is one.
    pub fn cuda(&self) -> Option<Entry> {
        match self.code {
            Code::Gpu { source, entry, constants } | Code::Cuda { source, entry, constants, .. } => {
                Some(Entry { file: source.cuda, entry, constants })
            }
            Code::Cpu(_) | Code::Wgsl { .. } => None,
        }
    }

    /// Lowest compute capability (times 10) of the CUDA entry.
    pub fn arch(&self) -> u32 {
        match self.code {
            Code::Cuda { arch, .. } => arch,
            _ => cuda::LOWEST_ARCH,
        }
    }

    /// Whether there is code for a kind of device.
    pub fn supports(&self, kind: Kind) -> bool {
        match kind {
            Kind::Cpu => matches!(self.code, Code::Cpu(_)),
            Kind::Wgpu => self.wgsl().is_some(),
            Kind::Cuda => self.cuda().is_some(),
            Kind::Reference | Kind::Null => false,
        }
    }

    /// Whether the code runs on a device. Instructions of 9.0 and later are not carried over to the next generation.
    pub fn runs_on(&self, info: &Info) -> bool {
        let arch = self.arch();
        let fits = if arch >= 90 { arch == info.features.arch } else { arch <= info.features.arch };
        self.supports(info.kind) && (info.kind != Kind::Cuda || fits)
    }
}

/// The predicate of a kernel that takes every shape.
pub fn always(_: &Problem) -> bool {
    true
}

/// What a plan and a predicate may look at.
pub struct Problem<'a> {
    pub op: &'a dyn Op,
    pub inputs: &'a [Meta],
    pub outputs: &'a [Meta],
    pub element: DType,
    pub info: &'a Info,
}

impl Problem<'_> {
    /// The op as its own type; kernels belong to one op type, so this is `Some` in every record of that op.
    pub fn op<T: Op>(&self) -> Option<&T> {
        self.op.as_any().downcast_ref()
    }

    pub fn params(&self) -> Params {
        self.op.params(self.inputs, self.outputs)
    }

    /// The op's kernels that fit, in the table's order.
    pub fn fitting(&self) -> impl Iterator<Item = &'static Kernel> {
        let stored = self.info.stores(self.element);
        let fits = move |kernel: &&'static Kernel| {
            stored && kernel.runs_on(self.info) && kernel.dtypes.contains(&self.element) && (kernel.fits)(self)
        };
        self.op.kernels().iter().filter(fits)
    }
}

/// Words of a kernel's parameter block (WGSL immediates, last CUDA argument); at most 16.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Params {
    words: [u32; Params::MAX],
    len: u8,
}

impl Params {
    pub const MAX: usize = 16;

    pub fn new() -> Self {
        Self::default()
    }

    /// Appends an extent or index. Extents fit: shapes are capped at 2^31 elements.
    #[must_use]
    pub fn u(self, value: usize) -> Self {
        self.word(value as u32)
    }

    #[must_use]
    pub fn f(self, value: f32) -> Self {
        self.word(value.to_bits())
    }

    #[must_use]
    pub fn flag(self, value: bool) -> Self {
        self.word(u32::from(value))
    }

    #[must_use]
    pub fn word(mut self, value: u32) -> Self {
        assert!((self.len as usize) < Self::MAX, "a parameter block holds at most 16 words");
        self.words[self.len as usize] = value;
        self.len += 1;
        self
    }

    pub fn words(&self) -> &[u32] {
        &self.words[..self.len as usize]
    }
}

/// The bytes of one argument that a launch binds, where it is not the whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    pub argument: usize,
    pub offset: usize,
    pub bytes: usize,
}

/// One dispatch. Arguments are bound in order: inputs, outputs that alias no input, scratch.
#[derive(Clone, Debug)]
pub struct Launch {
    pub groups: [u32; 3],
    pub params: Params,
    /// Entry point, where a plan runs several of one file.
    pub entry: Option<&'static str>,
    /// Parts of arguments, for tables larger than one binding.
    pub windows: Vec<Window>,
    /// The argument bound at each slot, for ops whose optional inputs would shift the bindings of a shader or whose
    /// entries need fewer than all arguments; empty for all of them in order. A read argument may fill several slots.
    pub slots: Vec<usize>,
    /// Longest loop of one invocation; drivers that cut loops are given a split plan or refused.
    pub trips: u64,
    /// Bytes of dynamic shared memory (CUDA).
    pub shared: u32,
    /// Tensor maps, which a CUDA kernel takes between its buffers and its parameter block.
    pub maps: Vec<TensorMap>,
}

/// Highest workgroup count per dimension that every adapter takes.
pub const MAX_GROUPS: u32 = 65_535;

impl Launch {
    pub fn new(groups: [u32; 3], params: Params) -> Self {
        Self {
            groups,
            params,
            entry: None,
            windows: Vec::new(),
            slots: Vec::new(),
            trips: 0,
            shared: 0,
            maps: Vec::new(),
        }
    }

    /// One invocation per item in blocks of `block`, folded to two dimensions above 65,535 groups: the kernel's
    /// item is `gid.x + gid.y * 65535 * block` (`linear_id` in `shaders/lib.wgsl`).
    pub fn linear(items: usize, block: u32, params: Params) -> Self {
        let groups = items.div_ceil(block as usize).max(1) as u32;
        let rows = groups.div_ceil(MAX_GROUPS);
        let columns = if rows > 1 { MAX_GROUPS } else { groups };
        Self::new([columns, rows, 1], params)
    }

    #[must_use]
    pub fn entry(mut self, entry: &'static str) -> Self {
        self.entry = Some(entry);
        self
    }

    /// Declares the worst-case number of loop iterations of one invocation, nested loops multiplied out.
    #[must_use]
    pub fn trips(mut self, trips: usize) -> Self {
        self.trips = trips as u64;
        self
    }

    /// Asks for `bytes` of dynamic shared memory (CUDA).
    #[must_use]
    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared = bytes as u32;
        self
    }

    /// Adds a tensor map of the argument in its slot (CUDA).
    #[must_use]
    pub fn map(mut self, map: TensorMap) -> Self {
        self.maps.push(map);
        self
    }

    #[must_use]
    pub fn window(mut self, argument: usize, offset: usize, bytes: usize) -> Self {
        self.windows.push(Window { argument, offset, bytes });
        self
    }

    /// Binds argument `arguments[i]` at slot `i`. Windows still name arguments, not slots.
    #[must_use]
    pub fn slots(mut self, arguments: &[usize]) -> Self {
        self.slots = arguments.to_vec();
        self
    }
}

/// Launches of one op in order, and the bytes of each scratch buffer they share.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub launches: Vec<Launch>,
    pub scratch: Vec<usize>,
}

impl Plan {
    /// One launch with the op's parameter block; what CPU kernels need.
    pub fn once(problem: &Problem) -> Self {
        Self::of(Launch::new([1, 1, 1], problem.params()))
    }

    pub fn of(launch: Launch) -> Self {
        Self { launches: vec![launch], scratch: Vec::new() }
    }

    pub fn sequence(launches: Vec<Launch>) -> Self {
        Self { launches, scratch: Vec::new() }
    }

    #[must_use]
    pub fn scratch(mut self, bytes: usize) -> Self {
        self.scratch.push(bytes);
        self
    }
}

/// Ranges of `items` elements of `bytes` each that fit one storage binding of `limit` bytes and start where a binding
/// may start (a multiple of 256 bytes): how plans cut arguments larger than a binding into windows.
pub fn spans(items: usize, bytes: usize, limit: u64) -> impl Iterator<Item = std::ops::Range<usize>> {
    // 256 / gcd(256, bytes): powers of two up to 256 are all that 256 shares with a number.
    let align = 256 >> bytes.max(1).trailing_zeros().min(8);
    let most = usize::try_from(limit).unwrap_or(usize::MAX) / bytes.max(1);
    let step = (most / align * align).max(align);
    (0..items).step_by(step).map(move |start| start..items.min(start.saturating_add(step)))
}

/// Holds a launch against a device's limits, before anything runs.
pub fn check_launch(kernel: &Kernel, launch: &Launch, info: &Info) -> Result<()> {
    let refuse = |what, got: u64, limit: u64| Error::Launch { kernel: kernel.name.into(), what, got, limit };
    let limit = u64::from(info.limits.groups_per_dimension);
    for &g in &launch.groups {
        if g == 0 || u64::from(g) > limit {
            return Err(refuse("workgroups in one dimension", u64::from(g), limit));
        }
    }
    if let Some(budget) = info.limits.loop_budget
        && launch.trips > budget
    {
        return Err(refuse("loop iterations of one invocation", launch.trips, budget));
    }
    Ok(())
}

/// Element preludes: `E`, `ld`, `st`; the `enable` lines must come before everything else.
fn prelude(element: DType) -> File {
    match element {
        DType::F16 => File::own("elem_f16.wgsl", include_str!("../shaders/elem_f16.wgsl")),
        DType::Bf16 => File::own("elem_bf16.wgsl", include_str!("../shaders/elem_bf16.wgsl")),
        DType::U32 => File::own("elem_u32.wgsl", include_str!("../shaders/elem_u32.wgsl")),
        _ => File::own("elem_f32.wgsl", include_str!("../shaders/elem_f32.wgsl")),
    }
}

/// Matrix units: what is joined of this file must say so before everything else.
const COOP_FILE: File = File::own("coop.wgsl", include_str!("../shaders/coop.wgsl"));
const ENABLE_COOP: &str = "enable wgpu_cooperative_matrix;\n";

const LIBRARY: File = File::own("lib.wgsl", include_str!("../shaders/lib.wgsl"));

/// The files that stand in front of one that goes on from their declarations: rungs that need a feature of the device stand apart
/// from those that run everywhere, and what several families compute alike stands once.
fn bases(file: File) -> &'static [File] {
    const BINARY: File = File::own("binary.wgsl", include_str!("../shaders/binary.wgsl"));
    const UNARY: File = File::own("unary.wgsl", include_str!("../shaders/unary.wgsl"));
    const WIDE: File = File::own("wide.wgsl", include_str!("../shaders/wide.wgsl"));
    const RECIPROCAL: File = File::own("reciprocal.wgsl", include_str!("../shaders/reciprocal.wgsl"));
    const MATMUL: File = File::own("matmul.wgsl", include_str!("../shaders/matmul.wgsl"));
    const MATMUL_LANES: File = File::own("matmul_lanes.wgsl", include_str!("../shaders/matmul_lanes.wgsl"));
    const MATMUL_COOP: File = File::own("matmul_coop.wgsl", include_str!("../shaders/matmul_coop.wgsl"));
    match file.name {
        "binary_wide.wgsl" => &[BINARY, WIDE],
        "unary_wide.wgsl" => &[UNARY, WIDE],
        "matmul_lanes.wgsl" => &[MATMUL],
        "matmul_coop_16.wgsl" | "matmul_coop_8.wgsl" => &[MATMUL, MATMUL_COOP, COOP_FILE],
        "matmul_coop_emulated.wgsl" => &[MATMUL, MATMUL_COOP],
        "quant.wgsl" | "quant_matmul.wgsl" => &[RECIPROCAL],
        "attention_lanes.wgsl" => &[MATMUL, MATMUL_LANES],
        _ => &[],
    }
}

/// A file within a joined source, and how many lines stand before its own first one.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    pub file: &'static str,
    pub lines_before: u32,
}

/// Full WGSL source of a kernel file for one element type, and the files that it is joined of, the kernel's own last.
/// With `ESPALIER_SHADERS` set to a folder the files are read from there, so that a kernel can be tuned without a rebuild.
pub fn assemble(file: File, element: DType) -> Result<(String, Vec<Part>)> {
    let (mut source, mut parts) = (String::new(), Vec::new());
    if bases(file).iter().any(|base| base.name == COOP_FILE.name) {
        source += ENABLE_COOP;
    }
    for file in [prelude(element), LIBRARY].iter().chain(bases(file)).chain([&file]) {
        parts.push(Part { file: file.name, lines_before: source.lines().count() as u32 });
        source += &read_override("ESPALIER_SHADERS", file)?;
        source.push('\n');
    }
    Ok((source, parts))
}

/// The text of a file of the program, or of the file of that name in the folder that the environment variable names.
fn read_override(variable: &'static str, file: &File) -> Result<String> {
    match std::env::var_os(variable) {
        Some(folder) => read_from(variable, std::path::Path::new(&folder), file),
        None => Ok(file.text.to_string()),
    }
}

fn read_from(variable: &'static str, folder: &std::path::Path, file: &File) -> Result<String> {
    // It need only hold the files that are being tuned; where it holds none, another folder was meant.
    let kernels = |entry: std::fs::DirEntry| {
        let path = entry.path();
        ["wgsl", "cu", "cuh"].iter().any(|kind| path.extension().is_some_and(|e| e == *kind))
    };
    if !std::fs::read_dir(folder).is_ok_and(|mut entries| entries.any(|entry| entry.is_ok_and(kernels))) {
        let rule = "a folder of kernel files".into();
        return Err(Error::Usage { argument: variable, value: folder.display().to_string(), rule });
    }
    let path = folder.join(file.name);
    if path.exists() { std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e)) } else { Ok(file.text.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_of_kernels_must_be_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::new("one.cu", "built in");
        assert!(read_from("ESPALIER_CUDA", folder.path(), &file).is_err(), "a folder without kernels");
        std::fs::write(folder.path().join("other.cuh"), "").unwrap();
        assert_eq!(read_from("ESPALIER_CUDA", folder.path(), &file).unwrap(), "built in");
        std::fs::write(folder.path().join("one.cu"), "tuned").unwrap();
        assert_eq!(read_from("ESPALIER_CUDA", folder.path(), &file).unwrap(), "tuned");
        let error = read_from("ESPALIER_CUDA", &folder.path().join("missing"), &file).unwrap_err();
        assert!(error.to_string().starts_with("ESPALIER_CUDA: ") && error.exit_code() == 2, "{error}");
    }
}
