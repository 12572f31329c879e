"""Folders of tokenizers as they are in the wild: transformers' tokens, or an error that says what is not supported."""

import json
import logging
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from tokenizers import AddedToken, BertWordPieceTokenizer, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from dtbert.qa import load_tokenizer
from dtbert.qa.tokenize import special_ids, tokenize

ROLES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [
    "hello",
    "Hello",
    "world",
    "World",
    "e",
    "##e",
    "é",
    "##1",
    "1",
    "[",
    "]",
    "<",
    ">",
    "x",
    "##x",
    "X",
    "が",
    "か",
]
TEXTS = st.lists(
    st.sampled_from(
        ["hello", "Hello", "World", "é", "É", "e\u0301", "が", "か", "x", "1", "<x>", "[X]", "new", "Hx", "HX"]
    ),
    max_size=12,
).flatmap(lambda parts: st.sampled_from([" ", "", "  ", ", ", "\t"]).map(lambda gap: gap.join(parts)))

Files = dict[str, Any]


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, "utf-8", newline="")
    return folder


def word_piece(vocabulary: list[str], **options: Any) -> dict[str, Any]:
    """The tokenizer.json that the tokenizers library writes of a BERT's words."""
    words = {word: index for index, word in enumerate(vocabulary)}
    return json.loads(BertWordPieceTokenizer(words, **options).to_str())


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {
        "content": content,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False),
        **flags,
    }


FLAGS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), st.booleans())
)
NEW = st.sampled_from(["<x>", "[X]", "new", "Hx", "é"])


@st.composite
def folders(draw: st.DrawFn) -> Files:
    """A tokenizer's folder: any of its files, with options that agree or do not."""
    own = draw(st.sampled_from([{}, {"cls_token": "<s>", "sep_token": "</s>"}, {"unk_token": "[NO]"}]))
    vocabulary = draw(st.permutations([*ROLES, *own.values(), *WORDS]))
    left_out = draw(st.sampled_from(["", "", "", "[MASK]", "[PAD]"]))
    vocabulary = [word for word in vocabulary if word != left_out]
    config: Files = {"model_type": "bert"}
    settings: Files = dict(own)
    for name in ("do_lower_case", "strip_accents", "tokenize_chinese_chars"):
        if draw(st.booleans()):
            settings[name] = draw(st.booleans())
    kind = draw(
        st.sampled_from(["BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", None, "ElectraTokenizer"])
    )
    if kind is not None:
        draw(st.sampled_from([settings, settings, config]))["tokenizer_class"] = kind
    files: Files = {"config.json": config}
    added = [token(draw(NEW), **draw(FLAGS)) for _ in range(draw(st.integers(0, 2)))]
    numbers = {one["content"]: len(vocabulary) + place for place, one in enumerate(added)}
    if draw(st.booleans()):
        document = word_piece(
            vocabulary, lowercase=draw(st.booleans()), strip_accents=draw(st.sampled_from([None, True]))
        )
        document["model"]["unk_token"] = draw(st.sampled_from([own.get("unk_token", "[UNK]"), "[UNK]"]))
        if draw(st.booleans()):
            document["added_tokens"] += [{"id": numbers[one["content"]], **one} for one in added]
        files["tokenizer.json"] = document
    if "tokenizer.json" not in files or draw(st.booleans()):
        files["vocab.txt"] = draw(st.sampled_from(["\n", "\r\n"])).join([*vocabulary, ""])
    where = draw(st.sampled_from(["decoder", "added_tokens.json", "nowhere"]))
    if where == "decoder":
        settings["added_tokens_decoder"] = {str(numbers[one["content"]]): one for one in added}
    elif where == "added_tokens.json":
        files["added_tokens.json"] = numbers
    older: Files = {}
    for name in ("extra_special_tokens", "additional_special_tokens"):
        for place in (settings, older):
            if draw(st.integers(0, 3)) == 0:
                place[name] = draw(st.lists(NEW, max_size=2, unique=True))
    if draw(st.integers(0, 3)) == 0:
        settings["extra_special_tokens"] = {"first_token": draw(NEW)}
    if draw(st.booleans()):
        older |= {name: draw(st.sampled_from([one, token(one, lstrip=True)])) for name, one in own.items()}
    if draw(st.integers(0, 3)) == 0:
        settings["mask_token"] = token("[MASK]", lstrip=True) | {"__type": "AddedToken"}
    if older:
        files["special_tokens_map.json"] = older
    if draw(st.booleans()):
        settings["own_token"] = draw(NEW)
    if settings:
        files["tokenizer_config.json"] = settings
    return files


