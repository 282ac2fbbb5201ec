//! GPUs, opened when something is loaded there and let go when they are idle.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sllm_core::{Device, DeviceError, Error, format_uuid};
use tonic::{Code, Status};

use crate::fault::{self, refused};

/// A device's UUID.
pub(crate) type Uuid = [u8; 16];

/// A device with its context, while something is loaded there.
#[derive(Debug, Clone)]
pub(crate) struct OpenDevice {
    device: Device,
    used: Arc<Mutex<Instant>>,
}

impl OpenDevice {
    pub(crate) fn device(&self) -> &Device {
        &self.device
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

/// Open devices by UUID. Everything here may block, on the driver.
#[derive(Debug, Default)]
pub(crate) struct Devices(Mutex<HashMap<Uuid, OpenDevice>>);

impl Devices {
    /// The device with this UUID.
    pub(crate) fn open(&self, uuid: &Uuid) -> Result<OpenDevice, Status> {
        if let Some(open) = self.lock().get(uuid) {
            return Ok(open.clone());
        }
        // Two that open it at once share the context, which is the device's primary one.
        let device = Device::cuda_by_uuid(uuid).map_err(|e| match &e {
            Error::Device(
                DeviceError::NoSuchUuid { .. } | DeviceError::NoSuchDevice { .. } | DeviceError::NoDriver,
            ) => refused(Code::NotFound, format!("the server has no GPU {}: {}", format_uuid(uuid), e.chain())),
            _ => fault::status(&e),
        })?;
        tracing::info!(device = %device.id(), uuid = %format_uuid(uuid), "opened");
        let open = OpenDevice { device, used: Arc::new(Mutex::new(Instant::now())) };
        Ok(self.lock().entry(*uuid).or_insert(open).clone())
    }

    /// Lets go of devices that nothing was loaded to for so long; whether none is left.
    pub(crate) fn sweep(&self, idle: Duration) -> bool {
        let mut gone = Vec::new();
        let mut devices = self.lock();
        devices.retain(|_, open| {
            let used = *open.used.lock().unwrap_or_else(PoisonError::into_inner);
            // The table's own is the last one.
            let stays = Arc::strong_count(&open.used) > 1 || used.elapsed() < idle;
            if !stays {
                gone.push(open.clone());
            }
            stays
        });
        let none_left = devices.is_empty();
        drop(devices);
        for open in gone {
            tracing::info!(device = %open.device.id(), "let go, since it was idle");
        }
        none_left
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Uuid, OpenDevice>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_device_is_let_go_and_one_in_use_is_not() {
        let driver = cuda::Driver::load();
        driver.set_devices(2);
        let uuid = Device::cuda(1).unwrap().uuid().unwrap().unwrap();
        let released = || driver.count("cuDevicePrimaryCtxRelease");
        let before = released();
        let devices = Devices::default();
        let used = devices.open(&uuid).unwrap();
        assert_eq!(used.device().id(), "cuda:1");
        assert!(!devices.sweep(Duration::ZERO));
        assert_eq!(released(), before, "it is in use");
        drop((used, devices.open(&uuid).unwrap()));
        assert!(!devices.sweep(Duration::from_secs(3600)));
        assert_eq!(released(), before, "it was used just now");
        assert!(devices.sweep(Duration::ZERO));
        assert_eq!(released(), before + 1);
        devices.open(&uuid).unwrap();
    }

    #[test]
    fn a_device_that_is_not_there_is_not_found() {
        let driver = cuda::Driver::load();
        assert_eq!(Devices::default().open(&[0xab; 16]).unwrap_err().code(), Code::NotFound);
        driver.set_devices(0);
        assert_eq!(Devices::default().open(&[0xab; 16]).unwrap_err().code(), Code::NotFound);
    }
}
