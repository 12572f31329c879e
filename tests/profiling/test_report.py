"""What people get to see: the table, the picture."""

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from dtbert.profiling import Calls, Ceilings, ForwardProfile, Profile, Work, check_plot, save_plot, table


def scaled(forward: ForwardProfile, seconds: float, work: int) -> ForwardProfile:
    """The same forward with times and work of another size."""
    steps = {
        key: Calls(
            tuple(Work(one.flops * work, one.bytes * work) for one in measured.works),
            tuple(seconds * (1 + index) for index in range(3)),
        )
        for key, measured in forward.steps.items()
    }
    tokens = tuple(count * 500 for count in forward.tokens)
    times = tuple(seconds * 30 * (1 + index) for index in range(3))
    return replace(forward, steps=steps, tokens=tokens, seconds=times, watched_seconds=times, peak_bytes=10**10)


def resized(profile: Profile, seconds: float, work: int, ceilings: Ceilings) -> Profile:
    assert profile.dropping is not None
    return replace(
        profile,
        ceilings=ceilings,
        everything=scaled(profile.everything, seconds, work),
        dropping=scaled(profile.dropping, seconds, work),
    )


def test_table_fits_a_terminal_whatever_the_sizes(profile: Profile) -> None:
    gpu = resized(profile, 2e-5, 10**5, Ceilings(7.9e14, 4.3e12))
    slow = resized(profile, 0.25, 10**5, Ceilings(2e11, 1e10))
    for one in (profile, gpu, slow, replace(profile, dropping=None)):
        lines = table(one).splitlines()
        assert max(map(len, lines)) <= 100
        assert not any(line != line.rstrip() for line in lines)
    assert "TFLOP/s GB/s" in table(gpu).replace("  ", " ")
    assert "GFLOP/s" in table(slow)


def test_table_tells_steps_layers_and_the_saving(profile: Profile) -> None:
    words = table(profile).split()
    assert {"embeddings", "qkv", "significance", "restore", "other", "total", "outside"} <= set(words)
    saving = profile.saving()
    assert saving is not None
    assert f"{saving.flops:.2f} of the FLOPs:" in table(profile)
    alone = table(replace(profile, dropping=None))
    assert "schedule" not in alone
    assert "all ms" not in alone


@pytest.mark.parametrize("dropping", [True, False], ids=["with schedule", "without"])
def test_picture_is_drawn(profile: Profile, tmp_path: Path, dropping: bool) -> None:
    path = tmp_path / "profile.png"
    save_plot(profile if dropping else replace(profile, dropping=None), path)
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1240, 1480)
    assert 30_000 < path.stat().st_size < 1_000_000


def deep(forward: ForwardProfile) -> ForwardProfile:
    """The same as if it had 24 layers, and thousands of tokens."""
    layers, per_layer = range(24), {key: one for key, one in forward.steps.items() if key[0] is not None}
    steps = {(layer, name): one for layer in layers for (own, name), one in per_layer.items() if own == layer % 3}
    outside = {key: one for key, one in forward.steps.items() if key[0] is None}
    return replace(forward, steps=steps | outside, tokens=tuple(9990 + 300 * left for left in range(25, 0, -1)))


@pytest.mark.parametrize("change", [lambda forward: forward, deep], ids=["3 layers", "24 layers"])
def test_words_of_the_picture_stand_apart_and_inside(
    profile: Profile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[ForwardProfile], ForwardProfile],
) -> None:
    from matplotlib.figure import Figure

    assert profile.dropping is not None
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    named = replace(profile, everything=change(profile.everything), dropping=change(profile.dropping))
    named = replace(named, setting=replace(profile.setting, model="/home/somebody/models/" + "best-of-all/" * 9))
    save_plot(named, tmp_path / "profile.png")
    (figure,) = drawn
    figure.draw_without_rendering()
    _, bars = figure.axes
    places = [label.get_window_extent() for label in bars.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(places))
    assert len(places) == {3: 4, 24: 13}[len(named.everything.tokens) - 1]
    titles = [axes.title.get_window_extent() for axes in figure.axes]
    inside = [*titles, figure.legends[0].get_window_extent(), figure.texts[0].get_window_extent(), *places]
    assert all(0 <= one.x0 < one.x1 <= figure.bbox.x1 and 0 <= one.y0 < one.y1 <= figure.bbox.y1 for one in inside)


def test_picture_names_model_device_and_steps(profile: Profile, tmp_path: Path) -> None:
    path = tmp_path / "profile.svg"
    save_plot(profile, path)
    text = path.read_text("utf-8")
    for part in ("a model (3 \N{MULTIPLICATION SIGN} 16)", "float32", "thread", "kernels: cpu", "attention output"):
        assert part in text
    assert text.count(">span head<") == 1


def test_picture_that_cannot_be_drawn_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"profile\.gif: .*\.png, \.pdf, \.svg"):
        check_plot(tmp_path / "profile.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"matplotlib.* pip install 'dtbert\[plot\]'"):
        check_plot(tmp_path / "profile.png")
