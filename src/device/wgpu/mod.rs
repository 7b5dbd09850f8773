//! Vulkan, Metal and DX12 through wgpu: launches are gathered into one command buffer and one compute pass, and handed
//! over when a result is read, memory in use is overwritten, or the batch is full.

mod adapter;
mod batch;
mod bounds;
mod kept;
mod memory;
mod pipeline;
mod probe;
pub mod shader;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use self::adapter::{PARAMETER_BYTES, Wanted};
use self::batch::Batches;
use self::bounds::Notes;
use self::kept::Kept;
use self::memory::{Memory, Staging};
use self::pipeline::Pipelines;
use super::pool::{Loan, Pool, Stats};
use super::{Binding, Buffer, Device, Info};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Entry, Kernel, Launch, check_launch};

pub use adapter::{Adapter, adapters, quiet_loader};

/// How long queued work may take before the device is given up.
const DEADLINE: Duration = Duration::from_secs(60);

/// What a shader does where an index is outside of its array or a loop does not end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checks {
    /// Nothing is compiled into the program's own kernels; others are clamped.
    Trust,
    /// The index is clamped, the loop is left.
    Clamp,
    /// As `Clamp`, and the launch that did it is refused with [`Error::Bounds`]; every launch is waited for.
    Report,
}

impl Checks {
    /// What `ESPALIER_SHADER_CHECKS` says. Unless it says something, kernels of the program are trusted in release builds; kernels that
    /// come from a folder are somebody's work, and are not.
    fn wanted() -> Result<Self> {
        const VARIABLE: &str = "ESPALIER_SHADER_CHECKS";
        let value = std::env::var_os(VARIABLE).filter(|value| !value.is_empty());
        match value.map(|value| value.to_string_lossy().into_owned()).as_deref() {
            None if foreign() || cfg!(debug_assertions) => Ok(Self::Clamp),
            None | Some("0") => Ok(Self::Trust),
            Some("1") => Ok(Self::Clamp),
            Some("report") => Ok(Self::Report),
            Some(value) => Err(Error::Usage { argument: VARIABLE, value: value.into(), rule: "0, 1 or report".into() }),
        }
    }
}

/// Whether kernels come from a folder of the user's.
fn foreign() -> bool {
    std::env::var_os("ESPALIER_SHADERS").is_some()
}

/// The driver's handles and what it reported.
struct Gpu {
    /// Gone before the device is.
    kept: Option<Kept>,
    device: wgpu::Device,
    queue: wgpu::Queue,
    id: String,
    checks: Checks,
    /// Where [`Checks::Report`] is on.
    notes: Option<Notes>,
    /// Why the device cannot be used any more.
    lost: Arc<OnceLock<String>>,
    /// Held by whoever polls or submits. wgpu-core 30 reads the fence before it empties its list of submissions; where
    /// another thread empties the list in between, a wait that ran into its time-out ends the process by an assertion.
    polling: Mutex<()>,
}

impl Gpu {
    fn poll(&self, request: wgpu::PollType) -> std::result::Result<wgpu::PollStatus, wgpu::PollError> {
        let _one = self.polling.lock().unwrap_or_else(PoisonError::into_inner);
        self.device.poll(request)
    }

    fn submit(&self, commands: wgpu::CommandBuffer) -> wgpu::SubmissionIndex {
        let _one = self.polling.lock().unwrap_or_else(PoisonError::into_inner);
        self.queue.submit([commands])
    }

    fn alive(&self) -> Result<()> {
        match self.lost.get() {
            None => Ok(()),
            Some(reason) => Err(Error::DeviceLost { device: self.id.clone(), reason: reason.clone() }),
        }
    }

    /// A driver error as one of ours. A lost device is checked first: after a loss everything looks like a bad call or
    /// like exhausted memory.
    fn failure(&self, error: wgpu::Error, operation: &'static str, requested: u64) -> Error {
        if let Err(lost) = self.alive() {
            return lost;
        }
        match error {
            wgpu::Error::OutOfMemory { .. } => {
                Error::OutOfMemory { device: self.id.clone(), requested, live: 0, cap: u64::MAX }
            }
            other => Error::Driver { device: self.id.clone(), operation, log: chain(&other) },
        }
    }

