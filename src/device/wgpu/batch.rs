//! Gathers launches and copies into one command buffer, hands it over, and waits with a deadline.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::{Gpu, scoped};
use crate::error::Result;

/// Launches of one command buffer at most. Measured on software Vulkan, per tiny launch with its share of everything:
/// 71 µs one by one, 39 µs in eights, 33 µs in 32s, 29 to 31 µs from 64 to 512: more only delays the device.
const LAUNCHES: usize = 128;
/// Command buffers handed over and not waited for: bounds memory and latency.
const IN_FLIGHT: usize = 4;

/// The command buffer being recorded.
pub struct Batch {
    number: u64,
    encoder: Option<wgpu::CommandEncoder>,
    /// Open while launch follows launch. Dropped, that is ended, before the encoder is used for anything else.
    pass: Option<wgpu::ComputePass<'static>>,
    launches: usize,
    last: &'static str,
    in_flight: VecDeque<Submitted>,
    submits: u64,
    deadline: Duration,
}

/// A command buffer handed over.
#[derive(Clone)]
pub struct Submitted {
    number: u64,
    index: wgpu::SubmissionIndex,
    /// Its last kernel, to name in an error.
    last: &'static str,
}

pub struct Batches {
    batch: Mutex<Batch>,
    deadline_ms: AtomicU64,
}

impl Batches {
    pub fn new(deadline: Duration) -> Self {
        let batch = Batch {
            number: 1,
            encoder: None,
            pass: None,
            launches: 0,
            last: "none",
            in_flight: VecDeque::new(),
            submits: 0,
            deadline,
        };
        Self { batch: Mutex::new(batch), deadline_ms: AtomicU64::new(deadline.as_millis() as u64) }
    }

    pub fn set_deadline(&self, deadline: Duration) {
        self.deadline_ms.store(deadline.as_millis() as u64, Relaxed);
        self.lock().deadline = deadline;
    }

    pub fn lock(&self) -> MutexGuard<'_, Batch> {
        self.batch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline_ms.load(Relaxed))
    }

    /// Waits for everything handed over so far, by this thread and by others.
    pub fn wait_all(&self, gpu: &Gpu) -> Result<()> {
        let waiting: Vec<Submitted> = self.lock().in_flight.iter().cloned().collect();
        for submitted in waiting {
            wait(gpu, &submitted, self.deadline())?;
            // Only now: another thread that syncs meanwhile must wait for it as well.
            self.lock().in_flight.retain(|other| other.number > submitted.number);
        }
        gpu.alive()
    }
}

/// Longest single wait. A software driver now and then misses the wake-up for work that ended while another thread
/// submitted, and would sleep on until its time-out.
const SLICE: Duration = Duration::from_millis(100);

fn wait(gpu: &Gpu, submitted: &Submitted, deadline: Duration) -> Result<()> {
    let start = std::time::Instant::now();
    loop {
        let left = deadline.saturating_sub(start.elapsed());
        let index = Some(submitted.index.clone());
        let request = wgpu::PollType::Wait { submission_index: index, timeout: Some(left.min(SLICE)) };
        match gpu.poll(request) {
            Ok(_) => return gpu.alive(),
            Err(wgpu::PollError::Timeout) if left > SLICE => {}
            Err(e) => {
                // Work that hangs cannot be taken back: whatever follows would wait behind it.
                let seconds = deadline.as_secs_f64();
                let _ =
                    gpu.lost.set(format!("no answer within {seconds} s from launches up to {} ({e})", submitted.last));
                return gpu.alive();
            }
        }
    }
}

impl Batch {
    /// Changes when a batch is handed over; memory remembers the last one that uses it.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Command buffers handed over so far.
    pub fn submits(&self) -> u64 {
        self.submits
    }

    pub fn full(&self) -> bool {
        self.launches >= LAUNCHES
    }

    /// The encoder outside of a pass: for copies and time stamps.
    pub fn encoder(&mut self, gpu: &Gpu) -> &mut wgpu::CommandEncoder {
        self.pass = None;
        self.encoder
            .get_or_insert_with(|| gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: None }))
    }

    pub fn dispatch(
        &mut self,
        gpu: &Gpu,
        name: &'static str,
        pipeline: &wgpu::ComputePipeline,
        group: &wgpu::BindGroup,
        words: &[u32],
        groups: [u32; 3],
    ) {
        let mut pass = match self.pass.take() {
            Some(pass) => pass,
            None => self.encoder(gpu).begin_compute_pass(&wgpu::ComputePassDescriptor::default()).forget_lifetime(),
        };
        pass.set_pipeline(pipeline);
        pass.set_bind_group(0, group, &[]);
        if let Some(notes) = &gpu.notes {
            pass.set_bind_group(super::bounds::GROUP, &notes.group, &[]);
        }
        if !words.is_empty() {
            pass.set_immediates(0, bytemuck::cast_slice(words));
        }
        pass.dispatch_workgroups(groups[0], groups[1], groups[2]);
        self.pass = Some(pass);
        self.launches += 1;
        self.last = name;
    }

    /// Hands over what was gathered, if anything, and waits where too much is under way.
    pub fn submit(&mut self, gpu: &Gpu) -> Result<()> {
        let pass = self.pass.take();
        let encoder = self.encoder.take();
        self.number += 1;
        self.launches = 0;
        if let Some(encoder) = encoder {
            let submitted = scoped(&gpu.device, || {
                drop(pass);
                gpu.submit(encoder.finish())
            });
            let index = submitted.map_err(|e| gpu.failure(e, "submit", 0))?;
            self.submits += 1;
            self.in_flight.push_back(Submitted { number: self.number, index, last: self.last });
        }
        while self.in_flight.len() > IN_FLIGHT {
            if let Some(oldest) = self.in_flight.pop_front() {
                wait(gpu, &oldest, self.deadline)?;
            }
        }
        gpu.alive()
    }
}
