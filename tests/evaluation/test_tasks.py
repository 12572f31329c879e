"""Tasks of whole texts: GLUE's files as they are, the exports, and what a model does with them."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtbert.evaluation import TASKS, PreparedTexts, measure_texts, read_task, task_named
from dtbert.model import LengthSchedule, Threshold
from dtbert.text import SentenceEncoder, TextClassifier
from dtbert.text.running import pack
from dtbert.weights import places_of
from tests.text.conftest import write_classifier
from tests.text.test_classifier import some_texts

MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
# The first lines of GLUE's official files, cut: of each two examples, with the texts and labels that they mean.
OFFICIAL = {
    "cola": (
        "gj04\t1\t\tThe sailors rode the breeze clear of the rocks.\ngj04\t0\t*\tThe box \"opens easily.\n",
        [("The sailors rode the breeze clear of the rocks.", None, 1), ('The box "opens easily.', None, 0)],
    ),
    "sst2": (
        "sentence\tlabel\nhide new secretions \t0\nbo\u2028ba\t1\n",
        [("hide new secretions ", None, 0), ("bo\u2028ba", None, 1)],
    ),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t1\t2\ta\tb\r\n0\t3\t4\t\"c\td\r\n",
        [("a", "b", 1), ('"c', "d", 0)],
    ),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
        "0\tm\tf\t2012\t1\tn\tn\ta\tb\t5.000\n1\tm\tf\t2012\t1\tn\tn\tc\td\t3.8\n",
        [("a", "b", 5.0), ("c", "d", 3.8)],
    ),
    "qqp": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n7\t1\t2\ta\tb\t0\n8\t3\t4\tc\td\t1\n",
        [("a", "b", 0), ("c", "d", 1)],
    ),
    "mnli": (
        MNLI.replace(" ", "\t") + "\tsentence1\tsentence2\tlabel1\tgold_label\n"
        + "0\t1\t1n\tg\t(\t(\t(\t(\ta\tb\tneutral\tneutral\n0\t1\t1n\tg\t(\t(\t(\t(\tc\td\tentailment\tcontradiction\n",
        [("a", "b", 1), ("c", "d", 2)],
    ),
    "qnli": (
        "index\tquestion\tsentence\tlabel\n0\ta\tb\tentailment\n1\tc\td\tnot_entailment\n",
        [("a", "b", 0), ("c", "d", 1)],
    ),
    "rte": (
        "index\tsentence1\tsentence2\tlabel\n0\ta\tb\tnot_entailment\n1\tc\td\tentailment\n",
        [("a", "b", 1), ("c", "d", 0)],
    ),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n1\tc\td\t0\n", [("a", "b", 1), ("c", "d", 0)]),
}  # fmt: skip
# The names of the columns in exports of the hub's data set `glue`, where labels are numbers.
EXPORTED = {
    "cola": ["sentence"],
    "sst2": ["sentence"],
    "mrpc": ["sentence1", "sentence2"],
    "stsb": ["sentence1", "sentence2"],
    "qqp": ["question1", "question2"],
    "mnli": ["premise", "hypothesis"],
    "mnli-mm": ["premise", "hypothesis"],
    "qnli": ["question", "sentence"],
    "rte": ["sentence1", "sentence2"],
    "wnli": ["sentence1", "sentence2"],
}


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode("utf-8"))
    return path


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_files_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    text, expected = OFFICIAL[name]
    for path in (written(tmp_path / "dev.tsv", text), tmp_path / "dev.tsv.gz"):
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(text.encode("utf-8")))
        data = read_task(path, task_named(name))
        assert [(one.text, one.pair, one.label) for one in data.examples] == expected
        assert data.damaged == []
        assert data.labels == (TASKS[name].labels or ())
    assert {one.line for one in data.examples} == ({1, 2} if name == "cola" else {2, 3})
    assert len({one.id for one in data.examples}) == 2


@pytest.mark.parametrize("name", EXPORTED)
@pytest.mark.parametrize("array", [False, True], ids=["lines", "array"])
def test_exports_are_read_by_their_names(name: str, array: bool, tmp_path: Path) -> None:
    rows = [{**{column: f"{column} {row}" for column in EXPORTED[name]}, "label": row, "idx": row} for row in (0, 1)]
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    data = read_task(written(tmp_path / "export.jsonl", text), task_named(name))
    first, *second = EXPORTED[name]
    assert [(one.text, one.pair) for one in data.examples] == [
        (f"{first} {row}", f"{second[0]} {row}" if second else None) for row in (0, 1)
    ]
    assert [one.label for one in data.examples] == [0, 1]


def test_every_task_of_glue_is_tested() -> None:
    assert set(EXPORTED) == set(TASKS) - {"classification", "regression"}
    assert set(OFFICIAL) == set(EXPORTED) - {"mnli-mm"}


def test_own_files_have_their_own_labels(tmp_path: Path) -> None:
    path = written(tmp_path / "own.tsv", "text\tlabel\na\tspam\nb\tham\nc\tspam\n")
    data = read_task(path, task_named("classification"))
    assert (data.labels, [one.label for one in data.examples]) == (("ham", "spam"), [1, 0, 1])
    with pytest.raises(
        ValueError, match="no line has a label that is one; line 2: the label is 'spam': expected one of"
    ):
        read_task(path, task_named("classification"), ("1", "2"))
    data = read_task(path, task_named("classification"), ("spam", "ham", "eggs"))
    assert [one.label for one in data.examples] == [0, 1, 0]
    numbers = written(
        tmp_path / "numbers.jsonl", '{"text": "a", "pair": "b", "label": 10}\n{"text": "c", "pair": "d", "label": 9}'
    )
    assert read_task(numbers, task_named("classification")).labels == ("9", "10")
    assert [one.label for one in read_task(numbers, task_named("regression")).examples] == [10.0, 9.0]
    assert [one.texts for one in read_task(numbers, task_named("regression")).examples] == [("a", "b"), ("c", "d")]


def test_damaged_lines_are_named_and_left_out(tmp_path: Path) -> None:
    text = "sentence\tlabel\na\t0\nbroken\nb\t2\nc\tmaybe\nd\t-1\n\ne\tpositive\n"
    data = read_task(written(tmp_path / "dev.tsv", text), task_named("sst2"))
    assert [(one.line, one.label) for one in data.examples] == [(2, 0), (8, 1)]
    assert data.damaged == [
        "line 3: label: missing; the object has sentence",
        "line 4: the label is '2': expected one of negative, positive",
        "line 5: the label is 'maybe': expected one of negative, positive",
        "line 6: the label is '-1': expected one of negative, positive; -1 stands for a label that was not published",
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("sst2", "", "the file is empty"),
        ("sst2", "sentence\tlabel\n", "holds no texts"),
        ("sst2", "index\tsentence\n0\ta\n", "no column 'label' for sst2: it has 'index', 'sentence'; GLUE's test sets"),
        ("mrpc", "sentence\tlabel\na\t1\n", "no column 'sentence1' or '#1 String' for mrpc"),
        ("sst2", "sentence\tlabel\na\t7\n", "no line has a label that is one; line 2: the label is '7'"),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": "much"}', 'no line has a label .* is "much": exp'),
        ("stsb", '{"sentence1": "a", "sentence2": "b", "label": -1.0}', "from 0 to 5; -1 stands for a label that was"),
        ("sst2", '{"sentence": 3, "label": 1}', "no line has all its columns; line 1: sentence: expected a text"),
        ("sst2", '{"sentence": "a", "label": 1}\n{"sentence": ', "line 2: not JSON"),
        ("sst2", "[1]", "expected an object"),
        ("classification", "text\tlabel\na\tx\nb\tx\n", "every text has the same label, x"),
    ],
)  # fmt: skip
def test_files_that_are_no_task_are_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path / "dev.tsv", text)
    with pytest.raises(ValueError, match=message) as caught:
        read_task(path, task_named(name))
    assert str(caught.value).startswith(str(path))


def test_labels_are_matched_by_name_and_never_by_chance() -> None:
    nli = ("entailment", "neutral", "contradiction")
    assert places_of(nli, ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")) == [2, 1, 0]
    assert places_of(nli, ("LABEL_0", "LABEL_1", "LABEL_2")) == [0, 1, 2]
    for other in (nli[:2], ("a", "b", "c"), ("LABEL_0", "LABEL_1")):
        with pytest.raises(ValueError, match="give the model these names, in its own order, as id2label"):
            places_of(nli, other)
    with pytest.raises(ValueError, match="unknown task 'sst-2': choose one of cola, sst2"):
        task_named("sst-2")


@pytest.fixture(scope="module")
def nli(tmp_path_factory: pytest.TempPathFactory) -> TextClassifier:
    """A model of MNLI's labels in another order."""
    folder = tmp_path_factory.mktemp("nli") / "model"
    return TextClassifier.load(write_classifier(folder, ("Contradiction", "Entailment", "Neutral")))