    fn compile_failure(&self, error: wgpu::Error, file: &str) -> Error {
        match error {
            wgpu::Error::OutOfMemory { .. } => self.failure(error, "compile", 0),
            _ if self.lost.get().is_some() => self.failure(error, "compile", 0),
            other => shader::compile_error(file, chain(&other)),
        }
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// Runs driver calls and returns the first error that they raised on this thread.
fn scoped<T>(device: &wgpu::Device, work: impl FnOnce() -> T) -> std::result::Result<T, wgpu::Error> {
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let value = work();
    // Scopes are a stack: the newest is popped first.
    let caught =
        [pollster::block_on(memory.pop()), pollster::block_on(internal.pop()), pollster::block_on(validation.pop())];
    match caught.into_iter().flatten().next() {
        None => Ok(value),
        Some(error) => Err(error),
    }
}

pub struct WgpuDevice {
    info: Info,
    gpu: Gpu,
    alignment: u32,
    pool: Arc<Pool<Memory>>,
    staging: Staging,
    pipelines: Pipelines,
    batches: Batches,
    launches: AtomicU64,
}

impl WgpuDevice {
    /// `None`: a hardware adapter, else a software one. Otherwise an index, or part of an adapter's name.
    pub fn open(name: Option<&str>) -> Result<Self> {
        Self::open_wanted(name.map_or(Wanted::Any, Wanted::Named))
    }

    /// A hardware adapter, or an error: what `auto` asks for.
    pub fn open_hardware() -> Result<Self> {
        Self::open_wanted(Wanted::Hardware)
    }

    fn open_wanted(wanted: Wanted) -> Result<Self> {
        let checks = Checks::wanted()?;
        let (index, adapter) = adapter::select(wanted)?;
        let mut opened = adapter::open(index, &adapter)?;
        // Times and choices of kernels belong to the driver that they were measured with, and to no other.
        let changes = [(checks == Checks::Report, ", accesses watched"), (foreign(), ", shaders of the user")];
        opened.info.driver.extend(changes.iter().filter(|(so, _)| *so).map(|(_, what)| *what));
        let lost = Arc::new(OnceLock::new());
        let flag = lost.clone();
        opened.device.set_device_lost_callback(move |reason, message| {
            // The first reason stays; a device is lost once.
            let _ = flag.set(format!("{reason:?}: {message}"));
        });
        // Errors outside any scope belong to work that nobody waits for (dropping resources of a lost device): they
        // must not end the process, which is wgpu's default.
        opened.device.on_uncaptured_error(Arc::new(|error| crate::console::warn(format_args!("wgpu: {error}"))));
        let gpu = Gpu {
            kept: Kept::open(&opened.device, &opened.info),
            device: opened.device,
            queue: opened.queue,
            id: opened.info.id.clone(),
            // Until the probes have run, which go astray on purpose.
            checks: Checks::Clamp,
            notes: None,
            lost,
            polling: Mutex::new(()),
        };
        let mut device = Self {
            info: opened.info,
            gpu,
            alignment: opened.alignment,
            pool: Arc::new(Pool::new()),
            staging: Staging::default(),
            pipelines: Pipelines::default(),
            batches: Batches::new(DEADLINE),
            launches: AtomicU64::new(0),
        };
        let (probes, loop_budget) = probe::run(&device)?;
        device.info.probes = probes;
        device.info.limits.loop_budget = loop_budget;
        device.launches.store(0, Relaxed);
        device.gpu.checks = checks;
        device.gpu.notes = (checks == Checks::Report).then(|| Notes::new(&device.gpu)).transpose()?;
        Ok(device)
    }

    /// Plans for a device that binds less at a time, or that leaves no loop early: for tests of what only large inputs or hardware
    /// would show.
    pub fn plan_for(&mut self, binding_bytes: u64, loop_budget: Option<u64>) {
        (self.info.limits.binding_bytes, self.info.limits.loop_budget) = (binding_bytes, loop_budget);
    }

    /// Limits how long queued work may take before the device counts as lost.
    pub fn set_deadline(&self, deadline: Duration) {
        self.batches.set_deadline(deadline);
    }

    /// Gives the device back to the driver; every later call answers `Error::DeviceLost`.
    pub fn destroy(&self) {
        self.gpu.device.destroy();
        // The callback runs at the next poll.
        let _ = self.gpu.poll(wgpu::PollType::Poll);
        let _ = self.gpu.lost.set("Destroyed".into());
    }

    fn block<'b>(&self, buffer: &'b Buffer) -> Result<&'b Loan<Memory>> {
        buffer.leaf(&self.info)
    }

