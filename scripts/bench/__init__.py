"""What the benchmarks on CPUs and GPUs share: checkpoints, windows, and what figures belong to."""
