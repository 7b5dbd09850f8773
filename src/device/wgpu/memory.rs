//! Device memory, recycled, and the staging buffers that results are read through.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use super::{Gpu, scoped};
use crate::error::{Error, Result};

/// Longest piece moved between host and device at once.
pub const CHUNK: usize = 64 << 20;

/// Buffer ranges are whole words.
pub fn round_up(bytes: usize) -> usize {
    bytes.div_ceil(4) * 4
}

pub fn misaligned(offset: usize) -> Error {
    Error::Launch {
        kernel: "memory access".into(),
        what: "bytes past a multiple of 4",
        got: offset as u64 % 4,
        limit: 0,
    }
}

pub struct Memory {
    buffer: wgpu::Buffer,
    /// Never given to another buffer: bind groups are found by it.
    id: u64,
    /// Number of the last batch that uses it. Memory may be recycled while queued work still uses it: the queue's
    /// order makes that safe for launches and copies, and `upload` looks here.
    used_in: AtomicU64,
}

impl Memory {
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let descriptor = wgpu::BufferDescriptor {
            label: None,
            size: bytes as u64,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let buffer = scoped(&gpu.device, || gpu.device.create_buffer(&descriptor))
            .map_err(|e| gpu.failure(e, "allocate", bytes as u64))?;
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Ok(Self { buffer, id: NEXT.fetch_add(1, Relaxed), used_in: AtomicU64::new(0) })
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn buffer(&self) -> &wgpu::Buffer {
        &self.buffer
    }

    pub fn used_in(&self) -> u64 {
        self.used_in.load(Relaxed)
    }

    pub fn mark(&self, batch: u64) {
        self.used_in.store(batch, Relaxed);
    }
}

/// Host-visible buffers for read-backs, kept for the next one.
#[derive(Default)]
pub struct Staging {
    free: Mutex<Vec<wgpu::Buffer>>,
}

/// Staging buffers kept at most.
const KEPT: usize = 4;

impl Staging {
    pub fn take(&self, gpu: &Gpu, bytes: usize) -> Result<wgpu::Buffer> {
        let size = bytes.next_power_of_two().max(4096) as u64;
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = free.iter().position(|b| b.size() == size) {
            return Ok(free.swap_remove(at));
        }
        drop(free);
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let descriptor = wgpu::BufferDescriptor { label: Some("staging"), size, usage, mapped_at_creation: false };
        scoped(&gpu.device, || gpu.device.create_buffer(&descriptor)).map_err(|e| gpu.failure(e, "allocate", size))
    }

    pub fn give(&self, buffer: wgpu::Buffer) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() == KEPT {
            free.remove(0);
        }
        free.push(buffer);
    }
}