    /// The bind group of one launch, over the arguments that its entry uses.
    fn bind(&self, kernel: &Kernel, pipeline: &pipeline::Pipeline, arguments: &[Binding]) -> Result<wgpu::BindGroup> {
        let refuse = |what, got: u64, limit: u64| Error::Launch { kernel: kernel.name.into(), what, got, limit };
        let mut shown = Vec::with_capacity(pipeline.bindings.len());
        for &binding in &pipeline.bindings {
            let Some(argument) = arguments.get(binding as usize) else {
                return Err(refuse("binding index", binding.into(), arguments.len() as u64));
            };
            let size = memory::round_up(argument.bytes.max(4));
            if size as u64 > self.info.limits.binding_bytes {
                return Err(refuse("bytes of one binding", size as u64, self.info.limits.binding_bytes));
            }
            if !argument.offset.is_multiple_of(self.alignment as usize) {
                return Err(refuse("misaligned binding offset", argument.offset as u64, self.alignment.into()));
            }
            let block = self.block(argument.buffer)?;
            block.check(argument.offset, size)?;
            shown.push((block.id(), argument.offset, size));
        }
        pipeline.group(shown, || {
            let entry = |&binding: &u32| {
                let argument = &arguments[binding as usize];
                let resource = wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: self.block(argument.buffer)?.buffer(),
                    offset: argument.offset as u64,
                    size: wgpu::BufferSize::new(memory::round_up(argument.bytes.max(4)) as u64),
                });
                Ok(wgpu::BindGroupEntry { binding, resource })
            };
            let entries: Vec<_> = pipeline.bindings.iter().map(entry).collect::<Result<_>>()?;
            let descriptor = wgpu::BindGroupDescriptor { label: None, layout: &pipeline.layout, entries: &entries };
            scoped(&self.gpu.device, || self.gpu.device.create_bind_group(&descriptor))
                .map_err(|e| self.gpu.failure(e, "bind", 0))
        })
    }
}

