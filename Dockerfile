# docker build -t balanced-vae .                           CPU
# docker build -t balanced-vae --build-arg RUNTIME=gpu .   NVIDIA
#
# docker run --rm -p 127.0.0.1:8470:8470 --read-only balanced-vae
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/out" balanced-vae sample-cli --n 1000 --out /out/faces

FROM python:3.11-slim AS build
# One of pyproject.toml's extras: cpu, gpu or openvino.
ARG RUNTIME=cpu
WORKDIR /src
COPY requirements.lock ./
COPY pyproject.toml README.md LICENSE ./
COPY LICENSES LICENSES
COPY balanced_vae balanced_vae
COPY training training
COPY export export
COPY serve serve
RUN python -m venv --without-pip /opt/balanced-vae \
 && pip --python /opt/balanced-vae install --no-cache-dir --no-compile -c requirements.lock ".[${RUNTIME}]"

FROM python:3.11-slim
COPY --from=build /opt/balanced-vae /opt/balanced-vae
# The file system may be read-only: nothing is written but what --out names.
ENV PATH=/opt/balanced-vae/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8470
HEALTHCHECK --timeout=5s --start-period=30s CMD ["python", "-P", "-m", "serve.healthcheck", "127.0.0.1:8470"]
# Inside a container all addresses are the container's own; publish the port on the host's loopback.
# `docker stop` waits 10 seconds.
CMD ["serve-vae", "--listen", "0.0.0.0:8470", "--insecure", "--grace", "8"]
