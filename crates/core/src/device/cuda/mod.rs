//! CUDA through its driver, loaded at run time. Every error of the driver is an error of the call.

mod stream;
mod sums;

use std::ffi::{CStr, c_char, c_int, c_uint};
use std::ptr;
use std::sync::{Arc, OnceLock};

use cudarc::driver::sys;

use super::ipc::{Exported, HANDLE_LEN};
use super::{Backend, BackendStream, DeviceError, Memory};
use stream::CudaStream;
use sums::Kernel;

/// cuMemHostRegister: usable by all contexts; the memory is only read.
const REGISTER_PORTABLE: c_uint = 0x01;
const REGISTER_READ_ONLY: c_uint = 0x08;
/// cuIpcOpenMemHandle: the only flag there is.
const IPC_LAZY_ENABLE_PEER_ACCESS: c_uint = 0x01;

/// Whether the driver is there and initialised. A library that is absent stays so for the process (cudarc panics where it
/// is called then); an error is not kept, since a driver that is not ready when a machine starts is so later.
fn driver() -> Result<(), DeviceError> {
    static PRESENT: OnceLock<bool> = OnceLock::new();
    /// The process that initialised it.
    static READY: OnceLock<u32> = OnceLock::new();
    let here = std::process::id();
    let by = match READY.get() {
        Some(by) => by,
        None => {
            // SAFETY: loads the driver's library, whose initialisers are the system's own.
            if !*PRESENT.get_or_init(|| unsafe { sys::is_culib_present() }) {
                return Err(DeviceError::NoDriver);
            }
            // SAFETY: the library is there; 0 is the only value that the argument may have. Any thread may call it, and
            // again.
            match unsafe { sys::cuInit(0) } {
                sys::CUresult::CUDA_SUCCESS => READY.get_or_init(|| here),
                sys::CUresult::CUDA_ERROR_NO_DEVICE => {
                    return Err(DeviceError::NoSuchDevice { ordinal: 0, count: 0 });
                }
                code => return Err(driver_error("cuda", "initialise the driver", code)),
            }
        }
    };
    if *by == here { Ok(()) } else { Err(DeviceError::Forked { device: "cuda".into() }) }
}

/// The driver's version, asked once; 0 where it does not say. The driver is loaded.
fn driver_version() -> i32 {
    static VERSION: OnceLock<i32> = OnceLock::new();
    *VERSION.get_or_init(|| {
        let mut version = 0;
        // SAFETY: the driver is loaded, by the caller's word; it writes one number.
        let code = unsafe { sys::cuDriverGetVersion(&mut version) };
        if code == sys::CUresult::CUDA_SUCCESS { version } else { 0 }
    })
}

/// Number of visible devices.
pub(super) fn count() -> Result<usize, DeviceError> {
    driver()?;
    let mut count = 0;
    // SAFETY: the driver is initialised and writes one integer.
    check("cuda", "count devices", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The handle of a device. Makes no context.
fn device_at(ordinal: usize) -> Result<sys::CUdevice, DeviceError> {
    let count = count()?;
    let index = i32::try_from(ordinal).ok().filter(|_| ordinal < count);
    let index = index.ok_or(DeviceError::NoSuchDevice { ordinal, count })?;
    let mut device = 0;
    // SAFETY: the ordinal was checked; the driver writes one handle.
    check(&format!("cuda:{ordinal}"), "open it", unsafe { sys::cuDeviceGet(&mut device, index) })?;
    Ok(device)
}

/// The UUID of a device. Makes no context.
pub(super) fn uuid_of(ordinal: usize) -> Result<[u8; 16], DeviceError> {
    let device = device_at(ordinal)?;
    let mut uuid = sys::CUuuid { bytes: [0; 16] };
    // SAFETY: the device is valid; the driver writes 16 bytes.
    let code = unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) };
    check(&format!("cuda:{ordinal}"), "ask its UUID", code)?;
    Ok(uuid.bytes.map(to_byte))
}

/// Start and length of the allocation that holds an address. A context is current.
fn allocation_of(addr: u64) -> Result<(u64, u64), sys::CUresult> {
    let (mut base, mut len) = (0, 0);
    // SAFETY: a context is current; the driver checks the address and writes two numbers.
    match unsafe { sys::cuMemGetAddressRange_v2(&mut base, &mut len, addr) } {
        sys::CUresult::CUDA_SUCCESS => Ok((base, len as u64)),
        code => Err(code),
    }
}

