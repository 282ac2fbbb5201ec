"""The client that the original publishes, unchanged, drives our server."""

from __future__ import annotations

import ast
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import conftest
import grpc
import pytest
import sllm_store
from checkpoints import Tensor
from conftest import CHUNK, MODELS, ORIGINAL, POOL, STORE, Server
from gpu import UNTOUCHED, Gpu, Memory
from sllm_store.client import SllmStoreClient
from sllm_store.proto import storage_pb2

# What the server must do at once, it does in this time, in seconds; the client itself would wait for ever.
AT_ONCE = 10

Content = dict[str, dict[str, Tensor]]


def _of_the_original(name: str) -> Callable[..., Any]:
    """A function of `sllm_store.utils`, which cannot be imported without torch and accelerate."""
    source = Path(sllm_store.__path__[0], "utils.py")
    found = [node for node in ast.parse(source.read_text()).body if getattr(node, "name", None) == name]
    namespace: dict[str, Any] = {}
    exec(compile(ast.Module(found, []), str(source), "exec"), namespace)
    return namespace[name]


@dataclass
class Plan:
    """What the original's `load_dict` asks for, for tensors on these devices."""

    memory: dict[int, Memory]
    offsets: dict[int, dict[str, int]]
    chunks: dict[str, list[tuple[int, int, int, int]]]
    handles: dict[str, list[bytes]]

    def check(self, content: dict[str, Tensor]) -> None:
        """Every tensor is in its place, bit by bit."""
        for device, memory in self.memory.items():
            data = memory.read()
            for name, offset in self.offsets[device].items():
                expected = content[name].data
                assert data[offset : offset + len(expected)] == expected, name

    def check_untouched(self) -> None:
        for memory in self.memory.values():
            data = memory.read()
            assert data == bytes([UNTOUCHED]) * len(data)


def plan(directory: Path, gpus: list[Gpu], device_of: Callable[[str], int] = lambda _: 0) -> Plan:
    with open(directory / "tensor_index.json") as file:
        index = {name: (offset, size) for name, (offset, size, *_) in json.load(file).items()}
    device_map = {name: device_of(name) for name in index}
    sizes = _of_the_original("calculate_device_memory")(device_map, index)
    offsets, chunks = _of_the_original("calculate_tensor_device_offsets")(device_map, index)
    memory = {device: gpus[device].alloc(size) for device, size in sizes.items()}
    return Plan(
        memory,
        offsets,
        {gpus[device].uuid: list(of_device) for device, of_device in chunks.items()},
        {gpus[device].uuid: [block.handle] for device, block in memory.items()},
    )


@pytest.fixture
def planned(server: Server, gpus: list[Gpu]) -> Iterator[Callable[..., Plan]]:
    """Plans loads of a model of the server, and frees their memory in the end."""
    plans: list[Plan] = []

    def make(model: str, device_of: Callable[[str], int] = lambda _: 0) -> Plan:
        plans.append(plan(server.storage / model, gpus, device_of))
        return plans[-1]

    yield make
    for made in plans:
        for memory in made.memory.values():
            memory.free()


def load(client: SllmStoreClient, model: str, plan: Plan) -> str:
    """Asks for a replica, as `load_dict_non_blocking` does."""
    replica = str(uuid.uuid4())
    response = client.load_into_gpu(model, replica, plan.chunks, plan.handles)
    assert response and response.model_path == model
    return replica


def confirm(client: SllmStoreClient, model: str, replica: str) -> grpc.StatusCode:
    """The code that `ConfirmModel` ends with, which the client does not tell."""
    request = storage_pb2.ConfirmModelRequest(
        model_path=model, replica_uuid=replica, target_device_type=storage_pb2.DEVICE_TYPE_GPU
    )
    try:
        client.stub.ConfirmModel(request, timeout=AT_ONCE)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def clear(client: SllmStoreClient) -> None:
    client.stub.ClearMem(storage_pb2.ClearMemRequest(), timeout=AT_ONCE)


def size(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("tensor.data_*"))


@pytest.mark.parametrize("model", MODELS)
def test_load_dict_gets_every_tensor(
    client: SllmStoreClient, planned: Callable[..., Plan], content: Content, model: str
) -> None:
    assert client.load_into_cpu(model).model_path == model
    wanted = planned(model)
    replica = load(client, model, wanted)
    # `None` is its success.
    assert client.confirm_model_loaded(model, replica) is None
    wanted.check(content[model])
    assert {name for of_device in wanted.offsets.values() for name in of_device} == set(content[model])


@pytest.mark.parametrize("model", MODELS)
def test_a_load_into_a_gpu_needs_no_load_into_memory_before_it(
    client: SllmStoreClient, planned: Callable[..., Plan], content: Content, model: str
) -> None:
    wanted = planned(model)
    assert client.confirm_model_loaded(model, load(client, model, wanted)) is None
    wanted.check(content[model])
    # It is in memory now.
    assert client.unload_from_cpu(model)


