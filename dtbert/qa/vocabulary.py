"""The tokenizer of a model's folder, as transformers reads it; what it would read otherwise is refused, or said.

transformers makes a BERT's tokenizer of the words alone: lower case, accents, special tokens and the like come from
``tokenizer_config.json``, or are its defaults, whatever ``tokenizer.json`` says. The class `PreTrainedTokenizerFast`
stands for that file as it is written. Both then learn the tokens that the other files add.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from dtbert.files import Json, naming
from dtbert.qa.added_tokens import ROLES, AddedTokens, parsed, read_added_tokens
from dtbert.weights.kinds import what_else

# Classes that transformers reads as a BERT's tokenizer.
_BERT_CLASSES = (
    "BertTokenizer",
    "DistilBertTokenizer",
    "ElectraTokenizer",
    "LayoutLMTokenizer",
    "LxmertTokenizer",
    "MobileBertTokenizer",
    "SqueezeBertTokenizer",
)
_FILE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")

# Options of a BERT's tokenizer, the same in BertNormalizer, and what they are by default.
_NORMALIZER = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}
# What a BERT's tokenizer makes of its words, which tokenizer.json may not have otherwise.
_WORD_PIECE = {"type": "WordPiece", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
# Options that change tokens and are not obeyed: the values that change nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "do_basic_tokenize": (True,),
    "never_split": ([],),
    "word_tokenizer_type": ("basic",),
    "subword_tokenizer_type": ("wordpiece",),
    "split_special_tokens": (False,),
    "add_bos_token": (False,),
    "add_eos_token": (False,),
    "fast_tokenizer_files": ([],),
}

_BERT_ROLES = {name: f"[{name.removesuffix('_token').upper()}]" for name in ROLES[2:]}

logger = logging.getLogger(__name__)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a folder, without truncation and padding.

    Tokens that have a role, such as ``[SEP]``, are read in a text as text, unlike in transformers; the model's own
    special tokens are found in it.

    Raises:
        FileNotFoundError: the folder has neither ``tokenizer.json`` nor ``vocab.txt``.
        OSError: a file cannot be read.
        ValueError: a file is not what its name says, or asks for what dtbert does not do; the message names it.
    """
    settings, as_written = _settings(folder)
    file = folder / "tokenizer.json"
    document = parsed(file) if file.is_file() else None
    if document is None:
        file = folder / "vocab.txt"
        if as_written or not file.is_file():
            raise FileNotFoundError(
                f"{folder} has neither tokenizer.json nor vocab.txt: copy one of them from where the weights come from"
                if not as_written
                else f"{folder} has no tokenizer.json, which the tokenizer_class of its tokenizer_config.json asks for"
            )
    added = read_added_tokens(folder, settings, document, {} if as_written else _BERT_ROLES)
    options = _options(folder / "tokenizer_config.json", settings)
    with documented_errors(file):
        if as_written:
            tokenizer = Tokenizer.from_str(file.read_text("utf-8"))
        else:
            tokenizer = _bert(file, document, added.roles["unk_token"].content, options)
        _add(tokenizer, added)
        _check(tokenizer, document, as_written)
        return _reading_roles_as_text(tokenizer, added)


def _settings(folder: Path) -> tuple[Json, bool]:
    """``tokenizer_config.json``, and whether ``tokenizer.json`` is read as it is written."""
    file, model = folder / "tokenizer_config.json", folder / "config.json"
    settings = parsed(file) if file.is_file() else Json({})
    with naming(file):
        for name, harmless in _UNSUPPORTED.items():
            found = settings.get(name)
            if found is not None and found.value not in harmless:
                raise found.error(f"dtbert does not do what {json.dumps(found.value)[:40]} asks for")
        code = settings.get("auto_map")
        if code is not None and (not isinstance(code.value, dict) or code.get("AutoTokenizer") is not None):
            raise code.error("this tokenizer is code of its own, which dtbert does not run")
        named = settings.get("tokenizer_class")
        if named is not None and named.of(str) in _FILE_CLASSES:
            return settings, True
    if named is None and model.is_file():
        file = model
        named = parsed(model).get("tokenizer_class")
    with naming(file):
        if named is not None and named.of(str).removesuffix("Fast") not in _BERT_CLASSES:
            known = ", ".join((*_BERT_CLASSES, _FILE_CLASSES[0]))
            raise named.error(f"dtbert does not split words as a {named.value} does: it reads {known}")
    return settings, False


def _options(file: Path, settings: Json) -> dict[str, Any]:
    """What BertNormalizer takes."""
    with naming(file):
        found = {option: (settings.get(name), default) for name, (option, default) in _NORMALIZER.items()}
        return {option: default if value is None else value.of(bool) for option, (value, default) in found.items()}


def _bert(file: Path, document: Json | None, unknown: str, options: Mapping[str, Any]) -> Tokenizer:
    """What transformers makes of the words; they must be a BERT's."""
    words = _words(file, unknown) if document is None else _words_of(file, document, unknown, options)
    tokenizer = Tokenizer(WordPiece(words, unk_token=unknown))
    tokenizer.normalizer = BertNormalizer(clean_text=True, **options)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def _words(file: Path, unknown: str) -> dict[str, int]:
    try:
        lines = file.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"not a vocabulary: {what_else(file) or error}") from error
    words = {line.rstrip("\r"): index for index, line in enumerate(lines)}
    if unknown not in words:
        raise ValueError(f"not a vocabulary: {what_else(file) or f'it has no line {unknown}'}")
    return words


