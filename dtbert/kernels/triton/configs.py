"""How kernels are launched: measured configurations by architecture, and what is taken where nothing was measured.

A configuration depends on the architecture, the kernel, its dtype, its size and its variant, never on the batch: sums
have a fixed order, so that a sequence has the same bits in every batch. Measured ones are rows of
``tuned/<architecture>.json``, which holds for every card of the architecture.

| kernel | size | variants |
|---|---|---|
| ``attention`` | of a head | ``context``, ``received`` (any score beside the context), ``alone`` (any without it) |
| ``fused_linear`` | inputs | none |

`forcing` launches any other configuration: for whoever measures or tests it.
"""

import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import NamedTuple, cast

import torch

from dtbert.files import Json, naming, write_whole
from dtbert.kernels.triton.launch import FLOAT_DTYPES, next_power_of_2

TABLES = Path(__file__).parent / "tuned"


class AttentionConfig(NamedTuple):
    """``block_m`` queries a program, ``block_n`` keys at a time, ``second_n`` in the second look, that of a score."""

    block_m: int
    block_n: int
    second_n: int
    num_warps: int
    num_stages: int


class LinearConfig(NamedTuple):
    """A program's block of ``block_m`` tokens and ``block_n`` outputs, of ``block_k`` inputs at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


Config = AttentionConfig | LinearConfig


class Tuned(NamedTuple):
    """A measured configuration; times are of whatever the tuning run launched."""

    kernel: str
    dtype: str  # "bfloat16"
    size: int  # as `padded_size` gives it
    variant: str
    config: Config
    median_us: float
    quartiles_us: tuple[float, float]

    @property
    def key(self) -> tuple[str, str, int, str]:
        return self.kernel, self.dtype, self.size, self.variant


class Table(NamedTuple):
    """The measured configurations of one architecture, on which card, and by what."""

    arch: str
    device: str
    versions: Mapping[str, str]
    commit: str
    rows: tuple[Tuned, ...]


def padded_size(size: int) -> int:
    """What stands for a size in a key: the next power of two, 16 at least, which the kernels compute with."""
    return max(16, next_power_of_2(size))


def dtype_name(dtype: torch.dtype) -> str:
    """``"bfloat16"`` of ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


def config_for(arch: str, kernel: str, dtype: torch.dtype, size: int, variant: str = "") -> Config:
    """The configuration to launch a kernel with: the forced one, the measured one, or the default.

    Raises:
        ValueError: at the first use of an architecture whose table is damaged.
    """
    forced = _forced.get()
    return forced[kernel] if kernel in forced else _chosen(arch, kernel, dtype, size, variant)


@functools.cache
def _chosen(arch: str, kernel: str, dtype: torch.dtype, size: int, variant: str) -> Config:
    # What was measured in bfloat16 holds in float16, whose code is the same.
    for name in (dtype_name(dtype), *(["bfloat16"] if dtype == torch.float16 else [])):
        measured = _measured(arch).get((kernel, name, padded_size(size), variant))
        if measured is not None:
            return measured
    return default_for(arch, kernel, dtype, size)


@functools.cache
def _measured(arch: str) -> Mapping[tuple[str, str, int, str], Config]:
    path = TABLES / f"{arch}.json"
    return {row.key: row.config for row in read_table(path).rows} if path.is_file() else {}


def default_for(arch: str, kernel: str, dtype: torch.dtype, size: int) -> Config:
    """The configuration of a kernel where nothing was measured."""
    return _KERNELS[kernel].default(arch, dtype, padded_size(size))


def candidates(kernel: str, dtype: torch.dtype, size: int, variant: str = "") -> tuple[Config, ...]:
    """The configurations that are worth measuring, the same on every architecture."""
    return tuple(_KERNELS[kernel].candidates(dtype, padded_size(size), variant))


def variants(kernel: str) -> tuple[str, ...]:
    """The variants of a kernel that have configurations of their own."""
    return _KERNELS[kernel].variants


def tunable_kernels() -> tuple[str, ...]:
    return tuple(_KERNELS)


_forced: ContextVar[Mapping[str, Config]] = ContextVar("_forced", default={})  # noqa: B039 - never changed in place


