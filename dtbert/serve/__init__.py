"""Question answering over HTTP: dynamic batches of one model, limits and load, and a page to try it."""

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the service needs {error.name}, which is not installed: pip install 'dtbert[serve]'", name=error.name
    ) from error

from dtbert.serve.app import create_app
from dtbert.serve.service import Service
from dtbert.serve.settings import Settings

__all__ = ["Service", "Settings", "create_app"]
