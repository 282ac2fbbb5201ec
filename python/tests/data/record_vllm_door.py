"""Records what a version of vLLM offers of what the load format relies on, without importing it.

    python python/tests/data/record_vllm_door.py SDIST_OR_DIR...

Each is a source distribution, a wheel, or a directory in which `vllm/` lies, such as `site-packages`. The record is added
to `vllm_door.json` beside this script; `test_vllm_door.py` compares the load format with all that are there.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).with_name("vllm_door.json")

# What is recorded: by file, classes with their methods, functions and constants.
_LOADER = "vllm/model_executor/model_loader/"
_CLASSES = {
    _LOADER + "base_loader.py": {"BaseModelLoader": ["__init__", "download_model", "load_weights", "load_model"]},
    _LOADER + "default_loader.py": {
        "DefaultModelLoader": [
            "__init__",
            "_prepare_weights",
            "_get_weights_iterator",
            "get_all_weights",
            "download_model",
            "load_weights",
            "track_weights_loading",
        ],
        "DefaultModelLoader.Source": [],
    },
    "vllm/config/load.py": {"LoadConfig": []},
    "vllm/config/model.py": {"ModelConfig": []},
    "vllm/platforms/interface.py": {"Platform": ["is_cuda"]},
}
_FUNCTIONS = {
    _LOADER + "__init__.py": ["register_model_loader"],
    _LOADER + "ep_weight_filter.py": ["should_skip_weight"],
    "vllm/logger.py": ["init_logger"],
}
_CONSTANTS = {
    _LOADER + "__init__.py": ["_LOAD_FORMAT_TO_MODEL_LOADER"],
    "vllm/plugins/__init__.py": ["DEFAULT_PLUGINS_GROUP"],
}
# Of classes with many attributes, the ones that matter.
_ATTRIBUTES = {
    "ModelConfig": {"model", "revision", "quantization"},
    "Platform": set[str](),
}


def signature(function: ast.FunctionDef) -> dict[str, Any]:
    """Names of the arguments, how many of them have a default, and which methods of its own object it calls."""
    arguments = function.args
    own_calls = {
        node.func.attr
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
    }
    returned = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
    found: dict[str, Any] = {
        "arguments": [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)],
        "defaults": len(arguments.defaults),
    }
    if arguments.kwonlyargs:
        found["keyword_only"] = [argument.arg for argument in arguments.kwonlyargs]
    if own_calls:
        found["own_calls"] = sorted(own_calls)
    if returned and all(isinstance(value, ast.Tuple) for value in returned):
        found["returns"] = sorted({len(value.elts) for value in returned if isinstance(value, ast.Tuple)})
    return found


def attributes(of: ast.ClassDef) -> set[str]:
    """Names that a class, or a method of it, sets on its objects."""
    names = {
        target.id
        for node in of.body
        for target in (node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(of):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
    return names


def _class_in(tree: ast.Module, dotted: str) -> ast.ClassDef | None:
    here: ast.Module | ast.ClassDef = tree
    for name in dotted.split("."):
        inner = [node for node in here.body if isinstance(node, ast.ClassDef) and node.name == name]
        if not inner:
            return None
        here = inner[0]
    assert isinstance(here, ast.ClassDef)
    return here


def record(read: Callable[[str], str | None]) -> dict[str, Any]:
    """What is there, by name. `read` gives a file's text by its path, `vllm/...`, or None."""
    found: dict[str, Any] = {}
    for path in sorted({*_CLASSES, *_FUNCTIONS, *_CONSTANTS}):
        text = read(path)
        if text is None:
            continue
        tree = ast.parse(text)
        for name, methods in _CLASSES.get(path, {}).items():
            of = _class_in(tree, name)
            if of is None:
                continue
            some = _ATTRIBUTES.get(name)
            found[name] = {"attributes": sorted(attributes(of) if some is None else attributes(of) & some)}
            here = {node.name: node for node in of.body if isinstance(node, ast.FunctionDef)}
            found |= {f"{name}.{method}": signature(here[method]) for method in methods if method in here}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name in _FUNCTIONS.get(path, []):
                found[node.name] = signature(node)
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                if isinstance(target, ast.Name) and target.id in _CONSTANTS.get(path, []):
                    value = getattr(node, "value", None)
                    # Of a table only its name is recorded.
                    found[target.id] = {"value": value.value} if isinstance(value, ast.Constant) else {}
    return found


def reader(source: Path) -> Callable[[str], str | None]:
    """How the files of a source distribution, a wheel or a directory are read."""
    if source.is_dir():

        def from_directory(path: str) -> str | None:
            file = source / path
            return file.read_text(encoding="utf-8") if file.is_file() else None

        return from_directory
    files: dict[str, bytes] = {}
    wanted = {*_CLASSES, *_FUNCTIONS, *_CONSTANTS, "vllm/_version.py"}
    if source.suffix == ".whl":
        with zipfile.ZipFile(source) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist() if name in wanted}
    else:
        with tarfile.open(source) as sdist:
            for member in sdist:
                name = member.name.partition("/")[2]
                data = sdist.extractfile(member) if name in wanted else None
                if data is not None:
                    files[name] = data.read()

    def from_archive(path: str) -> str | None:
        return files[path].decode() if path in files else None

    return from_archive


def version(read: Callable[[str], str | None]) -> str:
    """vLLM's version, as it says itself."""
    found = re.search(r"\bversion = '([^'+]+)", read("vllm/_version.py") or "")
    if found is None:
        raise SystemExit("vllm/_version.py gives no version")
    return found.group(1)


def main() -> None:
    """The command."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    records = json.loads(RECORDS.read_text()) if RECORDS.exists() else {}
    for source in sys.argv[1:]:
        read = reader(Path(source))
        records[version(read)] = record(read)
    ordered = sorted(records.items(), key=lambda item: [int(part) for part in re.findall(r"\d+", item[0])])
    # A line for every name: what moved is seen in a diff.
    texts = [
        f' "{name}": {{\n' + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
        for name, found in ordered
    ]
    RECORDS.write_text("{\n" + "\n },\n".join(texts) + "\n }\n}\n")
    print("recorded:", ", ".join(name for name, _ in ordered))


if __name__ == "__main__":
    main()
