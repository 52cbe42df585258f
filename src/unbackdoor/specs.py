"""Specs: ``"seam(preset=toolbox)"`` <-> a frozen dataclass, and the lazy registry of what can be named so.

The grammar is ``name`` or ``name(field=value, ...)``. A value is a Python literal; a bare word is a string, so that no
quotes are needed on a command line.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import hashlib
import importlib
import json
import re
import types
import typing
import warnings
from contextlib import suppress
from typing import Any, Literal

from unbackdoor.errors import ConfigError

#: "text-attack" and "text-defense" hold apart what is for texts alone; its specs are of kind "attack" and "defense".
Kind = Literal["attack", "text-attack", "defense", "text-defense"]

_BARE_WORD = re.compile(r"[A-Za-z_][\w.:/+-]*")

#: kind -> name -> "module:class". Nothing is imported before it is asked for.
REGISTRY: dict[Kind, dict[str, str]] = {
    "attack": {
        "adaptive_blend": "unbackdoor.attacks.image.adaptive_blend:AdaptiveBlend",
        "adaptive_patch": "unbackdoor.attacks.image.adaptive_patch:AdaptivePatch",
        "badnets": "unbackdoor.attacks.image.badnets:BadNets",
        "blended": "unbackdoor.attacks.image.blended:Blended",
        "blind": "unbackdoor.attacks.image.blind:Blind",
        "bpp": "unbackdoor.attacks.image.bpp:BPP",
        "ctrl": "unbackdoor.attacks.image.ctrl:CTRL",
        "entangled": "unbackdoor.attacks.adaptive.entangled:Entangled",
        "ewc": "unbackdoor.attacks.adaptive.ewc:EWC",
        "ftrojan": "unbackdoor.attacks.image.ftrojan:FTrojan",
        "imc": "unbackdoor.attacks.image.imc:IMC",
        "input_aware": "unbackdoor.attacks.image.input_aware:InputAware",
        "label_consistent": "unbackdoor.attacks.image.label_consistent:LabelConsistent",
        "latent": "unbackdoor.attacks.adaptive.latent:Latent",
        "lira": "unbackdoor.attacks.image.lira:LIRA",
        "low_frequency": "unbackdoor.attacks.image.low_frequency:LowFrequency",
        "narcissus": "unbackdoor.attacks.image.narcissus:Narcissus",
        "parameter_stealth": "unbackdoor.attacks.adaptive.parameter_stealth:ParameterStealth",
        "refool": "unbackdoor.attacks.image.refool:Refool",
        "sig": "unbackdoor.attacks.image.sig:SIG",
        "sleeper_agent": "unbackdoor.attacks.image.sleeper_agent:SleeperAgent",
        "ssba": "unbackdoor.attacks.image.ssba:SSBA",
        "tact": "unbackdoor.attacks.image.tact:TaCT",
        "trojannn": "unbackdoor.attacks.image.trojannn:TrojanNN",
        "uniform_row": "unbackdoor.attacks.adaptive.uniform_row:UniformRow",
        "wanet": "unbackdoor.attacks.image.wanet:WaNet",
    },
    "text-attack": {
        "addsent": "unbackdoor.attacks.text.addsent:AddSent",
        "ep": "unbackdoor.attacks.text.ep:EP",
        "lwp": "unbackdoor.attacks.text.lwp:LWP",
        "lws": "unbackdoor.attacks.text.lws:LWS",
        "sos": "unbackdoor.attacks.text.sos:SOS",
        "style": "unbackdoor.attacks.text.style:Style",
        "syntactic": "unbackdoor.attacks.text.syntactic:Syntactic",
        "trojai_text": "unbackdoor.attacks.text.trojai_text:TrojAIText",
        "words": "unbackdoor.attacks.text.words:Words",
    },
    "text-defense": {
        "crow": "unbackdoor.defenses.crow:CROW",
    },
    "defense": {
        "anp": "unbackdoor.defenses.anp:ANP",
        "auto": "unbackdoor.automatic:Auto",
        "ban": "unbackdoor.defenses.ban:BAN",
        "bnp": "unbackdoor.defenses.bnp:BNP",
        "bti_dbf": "unbackdoor.defenses.bti_dbf:BTIDBF",
        "clp": "unbackdoor.defenses.clp:CLP",
        "ep": "unbackdoor.defenses.ep:EP",
        "fip": "unbackdoor.defenses.fip:FIP",
        "fp": "unbackdoor.defenses.fine_pruning:FinePruning",
        "fst": "unbackdoor.defenses.fst:FST",
        "ft": "unbackdoor.defenses.finetune:FineTune",
        "ft_sam": "unbackdoor.defenses.ft_sam:FTSAM",
        "ibau": "unbackdoor.defenses.ibau:IBAU",
        "ims": "unbackdoor.defenses.ims:IMS",
        "inoculation": "unbackdoor.defenses.inoculation:Inoculation",
        "mcr": "unbackdoor.defenses.mcr:MCR",
        "nad": "unbackdoor.defenses.nad:NAD",
        "nc": "unbackdoor.defenses.nc:NeuralCleanse",
        "nft": "unbackdoor.defenses.nft:NFT",
        "npd": "unbackdoor.defenses.npd:NPD",
        "otbr": "unbackdoor.defenses.otbr:OTBR",
        "pam": "unbackdoor.defenses.pam:PAM",
        "rnp": "unbackdoor.defenses.rnp:RNP",
        "sau": "unbackdoor.defenses.sau:SAU",
        "seam": "unbackdoor.defenses.seam:SEAM",
        "sft": "unbackdoor.defenses.sft:SFT",
        "tsbd": "unbackdoor.defenses.tsbd:TSBD",
        "ulrl": "unbackdoor.defenses.ulrl:ULRL",
    },
}


def names(kind: Kind) -> list[str]:
    """The registered names of a kind, sorted; of "attack" and "defense" without those for texts alone."""
    return sorted(REGISTRY[kind])


def _entries(kind: Kind) -> dict[str, str]:
    match kind:
        case "attack":
            return {**REGISTRY["attack"], **REGISTRY["text-attack"]}
        case "defense":
            return {**REGISTRY["defense"], **REGISTRY["text-defense"]}
        case _:
            return REGISTRY[kind]


def lookup(kind: Kind, name: str) -> type[Any]:
    """The class registered under a name.

    Raises:
        ConfigError: no such name; the message lists those there are.
    """
    try:
        target = _entries(kind)[name]
    except KeyError:
        raise ConfigError(f"unknown {kind} {name!r}{suggestion(name, sorted(_entries(kind)))}") from None
    module, _, attribute = target.partition(":")
    return typing.cast("type[Any]", getattr(importlib.import_module(module), attribute))


def suggestion(wrong: str, right: list[str]) -> str:
    """``"; did you mean 'x'? There are: ..."``, for the end of an error message."""
    near = difflib.get_close_matches(wrong, right, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{hint} There are: {', '.join(right)}"


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``"name(a=1, b=word)"`` into the name and its keyword arguments.

    A name may hold ``:``, ``.``, ``/`` and ``-``. A list is read as a tuple.

    Raises:
        ConfigError: the text does not follow the grammar.
    """
    text = text.strip()
    name, bracket, inside = text.partition("(")
    name = name.strip()
    if not name:
        raise ConfigError(f"{text!r} is no spec: it has no name. Write name or name(field=value, ...)")
    if not bracket:
        return name, {}
    if not inside.endswith(")"):
        raise ConfigError(f"{text!r} is no spec: the bracket is not closed. Write name(field=value, ...)")
    arguments: dict[str, Any] = {}
    for part in _split(inside[:-1], text):
        field, equals, value = part.partition("=")
        field = field.strip()
        if not equals or not field.isidentifier():
            raise ConfigError(f"{text!r} is no spec: {part.strip()!r} should read field=value")
        if field in arguments:
            raise ConfigError(f"{text!r}: field {field!r} is given twice")
        arguments[field] = _value(value.strip(), text)
    return name, arguments


