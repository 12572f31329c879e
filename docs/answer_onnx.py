"""Answer a question with onnxruntime and tokenizers alone: python answer_onnx.py model.onnx QUESTION CONTEXT"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class Answerer:
    def __init__(self, path: str) -> None:
        self.session = onnxruntime.InferenceSession(path)
        self.tokenizer = Tokenizer.from_file(str(Path(path).with_name("tokenizer.json")))
        self.tokenizer.encode_special_tokens = True  # "[SEP]" in a text is text
        self.about = json.loads(Path(f"{path}.json").read_text("utf-8"))

    def __call__(self, question: str, context: str) -> tuple[str, int, int]:
        """The answer, and where it begins and ends in the context, in characters."""
        asked = self.tokenizer.encode(question, add_special_tokens=False).ids
        text = self.tokenizer.encode(context, add_special_tokens=False)
        words = np.array(text.word_ids)
        begins = np.append(True, words[1:] != words[:-1])
        ends = np.append(words[1:] != words[:-1], True)
        cls, sep, longest = (self.about[name] for name in ("cls_id", "sep_id", "max_answer_tokens"))
        room = self.about["window"] - 3 - len(asked)  # tokens of context that the model reads at a time
        step = room - self.about["stride"]
        best, first, last = -np.inf, 0, 0
        for window in range(0, max(len(text.ids) - room, 0) + step, step):
            here = slice(window, window + room)
            part = text.ids[here]
            ids = np.array([[cls, *asked, sep, *part, sep]])
            segments = np.array([[0] * (len(asked) + 2) + [1] * (len(part) + 1)])
            start, end = self.session.run(None, {"input_ids": ids, "token_type_ids": segments})
            nothing = start[0, 0] + end[0, 0]  # at [CLS]: that the answer is not in this window
            start = np.where(begins[here], start[0, len(asked) + 2 : -1] - nothing, -np.inf)
            end = np.where(ends[here], end[0, len(asked) + 2 : -1], -np.inf)
            spans = start[:, None] + end  # a span must not end before it begins, nor be too long
            spans = np.where(np.triu(np.tri(len(part), k=longest - 1)), spans, -np.inf)
            if spans.max() > best:
                best, (one, other) = spans.max(), divmod(int(spans.argmax()), len(part))
                first, last = window + one, window + other
        begin, stop = text.offsets[first][0], text.offsets[last][1]
        return context[begin:stop], begin, stop


if __name__ == "__main__":
    print(*Answerer(sys.argv[1])(sys.argv[2], sys.argv[3]), sep="\t")
