# All scripts as commands, for CPUs: docker build -t slim .
# docker run --rm --volume "$PWD:/work" slim slim-detect --weights slim.onnx --source video.mp4
FROM python:3.12-slim
# The address that torch's installation page gives for pip and CPU: --build-arg TORCH_INDEX=... saves 4 GB of CUDA libraries.
ARG TORCH_INDEX=""
COPY . /slim
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} '/slim[train,deploy,video]'
WORKDIR /work
