//! An NVIDIA GPU: one context, one stream, pooled stream-ordered memory, kernels compiled by NVRTC for this GPU.

use std::collections::HashMap;
use std::ffi::{CString, c_uint, c_void};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use cudarc::driver::result::{self, DriverError, stream::StreamKind};
use cudarc::driver::sys;

use super::compile::{compile, nvrtc};
use super::driver::cuda_driver;
use super::graph::Executable;
use super::nccl::NcclRoad;
use crate::device::capture::{Recorder, Recording};
use crate::device::pool::{Held, Loan, Pool, Stats};
use crate::device::road::{End, Road, Ticket};
use crate::device::{Binding, Buffer, Class, Device, Features, Graph, Info, Kind, Limits};
use crate::dtype::DType;
use crate::error::{Error, Result, Uncapturable};
use crate::kernel::cuda::{assemble, declared};
use crate::kernel::{Entry, Kernel, Launch, Params, TensorMap, check_launch};

/// Static shared memory that every kernel may have; more is asked for.
const SHARED_WITHOUT_ASKING: u32 = 48 << 10;

/// The driver's handles. They are plain identifiers, usable from any thread that makes the context current.
pub(super) struct Gpu {
    id: String,
    device: sys::CUdevice,
    context: sys::CUcontext,
    pub(super) stream: sys::CUstream,
    /// Why the context cannot be used any more.
    lost: OnceLock<String>,
}

// SAFETY: the driver's handles may be used from any thread; every use makes the context current first.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks its own state.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Makes the context current on this thread; what every call into the driver starts with.
    pub(super) fn enter(&self) -> Result<()> {
        if let Some(reason) = self.lost.get() {
            return Err(Error::DeviceLost { device: self.id.clone(), reason: reason.clone() });
        }
        // SAFETY: the context is retained as long as this value lives.
        unsafe { result::ctx::set_current(self.context) }.map_err(|e| self.failure("make the context current", 0, e))
    }

    /// A driver error as one of ours. After some the context is dead, and every later call says so.
    pub(super) fn failure(&self, operation: &'static str, requested: usize, error: DriverError) -> Error {
        use sys::cudaError_enum as E;
        let name = error.error_name().map_or_else(|_| format!("{:?}", error.0), |n| n.to_string_lossy().into_owned());
        let dead = match error.0 {
            E::CUDA_ERROR_ILLEGAL_ADDRESS => "a kernel accessed memory that is not its own",
            E::CUDA_ERROR_MISALIGNED_ADDRESS => "a kernel accessed a misaligned address",
            E::CUDA_ERROR_ILLEGAL_INSTRUCTION => "a kernel ran an illegal instruction",
            E::CUDA_ERROR_LAUNCH_FAILED => "a kernel failed",
            E::CUDA_ERROR_LAUNCH_TIMEOUT => "a kernel ran longer than the driver allows",
            E::CUDA_ERROR_HARDWARE_STACK_ERROR | E::CUDA_ERROR_ECC_UNCORRECTABLE => "the hardware reported an error",
            E::CUDA_ERROR_OUT_OF_MEMORY => {
                return Error::OutOfMemory {
                    device: self.id.clone(),
                    requested: requested as u64,
                    live: 0,
                    cap: u64::MAX,
                };
            }
            // What a capture does not allow, such as code that is loaded for the first time.
            E::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
            | E::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
            | E::CUDA_ERROR_STREAM_CAPTURE_IMPLICIT => {
                return Error::Capture { device: self.id.clone(), reason: Uncapturable::Driver(error.0 as u32) };
            }
            _ => return Error::Driver { device: self.id.clone(), operation, log: name },
        };
        let reason = self.lost.get_or_init(|| format!("{dead} ({name}); the context is dead, start the program again"));
        Error::DeviceLost { device: self.id.clone(), reason: reason.clone() }
    }

    fn sync(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: the stream lives as long as this value.
        unsafe { result::stream::synchronize(self.stream) }.map_err(|e| self.failure("wait", 0, e))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        // SAFETY: nothing uses the stream or the context any more. Errors of a dead context have nowhere to go.
        unsafe {
            let _ = result::ctx::set_current(self.context);
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// Device memory; it goes back to the driver in the stream's order.
struct Memory {
    address: sys::CUdeviceptr,
    gpu: Arc<Gpu>,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            // SAFETY: allocated on this stream and not used after it. A failure leaves memory to the context's end.
            let _ = unsafe { result::free_async(self.address, self.gpu.stream) };
        }
    }
}

#[derive(Clone, Copy)]
struct Function {
    handle: sys::CUfunction,
    threads: u32,
}

/// One kernel file for one element type. Modules stay loaded as long as the context.
struct Module {
    handle: sys::CUmodule,
    threads: HashMap<String, u32>,
    functions: HashMap<String, Function>,
}

