//! CUDA kernels run on the CPU: the kernel files are compiled as C++ behind `tests/cuda_host/host.hpp` (one fiber per
//! thread) and checked as no GPU checks them. For numbers, not for speed.

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CStr, OsString, c_char, c_int, c_uint, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use crate::device::capture::{Recorder, Recording};
use crate::device::{Binding, Buffer, Class, Device, Features, Graph, Info, Kind, Limits, Stats, Storage, check_range};
use crate::dtype::DType;
use crate::error::{Error, Result, Uncapturable};
use crate::kernel::cuda::{assemble, declared};
use crate::kernel::{Entry, Kernel, Launch, Params, TensorMap, check_launch};

const HOST: &str = include_str!("../../../tests/cuda_host/host.hpp");
const MMA: &str = include_str!("../../../tests/cuda_host/mma.hpp");
const WGMMA: &str = include_str!("../../../tests/cuda_host/wgmma.hpp");
/// Emulated: Ampere's warp instructions, and Hopper's warp groups where they are asked for.
pub const ARCHS: [u32; 2] = [80, 90];
const PAGE: usize = 4096;
const FLAGS: [&str; 8] =
    ["-std=c++17", "-O1", "-fPIC", "-shared", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-fno-math-errno"];

/// Anonymous pages whose end lies right before a page that faults.
struct Memory {
    map: *mut u8,
    mapped: usize,
    base: *mut u8,
    bytes: usize,
}

// SAFETY: plain memory; the device's lock orders what touches it.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new(bytes: usize) -> Option<Self> {
        let inside = bytes.max(1).checked_next_multiple_of(PAGE)?;
        let mapped = inside.checked_add(PAGE)?;
        // SAFETY: a new private mapping; nothing is overwritten.
        let map = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if map == libc::MAP_FAILED {
            return None;
        }
        let map = map.cast::<u8>();
        // SAFETY: the last page of the mapping just made.
        unsafe { libc::mprotect(map.add(inside).cast(), PAGE, libc::PROT_NONE) };
        // Vectors of 16 bytes need an aligned start: up to 15 bytes stay between the end and the guard.
        let start = (inside - bytes) / 16 * 16;
        // SAFETY: start <= inside, within the mapping.
        Some(Self { map, mapped, base: unsafe { map.add(start) }, bytes })
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and no handle is left.
        unsafe { libc::munmap(self.map.cast(), self.mapped) };
    }
}

impl Storage for Memory {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: *mut u8,
    bytes: usize,
}

// SAFETY: points into a `Memory` that outlives it: an argument of the call at hand, or pinned by the recording that holds it.
unsafe impl Send for Range {}
// SAFETY: as above; launches run one at a time.
unsafe impl Sync for Range {}

// SAFETY of a call: the symbols of host.hpp and of the text that `build` writes have these types.
type Trampoline = unsafe extern "C" fn(*mut *mut c_void);
/// `espalier_launch` of host.hpp.
type LaunchFunction = unsafe extern "C" fn(
    kernel: Trampoline,
    arguments: *mut *mut c_void,
    count: c_uint,
    parameter_bytes: c_uint,
    groups: *const c_uint,
    block: c_uint,
    cluster: c_uint,
    shared: c_uint,
    order: c_uint,
    ranges: *const Range,
    range_count: c_uint,
    stacks: *mut u8,
    text: *mut c_char,
    bytes: usize,
) -> c_int;

/// One compiled kernel file.
struct Module {
    library: libloading::Library,
    /// Threads of a block and blocks of a cluster, by entry.
    shapes: HashMap<String, [u32; 2]>,
}

/// `Map` of wgmma.hpp, in the 128 bytes of a tensor map.
#[repr(C, align(64))]
#[derive(Clone, Copy)]
struct Map {
    mark: u64,
    address: u64,
    strides: [u64; 2],
    dims: [u32; 3],
    tile: [u32; 3],
    element_bytes: u32,
    rest: [u32; 9],
}

const _: () = assert!(std::mem::size_of::<Map>() == 128);
const MAP_MARK: u64 = u64::from_le_bytes(*b"TENSORMP");

/// A file's module once it is compiled.
type Slot = Arc<Mutex<Option<Arc<Module>>>>;
type Key = (&'static str, DType, Vec<(&'static str, u64)>);

pub struct CudaHostDevice {
    info: Info,
    compiler: OsString,
    folder: PathBuf,
    /// Launches run one at a time: fault handlers and a library's blocks are one per process.
    modules: Mutex<HashMap<Key, Slot>>,
    launches: AtomicU64,
    allocations: AtomicU64,
    /// Changes the order of threads from run to run.
    runs: AtomicU64,
    recorder: Recorder<Self>,
}

