"""Which model the plugin reads ahead."""

from __future__ import annotations

import pytest

from serverless_llm.vllm import LOAD_FORMAT
from serverless_llm.vllm._prefetch import server, wanted

SERVE = ["serve", "org/model", "--load-format", LOAD_FORMAT]


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
        ([*SERVE, "--model-loader-extra-config", '{"prefetch": false}'], None),
        ([*SERVE, "--model-loader-extra-config", '{"threads": 4}'], ("org/model", None)),
        ([*SERVE, "--model-loader-extra-config", "{no json"], None),
        ([], None),
    ],
)
def test_the_command_line_names_the_model(arguments: list[str], model: tuple[str, str | None] | None) -> None:
    assert wanted(arguments, {}, LOAD_FORMAT) == model


@pytest.mark.parametrize(
    ("value", "model"),
    [("0", None), ("false", None), ("1", ("org/model", None)), ("/named", ("/named", None)), ("", ("org/model", None))],
)
def test_the_environment_goes_first(value: str, model: tuple[str, str | None] | None) -> None:
    assert wanted(SERVE, {"SERVERLESS_LLM_PREFETCH": value}, LOAD_FORMAT) == model


def test_without_a_command_line_the_environment_names_it() -> None:
    assert wanted([], {"SERVERLESS_LLM_PREFETCH": "/m"}, LOAD_FORMAT) == ("/m", None)


def test_the_server_is_the_one_that_the_loader_asks() -> None:
    assert server(SERVE, {}) == "auto"
    assert server(SERVE, {"SERVERLESS_LLM_SERVER": "off"}) is None
    extra = ["--model-loader-extra-config", '{"server": "localhost:1"}']
    assert server([*SERVE, *extra], {"SERVERLESS_LLM_SERVER": "off"}) == "localhost:1"
    assert server([*SERVE, "--model-loader-extra-config", "{no json"], {}) is None
