# bitatlas dashboard. Build: docker build -t bitatlas .
# Run:   docker run --init --rm -p 127.0.0.1:8501:8501 -v bitatlas-data:/data -v /path/to/models:/models:ro bitatlas
FROM python:3.11-slim

RUN useradd --create-home --uid 10001 bitatlas \
    && mkdir -p /srv/bitatlas /data /models \
    && chown bitatlas:bitatlas /data /models

WORKDIR /srv/bitatlas
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY app ./app
COPY analysis ./analysis
COPY solvers ./solvers
COPY kernels ./kernels
COPY cache ./cache
# The CPU build of torch; for a GPU image start from a CUDA base image and drop the index.
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "$(grep '^torch' constraints.txt)" \
    && pip install --no-cache-dir -c constraints.txt .

USER bitatlas
ENV BITATLAS_HOME=/data \
    BITATLAS_MODEL_ROOTS=/models \
    BITATLAS_IN_CONTAINER=1 \
    HF_HUB_DISABLE_TELEMETRY=1
VOLUME ["/data"]
EXPOSE 8501
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8501/_stcore/health', timeout=3)"]
CMD ["bitatlas", "serve", "--port", "8501"]