@pytest.mark.parametrize("model", MODELS)
def test_tensors_go_to_several_gpus(
    client: SllmStoreClient, planned: Callable[..., Plan], content: Content, model: str
) -> None:
    wanted = planned(model, lambda name: len(name) % conftest.DEVICES)
    assert len(wanted.memory) == conftest.DEVICES
    assert client.load_into_cpu(model)
    assert client.confirm_model_loaded(model, load(client, model, wanted)) is None
    # The original looks for a tied tensor on the device of the one that it is tied to, whatever the map says.
    kept = {name: content[model][name] for name in content[model] if name not in conftest.TIED}
    for of_device in wanted.offsets.values():
        for name in conftest.TIED:
            of_device.pop(name, None)
    wanted.check(kept)


@pytest.mark.parametrize("model", MODELS)
def test_registering_tells_the_bytes_of_the_data_files_every_time(
    client: SllmStoreClient, server: Server, model: str
) -> None:
    expected = size(server.storage / model)
    assert expected > 0
    assert [client.register_model(model) for _ in range(2)] == [expected] * 2
    assert client.register_model("missing") == -1


def test_the_configuration_is_that_of_the_flags(start: Callable[..., Server]) -> None:
    assert start().client().get_server_config() == {"chunk_size": CHUNK, "mem_pool_size": POOL}
    other = start("--chunk-size", "8MB", "--num-thread", "2", pool="96MB")
    assert other.client().get_server_config() == {"chunk_size": 8 << 20, "mem_pool_size": 96 << 20}


@pytest.mark.parametrize("model", MODELS)
def test_what_is_unloaded_can_be_loaded_again(
    client: SllmStoreClient, planned: Callable[..., Plan], content: Content, model: str
) -> None:
    assert client.unload_from_cpu(model) is False, "it was never loaded"
    for _ in range(2):
        assert client.load_into_cpu(model)
        # While it is being read, or after.
        assert client.unload_from_cpu(model).model_path == model
        assert client.unload_from_cpu(model) is False
        wanted = planned(model)
        assert client.confirm_model_loaded(model, load(client, model, wanted)) is None
        wanted.check(content[model])
        assert client.unload_from_cpu(model)


def test_clearing_drops_all_models_and_loads_go_on(
    client: SllmStoreClient, planned: Callable[..., Plan], content: Content
) -> None:
    for model in MODELS:
        assert client.load_into_cpu(model)
        assert client.confirm_model_loaded(model, load(client, model, planned(model))) is None
    clear(client)
    for model in MODELS:
        assert client.unload_from_cpu(model) is False
    # With nothing in memory, and while a load runs.
    clear(client)
    for model in MODELS:
        wanted = planned(model)
        assert client.load_into_cpu(model)
        replica = load(client, model, wanted)
        clear(client)
        assert client.confirm_model_loaded(model, replica) is None
        wanted.check(content[model])


def test_confirming_what_was_never_asked_for_fails_at_once(
    client: SllmStoreClient, planned: Callable[..., Plan]
) -> None:
    replica = str(uuid.uuid4())
    assert confirm(client, "missing", replica) == grpc.StatusCode.NOT_FOUND
    assert confirm(client, STORE, replica) == grpc.StatusCode.NOT_FOUND
    client.register_model(STORE)
    assert confirm(client, STORE, replica) == grpc.StatusCode.NOT_FOUND
    assert client.load_into_cpu(STORE)
    known = load(client, STORE, planned(STORE))
    assert confirm(client, STORE, replica) == grpc.StatusCode.NOT_FOUND
    assert confirm(client, ORIGINAL, known) == grpc.StatusCode.NOT_FOUND
    assert client.confirm_model_loaded(STORE, replica) is False
    assert client.confirm_model_loaded(STORE, known) is None


def test_an_unknown_model_is_refused_by_every_call(client: SllmStoreClient, planned: Callable[..., Plan]) -> None:
    wanted = planned(STORE)
    for model in ("missing", "", "../models/store", "/etc", "vllm", f"{STORE}/tensor.data_0"):
        assert client.load_into_cpu(model) is False, model
        replica = str(uuid.uuid4())
        assert client.load_into_gpu(model, replica, wanted.chunks, wanted.handles) is False, model
        assert client.unload_from_cpu(model) is False, model
        assert client.register_model(model) == -1, model
        assert client.confirm_model_loaded(model, replica) is False, model
    wanted.check_untouched()


