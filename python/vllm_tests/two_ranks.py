"""Run by test_processes.py: tokens of a model on two ranks, as JSON. Arguments: the model, the load format."""

import json
import sys

from conftest import start, tokens

if __name__ == "__main__":
    llm = start(sys.argv[1], sys.argv[2], tensor_parallel_size=2)
    print("TOKENS", json.dumps(tokens(llm)), flush=True)
