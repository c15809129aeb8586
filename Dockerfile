# syntax=docker/dockerfile:1.7
# One image for all four services: `docker run splitserve services.router --help`.
#
# CPU (the default):  docker build -t splitserve:0.1.0 .
# NVIDIA GPUs:        docker build -t splitserve:0.1.0-cuda \
#                       --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 \
#                       --build-arg EXTRAS=engine,gpu --build-arg RUNTIME_PACKAGES="gcc libc6-dev" .
# torch's CUDA wheels bring CUDA's libraries with them and the node brings the driver, so the base
# stays the same. To build on a CUDA image anyway, set BASE to one that has Python 3.12.
ARG BASE=python:3.12.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=engine
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
# Apart from the rest, so that a change of our code does not fetch torch again.
RUN pip install --index-url "${TORCH_INDEX}" "torch>=2.11"
WORKDIR /src
COPY pyproject.toml README.md ./
COPY splitserve splitserve
COPY services services
COPY kernels kernels
RUN pip install ".[${EXTRAS}]"

FROM ${BASE}
# Empty for CPU. Triton compiles its launchers with the C compiler it finds when a kernel first
# runs, so a GPU image needs one; nothing else here does.
ARG RUNTIME_PACKAGES=""
RUN if [ -n "${RUNTIME_PACKAGES}" ]; then \
      apt-get update \
      && apt-get install -y --no-install-recommends ${RUNTIME_PACKAGES} \
      && rm -rf /var/lib/apt/lists/*; \
    fi \
    && groupadd --gid 10001 splitserve \
    && useradd --uid 10001 --gid 10001 --no-create-home --shell /usr/sbin/nologin splitserve
COPY --from=build /opt/venv /opt/venv
WORKDIR /app
COPY scripts/fetch_model.py scripts/fetch_model.py
# The root file system is read-only in Kubernetes: caches go to /tmp.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
# router, prefill, decode, kvstore
EXPOSE 50051 50052 50053 50054
ENTRYPOINT ["python", "-m"]
CMD ["services.router", "--help"]
