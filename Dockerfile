# docker build -t balanced-vae .                           CPU
# docker build -t balanced-vae --build-arg RUNTIME=gpu .   NVIDIA
#
# docker run --rm -p 127.0.0.1:8470:8470 --read-only balanced-vae              --gpus all where it was built for NVIDIA
# docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/out" balanced-vae sample-cli --n 1000 --out /out/faces

# To build the same image again, name one by its digest: --build-arg BASE=python:3.11-slim@sha256:...
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
# One of pyproject.toml's extras cpu, gpu and openvino, and others behind it: cpu,bulk for object stores.
ARG RUNTIME=cpu
RUN python -m venv --without-pip /opt/balanced-vae
# What the package needs, by installing one without modules: an edit of a module does not install all of it again.
WORKDIR /needs
COPY pyproject.toml requirements.lock ./
RUN mkdir LICENSES \
 && touch README.md LICENSE LICENSES/none \
 && pip --python /opt/balanced-vae install --no-cache-dir -c requirements.lock ".[${RUNTIME}]"
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY LICENSES LICENSES
COPY balanced_vae balanced_vae
COPY training training
COPY export export
COPY serve serve
# pip compiles what it installs, since nothing can be written later.
RUN pip --python /opt/balanced-vae install --no-cache-dir --no-deps --force-reinstall .

FROM ${BASE}
COPY --from=build /opt/balanced-vae /opt/balanced-vae
# The file system may be read-only: nothing is written but what --out names.
ENV PATH=/opt/balanced-vae/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 ORT_DISABLE_TELEMETRY=1
USER 10001:10001
WORKDIR /tmp
EXPOSE 8470
# Of the server as it was started, whatever its port and certificate: it is a container's first process. Where that is
# sample-cli instead, nothing is served and all is well.
HEALTHCHECK --timeout=5s --start-period=30s CMD ["python", "-P", "-m", "serve.healthcheck", "--pid", "1"]
# Inside a container all addresses are the container's own; publish the port on the host's loopback.
# `docker stop` waits 10 seconds.
CMD ["serve-vae", "--listen", "0.0.0.0:8470", "--insecure", "--grace", "8"]
