"""Where the time of a forward goes: each step against what the device can do, layer by layer."""

from dtbert.model.work import Work
from dtbert.profiling.ceilings import Ceilings, measure_ceilings
from dtbert.profiling.forward import Calls, ForwardProfile, profile_forwards, write_trace
from dtbert.profiling.plot import check_plot, save_plot
from dtbert.profiling.report import Profile, Setting
from dtbert.profiling.setup import check_device, describe, random_batch, random_model
from dtbert.profiling.table import table

__all__ = [
    "Calls",
    "Ceilings",
    "ForwardProfile",
    "Profile",
    "Setting",
    "Work",
    "check_device",
    "check_plot",
    "describe",
    "measure_ceilings",
    "profile_forwards",
    "random_batch",
    "random_model",
    "save_plot",
    "table",
    "write_trace",
]
