//! Roads over NCCL: NVLink, PCIe or a network, whichever it finds between two GPUs. The library is opened at run time, like
//! all of NVIDIA's.
//!
//! A road has a communicator and a stream of its own at each end. On a shared stream a send that waits for its receiver would
//! hold up the receive that the receiver waits for.

use std::collections::VecDeque;
use std::ffi::{c_char, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::result::{event, stream};
use cudarc::driver::sys as driver;
use cudarc::nccl::result as nccl;
use cudarc::nccl::sys;

use super::device::{Gpu, address};
use crate::device::road::{End, Road, Ticket};
use crate::device::{Buffer, Info};
use crate::error::{Error, Result};

/// Ranks of a road's communicator.
const SENDER: c_int = 0;
const RECEIVER: c_int = 1;

fn unavailable(reason: String) -> Error {
    Error::NotAvailable { device: "nccl".into(), reason }
}

/// Proves that the library is there and has what is asked of it.
fn library() -> Result<()> {
    // SAFETY: opens and closes the library; its loader code runs as in any program that links it.
    if !unsafe { sys::is_culib_present() } {
        return Err(unavailable("no NCCL library (libnccl) is installed".into()));
    }
    // A library too old for a symbol makes the loader panic: a diagnosis must survive that.
    match std::panic::catch_unwind(nccl::get_nccl_version) {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(e)) => Err(unavailable(format!("the library gives no version: {:?}", e.0))),
        Err(_) => Err(unavailable("the library lacks a function this program needs".into())),
    }
}

/// A ticket for one road. The process that makes it must live until both ends have met.
///
/// # Errors
/// `NotAvailable` where there is no library.
pub fn ticket() -> Result<Ticket> {
    library()?;
    let id = nccl::get_uniqueid().map_err(|e| unavailable(format!("the library gives no identifier: {:?}", e.0)))?;
    Ok(Ticket(id.internal.iter().map(|&c| c as u8).collect()))
}

/// What is on its way, and the event behind it.
struct Leaving {
    event: driver::CUevent,
    _source: Buffer,
}

pub(super) struct NcclRoad {
    info: Info,
    gpu: Arc<Gpu>,
    communicator: sys::ncclComm_t,
    stream: driver::CUstream,
    end: End,
    /// Sources that a send may still read: memory that goes back to the pool is lent again in the order of the device's
    /// stream, which does not wait for this one.
    leaving: VecDeque<Leaving>,
}

// SAFETY: plain handles; one worker has the road, and every use makes the context current first.
unsafe impl Send for NcclRoad {}

impl NcclRoad {
    /// Waits until the other end has come, too.
    pub fn new(info: &Info, gpu: &Arc<Gpu>, ticket: &Ticket, end: End) -> Result<Self> {
        library()?;
        let mut id = sys::ncclUniqueId { internal: [0; 128] };
        if ticket.0.len() != id.internal.len() {
            return Err(unavailable(format!("a ticket of {} bytes where they have 128", ticket.0.len())));
        }
        id.internal.iter_mut().zip(&ticket.0).for_each(|(to, &from)| *to = from as c_char);
        gpu.enter()?;
        let mut communicator: sys::ncclComm_t = std::ptr::null_mut();
        let rank = if end == End::Sends { SENDER } else { RECEIVER };
        // SAFETY: writes one handle to a live variable; the context of the GPU that it is for is current.
        let joined = unsafe { nccl::comm_init_rank(&mut communicator, 2, id, rank) };
        let refused = |e: nccl::NcclError| unavailable(format!("{}: no way to the other end: {:?}", info.id, e.0));
        joined.map_err(refused)?;
        let stream = stream::create(stream::StreamKind::NonBlocking).map_err(|e| gpu.failure("make a stream", 0, e));
        let stream = match stream {
            Ok(stream) => stream,
            Err(e) => {
                // SAFETY: made above and used nowhere else. The stream's error is the one to tell.
                let _ = unsafe { nccl::comm_abort(communicator) };
                return Err(e);
            }
        };
        Ok(Self { info: info.clone(), gpu: gpu.clone(), communicator, stream, end, leaving: VecDeque::new() })
    }

