//! Devices know kernels, not ops: they allocate, copy, launch and time.

mod cache;
mod capture;
mod cpu;
pub mod cuda;
mod null;
mod pool;
mod reference;
pub mod road;
pub mod turns;
mod wgpu;

use std::any::Any;
use std::sync::Arc;

use crate::dtype::DType;
use crate::error::{Error, Result, Uncapturable};
use crate::kernel::{Kernel, Launch};

pub(crate) use cache::place as cache_place;
pub use capture::Graph;
pub use cpu::CpuDevice;
#[cfg(unix)]
pub use cuda::CudaHostDevice;
pub use cuda::{CudaDevice, CudaDriver, cuda_driver};
pub use null::NullDevice;
pub use pool::Stats;
pub use reference::ReferenceDevice;
pub use wgpu::{Adapter, WgpuDevice, adapters, quiet_loader, shader};

/// Kinds of device; kernels are written for `Cpu`, `Wgpu` and `Cuda`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Cpu,
    Wgpu,
    Cuda,
    /// Runs every op's f64 reference; storage is f64. The oracle as a device.
    Reference,
    /// Takes every launch, runs none: for geometry tests.
    Null,
}

impl Kind {
    pub const fn name(self) -> &'static str {
        match self {
            Kind::Cpu => "cpu",
            Kind::Wgpu => "wgpu",
            Kind::Cuda => "cuda",
            Kind::Reference => "reference",
            Kind::Null => "null",
        }
    }
}

/// How WGSL kernels should be shaped for an adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Class {
    /// A software rasterizer: one row per invocation, register tiles, no barriers.
    Cpu,
    /// A GPU without usable matrix units: workgroup tiles.
    Simt,
    /// A GPU with cooperative matrices: fragments on matrix units.
    Coop,
}

impl Class {
    pub const fn name(self) -> &'static str {
        match self {
            Class::Cpu => "cpu",
            Class::Simt => "simt",
            Class::Coop => "coop",
        }
    }

    /// In words.
    pub const fn meaning(self) -> &'static str {
        match self {
            Class::Cpu => "software rasterizer: register tiles, no barriers",
            Class::Simt => "GPU: workgroup tiles",
            Class::Coop => "GPU with cooperative matrices",
        }
    }
}

#[derive(Clone, Debug)]
pub struct Limits {
    pub binding_bytes: u64,
    pub buffer_bytes: u64,
    pub workgroup_bytes: u32,
    pub invocations: u32,
    pub groups_per_dimension: u32,
    pub storage_buffers: u32,
    /// Iterations after which the driver silently leaves a loop (software Vulkan: 65,535); `None` when not cut.
    pub loop_budget: Option<u64>,
}

impl Limits {
    /// No limits: CPU devices.
    pub const fn unbounded() -> Self {
        Self {
            binding_bytes: u64::MAX,
            buffer_bytes: u64::MAX,
            workgroup_bytes: u32::MAX,
            invocations: u32::MAX,
            groups_per_dimension: u32::MAX,
            storage_buffers: u32::MAX,
            loop_budget: None,
        }
    }

