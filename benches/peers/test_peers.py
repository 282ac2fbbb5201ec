"""Tests of the comparison itself: that its states are what they say, and its tables say what was measured."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cache
import inputs
import limits
import table
from loaders import LOADERS
from results import Results

HERE = os.path.dirname(os.path.abspath(__file__))
READY = ("ready_s", "after_first_line_s", "weights_s", "model_s")


def run(name: str, rate: float, *, state: str = "warm", number: int = 0, **more: Any) -> dict[str, Any]:
    common = {"model": "many:1", "state": state, "cpus": None, "name": name, "round": number}
    return {**common, "seconds": 1.0, "bytes": int(rate * 1e9), "tensors": 4, **more}


def data(*runs: dict[str, Any]) -> dict[str, Any]:
    host = {"device": "X", "cpus": 2, "cpu": "Y", "memory_GiB": 1, "system": "Z"}
    return {"host": host, "versions": {"torch": "1", "serverless_llm": "2"}, "runs": list(runs)}


def test_models_have_the_tensors_that_they_are_named_for() -> None:
    shapes = inputs.shapes_of("llama8b")
    assert len(shapes) == 291 and sum(inputs.length(shape) for _, shape in shapes) == 16_060_522_496
    shapes = inputs.shapes_of("qwen3-30b-a3b")
    assert len(dict(shapes)) == 18_867 and sum(inputs.length(shape) for _, shape in shapes) == 61_064_245_248
    assert len(inputs.shapes_of("qwen3-30b-a3b:6")) == 3 + 6 * (18_867 - 3) // 48
    for model, count in (("many:8:18864", 18_864), ("many:8", 3388)):
        shapes = inputs.shapes_of(model)
        assert len(dict(shapes)) == count
        assert abs(sum(inputs.length(shape) for _, shape in shapes) / 8e9 - 1) < 0.01
    for bad in ("many", "many:x", "llama", "llama8b:x", "qwen3-30b-a3b:1:1"):
        with pytest.raises(SystemExit):
            inputs.shapes_of(bad)


def test_shards_keep_every_tensor_in_its_order() -> None:
    shapes = inputs.shapes_of("llama8b")
    shards = list(inputs.in_shards(shapes))
    assert [item for shard in shards for item in shard] == shapes
    assert len(shards) == 4
    assert all(sum(inputs.length(shape) for _, shape in shard) <= inputs.SHARD_LEN for shard in shards)


def test_files_are_what_the_library_reads_and_the_same_each_time(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    shapes = inputs.shapes_of("many:0.02:40")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for name in ("a", "b"):
        inputs.write_source(str(tmp_path / name), shapes)
    (file,) = inputs.data_files(str(tmp_path / "a"))
    assert Path(file).read_bytes() == Path(inputs.data_files(str(tmp_path / "b"))[0]).read_bytes()
    tensors = load_file(file)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dict(shapes)
    assert len({tensor.view(torch.int16).numpy().tobytes() for tensor in tensors.values()}) == len(shapes)
    for tensor in tensors.values():
        low, high = (1, 1.25) if tensor.dim() == 1 else (1 / 128, 1 / 32)
        assert bool((low <= tensor.abs()).all()) and bool((tensor.abs() < high).all())
        assert tensor.dim() == 1 or abs(float(tensor.float().mean())) < 0.001


def test_the_page_cache_holds_what_the_state_says(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(os.urandom(8 << 20))
    if why := cache.refusal():
        pytest.skip(why)
    for state, low, high in (("warm", 1, 1), ("cold", 0, 0), ("half", 0.49, 0.51), ("warm", 1, 1)):
        try:
            share = cache.set_state([str(path)], state)
        except RuntimeError as e:
            pytest.skip(f"a file system that keeps its pages: {e}")
        assert low <= share <= high
        assert share == cache.cached_share([str(path)])


def test_raw_reads_go_into_private_memory_of_huge_pages() -> None:
    memory = limits.huge_memory(3 << 20, touched=True)
    place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert place % limits.HUGE == 0 and len(memory) == 3 << 20
    mappings = Path("/proc/self/smaps").read_text().split("VmFlags:")
    for fields, flags in zip(mappings, (text.splitlines()[0].split() for text in mappings[1:]), strict=False):
        ends = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) ", fields, re.MULTILINE)[-1]
        if int(ends[0], 16) <= place < int(ends[1], 16):
            assert "sh" not in flags, "shared memory gets no huge pages"
            assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").exists()
            return
    raise AssertionError("the memory is in no mapping")


@pytest.mark.parametrize("fresh", [False, True])
def test_raw_reads_count_every_byte(tmp_path: Path, fresh: bool) -> None:
    size = limits.PIECE * 5 + 4096
    (tmp_path / "a.safetensors").write_bytes(bytes(size))
    assert limits.read(str(tmp_path), False, 3, fresh, 1e9)["bytes"] == size
    assert limits.read(str(tmp_path), False, 2, fresh, 2.5 * limits.PIECE)["bytes"] == 3 * limits.PIECE


def test_only_loads_to_the_host_stand_beside_reads_to_fresh_memory() -> None:
    names = {cuda: list(limits.limits_of("cold", cuda, [4])) for cuda in (True, False)}
    assert names[True] == ["floor, buffered, 4 threads", "floor, direct, 4 threads"]
    assert names[False] == names[True] + [name + ", to fresh memory" for name in names[True]]


def test_limits_stand_beside_the_loads_that_they_bound() -> None:
    floors = [("floor, buffered, 4 threads", 2.0), ("floor, direct, 4 threads", 1.0)]
    runs = [run("copy peak", 50.0)]
    runs += [run(name, rate, state=state) for name, rate in floors for state in ("cold", "half")]
    runs += [run("copy peak", 50.0, state="half")]
    warm, cold, half = table.groups(data(*runs))
    assert [group.state for group in (warm, cold, half)] == ["warm", "cold", "half"]
    assert warm.limit() == (50.0, "one pinned copy of 1 GiB")
    assert (cold.limit() or (0, ""))[0] == 2.0
    assert (half.limit() or (0, ""))[0] == 4.0
    assert table.groups(data(run("ours-store", 1.0)))[0].limit() is None


def test_a_table_has_medians_and_says_what_is_wrong_or_missing() -> None:
    ours = [run("ours-store", rate, number=number) for number, rate in enumerate((30.0, 10.0, 20.0))]
    ours[0]["wrong"] = 0
    ours[2] |= {"device_extra": 2_000_000, "report": {"pinned_bytes": 75_000_000}}
    rival = run("safetensors", 5.0, wrong=3, version="9")
    absent = {**run("runai", 1.0), "skipped": "no module"}
    failed = {**run("register file pages", 1.0), "failed": "refused"}
    for row in (absent, failed):
        del row["seconds"]
    lines = table.markdown(data(run("copy peak", 40.0), *ours, rival, absent, failed)).splitlines()
    beside = "2 MB of device memory; 75 MB pinned while it loads"
    assert f"| ours, store | **20.00** | 30.00 10.00 20.00 | 0.50 | equal | {beside} |" in lines
    assert "| safetensors 9 | **5.00** | 5.00 | 0.12 | 3 tensors wrong |  |" in lines
    assert "Not measured: runai-model-streamer: no module; register file pages: refused." in lines


def test_results_go_on_only_on_their_own_host(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    results = Results(out, "cpu", resume=False)
    results.add(run("ours-store", 1.0, wrong=0))
    with pytest.raises(SystemExit, match="already"):
        Results(out, "cpu", resume=False)
    again = Results(out, "cpu", resume=True)
    there = ("many:1", "warm", None, "ours-store")
    assert again.has((*there, 0)) and not again.has((*there, 1))
    assert again.verified("many:1", "ours-store") and not again.verified("many:1", "safetensors")
    assert not again.gave_up(*there)
    changed = json.loads(Path(out + ".json").read_text())
    changed["host"]["boot"] = "another"
    Path(out + ".json").write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="boot"):
        Results(out, "cpu", resume=True)


def test_one_command_measures_and_a_second_finds_it_done(tmp_path: Path) -> None:
    peers = ("ours-store", "ours-safetensors", "safetensors")
    command = [sys.executable, os.path.join(HERE, "peers.py"), str(tmp_path / "work"), "--models", "many:0.02"]
    command += ["--device", "cpu", "--states", "warm", "--repeat", "2", "--peers", ",".join(peers)]
    command += ["--out", str(tmp_path / "out")]
    first = subprocess.run([*command, "--budget", "0.001"], capture_output=True, text=True)
    assert first.returncode == 3, first.stderr
    second = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    measured = json.loads((tmp_path / "out.json").read_text())["runs"]
    order = [row["name"] for row in measured if row["name"] in LOADERS]
    assert order == 2 * list(peers)  # in turn
    assert [row["wrong"] for row in measured if "wrong" in row] == [0, 0, 0]
    third = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert third.returncode == 0, third.stderr
    assert json.loads((tmp_path / "out.json").read_text())["runs"] == measured


def test_starts_that_failed_are_no_part_of_the_medians_and_are_told() -> None:
    sys.path.insert(0, os.path.join(HERE, os.pardir, "vllm"))
    import ready

    def row(seconds: float | None, tokens: list[str] | None) -> dict[str, Any]:
        return {"state": "warm", "format": "auto", "tokens": tokens} | dict.fromkeys(READY, seconds)

    def cells(*rows: dict[str, Any]) -> list[str]:
        return [cell.strip() for cell in ready.table(list(rows)).splitlines()[-1].split("|")[3:-1]]

    assert cells(row(2.0, ["a"]), row(None, None), row(4.0, ["a"])) == ["2 of 3", *["3.00"] * 4, "equal"]
    assert cells(row(2.0, ["a"]), row(4.0, ["b"])) == ["2", *["3.00"] * 4, "DIFFER"]
    assert cells(row(None, None)) == ["0 of 1", *["-"] * 4, "none"]
