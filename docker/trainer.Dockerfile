# The trainer's image: `pte-vllm train`, without vLLM; built from the repository's root:
#
#     docker build -f docker/trainer.Dockerfile -t pte-vllm-trainer .
#
# Arguments and the secret `pip` are those of Dockerfile.
ARG BASE=debian:12-slim

# hadolint ignore=DL3006
FROM ${BASE} AS runtime
# Debian's stable releases change packages for fixes only, and mirrors keep none but the newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates python3.11 \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

# Some of what reasoning-gym needs comes as source only, hence the compiler.
FROM runtime AS packages
ARG VARIANT=cpu
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libpython3.11-dev python3.11-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
    && python3.11 -m venv /opt/pte
WORKDIR /src
COPY pyproject.toml ./
COPY requirements requirements
COPY docker/install.py docker/install.py
# The lock of the trainer alone is one for CUDA. compileall reports templates that are no Python.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    case "$VARIANT" in cuda) lock=train ;; *) lock=$VARIANT ;; esac \
    && /opt/pte/bin/python docker/install.py "requirements/$lock.lock" train \
    && { /opt/pte/bin/python -m compileall -qq -j 0 /opt/pte/lib || true; }

FROM packages AS wheel
COPY README.md LICENSE ./
COPY pte_vllm pte_vllm
COPY server server
COPY patches patches
RUN /opt/pte/bin/python -m pip wheel -q --no-index --no-deps --no-build-isolation -w /wheels .

FROM runtime
LABEL org.opencontainers.image.title="pte-vllm trainer" \
    org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /cache --shell /usr/sbin/nologin pte \
    && install -d -o pte -g 0 -m 2775 /cache /runs \
    && install -d -m 755 /models /adapters
COPY --from=packages /opt/pte /opt/pte
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/pte/bin/python -m pip install -q --no-index --no-deps /wheels/*.whl
COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/entrypoint.sh

# A relative `run.out` lies in /runs; all else that is written, in /cache and /tmp.
ENV PATH=/opt/pte/bin:$PATH \
    HOME=/cache \
    USER=pte \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    PTE_RUNS=/runs
USER 10001:0
WORKDIR /runs
STOPSIGNAL SIGTERM
ENTRYPOINT ["entrypoint.sh"]
CMD ["train", "--help"]
