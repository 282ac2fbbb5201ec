//! A driver that is not ready when the server starts. A process of its own: the driver is initialised once.

mod common;
#[path = "common/gpu.rs"]
mod gpu;

use common::{Served, models};
use cuda::Driver;
use gpu::{load_to_gpu, load_to_host, pool};

const NOT_READY: u32 = 802;

/// Not a test of its own: the other process.
#[test]
fn owner() {
    gpu::own();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_driver_that_is_not_ready_is_asked_again_by_the_next_load_to_a_gpu() {
    let driver = Driver::load();
    for nth in 1..50 {
        driver.fail("cuInit", nth, NOT_READY);
    }
    let served = Served::start(|models| models::safetensors(models, "m", 1, 9_000_123), |_| ());
    load_to_host(&served, "m").await;
    let now = pool(&served).await;
    assert!(now.page_locked == 0 && now.refusal.contains("cannot initialise the driver"), "{now:?}");
    let error = load_to_gpu(&served, "m", 0).await.unwrap_err();
    assert!(error.message().contains("(802)"), "{error}");

    driver.reset();
    load_to_gpu(&served, "m", 0).await.unwrap();
    let now = pool(&served).await;
    assert!(now.page_locked >= now.resident && now.refusal.is_empty(), "{now:?}");
    assert_eq!(driver.pageable_copies(), 0, "something was copied out of unpinned memory");
}
