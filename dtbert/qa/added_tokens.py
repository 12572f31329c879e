"""The tokens that a tokenizer's files add to its words, merged as transformers merges them."""

from collections.abc import Container, Mapping
from pathlib import Path
from typing import NamedTuple

from tokenizers import AddedToken

from dtbert.files import Json, naming
from dtbert.weights.kinds import what_else

# In the order in which transformers adds them to a vocabulary that lacks them.
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class AddedTokens(NamedTuple):
    """Tokens beside the words.

    Attributes:
        numbered: those that come with an id.
        roles: what stands for the end of a text, for padding and so on, by role.
        others: the model's own special tokens, in order.
    """

    numbered: dict[int, AddedToken]
    roles: dict[str, AddedToken]
    others: list[AddedToken]


def parsed(file: Path) -> Json:
    """The object in a JSON file; ValueError names the file, and what it is if it is of another kind."""
    try:
        document = Json.parse(file.read_bytes())
        document.of(dict)
    except ValueError as error:
        raise ValueError(f"{file}: {what_else(file) or error}") from error
    return document


def read_added_tokens(folder: Path, settings: Json, document: Json | None, roles: Mapping[str, str]) -> AddedTokens:
    """The tokens that a folder's files add.

    Where there is no ``added_tokens_decoder``, older files count: ``special_tokens_map.json``, ``added_tokens.json``
    and the tokens of ``tokenizer.json``.

    Args:
        folder: of the tokenizer.
        settings: its ``tokenizer_config.json``.
        document: its ``tokenizer.json``.
        roles: tokens that have a role if the files say nothing else.

    Raises:
        ValueError: a file is not what its name says; the message names it.
    """
    config, older = folder / "tokenizer_config.json", folder / "special_tokens_map.json"
    fields = _present(settings)
    decoder = fields.get("added_tokens_decoder")
    by_map = _present(parsed(older)) if decoder is None and older.is_file() else {}
    with naming(config):
        numbered = None if decoder is None else _numbered(decoder)
        own, listed = _own_tokens(fields)
        named = {name: AddedToken(token, special=True) for name, token in roles.items()} | _with_roles(fields)
        later = {name: _token(field) for name, field in _own_fields(fields).items() if isinstance(field.value, dict)}
    with naming(older):
        named |= _with_roles(by_map)
        later |= {name: _token(field) for name, field in _own_fields(by_map).items()}
        extra = by_map.get("extra_special_tokens")
        if extra is not None and isinstance(extra.value, dict):
            own, listed = own | {name: _token(extra.field(name)) for name in extra.value}, []
        elif extra is not None:
            known = {token.content for token in listed or []}
            listed = [*(listed or []), *(token for token in map(_token, extra.items()) if token.content not in known)]
    if numbered is None:
        special = {token.content for token in (*named.values(), *(listed or []))}
        numbered = _numbered_by_older_files(folder, document, special)
    if listed is None:
        place, additional = (older, by_map) if "additional_special_tokens" in by_map else (config, fields)
        with naming(place):
            listed = [_token(token) for token in additional.get("additional_special_tokens", Json([])).items()]
    with_flags = {token.content: token for token in numbered.values()}
    in_order = {name: with_flags.get(named[name].content, named[name]) for name in ROLES if name in named}
    return AddedTokens(numbered, in_order, [*(later | own).values(), *listed])


def _present(document: Json) -> dict[str, Json]:
    return {name: document.field(name) for name, value in document.value.items() if value is not None}


def _with_roles(fields: Mapping[str, Json]) -> dict[str, AddedToken]:
    return {name: _token(field) for name, field in fields.items() if name in ROLES}


def _own_fields(fields: Mapping[str, Json]) -> dict[str, Json]:
    """Special tokens under names that a model made up."""
    return {
        name: field
        for name, field in fields.items()
        if name.endswith("_token") and name not in ROLES and isinstance(field.value, str | dict)
    }


def _own_tokens(fields: Mapping[str, Json]) -> tuple[dict[str, AddedToken], list[AddedToken] | None]:
    """Special tokens of ``tokenizer_config.json`` beside those with a role: by name, and in a list if there is one."""
    own = {name: _token(field) for name, field in _own_fields(fields).items() if isinstance(field.value, str)}
    extra = fields.get("extra_special_tokens")
    if "additional_special_tokens" in fields and (extra is None or not extra.value):
        extra = fields["additional_special_tokens"]
    if extra is not None and isinstance(extra.value, dict):
        return own | {name: _token(extra.field(name)) for name in extra.value}, None
    return own, None if extra is None else [_token(token) for token in extra.items()]


def _token(described: Json, *, special: bool = True) -> AddedToken:
    """A token, given as a text or with its options."""
    value = described.of(str, dict)
    if isinstance(value, str):
        return AddedToken(value, special=special)
    flags = {name: found.of(bool) for name in _FLAGS if (found := described.get(name)) is not None}
    return AddedToken(described.field("content").of(str), **{"special": special, **flags})


def _numbered(decoder: Json) -> dict[int, AddedToken]:
    tokens = {}
    for index in decoder.of(dict):
        if not index.isdecimal():
            raise decoder.field(index).error("its name must be an id, a whole number")
        tokens[int(index)] = _token(decoder.field(index), special=False)
    return tokens


def _numbered_by_older_files(folder: Path, document: Json | None, special: Container[str]) -> dict[int, AddedToken]:
    file = folder / "added_tokens.json"
    words = parsed(file) if file.is_file() else Json({})
    listed = None if document is None else document.get("added_tokens")
    tokens = {}
    with naming(file):
        for word in words.value:
            token = AddedToken(word, normalized=word not in special, special=word in special)
            tokens[words.field(word).of(int)] = token
    with naming(folder / "tokenizer.json"):
        for described in listed.items() if listed else []:
            tokens[described.field("id").of(int)] = _token(described, special=False)
    return tokens
