"""Which model the plugin reads ahead."""

from __future__ import annotations

import pytest
from conftest import python

from serverless_llm.vllm import LOAD_FORMAT, _prefetch

SERVE = ["serve", "org/model", "--load-format", LOAD_FORMAT]
EXTRA = ["--model-loader-extra-config"]


def found(arguments: list[str], environment: dict[str, str]) -> tuple[str, str | None] | None:
    """The model and its revision."""
    wanted = _prefetch.wanted(arguments, environment, LOAD_FORMAT)
    return None if wanted is None else wanted[:2]


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
        return asked[2].server

    assert server(SERVE, {}) == "auto"
    assert server(SERVE, {"SERVERLESS_LLM_SERVER": "off"}) is None
    assert server([*SERVE, *EXTRA, '{"server": "localhost:1"}'], {"SERVERLESS_LLM_SERVER": "off"}) == "localhost:1"
    assert server([], {"SERVERLESS_LLM_PREFETCH": "/m", "SERVERLESS_LLM_SERVER": "unix:/s"}) == "unix:/s"


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


def test_a_process_that_the_reader_starts_does_not_read_too() -> None:
    run = python(STARTS, CODE=STARTS, SERVERLESS_LLM_PREFETCH="/m", _SERVERLESS_LLM_READER="")
    assert run.stdout.split() == ["1", "1", "2", "0"]
