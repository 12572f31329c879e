"""Attention in the configuration that was measured to be the fastest, against the one that it would take without."""

from dataclasses import replace

from torch import Tensor

from dtbert.kernels.triton import Triton
from dtbert.kernels.triton.configs import config_for, default_for, forcing
from dtbert.kernels.triton.launch import architecture
from gpu_bench.attention import Inputs
from gpu_bench.setting import Rows, Setting
from gpu_bench.timing import Contender, compare

TUNED, UNTUNED = "tuned", "untuned"
_VARIANTS = ("context", "received")


def tuned(setting: Setting) -> Rows:
    """A row for each work and variant whose configuration is not the default: none without a table."""
    setting = replace(setting, backend=Triton())
    arch, size = architecture(setting.device), setting.sizes.head_size
    default = default_for(arch, "attention", setting.dtype, size)
    for work, lengths in setting.works.items():
        inputs = Inputs(setting, lengths)
        for variant in _VARIANTS:
            config = config_for(arch, "attention", setting.dtype, size, variant)
            if config == default:
                print(f"tuned: attention, {variant}, {work}: the default is what is launched", flush=True)
                continue

            def run(index: int, variant: str = variant, inputs: Inputs = inputs) -> Tensor:
                return inputs.attend(index) if variant == "context" else inputs.attend_and_score("received", index)[1]

            def run_untuned(index: int) -> Tensor:
                with forcing("attention", default):
                    return run(index)

            contenders = [Contender(TUNED, run, expected=run_untuned(0)), Contender(UNTUNED, run_untuned)]
            row = compare(contenders, setting.device, setting.effort, sets=inputs.sets, launch="replayed")
            configs = {TUNED: list(config), UNTUNED: list(default)}
            yield {"section": "tuned", "work": f"attention, {variant}, {work}", "configs": configs, **row}
