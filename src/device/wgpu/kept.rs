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
        let found = std::fs::read(&path).ok();
        let data = found.as_deref().and_then(whole);
        let descriptor = wgpu::PipelineCacheDescriptor { label: Some("espalier"), data, fallback: true };
        // SAFETY: the file's name is of this device and driver, only `drop` below writes there what `get_data` gave, and the checksum
        // says that it is whole; wgpu looks at the driver's own header too.
        let cache = scoped(device, || unsafe { device.create_pipeline_cache(&descriptor) }).ok()?;
        Some(Self { cache, path, sum: data.map(blake3::hash) })
    }

    pub fn cache(&self) -> &wgpu::PipelineCache {
        &self.cache
    }
}

/// What stands behind the checksum: the driver trusts its own bytes, so a file that was cut or changed counts as none.
fn whole(bytes: &[u8]) -> Option<&[u8]> {
    let (sum, data) = bytes.split_at_checked(SUM)?;
    (blake3::hash(data).as_bytes()[..] == *sum).then_some(data)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damaged_files_count_as_none() {
        let data = b"what a driver gave";
        let bytes = [&blake3::hash(data).as_bytes()[..], data].concat();
        assert_eq!(whole(&bytes), Some(&data[..]));
        for end in 0..bytes.len() {
            assert_eq!(whole(&bytes[..end]), None, "cut at {end}");
        }
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert_eq!(whole(&changed), None, "changed at {at}");
        }
    }
}
