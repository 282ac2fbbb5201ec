//! Several devices, and those that are full, lost or not there.

use std::time::{Duration, Instant};

use sllm_core::{Checkpoint, Control, Device, DeviceError, Dtype, EngineChoice, Error, ErrorKind, LinkPeak, Loader};

use super::common::{Made, write_safetensors, write_sharded};
use super::{assert_nothing_left, driver, model};

#[test]
fn pieces_of_a_device_wait_for_no_other_device() {
    let driver = driver();
    driver.set_devices(2);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    // A file a device, so that no piece is of both: five pieces of 2 MiB, of which three wait, and then one.
    let first = [Made::new("a", Dtype::U8, &[9 << 20])];
    let second = [Made::new("b", Dtype::U8, &[1 << 20])];
    write_sharded(dir.path(), &[("1.safetensors", &first), ("2.safetensors", &second)]);
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    driver.set_delay(Duration::from_secs(5));
    // The lane waits for its first copy when the deadline passes.
    let control = Control::new().until(Instant::now() + Duration::from_secs(3));
    let devices = vec![Device::cuda(0).unwrap(), Device::cuda(1).unwrap()];
    let loader = Loader::builder().devices(devices).engine(EngineChoice::Mapped).threads(1).control(control);
    let placed = |info: &sllm_core::TensorInfo| usize::from(info.name == "b");
    let loaded = loader.build().unwrap().load_placed(&checkpoint, &sllm_core::Filter::all(), placed);
    loaded.unwrap_err();
    assert_eq!((driver.get("copies_h2d"), driver.count("cuMemcpyBatchAsync")), (3, 0));
    assert!((4 << 20..=5 << 20).contains(&driver.bytes_h2d()), "{} bytes", driver.bytes_h2d());
    assert_nothing_left(&driver);
}

#[test]
fn too_little_device_memory_is_said_before_anything_moves() {
    let driver = driver();
    driver.set_memory(30 << 20);
    let model = model();
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).build().unwrap();
    let error = loader.load(&Checkpoint::open(&model.source).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeviceMemory);
    assert!(matches!(error, Error::Device(DeviceError::OutOfMemory { need, free, .. }) if need > free));
    assert_eq!((driver.bytes_h2d(), driver.registered_peak()), (0, 0));
    assert_nothing_left(&driver);
}

#[test]
fn tensors_go_to_the_devices_that_they_are_placed_on() {
    let driver = driver();
    driver.set_devices(2);
    let model = model();
    let checkpoint = Checkpoint::open(&model.store).unwrap();
    let devices = vec![Device::cuda(0).unwrap(), Device::cuda(1).unwrap(), Device::host()];
    for engine in [EngineChoice::Pread, EngineChoice::Uring] {
        let loader = Loader::builder().devices(devices.clone()).engine(engine).build().unwrap();
        let place = |info: &sllm_core::TensorInfo| info.name.len() % 3;
        let loaded = loader.load_placed(&checkpoint, &sllm_core::Filter::all(), place).unwrap();
        for tensor in &model.tensors {
            let view = loaded.tensor(&tensor.name).unwrap();
            assert_eq!(view.device().id(), devices[tensor.name.len() % 3].id());
            assert!(view.to_vec().unwrap() == tensor.bytes, "{:?} by {engine}", tensor.name);
        }
    }
}

