# syntax=docker/dockerfile:1
# The endpoint for machines without a GPU: vLLM for CPUs, the embedded model's weights, agentopt.
#
#   docker build -f docker/cpu.Dockerfile --build-arg PIP_EXTRA_INDEX_URL=... -t agentopt-cpu .
#
# PIP_EXTRA_INDEX_URL: PyTorch's index of CPU wheels, without which pip would take a build with CUDA. Pin the base by
# digest as well: --build-arg PYTHON_IMAGE=python:3.11-slim@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1
WORKDIR /source
COPY requirements-serve.txt ./
COPY docker/install_cpu.sh ./docker/
RUN ./docker/install_cpu.sh engine /opt/agentopt
COPY pyproject.toml README.md LICENSE ./
COPY agentopt ./agentopt
RUN AGENTOPT_INSTALL=. ./docker/install_cpu.sh agentopt /opt/agentopt

FROM ${PYTHON_IMAGE}
# libnuma: vLLM asks it where memory is; libgomp: torch's threads.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends libgomp1 libnuma1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home agentopt \
 && install -d -o agentopt -g agentopt -m 0700 /var/lib/agentopt
COPY --from=build /opt/agentopt /opt/agentopt
ENV PATH=/opt/agentopt/bin:$PATH \
    HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1 \
    LITELLM_LOCAL_MODEL_COST_MAP=True \
    AGENTOPT_KEYS=/var/lib/agentopt/keys.db
RUN agentopt serve --help >/dev/null
USER 10001:10001
WORKDIR /var/lib/agentopt
VOLUME ["/var/lib/agentopt"]
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=600s --retries=4 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["agentopt", "serve"]
CMD ["--help"]
