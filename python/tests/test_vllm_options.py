"""Options of the load format `serverless_llm`. vLLM itself is not needed."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import python

import serverless_llm as sllm
from serverless_llm.vllm._options import Options


def test_defaults() -> None:
    assert Options.of({}, {}) == Options()
    assert Options().load() == {
        "engine": "auto", "direct": None, "verify": False, "threads": None, "pinned_bytes": None,
        "server": "auto",
    }  # fmt: skip


def test_neither_vllm_nor_torch_is_imported() -> None:
    python(
        "import sys; sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from serverless_llm.vllm._options import Options; Options.of({'verify': True})"
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("road", "staging", "staging"),
        ("road", "deferred", "deferred"),
        ("engine", "mapped", "mapped"),
        ("direct", None, None),
        ("direct", "auto", None),
        ("direct", False, False),
        ("direct", "Yes", True),
        ("threads", 3, 3),
        ("threads", "auto", None),
        ("threads", "12", 12),
        ("pinned_bytes", "64MiB", 64 << 20),
        ("pinned_bytes", "64mb", 64 << 20),
        ("staging_bytes", "2GiB", 2 << 30),
        ("staging_bytes", " 3GB ", 3 << 30),
        ("staging_bytes", "5kib", 5 << 10),
        ("verify", "1", True),
        ("verify", "TRUE", True),
        ("prefetch", "no", False),
        ("server", "auto", "auto"),
        ("server", True, "auto"),
        ("server", "off", None),
        ("server", "OFF", None),
        ("server", False, None),
        ("server", "0", None),
        ("server", None, None),
        ("server", "unix:/run/s", "unix:/run/s"),
        ("server", "localhost:8073", "localhost:8073"),
        ("prefetch", "0", False),
    ],
)
def test_values(name: str, value: Any, expected: Any) -> None:
    assert getattr(Options.of({name: value}, {}), name) == expected
    if isinstance(value, str):
        from_environment = Options.of({}, {f"SERVERLESS_LLM_{name.upper()}": value})
        assert getattr(from_environment, name) == expected


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("road", "fast", "give one of auto, deferred, staging"),
        ("road", None, "give one of auto, deferred, staging"),
        ("road", ["staging"], "give one of auto, deferred, staging"),
        ("engine", "magic", "give one of auto, uring, pread, mapped"),
        ("direct", "maybe", "give true or false"),
        ("verify", 1, "give true or false"),
        ("verify", None, "give true or false"),
        ("verify", "auto", "give true or false"),
        ("threads", 0, "a number above 0"),
        ("threads", -1, "a number above 0"),
        ("threads", True, "a number above 0"),
        ("threads", 2.0, "a number above 0"),
        ("pinned_bytes", "MiB", "a size such as '512MiB'"),
        ("pinned_bytes", "0", "a size such as '512MiB'"),
        ("pinned_bytes", "-5MB", "a size such as '512MiB'"),
        ("pinned_bytes", "5 ZB", "a size such as '512MiB'"),
        ("pinned_bytes", "5KiBiB", "a size such as '512MiB'"),
        ("staging_bytes", "1.5GiB", "a size such as '512MiB'"),
        ("staging_bytes", None, "a size such as '512MiB'"),
        ("staging_bytes", "²GiB", "a size such as '512MiB'"),
    ],
)
def test_values_that_make_no_sense(name: str, value: Any, told: str) -> None:
    with pytest.raises(sllm.InvalidError) as error:
        Options.of({name: value}, {})
    assert str(error.value).startswith(f"model_loader_extra_config {name!r} is {value!r}; ")
    assert told in str(error.value)
    if isinstance(value, str):
        variable = f"SERVERLESS_LLM_{name.upper()}"
        with pytest.raises(sllm.InvalidError) as error:
            Options.of({}, {variable: value})
        assert str(error.value).startswith(f"{variable} is {value!r}; ") and told in str(error.value)


def test_an_unknown_key_is_refused_with_a_suggestion() -> None:
    with pytest.raises(sllm.InvalidError, match="unknown key 'stagging_bytes'; did you mean 'staging_bytes'?"):
        Options.of({"stagging_bytes": 1}, {})
    with pytest.raises(sllm.InvalidError, match="unknown key 'x'; there are road, engine, direct, threads"):
        Options.of({"verify": True, "x": 1}, {})
    with pytest.raises(sllm.InvalidError, match="unknown key 7"):
        Options.of({7: 1}, {})


@pytest.mark.parametrize("extra", [None, [], "road=staging", 5])
def test_what_is_no_object_is_refused(extra: Any) -> None:
    with pytest.raises(sllm.InvalidError, match="a JSON object is needed"):
        Options.of(extra, {})


def test_the_command_line_goes_before_the_environment() -> None:
    environment = {"SERVERLESS_LLM_ROAD": "staging", "SERVERLESS_LLM_THREADS": "3", "SERVERLESS_LLM_ENGINE": ""}
    options = Options.of(json.loads('{"road": "deferred", "verify": true}'), environment)
    assert (options.road, options.threads, options.engine, options.verify) == ("deferred", 3, "auto", True)
    # What is set on the command line is all that counts, also where the environment makes no sense.
    assert Options.of({"road": "auto"}, {"SERVERLESS_LLM_ROAD": "fast"}).road == "auto"


def test_the_process_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERLESS_LLM_STAGING_BYTES", "7MB")
    assert Options.of({}).staging_bytes == 7 << 20


# The loader over what vLLM's own one has, on one of so many ranks.
LOADER = """
import logging, sys, types
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore
loaders = "vllm.model_executor.model_loader"
for name in ("vllm", "vllm.logger", "vllm.model_executor", loaders, f"{loaders}.default_loader"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["vllm.logger"].init_logger = logging.getLogger
class DefaultModelLoader:
    def __init__(self, load_config):
        self.load_config = load_config
sys.modules[f"{loaders}.default_loader"].DefaultModelLoader = DefaultModelLoader
from serverless_llm.vllm import _door, _loader
for ranks in (None, 1, 2):
    if ranks is not None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=ranks - 1, world_size=ranks)
    found = [_door.ranks(), _door.is_first_rank()]
    for extra in ({}, {"direct": True}, {"direct": False}):
        config = types.SimpleNamespace(model_loader_extra_config=extra)
        # A new loader, as `reload_weights` makes it: of the engine it is told nothing.
        found.append(_loader.ServerlessLLMLoader(config)._load_options()["direct"])
    print(*found)
    if ranks is not None:
        torch.distributed.destroy_process_group()
"""


def test_more_than_one_rank_read_by_the_page_cache_unless_they_are_told_otherwise() -> None:
    pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    assert python(LOADER).stdout.splitlines() == [
        "1 True None True False",
        "1 True None True False",
        "2 False False True False",
    ]
