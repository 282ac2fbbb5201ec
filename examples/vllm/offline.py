"""Generates text with vLLM's `LLM`, its weights loaded by this package: python examples/vllm/offline.py MODEL [PROMPT]

MODEL is a store, a directory of safetensors, or a repository id.
"""

from __future__ import annotations

import sys

from vllm import LLM, SamplingParams


def main() -> None:
    """Loads and generates."""
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    prompt = sys.argv[2] if len(sys.argv) > 2 else "The capital of France is"
    llm = LLM(sys.argv[1], load_format="serverless_llm")
    for output in llm.generate([prompt], SamplingParams(temperature=0, max_tokens=32)):
        print(output.prompt + output.outputs[0].text)


# vLLM may start its processes anew from this file.
if __name__ == "__main__":
    main()
