"""The load format against the recorded versions of vLLM: what it calls, overrides and reads is still there.

No vLLM is needed; one that is installed is compared as well, from its files. A new version is recorded by
`data/record_vllm_door.py`.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "data"))

import record_vllm_door as recorder  # noqa: E402

from serverless_llm.vllm import _door  # noqa: E402

Record = dict[str, Any]

RECORDS: dict[str, Record] = json.loads(recorder.RECORDS.read_text())
ENTRY_POINTS = "vllm.general_plugins"

# What is read: of the loader, of its sources, and of the configurations.
ATTRIBUTES = {
    "BaseModelLoader": {"load_config"},
    "DefaultModelLoader": {"counter_before_loading_weights"},
    "DefaultModelLoader.Source": {"model_or_path", "revision", "prefix", "allow_patterns_overrides"},
    "LoadConfig": {"load_format", "model_loader_extra_config", "use_tqdm_on_load", "safetensors_load_strategy"},
    "ModelConfig": {"model", "quantization", "revision"},
}
# What is called, or called by vLLM, with the arguments that it is given in order.
CALLS = {
    "register_model_loader": ["load_format"],
    "init_logger": ["name"],
    "Platform.is_cuda": ["self"],
    "BaseModelLoader.load_weights": ["self", "model", "model_config"],
    "BaseModelLoader.download_model": ["self", "model_config"],
    # To find files for reading ahead.
    "DefaultModelLoader.__init__": ["self", "load_config"],
    # By `reload_weights`.
    "DefaultModelLoader.get_all_weights": ["self", "model_config", "model"],
}
# Which method must be called by which: only then do our own ones in their place have an effect.
REACHED = {
    "BaseModelLoader.load_model": "load_weights",
    "DefaultModelLoader.load_weights": "get_all_weights",
    "DefaultModelLoader.get_all_weights": "_get_weights_iterator",
}


def overridden() -> dict[str, tuple[list[str], bool]]:
    """The arguments of the methods of our loader, and whether they take any more that are passed on."""
    spec = importlib.util.find_spec("serverless_llm.vllm")
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).with_name("_loader.py").read_text())
    of = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "ServerlessLLMLoader")
    return {
        node.name: (recorder.signature(node)["arguments"], bool(node.args.vararg and node.args.kwarg))
        for node in of.body
        if isinstance(node, ast.FunctionDef)
    }


def problems(record: Record) -> list[str]:
    """What the load format needs and a version does not offer."""
    found = []
    for name, wanted in ATTRIBUTES.items():
        missing = wanted - set(record.get(name, {}).get("attributes", ()))
        found += [f"{name}.{attribute} is gone" for attribute in sorted(missing)]
    for name, arguments in CALLS.items():
        found += _call(record, name, arguments)
    for name, method in REACHED.items():
        if method not in record.get(name, {}).get("own_calls", ()):
            found.append(f"{name} does not call {method}")
    for method, (arguments, takes_more) in overridden().items():
        for of in ("DefaultModelLoader", "BaseModelLoader"):
            # A method of vLLM's that ours takes the place of.
            if f"{of}.{method}" in record:
                theirs = record[f"{of}.{method}"]
                known = theirs["arguments"][: len(arguments)] if takes_more else theirs["arguments"]
                if known != arguments or theirs.get("keyword_only") and not takes_more:
                    found.append(f"{of}.{method} takes {theirs}, ours {arguments}")
    if "_LOAD_FORMAT_TO_MODEL_LOADER" not in record:
        found.append("_LOAD_FORMAT_TO_MODEL_LOADER is gone")
    if record.get("DEFAULT_PLUGINS_GROUP") != {"value": ENTRY_POINTS}:
        found.append("the entry point group is another")
    # The filter of experts came after the oldest version: both parts of it are there, or neither.
    if ("should_skip_weight" in record) != ("local_expert_ids" in record.get("DefaultModelLoader", {})["attributes"]):
        found.append("one half of the filter of experts is gone")
    if "should_skip_weight" in record:
        found += _call(record, "should_skip_weight", ["weight_name", "local_expert_ids"])
    return found + _files(record)


def _call(record: Record, name: str, arguments: list[str]) -> list[str]:
    theirs = record.get(name)
    if theirs is None:
        return [f"{name} is gone"]
    more = theirs["arguments"][len(arguments) :]
    if theirs["arguments"][: len(arguments)] != arguments or len(more) > theirs["defaults"]:
        return [f"{name} takes {theirs['arguments']}, is given {arguments}"]
    return []


def _files(record: Record) -> list[str]:
    """`files_of` against loaders with this version's signature and result: of Mistral's layout, of none, and of a model
    that has patterns of its own."""
    theirs = record.get("DefaultModelLoader._prepare_weights")
    if theirs is None:
        return ["DefaultModelLoader._prepare_weights is gone"]
    found = []
    for has, patterns, expected in (
        ("mistral", None, ["mistral"]),
        ("safetensors", None, ["mistral", "safetensors"]),
        ("pt", ["*.x"], ["pt"]),
    ):
        found += _files_of(record, theirs, has, patterns, expected)
    return found


def _files_of(
    record: Record, theirs: Record, has: str, patterns: list[str] | None, formats: list[str]
) -> list[str]:
    """`files_of` where vLLM finds files in the load format `has` alone, and ought to be asked for `formats`."""
    given: dict[str, Any] = {}
    asked: list[str] = []
    names = theirs["arguments"][1:]
    scope: dict[str, Callable[..., None]] = {}
    made = ", ".join(f"{name!r}: {name}" for name in names)
    exec(f"def prepare(self, {', '.join(names)}): given.update({{{made}}})", {"given": given}, scope)

    class Loader:
        load_config = SimpleNamespace(load_format="safetensors")

        def _prepare_weights(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
            asked.append(self.load_config.load_format)
            scope["prepare"](self, *args, **kwargs)
            if asked[-1] != has:
                raise RuntimeError("Cannot find any model weights")
            # The folder, the files, whether they are safetensors, the index's name.
            return ("folder", ["b/2", "b-10", "a/2", "b-9"], True, "index")[: theirs["returns"][0]]

    Loader._prepare_weights.__wrapped__ = scope["prepare"]  # type: ignore[attr-defined]  # inspect.signature's
    fields = record["DefaultModelLoader.Source"]["attributes"]
    source = SimpleNamespace(**{field: f"the {field}" for field in fields})
    source.allow_patterns_overrides = patterns
    expected = {
        "model_name_or_path": "the model_or_path",
        "subfolder": "the subfolder",
        "revision": "the revision",
        "fall_back_to_pt": False,
        "allow_patterns_overrides": patterns,
    }
    loader = Loader()
    try:
        found = _door.files_of(loader, source)
        folder = _door.folder_of(source)
    except (TypeError, AttributeError, ValueError) as e:
        return [f"files_of: {e}"]
    wrong = [f"_prepare_weights gets {name} {value!r}" for name, value in given.items() if value != expected[name]]
    lost = set(expected) - set(given) - (set() if "subfolder" in fields else {"subfolder"})
    wrong += [f"_prepare_weights takes no {name}" for name in sorted(lost)]
    if asked != formats:
        wrong.append(f"_prepare_weights is asked for {asked}, not {formats}")
    if loader.load_config.load_format != "safetensors":
        wrong.append("files_of changes the loader")
    # As vLLM sorts them: by the numbers in their names.
    if found != ("folder", ["a/2", "b/2", "b-9", "b-10"], True):
        wrong.append(f"files_of gives {found}")
    if folder != ("the model_or_path/the subfolder" if "subfolder" in fields else "the model_or_path"):
        wrong.append(f"folder_of gives {folder}")
    return wrong


def test_an_old_a_middle_and_a_new_version_are_recorded() -> None:
    versions = [tuple(map(int, version.split("."))) for version in RECORDS]
    assert versions == sorted(versions)
    assert versions[0][:2] == (0, 17) and versions[-1] >= (0, 33, 0) and len(versions) >= 3


@pytest.mark.parametrize("version", RECORDS)
def test_every_recorded_version_offers_what_the_load_format_needs(version: str) -> None:
    assert problems(RECORDS[version]) == []


def test_the_installed_vllm_offers_what_the_load_format_needs() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("vllm is not installed")
    read = recorder.reader(Path(spec.submodule_search_locations[0]).parent)
    assert problems(recorder.record(read)) == []


def test_the_entry_point_is_declared_in_vllms_group() -> None:
    from importlib.metadata import entry_points

    points = [point for point in entry_points(group=ENTRY_POINTS) if point.name == "serverless_llm"]
    assert [point.value for point in points] == ["serverless_llm.vllm:register"]


def _without(name: str) -> Callable[[Record], Any]:
    return lambda record: record.pop(name)


def _no_attribute(name: str, attribute: str) -> Callable[[Record], Any]:
    return lambda record: record[name]["attributes"].remove(attribute)


def _no_argument(name: str, argument: str) -> Callable[[Record], Any]:
    return lambda record: record[name]["arguments"].remove(argument)


def _one_more(name: str) -> Callable[[Record], Any]:
    return lambda record: record[name].update(arguments=[*record[name]["arguments"], "new"], defaults=0)


def _no_call(name: str, method: str) -> Callable[[Record], Any]:
    return lambda record: record[name]["own_calls"].remove(method)


MOVES = [
    *(_without(name) for name in (*CALLS, "DefaultModelLoader._prepare_weights", "_LOAD_FORMAT_TO_MODEL_LOADER")),
    *(_without(name) for name in ("should_skip_weight", "DEFAULT_PLUGINS_GROUP", "LoadConfig")),
    *(_no_attribute(name, attribute) for name, wanted in ATTRIBUTES.items() for attribute in sorted(wanted)),
    _no_attribute("DefaultModelLoader", "local_expert_ids"),
    *(_no_argument(name, argument) for name, wanted in CALLS.items() for argument in wanted[-2:]),
    _no_argument("should_skip_weight", "local_expert_ids"),
    *(
        _no_argument("DefaultModelLoader._prepare_weights", argument)
        for argument in ("model_name_or_path", "subfolder", "revision", "fall_back_to_pt", "allow_patterns_overrides")
    ),
    *(_one_more(f"DefaultModelLoader.{name}") for name in ("_prepare_weights", "_get_weights_iterator")),
    *(_one_more(f"DefaultModelLoader.{name}") for name in ("get_all_weights", "load_weights", "download_model")),
    *(_no_call(name, method) for name, method in REACHED.items()),
]


@pytest.mark.parametrize("move", MOVES)
def test_a_door_that_moved_is_noticed(move: Callable[[Record], Any]) -> None:
    record = copy.deepcopy(list(RECORDS.values())[-1])
    move(record)
    assert problems(record) != []
