# The owner, on a GPU. Build in the root of the repository:
#   docker build -f examples/deploy/owner.Dockerfile -t splitfl-owner .
# For an owner without a GPU, build with --build-arg BASE=debian:12-slim and CHANNEL=cpu.
ARG BASE=nvidia/cuda:12.8.1-base-ubuntu24.04
FROM ${BASE}
ARG CHANNEL=cu128
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home --shell /usr/sbin/nologin splitfl
WORKDIR /srv/splitfl
COPY pyproject.toml README.md LICENSE /tmp/source/
COPY splitfl /tmp/source/splitfl
COPY party /tmp/source/party
COPY model_owner /tmp/source/model_owner
COPY protocols /tmp/source/protocols
RUN python3 -m venv /opt/splitfl \
    && /opt/splitfl/bin/pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/${CHANNEL} \
    && /opt/splitfl/bin/pip install --no-cache-dir "/tmp/source[owner,postgres]" \
    && rm -rf /tmp/source \
    && mkdir /var/lib/splitfl && chown splitfl: /var/lib/splitfl
ENV PATH=/opt/splitfl/bin:$PATH HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
USER splitfl
EXPOSE 5555
VOLUME /var/lib/splitfl
HEALTHCHECK --start-period=10m --interval=15s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:9100/healthz', timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["splitfl", "serve"]
CMD ["--config", "/etc/splitfl/serve.toml"]
