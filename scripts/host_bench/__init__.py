"""The parts of bench_host.py."""
