"""What a file is that cannot be read, by how it begins and by what the unpickler says of it."""

import re
import zipfile
from pathlib import Path

from dtbert.files import first_line

_POINTER = "a Git LFS pointer, which stands for the file: fetch that with `git lfs pull`"
_PAGE = "a web page: the download went wrong, fetch it again"
_PICKLE = "a pickle, which torch.save writes: give it a name that ends in .bin"
_TENSORFLOW = "a model of TensorFlow's: convert it to safetensors where it comes from"

# How files begin, what they are, and the endings of names under which they are no strangers.
_KINDS: tuple[tuple[bytes, str, tuple[str, ...]], ...] = (
    (rb"version https://git-lfs", _POINTER, ()),
    (rb"\s*<(!doctype|html|head|body)", _PAGE, ()),
    (rb"\s*<(\?xml|error)", "a server's message: the download went wrong, fetch it again", ()),
    (rb"\x89HDF", f"an HDF5 file, {_TENSORFLOW}", ()),
    (rb"....TFL3", _TENSORFLOW, ()),
    # Protocol buffers, which begin with a version; in ONNX the name of the exporter, or the graph, is next.
    (rb"\x08\x01[\x0a\x12]", _TENSORFLOW, ()),
    (rb"\x08[\x03-\x20][\x12\x1a\x3a\x42]", "an ONNX model: load the weights that it was made of", ()),
    (rb"GGUF", "a GGUF file, llama.cpp's: load the weights that it was made of", ()),
    (rb"\x1f\x8b", "a gzip file: unpack it first", ()),
    (rb"PK\x03\x04", "a zip archive: unpack it first", ()),
    (rb"\x80[\x02-\x05]", _PICKLE, (".bin",)),
    # A safetensors file begins with the size of its header, 8 bytes.
    (rb".{6}\x00\x00\{", "a safetensors file: give it a name that ends in .safetensors", (".safetensors",)),
    (rb"\s*[{\[]", "JSON: an index perhaps, or a server's message", (".json",)),
)
_TEXT = re.compile(rb"[\x09\x0a\x0d\x20-\x7e]+")


def what_else(path: Path) -> str:
    """What a file is, such as "it is a web page: ...", if it is none of the kind that its name says; else nothing."""
    with path.open("rb") as file:
        beginning = file.read(64)
    if not beginning:
        return "it is empty"
    for sign, meaning, endings in _KINDS:
        if re.match(sign, beginning, re.IGNORECASE | re.DOTALL):
            if sign.startswith(b"PK") and _is_of_torch(path):
                meaning, endings = _PICKLE, (".bin",)
            return "" if path.suffix in endings else f"it is {meaning}"
    if path.suffix in (".safetensors", ".bin") and _TEXT.fullmatch(beginning):
        return f"it is a text, which begins {beginning[:32].decode()!r}"
    return ""


def unpickler_says(error: Exception) -> str:
    """The first line of what torch's unpickler raised, without its advice to run whatever the file holds."""
    reason = first_line(error)
    return "it holds something else, or is damaged" if "weights_only" in reason else reason


def _is_of_torch(path: Path) -> bool:
    """Whether a zip archive is what `torch.save` writes; one that was cut off may be."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return True
