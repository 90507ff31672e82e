# A data holder, on a CPU. Build in the root of the repository:
#   docker build -f examples/deploy/party.Dockerfile -t splitfl-party .
FROM python:3.12-slim
RUN useradd --system --uid 10002 --create-home --shell /usr/sbin/nologin splitfl
COPY pyproject.toml README.md LICENSE /tmp/source/
COPY splitfl /tmp/source/splitfl
COPY party /tmp/source/party
COPY model_owner /tmp/source/model_owner
COPY protocols /tmp/source/protocols
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu \
    && pip install --no-cache-dir "/tmp/source[data,report,privacy]" \
    && rm -rf /tmp/source \
    && mkdir /work && chown splitfl: /work
ENV HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 SPLITFL_LEDGER=/work/ledger.sqlite
USER splitfl
WORKDIR /work
VOLUME /work
STOPSIGNAL SIGINT
ENTRYPOINT ["splitfl"]
CMD ["tune", "--config", "/etc/splitfl/tune.toml"]
