# For NVIDIA GPUs; the CUDA libraries come with JAX, the driver from the host.
#
#   docker build --file=launch/docker/cuda.Dockerfile --tag=vlp_jax:cuda .
#   docker run --rm --gpus=all --shm-size=1g -v "$PWD/runs:/runs" vlp_jax:cuda --config=… --workdir=/runs/mine
FROM python:3.11-slim

WORKDIR /opt/vlp_jax
# What an installation depends on comes first: changes of the code alone build in seconds.
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY launch/env.sh launch/env.sh
COPY vlp_jax/__init__.py vlp_jax/__init__.py
ENV VLP_JAX_ACCELERATOR=cuda \
    VLP_JAX_VENV=/opt/venv \
    PIP_NO_CACHE_DIR=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN . launch/env.sh && prepare

COPY configs configs
COPY vlp_jax vlp_jax
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
ENTRYPOINT ["python", "-m", "vlp_jax.train"]
CMD ["--help"]