    /// WebGPU's defaults: what a plan must be able to live with.
    pub const fn webgpu() -> Self {
        Self {
            binding_bytes: 128 << 20,
            buffer_bytes: 256 << 20,
            workgroup_bytes: 16 << 10,
            invocations: 256,
            groups_per_dimension: 65_535,
            storage_buffers: 8,
            loop_budget: Some(60_000),
        }
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Features {
    pub f16: bool,
    /// 16-bit integers in storage: how WGSL stores bf16.
    pub i16: bool,
    /// 64-bit integers in WGSL: how software drivers load and store two f32 at once.
    pub i64: bool,
    pub subgroups: bool,
    /// Invocations of a subgroup, where all have as many; else 0.
    pub subgroup_size: u32,
    /// The most that one may have, as the driver says: Metal says 64 always, wgpu 128 where a driver says nothing.
    pub largest_subgroup: u32,
    pub timestamps: bool,
    /// Rows and columns of the matrices of f16 that a subgroup multiplies into f32 on matrix units: 16 or 8, or 0 without.
    pub cooperative_matrix: u32,
    /// Compute capability times 10 of a CUDA device: 90 is 9.0.
    pub arch: u32,
}

/// One start-up observation of a driver's behaviour.
#[derive(Clone, Debug)]
pub struct Probe {
    pub trap: &'static str,
    pub expected: String,
    pub measured: String,
    pub sound: bool,
}

#[derive(Clone, Debug)]
pub struct Info {
    pub kind: Kind,
    /// How the command line names it: "cpu", "wgpu:0".
    pub id: String,
    pub name: String,
    pub driver: String,
    pub class: Class,
    /// Threads that a CPU device computes with; 1 elsewhere.
    pub threads: usize,
    /// A software adapter is used only when named and never ranked with hardware.
    pub software: bool,
    pub limits: Limits,
    pub features: Features,
    pub probes: Vec<Probe>,
}

/// Threads of a CPU device at most: more than any machine has only costs memory and time.
pub const MAX_THREADS: usize = 1024;

impl Info {
    /// What results depend on. Two devices of the same arithmetic give the same bits; the number of threads is no part of
    /// it, so a run may go on with another.
    pub fn arithmetic(&self) -> String {
        let tuned = crate::tuned::mark(self);
        match self.kind {
            Kind::Cpu => format!("cpu ({}{tuned})", crate::cpu::level()),
            kind => format!("{} ({}{tuned})", kind.name(), self.name),
        }
    }

    /// Whether kernels of this element type can run here at all.
    pub fn stores(&self, dtype: DType) -> bool {
        match dtype {
            DType::F16 => self.kind != Kind::Wgpu || self.features.f16,
            DType::Bf16 => self.kind != Kind::Wgpu || self.features.i16,
            _ => true,
        }
    }
}

/// A device's memory; dropping the last handle gives it back to the device's pool.
pub trait Storage: Any + Send + Sync {
    fn as_any(&self) -> &dyn Any;
}

#[derive(Clone)]
pub struct Buffer {
    storage: Arc<dyn Storage>,
    bytes: usize,
}

impl Buffer {
    pub fn new(storage: Arc<dyn Storage>, bytes: usize) -> Self {
        Self { storage, bytes }
    }

    /// Usable bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Two handles of the same memory.
    pub fn same(&self, other: &Buffer) -> bool {
        Arc::ptr_eq(&self.storage, &other.storage)
    }

    /// Whether nobody else holds this memory.
    pub fn unique(&self) -> bool {
        Arc::strong_count(&self.storage) == 1
    }

    /// The leaf's own storage type; another device's buffer is a typed error.
    fn leaf<T: Storage>(&self, info: &Info) -> Result<&T> {
        self.storage.as_any().downcast_ref().ok_or_else(|| Error::WrongDevice {
            op: "buffer",
            input: 0,
            expected: info.id.clone(),
            got: "memory of another device".into(),
        })
    }
}

/// Refuses a range that leaves `capacity` bytes of memory.
fn check_range(offset: usize, bytes: usize, capacity: usize) -> Result<()> {
    let end = offset.saturating_add(bytes);
    if end <= capacity {
        return Ok(());
    }
    let (kernel, what) = ("memory access".into(), "end of the range");
    Err(Error::Launch { kernel, what, got: end as u64, limit: capacity as u64 })
}

/// A part of a buffer as a kernel argument.
#[derive(Clone, Copy)]
pub struct Binding<'a> {
    pub buffer: &'a Buffer,
    pub offset: usize,
    pub bytes: usize,
    /// Whether the op writes it.
    pub write: bool,
}

/// What every leaf offers. Work is ordered: a later call sees what earlier ones wrote.
pub trait Device: Send + Sync {
    fn info(&self) -> &Info;

    /// Memory with unspecified contents, at least `bytes` long, aligned to 256 bytes.
    fn alloc(&self, bytes: usize) -> Result<Buffer>;

    fn upload(&self, target: &Buffer, offset: usize, data: &[u8]) -> Result<()>;

    fn download(&self, source: &Buffer, offset: usize, data: &mut [u8]) -> Result<()>;

    /// Copies between two buffers of this device; offsets and length are multiples of 4.
    fn copy(&self, source: &Buffer, from: usize, target: &Buffer, to: usize, bytes: usize) -> Result<()>;