def _split(inside: str, text: str) -> list[str]:
    """Cut at the commas that stand outside of brackets and quotes."""
    parts, depth, quote, current, escaped = [], 0, "", "", False
    for character in inside:
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(current)
            current = ""
            continue
        current += character
    if quote or depth:
        raise ConfigError(f"{text!r} is no spec: a quote or a bracket is not closed")
    return [p for p in [*parts, current] if p.strip()]


def _value(word: str, text: str) -> Any:
    if word[:1] + word[-1:] in ("()", "[]"):
        return tuple(_value(item.strip(), text) for item in _split(word[1:-1], text))
    constants = {"true": True, "false": False, "none": None}
    if word.lower() in constants:
        return constants[word.lower()]
    if _BARE_WORD.fullmatch(word):
        return word
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Python only warns about '\\d' and 1if; here they are mistakes
        with suppress(ValueError, SyntaxError, Warning):
            return ast.literal_eval(word)
    raise ConfigError(f"{text!r}: {word!r} is no value; write a number, a word, a quoted string or a tuple")


def build(kind: Kind, text: str) -> Any:
    """The object that a spec names, its fields checked against their types.

    Raises:
        ConfigError: unknown name or field, or a value of the wrong type.
    """
    name, arguments = parse(text)
    return construct(lookup(kind, name), name, arguments)


def presets_of(cls: type[Any]) -> dict[str, dict[str, Any]]:
    """A class's named settings: preset -> the fields that it sets. The defaults are the preset "default"."""
    own = getattr(cls, "PRESETS", None)
    return {"default": {}, **own} if own else {}


