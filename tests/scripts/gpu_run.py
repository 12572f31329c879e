"""Records of a run of gpu_check.sh, as its parts write them."""

import importlib
from typing import Any

Record = dict[str, Any]


def module(name: str) -> Any:
    """One of gpu_check's, for tests that use the fixture ``_scripts``."""
    return importlib.import_module(f"gpu_check.{name}")


def result(provider: str, ms: float, **fields: Any) -> Record:
    return {
        "provider": provider,
        "ms": ms,
        "quartiles_ms": [ms, ms],
        "blocks": 9,
        "calls": 5,
        "launch": "called",
    } | fields


def row(section: str, work: str, *results: Record, **fields: Any) -> Record:
    return {"kind": "row", "section": section, "work": work, "results": list(results), "not_timed": [], **fields}


def part(name: str, verdict: str = "ok", *tail: str) -> Record:
    return {"kind": "part", "part": name, "verdict": verdict, "seconds": 12.5, "tail": list(tail)}


def smoke(kernel: str, ptxas: str, digest: str, error: str = "") -> Record:
    fields = {"kernel": kernel, "dtype": "bf16", "ptxas": ptxas, "error": error, "relative_error": 0.002}
    return {"kind": "smoke", **fields, "digest": digest}


CONFIG = {"block_m": 128, "block_n": 64, "second_n": 64, "num_warps": 8, "num_stages": 3}
KEY = {"kernel": "attention", "dtype": "bfloat16", "size": 64, "variant": "context"}


def good_run() -> list[Record]:
    """Everything right; one aim missed, and torch.compile's figures left out."""
    return [
        {
            "kind": "record",
            "date": "2026-11-26T15:30:00+00:00",
            "commit": "0123456789abcdef",
            "device": {"name": "NVIDIA H200", "driver": "580.1"},
            "versions": {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"},
            "ceilings": {"flops_per_second": 7.8e14, "bytes_per_second": 4.2e12, "dtype": "bfloat16"},
        },
        smoke("attention", "Triton's", "aa"),
        smoke("attention", "machine's", "aa"),
        {"kind": "memcheck", "tokens": 1},
        {"kind": "candidate", **KEY, "config": list(CONFIG.values()), "error": "", "seconds": 3.1},
        {
            "kind": "tuned",
            **KEY,
            "config": CONFIG,
            "median_us": 50.0,
            "quartiles_us": [49.0, 51.0],
            "default_us": 60.0,
            "tried": 5,
            "not_timed": [],
        },
        {"kind": "test", "name": "test_exact.py::test_one", "outcome": "passed", "seconds": 1, "reason": ""},
        row(
            "model",
            "32x384",
            result("dtbert", 2.6),
            result("dtbert, graphs", 2.5),
            result("transformers sdpa", 5.5),
            flops=1.13e12,
        ),
        row(
            "latency",
            "1x128",
            result("dtbert", 1.5),
            result("dtbert, graphs", 0.28),
            result("transformers sdpa", 2.8),
        ),
        row(
            "squad",
            "256 SQuAD windows",
            result("dtbert, 65536 tokens a batch", 8.0, engine="dtbert", windows_per_second=32000),
            result("transformers sdpa, 32 windows a batch", 30.0, engine="transformers sdpa", windows_per_second=8533),
        ),
        row("attention", "32x384", result("dtbert", 0.044), result("sdpa flash", 0.046)),
        row("scores", "32x384", result("no score", 0.044), result("received", 0.054), result("cls", 0.045)),
        row(
            "schedule",
            "32x384",
            result("all tokens", 2.5),
            result("published, received", 1.5, macs_saved=0.46),
        ),
        part("smoke"),
        {"kind": "skipped", "section": "tune", "reason": "no time was left"},
        part("compiled", "left out: too little time (60 s at least)"),
    ]


def bad_run() -> list[Record]:
    """As good, but for one of each kind of failure."""
    return [
        *good_run(),
        smoke("embed", "Triton's", "bb", "embed: off by 3.0e-01 of its norm, 1e-02 allowed"),
        smoke("linear", "Triton's", "cc"),
        smoke("linear", "machine's", "dd"),
        {"kind": "candidate", **KEY, "config": [64, 64, 64, 4, 3], "error": "7 of 9 values are wrong", "seconds": 3.0},
        {
            "kind": "test",
            "name": "test_model.py::test_two",
            "outcome": "failed",
            "seconds": 1,
            "reason": "AssertionError",
        },
        {"kind": "skipped", "section": "steps", "reason": "RuntimeError: CUDA error: an illegal memory access"},
        row("graphs", "1x128, called") | {"not_timed": [{"provider": "dtbert", "reason": "wrong result"}]},
        part("memcheck", "exit code 9", "Invalid __global__ read of size 2 bytes", "ERROR SUMMARY: 1 error"),
        part("tune", "not finished in 45 s"),
    ]