/// One launch with its arguments looked up and checked.
struct Work {
    module: Arc<Module>,
    entry: &'static str,
    threads: u32,
    /// Blocks of a cluster.
    cluster: u32,
    groups: [u32; 3],
    shared: u32,
    params: Params,
    ranges: Vec<Range>,
    maps: Vec<Map>,
}

static RUNNING: Mutex<()> = Mutex::new(());

/// Stacks of 1,024 fibers, as host.hpp wants them: 128 KiB each, the first page untouchable. Made once for the process.
fn stacks() -> Result<*mut u8> {
    const COUNT: usize = 1024;
    const BYTES: usize = 128 << 10;
    static STACKS: std::sync::OnceLock<Option<Memory>> = std::sync::OnceLock::new();
    let memory = STACKS.get_or_init(|| {
        let memory = Memory::new(COUNT * BYTES)?;
        for index in 0..COUNT {
            // SAFETY: a page of the mapping just made, which nothing uses yet.
            unsafe { libc::mprotect(memory.base.add(index * BYTES).cast(), PAGE, libc::PROT_NONE) };
        }
        Some(memory)
    });
    memory.as_ref().map(|m| m.base).ok_or_else(|| unavailable("no memory for the stacks of 1,024 threads".into()))
}

fn unavailable(reason: String) -> Error {
    Error::NotAvailable { device: "cuda-host".into(), reason }
}

/// `CXX`, else g++, clang++ or c++, with the first line of its version.
fn compiler() -> Result<(OsString, String)> {
    let named = std::env::var_os("CXX");
    let names = named.map_or_else(|| ["g++", "clang++", "c++"].map(OsString::from).to_vec(), |name| vec![name]);
    for name in names {
        if let Ok(output) = Command::new(&name).arg("--version").output() {
            let version = String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("").to_string();
            return Ok((name, version));
        }
    }
    Err(unavailable("a C++ compiler is needed (g++ or clang++, or set CXX)".into()))
}

impl CudaHostDevice {
    /// A host that emulates one of [`ARCHS`].
    ///
    /// # Errors
    /// `NotAvailable` without a C++ compiler; `Usage` for another architecture.
    pub fn new(arch: u32) -> Result<Self> {
        if !ARCHS.contains(&arch) {
            let rule = "80 (the default) or 90".into();
            return Err(Error::Usage { argument: "--device cuda-host:ARCH", value: arch.to_string(), rule });
        }
        let (compiler, version) = compiler()?;
        let folder = crate::device::cache::folder("cuda-host")?;
        let info = Info {
            kind: Kind::Cuda,
            id: if arch == ARCHS[0] { "cuda-host".into() } else { format!("cuda-host:{arch}") },
            name: "CUDA kernels as C++ on the CPU, one fiber per thread".into(),
            driver: version,
            class: Class::Simt,
            threads: 1,
            software: true,
            limits: Limits {
                groups_per_dimension: 65_535,
                workgroup_bytes: 227 << 10,
                invocations: 1024,
                ..Limits::unbounded()
            },
            features: Features { f16: true, i16: true, arch, ..Features::default() },
            probes: Vec::new(),
        };
        Ok(Self {
            info,
            compiler,
            folder,
            modules: Mutex::default(),
            launches: AtomicU64::new(0),
            allocations: AtomicU64::new(0),
            runs: AtomicU64::new(0),
            recorder: Recorder::new(),
        })
    }

    fn module(&self, entry: &Entry, element: DType) -> Result<Arc<Module>> {
        let constants = entry.constants.iter().map(|(name, value)| (*name, value.to_bits())).collect();
        let key = (entry.file.name, element, constants);
        // A slot per file: threads that want another one compile beside this one.
        let slot = self.modules.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default().clone();
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = &*slot {
            return Ok(module.clone());
        }
        let module = Arc::new(self.compile(entry, element)?);
        *slot = Some(module.clone());
        Ok(module)
    }

    fn compile(&self, entry: &Entry, element: DType) -> Result<Module> {
        let source = assemble(entry.file, element, entry.constants, self.info.features.arch)?;
        let entries = declared(&source);
        let library = crate::device::cache::get(
            &self.folder,
            "so",
            &[HOST, MMA, WGMMA, &source, &self.info.driver, &FLAGS.join(" ")],
            |path| self.build(entry, element, &source, path),
        )?;
        // SAFETY: the library was built from the program's own sources; it has no initializers of its own.
        let library = unsafe { libloading::Library::new(&library) }.map_err(|e| self.refused("load", e.to_string()))?;
        Ok(Module { library, shapes: entries.into_iter().map(|e| (e.name, [e.threads, e.cluster])).collect() })
    }

