"""The parts of gpu_check.sh: `plan` says which, `runner` starts them, `summary` says what became of them."""