impl Device for WgpuDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.gpu.alive()?;
        let limit = self.info.limits.buffer_bytes;
        let memory = self.pool.lend(&self.info.id, bytes, |class| {
            if class as u64 > limit {
                return Err(Error::Launch {
                    kernel: "memory allocation".into(),
                    what: "bytes of one buffer",
                    got: class as u64,
                    limit,
                });
            }
            Memory::new(&self.gpu, class)
        })?;
        Ok(Buffer::new(Arc::new(memory), bytes))
    }

    fn upload(&self, target: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        self.gpu.alive()?;
        let block = self.block(target)?;
        block.check(offset, data.len())?;
        let whole = data.len() / 4 * 4;
        if !offset.is_multiple_of(4) {
            return Err(memory::misaligned(offset));
        }
        let mut batch = self.batches.lock();
        // Queue writes run before the next command buffer: launches already gathered that use this memory go first.
        if block.used_in() == batch.number() {
            batch.submit(&self.gpu)?;
        }
        scoped(&self.gpu.device, || {
            for (i, part) in data[..whole].chunks(memory::CHUNK).enumerate() {
                self.gpu.queue.write_buffer(block.buffer(), (offset + i * memory::CHUNK) as u64, part);
            }
        })
        .map_err(|e| self.gpu.failure(e, "upload", data.len() as u64))?;
        drop(batch);
        if whole < data.len() {
            self.upload_tail(target, offset + whole, &data[whole..])?;
        }
        Ok(())
    }

    fn download(&self, source: &Buffer, offset: usize, data: &mut [u8]) -> Result<()> {
        let block = self.block(source)?;
        block.check(offset, data.len())?;
        // Copies move whole words.
        let first = offset / 4 * 4;
        let mut done = 0;
        while done < data.len() {
            let from = (first + done) / 4 * 4;
            let skip = offset + done - from;
            let bytes = (data.len() - done).min(memory::CHUNK);
            self.read(block, from, memory::round_up(skip + bytes), |words| {
                data[done..done + bytes].copy_from_slice(&words[skip..skip + bytes]);
            })?;
            done += bytes;
        }
        Ok(())
    }

    fn copy(&self, source: &Buffer, from: usize, target: &Buffer, to: usize, bytes: usize) -> Result<()> {
        self.gpu.alive()?;
        if source.same(target) {
            // wgpu copies only between two buffers.
            let between = self.alloc(bytes)?;
            self.copy(source, from, &between, 0, bytes)?;
            return self.copy(&between, 0, target, to, bytes);
        }
        if let Some(odd) = [from, to, bytes].into_iter().find(|n| !n.is_multiple_of(4)) {
            return Err(memory::misaligned(odd));
        }
        let (source, target) = (self.block(source)?, self.block(target)?);
        source.check(from, bytes)?;
        target.check(to, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        let mut batch = self.batches.lock();
        let encoder = batch.encoder(&self.gpu);
        encoder.copy_buffer_to_buffer(source.buffer(), from as u64, target.buffer(), to as u64, bytes as u64);
        source.mark(batch.number());
        target.mark(batch.number());
        Ok(())
    }

    fn launch(&self, kernel: &Kernel, element: DType, launch: &Launch, arguments: &[Binding]) -> Result<()> {
        self.gpu.alive()?;
        let Some(Entry { file, entry, constants }) = kernel.wgsl() else {
            return Err(Error::NotAvailable {
                device: self.info.id.clone(),
                reason: format!("{} is no WGSL kernel", kernel.name),
            });
        };
        check_launch(kernel, launch, &self.info)?;
        let pipeline = self.pipelines.get(&self.gpu, file, launch.entry.unwrap_or(entry), element, constants)?;
        let words = launch.params.words();
        if (words.len() * 4) < pipeline.parameter_bytes as usize {
            return Err(Error::Launch {
                kernel: kernel.name.into(),
                what: "bytes of the parameter block that the shader reads",
                got: pipeline.parameter_bytes.into(),
                limit: (words.len() * 4) as u64,
            });
        }
        let group = self.bind(kernel, &pipeline, arguments)?;
        let _alone = self.gpu.notes.as_ref().map(|notes| notes.turn.lock().unwrap_or_else(PoisonError::into_inner));
        let mut batch = self.batches.lock();
        batch.dispatch(&self.gpu, kernel.name, &pipeline.pipeline, &group, words, launch.groups);
        for argument in arguments {
            self.block(argument.buffer)?.mark(batch.number());
        }
        self.launches.fetch_add(1, Relaxed);
        if let Some(notes) = &self.gpu.notes {
            drop(batch);
            return self.judge(notes, kernel, &pipeline);
        }
        if batch.full() { batch.submit(&self.gpu) } else { Ok(()) }
    }

    fn sync(&self) -> Result<()> {
        self.gpu.alive()?;
        self.batches.lock().submit(&self.gpu)?;
        self.batches.wait_all(&self.gpu)
    }

    fn elapsed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.sync()?;
        let start = std::time::Instant::now();
        if !self.info.features.timestamps {
            work()?;
            self.sync()?;
            return Ok(start.elapsed().as_secs_f64());
        }
        let seconds = self.timed(work)?;
        let wall = start.elapsed().as_secs_f64();
        // A timer that counts more than the wall clock, or nothing, is not believed.
        Ok(if seconds > 0.0 && seconds <= wall { seconds } else { wall })
    }

    fn stats(&self) -> Stats {
        Stats { submits: self.batches.lock().submits(), ..self.pool.stats(self.launches.load(Relaxed)) }
    }

    fn reset_peak(&self) {
        self.pool.reset_peak();
    }

    fn set_memory_cap(&self, bytes: Option<u64>) {
        self.pool.set_cap(bytes);
    }
}