@contextmanager
def forcing(kernel: str, config: Config) -> Iterator[None]:
    """Launch a kernel with this configuration, whatever the architecture, dtype, size and variant."""
    before = _forced.set({**_forced.get(), kernel: config})
    try:
        yield
    finally:
        _forced.reset(before)


def read_table(path: Path) -> Table:
    """A table as `write_table` writes it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such table; names the file, the place in it, and what to do.
    """
    with naming(f"damaged table of configurations {path}", "; delete it, or write it anew by measuring"):
        document = Json.parse(path.read_bytes()).exactly(Table.__annotations__)
        versions = document.field("versions").of(dict)
        rows = tuple(_read_row(row) for row in document.field("rows").items())
        keys = [row.key for row in rows]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        if twice:
            raise document.field("rows").error(f"expected each configuration once, found two of {twice[0]}")
        texts = [document.field(name).of(str) for name in ("arch", "device", "commit")]
        if texts[0] != path.stem:
            raise document.field("arch").error(f"expected {path.stem!r}, found {texts[0]!r}")
        return Table(texts[0], texts[1], versions, texts[2], rows)


def _read_row(row: Json) -> Tuned:
    row.exactly(Tuned.__annotations__)
    kernel = _one_of(row.field("kernel"), _KERNELS)
    config = row.field("config").record(_KERNELS[kernel].config)
    quartiles = [value.of(float) for value in row.field("quartiles_us").items()]
    for name, number in config._asdict().items():
        least = 16 if name.endswith(("_m", "_n", "_k")) else 1
        power = name == "num_stages" or number & (number - 1) == 0
        if number < least or not power:
            raise row.field("config").error(f"expected {name} of {least} or more, a power of two, found {number}")
    if len(quartiles) != 2:
        raise row.field("quartiles_us").error(f"expected two numbers, found {len(quartiles)}")
    return Tuned(
        kernel,
        _one_of(row.field("dtype"), map(dtype_name, FLOAT_DTYPES)),
        row.field("size").of(int),
        _one_of(row.field("variant"), variants(kernel)),
        config,
        row.field("median_us").of(float),
        (quartiles[0], quartiles[1]),
    )


def _one_of(field: Json, known: Iterable[str]) -> str:
    expected = tuple(known)
    if field.of(str) not in expected:
        raise field.error(f"expected one of {', '.join(map(repr, expected))}, found {field.value!r}")
    return field.of(str)


def write_table(table: Table, folder: Path = TABLES) -> Path:
    """Write ``<folder>/<arch>.json``, a row a line; returns its path."""
    head = json.dumps({**table._asdict(), "rows": []}, indent=2).removesuffix("[]\n}")
    rows = ",\n".join(f"    {json.dumps({**row._asdict(), 'config': row.config._asdict()})}" for row in table.rows)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{table.arch}.json"
    write_whole(path, f"{head}[\n{rows}\n  ]\n}}\n")
    return path


# Defaults by architecture, chosen by arithmetic and by what compiles without spills. One was measured beside others: of
# the product on sm_90 in 16 bit, 768 x 3072 with erf-GELU, none of seven on an H200 was clearly faster.
_OTHERS = "others"

# Attention in 16 bit and in float32, each for heads of at most 64 and of at most 128. On sm_90 a table has what is
# faster for heads of at most 64: in 16 bit, blocks of 64 queries, though these read keys and values, from the cache
# that all share, twice as often as those of 128.
_SINGLE = (AttentionConfig(32, 32, 32, 4, 1), AttentionConfig(32, 32, 32, 8, 1))
_ATTENTION: Mapping[str, tuple[tuple[AttentionConfig, AttentionConfig], tuple[AttentionConfig, AttentionConfig]]] = {
    "sm_80": ((AttentionConfig(128, 64, 64, 8, 2), AttentionConfig(64, 64, 64, 8, 2)), _SINGLE),
    "sm_90": ((AttentionConfig(128, 64, 128, 8, 3), AttentionConfig(128, 64, 128, 8, 2)), _SINGLE),
    "sm_100": ((AttentionConfig(128, 64, 64, 8, 2), AttentionConfig(128, 64, 64, 8, 2)), _SINGLE),
    "gfx942": (
        (AttentionConfig(128, 64, 64, 4, 1), AttentionConfig(64, 64, 64, 4, 1)),
        (AttentionConfig(32, 32, 32, 4, 1), AttentionConfig(32, 32, 32, 4, 1)),
    ),
    # Large and not square: few steps for the tests, which mistaking rows for columns would fail.
    "interpreter": ((AttentionConfig(128, 64, 64, 4, 1),) * 2, (AttentionConfig(128, 64, 64, 4, 1),) * 2),
    _OTHERS: ((AttentionConfig(64, 64, 64, 4, 1), AttentionConfig(64, 64, 64, 8, 1)), _SINGLE),
}