/// The driver's number of the allocation that holds an address, unique in this process for ever. A context is current.
fn buffer_id_of(addr: u64) -> Option<u64> {
    let mut id = 0u64;
    let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_BUFFER_ID;
    // SAFETY: a context is current; the driver checks the address and writes one number of 64 bits.
    let code = unsafe { sys::cuPointerGetAttribute((&raw mut id).cast(), attribute, addr) };
    (code == sys::CUresult::CUDA_SUCCESS).then_some(id)
}

/// A byte of the driver's, whose sign the machine decides.
fn to_byte(char: c_char) -> u8 {
    let [byte] = char.to_le_bytes();
    byte
}

fn from_byte(byte: u8) -> c_char {
    c_char::from_le_bytes([byte])
}

fn driver_error(device: &str, what: &'static str, code: sys::CUresult) -> DeviceError {
    DeviceError::Driver { device: device.to_owned(), what, name: name_of(code), code: code as u32 }
}

/// The driver's name of an error.
fn name_of(code: sys::CUresult) -> String {
    let mut name = ptr::null();
    // SAFETY: the driver is loaded (an error came from it) and writes a pointer to a static string.
    let told = unsafe { sys::cuGetErrorName(code, &mut name) } == sys::CUresult::CUDA_SUCCESS && !name.is_null();
    // SAFETY: a static string of the driver's, ended by zero.
    if told { unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned() } else { "unknown".into() }
}

fn check(device: &str, what: &'static str, code: sys::CUresult) -> Result<(), DeviceError> {
    if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(driver_error(device, what, code)) }
}

/// A device's primary context, held as long as this lives.
#[derive(Debug)]
struct Context {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// What takes checksums in it, once it was asked for.
    kernel: OnceLock<Result<Kernel, DeviceError>>,
}

// SAFETY: a driver context may be made current in any thread.
unsafe impl Send for Context {}
// SAFETY: as above; the driver's calls are safe to make from several threads.
unsafe impl Sync for Context {}

