//! Pipelines as the driver compiled them, kept on the disk for the next process.

use std::path::PathBuf;

use super::scoped;
use crate::atomic::write_atomic;
use crate::device::{Info, cache};

/// The folder's name.
const KIND: &str = "pipelines";
/// Bytes of the checksum in front of what the driver gave.
const SUM: usize = blake3::OUT_LEN;

/// The driver's cache of one device's pipelines.
pub struct Kept {
    cache: wgpu::PipelineCache,
    path: PathBuf,
    /// Of what was found.
    sum: Option<blake3::Hash>,
}

impl Kept {
    /// What earlier processes left for this device, driver and version of the program; `None` where the driver has no such cache.
    pub fn open(device: &wgpu::Device, info: &Info) -> Option<Self> {
        if !device.features().contains(wgpu::Features::PIPELINE_CACHE) {
            return None;
        }
        let owner = [env!("CARGO_PKG_VERSION"), &info.name, &info.driver].join("\n");
        let path = cache::place(KIND).join(format!("{}.bin", &blake3::hash(owner.as_bytes()).to_hex()[..16]));
        // The driver trusts its own bytes: a file that was cut or changed counts as none.
        let found = std::fs::read(&path).ok().filter(|bytes| bytes.len() > SUM);
        let found = found.filter(|bytes| blake3::hash(&bytes[SUM..]).as_bytes()[..] == bytes[..SUM]);
        let data = found.as_ref().map(|bytes| &bytes[SUM..]);
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("espalier"), data, fallback: true };
        // SAFETY: these bytes were given by `get_data` for this driver, as their checksum says; others are passed over.
        let cache = scoped(device, || unsafe { device.create_pipeline_cache(&descriptor) }).ok()?;
        Some(Self { cache, path, sum: data.map(blake3::hash) })
    }

    pub fn cache(&self) -> &wgpu::PipelineCache {
        &self.cache
    }
}

impl Drop for Kept {
    /// Nobody misses what cannot be kept: the next process compiles it again.
    fn drop(&mut self) {
        let Some(data) = self.cache.get_data() else { return };
        let sum = blake3::hash(&data);
        if self.sum != Some(sum) && cache::folder(KIND).is_ok() {
            let _ = write_atomic(&self.path, &[&sum.as_bytes()[..], &data].concat());
        }
    }
}
