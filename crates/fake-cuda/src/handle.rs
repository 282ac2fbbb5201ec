//! The handle by which a Rust test loads the driver and sets it up.

use std::ffi::{CStr, CString, c_char, c_void};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Tests of one process take turns.
static TURN: Mutex<()> = Mutex::new(());

/// The loaded driver, held by one test at a time.
///
/// The `rlib` and the `cdylib` do not share memory, so all goes through the functions that the `cdylib` exports.
#[derive(Debug)]
pub struct Driver {
    reset: unsafe extern "C" fn(),
    set: unsafe extern "C" fn(*const c_char, u64) -> u32,
    fail: unsafe extern "C" fn(*const c_char, u64, u32),
    count: unsafe extern "C" fn(*const c_char) -> u64,
    get: unsafe extern "C" fn(*const c_char, u32) -> u64,
    path: PathBuf,
    _turn: MutexGuard<'static, ()>,
}

impl Driver {
    /// Loads the driver for the whole process, waits until no other test holds it, and resets settings and counters.
    ///
    /// Looks for `libcuda.so` in `deps` below the executable and beside it, then in the same two places one level up.
    /// What earlier tests still hold (memory, streams, registrations) stays valid and counted.
    ///
    /// # Panics
    /// If the library is not there, or if `libcuda.so` or `libcuda.so.1` means another driver in this process.
    #[must_use]
    pub fn load() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let path = Self::find();
        let library = open(path.as_os_str().as_bytes()).unwrap_or_else(|error| panic!("{error}"));
        // Callers open the driver by these names, the first before the second. Both must mean this library.
        for name in ["libcuda.so", "libcuda.so.1"] {
            let other = open(name.as_bytes()).ok();
            let ours = other.is_none_or(|other| symbol(other, c"cuInit") == symbol(library, c"cuInit"));
            assert!(ours, "{name} leads to another driver: put {} first on LD_LIBRARY_PATH", folder(&path).display());
        }
        let find = |name: &CStr| {
            let found = symbol(library, name);
            assert!(!found.is_null(), "{} has no {name:?}: it is not the test double", path.display());
            found
        };
        // SAFETY: the library is built from this crate, whose `control` module gives the functions these types.
        let driver = unsafe {
            Self {
                reset: std::mem::transmute::<*mut c_void, unsafe extern "C" fn()>(find(c"fake_cuda_reset")),
                set: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char, u64) -> u32>(find(
                    c"fake_cuda_set",
                )),
                fail: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char, u64, u32)>(find(
                    c"fake_cuda_fail",
                )),
                count: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char) -> u64>(find(
                    c"fake_cuda_count",
                )),
                get: std::mem::transmute::<*mut c_void, unsafe extern "C" fn(*const c_char, u32) -> u64>(find(
                    c"fake_cuda_get",
                )),
                path,
                _turn: turn,
            }
        };
        driver.reset();
        driver
    }

    /// The path of the built library, whose folder a child process needs on its `LD_LIBRARY_PATH`. Loads nothing.
    ///
    /// # Panics
    /// If the library is not there.
    #[must_use]
    pub fn find() -> PathBuf {
        let exe = std::env::current_exe().expect("the path of this executable");
        let beside = folder(&exe);
        let above = folder(beside);
        let places = [beside.join("deps"), beside.to_owned(), above.join("deps"), above.to_owned()];
        let found = places.iter().map(|place| place.join("libcuda.so")).find(|path| path.is_file());
        let path = found.unwrap_or_else(|| panic!("no libcuda.so in {places:?}: build the fake-cuda crate first"));
        refresh_link(&path);
        path
    }

    /// The library in use.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for work in flight, sets all back to the defaults and counters to zero, and finds a lost device again.
    pub fn reset(&self) {
        // SAFETY: the function has no conditions.
        unsafe { (self.reset)() };
    }

    /// How many devices there are, at most 64. With none `cuInit` returns `CUDA_ERROR_NO_DEVICE`.
    pub fn set_devices(&self, count: u64) {
        self.set("devices", count);
    }

    /// Bytes of each device.
    pub fn set_memory(&self, bytes: u64) {
        self.set("memory", bytes);
    }

    /// Time from a call to its copy, in whole microseconds. Operations already asked for keep theirs.
    pub fn set_delay(&self, delay: Duration) {
        self.set("delay_us", u64::try_from(delay.as_micros()).unwrap_or(u64::MAX));
    }

    /// Bytes per second that a device copies in each direction, 0 = no limit.
    pub fn set_bandwidth(&self, bytes_per_second: u64) {
        self.set("bandwidth", bytes_per_second);
    }

    /// Bytes of the largest single registration.
    pub fn set_register_limit(&self, bytes: u64) {
        self.set("register_limit", bytes);
    }

    /// Bytes that can be registered at once.
    pub fn set_registered_total(&self, bytes: u64) {
        self.set("registered_total", bytes);
    }

    /// Whether memory cannot be exported to other processes: `cuIpcGetMemHandle` returns `CUDA_ERROR_INVALID_VALUE`, as
    /// it does for memory that was made by `cuMemCreate`.
    pub fn set_no_ipc(&self, refused: bool) {
        self.set("no_ipc", u64::from(refused));
    }

    /// Loses the device after `copies` more copies: the next one is accepted and never done.
    pub fn lose_after(&self, copies: u64) {
        self.set("lose_after", copies);
    }

    /// Has a bit change on its way to the device, in the middle of the copy that comes after `copies` from the host since the
    /// last reset.
    pub fn spoil_after(&self, copies: u64) {
        self.set("spoil_after", copies);
    }

    /// Lets the `nth` call from now of `symbol` fail once with `code`, a `CUresult`. The first call is 1. A symbol
    /// without its version (`cuMemAlloc`) means any version. A code the driver does not have becomes 999.
    pub fn fail(&self, symbol: &str, nth: u64, code: u32) {
        let symbol = c_string(symbol);
        // SAFETY: it ends in a NUL.
        unsafe { (self.fail)(symbol.as_ptr(), nth, code) };
    }

    /// Calls of `symbol` so far, failed ones too. A symbol without its version means any version.
    #[must_use]
    pub fn count(&self, symbol: &str) -> u64 {
        let symbol = c_string(symbol);
        // SAFETY: it ends in a NUL.
        unsafe { (self.count)(symbol.as_ptr()) }
    }

    /// Bytes copied from host to device. A copy counts once it is done.
    #[must_use]
    pub fn bytes_h2d(&self) -> u64 {
        self.get("bytes_h2d")
    }

    /// Bytes copied from device to host.
    #[must_use]
    pub fn bytes_d2h(&self) -> u64 {
        self.get("bytes_d2h")
    }

    /// Copies from or to host memory that is not registered.
    #[must_use]
    pub fn pageable_copies(&self) -> u64 {
        self.get("pageable_copies")
    }

    /// Bytes registered now.
    #[must_use]
    pub fn registered_now(&self) -> u64 {
        self.get("registered")
    }

    /// Most bytes registered at once.
    #[must_use]
    pub fn registered_peak(&self) -> u64 {
        self.get("registered_peak")
    }

    /// Bytes allocated on a device now, each allocation rounded up to 512.
    #[must_use]
    pub fn device_bytes_now(&self, ordinal: u32) -> u64 {
        self.get_of("device_bytes", ordinal)
    }

    /// Most bytes allocated on a device at once.
    #[must_use]
    pub fn device_bytes_peak(&self, ordinal: u32) -> u64 {
        self.get_of("device_bytes_peak", ordinal)
    }

    /// Any counter by its name in the report: `copies_h2d`, `waits_on_free`, `streams`, `events` and so on.
    ///
    /// # Panics
    /// If there is no such counter.
    #[must_use]
    pub fn get(&self, counter: &str) -> u64 {
        self.get_of(counter, 0)
    }

    fn get_of(&self, counter: &str, ordinal: u32) -> u64 {
        let name = c_string(counter);
        // SAFETY: it ends in a NUL.
        let value = unsafe { (self.get)(name.as_ptr(), ordinal) };
        assert_ne!(value, u64::MAX, "no counter {counter}");
        value
    }

    fn set(&self, name: &str, value: u64) {
        let setting = c_string(name);
        // SAFETY: it ends in a NUL.
        let wrong = unsafe { (self.set)(setting.as_ptr(), value) };
        assert_eq!(wrong, 0, "no setting {name}");
    }
}

