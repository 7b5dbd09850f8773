//! placeholder
use super::*;
pub struct WgpuDevice { info: Info }
impl WgpuDevice {
    pub fn open_hardware() -> Result<Self> { Self::open(None) }
    pub fn open(_: Option<&str>) -> Result<Self> { Err(Error::NotAvailable { device: "wgpu".into(), reason: "not built yet".into() }) }
}
impl Device for WgpuDevice {
    fn info(&self) -> &Info { &self.info }
    fn alloc(&self, _: usize) -> Result<Buffer> { unreachable!() }
    fn upload(&self, _: &Buffer, _: usize, _: &[u8]) -> Result<()> { unreachable!() }
    fn download(&self, _: &Buffer, _: usize, _: &mut [u8]) -> Result<()> { unreachable!() }
    fn copy(&self, _: &Buffer, _: usize, _: &Buffer, _: usize, _: usize) -> Result<()> { unreachable!() }
    fn launch(&self, _: &Kernel, _: DType, _: &Launch, _: &[Binding]) -> Result<()> { unreachable!() }
    fn sync(&self) -> Result<()> { unreachable!() }
    fn stats(&self) -> Stats { unreachable!() }
    fn set_memory_cap(&self, _: Option<u64>) {}
}
