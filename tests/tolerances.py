"""One table of tolerances: absolute error allowed against the float64 or float32 oracle, for values of order 1."""

import torch

# A step may round its result, and what enters its products, to the dtype.
STEP = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}

# Agreement: logits and hidden states against transformers in float32.
AGREEMENT = 1e-5
