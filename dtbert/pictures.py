"""What the pictures have in common: their look, and matplotlib, which is loaded only to draw one."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}


_ENDINGS = (".png", ".pdf", ".svg")


def check_picture(path: Path, extra: str) -> None:
    """Raise ValueError unless the ending names a format and matplotlib is there, which an extra of dtbert brings."""
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"--plot {path}: the ending must be one of {', '.join(_ENDINGS)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--plot needs matplotlib, which is not installed: pip install 'dtbert[{extra}]'") from error


@contextmanager
def picture(path: Path, width: float, height: float, dpi: int, style: dict[Any, Any]) -> Iterator["Figure"]:
    """A figure, in inches, to draw on; then it is saved, in the format that the file's ending names."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_STYLE, **style}):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        with replacing(path) as partial:
            figure.savefig(partial, dpi=dpi, format=path.suffix[1:])