@given(files=folders(), texts=st.lists(TEXTS, min_size=3, max_size=3), piece=st.integers(1, 9))
def test_tokens_are_transformers_or_the_folder_is_refused(files: Files, texts: list[str], piece: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write(Path(name), files)
        try:
            tokenizer = load_tokenizer(folder)
            cls, sep = special_ids(tokenizer, 60)
        except (ValueError, FileNotFoundError) as error:
            event(f"refused: {str(error).replace(name, '').partition(':')[2][:40]}")
            return
        event("read")
        theirs = AutoTokenizer.from_pretrained(name)
    for text, own in zip(texts, tokenize(tokenizer, texts), strict=True):
        assert own.ids.tolist() == theirs(text, add_special_tokens=False).input_ids
        (cut,) = tokenize(tokenizer, [text], piece)
        assert (cut.ids.tolist(), cut.offsets.tolist()) == (own.ids.tolist(), own.offsets.tolist())
    first, second = (list(theirs(text, add_special_tokens=False).input_ids) for text in ("x", "e"))
    assert theirs("x", "e").input_ids == [cls, *first, sep, *second, sep]


def tokens_of(folder: Path, text: str) -> list[str]:
    tokenizer = load_tokenizer(folder)
    return [tokenizer.id_to_token(int(index)) for index in tokenize(tokenizer, [text])[0].ids]


VOCABULARY = [*ROLES, *WORDS]
CASED = word_piece(VOCABULARY, lowercase=False)
UNCASED = word_piece(VOCABULARY, lowercase=True)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"tokenizer.json": UNCASED}, ["hello", "e"]),
        ({"tokenizer.json": CASED}, ["hello", "e"]),
        ({"tokenizer.json": UNCASED, "tokenizer_config.json": {"do_lower_case": False}}, ["Hello", "é"]),
        ({"tokenizer.json": UNCASED, "tokenizer_config.json": {"strip_accents": False}}, ["hello", "é"]),
        ({"tokenizer.json": CASED, "tokenizer_config.json": {"tokenizer_class": "TokenizersBackend"}}, ["Hello", "é"]),
        (
            {"vocab.txt": "\r\n".join(VOCABULARY), "config.json": {"tokenizer_class": "BertTokenizerFast"}},
            ["hello", "e"],
        ),
    ],
)
def test_options_are_those_of_the_class_and_its_settings(
    tmp_path: Path, files: Files, expected: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "dtbert"):
        assert tokens_of(write(tmp_path, files), "Hello é") == expected
    differs = "tokenizer.json" in files and tokens_of_file(files["tokenizer.json"]) != expected
    assert ("like transformers, dtbert goes by tokenizer_config.json" in caplog.text) == differs
    theirs = AutoTokenizer.from_pretrained(write(tmp_path, {"config.json": {"model_type": "bert"}} | files))
    assert theirs.tokenize("Hello é") == expected


def tokens_of_file(document: Mapping[str, Any]) -> list[str]:
    return Tokenizer.from_str(json.dumps(document)).encode("Hello é", add_special_tokens=False).tokens


def test_own_special_tokens_are_found_in_a_text_and_those_with_a_role_are_text(tmp_path: Path) -> None:
    settings = {"additional_special_tokens": ["<x>"], "own_token": "[X]"}
    folder = write(tmp_path, {"vocab.txt": "\n".join([*VOCABULARY, "<x>", "[X]"]), "tokenizer_config.json": settings})
    assert tokens_of(folder, "<x>1 x[X][SEP]") == ["<x>", "1", "x", "[X]", "[", "[UNK]", "]"]