def construct(cls: type[Any], name: str, arguments: dict[str, Any]) -> Any:
    """Make a frozen dataclass from keyword arguments, checking names and types.

    Where the class has presets, ``preset=NAME`` sets that preset's fields first and the others on top of them.
    """
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls) if f.init]
    presets = presets_of(cls)
    values = {}
    if presets and "preset" in arguments:
        chosen = arguments["preset"]
        if chosen not in presets:
            raise ConfigError(f"{name} has no preset {chosen!r}{suggestion(str(chosen), sorted(presets))}")
        values = dict(presets[chosen])
        arguments = {key: value for key, value in arguments.items() if key != "preset"}
    for key, value in arguments.items():
        if key not in fields:
            raise ConfigError(f"{name} has no field {key!r}{suggestion(key, fields)}")
        values[key] = _coerce(value, hints[key], f"{name}({key}={value!r})")
    absent = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in values and not has_default(f)]
    if absent:
        raise ConfigError(f"{name} needs {', '.join(absent)}: write {name}({', '.join(f'{a}=...' for a in absent)})")
    return cls(**values)


def _coerce(value: Any, hint: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value is None and None not in args:
            value = "none"  # the bare word reads as None; where a choice is called so, that is what was meant
        if any(value == a and type(value) is type(a) for a in args):  # True equals 1 and is no 1
            return value
        raise ConfigError(f"{where}: must be one of {', '.join(repr(a) for a in args)}")
    if origin in (types.UnionType, typing.Union):
        # A lone value becomes a tuple of one, and an int a float, only where nothing else takes it as it is.
        def bends(option: Any) -> bool:
            return option is float or (typing.get_origin(option) is tuple) != isinstance(value, tuple)

        for option in sorted(args, key=bends):
            try:
                return _coerce(value, option, where)
            except ConfigError:
                continue
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):
                return float(value)
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif origin is tuple:
        items = value if isinstance(value, tuple) else (value,)
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(_coerce(item, args[0], where) for item in items)
        if len(items) == len(args):
            return tuple(_coerce(item, arg, where) for item, arg in zip(items, args, strict=True))
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ConfigError(f"{where}: must be {_describe(hint)}")


def _describe(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint).replace("typing.", "")


def name_of(thing: Any, kind: Kind) -> str:
    """The registered name of an object's class; of an unregistered class, ``module:class``."""
    path = f"{type(thing).__module__}:{type(thing).__qualname__}"
    for name, target in _entries(kind).items():
        if target == path:
            return name
    return path


def resolved(thing: Any, kind: Kind) -> dict[str, Any]:
    """All fields of an object with their values, its name and its class's ``VERSION``: what decides its result.

    Values stand in their declared type (``lr=1`` is 1.0), so that equal objects give the same :func:`key`. A field that
    holds the spec of another object, which the class's ``NESTED`` maps to that one's kind, stands resolved itself.

    Raises:
        ConfigError: a field's value is not of its declared type.
    """
    name, hints = name_of(thing, kind), typing.get_type_hints(type(thing))
    values = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
    values = {key: _coerce(value, hints[key], f"{name}({key}={value!r})") for key, value in values.items()}
    for key, inner in getattr(type(thing), "NESTED", {}).items():
        values[key] = resolved(build(inner, values[key]), inner)
    return {"name": name, "version": getattr(type(thing), "VERSION", 1), **values}


def text_of(thing: Any, kind: Kind) -> str:
    """The shortest spec of an object: its nearest preset, if it has any, and the fields that differ from that."""
    values = {f.name: getattr(thing, f.name) for f in dataclasses.fields(thing) if f.init}
    defaults = {f.name: default_of(f) for f in dataclasses.fields(thing) if f.init}
    written = []
    for preset, settings in (presets_of(type(thing)) or {"default": {}}).items():
        usual = {**defaults, **settings}
        words = [] if preset == "default" else [f"preset={_word(preset)}"]
        words += [f"{key}={_word(value)}" for key, value in values.items() if _differs(value, usual[key])]
        written.append(words)
    changed = min(written, key=len)
    name = name_of(thing, kind)
    return f"{name}({', '.join(changed)})" if changed else name


def _differs(value: Any, usual: Any) -> bool:
    """Whether a value has to be written: 1.0 and 1, or True and 1, are equal and yet not the same."""
    return type(value) is not type(usual) or value != usual


def _word(value: Any) -> str:
    if isinstance(value, str) and _BARE_WORD.fullmatch(value) and value.lower() not in ("true", "false", "none"):
        return value
    return repr(value)


def has_default(field: dataclasses.Field[Any]) -> bool:
    """Whether a spec may leave the field out."""
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value that a field has where a spec leaves it out; ``dataclasses.MISSING`` where it must not."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def key(content: Any) -> str:
    """A 16-digit hexadecimal key of JSON-able content, the same on every machine."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