# Products in 16 bit and in float32.
_LINEAR: Mapping[str, tuple[LinearConfig, LinearConfig]] = {
    "sm_80": (LinearConfig(128, 128, 32, 8, 3), LinearConfig(64, 64, 32, 8, 2)),
    "sm_90": (LinearConfig(128, 128, 64, 8, 3), LinearConfig(64, 64, 32, 8, 2)),
    "sm_100": (LinearConfig(128, 128, 64, 8, 3), LinearConfig(64, 64, 32, 8, 2)),
    "gfx942": (LinearConfig(128, 128, 32, 4, 2), LinearConfig(64, 64, 32, 4, 2)),
    _OTHERS: (LinearConfig(64, 128, 32, 4, 2), LinearConfig(64, 64, 32, 8, 2)),
}


def _attention_default(arch: str, dtype: torch.dtype, size: int) -> Config:
    return _ATTENTION.get(arch, _ATTENTION[_OTHERS])[dtype == torch.float32][size > 64]


def _attention_candidates(dtype: torch.dtype, size: int, variant: str) -> Iterator[Config]:
    # None that spills on sm_90: it is hardly the fastest, and `scripts/compile_report.py` would call it a problem.
    if dtype == torch.float32:
        looks = [(32, 32, 4, 1), (64, 32, 8, 1), (64, 64, 8, 1)]
    elif size > 64:
        looks = [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 3)]
    else:
        looks = [(64, 64, 4, 3), (64, 128, 4, 2), (64, 128, 4, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 3)]
    for block_m, block_n, num_warps, num_stages in looks:
        # Without a second look its blocks make no difference; with one, a warpgroup sums rows of 64 keys without help.
        rows = (32,) if dtype == torch.float32 else (64, 128) if num_warps == 4 else (128,)
        for second_n in (block_n,) if variant == "context" else rows:
            yield AttentionConfig(block_m, block_n, second_n, num_warps, num_stages)


def _linear_default(arch: str, dtype: torch.dtype, size: int) -> Config:
    return _LINEAR.get(arch, _LINEAR[_OTHERS])[dtype == torch.float32]


def _linear_candidates(dtype: torch.dtype, size: int, variant: str) -> Iterator[Config]:
    if dtype == torch.float32:
        blocks = [(64, 64, 32, 8, 2), (64, 64, 32, 4, 2), (128, 64, 32, 8, 2)]
    else:
        blocks = [(128, 128, 64, 8, 3), (128, 256, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4)]
    yield from (LinearConfig(*block) for block in blocks)


class _Kernel(NamedTuple):
    config: Callable[..., Config]
    variants: tuple[str, ...]
    default: Callable[[str, torch.dtype, int], Config]
    candidates: Callable[[torch.dtype, int, str], Iterator[Config]]


_KERNELS: Mapping[str, _Kernel] = {
    "attention": _Kernel(AttentionConfig, ("context", "received", "alone"), _attention_default, _attention_candidates),
    "fused_linear": _Kernel(LinearConfig, ("",), _linear_default, _linear_candidates),
}


def attention_config(arch: str, dtype: torch.dtype, head_size: int, variant: str) -> AttentionConfig:
    """`config_for` the kernel ``attention``."""
    return cast(AttentionConfig, config_for(arch, "attention", dtype, head_size, variant))


def linear_config(arch: str, dtype: torch.dtype, inputs: int) -> LinearConfig:
    """`config_for` the kernel ``fused_linear``."""
    return cast(LinearConfig, config_for(arch, "fused_linear", dtype, inputs))
