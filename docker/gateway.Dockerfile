# syntax=docker/dockerfile:1
# The gateway alone, without torch and without an engine: in front of one that runs elsewhere (--upstream URL).
#
#   docker build -f docker/gateway.Dockerfile -t agentopt-gateway .
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY agentopt ./agentopt
RUN python -m venv /opt/agentopt \
 && /opt/agentopt/bin/pip install --no-cache-dir -c constraints.txt '.[serve]'

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home agentopt \
 && install -d -o agentopt -g agentopt -m 0700 /var/lib/agentopt
COPY --from=build /opt/agentopt /opt/agentopt
ENV PATH=/opt/agentopt/bin:$PATH \
    LITELLM_LOCAL_MODEL_COST_MAP=True \
    AGENTOPT_KEYS=/var/lib/agentopt/keys.db
RUN agentopt serve --help >/dev/null
USER 10001:10001
WORKDIR /var/lib/agentopt
VOLUME ["/var/lib/agentopt"]
EXPOSE 8000 8001
STOPSIGNAL SIGTERM
# /health, not /ready: an engine that starts is no reason to restart the gateway.
HEALTHCHECK --interval=15s --timeout=5s --start-period=20s --retries=4 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["agentopt", "serve"]
CMD ["--help"]
