//! The CPU as a device: aligned host memory, a thread pool of its own, kernels that are Rust functions.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::capture::{Recorder, Recording};
use super::pool::{Held, Loan, Pool, Stats};
use super::{Binding, Buffer, Class, Device, Features, Graph, Info, Kind, Limits};
use crate::cpu::Args;
use crate::dtype::DType;
use crate::error::{Error, Result, Uncapturable};
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
    recorder: Recorder<Self>,
}

/// Captured work.
struct Captured {
    recording: Recording<CpuDevice>,
    _memory: Held<Memory>,
}

/// An argument whose range was proved.
#[derive(Clone, Copy)]
struct Span {
    base: *mut u8,
    bytes: usize,
}

// SAFETY: points into a `Memory` that outlives it: an argument of the call at hand, or kept by the recording that holds it.
unsafe impl Send for Span {}
// SAFETY: as above; only kernels that run in order access what it points to.
unsafe impl Sync for Span {}

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
        let (pool, threads) = (Arc::new(Pool::new()), pool);
        Ok(Self { info, pool, threads, launches: AtomicU64::new(0), recorder: Recorder::new() })
    }

    /// Start of `bytes` bytes at `offset` of a buffer, bounds checked.
    fn at(&self, buffer: &Buffer, offset: usize, bytes: usize) -> Result<*mut u8> {
        let memory: &Loan<Memory> = buffer.leaf(&self.info)?;
        memory.check(offset, bytes)?;
        // SAFETY: the range lies within the allocation, checked above.
        Ok(unsafe { memory.base.as_ptr().add(offset) })
    }

    /// Runs `work`, or takes it down where a capture is under way. Memory lent in the capture is the pool's to keep.
    fn queue<'b>(
        &self,
        buffers: impl Iterator<Item = &'b Buffer>,
        work: impl Fn(&Self) -> Result<()> + Send + Sync + 'static,
    ) -> Result<()> {
        let lent_before = |b: &&Buffer| b.leaf(&self.info).is_ok_and(|memory: &Loan<Memory>| !memory.captured());
        self.recorder.record(buffers.filter(lent_before), work).map_or(Ok(()), |work| work(self))
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
        let _turn = self.recorder.turn();
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
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Upload)?;
        let base = self.at(target, offset, data.len())?;
        // SAFETY: `at` proved the range; `data` is host memory that cannot overlap device memory handed out as Buffer.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), base, data.len()) };
        Ok(())
    }

    fn download(&self, source: &Buffer, offset: usize, data: &mut [u8]) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Download)?;
        let base = self.at(source, offset, data.len())?;
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(base, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    fn copy(&self, source: &Buffer, from: usize, target: &Buffer, to: usize, bytes: usize) -> Result<()> {
        let _turn = self.recorder.turn();
        let spans = [self.at(source, from, bytes)?, self.at(target, to, bytes)?].map(|base| Span { base, bytes });
        self.queue([source, target].into_iter(), move |_| {
            let [source, target] = spans;
            // SAFETY: both ranges proved; `copy` allows overlap.
            unsafe { std::ptr::copy(source.base, target.base, target.bytes) };
            Ok(())
        })
    }

    fn launch(&self, kernel: &Kernel, element: DType, launch: &Launch, arguments: &[Binding]) -> Result<()> {
        let _turn = self.recorder.turn();
        let Code::Cpu(run) = kernel.code else {
            return Err(Error::NotAvailable {
                device: "cpu".into(),
                reason: format!("{} is no CPU kernel", kernel.name),
            });
        };
        let span = |b: &Binding| self.at(b.buffer, b.offset, b.bytes).map(|base| Span { base, bytes: b.bytes });
        let spans: Vec<Span> = arguments.iter().map(span).collect::<Result<_>>()?;
        let params = launch.params;
        self.launches.fetch_add(1, Relaxed);
        self.queue(arguments.iter().map(|b| b.buffer), move |device| {
            let mut args = Args::new(params.words(), element, &device.threads);
            for span in &spans {
                // SAFETY: the range is inside a live buffer (borrowed by `arguments` for the whole call, or kept with what
                // was captured), 4-aligned by `Tensor`, initialized, and `dispatch` lets no written argument overlap
                // another one.
                unsafe { args.push(span.base, span.bytes) };
            }
            run(&args)
        })
    }

    fn sync(&self) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Wait)
    }

    fn capture(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let _alone = self.recorder.begin(&self.info)?;
        let lending = self.pool.begin_capture();
        let done = work();
        let (memory, outliving) = lending.end();
        let ((), recording) = self.recorder.end(&self.info, done, outliving)?;
        Ok(Graph::new(Captured { recording, _memory: memory }))
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        let _alone = self.recorder.turn_alone();
        self.recorder.refuse(&self.info, Uncapturable::Nested)?;
        graph.leaf::<Captured>(&self.info)?.recording.replay(self)
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
