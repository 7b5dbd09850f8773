//! NVRTC: kernel sources to cubin, with what the assembler says of each entry. Needs no GPU and no driver.

use std::ffi::{CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::nvrtc::{result, sys};

use crate::device::cache;
use crate::error::{Error, Result};

/// `-default-device` lets helper functions go without `__device__`; the rest is IEEE arithmetic as NVRTC has it.
const OPTIONS: [&str; 3] = ["--std=c++17", "-default-device", "--ptxas-options=-v"];

/// What the assembler says of one entry.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Usage {
    pub entry: String,
    pub registers: u32,
    /// Bytes of static shared memory.
    pub shared: u32,
    /// Bytes of local memory per thread.
    pub stack: u32,
    /// Bytes stored and loaded because registers ran out.
    pub spills: u32,
}

pub struct Compiled {
    pub cubin: Vec<u8>,
    pub ptx: String,
    pub log: String,
    /// Taken from the disk cache.
    pub cached: bool,
}

fn unavailable(reason: String) -> Error {
    Error::NotAvailable { device: "NVRTC".into(), reason }
}

/// Folders that may hold NVRTC's libraries: `ESPALIER_NVRTC`, then where `scripts/nvrtc.sh` puts them.
fn folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os("ESPALIER_NVRTC").map(PathBuf::from).into_iter().collect();
    let fetched = |target: &Path| target.join("nvrtc/nvidia/cu13/lib");
    folders.push(fetched(Path::new("target")));
    if let Some(target) =
        std::env::current_exe().ok().as_deref().and_then(|e| e.ancestors().find(|a| a.ends_with("target")))
    {
        folders.push(fetched(target));
    }
    folders
}

/// Opens NVRTC once; its version.
///
/// # Errors
/// `NotAvailable` with what would bring it.
pub fn nvrtc() -> Result<(i32, i32)> {
    static VERSION: OnceLock<std::result::Result<(i32, i32), String>> = OnceLock::new();
    VERSION.get_or_init(open).clone().map_err(unavailable)
}

fn open() -> std::result::Result<(i32, i32), String> {
    for folder in folders().iter().filter(|f| f.is_dir()) {
        let mut names: Vec<PathBuf> = std::fs::read_dir(folder)
            .map_err(|e| format!("{}: {e}", folder.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|p| {
                p.file_name().is_some_and(|n| {
                    n.to_string_lossy().starts_with("libnvrtc") && !n.to_string_lossy().contains(".alt.")
                })
            })
            .collect();
        // The compiler looks for its built-ins by name: they are loaded first, and both stay for the life of the process.
        names.sort_by_key(|p| !p.to_string_lossy().contains("builtins"));
        for name in names {
            load_globally(&name).map_err(|e| format!("{}: {e}", name.display()))?;
        }
    }
    // SAFETY: opens and closes the library; its loader code runs as in any program that links it.
    if !unsafe { sys::is_culib_present() } {
        return Err(
            "libnvrtc is not installed; scripts/nvrtc.sh fetches it, or set ESPALIER_NVRTC to its folder".into()
        );
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: writes two integers to live variables.
    unsafe { sys::nvrtcVersion(&mut major, &mut minor) }.result().map_err(|e| e.to_string())?;
    Ok((major, minor))
}

#[cfg(unix)]
fn load_globally(path: &Path) -> std::result::Result<(), libloading::Error> {
    use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
    // SAFETY: NVIDIA's library, named by the user or fetched by our script; its loader code runs as in any program that links it.
    std::mem::forget(unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }?);
    Ok(())
}

#[cfg(not(unix))]
fn load_globally(path: &Path) -> std::result::Result<(), libloading::Error> {
    // SAFETY: as above.
    std::mem::forget(unsafe { libloading::Library::new(path) }?);
    Ok(())
}

/// The name of a target: architecture features of 9.0 and later need their own suffix.
pub fn target(arch: u32) -> String {
    format!("sm_{arch}{}", if arch >= 90 { "a" } else { "" })
}

/// Compiles a source for one compute capability (times 10), or takes it from the disk cache. `file` is for messages.
///
/// # Errors
/// `NotAvailable` without NVRTC; `Compile` with the file and line of the first error.
pub fn compile(file: &str, source: &str, arch: u32) -> Result<Compiled> {
    let (major, minor) = nvrtc()?;
    let folder = cache::folder("cuda")?;
    let version = format!("NVRTC {major}.{minor} {}", OPTIONS.join(" "));
    let mut cached = true;
    let path = cache::get(&folder, "cubin", &[source, &target(arch), &version], |path| {
        cached = false;
        let compiled = run(file, source, arch)?;
        let mut bytes = Vec::with_capacity(compiled.cubin.len() + compiled.ptx.len() + compiled.log.len() + 16);
        for part in [compiled.ptx.as_bytes(), compiled.log.as_bytes()] {
            bytes.extend((part.len() as u64).to_le_bytes());
            bytes.extend(part);
        }
        bytes.extend(&compiled.cubin);
        std::fs::write(path, bytes).map_err(|e| Error::io(path, e))
    })?;
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
    let compiled = unpack(&bytes).map(|compiled| Compiled { cached, ..compiled });
    compiled.ok_or_else(|| Error::file(&path, "byte 0", "two lengths, PTX, log and cubin"))
}

fn unpack(bytes: &[u8]) -> Option<Compiled> {
    let mut rest = bytes;
    let mut part = || {
        let (length, tail) = rest.split_first_chunk::<8>()?;
        let (text, tail) = tail.split_at_checked(usize::try_from(u64::from_le_bytes(*length)).ok()?)?;
        rest = tail;
        String::from_utf8(text.to_vec()).ok()
    };
    let (ptx, log) = (part()?, part()?);
    Some(Compiled { cubin: rest.to_vec(), ptx, log, cached: true })
}

fn run(file: &str, source: &str, arch: u32) -> Result<Compiled> {
    let refused = |operation, error: result::NvrtcError| Error::Driver {
        device: "NVRTC".into(),
        operation,
        log: error.to_string(),
    };
    let no_zero = |text: &str| CString::new(text).map_err(|e| unavailable(format!("{file}: {e}")));
    let (text, name) = (no_zero(source)?, no_zero(file)?);
    let program = result::create_program(&text, Some(&name)).map_err(|e| refused("create a program", e))?;
    let mut options: Vec<String> = OPTIONS.map(String::from).to_vec();
    options.push(format!("--gpu-architecture={}", target(arch)));
    // SAFETY: `program` was created above and lives until the end of this function; text and name outlive it.
    let outcome = unsafe {
        let compiled = result::compile_program(program, &options);
        let log = result::get_program_log(program).map(text_of).unwrap_or_default();
        match compiled {
            Err(sys_error) if sys_error.0 != sys::nvrtcResult::NVRTC_ERROR_COMPILATION => {
                Err(refused("compile", sys_error))
            }
            Err(_) => Err(compile_error(file, log)),
            Ok(()) => result::get_ptx(program)
                .and_then(|ptx| Ok(Compiled { cubin: cubin(program)?, ptx: text_of(ptx), log, cached: false }))
                .map_err(|e| refused("read the code", e)),
        }
    };
    // SAFETY: created above, destroyed once.
    unsafe { result::destroy_program(program) }.map_err(|e| refused("destroy a program", e))?;
    outcome
}

/// # Safety
/// `program` was compiled for a real architecture and not destroyed.
unsafe fn cubin(program: sys::nvrtcProgram) -> std::result::Result<Vec<u8>, result::NvrtcError> {
    let mut bytes = 0;
    // SAFETY: the caller's promise; a live variable.
    unsafe { sys::nvrtcGetCUBINSize(program, &mut bytes) }.result()?;
    let mut code = vec![0u8; bytes];
    // SAFETY: as long as the library said.
    unsafe { sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()) }.result()?;
    Ok(code)
}

