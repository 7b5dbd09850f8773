//! A device that takes every launch and runs none: geometry is tested on it without a GPU.

use std::any::Any;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::capture::{Recorder, Recording};
use super::{Binding, Buffer, Class, Device, Features, Graph, Info, Kind, Limits, Stats, Storage};
use crate::dtype::DType;
use crate::error::{Result, Uncapturable};
use crate::kernel::{Kernel, Launch, check_launch};

/// Bytes that are held, and the most that were at once: exactly those asked for.
#[derive(Default)]
struct Bytes {
    live: AtomicU64,
    peak: AtomicU64,
}

/// Memory that there is none of.
struct Nothing {
    bytes: u64,
    all: Arc<Bytes>,
}

impl Storage for Nothing {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

impl Drop for Nothing {
    fn drop(&mut self) {
        self.all.live.fetch_sub(self.bytes, Relaxed);
    }
}

/// Pretends to be a `kind` device with the given limits, and keeps what was launched.
pub struct NullDevice {
    info: Info,
    launches: Mutex<Vec<(&'static str, Launch)>>,
    allocations: AtomicU64,
    launched: AtomicU64,
    bytes: Arc<Bytes>,
    recorder: Recorder<Self>,
}

impl NullDevice {
    pub fn new(kind: Kind, class: Class, limits: Limits) -> Self {
        let info = Info {
            threads: 1,
            kind,
            id: "null".into(),
            name: "null device".into(),
            driver: String::new(),
            class,
            software: false,
            limits,
            features: Features {
                f16: true,
                i16: true,
                i64: true,
                subgroups: true,
                subgroup_size: 8,
                largest_subgroup: 8,
                arch: 80,
                ..Features::default()
            },
            probes: Vec::new(),
        };
        let (allocations, launched) = (AtomicU64::new(0), AtomicU64::new(0));
        let bytes = Arc::default();
        Self { info, launches: Mutex::new(Vec::new()), allocations, launched, bytes, recorder: Recorder::new() }
    }

    /// The same with matrix units of `size` rows and columns, for subgroups of at most `largest` invocations.
    pub fn with_matrix_units(mut self, size: u32, largest: u32) -> Self {
        let features = &mut self.info.features;
        (features.cooperative_matrix, features.subgroup_size, features.largest_subgroup) = (size, largest, largest);
        self
    }

    /// Everything launched so far.
    pub fn take(&self) -> Vec<(&'static str, Launch)> {
        std::mem::take(&mut *self.launches.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

impl Device for NullDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        self.allocations.fetch_add(1, Relaxed);
        let live = self.bytes.live.fetch_add(bytes as u64, Relaxed) + bytes as u64;
        self.bytes.peak.fetch_max(live, Relaxed);
        Ok(Buffer::new(Arc::new(Nothing { bytes: bytes as u64, all: self.bytes.clone() }), bytes))
    }

    fn upload(&self, _: &Buffer, _: usize, _: &[u8]) -> Result<()> {
        let _turn = self.recorder.turn();
        self.recorder.refuse(&self.info, Uncapturable::Upload)
    }

    fn download(&self, _: &Buffer, _: usize, data: &mut [u8]) -> Result<()> {
        let _turn = self.recorder.turn();
        data.fill(0);
        self.recorder.refuse(&self.info, Uncapturable::Download)
    }

    fn copy(&self, _: &Buffer, _: usize, _: &Buffer, _: usize, _: usize) -> Result<()> {
        Ok(())
    }

    fn launch(&self, kernel: &Kernel, _: DType, launch: &Launch, _: &[Binding]) -> Result<()> {
        check_launch(kernel, launch, &self.info)?;
        let mut launches = self.launches.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        launches.push((kernel.name, launch.clone()));
        self.launched.fetch_add(1, Relaxed);
        Ok(())
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
        let (allocations, launches) = (self.allocations.load(Relaxed), self.launched.load(Relaxed));
        let [bytes_live, bytes_peak] = [&self.bytes.live, &self.bytes.peak].map(|bytes| bytes.load(Relaxed));
        Stats { allocations, launches, bytes_live, bytes_peak, ..Stats::default() }
    }

    fn reset_peak(&self) {
        self.bytes.peak.store(self.bytes.live.load(Relaxed), Relaxed);
    }

    fn set_memory_cap(&self, _: Option<u64>) {}
}