impl Context {
    fn id(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    /// Makes the context current for a call, and puts back what was current: torch keeps its own.
    fn enter(&self) -> Result<Current, DeviceError> {
        driver()?;
        // SAFETY: the context is retained while `self` lives.
        self.check("make its context current", unsafe { sys::cuCtxPushCurrent_v2(self.context) })?;
        Ok(Current)
    }

    fn check(&self, what: &'static str, code: sys::CUresult) -> Result<(), DeviceError> {
        if code == sys::CUresult::CUDA_SUCCESS { Ok(()) } else { Err(driver_error(&self.id(), what, code)) }
    }

    /// Its device's compute capability, such as (9, 0).
    fn architecture(&self) -> Result<(c_int, c_int), DeviceError> {
        use sys::CUdevice_attribute as Attribute;
        let ask = |attribute| {
            let mut value = 0;
            // SAFETY: the device is valid; the driver writes one integer.
            let code = unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, self.device) };
            self.check("ask its architecture", code).map(|()| value)
        };
        let major = ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        Ok((major, ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?))
    }

    /// The kernel that was loaded.
    fn kernel(&self) -> Result<&Kernel, DeviceError> {
        self.kernel.get().ok_or(DeviceError::OutOfBounds)?.as_ref().map_err(Clone::clone)
    }

    /// Free and total bytes of its device.
    fn memory(&self) -> Result<(u64, u64), DeviceError> {
        let _current = self.enter()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: a context is current; the driver writes two integers.
        self.check("ask for its memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if driver().is_ok() {
            if let (Some(Ok(kernel)), Ok(_current)) = (self.kernel.get(), self.enter()) {
                kernel.unload();
            }
            // SAFETY: retained in `open`, released once. Memory and streams hold this value, so none is left.
            let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

/// A context made current until this is dropped.
struct Current;

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = ptr::null_mut();
        // SAFETY: pops what `enter` pushed in this thread.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

/// A CUDA device.
#[derive(Debug)]
pub(super) struct Cuda {
    context: Arc<Context>,
    name: String,
    /// Waiting by spinning is quicker, and takes a processor that a small machine needs for reading.
    blocking_wait: bool,
}

impl Cuda {
    pub(super) fn open(ordinal: usize) -> Result<Cuda, DeviceError> {
        let device = device_at(ordinal)?;
        let id = format!("cuda:{ordinal}");
        let mut name = [0; 128];
        // SAFETY: the driver writes at most the given length, ended by zero.
        check(&id, "ask its name", unsafe { sys::cuDeviceGetName(name.as_mut_ptr(), 128, device) })?;
        // SAFETY: `name` is zero-filled beyond what was written, so that it ends.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let mut context = ptr::null_mut();
        // SAFETY: the device is valid; released in `Context::drop`.
        check(&id, "retain its primary context", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })?;
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Ok(Cuda {
            context: Arc::new(Context { ordinal, device, context, kernel: OnceLock::new() }),
            name,
            blocking_wait: processors < 4,
        })
    }

    /// Its place on the PCI bus, in the driver's words.
    fn address(&self) -> Result<String, DeviceError> {
        let device = self.context.device;
        let mut address = [0; 32];
        // SAFETY: the driver writes at most the given length, ended by zero.
        self.context.check("ask its address", unsafe { sys::cuDeviceGetPCIBusId(address.as_mut_ptr(), 32, device) })?;
        // SAFETY: `address` is zero-filled beyond what was written, so that it ends.
        Ok(unsafe { CStr::from_ptr(address.as_ptr()) }.to_string_lossy().into_owned())
    }
}

impl Backend for Cuda {
    fn id(&self) -> String {
        self.context.id()
    }

    fn description(&self) -> String {
        self.name.clone()
    }

    fn is_host(&self) -> bool {
        false
    }

    fn link(&self) -> Result<Option<String>, DeviceError> {
        let uuid = uuid_of(self.context.ordinal)?;
        let address = self.address()?;
        let uuid: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Some(format!("{uuid} {address}")))
    }

    fn pci_address(&self) -> Option<String> {
        self.address().ok()
    }

    fn uuid(&self) -> Result<Option<[u8; 16]>, DeviceError> {
        uuid_of(self.context.ordinal).map(Some)
    }

    fn export(&self, addr: u64) -> Result<Exported, DeviceError> {
        let _current = self.context.enter()?;
        let refused = |what, code| match code {
            // What has no handle: memory of cuMemCreate and of pools, managed memory, what is not the driver's.
            sys::CUresult::CUDA_ERROR_INVALID_VALUE
            | sys::CUresult::CUDA_ERROR_NOT_FOUND
            | sys::CUresult::CUDA_ERROR_MAP_FAILED
            | sys::CUresult::CUDA_ERROR_NOT_PERMITTED
            | sys::CUresult::CUDA_ERROR_NOT_SUPPORTED => {
                DeviceError::NotShareable { device: self.id(), reason: name_of(code) }
            }
            code => driver_error(&self.id(), what, code),
        };
        let (base, base_len) = allocation_of(addr).map_err(|code| refused("find an allocation", code))?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; HANDLE_LEN] };
        // SAFETY: a context is current; the driver checks the address and writes one handle.
        match unsafe { sys::cuIpcGetMemHandle(&mut handle, base) } {
            sys::CUresult::CUDA_SUCCESS => {
                Ok(Exported { handle: handle.reserved.map(to_byte), base, base_len, buffer_id: buffer_id_of(base) })
            }
            code => Err(refused("share memory", code)),
        }
    }

    fn open_shared(&self, handle: &[u8; HANDLE_LEN]) -> Result<(Box<dyn Memory>, u64), DeviceError> {
        let _current = self.context.enter()?;
        let handle = sys::CUipcMemHandle { reserved: handle.map(from_byte) };
        let mut addr = 0;
        // SAFETY: a context is current; the driver checks the handle; closed in `Opened::drop`.
        let memory = match unsafe { sys::cuIpcOpenMemHandle_v2(&mut addr, handle, IPC_LAZY_ENABLE_PEER_ACCESS) } {
            sys::CUresult::CUDA_SUCCESS => Box::new(Opened { context: Arc::clone(&self.context), addr }),
            // No such memory, or none that this device and this process may reach.
            code @ (sys::CUresult::CUDA_ERROR_INVALID_VALUE
            | sys::CUresult::CUDA_ERROR_INVALID_HANDLE
            | sys::CUresult::CUDA_ERROR_INVALID_CONTEXT
            | sys::CUresult::CUDA_ERROR_INVALID_DEVICE
            | sys::CUresult::CUDA_ERROR_MAP_FAILED
            | sys::CUresult::CUDA_ERROR_PEER_ACCESS_UNSUPPORTED
            | sys::CUresult::CUDA_ERROR_NOT_FOUND
            | sys::CUresult::CUDA_ERROR_NOT_PERMITTED
            | sys::CUresult::CUDA_ERROR_NOT_SUPPORTED) => {
                return Err(DeviceError::NotOpened { device: self.id(), reason: name_of(code) });
            }
            code => return Err(driver_error(&self.id(), "open another process's memory", code)),
        };
        let range = allocation_of(addr);
        let (base, len) = range.map_err(|code| driver_error(&self.id(), "measure another process's memory", code))?;
        let refused = || DeviceError::NotOpened { device: self.id(), reason: "its length is unknown".into() };
        let len = base.checked_add(len).and_then(|end| end.checked_sub(addr)).ok_or_else(refused)?;
        Ok((memory, len))
    }

    fn memory(&self) -> Result<Option<(u64, u64)>, DeviceError> {
        self.context.memory().map(Some)
    }

    fn alloc(&self, len: usize) -> Result<Box<dyn Memory>, DeviceError> {
        Ok(Box::new(CudaMemory::alloc(&self.context, len)?))
    }

    fn prepare_sums(&self) -> Result<bool, DeviceError> {
        driver()?;
        if let Some(known) = self.context.kernel.get() {
            return known.as_ref().map(|_| true).map_err(Clone::clone);
        }
        let (found, answer) = match Kernel::load(&self.context) {
            Ok(kernel) => (Ok(kernel), Ok(true)),
            Err(error @ DeviceError::NoSums { .. }) => (Err(error.clone()), Err(error)),
            // Such as for want of memory: it is tried again.
            Err(error) => return Err(error),
        };
        if let Err(Ok(second)) = self.context.kernel.set(found) {
            let _current = self.context.enter()?;
            second.unload();
        }
        answer
    }

    fn stream(&self) -> Result<Box<dyn BackendStream>, DeviceError> {
        Ok(Box::new(CudaStream::new(&self.context, self.blocking_wait)?))
    }

    unsafe fn pin(&self, ptr: *mut u8, len: usize, read_only: bool) -> Result<(), DeviceError> {
        let _current = self.context.enter()?;
        let flags = REGISTER_PORTABLE | if read_only { REGISTER_READ_ONLY } else { 0 };
        // SAFETY: the range is mapped and stays so, by the caller's word.
        self.context.check("pin host memory", unsafe { sys::cuMemHostRegister_v2(ptr.cast(), len, flags) })
    }

    unsafe fn unpin(&self, ptr: *mut u8) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: the range is mapped, by the caller's word; an address that is not pinned is refused.
            let _ = unsafe { sys::cuMemHostUnregister(ptr.cast()) };
        }
    }

    unsafe fn read_back(&self, addr: u64, out: &mut [u8]) -> Result<(), DeviceError> {
        let _current = self.context.enter()?;
        // SAFETY: the range is allocated, by the caller's word; `out` is as long.
        let code = unsafe { sys::cuMemcpyDtoH_v2(out.as_mut_ptr().cast(), addr, out.len()) };
        self.context.check("copy to the host", code)
    }
}