/// A file whose end is gone, and one lane: what was copied before that is seen tells the order of the reads.
#[test]
fn devices_are_served_in_turn_though_one_has_the_first_layers() {
    let driver = driver();
    driver.set_devices(2);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("model.safetensors");
    let tensors = [("a", 32 << 20), ("b", 16 << 20)].map(|(name, len)| Made::new(name, Dtype::U8, &[len]));
    write_safetensors(&path, &tensors, None);
    let copied = |several: bool| {
        let checkpoint = Checkpoint::open(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(33 << 20).unwrap();
        driver.reset();
        driver.set_devices(2);
        let devices = vec![Device::cuda(0).unwrap(), Device::cuda(1).unwrap()];
        let loader = Loader::builder().devices(devices).engine(EngineChoice::Pread).direct(Some(false)).threads(1);
        let placed = |info: &sllm_core::TensorInfo| usize::from(several && info.name == "b");
        let loaded = loader.build().unwrap().load_placed(&checkpoint, &sllm_core::Filter::all(), placed);
        assert_eq!(loaded.unwrap_err().kind(), ErrorKind::Io, "the file ends early");
        std::fs::write(&path, whole).unwrap();
        driver.bytes_h2d()
    };
    assert!(copied(false) >= 26 << 20, "one device is filled in the order of the file");
    assert!(copied(true) <= 6 << 20, "the first device was filled before the second");
}

#[test]
fn a_links_peak_is_measured_once_and_then_remembered() {
    let driver = driver();
    driver.set_devices(2);
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = dir.path().join("made/links.json");
    let device = Device::cuda(0).unwrap();
    let copies = || driver.get("copies_h2d");
    let peak = |device: &Device, seen: f64| LinkPeak::remembered(device, seen, &file).unwrap().unwrap();

    let first = peak(&device, 0.0);
    let measuring = copies();
    assert!(measuring >= 16 && first.gb_per_s > 0.0, "{measuring} copies, {first:?}");
    assert_eq!(driver.pageable_copies(), 0);
    assert_nothing_left(&driver);
    assert_eq!(peak(&device, 0.0), first);
    assert_eq!(peak(&device, first.gb_per_s), first, "what was seen is not more than the peak");
    assert_eq!(copies(), measuring, "it was measured again");

    // Another card is another link; both are remembered.
    let second = peak(&Device::cuda(1).unwrap(), 0.0);
    let both = copies();
    assert!(both > measuring);
    assert_eq!((peak(&device, 0.0), peak(&Device::cuda(1).unwrap(), 0.0)), (first, second));
    assert_eq!(copies(), both);

    // A link that carried more than its peak was measured while others used it.
    driver.reset();
    assert!(peak(&device, first.gb_per_s * 1.01).gb_per_s >= first.gb_per_s * 1.01);
    assert!(copies() > 0);
    // What it carried, it can carry, whatever measuring says.
    assert_eq!(peak(&device, 1e6).gb_per_s.to_bits(), 1e6f64.to_bits());
    assert!(peak(&device, 0.0).gb_per_s < 1e6, "only what was measured is remembered");

    // Nothing but what was written, and not too old or to come, is believed.
    let good = std::fs::read_to_string(&file).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let with = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut json: serde_json::Value = serde_json::from_str(&good).unwrap();
        json["links"].as_object_mut().unwrap().values_mut().for_each(change);
        json.to_string()
    };
    let bad = [
        String::new(),
        good[..good.len() / 2].into(),
        good.replace("\"version\":1", "\"version\":2"),
        with(&|link| link["gb_per_s"] = (-1.0).into()),
        with(&|link| link["gb_per_s"] = 0.0.into()),
        with(&|link| link["gb_per_s"] = "fast".into()),
        with(&|link| link["measured_at"] = (now - 31 * 24 * 3600).into()),
        with(&|link| link["measured_at"] = (now + 3600).into()),
        good.replace("0000:01:00.0", "0000:09:00.0"),
    ];
    for bad in bad {
        assert_ne!(bad, good);
        std::fs::write(&file, &bad).unwrap();
        driver.reset();
        let anew = peak(&device, 0.0);
        let measured = copies();
        assert!(measured > 0, "{bad} was believed");
        assert_eq!((peak(&device, 0.0), copies()), (anew, measured), "{bad} was not written anew");
    }
    assert_eq!(std::fs::read_dir(file.parent().unwrap()).unwrap().count(), 1, "something besides the file is left");

    // Where nothing can be written, it is measured each time.
    driver.reset();
    let nowhere = std::path::Path::new("/proc/sllm/links.json");
    assert!(LinkPeak::remembered(&device, 0.0, nowhere).unwrap().is_some() && copies() > 0);
    // And where nothing can be pinned, it is not known.
    driver.set_registered_total(4096);
    let unknown = LinkPeak::remembered(&device, 0.0, nowhere).unwrap_err();
    assert!(unknown.to_string().contains("the link of cuda:0"), "{unknown}");
    assert_nothing_left(&driver);
}

#[test]
fn a_device_that_is_not_there_is_named() {
    let driver = driver();
    driver.set_devices(1);
    let error = Device::cuda(7).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.to_string().contains("cuda:7"), "{error}");
}

#[test]
fn a_lost_device_is_an_error() {
    let driver = driver();
    let model = model();
    let loader = Loader::builder().device(Device::cuda(0).unwrap()).engine(EngineChoice::Pread).build().unwrap();
    driver.lose_after(4);
    let error = loader.load(&Checkpoint::open(&model.store).unwrap()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device, "{error}");
    driver.reset();
}
