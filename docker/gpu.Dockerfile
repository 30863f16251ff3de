# syntax=docker/dockerfile:1
# The endpoint for NVIDIA GPUs: vLLM's own image, with agentopt on top.
#
#   docker buildx imagetools inspect vllm/vllm-openai:v0.33.0 --format '{{.Manifest.Digest}}'
#   docker build -f docker/gpu.Dockerfile --build-arg VLLM_DIGEST=sha256:... -t agentopt-gpu .
#
# The digest is yours to look up and to keep: a tag may be moved, a digest may not. Without it the build stops.
ARG VLLM_DIGEST
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY agentopt ./agentopt
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai@${VLLM_DIGEST}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Nothing is resolved again: the torch of this image is the one that vLLM was built for. All that the gateway needs comes
# with vLLM; `agentopt serve --help` and the look at the entry point stop the build if a release should change that.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip install --no-cache-dir --no-deps --no-index /wheels/*.whl \
 && python3 -c 'import httptools, prometheus_client, starlette, uvicorn' \
 && python3 -c 'from agentopt.weights.gg.vllm_plugin import check_environment; check_environment()' \
 && agentopt serve --help >/dev/null \
 && useradd --uid 10001 --create-home agentopt \
 && install -d -o agentopt -g agentopt -m 0700 /var/lib/agentopt
# Nothing is fetched and nothing is reported while it runs.
ENV HF_HUB_OFFLINE=1 \
    TRANSFORMERS_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1 \
    DO_NOT_TRACK=1 \
    LITELLM_LOCAL_MODEL_COST_MAP=True \
    AGENTOPT_KEYS=/var/lib/agentopt/keys.db
USER 10001:10001
WORKDIR /var/lib/agentopt
VOLUME ["/var/lib/agentopt"]
# 8000: clients. 8001: metrics and the admin side; never publish it.
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=600s --retries=4 \
  CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["agentopt", "serve"]
CMD ["--help"]
