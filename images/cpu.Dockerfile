# Pods without a GPU, and everything else that runs our code: `make image`.
# Built from the lock alone; torch's CPU build is another file on each index, so it has a version and no hash
# (docs/adr/0001-packaging.md). Kubernetes probes the pods, so there is no HEALTHCHECK.
ARG PYTHON=python:3.11.14-slim-bookworm

FROM ${PYTHON} AS build
ARG TORCH=2.13.0
WORKDIR /src
COPY requirements/image-build.lock requirements/image-cpu.lock requirements/
RUN python -m venv /opt/build && python -m venv /opt/moeray
RUN /opt/build/bin/python -m pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: \
        -r requirements/image-build.lock
RUN /opt/moeray/bin/python -m pip install --no-cache-dir --no-compile --no-deps --require-hashes --only-binary :all: \
        -r requirements/image-cpu.lock
RUN /opt/moeray/bin/python -m pip install --no-cache-dir --no-compile --no-deps --only-binary :all: "torch==${TORCH}+cpu" \
    || /opt/build/bin/uv pip install --no-cache --python /opt/moeray/bin/python --no-deps --torch-backend cpu "torch==${TORCH}"
COPY pyproject.toml README.md CHANGELOG.md LICENSE ./
COPY cluster cluster
COPY model_plugins model_plugins
COPY deployments deployments
COPY scripts/sbom.py scripts/sbom.py
RUN /opt/build/bin/python -m hatchling build -t wheel -d /dist \
    && /opt/moeray/bin/python -m pip install --no-cache-dir --no-compile --no-deps --no-index /dist/*.whl
RUN /opt/moeray/bin/python scripts/sbom.py --name moeray --output /opt/moeray/sbom.cdx.json
# A read-only root file system takes no bytecode later. Templates among the files do not compile: status 1.
RUN /opt/moeray/bin/python -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/moeray/lib || [ $? -eq 1 ]

FROM ${PYTHON}
LABEL org.opencontainers.image.title="moeray" \
      org.opencontainers.image.description="MoE on Ray: attention shards and expert groups on CPU" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"
# Debian keeps one version per release: a pinned one would be gone with the next security update.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 moeray \
    && useradd --uid 1000 --gid 1000 --create-home --home-dir /home/moeray moeray
COPY --from=build --chown=0:0 /opt/moeray /opt/moeray
ENV PATH=/opt/moeray/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/home/moeray
USER 1000:1000
WORKDIR /home/moeray
CMD ["moeray", "--help"]