// SAFETY: handles, as in `Gpu`; a lock orders their use.
unsafe impl Send for Module {}

type Key = (&'static str, DType, Vec<(&'static str, u64)>);

pub struct CudaDevice {
    info: Info,
    gpu: Arc<Gpu>,
    pool: Arc<Pool<Memory>>,
    modules: Mutex<HashMap<Key, Module>>,
    launches: AtomicU64,
    recorder: Recorder<Self>,
}

/// Captured work, and what it uses.
struct Captured {
    executable: Executable,
    _recording: Recording<CudaDevice>,
    _memory: Held<Memory>,
}

/// Where a part of a buffer of the device that `info` describes lies.
pub(super) fn address(info: &Info, buffer: &Buffer, offset: usize, bytes: usize) -> Result<sys::CUdeviceptr> {
    let memory: &Loan<Memory> = buffer.leaf(info)?;
    memory.check(offset, bytes)?;
    Ok(memory.address + offset as u64)
}

impl CudaDevice {
    /// Opens the GPU with this ordinal.
    ///
    /// # Errors
    /// `NotAvailable` with the reason: no driver, no such GPU, no NVRTC, a driver older than NVRTC's code.
    pub fn new(ordinal: u32) -> Result<Self> {
        let id = format!("cuda:{ordinal}");
        let unavailable = |reason: String| Error::NotAvailable { device: id.clone(), reason };
        let driver = match cuda_driver() {
            None => return Err(unavailable("no NVIDIA driver (libcuda) is installed".into())),
            Some(Err(reason)) => return Err(unavailable(reason)),
            Some(Ok(driver)) => driver,
        };
        let count = driver.devices.len();
        let name = driver.devices.get(ordinal as usize).cloned();
        let name = name.ok_or_else(|| unavailable(format!("the driver sees {count} GPUs")))?;
        let (major, minor) = nvrtc()?;
        let needed = major * 1000;
        if driver.version < needed {
            let have = format!("{}.{}", driver.version / 1000, driver.version % 1000 / 10);
            return Err(unavailable(format!(
                "the driver is of CUDA {have}; code of NVRTC {major}.{minor} needs {major}.0"
            )));
        }
        let opened = |error: DriverError| unavailable(error.to_string());
        let device = result::device::get(ordinal as i32).map_err(opened)?;
        use sys::CUdevice_attribute_enum as A;
        // SAFETY: a device that the driver just named.
        let attribute = |a| unsafe { result::device::get_attribute(device, a) }.map_err(opened);
        let arch = attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? * 10
            + attribute(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if arch < crate::kernel::cuda::LOWEST_ARCH as i32 {
            return Err(unavailable(format!("compute capability {}.{} is below 7.5", arch / 10, arch % 10)));
        }
        if attribute(A::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED)? == 0 {
            return Err(unavailable("the driver has no stream-ordered memory".into()));
        }
        let shared = attribute(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        // SAFETY: as above.
        let total = unsafe { result::device::total_mem(device) }.map_err(opened)?;
        // SAFETY: released when `Gpu` is dropped.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(opened)?;
        // SAFETY: just retained.
        unsafe { result::ctx::set_current(context) }.map_err(opened)?;
        // The legacy default stream can neither be captured nor run beside another.
        let stream = result::stream::create(StreamKind::NonBlocking).map_err(opened)?;
        let info = Info {
            kind: Kind::Cuda,
            id: id.clone(),
            name,
            driver: format!("CUDA {}.{}, NVRTC {major}.{minor}", driver.version / 1000, driver.version % 1000 / 10),
            class: Class::Simt,
            threads: 1,
            software: false,
            limits: Limits {
                buffer_bytes: total as u64,
                workgroup_bytes: shared as u32,
                invocations: 1024,
                groups_per_dimension: 65_535,
                ..Limits::unbounded()
            },
            features: Features {
                f16: true,
                i16: true,
                subgroups: true,
                timestamps: true,
                arch: arch as u32,
                ..Features::default()
            },
            probes: Vec::new(),
        };
        let gpu = Arc::new(Gpu { id, device, context, stream, lost: OnceLock::new() });
        let (pool, modules) = (Arc::new(Pool::new()), Mutex::default());
        Ok(Self { info, gpu, pool, modules, launches: AtomicU64::new(0), recorder: Recorder::new() })
    }

    /// The function of an entry, compiled and loaded at its first use.
    fn function(&self, code: &Entry, entry: &str, element: DType) -> Result<Function> {
        let constants = code.constants.iter().map(|(name, value)| (*name, value.to_bits())).collect();
        let mut modules = self.modules.lock().unwrap_or_else(PoisonError::into_inner);
        let module = match modules.entry((code.file.name, element, constants)) {
            std::collections::hash_map::Entry::Occupied(found) => found.into_mut(),
            std::collections::hash_map::Entry::Vacant(place) => place.insert(self.load(code, element)?),
        };
        if let Some(&function) = module.functions.get(entry) {
            return Ok(function);
        }
        let missing = || Error::Driver {
            device: self.info.id.clone(),
            operation: "find an entry",
            log: format!("cuda/{} has no entry {entry}", code.file.name),
        };
        let name = CString::new(entry).map_err(|_| missing())?;
        // SAFETY: the module is loaded and stays so.
        let handle = unsafe { result::module::get_function(module.handle, name) }.map_err(|_| missing())?;
        let function = Function { handle, threads: *module.threads.get(entry).ok_or_else(missing)? };
        module.functions.insert(entry.to_string(), function);
        Ok(function)
    }

    fn load(&self, code: &Entry, element: DType) -> Result<Module> {
        let source = assemble(code.file, element, code.constants, self.info.features.arch)?;
        let compiled = compile(code.file.name, &source, self.info.features.arch)?;
        // SAFETY: a whole cubin, kept alive through the call, which copies it.
        let handle = unsafe { result::module::load_data(compiled.cubin.as_ptr().cast()) }
            .map_err(|e| self.gpu.failure("load a module", compiled.cubin.len(), e))?;
        let threads = declared(&source).into_iter().map(|e| (e.name, e.threads)).collect();
        Ok(Module { handle, threads, functions: HashMap::new() })
    }

    fn address(&self, buffer: &Buffer, offset: usize, bytes: usize) -> Result<sys::CUdeviceptr> {
        address(&self.info, buffer, offset, bytes)
    }

    /// Memory lent in a capture is the pool's to keep; what was there before is pinned.
    fn pin<'b>(&self, buffers: impl Iterator<Item = &'b Buffer>) {
        let lent_before = |b: &&Buffer| b.leaf(&self.info).is_ok_and(|memory: &Loan<Memory>| !memory.captured());
        self.recorder.pin(buffers.filter(lent_before));
    }

    /// A tensor map as the copy engine reads it.
    fn map(&self, kernel: &Kernel, map: &TensorMap, arguments: &[Binding]) -> Result<sys::CUtensorMap> {
        use sys::CUtensorMapDataType as T;
        let refused =
            |log: String| Error::Driver { device: self.info.id.clone(), operation: "encode a tensor map", log };
        let b = arguments.get(map.slot).ok_or_else(|| refused(format!("{} has no slot {}", kernel.name, map.slot)))?;
        let address = self.address(b.buffer, b.offset, b.bytes)?;
        map.check(kernel.name, address, b.bytes)?;
        let element = match map.element {
            DType::F32 => T::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::F16 => T::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            DType::Bf16 => T::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::U32 => T::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            DType::I8 => T::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let mut encoded = sys::CUtensorMap { opaque: [0; 16] };
        let (dims, strides, tile) = (map.dims.map(|d| d as u64), map.byte_strides(), map.tile());
        // SAFETY: three extents and box sides, two strides, three element steps, as many as the rank says; all live.
        let outcome = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut encoded,
                element,
                3,
                address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                [1u32; 3].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        outcome.result().map_err(|e| self.gpu.failure("encode a tensor map", 0, e))?;
        Ok(encoded)
    }
}

impl Device for CudaDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        let _turn = self.recorder.turn();
        self.gpu.enter()?;
        let memory = self.pool.lend(&self.info.id, bytes, |class| {
            // SAFETY: owned by the `Memory` made of it.
            let address = unsafe { result::malloc_async(self.gpu.stream, class) };
            let address = address.map_err(|e| self.gpu.failure("allocate", class, e))?;
            Ok(Memory { address, gpu: self.gpu.clone() })
        })?;
        Ok(Buffer::new(Arc::new(memory), bytes))
    }