def nli_file(path: Path, *more: dict[str, Any]) -> Path:
    pairs = zip(some_texts(12, 20), some_texts(12, 20)[::-1], strict=True)
    rows = [{"premise": a, "hypothesis": b, "label": number % 3} for number, (a, b) in enumerate(pairs)]
    return written(path, "".join(json.dumps(row) + "\n" for row in [*rows, *more]))


@pytest.mark.parametrize("schedule", [None, LengthSchedule.ratios([0.6, 0.3], scorer="cls")], ids=["all", "dropping"])
def test_a_measurement_is_what_the_classifier_says_at_what_it_costs(
    nli: TextClassifier, schedule: LengthSchedule | None, tmp_path: Path
) -> None:
    long = {"premise": "bo " * 40, "hypothesis": "ba " * 40, "label": 1}
    data = read_task(nli_file(tmp_path / "dev.jsonl", long), task_named("mnli"))
    texts = PreparedTexts(nli, data)
    found = measure_texts(texts, schedule)
    assert list(texts.unreadable) == [13]
    assert "the pair has 83 tokens" in texts.unreadable[13]
    labels = [nli(one.text, one.pair, schedule=schedule) for one in data.examples[:-1]]
    assert found.predictions == [*(one.label.lower() for one in labels), None]
    right = sum(
        one.label.lower() == data.labels[int(gold.label)] for one, gold in zip(labels, data.examples, strict=False)
    )
    assert found.scores == {"accuracy": pytest.approx(100 * right / 13)}
    costs, tokens = [], 0
    for one in data.examples[:-1]:
        a, b = (len(nli.tokenizer.encode(text, add_special_tokens=False).ids) for text in one.texts)
        tokens += a + b + 3
        costs.append([nli.model.macs(asked, a + b + 3, question_length=a + 2) for asked in (schedule, None)])
    assert found.cost is not None
    assert found.cost.executed == pytest.approx(np.mean([with_it.executed for with_it, _ in costs]))
    assert found.cost.published == pytest.approx(np.mean([with_it.published for with_it, _ in costs]))
    assert found.cost.own_length == pytest.approx(np.mean([without.executed for _, without in costs]))
    assert found.cost.tokens == pytest.approx(tokens / 12)
    assert texts.predict(schedule, 3, 5).tolist() == texts.predict(schedule)[3:5].tolist()


