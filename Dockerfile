# The locked versions on Python 3.11, and JAX for NVIDIA GPUs (docs/gpu.md):
#   docker build -t jaxstack .
#   docker run --rm --gpus all -v "$PWD:/work" jaxstack train ippo --env dispersion --run-dir runs/a
# Without CUDA: docker build --build-arg ACCELERATOR= -t jaxstack-cpu .
FROM python:3.11-slim
ARG ACCELERATOR=cuda12
WORKDIR /opt/jaxstack
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --requirement requirements.lock
# CUDA's wheels in the version of jax that is locked
RUN test -z "$ACCELERATOR" || pip install --no-cache-dir \
    "jax[$ACCELERATOR]==$(python -c 'from importlib.metadata import version; print(version("jax"))')"
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation .
ENV JAXSTACK_CACHE=/cache
WORKDIR /work
ENTRYPOINT ["jaxstack"]
CMD ["--help"]