    /// Queues one launch of `kernel` for one element type.
    fn launch(&self, kernel: &Kernel, element: DType, launch: &Launch, arguments: &[Binding]) -> Result<()>;

    /// Waits until everything queued has run, and reports what went wrong with it.
    fn sync(&self) -> Result<()>;

    /// Takes down what `work` queues instead of running it. The graph replays it with the same memory as often as wanted, in
    /// order with everything else that is queued; that memory stays as it is while the graph lives. Calls of
    /// other threads wait until it is done, so `work` must not wait for them.
    ///
    /// # Errors
    /// `Error::Capture` where `work` cannot be captured. None of it has run then.
    fn capture(&self, _work: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        Err(capture::refusal(self.info(), Uncapturable::Device))
    }

    /// Queues captured work of this device.
    fn replay(&self, _graph: &Graph) -> Result<()> {
        Err(capture::refusal(self.info(), Uncapturable::Device))
    }

    /// Seconds of device time that the launches of `work` take; wall time where a device has no timer of its own.
    fn elapsed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.sync()?;
        let start = std::time::Instant::now();
        work()?;
        self.sync()?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// One end of a road to another device; `ticket` is the same at both ends. May wait until the other end has come.
    ///
    /// # Errors
    /// `NotAvailable` where a device has no roads.
    fn road(&self, _ticket: &road::Ticket, _end: road::End) -> Result<Box<dyn road::Road>> {
        let reason = "its tensors go through the host: only CUDA devices have NCCL".into();
        Err(Error::NotAvailable { device: self.info().id.clone(), reason })
    }

    fn stats(&self) -> Stats;

    /// Starts the high-water mark of live bytes anew.
    fn reset_peak(&self) {}

    /// Caps live bytes; `None` lifts the cap. Allocations above it fail with `Error::OutOfMemory`.
    fn set_memory_cap(&self, bytes: Option<u64>);
}

/// How devices are named on the command line.
pub const NAMES: &str = "auto, cpu, cpu:THREADS, wgpu, wgpu:INDEX, wgpu:NAME, cuda, cuda:ORDINAL, cuda-host or cuda-host:90 \
                         (CUDA kernels as C++ on the CPU), reference (f64)";

/// Opens a device by its command-line name, one of [`NAMES`]. `auto` takes CUDA, else a hardware adapter, else the CPU; a
/// software adapter is used only when named.
pub fn open(name: &str) -> Result<Arc<dyn Device>> {
    let (kind, rest) = name.split_once(':').map_or((name, None), |(k, r)| (k, Some(r)));
    let unknown = |rule: &str| Error::Usage { argument: "--device", value: name.to_string(), rule: rule.to_string() };
    match kind {
        "auto" => match CudaDevice::new(0) {
            Ok(device) => Ok(Arc::new(device)),
            Err(_) => match WgpuDevice::open_hardware() {
                Ok(device) => Ok(Arc::new(device)),
                Err(_) => Ok(Arc::new(CpuDevice::new(None)?)),
            },
        },
        "cpu" => {
            let threads = match rest {
                None => None,
                Some(n) => {
                    let count = n.parse().ok().filter(|n| (1..=MAX_THREADS).contains(n));
                    Some(count.ok_or_else(|| unknown("cpu:THREADS, a count from 1 to 1024"))?)
                }
            };
            Ok(Arc::new(CpuDevice::new(threads)?))
        }
        "wgpu" => Ok(Arc::new(WgpuDevice::open(rest)?)),
        "reference" => Ok(Arc::new(ReferenceDevice::new())),
        #[cfg(unix)]
        "cuda-host" => {
            let arch = rest.map_or(Ok(80), str::parse).map_err(|_| unknown("cuda-host:80 or cuda-host:90"))?;
            Ok(Arc::new(CudaHostDevice::new(arch)?))
        }
        "cuda" => {
            let ordinal = rest.map_or(Ok(0), str::parse).map_err(|_| unknown("cuda:ORDINAL, a count from 0"))?;
            Ok(Arc::new(CudaDevice::new(ordinal)?))
        }
        _ => Err(unknown(NAMES)),
    }
}
