# The server's image: `pte-vllm serve`, on a CPU or a CUDA GPU. docs/deploy.md has the commands.
#
# BASE must bring Python 3.11, for which the locks are made: Debian 12 does. PIP_* arguments and the
# secret `pip` (a pip.conf) tell pip where to look, while building only. For VARIANT=cpu they may name
# a mirror with torch==2.13.0+cpu, which is not on PyPI; else it comes from PyTorch's own index.
ARG BASE=debian:12-slim

# What runs the server, without Python packages. g++ and Python's headers stay: the LoRA code for
# CPUs is compiled for the very CPU it runs on, torch.compile and Triton compile at run time too.
# hadolint ignore=DL3006
FROM ${BASE} AS runtime
# Debian's stable releases change packages for fixes only, and mirrors keep none but the newest.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        ca-certificates g++ libnuma1 libpython3.11-dev python3.11 \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/*

# Packages of the lock that the server needs; built again only when requirements change.
FROM runtime AS packages
ARG VARIANT=cpu
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3.11-venv \
    && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* \
    && python3.11 -m venv /opt/pte
WORKDIR /src
COPY pyproject.toml ./
COPY requirements requirements
COPY docker/install.py docker/install.py
# Compiled here: where the root is read-only, every start would compile all modules again. Templates
# that are no Python make it report a failure.
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /opt/pte/bin/python docker/install.py "requirements/$VARIANT.lock" "$VARIANT" \
    && { /opt/pte/bin/python -m compileall -qq -j 0 /opt/pte/lib || true; }

FROM packages AS wheel
COPY README.md LICENSE ./
COPY pte_vllm pte_vllm
COPY server server
COPY patches patches
RUN /opt/pte/bin/python -m pip wheel -q --no-index --no-deps --no-build-isolation -w /wheels .

FROM runtime
LABEL org.opencontainers.image.title="pte-vllm server" \
    org.opencontainers.image.licenses="Apache-2.0"
# Group 0 may write what the user may: a platform that picks its own user id keeps that group.
RUN useradd --uid 10001 --gid 0 --no-create-home --home-dir /cache --shell /usr/sbin/nologin pte \
    && install -d -o pte -g 0 -m 2775 /cache /spool \
    && install -d -m 755 /models /adapters
COPY --from=packages /opt/pte /opt/pte
# A layer of its own: a new version of this project moves these few files only.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    /opt/pte/bin/python -m pip install -q --no-index --no-deps /wheels/*.whl
COPY --chmod=755 docker/entrypoint.sh /usr/local/bin/entrypoint.sh

# All that is written lies in /cache (home, compiled code, downloads), /spool and /tmp.
ENV PATH=/opt/pte/bin:$PATH \
    HOME=/cache \
    USER=pte \
    XDG_CACHE_HOME=/cache \
    XDG_CONFIG_HOME=/cache/config \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    PTE_SPOOL=/spool
USER 10001:0
WORKDIR /cache
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=10s --start-period=15m --retries=4 \
    CMD ["entrypoint.sh", "health"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["entrypoint.sh"]
CMD ["serve"]
