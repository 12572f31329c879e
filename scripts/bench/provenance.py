"""What figures belong to: the commit, the versions of packages, and the processor."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit that is checked out, whether or not files have changed since; ``"unknown"`` outside a repository."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, changes = (
            subprocess.run([*git, *command], capture_output=True, text=True, check=True).stdout.strip()
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head} with changes" if changes else head


def version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_fields() -> dict[str, str]:
    """What Linux says of the last of the processors; empty elsewhere."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info.open())}


def cpu_name() -> str:
    return cpu_fields().get("model name", platform.processor() or platform.machine())
