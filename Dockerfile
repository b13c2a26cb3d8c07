# cl-runner for machines with NVIDIA GPUs (docs/installing.md). The driver is the machine's; torch brings its CUDA.
#
#   docker build --tag cl-runner .
#   docker run --rm --gpus all --ipc=host --volume "$PWD:/work" --volume cl-runner-cache:/cache cl-runner doctor
#
# The CUDA of the image is that of torch: a machine whose driver is older refuses to start it, and says so. For one, both
# are to be named: --build-arg CUDA=12.8.1 --build-arg TORCH_INDEX=(an index of builds for it, see pytorch.org).
ARG CUDA=13.0.1
FROM nvidia/cuda:${CUDA}-runtime-ubuntu24.04

# git: environment.json has the commit of a checkout. A C++ compiler is not needed: no op of DeepSpeed's is built.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/cl-runner
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1

# As `make setup` does it: torch first, then all else at the versions of constraints.txt.
ARG TORCH_INDEX=
COPY constraints.txt ./
RUN python3 -m venv "$VIRTUAL_ENV" \
    && pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch

COPY pyproject.toml README.md LICENSE ./
COPY cl_runner cl_runner
COPY configs configs
COPY task_orders task_orders
RUN DS_BUILD_OPS=0 pip install --constraint constraints.txt ".[metrics,gguf,qlora]"

# No root: files in /work belong to whoever runs it (--user "$(id -u):$(id -g)").
RUN useradd --create-home --uid 10001 runner \
    && install --directory --owner runner --group runner --mode 1777 /work /cache
USER runner
ENV HOME=/home/runner HF_HOME=/cache/huggingface CL_RUNNER_CACHE=/cache/cl-runner
VOLUME /cache
WORKDIR /work
ENTRYPOINT ["cl-runner"]
CMD ["--help"]
