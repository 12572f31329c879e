"""A page that shows traces, in one file that asks nobody for anything."""

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path

from dtbert.qa import Trace
from dtbert.tracing.text import marked

_FOLDER = Path(__file__).parent
# What draws the element `<main>`: `dtbertTrace(element, traces)`, of dictionaries as `Trace.to_dict` makes them.
SCRIPT_FILE, STYLE_FILE = _FOLDER / "trace.js", _FOLDER / "trace.css"
_BODY_STYLE = """
html { color-scheme: light dark; background: light-dark(#fff, #14161a); scroll-padding-top: 4rem; }
body { margin: 0; }
header, main { padding: 1rem clamp(1rem, 4vw, 3rem) 0; }
main { min-height: 95vh; padding-bottom: 4rem; }
noscript { display: block; padding: 1rem; white-space: pre-wrap; font-family: monospace; }
"""
_START = 'dtbertTrace(document.querySelector("main"), JSON.parse(document.getElementById("traces").textContent));\n'


def page(traces: Sequence[Trace], titles: Sequence[str]) -> str:
    """An HTML page of traces side by side, each under its title.

    Args:
        traces: of one question and context, by one model.
        titles: as many.

    Raises:
        ValueError: no trace, as many titles as there are not traces, or traces of different texts.
    """
    if not traces or len(traces) != len(titles):
        raise ValueError(f"{len(traces)} traces and {len(titles)} titles: give at least one trace, and a title to each")
    if len({(trace.question, trace.context, len(trace.windows)) for trace in traces}) > 1:
        raise ValueError("the traces are of different texts or windows: a page shows one question and context")
    data = json.dumps(
        [{"title": title, **one.to_dict()} for one, title in zip(traces, titles, strict=True)], separators=(",", ":")
    )
    script, style = SCRIPT_FILE.read_text("utf-8") + _START, STYLE_FILE.read_text("utf-8") + _BODY_STYLE
    # A browser that keeps to this runs no script but this one, whatever the text, and fetches nothing.
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'"
    plain = "\n\n".join(f"{title}\n{marked(one)}" for one, title in zip(traces, titles, strict=True))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which tokens stayed: {html.escape(traces[0].question)}</title>
<style>{style}</style>
</head>
<body>
<header class="dtbert-trace"><h1>Which tokens stayed</h1></header>
<main></main>
<noscript>{html.escape(plain)}</noscript>
<script type="application/json" id="traces">{_inside_script(data)}</script>
<script>{script}</script>
</body>
</html>
"""


def _inside_script(data: str) -> str:
    """JSON that ends no element and opens no comment: it is ASCII, and these stand in strings alone."""
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
