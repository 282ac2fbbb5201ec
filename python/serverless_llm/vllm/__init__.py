"""The load format `serverless_llm` of vLLM.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in every process.
"""

from __future__ import annotations

LOAD_FORMAT = "serverless_llm"


def register() -> None:
    """Tells vLLM of the load format, and starts to read the model that is served. May be called again."""
    from . import _door, _prefetch

    _prefetch.start(LOAD_FORMAT)
    _door.register(LOAD_FORMAT)
