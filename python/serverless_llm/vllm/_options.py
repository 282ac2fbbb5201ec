"""What `--model-loader-extra-config` may hold, and the environment variables of the same names."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import os
from collections.abc import Mapping
from typing import Any

from .. import _native
from ..errors import InvalidError

_PREFIX = "SERVERLESS_LLM_"
_CHOICES = {
    "road": ("auto", "deferred", "staging"),
    "engine": ("auto", "uring", "pread", "mapped"),
    "missing": ("error", "warn"),
    "changed_source": ("error", "warn"),
}
_TRUTHS = {"1": True, "0": False, "true": True, "false": False, "yes": True, "no": False}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the loader. What the command line sets goes before the environment."""

    road: str = "auto"
    """`deferred`: vLLM's own copies move the bytes. `staging`: ordinary tensors on the device. `auto` chooses."""
    engine: str = "auto"
    """`uring`, `pread`, `mapped`, or `auto`: by what is cached."""
    direct: bool | None = None
    """Whether reads pass the page cache; None chooses."""
    threads: int | None = None
    """Reader threads; None chooses."""
    pinned_bytes: int | None = None
    """Pinned host memory at most; None: 256 MiB."""
    staging_bytes: int = 1 << 30
    """Device memory at most on the staging road; a tensor that does not fit gets what it needs."""
    verify: bool = False
    """Whether a store's checksums are compared while it loads."""
    missing: str = "error"
    """What a parameter of which the checkpoint has nothing is: an `error`, or something to `warn` of."""
    changed_source: str = "error"
    """What it is that the files which a store was converted from were changed since: an `error`, or something to `warn` of."""
    server: str | None = "auto"
    """The address of a store server, `auto`: the one of SLLM_STORE_ADDRESS or at a default socket, if any, or `off`."""
    prefetch: bool = True
    """Whether the checkpoint is read into the page cache while vLLM starts."""

    @classmethod
    def of(cls, extra: Any, environment: Mapping[str, str] = os.environ) -> Options:
        """The options of an extra config and the environment."""
        if not isinstance(extra, Mapping):
            raise InvalidError(f"model_loader_extra_config is {extra!r}; a JSON object is needed")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        given: dict[str, Any] = {}
        for name in fields:
            text = environment.get(_PREFIX + name.upper())
            # SERVERLESS_LLM_PREFETCH may also name the model.
            if text and not (name == "prefetch" and not is_truth(text)):
                given[name] = (_PREFIX + name.upper(), text)
        for name, value in extra.items():
            if name not in fields:
                near = difflib.get_close_matches(str(name), fields, n=1)
                meant = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(fields)}"
                raise InvalidError(f"model_loader_extra_config has an unknown key {name!r}{meant}")
            given[name] = (f"model_loader_extra_config {name!r}", value)
        return cls(**{name: _parse(fields[name], *value) for name, value in given.items()})

    @classmethod
    def of_command_line(cls, extra: str | None, environment: Mapping[str, str] = os.environ) -> Options:
        """The options of `--model-loader-extra-config` as it is typed, and the environment."""
        try:
            return cls.of(json.loads(extra) if extra else {}, environment)
        except json.JSONDecodeError as e:
            raise InvalidError(f"model_loader_extra_config is not JSON: {e}") from e

    def load(self) -> dict[str, Any]:
        """Those that a load takes."""
        names = ("engine", "direct", "verify", "threads", "pinned_bytes", "server")
        return {name: getattr(self, name) for name in names}


def is_truth(text: str) -> bool:
    """Whether a text says yes or no."""
    return text.lower() in _TRUTHS


def _parse(field: Any, told_by: str, value: Any) -> Any:
    kind = str(field.type)
    if field.name == "server":
        return _server(told_by, value)
    if "None" in kind and (value is None or value == "auto"):
        return None
    if kind.startswith("bool"):
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in _TRUTHS:
            return _TRUTHS[value.lower()]
        raise InvalidError(f"{told_by} is {value!r}; give true or false")
    if kind.startswith("int"):
        return _size(told_by, value)
    choices = _CHOICES[field.name]
    if value in choices:
        return value
    raise InvalidError(f"{told_by} is {value!r}; give one of {', '.join(choices)}")


def _server(told_by: str, value: Any) -> str | None:
    if value is None or value is False:
        return None
    if value is True:
        return "auto"
    if isinstance(value, str) and value:
        word = value.lower()
        return None if word in ("off", "none") or _TRUTHS.get(word) is False else "auto" if word in _TRUTHS else value
    raise InvalidError(f"{told_by} is {value!r}; give auto, off, or an address such as 'unix:/run/sllm-store.sock'")


def _size(told_by: str, value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        with contextlib.suppress(InvalidError):
            if (size := _native.parse_size(value)) > 0:
                return size
    raise InvalidError(f"{told_by} is {value!r}; give a number above 0, or a size such as '512MiB'")
