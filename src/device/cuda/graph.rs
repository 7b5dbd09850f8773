//! A stream's work taken down as a graph, which the driver launches at the cost of one launch.

use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::device::Gpu;
use crate::error::{Error, Result, Uncapturable};

/// A graph ready to be launched.
pub struct Executable {
    /// Behind a lock: the driver wants one thread at a time on a graph.
    handle: Mutex<Handle>,
    gpu: Arc<Gpu>,
}

struct Handle(sys::CUgraphExec);

// SAFETY: the driver's handles may be used from any thread that makes the context current; `Executable` locks this one.
unsafe impl Send for Handle {}

/// Takes the stream out of a capture whose work panicked.
struct Capturing<'a>(&'a Gpu);

impl Drop for Capturing<'_> {
    fn drop(&mut self) {
        // SAFETY: begun by `Executable::of`, on this thread; nothing is made of the graph.
        let _ = unsafe { result::stream::end_capture(self.0.stream).and_then(|graph| result::graph::destroy(graph)) };
    }
}

impl Executable {
    /// What `work` puts on the stream. The stream leaves the capture whatever happens.
    pub fn of(gpu: &Arc<Gpu>, work: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        // Whatever the driver has against it, the work runs as well without.
        let failed = |e: DriverError| match gpu.failure("capture", 0, e) {
            Error::Driver { device, .. } => Error::Capture { device, reason: Uncapturable::Driver(e.0 as u32) },
            other => other,
        };
        // Calls that could wait for the stream fail on this thread; other threads go on as they please.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is our own, not the legacy one, and captures nothing yet: the recorder lets one capture begin.
        unsafe { result::stream::begin_capture(gpu.stream, mode) }.map_err(failed)?;
        let capturing = Capturing(gpu);
        let done = work();
        gpu.enter()?;
        std::mem::forget(capturing);
        // SAFETY: begun above, on this thread.
        let graph = unsafe { result::stream::end_capture(gpu.stream) };
        if let Err(e) = done {
            // SAFETY: a graph that nothing was made of.
            let _ = graph.map(|graph| unsafe { result::graph::destroy(graph) });
            return Err(e);
        }
        let graph = graph.map_err(failed)?;
        // SAFETY: the graph just captured, not used after.
        let handle = unsafe {
            let handle = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0));
            result::graph::destroy(graph).map_err(failed)?;
            handle.map_err(failed)?
        };
        let executable = Self { handle: Mutex::new(Handle(handle)), gpu: gpu.clone() };
        // What it takes on the device it takes here, where there is a way back.
        // SAFETY: made above, and the stream is no longer capturing.
        unsafe { result::graph::upload(handle, gpu.stream) }.map_err(failed)?;
        Ok(executable)
    }

    /// Queues it. All memory that it names must live until it has run.
    pub fn launch(&self) -> Result<()> {
        self.gpu.enter()?;
        let handle = self.handle.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: graph and stream live through the call.
        unsafe { result::graph::launch(handle.0, self.gpu.stream) }
            .map_err(|e| self.gpu.failure("launch captured work", 0, e))
    }
}

impl Drop for Executable {
    fn drop(&mut self) {
        if self.gpu.enter().is_ok() {
            let handle = self.handle.get_mut().unwrap_or_else(PoisonError::into_inner);
            // SAFETY: destroyed once; the driver lets a launch under way finish.
            let _ = unsafe { result::graph::exec_destroy(handle.0) };
        }
    }
}
