"""Peak memory of loading the 6x768 model, and on how many threads' work loading the shipped one waits."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtbert.model import BertConfig, BertForQuestionAnswering
from dtbert.weights import convert, load_model, save_model, to_hub_tensors

# Resident memory once everything is imported, and the peak after loading, per byte of weights. getrusage would not do:
# its peak includes that of the process which started this one.
MEASURE = """
import sys
from pathlib import Path
import torch
from dtbert.kernels import cpu
from dtbert.weights import load_model

cpu.blocked_pays = lambda weight: sys.argv[2] == "blocked"

def kibibytes(field):
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(field))

torch.set_num_threads(1)
before = kibibytes("VmRSS:")
model = load_model(sys.argv[1])
print((kibibytes("VmHWM:") - before) * 1024 / sum(4 * parameter.numel() for parameter in model.parameters()))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The published sizes with random weights, in each form a checkpoint may have."""
    folder = tmp_path_factory.mktemp("memory")
    model = BertForQuestionAnswering(BertConfig())
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.1, 0.1)
    save_model(model, folder / "safetensors")
    convert(folder / "safetensors", folder / "int8", int8=True)
    (folder / "bin").mkdir()
    shutil.copy(folder / "safetensors" / "config.json", folder / "bin")
    torch.save(to_hub_tensors(model), folder / "bin" / "pytorch_model.bin")
    del model
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="reads resident memory from /proc")
@pytest.mark.parametrize(("form", "layout"), [("safetensors", "blocked"), ("bin", "plain"), ("int8", "blocked")])
def test_loading_takes_at_most_1_3_times_the_weights(folder: Path, form: str, layout: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(folder / form), layout]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    print(f"peak above what was there before, per byte of weights: {ratio:.3f}")
    assert 0.9 < ratio <= 1.3, "below 0.9 the measurement would be broken"


# torch shares operations on more values among its threads.
ALONE = 2**15


class Shared(TorchDispatchMode):
    """Counts the operations that several threads share, as far as their tensors have values."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor) and not one.is_meta]
        self.count += not function.is_view and any(one.numel() > ALONE for one in tensors)
        return function(*args, **(kwargs or {}))


def test_loading_shares_few_operations_among_threads() -> None:
    with Shared() as shared:
        model = load_model()
    large = sum(parameter.numel() > ALONE for parameter in model.parameters())
    # Each weight as stored is copied, scaled and looked through, three of them become one, and that is laid out.
    assert large <= shared.count <= 6 * large
