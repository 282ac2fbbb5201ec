#!/usr/bin/env bash
# Serves a model with vLLM from a store, which is made the first time: serve.sh MODEL STORE [OPTIONS OF vllm serve]
# MODEL is a directory of safetensors, or a repository id that the Hugging Face cache holds.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: $0 MODEL STORE [OPTIONS OF vllm serve]" >&2
    exit 2
fi
model=$1 store=$2
shift 2

# An interrupted conversion goes on where it was; the store appears whole.
[ -e "$store/manifest.json" ] || sllm-store convert "$model" "$store"
exec vllm serve "$store" --load-format serverless_llm "$@"