#[derive(Debug)]
struct CudaMemory {
    context: Arc<Context>,
    addr: sys::CUdeviceptr,
}

impl CudaMemory {
    fn alloc(context: &Arc<Context>, len: usize) -> Result<CudaMemory, DeviceError> {
        let _current = context.enter()?;
        let mut addr = 0;
        // SAFETY: a context is current; freed in `drop`.
        match unsafe { sys::cuMemAlloc_v2(&mut addr, len) } {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let free = context.memory().map_or(0, |(free, _)| free);
                Err(DeviceError::OutOfMemory { device: context.id(), need: len as u64, free })
            }
            code => {
                context.check("allocate memory", code)?;
                Ok(CudaMemory { context: Arc::clone(context), addr })
            }
        }
    }
}

impl Memory for CudaMemory {
    fn addr(&self) -> u64 {
        self.addr
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: allocated by `alloc`, freed once.
            let _ = unsafe { sys::cuMemFree_v2(self.addr) };
        }
    }
}

/// Another process's memory, open here.
#[derive(Debug)]
struct Opened {
    context: Arc<Context>,
    addr: sys::CUdeviceptr,
}

impl Memory for Opened {
    fn addr(&self) -> u64 {
        self.addr
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if let Ok(_current) = self.context.enter() {
            // SAFETY: opened by `open_shared`, closed once. The driver counts how often it is open.
            let _ = unsafe { sys::cuIpcCloseMemHandle(self.addr) };
        }
    }
}