def test_special_tokens_have_the_names_that_the_settings_give(tmp_path: Path) -> None:
    words = ["</s>", "<s>", "[UNK]", "x"]
    names = {"cls_token": "<s>", "sep_token": token("</s>", special=True) | {"__type": "AddedToken"}}
    folder = write(tmp_path, {"vocab.txt": "\n".join(words), "tokenizer_config.json": names})
    assert special_ids(load_tokenizer(folder), 10) == (1, 0)
    (folder / "tokenizer_config.json").write_text('{"cls_token": "<S>"}')
    with pytest.raises(ValueError, match=r"vocabulary lacks the cls_token, <S>"):
        load_tokenizer(folder)


def as_written(tokenizer: Tokenizer, **settings: Any) -> Files:
    return {
        "tokenizer.json": tokenizer.to_str(),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **settings},
    }


def of_words(pair: str = "[CLS] $A [SEP] $B:1 [SEP]:1") -> Tokenizer:
    """Whole words between spaces, with `pair` around two texts."""
    words = {word: index for index, word in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, words[word]) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", pair=pair, special_tokens=special)
    return tokenizer


def test_file_that_is_read_as_written_keeps_its_own_way_of_splitting(tmp_path: Path) -> None:
    folder = write(tmp_path, as_written(of_words(), additional_special_tokens=["World"]))
    assert tokens_of(folder, "Hello e\u0301 [SEP] xWorld é1") == ["Hello", "é", "[SEP]", "x", "World", "[UNK]"]
    assert special_ids(load_tokenizer(folder), 40) == (2, 3)


def test_what_stands_around_a_text_is_text_inside_it_by_whatever_name(tmp_path: Path) -> None:
    tokenizer = of_words()
    words = ["<s>", "</s>", "[UNK]", "x"]
    tokenizer.model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]")
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    folder = write(tmp_path, as_written(tokenizer))
    assert special_ids(load_tokenizer(folder), 4) == (0, 1)
    assert tokens_of(folder, "x</s>x x") == ["[UNK]", "x"]


@pytest.mark.parametrize(
    "pair", ["[CLS] $A [SEP] [SEP] $B:1 [SEP]:1", "[CLS] $B [SEP] $A:1 [SEP]:1", "[CLS] $A [SEP] $B [SEP]", "$A $B:1"]
)
def test_another_form_of_a_pair_is_refused(tmp_path: Path, pair: str) -> None:
    tokenizer = load_tokenizer(write(tmp_path, as_written(of_words(pair))))
    with pytest.raises(ValueError, match="joins two texts in another way than BERT"):
        special_ids(tokenizer, 40)


def changed(document: Mapping[str, Any], **changes: Any) -> Files:
    return {"tokenizer.json": {**document, **changes}}


def without_unknown(document: Mapping[str, Any]) -> Files:
    words = {word: index for word, index in document["model"]["vocab"].items() if word != "[UNK]"}
    return changed(document, model={**document["model"], "vocab": words}, added_tokens=[])


