//! GPUs that cannot be opened, over the test double of the driver: what needs none of them works all the same.

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use std::time::Duration;

use common::{Served, models};
use cuda::Driver;
use gpu::{load_to_gpu, load_to_host, pool};

const LEN: usize = 9_000_123;
const OUT_OF_MEMORY: u32 = 2;
const PAUSE: Duration = Duration::from_millis(5);

/// Not a test of its own: the other process.
#[test]
fn owner() {
    gpu::own();
}

fn fill(models: &std::path::Path) {
    models::safetensors(models, "m", 1, LEN);
}

#[tokio::test(flavor = "multi_thread")]
async fn where_no_gpu_can_be_opened_the_host_is_loaded_to_and_a_later_load_to_a_gpu_pins() {
    let driver = Driver::load();
    driver.set_devices(2);
    for nth in 1..50 {
        driver.fail("cuDevicePrimaryCtxRetain", nth, OUT_OF_MEMORY);
    }
    let served = Served::start(fill, |_| ());
    load_to_host(&served, "m").await;
    let now = pool(&served).await;
    assert!(now.page_locked == 0 && now.refusal.contains("cuda:0: cannot retain its primary context"), "{now:?}");
    load_to_gpu(&served, "m", 1).await.unwrap_err();
    load_to_host(&served, "m").await;

    driver.reset();
    driver.set_devices(2);
    load_to_gpu(&served, "m", 1).await.unwrap();
    let now = pool(&served).await;
    assert!(now.page_locked >= now.resident && now.refusal.is_empty(), "{now:?}");
    assert_eq!(driver.pageable_copies(), 0, "something was copied out of unpinned memory");
    load_to_gpu(&served, "m", 0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gpu_that_cannot_be_opened_leaves_the_pool_to_the_next_one() {
    let driver = Driver::load();
    driver.set_devices(2);
    driver.fail("cuDevicePrimaryCtxRetain", 1, OUT_OF_MEMORY);
    let served = Served::start(fill, |_| ());
    load_to_host(&served, "m").await;
    let mut now = pool(&served).await;
    while now.page_locked < now.capacity {
        assert_eq!(now.refusal, "");
        tokio::time::sleep(PAUSE).await;
        now = pool(&served).await;
    }
    assert_eq!(driver.count("cuDevicePrimaryCtxRetain"), 2, "the second GPU is asked after the first, and no more");
}