    /// An event behind all that is queued on `after`; `before` waits for it.
    fn order(&self, after: driver::CUstream, before: Option<driver::CUstream>) -> Result<driver::CUevent> {
        let failed = |e| self.gpu.failure("order two streams", 0, e);
        let event = event::create(driver::CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed)?;
        // SAFETY: the streams live as long as the device and this road, the event until it is destroyed by its owner.
        let ordered = unsafe {
            event::record(event, after).and_then(|()| {
                let wait = |s| stream::wait_event(s, event, driver::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT);
                before.map_or(Ok(()), wait)
            })
        };
        match ordered {
            Ok(()) => Ok(event),
            Err(e) => {
                forget(event);
                Err(failed(e))
            }
        }
    }

    /// Checks the end and lets this road's stream wait for the device's.
    fn enter(&self, end: End) -> Result<()> {
        if self.end != end {
            return Err(unavailable(format!("{}: the road's other end {end:?}", self.info.id)));
        }
        self.gpu.enter()?;
        // A waited-for event may be destroyed: the wait stays.
        self.order(self.gpu.stream, Some(self.stream)).map(forget)
    }

    fn failure(&self, operation: &'static str, error: &nccl::NcclError) -> Error {
        Error::Driver { device: self.info.id.clone(), operation, log: format!("NCCL: {:?}", error.0) }
    }
}

fn forget(event: driver::CUevent) {
    // SAFETY: made by `order` and not used again. A failure leaves it to the context's end.
    let _ = unsafe { event::destroy(event) };
}

impl Road for NcclRoad {
    fn send(&mut self, source: &Buffer, offset: usize, bytes: usize) -> Result<()> {
        let from = address(&self.info, source, offset, bytes)?;
        self.enter(End::Sends)?;
        let kind = sys::ncclDataType_t::ncclUint8;
        // SAFETY: `address` proved the range; the source is held until the event behind it has passed.
        let sent =
            unsafe { nccl::send(from as *const c_void, bytes, kind, RECEIVER, self.communicator, self.stream.cast()) };
        sent.map_err(|e| self.failure("send", &e))?;
        let event = self.order(self.stream, None)?;
        self.leaving.push_back(Leaving { event, _source: source.clone() });
        // SAFETY: an event that is destroyed only here and at the end.
        while self.leaving.front().is_some_and(|l| unsafe { event::query(l.event) }.is_ok()) {
            self.leaving.pop_front().into_iter().for_each(|l| forget(l.event));
        }
        Ok(())
    }

    fn receive(&mut self, target: &Buffer, offset: usize, bytes: usize) -> Result<()> {
        let to = address(&self.info, target, offset, bytes)?;
        self.enter(End::Receives)?;
        let kind = sys::ncclDataType_t::ncclUint8;
        // SAFETY: `address` proved the range. Whatever used this memory before was queued before, as was waited for; what comes
        // after on the device's stream waits for the event below, also giving the memory back.
        let came = unsafe { nccl::recv(to as *mut c_void, bytes, kind, SENDER, self.communicator, self.stream.cast()) };
        came.map_err(|e| self.failure("receive", &e))?;
        self.order(self.stream, Some(self.gpu.stream)).map(forget)
    }
}

impl Drop for NcclRoad {
    /// Aborts: the other end may be gone. Where a step has ended in good order nothing is on its way.
    fn drop(&mut self) {
        if self.gpu.enter().is_err() {
            return;
        }
        // SAFETY: handles of this road that nobody else has. Failures leave them to the end of the process.
        unsafe {
            let _ = nccl::comm_abort(self.communicator);
            let _ = stream::synchronize(self.stream);
            self.leaving.drain(..).for_each(|l| forget(l.event));
            let _ = stream::destroy(self.stream);
        }
    }
}
