//! A tensor: a shaped, typed handle of device memory. Cloning shares the memory.

use std::sync::Arc;

use crate::device::{Binding, Buffer, Device, Kind};
use crate::dtype::{DType, Element};
use crate::error::{Error, Result};
use crate::shape::{Meta, Shape};

#[derive(Clone)]
pub struct Tensor {
    buffer: Buffer,
    /// Byte offset into the buffer: 0, but for guarded test outputs.
    offset: usize,
    meta: Meta,
    device: Arc<dyn Device>,
}

/// Bytes a tensor takes on a device: the reference device stores f64 whatever the type.
fn storage_bytes(device: &dyn Device, meta: &Meta) -> usize {
    if device.info().kind == Kind::Reference { meta.count() * 8 } else { meta.bytes() }
}

impl Tensor {
    /// Memory with unspecified contents.
    pub fn empty(device: &Arc<dyn Device>, meta: Meta) -> Result<Self> {
        let buffer = device.alloc(storage_bytes(device.as_ref(), &meta))?;
        Ok(Self { buffer, offset: 0, meta, device: device.clone() })
    }

    pub fn zeros(device: &Arc<dyn Device>, meta: Meta) -> Result<Self> {
        let tensor = Self::empty(device, meta)?;
        device.upload(&tensor.buffer, 0, &vec![0; storage_bytes(device.as_ref(), &meta)])?;
        Ok(tensor)
    }

    /// A tensor over part of a buffer; `offset` is a multiple of 256.
    pub fn over(device: &Arc<dyn Device>, buffer: Buffer, offset: usize, meta: Meta) -> Result<Self> {
        let end = offset.saturating_add(storage_bytes(device.as_ref(), &meta));
        if !offset.is_multiple_of(256) || end > buffer.bytes() {
            return Err(Error::Launch {
                kernel: "tensor over a buffer".into(),
                what: "end of the range (offset a multiple of 256)",
                got: end as u64,
                limit: buffer.bytes() as u64,
            });
        }
        Ok(Self { buffer, offset, meta, device: device.clone() })
    }

    /// Uploads f64 values, rounded to the storage type (to nearest even).
    pub fn from_f64(device: &Arc<dyn Device>, dims: &[usize], dtype: DType, values: &[f64]) -> Result<Self> {
        let meta = Meta::new(dims, dtype)?;
        check_length(&meta, values.len())?;
        let tensor = Self::empty(device, meta)?;
        if device.info().kind == Kind::Reference {
            device.upload(&tensor.buffer, 0, bytemuck::cast_slice(values))?;
        } else {
            device.upload(&tensor.buffer, 0, &dtype.encode(values))?;
        }
        Ok(tensor)
    }

    /// Uploads values in their own storage type.
    pub fn from_slice<T: Element>(device: &Arc<dyn Device>, dims: &[usize], values: &[T]) -> Result<Self> {
        let meta = Meta::new(dims, T::DTYPE)?;
        check_length(&meta, values.len())?;
        Self::from_bytes(device, meta, bytemuck::cast_slice(values))
    }

    /// Uploads encoded elements (little endian, row-major).
    pub fn from_bytes(device: &Arc<dyn Device>, meta: Meta, bytes: &[u8]) -> Result<Self> {
        check_length(&meta, bytes.len() / meta.dtype.size())?;
        if device.info().kind == Kind::Reference {
            return Self::from_f64(device, meta.dims(), meta.dtype, &meta.dtype.decode(bytes));
        }
        let tensor = Self::empty(device, meta)?;
        device.upload(&tensor.buffer, 0, bytes)?;
        Ok(tensor)
    }

