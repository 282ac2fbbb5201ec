"""Which model the plugin reads ahead."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import python

from serverless_llm.vllm import LOAD_FORMAT, _door, _prefetch

SERVE = ["serve", "org/model", "--load-format", LOAD_FORMAT]
EXTRA = ["--model-loader-extra-config"]


def found(arguments: list[str], environment: dict[str, str]) -> tuple[str, str | None] | None:
    """The model and its revision."""
    wanted = _prefetch.wanted(arguments, environment, LOAD_FORMAT)
    return None if wanted is None else (wanted.model, wanted.revision)


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (SERVE, ("org/model", None)),
        (["serve", "/m", f"--load-format={LOAD_FORMAT}", "--revision", "v2"], ("/m", "v2")),
        (["serve", "--model", "/m", "--load_format", LOAD_FORMAT.upper()], ("/m", None)),
        (["--model=/m", "--load-format", LOAD_FORMAT], ("/m", None)),
        (["serve", "/other", "--load-format", LOAD_FORMAT, "--model", "/m"], ("/m", None)),
        (["serve", "/m"], None),
        (["serve", "/m", "--load-format", "auto"], None),
        (["serve", "/m", "--load-format", LOAD_FORMAT, "--load-format", "auto"], None),
        (["serve", "--load-format", LOAD_FORMAT], None),
        (["bench", "/m", "--load-format", LOAD_FORMAT], None),
        (["serve", "/m", "--load-format"], None),
        ([*SERVE, *EXTRA, '{"prefetch": false}'], None),
        ([*SERVE, *EXTRA, '{"threads": 4}'], ("org/model", None)),
        ([*SERVE, *EXTRA, "{no json"], None),
        ([], None),
    ],
)
def test_the_command_line_names_the_model(arguments: list[str], model: tuple[str, str | None] | None) -> None:
    assert found(arguments, {}) == model


@pytest.mark.parametrize(
    ("value", "model"),
    [("0", None), ("false", None), ("1", ("org/model", None)), ("/named", ("/named", None)), ("", ("org/model", None))],
)
def test_the_environment_says_it(value: str, model: tuple[str, str | None] | None) -> None:
    assert found(SERVE, {"SERVERLESS_LLM_PREFETCH": value}) == model


@pytest.mark.parametrize("value", ["0", "1", "", "/named"])
def test_the_command_line_goes_before_the_environment(value: str) -> None:
    environment = {"SERVERLESS_LLM_PREFETCH": value}
    model = "/named" if value == "/named" else "org/model"
    assert found([*SERVE, *EXTRA, '{"prefetch": false}'], environment) is None
    assert found([*SERVE, *EXTRA, '{"prefetch": true}'], environment) == (model, None)


def test_what_another_load_format_is_given_is_not_asked() -> None:
    other = ["serve", "/m", "--load-format", "runai_streamer", *EXTRA, '{"prefetch": false, "concurrency": 16}']
    assert found(other, {"SERVERLESS_LLM_PREFETCH": "/named"}) == ("/named", None)
    assert found(other, {}) is None


def test_without_a_command_line_the_environment_names_it() -> None:
    assert found([], {"SERVERLESS_LLM_PREFETCH": "/m"}) == ("/m", None)


def test_the_server_is_the_one_that_the_loader_asks() -> None:
    def server(arguments: list[str], environment: dict[str, str]) -> str | None:
        asked = _prefetch.wanted(arguments, environment, LOAD_FORMAT)
        assert asked is not None
        return asked.options.server

    assert server(SERVE, {}) == "auto"
    assert server(SERVE, {"SERVERLESS_LLM_SERVER": "off"}) is None
    assert server([*SERVE, *EXTRA, '{"server": "localhost:1"}'], {"SERVERLESS_LLM_SERVER": "off"}) == "localhost:1"
    assert server([], {"SERVERLESS_LLM_PREFETCH": "/m", "SERVERLESS_LLM_SERVER": "unix:/s"}) == "unix:/s"


@pytest.mark.parametrize(
    ("more", "cache"),
    [
        ([], None),
        (["--download-dir", "/c"], "/c"),
        (["--download_dir", "/c"], "/c"),
        (["--download-dir=/a=b", "--revision", "v2"], "/a=b"),
        (["--download-dir=/a", "--download-dir=/c"], "/c"),
    ],
)
def test_the_command_line_names_the_cache(more: list[str], cache: str | None) -> None:
    wanted = _prefetch.wanted([*SERVE, *more], {}, LOAD_FORMAT)
    assert wanted is not None and wanted.cache == cache
    # The model that the environment names may be another.
    named = _prefetch.wanted([*SERVE, *more], {"SERVERLESS_LLM_PREFETCH": "/named"}, LOAD_FORMAT)
    assert named is not None and named.cache is None


def test_a_model_is_found_in_another_cache(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    snapshot = tmp_path / "models--some--model" / "snapshots" / ("01234567" * 5)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--some--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text(snapshot.name)
    assert Path(_door.folder_here("some/model", None, str(tmp_path))) == snapshot
    assert _door.folder_here(str(snapshot), None, "/none") == str(snapshot)
    with pytest.raises((OSError, ValueError)):
        _door.folder_here("some/model", None, str(tmp_path / "none"))


# Starts, and then as a process that this one starts, which is no child of multiprocessing's.
STARTS = """
import os, subprocess, sys, threading
from serverless_llm.vllm import _prefetch
read = []
_prefetch._read = lambda *of: read.append(of)
def start():
    _prefetch.start("serverless_llm")
    for thread in threading.enumerate():
        if thread.name == "serverless_llm-prefetch":
            thread.join()
    return len(read)
if len(sys.argv) == 1:
    print(start(), start())
    _prefetch._started = False  # as by exec, which leaves number and environment
    print(start(), flush=True)
    subprocess.run([sys.executable, "-c", os.environ["CODE"], "child"], check=True)
else:
    print(start())
"""


def test_what_the_command_line_names_is_what_is_read() -> None:
    code = '''
import sys, threading
from serverless_llm.vllm import _prefetch
read = []
_prefetch._read = lambda *of: read.extend(of)
sys.argv[1:] = "serve org/model --load-format serverless_llm --revision v2 --download-dir=/c".split()
_prefetch.start("serverless_llm")
for thread in threading.enumerate():
    if thread.name == "serverless_llm-prefetch":
        thread.join()
print(*read)
'''
    assert python(code, _SERVERLESS_LLM_READER="").stdout == "org/model v2 auto /c\n"


def test_a_process_that_the_reader_starts_does_not_read_too() -> None:
    run = python(STARTS, CODE=STARTS, SERVERLESS_LLM_PREFETCH="/m", _SERVERLESS_LLM_READER="")
    assert run.stdout.split() == ["1", "1", "2", "0"]