impl WgpuDevice {
    /// Waits for the launch and reads what its shader noted.
    fn judge(&self, notes: &Notes, kernel: &Kernel, pipeline: &pipeline::Pipeline) -> Result<()> {
        let mut judged = Ok(());
        self.read(&notes.memory, 0, Notes::BYTES, |bytes| {
            judged = pipeline.judge(kernel.name, bytemuck::cast_slice(bytes));
        })?;
        if judged.is_err() {
            self.batches.lock().encoder(&self.gpu).clear_buffer(notes.memory.buffer(), 0, None);
        }
        judged
    }

    /// Copies a range of whole words to host memory and shows it to `take`.
    fn read(&self, block: &Memory, from: usize, bytes: usize, take: impl FnOnce(&[u8])) -> Result<()> {
        self.gpu.alive()?;
        let staging = self.staging.take(&self.gpu, bytes)?;
        let mut batch = self.batches.lock();
        let encoder = batch.encoder(&self.gpu);
        encoder.copy_buffer_to_buffer(block.buffer(), from as u64, &staging, 0, bytes as u64);
        batch.submit(&self.gpu)?;
        drop(batch);
        let (report, mapped) = std::sync::mpsc::channel();
        staging.slice(..bytes as u64).map_async(wgpu::MapMode::Read, move |result| {
            // The receiver waits below; it is gone only after an error.
            let _ = report.send(result);
        });
        self.batches.wait_all(&self.gpu)?;
        // The work is done, but a map is reported by a poll: this thread's, or another's that may have passed just before
        // the map was asked for. So both are tried until one brings the news.
        let started = std::time::Instant::now();
        let news = loop {
            let _ = self.gpu.poll(wgpu::PollType::Poll);
            match mapped.recv_timeout(std::time::Duration::from_millis(5)) {
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) if started.elapsed() < self.batches.deadline() => {}
                news => break news,
            }
        };
        let log = match news {
            Ok(Ok(())) => match staging.slice(..bytes as u64).get_mapped_range() {
                Ok(view) => {
                    take(&view);
                    drop(view);
                    staging.unmap();
                    self.staging.give(staging);
                    return Ok(());
                }
                Err(e) => e.to_string(),
            },
            Ok(Err(e)) => e.to_string(),
            Err(e) => e.to_string(),
        };
        self.gpu.alive()?;
        Err(Error::Driver { device: self.info.id.clone(), operation: "download", log })
    }

    /// The last bytes of an upload that does not fill a word. Bytes behind the buffer's end are nobody's; bytes of the
    /// buffer itself are kept.
    fn upload_tail(&self, target: &Buffer, offset: usize, tail: &[u8]) -> Result<()> {
        let mut word = [0u8; 4];
        if offset + tail.len() < target.bytes() {
            let end = (target.bytes() - offset).min(4);
            self.download(target, offset, &mut word[..end])?;
        }
        word[..tail.len()].copy_from_slice(tail);
        self.upload(target, offset, &word)
    }

    /// Seconds between a time stamp in front of the first command of `work` and one behind its last.
    fn timed(&self, work: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        let device = &self.gpu.device;
        let queries = device.create_query_set(&wgpu::QuerySetDescriptor {
            label: None,
            ty: wgpu::QueryType::Timestamp,
            count: 2,
        });
        let resolved = self.alloc(16)?;
        let block = self.block(&resolved)?;
        self.batches.lock().encoder(&self.gpu).write_timestamp(&queries, 0);
        work()?;
        let target = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("time stamps"),
            size: 16,
            usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
            mapped_at_creation: false,
        });
        let mut batch = self.batches.lock();
        let encoder = batch.encoder(&self.gpu);
        encoder.write_timestamp(&queries, 1);
        encoder.resolve_query_set(&queries, 0..2, &target, 0);
        encoder.copy_buffer_to_buffer(&target, 0, block.buffer(), 0, 16);
        drop(batch);
        let mut stamps = [0u64; 2];
        self.download(&resolved, 0, bytemuck::cast_slice_mut(&mut stamps))?;
        let ticks = stamps[1].saturating_sub(stamps[0]);
        Ok(ticks as f64 * f64::from(self.gpu.queue.get_timestamp_period()) * 1e-9)
    }
}

const _: () = assert!(PARAMETER_BYTES as usize == crate::kernel::Params::MAX * 4);