    fn upload(&self, target: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Upload)?;
        let address = self.address(target, offset, data.len())?;
        self.gpu.enter()?;
        // SAFETY: `address` proved the range. From pageable memory the call returns once the bytes are staged.
        unsafe { result::memcpy_htod_async(address, data, self.gpu.stream) }
            .map_err(|e| self.gpu.failure("upload", data.len(), e))
    }

    fn download(&self, source: &Buffer, offset: usize, data: &mut [u8]) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Download)?;
        let address = self.address(source, offset, data.len())?;
        self.gpu.enter()?;
        let bytes = data.len();
        // SAFETY: `address` proved the range; `data` lives past the wait below.
        unsafe { result::memcpy_dtoh_async(data, address, self.gpu.stream) }
            .map_err(|e| self.gpu.failure("download", bytes, e))?;
        self.gpu.sync()
    }

    fn copy(&self, source: &Buffer, from: usize, target: &Buffer, to: usize, bytes: usize) -> Result<()> {
        let _turn = self.recorder.turn();
        self.pin([source, target].into_iter());
        let (source, target) = (self.address(source, from, bytes)?, self.address(target, to, bytes)?);
        self.gpu.enter()?;
        // SAFETY: both ranges proved.
        unsafe { result::memcpy_dtod_async(target, source, bytes, self.gpu.stream) }
            .map_err(|e| self.gpu.failure("copy", bytes, e))
    }

    fn launch(&self, kernel: &Kernel, element: DType, launch: &Launch, arguments: &[Binding]) -> Result<()> {
        let _turn = self.recorder.turn();
        let Some(code) = kernel.cuda() else {
            return Err(Error::NotAvailable {
                device: self.info.id.clone(),
                reason: format!("{} is no CUDA kernel", kernel.name),
            });
        };
        check_launch(kernel, launch, &self.info)?;
        self.gpu.enter()?;
        let function = self.function(&code, launch.entry.unwrap_or(code.entry), element)?;
        if launch.shared > SHARED_WITHOUT_ASKING {
            let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            unsafe { result::function::set_function_attribute(function.handle, attribute, launch.shared as i32) }
                .map_err(|e| self.gpu.failure("ask for shared memory", launch.shared as usize, e))?;
        }
        let mut parameters = [0u32; Params::MAX];
        let words = launch.params.words();
        parameters[..words.len()].copy_from_slice(words);
        let mut addresses =
            arguments.iter().map(|b| self.address(b.buffer, b.offset, b.bytes)).collect::<Result<Vec<_>>>()?;
        let mut maps = launch.maps.iter().map(|m| self.map(kernel, m, arguments)).collect::<Result<Vec<_>>>()?;
        let mut values: Vec<*mut c_void> = addresses.iter_mut().map(|a| std::ptr::from_mut(a).cast()).collect();
        values.extend(maps.iter_mut().map(|m| std::ptr::from_mut(m).cast::<c_void>()));
        values.push(parameters.as_mut_ptr().cast());
        let [x, y, z] = launch.groups;
        let shape: (c_uint, c_uint, c_uint) = (function.threads, 1, 1);
        self.launches.fetch_add(1, Relaxed);
        self.pin(arguments.iter().map(|b| b.buffer));
        // SAFETY: the entry takes one pointer per argument, 128 bytes per map and a block of at most 64 bytes (the host harness and
        // `kernels cuda-check` hold every kernel to that); ranges were checked, and the pool keeps memory in stream order.
        unsafe { result::launch_kernel(function.handle, (x, y, z), shape, launch.shared, self.gpu.stream, &mut values) }
            .map_err(|e| self.gpu.failure("launch", 0, e))
    }

    fn sync(&self) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Wait)?;
        self.gpu.sync()
    }

    fn capture(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<Graph> {
        self.gpu.enter()?;
        let _alone = self.recorder.begin(&self.info)?;
        let lending = self.pool.begin_capture();
        let done = Executable::of(&self.gpu, work);
        let (memory, outliving) = lending.end();
        let (executable, recording) = self.recorder.end(&self.info, done, outliving)?;
        Ok(Graph::new(Captured { executable, _recording: recording, _memory: memory }))
    }

    fn replay(&self, graph: &Graph) -> Result<()> {
        let _alone = self.recorder.turn_alone();
        self.recorder.refuse(&self.info, Uncapturable::Nested)?;
        graph.leaf::<Captured>(&self.info)?.executable.launch()
    }

    fn elapsed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.recorder.refuse(&self.info, Uncapturable::Wait)?;
        self.gpu.enter()?;
        let failed = |e| self.gpu.failure("time", 0, e);
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed);
        let (start, end) = (event()?, event()?);
        // SAFETY: two events of this context on its stream, destroyed once, after the wait for the second.
        unsafe {
            let mark = |event| {
                let _turn = self.recorder.turn();
                result::event::record(event, self.gpu.stream).map_err(failed)
            };
            mark(start)?;
            let done = work();
            self.gpu.enter()?;
            mark(end)?;
            result::event::synchronize(end).map_err(failed)?;
            let milliseconds = result::event::elapsed(start, end).map_err(failed)?;
            result::event::destroy(start).map_err(failed)?;
            result::event::destroy(end).map_err(failed)?;
            done.map(|()| f64::from(milliseconds) * 1e-3)
        }
    }

    fn road(&self, ticket: &Ticket, end: End) -> Result<Box<dyn Road>> {
        Ok(Box::new(NcclRoad::new(&self.info, &self.gpu, ticket, end)?))
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