    /// Compiles to `target`. In one anonymous namespace shared variables of templates stay in the poisoned section.
    fn build(&self, entry: &Entry, element: DType, source: &str, target: &Path) -> Result<()> {
        let mut text = String::new();
        let (defines, body) = source.split_at(source.find("#line").unwrap_or(0));
        text += defines;
        text += "#include \"host.hpp\"\nnamespace {\n";
        text += body;
        text += "\n}\n";
        for e in declared(source) {
            text += &format!("extern \"C\" void kernel_{0}(void** from) {{ host::invoke({0}, from); }}\n", e.name);
        }
        let work = tempfile::tempdir_in(&self.folder).map_err(|e| Error::io(&self.folder, e))?;
        for (name, text) in [("host.hpp", HOST), ("mma.hpp", MMA), ("wgmma.hpp", WGMMA), ("kernel.cpp", &text)] {
            let path = work.path().join(name);
            std::fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
        }
        let output = Command::new(&self.compiler)
            .current_dir(work.path())
            .args(FLAGS)
            .args(["kernel.cpp", "-o"])
            .arg(target)
            .output()
            .map_err(|e| self.refused("start the compiler", e.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        let log = String::from_utf8_lossy(&output.stderr);
        let first = log.lines().find(|l| l.contains("error")).unwrap_or("");
        let (file, line) = place(first).unwrap_or((entry.file.name.to_string(), 0));
        let log = log.lines().take(20).collect::<Vec<_>>().join("\n");
        Err(Error::Compile { kernel: format!("{} for {element}", entry.entry), file, line, log })
    }

    fn refused(&self, operation: &'static str, log: String) -> Error {
        Error::Driver { device: self.info.id.clone(), operation, log }
    }

    fn range(&self, buffer: &Buffer, offset: usize, bytes: usize) -> Result<*mut u8> {
        let memory: &Memory = buffer.leaf(&self.info)?;
        check_range(offset, bytes, memory.bytes)?;
        // SAFETY: offset <= bytes, within the mapping.
        Ok(unsafe { memory.base.add(offset) })
    }

    /// Runs `work`, or takes it down where a capture is under way: then its buffers stay as long as the graph.
    fn queue<'b>(
        &self,
        buffers: impl Iterator<Item = &'b Buffer>,
        work: impl Fn(&Self) -> Result<()> + Send + Sync + 'static,
    ) -> Result<()> {
        self.recorder.record(buffers, work).map_or(Ok(()), |work| work(self))
    }

    fn run(&self, work: &Work) -> Result<()> {
        let mut parameters = [0u32; Params::MAX];
        let words = work.params.words();
        parameters[..words.len()].copy_from_slice(words);
        let mut pointers: Vec<*mut u8> = work.ranges.iter().map(|range| range.start).collect();
        let mut maps = work.maps.clone();
        let mut values: Vec<*mut c_void> = pointers.iter_mut().map(|p| std::ptr::from_mut(p).cast()).collect();
        values.extend(maps.iter_mut().map(|m| std::ptr::from_mut(m).cast::<c_void>()));
        values.push(parameters.as_mut_ptr().cast());
        let order = self.runs.fetch_add(1, Relaxed) as u32;
        let mut text = [0 as c_char; 512];
        let stacks = stacks()?;
        let library = &work.module.library;
        let missing = |e: libloading::Error| self.refused("find the launcher", e.to_string());
        let _one = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the symbols have these types in host.hpp and in the trampolines that `build` writes; the pointers live
        // through the call, which touches only the ranges checked before or ends at a guard page.
        let failed = unsafe {
            let run: libloading::Symbol<LaunchFunction> = library.get(b"espalier_launch").map_err(missing)?;
            let symbol = format!("kernel_{}", work.entry);
            let start: libloading::Symbol<Trampoline> = library.get(symbol.as_bytes()).map_err(missing)?;
            run(
                *start,
                values.as_mut_ptr(),
                values.len() as c_uint,
                (words.len() * 4) as c_uint,
                work.groups.as_ptr(),
                work.threads,
                work.cluster,
                work.shared,
                order,
                work.ranges.as_ptr(),
                work.ranges.len() as c_uint,
                stacks,
                text.as_mut_ptr(),
                text.len(),
            )
        };
        if failed == 0 {
            return Ok(());
        }
        // SAFETY: snprintf ended the text within its 512 bytes.
        let reason = unsafe { CStr::from_ptr(text.as_ptr()) }.to_string_lossy().into_owned();
        Err(self.refused("launch", format!("{}: {reason}", work.entry)))
    }
}

/// A tensor map as wgmma.hpp reads it.
fn map(kernel: &Kernel, map: &TensorMap, argument: &Range) -> Result<Map> {
    let address = argument.start as u64;
    map.check(kernel.name, address, argument.bytes)?;
    Ok(Map {
        mark: MAP_MARK,
        address,
        strides: map.byte_strides(),
        dims: map.dims.map(|d| d as u32),
        tile: map.tile(),
        element_bytes: map.element.size() as u32,
        rest: [0; 9],
    })
}

/// "cuda/softmax.cu:12:5: error: ..." as file and line.
fn place(message: &str) -> Option<(String, u32)> {
    let mut parts = message.split(':');
    Some((parts.next()?.to_string(), parts.next()?.parse().ok()?))
}

impl Device for CudaHostDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let memory = Memory::new(bytes.next_multiple_of(4)).ok_or_else(|| Error::OutOfMemory {
            device: self.info.id.clone(),
            requested: bytes as u64,
            live: 0,
            cap: u64::MAX,
        })?;
        self.allocations.fetch_add(1, Relaxed);
        Ok(Buffer::new(Arc::new(memory), bytes))
    }

    fn upload(&self, target: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Upload)?;
        let base = self.range(target, offset, data.len())?;
        // SAFETY: `range` proved the range; host slices never overlap device memory.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), base, data.len()) };
        Ok(())
    }

    fn download(&self, source: &Buffer, offset: usize, data: &mut [u8]) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Download)?;
        let base = self.range(source, offset, data.len())?;
        // SAFETY: as in `upload`.
        unsafe { std::ptr::copy_nonoverlapping(base, data.as_mut_ptr(), data.len()) };
        Ok(())
    }

    fn copy(&self, source: &Buffer, from: usize, target: &Buffer, to: usize, bytes: usize) -> Result<()> {
        let _turn = self.recorder.turn();
        let ranges =
            [self.range(source, from, bytes)?, self.range(target, to, bytes)?].map(|start| Range { start, bytes });
        self.queue([source, target].into_iter(), move |_| {
            let [source, target] = ranges;
            // SAFETY: both ranges proved; `copy` allows overlap.
            unsafe { std::ptr::copy(source.start, target.start, target.bytes) };
            Ok(())
        })
    }

    fn launch(&self, kernel: &Kernel, element: DType, launch: &Launch, arguments: &[Binding]) -> Result<()> {
        let _turn = self.recorder.turn();
        let Some(code) = kernel.cuda() else {
            return Err(unavailable(format!("{} is no CUDA kernel", kernel.name)));
        };
        check_launch(kernel, launch, &self.info)?;
        let module = self.module(&code, element)?;
        let entry = launch.entry.unwrap_or(code.entry);
        let missing = || self.refused("find an entry", format!("cuda/{} has no entry {entry}", code.file.name));
        let &[threads, cluster] = module.shapes.get(entry).ok_or_else(missing)?;
        let range = |b: &Binding| self.range(b.buffer, b.offset, b.bytes).map(|start| Range { start, bytes: b.bytes });
        let ranges = arguments.iter().map(range).collect::<Result<Vec<_>>>()?;
        let slot = |m: &TensorMap| self.refused("read a tensor map", format!("{entry} has no slot {}", m.slot));
        let encoded = |m| map(kernel, m, ranges.get(m.slot).ok_or_else(|| slot(m))?);
        let maps = launch.maps.iter().map(encoded).collect::<Result<Vec<_>>>()?;
        let (groups, shared, params) = (launch.groups, launch.shared, launch.params);
        let work = Work { module, entry, threads, cluster, groups, shared, params, ranges, maps };
        self.launches.fetch_add(1, Relaxed);
        self.queue(arguments.iter().map(|b| b.buffer), move |device| device.run(&work))
    }

    fn sync(&self) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Wait)
    }

    fn capture(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        let _alone = self.recorder.begin(&self.info)?;
        let done = work();
        self.recorder.end(&self.info, done, 0).map(|((), recording)| Graph::new(recording))
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        let _alone = self.recorder.turn_alone();
        self.recorder.refuse(&self.info, Uncapturable::Nested)?;
        graph.leaf::<Recording<Self>>(&self.info)?.replay(self)
    }

    fn stats(&self) -> Stats {
        let (allocations, launches) = (self.allocations.load(Relaxed), self.launches.load(Relaxed));
        Stats { allocations, launches, ..Stats::default() }
    }

    fn set_memory_cap(&self, _: Option<u64>) {}
}
