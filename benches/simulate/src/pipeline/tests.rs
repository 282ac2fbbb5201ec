//! Small pipelines whose times can be counted by hand.

use super::*;

const LEN: u64 = 1_000_000;

/// A host on which a piece takes: 1 ms to read from the cache, 2 from the disk, 3 to copy, 4 to verify; nothing else
/// takes time.
fn host() -> Host {
    let endless = f64::INFINITY;
    Host {
        name: String::new(),
        cpus: 4,
        gpus: 1,
        link: 1e9 / 3.0,
        copy_overhead: 0.0,
        copy_issue: 0.0,
        read_each: 1e9,
        memory: endless,
        cache_len: endless,
        checksum: 1e9 / 4.0,
        disk: 1e9 / 2.0,
        disk_latency: 0.0,
        pin_each: endless,
        pin_total: endless,
        register: 1e9 / 5.0,
        release: endless,
        setup: 0.0,
        spawn: 0.0,
    }
}

fn share(engine: Engine, lanes: usize, buffers: usize, pieces: usize) -> Share {
    let way = Way { engine, lanes, buffers, piece_len: LEN, verify: false, batch: 1 };
    let piece = |number| Piece { len: LEN, copies: vec![(0, LEN)], window: (0, number / 4), place: 0.0..1.0 };
    Share { way, from: From::Cache, pieces: (0..pieces as u64).map(piece).collect(), first_device: 0 }
}

/// Milliseconds, to the nanosecond.
fn ms(host: &Host, shares: &[Share]) -> f64 {
    (seconds(host, shares) * 1e9).round() / 1e6
}

#[test]
fn one_lane_with_one_buffer_overlaps_nothing() {
    assert_eq!(ms(&host(), &[share(Engine::Pread, 1, 1, 10)]), 10.0 * (1.0 + 3.0));
}

#[test]
fn with_two_buffers_the_slower_stage_is_all_that_counts() {
    assert_eq!(ms(&host(), &[share(Engine::Pread, 1, 2, 10)]), 1.0 + 10.0 * 3.0);
    let slow_reads = Host { read_each: 1e9 / 7.0, ..host() };
    assert_eq!(ms(&slow_reads, &[share(Engine::Pread, 1, 2, 10)]), 10.0 * 7.0 + 3.0);
}

#[test]
fn an_endless_link_leaves_the_reading_which_lanes_share() {
    let host = Host { link: f64::INFINITY, ..host() };
    assert_eq!(ms(&host, &[share(Engine::Pread, 1, 2, 12)]), 12.0);
    assert_eq!(ms(&host, &[share(Engine::Pread, 4, 2, 12)]), 3.0);
    let narrow = Host { memory: 2e9, ..host };
    assert_eq!(ms(&narrow, &[share(Engine::Pread, 4, 2, 12)]), 6.0);
}

#[test]
fn a_ring_out_of_the_cache_crosses_the_memory_four_times() {
    let host = Host { link: f64::INFINITY, memory: 4e9, cache_len: 7.0 * LEN as f64, ..host() };
    assert_eq!(ms(&host, &[share(Engine::Pread, 3, 2, 12)]), 4.0);
    assert_eq!(ms(&host, &[share(Engine::Pread, 4, 2, 12)]), 12.0);
}

#[test]
fn a_checksum_is_the_threads_work_and_lanes_take_it_side_by_side() {
    let mut verified = share(Engine::Pread, 1, 2, 12);
    verified.way.verify = true;
    assert_eq!(ms(&host(), &[verified.clone()]), 12.0 * (1.0 + 4.0) + 3.0);
    verified.way.lanes = 4; // 5 ms of work a lane, in which the link moves one piece and two thirds
    assert_eq!(ms(&host(), &[verified]), 5.0 + 12.0 * 3.0);
}

#[test]
fn a_disk_gives_its_rate_however_many_reads_are_in_flight() {
    let host = Host { link: 1e9, ..host() };
    for (lanes, depth) in [(1, 2), (1, 4), (2, 4)] {
        let mut cold = share(Engine::Uring { depth }, lanes, depth + 4, 40);
        cold.from = From::Disk;
        assert_eq!(ms(&host, &[cold]), 40.0 * 2.0 + 1.0);
    }
    let mut threads = share(Engine::Pread, 1, 2, 40);
    threads.from = From::Disk;
    assert_eq!(ms(&host, &[threads]), 40.0 * 2.0 + 1.0);
}

