# A CPU image:   docker build -t pgsuite .
# A CUDA image:  docker build -t pgsuite:cuda --build-arg EXTRAS=gpu,onnx,report,video --build-arg CONSTRAINTS= .
#                docker run --gpus all pgsuite:cuda train algo=ppo env=HalfCheetah device=cuda
# The torch that pip finds for Linux has the libraries of CUDA in its wheel, so both take the same base; the driver is the host's.
# CONSTRAINTS= leaves the tested versions out.  PIP_ARGS is handed to pip, for an index with smaller wheels of torch.
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm

ARG EXTRAS=onnx,report,video
ARG CONSTRAINTS="-c constraints.txt"
ARG PIP_ARGS=""

# execution=compile needs a C++ compiler; MuJoCo draws films without a screen by OSMesa.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git libosmesa6 \
    && rm -rf /var/lib/apt/lists/*
ENV MUJOCO_GL=osmesa

WORKDIR /opt/pgsuite
COPY . .
RUN pip install --no-cache-dir ${PIP_ARGS} ${CONSTRAINTS} ".[${EXTRAS}]"

# Runs are written to the working directory: docker run -v "$PWD/runs:/work/runs" pgsuite train env=CartPole
WORKDIR /work
ENTRYPOINT ["pgsuite"]
CMD ["--help"]
