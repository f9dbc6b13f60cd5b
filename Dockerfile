# syntax=docker/dockerfile:1
# An image that trains with dtrain on CPUs and GPUs: docker build -t dtrain .
FROM python:3.11-slim-bookworm AS build
WORKDIR /source
COPY . .
RUN pip install --no-cache-dir build==1.3.0 \
    && python -m build --wheel --outdir /dist

FROM python:3.11-slim-bookworm
# g++ is for torch.compile; git is for the snapshot of the code that each run keeps.
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
       g++=4:12.* \
       git=1:2.* \
    && rm -rf /var/lib/apt/lists/*
COPY constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install --no-cache-dir -c /tmp/constraints.txt "$(echo /dist/*.whl)[lightning,slurm,s3,loggers,export]"
RUN useradd --create-home --uid 1000 trainer
USER 1000
WORKDIR /home/trainer
ENTRYPOINT ["dtrain"]
CMD ["--help"]