def test_embeddings_are_measured_by_their_cosine(nli: TextClassifier, tmp_path: Path) -> None:
    pairs = zip(some_texts(6), some_texts(6)[::-1], strict=True)
    rows = [{"sentence1": a, "sentence2": b, "label": number / 3} for number, (a, b) in enumerate(pairs)]
    path = written(tmp_path / "stsb.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    encoder = SentenceEncoder.load(write_classifier(tmp_path / "encoder"))
    data = read_task(path, task_named("stsb"))
    found = measure_texts(PreparedTexts(encoder, data))
    first, second = (encoder.encode([row[name] for row in rows], normalize=True) for name in ("sentence1", "sentence2"))
    assert found.predictions == pytest.approx((first * second).sum(1).tolist(), abs=1e-5)
    expected = np.corrcoef(found.predictions, [row["label"] for row in rows])[0, 1]
    assert found.scores["pearson"] == pytest.approx(100 * expected)
    with pytest.raises(ValueError, match="gives texts labels, stsb has numbers"):
        PreparedTexts(nli, data)
    labelled = read_task(nli_file(tmp_path / "mnli.jsonl"), task_named("mnli"))
    with pytest.raises(ValueError, match="embeddings alone say nothing of mnli"):
        PreparedTexts(encoder, labelled)


def test_a_number_for_an_unreadable_text_is_refused(tmp_path: Path) -> None:
    model = TextClassifier.load(write_classifier(tmp_path / "number", ("score",)))
    path = written(tmp_path / "own.jsonl", '{"text": "bo", "label": 1}\n{"text": " ", "label": 2}\n')
    data = read_task(path, task_named("regression"))
    with pytest.raises(ValueError, match=r"line 2: the text is blank.*; take it out of the file"):
        PreparedTexts(model, data)
    assert len(measure_texts(PreparedTexts(model, data._replace(examples=data.examples[:1]))).predictions) == 1


def test_what_the_text_decides_costs_what_it_kept(nli: TextClassifier, tmp_path: Path) -> None:
    data = read_task(
        nli_file(tmp_path / "dev.jsonl", {"premise": " ", "hypothesis": "bo", "label": 1}), task_named("mnli")
    )
    policy, texts = Threshold([0.02, 0.05], scorer="cls"), PreparedTexts(nli, data)
    found = measure_texts(texts, policy)
    executed, published = [], []
    for one, label in zip(data.examples[:-1], found.predictions, strict=False):
        assert nli(one.text, one.pair, schedule=policy).label.lower() == label
        (tokens,) = nli.reader.read([one.texts])
        assert not isinstance(tokens, Exception)
        batch = pack([tokens], nli.model.device)
        kept = [layer.lengths[0] for layer in nli.model.forward_packed(batch, policy, output_kept=True).kept]
        macs = nli.model.macs_of_kept(policy, len(tokens.ids), kept, question_length=tokens.num_first)
        executed.append(macs.executed)
        published.append(macs.published)
    assert len(set(executed)) > 3
    assert found.cost is not None
    assert (found.cost.executed, found.cost.published) == pytest.approx((np.mean(executed), np.mean(published)))
    assert found.cost.executed_p95 == max(executed)
    assert found.cost.own_length == measure_texts(texts).cost.own_length
    assert texts.cost(policy) == found.cost
    # Of embeddings both texts of a pair count.
    encoder = SentenceEncoder.load(write_classifier(tmp_path / "encoder"))
    pairs = written(tmp_path / "stsb.jsonl", '{"sentence1": "bo ba", "sentence2": "di do fe fi", "label": 1}\n' * 2)
    both = measure_texts(PreparedTexts(encoder, read_task(pairs, task_named("stsb"))), policy).cost
    assert both is not None
    assert both.executed < both.own_length
