"""The load format `serverless_llm` of vLLM.

vLLM finds `register` by the entry point group `vllm.general_plugins` and calls it in every process.
"""

from __future__ import annotations

LOAD_FORMAT = "serverless_llm"


def register() -> None:
    """Tells vLLM of the load format. Light, and may be called again: the loader itself is imported when it is used."""
    from ._door import register_lazily

    register_lazily(LOAD_FORMAT)