/// A text that ends at its zero byte.
fn text_of(bytes: Vec<c_char>) -> String {
    let bytes: Vec<u8> = bytes.into_iter().map(|b| b as u8).take_while(|&b| b != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// "cuda/softmax.cu(12): error: ..." as a typed error.
fn compile_error(file: &str, log: String) -> Error {
    let first = log.lines().find(|l| l.contains("error"));
    let place = first.and_then(|l| {
        let (name, rest) = l.split_once('(')?;
        Some((name.to_string(), rest.split_once(')')?.0.parse::<c_int>().ok()? as u32))
    });
    let (file, line) = place.unwrap_or((file.to_string(), 0));
    Error::Compile { kernel: file.clone(), file, line, log }
}

/// Registers, memory and spills of every entry, from the assembler's log.
pub fn usage(log: &str) -> Vec<Usage> {
    let number = |line: &str, unit: &str| -> u32 {
        let words: Vec<&str> = line.split_once(unit).map_or("", |(before, _)| before).split_whitespace().collect();
        words.last().and_then(|w| w.parse().ok()).unwrap_or(0)
    };
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let entry = rest.split('\'').next().unwrap_or("").to_string();
            found.push(Usage { entry, ..Usage::default() });
        } else if let Some(last) = found.last_mut() {
            if line.contains("bytes stack frame") {
                last.stack = number(line, " bytes stack frame");
                last.spills = number(line, " bytes spill stores") + number(line, " bytes spill loads");
            } else if line.contains("Used ") {
                last.registers = number(line, " registers");
                last.shared = number(line, " bytes smem");
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assemblers_log_is_read() {
        let log = "ptxas info    : Compiling entry function 'one' for 'sm_80'\n\
                   ptxas info    : Function properties for one\n    \
                   16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n\
                   ptxas info    : Used 28 registers, used 1 barriers, 128 bytes smem, 400 bytes cmem[0]\n";
        let one = Usage { entry: "one".into(), registers: 28, shared: 128, stack: 16, spills: 12 };
        assert_eq!(usage(log), [one]);
    }
}