def test_a_request_that_cannot_be_fails_and_confirming_it_does_not_wait(
    client: SllmStoreClient, planned: Callable[..., Plan], content: Content, server: Server
) -> None:
    wanted = planned(STORE)
    (device,) = wanted.chunks
    length, (handle,) = size(server.storage / STORE), wanted.handles[device]
    room = sum(chunk[1] for chunk in wanted.chunks[device])
    elsewhere = str(uuid.uuid4())
    assert client.load_into_cpu(STORE)
    refused: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("a handle that was cut", wanted.chunks, {device: [handle[:63]]}),
        ("an empty handle", wanted.chunks, {device: [b""]}),
        ("a handle of nothing", wanted.chunks, {device: [b"\x01" * 64]}),
        ("no handles", wanted.chunks, {device: []}),
        ("no chunks", {}, {}),
        ("handles of another device", wanted.chunks, {elsewhere: [handle]}),
        ("a device that is not there", {elsewhere: wanted.chunks[device]}, {elsewhere: [handle]}),
        ("beyond the model's end", {device: [(length - 1, 2, 0, 0)]}, wanted.handles),
        ("beyond the memory's end", {device: [(0, 2, room - 1, 0)]}, wanted.handles),
        ("a sum that overflows", {device: [(2**64 - 1, 2**64 - 1, 2**64 - 1, 0)]}, wanted.handles),
        ("a second handle", {device: [(0, 1, 0, 1)]}, wanted.handles),
    ]
    for what, chunks, handles in refused:
        replica = str(uuid.uuid4())
        assert client.load_into_gpu(STORE, replica, chunks, handles) is False, what
        assert confirm(client, STORE, replica) == grpc.StatusCode.NOT_FOUND, what
    wanted.check_untouched()
    # The server is as well as it was.
    assert client.confirm_model_loaded(STORE, load(client, STORE, wanted)) is None
    wanted.check(content[STORE])


def test_a_model_must_be_registered_where_the_server_asks_for_it(start: Callable[..., Server]) -> None:
    client = start("--registration-required", "True").client()
    assert client.load_into_cpu(STORE) is False
    assert client.register_model(STORE) > 0
    assert client.load_into_cpu(STORE)
    clear(client)
    assert client.load_into_cpu(STORE) is False, "clearing forgets registrations"


def test_a_model_larger_than_the_pool_arrives(
    start: Callable[..., Server], gpus: list[Gpu], content: Content
) -> None:
    server = start(pool="8MB")
    client = server.client()
    assert size(server.storage / STORE) > 8 << 20
    wanted = plan(server.storage / STORE, gpus)
    try:
        for _ in range(2):
            assert client.confirm_model_loaded(STORE, load(client, STORE, wanted)) is None
            wanted.check(content[STORE])
    finally:
        wanted.memory[0].free()


def test_a_model_that_was_cut_is_an_error_and_its_replacement_is_loaded(
    start: Callable[..., Server], gpus: list[Gpu], content: Content, storage: Path, tmp_path: Path
) -> None:
    own = tmp_path / "models"
    shutil.copytree(storage / ORIGINAL, own / ORIGINAL)
    client = start(storage=own).client()
    wanted = plan(own / ORIGINAL, gpus)
    try:
        assert client.confirm_model_loaded(ORIGINAL, load(client, ORIGINAL, wanted)) is None
        wanted.check(content[ORIGINAL])
        last = max((own / ORIGINAL).glob("tensor.data_*"))
        whole = last.read_bytes()
        last.write_bytes(whole[:-1000])
        assert client.load_into_cpu(ORIGINAL) is False
        replica = str(uuid.uuid4())
        assert client.load_into_gpu(ORIGINAL, replica, wanted.chunks, wanted.handles) is False
        assert confirm(client, ORIGINAL, replica) == grpc.StatusCode.NOT_FOUND
        changed = bytes(byte ^ 0xFF for byte in whole)
        last.write_bytes(changed)
        assert client.load_into_cpu(ORIGINAL)
        assert client.confirm_model_loaded(ORIGINAL, load(client, ORIGINAL, wanted)) is None
        (device,) = wanted.chunks
        data = b"".join((own / ORIGINAL / f"tensor.data_{n}").read_bytes() for n in range(int(last.name[-1]) + 1))
        assert data.endswith(changed)
        loaded = wanted.memory[0].read()
        for source, length, target, _ in wanted.chunks[device]:
            assert loaded[target : target + length] == data[source : source + length]
    finally:
        wanted.memory[0].free()


def test_ranks_load_at_once(
    server: Server, planned: Callable[..., Plan], content: Content
) -> None:
    ranks = [(server.client(), model, planned(model, lambda _, rank=rank: rank % conftest.DEVICES))
             for rank in range(4) for model in MODELS]  # fmt: skip

    def run(rank: tuple[SllmStoreClient, str, Plan]) -> Any:
        client, model, wanted = rank
        assert client.load_into_cpu(model)
        return client.confirm_model_loaded(model, load(client, model, wanted))

    with ThreadPoolExecutor(len(ranks)) as pool:
        assert list(pool.map(run, ranks)) == [None] * len(ranks)
    for _, model, wanted in ranks:
        wanted.check(content[model])
