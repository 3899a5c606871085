# docker build --target cpu  -t esm-packed:cpu  .
# docker build --target cuda -t esm-packed:cuda .
# docker run --rm --user "$(id -u)" -v "$PWD:/data" esm-packed:cpu embed proteins.fasta -o proteins.h5 --model demo
# docker run --rm --gpus all --user "$(id -u)" -v "$PWD:/data" -v "$HOME/models:/models" esm-packed:cuda embed ...
FROM python:3.12-slim AS source
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY esm_packed esm_packed
COPY kernels kernels
COPY reports reports
COPY runners runners

FROM python:3.12-slim AS cpu
ENV TORCH_HOME=/models MPLCONFIGDIR=/tmp PIP_NO_CACHE_DIR=1
RUN pip install --index-url https://download.pytorch.org/whl/cpu torch==2.13.0
RUN --mount=from=source,source=/src,target=/src,rw pip install --constraint /src/constraints.txt '/src[report,export]'
RUN mkdir --mode=0777 /models
USER 1000
WORKDIR /data
ENTRYPOINT ["esm-packed"]
CMD ["--help"]

FROM python:3.12-slim AS cuda
ENV TORCH_HOME=/models MPLCONFIGDIR=/tmp TRITON_CACHE_DIR=/tmp/triton PIP_NO_CACHE_DIR=1
# Triton compiles a small launcher in C for each kernel; any compiler of the distribution serves.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN --mount=from=source,source=/src,target=/src,rw pip install --constraint /src/constraints.txt '/src[report,export,ray]'
RUN mkdir --mode=0777 /models
USER 1000
WORKDIR /data
ENTRYPOINT ["esm-packed"]
CMD ["--help"]