def _words_of(file: Path, document: Json, unknown: str, options: Mapping[str, Any]) -> dict[str, int]:
    """The words of a ``tokenizer.json``, which must otherwise be as a BERT's tokenizer makes it."""
    model = document.field("model")
    expected = {**_WORD_PIECE, "unk_token": unknown}
    found = {name: model.value.get(name, value) for name, value in expected.items()} if model.of(dict) else {}
    splitter = document.get("pre_tokenizer")
    normalizer = document.get("normalizer")
    written = {} if normalizer is None else normalizer.of(dict)
    others = [f"model.{name} {found[name]!r}" for name, value in expected.items() if found.get(name) != value]
    if splitter is None or splitter.field("type").value != "BertPreTokenizer":
        others.append("another pre_tokenizer")
    if written.get("type") != "BertNormalizer" or written.get("clean_text") is False:
        others.append("another normalizer")
    if others:
        raise ValueError(
            f"it has {', '.join(others)}, which a BertTokenizer does not read: where the file is right as it is, name "
            'the class in tokenizer_config.json: {"tokenizer_class": "PreTrainedTokenizerFast"}'
        )
    for name, (option, default) in _NORMALIZER.items():
        if written.get(option, default) != options[option]:
            logger.warning(
                "%s says %s %s; like transformers, dtbert goes by tokenizer_config.json or its default, %s %s",
                *(file, option, json.dumps(written.get(option, default)), name, json.dumps(options[option])),
            )
    words = model.field("vocab").of(dict)
    if unknown not in words:
        raise ValueError(f"its vocabulary has no word {unknown}")
    return words


def _add(tokenizer: Tokenizer, added: AddedTokens) -> None:
    """Add the tokens in transformers' order; what has no id of its own gets the next one."""
    roles = {token.content for token in added.roles.values()}
    tokens = [added.numbered[index] for index in sorted(added.numbered)]
    given = {token.content for token in tokens}
    tokens += [token for token in (*added.roles.values(), *added.others) if token.content not in given]
    words = tokenizer.get_vocab(with_added_tokens=True)
    new = [token.content for token in tokens if token.content not in words]
    unnumbered = [token for token in new if token not in given]
    missing = [token for token in unnumbered if token in roles]
    if missing and len(missing) < len(unnumbered):
        raise ValueError(
            f"the vocabulary lacks {', '.join(missing)}, so nothing says which ids {', '.join(unnumbered)} have: "
            "give them in added_tokens.json"
        )
    tokenizer.add_tokens([token for token in tokens if token.content not in missing])
    taken = set(words.values())
    for index, token in added.numbered.items():
        found = tokenizer.token_to_id(token.content)
        if found != index:
            raise ValueError(f"the added token {token.content!r} has the id {index}, in the vocabulary it is {found}")
    for name in new:
        if tokenizer.token_to_id(name) in taken:
            raise ValueError(f"the added token {name!r} takes the id of another: the vocabulary has gaps")


def _check(tokenizer: Tokenizer, document: Json | None, as_written: bool) -> None:
    """Refuse what would fail, or hang, at the first text."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    if unknown is not None and unknown not in tokenizer.get_vocab(with_added_tokens=False):
        raise ValueError(f"its vocabulary lacks the token for unknown words, {unknown}")
    if as_written and document is not None:
        if document.get("post_processor") is None:
            raise ValueError("it has no post_processor, which would say what stands before and behind a text")
        if "FixedLength" in json.dumps(document.value.get("pre_tokenizer")):
            raise ValueError("dtbert does not do what the pre_tokenizer FixedLength asks for")


def _reading_roles_as_text(tokenizer: Tokenizer, added: AddedTokens) -> Tokenizer:
    """The tokenizer with special tokens that have a role, and no others."""
    roles = {**_BERT_ROLES, **{role: token.content for role, token in added.roles.items()}}
    cls, sep = roles["cls_token"], roles["sep_token"]
    words = tokenizer.get_vocab(with_added_tokens=True)
    for role in ("cls_token", "sep_token"):
        if role in added.roles and roles[role] != _BERT_ROLES[role] and roles[role] not in words:
            raise ValueError(f"its vocabulary lacks the {role}, {roles[role]}")
    if tokenizer.post_processor is None and cls in words and sep in words:
        tokenizer.post_processor = TemplateProcessing(
            single=f"{cls}:0 $A:0 {sep}:0",
            pair=f"{cls}:0 $A:0 {sep}:0 $B:1 {sep}:1",
            special_tokens=[(cls, words[cls]), (sep, words[sep])],
        )
    tokens = tokenizer.get_added_tokens_decoder().values()
    names = {*roles.values(), *_BERT_ROLES.values(), *tokenizer.encode("", "").tokens}
    if any(token.special != (token.content in names) for token in tokens):
        document = json.loads(tokenizer.to_str())
        for token in document["added_tokens"]:
            token["special"] = token["content"] in names
        tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


@contextmanager
def documented_errors(place: object) -> Iterator[None]:
    """Make a ValueError of whatever the library raises: errors of every kind, and panics, which are none."""
    try:
        yield
    except OSError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{place}: {error}") from error
