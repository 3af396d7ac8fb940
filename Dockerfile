# softprompt: one frozen base model, many soft prompts, chosen per request.
#
#   docker build -t softprompt .
#   docker run --read-only -p 127.0.0.1:8000:8000 -e SOFTPROMPT_API_KEY=... \
#       -v prompts:/data/prompts -v cache:/data/cache softprompt
#
# The image has no model inside: the first start fetches it into the cache volume (93 MB) and converts it, so the
# image stays small, one cache serves many containers, and SOFTPROMPT_MODEL can name another model.

FROM python:3.11-slim-bookworm AS builder
# Which torch: the default is what the package index gives, with CUDA on x86. For another build of the same version
# name it and its index, e.g. --build-arg TORCH=torch==2.13.0+cpu --build-arg TORCH_INDEX=<index of CPU wheels>.
ARG TORCH="torch==2.13.0"
ARG TORCH_INDEX=""
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
# For the native decoder, which the image brings ready.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/softprompt
COPY constraints.txt ./
# torch alone first: by far the largest layer, and the one that changes least.
RUN /opt/softprompt/bin/pip install -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH"
COPY pyproject.toml README.md LICENSE ./
COPY app ./app
RUN /opt/softprompt/bin/pip wheel --no-deps --wheel-dir dist . \
 && /opt/softprompt/bin/pip install -c constraints.txt "$(echo dist/*.whl)[otel,postgres]"
# From a folder without sources, so that it is built for the installed package.
WORKDIR /
RUN /opt/softprompt/bin/python -m app.engine.native.build

FROM python:3.11-slim-bookworm
LABEL org.opencontainers.image.title="softprompt" \
      org.opencontainers.image.description="One frozen language model, many soft prompts, chosen per request" \
      org.opencontainers.image.licenses="Apache-2.0"
# Triton compiles the launchers of its kernels when they are first used; without a GPU: --build-arg GPU_PACKAGES="".
ARG GPU_PACKAGES="gcc libc6-dev"
RUN if [ -n "$GPU_PACKAGES" ]; then apt-get update \
 && apt-get install -y --no-install-recommends $GPU_PACKAGES \
 && rm -rf /var/lib/apt/lists/*; fi
RUN groupadd --gid 10001 softprompt \
 && useradd --uid 10001 --gid 10001 --home-dir /data/cache --no-create-home --shell /usr/sbin/nologin softprompt \
 && install -d -o 10001 -g 10001 /data /data/prompts /data/cache
COPY --from=builder /opt/softprompt /opt/softprompt
# A fresh named volume starts with the shipped prompts.
COPY --chown=10001:10001 prompts /data/prompts
# Only the two volumes are ever written, temporary files included, so the root file system can be read-only.
# The server listens on all addresses of the container, and so refuses to start without a key: SOFTPROMPT_API_KEY,
# one of `softprompt keys create`, or SOFTPROMPT_INSECURE=true where only you reach the published port.
ENV PATH=/opt/softprompt/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/data/cache \
    TMPDIR=/data/cache \
    PIP_NO_CACHE_DIR=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SOFTPROMPT_HOST=0.0.0.0 \
    SOFTPROMPT_REGISTRY=/data/prompts \
    SOFTPROMPT_CACHE_DIR=/data/cache/softprompt
VOLUME ["/data/prompts", "/data/cache"]
WORKDIR /data
USER 10001:10001
EXPOSE 8000
# The first start may take minutes: it fetches and converts the base model.
HEALTHCHECK --interval=10s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; port = os.environ.get('SOFTPROMPT_PORT') or os.environ.get('PORT') or '8000'; c = http.client.HTTPConnection('127.0.0.1', int(port), timeout=4); c.request('GET', '/readyz'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["softprompt"]
CMD ["serve"]
