//! The CPU as a device: aligned host memory, a thread pool of its own, kernels that are Rust functions.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::pool::{Loan, Pool, Stats};
use super::{Binding, Buffer, Class, Device, Features, Info, Kind, Limits};
use crate::cpu::Args;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Code, Kernel, Launch};

/// Cache-line and AVX-512 alignment with room for page-friendly tiles.
const ALIGNMENT: usize = 256;

struct Memory {
    base: NonNull<u8>,
    layout: std::alloc::Layout,
}

// SAFETY: plain owned memory; all access goes through `CpuDevice`, whose callers order their work (trait `Device`).
unsafe impl Send for Memory {}
// SAFETY: as above; shared handles only read the pointer value.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> Option<Self> {
        let layout = std::alloc::Layout::from_size_align(bytes, ALIGNMENT).ok()?;
        // SAFETY: the layout has a size above zero (size classes start at 256). Zeroed, so that it is initialized.
        let base = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some(Self { base, layout })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { std::alloc::dealloc(self.base.as_ptr(), self.layout) }
    }
}

pub struct CpuDevice {
    info: Info,
    pool: Arc<Pool<Memory>>,
    threads: rayon::ThreadPool,
    launches: AtomicU64,
}

impl CpuDevice {
    /// `threads`: `None` takes every core.
    pub fn new(threads: Option<usize>) -> Result<Self> {
        let unavailable = |reason: String| Error::NotAvailable { device: "cpu".into(), reason };
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.unwrap_or(0))
            .thread_name(|i| format!("espalier-cpu-{i}"))
            .build()
            .map_err(|e| unavailable(e.to_string()))?;
        let count = pool.current_num_threads();
        let info = Info {
            kind: Kind::Cpu,
            id: "cpu".into(),
            name: format!("{} ({count} threads, {})", cpu_name(), crate::cpu::level()),
            driver: format!("espalier {}", env!("CARGO_PKG_VERSION")),
            class: Class::Cpu,
            threads: count,
            software: false,
            limits: Limits::unbounded(),
            features: Features { f16: true, i16: true, ..Features::default() },
            probes: Vec::new(),
        };
        Ok(Self { info, pool: Arc::new(Pool::new()), threads: pool, launches: AtomicU64::new(0) })
    }

    /// Start of `bytes` bytes at `offset` of a buffer, bounds checked.
    fn at(&self, buffer: &Buffer, offset: usize, bytes: usize) -> Result<*mut u8> {
        let memory: &Loan<Memory> = buffer.leaf(&self.info)?;
        memory.check(offset, bytes)?;
        // SAFETY: the range lies within the allocation, checked above.
        Ok(unsafe { memory.base.as_ptr().add(offset) })
    }
}

/// Model name as the operating system tells it.
fn cpu_name() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = text.lines().find_map(|l| l.strip_prefix("model name")).and_then(|l| l.split_once(':'));
    model.map_or_else(|| std::env::consts::ARCH.to_string(), |(_, name)| name.trim().to_string())
}

impl Device for CpuDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let memory = self.pool.lend("cpu", bytes, |class| {
            Memory::new(class).ok_or(Error::OutOfMemory {
                device: "cpu".into(),
                requested: class as u64,
                live: self.pool.stats(0).bytes_live,
                cap: u64::MAX,
            })
        })?;
        Ok(Buffer::new(Arc::new(memory), bytes))
    }

    fn upload(&self, target: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        let base = self.at(target, offset, data.len())?;
        // SAFETY: `at` proved the range; `data` is host memory that cannot overlap device memory handed out as Buffer.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), base, data.len()) };
        Ok(())
    }

    fn download(&self, source: &Buffer, offset: usize, data: &mut [u8]) -> Result<()> {
        let base = self.at(source, offset, data.len())?;
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(base, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    fn copy(&self, source: &Buffer, from: usize, target: &Buffer, to: usize, bytes: usize) -> Result<()> {
        let (source, target) = (self.at(source, from, bytes)?, self.at(target, to, bytes)?);
        // SAFETY: both ranges proved; `copy` allows overlap.
        unsafe { std::ptr::copy(source, target, bytes) };
        Ok(())
    }

    fn launch(&self, kernel: &Kernel, element: DType, launch: &Launch, arguments: &[Binding]) -> Result<()> {
        let Code::Cpu(run) = kernel.code else {
            return Err(Error::NotAvailable {
                device: "cpu".into(),
                reason: format!("{} is no CPU kernel", kernel.name),
            });
        };
        let mut args = Args::new(launch.params.words(), element, &self.threads);
        for b in arguments {
            let base = self.at(b.buffer, b.offset, b.bytes)?;
            // SAFETY: the range is inside a live buffer (borrowed by `arguments` for the whole call), 4-aligned by
            // `Tensor`, initialized, and `dispatch` lets no written argument overlap another one.
            unsafe { args.push(base, b.bytes) };
        }
        self.launches.fetch_add(1, Relaxed);
        run(&args)
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn stats(&self) -> Stats {
        self.pool.stats(self.launches.load(Relaxed))
    }

    fn reset_peak(&self) {
        self.pool.reset_peak();
    }

    fn set_memory_cap(&self, bytes: Option<u64>) {
        self.pool.set_cap(bytes);
    }
}