WRITTEN = json.loads(of_words().to_str())
AS_WRITTEN = {"tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}
VOCAB_TXT = {"vocab.txt": "\n".join(VOCABULARY)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            VOCAB_TXT | {"config.json": {"tokenizer_class": "BertJapaneseTokenizer"}},
            r"config\.json: tokenizer_class: .*",
        ),
        (VOCAB_TXT | {"tokenizer_config.json": {"tokenizer_class": "BertJapaneseTokenizer"}}, r"as a BertJapanese.*"),
        (VOCAB_TXT | {"config.json": {"tokenizer_class": "PreTrainedTokenizerFast"}}, r"config\.json: tokenizer_class"),
        (VOCAB_TXT | {"tokenizer_config.json": {"do_basic_tokenize": False}}, r"do_basic_tokenize: .* false"),
        (VOCAB_TXT | {"tokenizer_config.json": {"never_split": ["x"]}}, r"never_split: .* \[\"x\"\]"),
        (VOCAB_TXT | {"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["a.B", None]}}}, r"auto_map: .*code"),
        (VOCAB_TXT | {"tokenizer_config.json": {"cls_token": 1}}, r"tokenizer_config\.json: cls_token: .* found 1"),
        (VOCAB_TXT | {"tokenizer_config.json": {"added_tokens_decoder": {"x": token("a")}}}, r"_decoder\.x: .* an id"),
        (VOCAB_TXT | {"tokenizer_config.json": {"added_tokens_decoder": {"7": {}}}}, r"_decoder\.7\.content: missing"),
        (VOCAB_TXT | {"added_tokens.json": {"new": 90}}, r"'new' has the id 90, in the vocabulary it is 23"),
        (VOCAB_TXT | {"added_tokens.json": {"x": 2}}, r"'x' has the id 2, in the vocabulary it is 18"),
        (VOCAB_TXT | {"added_tokens.json": {"new": "7"}}, r"added_tokens\.json: new: .* found \"7\""),
        (VOCAB_TXT | {"special_tokens_map.json": []}, r"special_tokens_map\.json: expected an object"),
        ({"vocab.txt": "[UNK]\nx\nx"} | {"added_tokens.json": {"[SEP]": 2}}, r"takes the id of another"),
        ({"vocab.txt": "[UNK]\nx"} | {"tokenizer_config.json": {"own_token": "new"}}, r"lacks \[SEP\], .* new"),
        (VOCAB_TXT | AS_WRITTEN, r"no tokenizer\.json, which the tokenizer_class"),
        (changed(CASED, normalizer={"type": "NFC"}), r"tokenizer\.json: it has another normalizer, .*TokenizerFast"),
        (changed(CASED, pre_tokenizer=None), r"it has another pre_tokenizer"),
        (changed(CASED, model={**CASED["model"], "max_input_chars_per_word": 9}), r"model\.max_input_chars_per_word 9"),
        (changed(CASED, model={**CASED["model"], "type": "BPE"}), r"model\.type 'BPE'"),
        (changed(CASED, model={**CASED["model"], "vocab": {"[UNK]": -1}}), r"tokenizer\.json: "),
        (without_unknown(CASED), r"tokenizer\.json: its vocabulary has no word \[UNK\]"),
        (without_unknown(WRITTEN) | AS_WRITTEN, r"tokenizer\.json: its vocabulary lacks the token for unknown words"),
        (changed(WRITTEN, post_processor=None) | AS_WRITTEN, r"tokenizer\.json: it has no post_processor"),
        (changed(WRITTEN, pre_tokenizer={"type": "FixedLength", "length": 0}) | AS_WRITTEN, r"FixedLength"),
        (
            changed(WRITTEN, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}) | AS_WRITTEN,
            r"tokenizer\.json: Precompiled",
        ),
    ],
)
def test_what_is_not_supported_is_an_error_that_names_it(tmp_path: Path, files: Files, message: str) -> None:
    error = FileNotFoundError if files == VOCAB_TXT | AS_WRITTEN else ValueError
    with pytest.raises(error, match=message) as caught:
        load_tokenizer(write(tmp_path, files))
    assert str(tmp_path) in str(caught.value)


def test_vocabulary_may_be_smaller_than_the_models_and_hold_tokens_that_are_never_read(tmp_path: Path) -> None:
    words = [word for word in VOCABULARY if word != "[MASK]"]
    folder = write(tmp_path, {"vocab.txt": "\n".join(words), "added_tokens.json": {"[MASK]": len(words)}})
    tokenizer = load_tokenizer(folder)
    for size in (len(words), len(words) + 1, 1000):
        assert special_ids(tokenizer, size) == (2, 3)
    with pytest.raises(ValueError, match=f"'か' has id {len(words) - 1}"):
        special_ids(tokenizer, len(words) - 1)


def test_what_the_library_raises_at_a_text_is_a_value_error() -> None:
    tokenizer = of_words()
    tokenizer.model = models.WordLevel({"x": 0}, unk_token="[UNK]")
    with pytest.raises(ValueError, match="the tokenizer: WordLevel error"):
        tokenize(tokenizer, ["never seen"])


def test_token_that_takes_spaces_along_is_never_cut(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write(tmp_path, VOCAB_TXT))
    tokenizer.add_tokens([AddedToken("new", lstrip=True, rstrip=True)])
    whole, cut = (tokenize(tokenizer, ["x   new   x"], piece)[0].offsets.tolist() for piece in (1000, 1))
    assert cut == whole == [[0, 1], [1, 10], [10, 11]]


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_pointer_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    with pytest.raises(ValueError, match=rf"{re.escape(name)}: .*a Git LFS pointer"):
        load_tokenizer(write(tmp_path, VOCAB_TXT | {name: pointer}))