#[test]
fn latency_is_hidden_by_reads_in_flight_and_not_by_one() {
    let host = Host { link: f64::INFINITY, disk_latency: 2e-3, ..host() };
    let mut one = share(Engine::Uring { depth: 1 }, 1, 4, 10);
    one.from = From::Disk;
    assert_eq!(ms(&host, &[one.clone()]), 10.0 * 4.0);
    one.way.engine = Engine::Uring { depth: 8 };
    one.way.buffers = 12;
    assert_eq!(ms(&host, &[one]), 10.0 * 2.0 + 2.0);
}

#[test]
fn windows_are_registered_while_the_pages_before_are_copied_and_released_in_the_end() {
    // Two windows of four pieces: 20 ms to register, 12 to copy.
    assert_eq!(ms(&host(), &[share(Engine::Mapped, 1, 0, 8)]), 20.0 + 20.0 + 12.0);
    let host = Host { release: 8e9 / 10.0, ..host() };
    assert_eq!(ms(&host, &[share(Engine::Mapped, 1, 0, 8)]), 52.0 + 10.0);
}

#[test]
fn devices_have_links_of_their_own() {
    let mut two = share(Engine::Pread, 4, 2, 12);
    for (number, piece) in two.pieces.iter_mut().enumerate() {
        piece.copies[0].0 = number % 2;
    }
    let one_link = ms(&host(), &[share(Engine::Pread, 4, 2, 12)]);
    assert_eq!(one_link, 1.0 + 12.0 * 3.0);
    assert_eq!(ms(&host(), &[two]), 1.0 + 6.0 * 3.0);
    let mut other = share(Engine::Pread, 4, 2, 12);
    other.first_device = 1;
    assert_eq!(ms(&host(), &[share(Engine::Pread, 4, 2, 12), other]), one_link);
}

#[test]
fn pinning_comes_before_the_first_read_of_a_buffer() {
    let host = Host { pin_each: 2e9, pin_total: 2e9, ..host() };
    // Two buffers in one step, 1 ms; the copies are the slower stage, so that nothing else is seen of it.
    assert_eq!(ms(&host, &[share(Engine::Pread, 1, 2, 10)]), 1.0 + 1.0 + 10.0 * 3.0);
}

#[test]
fn copies_and_their_issue_cost_what_they_do_each() {
    let host = Host { copy_overhead: 1e-3, copy_issue: 5e-4, setup: 7e-3, ..host() };
    assert_eq!(ms(&host, &[share(Engine::Pread, 1, 1, 10)]), 7.0 + 10.0 * (1.0 + 0.5 + 1.0 + 3.0));
}

#[test]
fn a_batch_rests_once_and_its_buffers_come_back_at_its_end() {
    let host = Host { copy_overhead: 1e-3, ..host() };
    let one = |buffers, batch| {
        let mut one = share(Engine::Pread, 1, buffers, 10);
        one.way.batch = batch;
        ms(&host, &[one])
    };
    assert_eq!(one(10, 1), 1.0 + 10.0 + 10.0 * 3.0);
    // Pieces 1, 2, 3 to 5, 6 to 9, 10.
    assert_eq!(one(10, 4), 1.0 + 5.0 + 10.0 * 3.0);
    // 1, 2, 3 and 4, 5, 6, 7 and 8, 9, 10.
    assert_eq!(one(3, 4), 1.0 + 8.0 + 10.0 * 3.0);
    // When the next piece is there, one batch is left.
    assert_eq!(one(2, 4), one(2, 1));
}

#[test]
fn a_lane_that_waits_for_a_piece_issues_it_and_others_wait_for_that() {
    let host = Host { copy_overhead: 1e-3, copy_issue: 1e-3, ..host() };
    let mut lanes = share(Engine::Pread, 4, 2, 10);
    lanes.way.batch = 8;
    // 1, 2, then 3 to 5 by the third lane, which waits for 3; 6 to 8 by the first, which waits for its last; 9; 10.
    assert_eq!(ms(&host, &[lanes]), 1.0 + 1.0 + 6.0 + 10.0 * 3.0);
}
