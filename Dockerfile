# One image, two flavours. The coordinator and the command line need no MLX; workers do:
#   docker build --target coordinator -t stagemesh-coordinator .
#   docker build --target worker      -t stagemesh-worker .
FROM python:3.11-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/stagemesh
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY stagemesh stagemesh
COPY coordinator coordinator
COPY stage_worker stage_worker
COPY services services
RUN /opt/stagemesh/bin/pip install -c constraints.txt .

FROM build AS build-worker
RUN /opt/stagemesh/bin/pip install -c constraints.txt '.[worker]'

FROM python:3.11-slim-bookworm AS coordinator
RUN useradd --uid 10001 --create-home stagemesh \
 && mkdir -p /var/lib/stagemesh /certs \
 && chown stagemesh:stagemesh /var/lib/stagemesh /certs
ENV PATH=/opt/stagemesh/bin:$PATH PYTHONUNBUFFERED=1 STAGEMESH_HOME=/var/lib/stagemesh
COPY --from=build /opt/stagemesh /opt/stagemesh
USER stagemesh
WORKDIR /var/lib/stagemesh
VOLUME ["/var/lib/stagemesh"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["stagemesh"]
CMD ["--help"]

FROM coordinator AS worker
COPY --from=build-worker /opt/stagemesh /opt/stagemesh
