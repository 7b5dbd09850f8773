//! The oracle as a device: storage is f64 whatever the tensor's type says, and `dispatch` runs each op's reference.
//! A whole model can be run on it, so whole-model logits, losses and gradients have an f64 truth.

use std::any::Any;
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Binding, Buffer, Class, Device, Features, Info, Kind, Limits, Stats, Storage};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::kernel::{Kernel, Launch};

pub(super) struct Values(Mutex<Vec<f64>>);

impl Storage for Values {
    fn as_any(&self) -> &dyn Any {
        self
    }
}

pub struct ReferenceDevice {
    info: Info,
}

impl Default for ReferenceDevice {
    fn default() -> Self {
        Self::new()
    }
}

impl ReferenceDevice {
    pub fn new() -> Self {
        let info = Info {
            kind: Kind::Reference,
            id: "reference".into(),
            name: "f64 references".into(),
            driver: format!("espalier {}", env!("CARGO_PKG_VERSION")),
            class: Class::Cpu,
            threads: 1,
            software: true,
            limits: Limits::unbounded(),
            features: Features { f16: true, i16: true, ..Features::default() },
            probes: Vec::new(),
        };
        Self { info }
    }

    fn values<'b>(&self, buffer: &'b Buffer) -> Result<MutexGuard<'b, Vec<f64>>> {
        let values: &Values = buffer.leaf(&self.info)?;
        Ok(values.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// Offsets and lengths are in bytes of f64 storage.
impl Device for ReferenceDevice {
    fn info(&self) -> &Info {
        &self.info
    }

    fn alloc(&self, bytes: usize) -> Result<Buffer> {
        Ok(Buffer::new(Arc::new(Values(Mutex::new(vec![f64::NAN; bytes.div_ceil(8)]))), bytes))
    }

    fn upload(&self, target: &Buffer, offset: usize, data: &[u8]) -> Result<()> {
        let mut values = self.values(target)?;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut values);
        let end = offset + data.len();
        bytes.get_mut(offset..end).ok_or_else(|| outside(end, target))?.copy_from_slice(data);
        Ok(())
    }

    fn download(&self, source: &Buffer, offset: usize, data: &mut [u8]) -> Result<()> {
        let values = self.values(source)?;
        let bytes: &[u8] = bytemuck::cast_slice(&values);
        let end = offset + data.len();
        data.copy_from_slice(bytes.get(offset..end).ok_or_else(|| outside(end, source))?);
        Ok(())
    }

    fn copy(&self, source: &Buffer, from: usize, target: &Buffer, to: usize, bytes: usize) -> Result<()> {
        let mut data = vec![0; bytes];
        self.download(source, from, &mut data)?;
        self.upload(target, to, &data)
    }

    fn launch(&self, kernel: &Kernel, _: DType, _: &Launch, _: &[Binding]) -> Result<()> {
        Err(Error::NotAvailable {
            device: "reference".into(),
            reason: format!("it runs references, not the kernel {}", kernel.name),
        })
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn stats(&self) -> Stats {
        Stats::default()
    }

    fn set_memory_cap(&self, _: Option<u64>) {}
}

fn outside(end: usize, buffer: &Buffer) -> Error {
    Error::Launch {
        kernel: "memory access".into(),
        what: "end of the range",
        got: end as u64,
        limit: buffer.bytes() as u64,
    }
}
