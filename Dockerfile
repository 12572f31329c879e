# The service on a CPU: docker build -t dtbert . && docker run --rm -p 127.0.0.1:8000:8000 dtbert --shed budget=0.5
FROM python:3.12-slim AS build
WORKDIR /source
RUN python -m venv /opt/dtbert
# torch by itself: its layer stays as it is when dtbert changes.
COPY constraints.txt ./
RUN /opt/dtbert/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu \
    "torch==$(sed -n 's/^torch==//p' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY dtbert dtbert
RUN /opt/dtbert/bin/pip install --no-cache-dir -c constraints.txt '.[serve]'

FROM python:3.12-slim
RUN useradd --system --uid 10001 --home-dir /nonexistent --shell /usr/sbin/nologin dtbert
COPY --from=build /opt/dtbert /opt/dtbert
ENV PATH=/opt/dtbert/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HOME=/tmp/huggingface
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health/ready', timeout=4)"]
# SIGTERM, Docker's own, lets it answer what it has taken.
ENTRYPOINT ["dtbert", "serve", "--host", "0.0.0.0"]