    /// Encoded elements (little endian, row-major).
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        if self.device.info().kind == Kind::Reference {
            return Ok(self.meta.dtype.encode(&self.to_f64()?));
        }
        let mut bytes = vec![0; self.meta.bytes()];
        self.device.download(&self.buffer, self.offset, &mut bytes)?;
        Ok(bytes)
    }

    pub fn to_f64(&self) -> Result<Vec<f64>> {
        if self.device.info().kind == Kind::Reference {
            let mut values = vec![0.0f64; self.count()];
            self.device.download(&self.buffer, self.offset, bytemuck::cast_slice_mut(&mut values))?;
            return Ok(values);
        }
        Ok(self.meta.dtype.decode(&self.to_bytes()?))
    }

    /// Downloads as a Rust type; it must be the storage type.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if T::DTYPE != self.meta.dtype {
            return Err(Error::Dtype { op: "download", expected: T::DTYPE.name(), got: self.meta.to_string() });
        }
        let mut values = vec![T::zeroed(); self.count()];
        if self.device.info().kind == Kind::Reference {
            bytemuck::cast_slice_mut(&mut values).copy_from_slice(&self.to_bytes()?);
        } else {
            self.device.download(&self.buffer, self.offset, bytemuck::cast_slice_mut(&mut values))?;
        }
        Ok(values)
    }

    /// Overwrites the contents.
    pub fn upload<T: Element>(&self, values: &[T]) -> Result<()> {
        check_length(&self.meta, values.len())?;
        if T::DTYPE != self.meta.dtype {
            return Err(Error::Dtype { op: "upload", expected: self.meta.dtype.name(), got: T::DTYPE.to_string() });
        }
        let bytes = bytemuck::cast_slice(values);
        if self.device.info().kind == Kind::Reference {
            let values = self.meta.dtype.decode(bytes);
            return self.device.upload(&self.buffer, self.offset, bytemuck::cast_slice(&values));
        }
        self.device.upload(&self.buffer, self.offset, bytes)
    }

    /// A copy in memory of its own on the same device.
    pub fn duplicate(&self) -> Result<Self> {
        let copy = Self::empty(&self.device, self.meta)?;
        let bytes = storage_bytes(self.device.as_ref(), &self.meta);
        // Size classes leave room for the rounding to 4 bytes that 16-bit tensors of odd length need.
        self.device.copy(&self.buffer, self.offset, &copy.buffer, 0, bytes.div_ceil(4) * 4)?;
        Ok(copy)
    }

    /// Overwrites the contents with those of `source`: same shape, type and device.
    pub fn assign(&self, source: &Tensor) -> Result<()> {
        if source.meta != self.meta || !Arc::ptr_eq(&source.device, &self.device) {
            return Err(Error::Shape {
                op: "assign",
                rule: "one shape, type and device",
                got: format!("{source:?} to {self:?}"),
            });
        }
        let bytes = storage_bytes(self.device.as_ref(), &self.meta).div_ceil(4) * 4;
        self.device.copy(&source.buffer, source.offset, &self.buffer, self.offset, bytes)
    }

    pub fn to_device(&self, device: &Arc<dyn Device>) -> Result<Self> {
        if device.info().kind == Kind::Reference {
            return Self::from_f64(device, self.dims(), self.dtype(), &self.to_f64()?);
        }
        Self::from_bytes(device, self.meta, &self.to_bytes()?)
    }

    /// The same elements under another shape; shares the memory.
    pub fn reshape(&self, dims: &[usize]) -> Result<Self> {
        let shape = Shape::new(dims)?;
        if shape.count() != self.count() {
            return Err(Error::Shape {
                op: "reshape",
                rule: "the element count stays",
                got: format!("{} to {shape}", self.meta),
            });
        }
        Ok(Self { meta: Meta { shape, dtype: self.meta.dtype }, ..self.clone() })
    }

    pub fn meta(&self) -> Meta {
        self.meta
    }

    /// Whether both are the same elements of the same memory.
    pub fn is(&self, other: &Self) -> bool {
        self.buffer.same(&other.buffer) && self.offset == other.offset && self.meta == other.meta
    }

    pub fn shape(&self) -> Shape {
        self.meta.shape
    }

    pub fn dims(&self) -> &[usize] {
        self.meta.shape.dims()
    }

    pub fn dtype(&self) -> DType {
        self.meta.dtype
    }

    pub fn count(&self) -> usize {
        self.meta.count()
    }

    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    pub(crate) fn buffer(&self) -> &Buffer {
        &self.buffer
    }

    /// Byte offset into [`Tensor::buffer`].
    pub(crate) fn offset(&self) -> usize {
        self.offset
    }

    /// This tensor as a kernel argument.
    pub(crate) fn binding(&self, write: bool) -> Binding<'_> {
        Binding { buffer: &self.buffer, offset: self.offset, bytes: self.meta.bytes(), write }
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tensor({} on {})", self.meta, self.device.info().id)
    }
}

fn check_length(meta: &Meta, got: usize) -> Result<()> {
    if meta.count() == got {
        return Ok(());
    }
    Err(Error::Shape {
        op: "upload",
        rule: "as many values as the shape has elements",
        got: format!("{got} values for {meta}"),
    })
}
