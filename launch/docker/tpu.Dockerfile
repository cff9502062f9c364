# For TPUs, on GKE or a TPU VM.
#
#   docker build --file=launch/docker/tpu.Dockerfile --tag=vlp_jax:tpu .
#   docker run --rm --privileged --net=host vlp_jax:tpu --config=… --workdir=gs://BUCKET/RUN
FROM python:3.11-slim

WORKDIR /opt/vlp_jax
# What an installation depends on comes first: changes of the code alone build in seconds.
COPY setup.cfg pyproject.toml README.md LICENSE ./
COPY launch/env.sh launch/env.sh
COPY vlp_jax/__init__.py vlp_jax/__init__.py
ENV VLP_JAX_ACCELERATOR=tpu \
    VLP_JAX_VENV=/opt/venv \
    PIP_NO_CACHE_DIR=1
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN . launch/env.sh && prepare

COPY configs configs
COPY vlp_jax vlp_jax
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
ENTRYPOINT ["python", "-m", "vlp_jax.train"]
CMD ["--help"]
