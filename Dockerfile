# The image for GPU clusters: `docker build -t corral .`, then
#   docker run --gpus all --ipc host -v $PWD/runs:/home/corral/runs corral --nproc auto pretrain --config /opt/corral/configs/...
# (--ipc host: NCCL passes data between the ranks of one node through shared memory.)
FROM rust:1.95-bookworm AS build
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-pip \
    && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1
WORKDIR /src
# libtorch is a layer of its own: a change of the sources does not fetch it again.
COPY scripts/doctor.sh scripts/setup.sh scripts/libtorch.txt scripts/
RUN scripts/setup.sh
COPY . .
RUN cargo build --profile dist --locked && scripts/package.sh /opt/corral

FROM debian:bookworm-slim
# cuDNN needs zlib; NCCL opens the InfiniBand and RoCE libraries at run time, where the host has such devices.
RUN apt-get update \
    && apt-get install -y --no-install-recommends libstdc++6 zlib1g libibverbs1 ibverbs-providers librdmacm1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 corral
COPY --from=build /opt/corral /opt/corral
ENV PATH=/opt/corral/bin:$PATH
# The NVIDIA container runtime mounts the driver's libraries that these name.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER corral
WORKDIR /home/corral
ENTRYPOINT ["launch"]
CMD ["--help"]