/// Makes the link above `deps` lead to the library in `deps` again, if there is one.
///
/// `cargo build` leaves such a link. Tests build the library anew and leave the link as it was, but search its folder
/// first, and so would open the older library.
fn refresh_link(path: &Path) {
    let link = folder(folder(path)).join("libcuda.so");
    let identity = |path: &Path| path.metadata().map(|data| (data.dev(), data.ino())).ok();
    if !folder(path).ends_with("deps") || identity(&link).is_none_or(|old| identity(path) == Some(old)) {
        return;
    }
    // By renaming, so that no other test sees it missing. A failure shows when the library is loaded.
    let fresh = link.with_extension(format!("{}.so", std::process::id()));
    let _ = std::fs::hard_link(path, &fresh).and_then(|()| std::fs::rename(&fresh, &link));
}

fn folder(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new("/"))
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("a name without NUL")
}

/// Opens a library for good.
fn open(name: &[u8]) -> Result<*mut c_void, String> {
    let name = CString::new(name).map_err(|error| error.to_string())?;
    // SAFETY: the name ends in a NUL. Opening runs the library's constructors, which are the runtime's.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !library.is_null() {
        return Ok(library);
    }
    // SAFETY: `dlerror` returns null or a text that lasts until this thread's next call.
    let error = unsafe { libc::dlerror().as_ref().map(|text| CStr::from_ptr(text).to_string_lossy().into_owned()) };
    Err(error.unwrap_or_else(|| format!("cannot open {name:?}")))
}

/// The address of a symbol, null if there is none.
fn symbol(library: *mut c_void, name: &CStr) -> *mut c_void {
    // SAFETY: the library was opened and is never closed; the name ends in a NUL.
    unsafe { libc::dlsym(library, name.as_ptr()) }
}
