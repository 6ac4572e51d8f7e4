"""Arguments for a network's function: from the user's options and from the data, checked before the call."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Union, get_args, get_origin, get_type_hints

from torch import nn

from secateur.core.errors import ModelError, SecateurError, UsageError, nearest
from secateur.core.sockets import load_object

Options = Mapping[str, Any]
_NO = object()


def arguments(
    name: str, function: Callable[..., nn.Module], shape: Sequence[int] | None, outputs: int | None, options: Options
) -> dict[str, Any]:
    """Keyword arguments for one of the reference networks.

    Raises:
        UsageError: for unknown, missing or wrong-typed options, or a network that does not fit the data.
    """
    parameters = inspect.signature(function).parameters
    _check_names(name, parameters, options)
    hints = get_type_hints(function)
    given = {key: _typed(name, key, value, hints[key]) for key, value in options.items()}
    data = {} if shape is None else _from_shape(name, parameters, tuple(shape), given)
    if outputs is not None:
        # A language model without an argument `outputs` gives one logit for each token it knows.
        data["outputs" if "outputs" in parameters else "vocab"] = outputs
    _check_agreement(name, data, given)
    filled = {**data, **given}
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in filled]
    if missing:
        raise UsageError(
            f"{name} must be told {' and '.join(missing)}: set {', '.join(f'{m} = <number>' for m in missing)}."
        )
    return filled


def call_own(name: str, options: Options) -> nn.Module:
    """What the user's own function gives.

    Raises:
        UsageError: when there is no such function or it does not take the options.
        ModelError: when it fails, or gives something else than an ``nn.Module``.
    """
    function = load_object(name)
    if isinstance(function, nn.Module) or not callable(function):
        raise UsageError(f"{name!r} is {_kind(function)}; name a function or class that builds the network.")
    try:
        signature = inspect.signature(function)
    except ValueError:  # a builtin without a signature checks its own arguments
        signature = None
    if signature:
        _check_own(name, signature, options)
    try:
        model = function(**options)
    except SecateurError:
        raise
    except Exception as error:
        text = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise ModelError(f"{name}({text}) failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name!r} gave {_kind(model)}; it must return a torch.nn.Module.")
    return model


def _kind(thing: Any) -> str:
    return f"{'a class' if inspect.isclass(thing) else 'an object'} of type {type(thing).__name__}"


def _check_own(name: str, signature: inspect.Signature, options: Options) -> None:
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        _check_names(name, signature.parameters, options)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise UsageError(f"{name!r} cannot be called with options {sorted(options)}: {error}.") from error


def _check_names(name: str, parameters: Mapping[str, inspect.Parameter], options: Options) -> None:
    for key in options:
        if key not in parameters:
            raise UsageError(f"{name} has no option {key!r}. {nearest(key, parameters)}")


def _from_shape(name: str, parameters: Options, shape: tuple[int, ...], given: Options) -> dict[str, Any]:
    """Arguments that follow from the shape of one example."""
    if not shape or min(shape) < 1:
        raise UsageError(f"the data: input_shape={shape!r} must be one or more numbers of at least 1.")
    if "channels" in parameters:
        return _from_image(name, parameters, shape)
    if "vocab" not in parameters:
        return {"inputs": math.prod(shape)}
    if len(shape) == 1 and given.get("inputs") is None:
        return {"length": shape[0]} if "length" in parameters else {}
    if len(shape) == 2 and "inputs" in parameters and given.get("vocab") is None:
        return {"inputs": shape[1]}
    vectors = ", or sequences of vectors with inputs" if "inputs" in parameters else ""
    raise UsageError(
        f"{name} takes texts, (tokens,){vectors}; the data gives {shape}. "
        "Use other data or another network (mlp takes any shape), and give not both vocab and inputs."
    )


def _from_image(name: str, parameters: Options, shape: tuple[int, ...]) -> dict[str, Any]:
    if len(shape) != 3:
        raise UsageError(
            f"{name} takes images, (channels, height, width); the data gives {shape}. "
            "Use a data set of images, or mlp, which takes any shape."
        )
    channels, height, width = shape
    if "size" not in parameters:
        return {"channels": channels}
    if height != width:
        raise UsageError(f"{name} takes square images; the data gives {height}×{width}. Crop them, or use resnet20.")
    return {"channels": channels, "size": height}


def _check_agreement(name: str, data: Options, given: Options) -> None:
    """Options that would fail at the first batch."""
    for key in data.keys() & given.keys():
        told, needed = given[key], data[key]
        if key in ("inputs", "channels", "size") and told is not None and told != needed:
            raise UsageError(
                f"{name}: {key}={told} does not fit the data, which needs {key}={needed}. Leave {key} out."
            )
        if key in ("length", "vocab") and told is not None and told < needed:
            raise UsageError(f"{name}: {key}={told} is too small for the data, which needs {needed}. Leave {key} out.")


def _typed(name: str, key: str, value: Any, hint: Any) -> Any:
    found = _converted(value, hint)
    if found is _NO:
        raise UsageError(f"{name}: {key}={value!r} is {type(value).__name__}; it must be {_words(hint)}.")
    return found


def _converted(value: Any, hint: Any) -> Any:
    """``value`` as the annotation asks (lists become tuples, whole numbers floats), or ``_NO``."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return next((found for part in parts if (found := _converted(value, part)) is not _NO), _NO)
    if kind is tuple:
        if not isinstance(value, Sequence) or isinstance(value, str | bytes):
            return _NO
        if parts[-1] is not Ellipsis and len(value) != len(parts):
            return _NO
        entries = tuple(_converted(entry, parts[0]) for entry in value)
        return _NO if any(entry is _NO for entry in entries) else entries
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return value if isinstance(value, hint) and not (hint is int and isinstance(value, bool)) else _NO


def _words(hint: Any) -> str:
    """What an annotation asks for, in words."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if kind is tuple:
        return f"a list of {'' if parts[-1] is Ellipsis else f'{len(parts)} '}whole numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(hint, "left out")
