"""The open plug-ins: abstract here, frozen and final each in a file of its own.

The file name is the registry: ``find("criteria", "snip")`` imports ``secateur.criteria.snip`` and
takes the one :class:`Criterion` defined there. From outside, ``"my_package.scores:MyScore"`` is
accepted wherever a name is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from secateur.core.errors import SecateurError, UsageError, nearest
from secateur.core.reading import Paper, Reading

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from secateur.core.masks import Masks
    from secateur.core.names import Named
    from secateur.core.run import Run
    from secateur.core.task import Batch, Task


class Method(ABC):
    """What all plug-ins have: a paper and what they need."""

    paper: ClassVar[Paper]
    needs: ClassVar[frozenset[str]] = frozenset()


class Criterion(Method):
    """How much each weight matters; higher = keep.

    ``needs`` is a subset of ``{"data-free", "gradients", "activations", "hessian", "random"}``.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"gradients"})

    @abstractmethod
    def __call__(self, task: Task, masks: Masks) -> Named:
        """One finite score for every entry of every tensor named in ``masks``, same shape, detached."""


class Rule(Method):
    """Something that happens while a network trains.

    A rule is frozen; what it remembers goes into ``run.state(self)``, a dict of tensors, numbers and
    strings that checkpoints keep. ``needs`` is a subset of ``{"dense gradients", "teacher"}``: the first asks for
    gradients of pruned weights too, the second for the dense network in ``run.teacher``.
    """

    def begin(self, run: Run) -> None:
        """Called once before the first step, and again after a resume with ``run.resumed`` true."""

    def loss(self, run: Run, loss: Tensor, batch: Batch, output: Any) -> Tensor:
        """The loss to differentiate; unchanged by default."""
        return loss

    def before_step(self, run: Run) -> None:
        """After the backward pass, before gradients are masked and clipped."""

    def after_step(self, run: Run) -> None:
        """After the optimizer's step; may set ``run.masks``."""

    def end(self, run: Run) -> None:
        """After the last step; must leave a plain network whose zeros are ``run.masks``."""


class Probe(Method):
    """Measures a network without changing it."""

    @abstractmethod
    def __call__(self, task: Task, masks: Masks | None = None) -> Reading:
        """The reading; the task's network, modes and random state are left as they were."""


class Solver(Method):
    """Which weights of one layer go, and how the others make up for it."""

    @abstractmethod
    def __call__(self, weight: Tensor, gram: Tensor, pattern: Any, keep: int) -> tuple[Tensor, Tensor]:
        """New weight ``(out, in)`` and its boolean mask, given the Gram matrix ``(in, in)`` of the inputs."""


class Init(Method):
    """Sets the weights of a network before training."""

    @abstractmethod
    def __call__(self, model: nn.Module, task: Task | None, random: Generator) -> None:
        """Initialise ``model`` in place."""


SOCKETS: dict[str, type[Method]] = {"criteria": Criterion, "rules": Rule, "probes": Probe, "solvers": Solver}
"""The sockets that have methods in this release, and their folders."""


def names(socket: str) -> list[str]:
    """Names of all methods of a socket, without importing them.

    >>> "magnitude" in names("criteria")
    True
    """
    spec = importlib.util.find_spec(f"secateur.{_socket(socket)}")
    places = list(spec.submodule_search_locations or []) if spec else []
    return sorted(m.name for m in pkgutil.iter_modules(places) if not m.name.startswith("_"))


def find(socket: str, name: str) -> type[Any]:
    """The class behind a method's name, or behind ``"package.module:Class"``.

    Raises:
        UsageError: for an unknown name (the nearest is suggested), a module that cannot be imported, or a
            file that does not define exactly one method.
    """
    base = SOCKETS[_socket(socket)]
    if ":" in name:
        found = load_object(name)
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise UsageError(
                f"{name!r} is not a {base.__name__}; it must be a class derived from secateur.{base.__name__}."
            )
        return found
    known = names(socket)
    if name not in known:
        raise UsageError(f"no {base.__name__.lower()} is called {name!r}. {nearest(name, known)}")
    module = importlib.import_module(f"secateur.{socket}.{name}")
    own = [
        c
        for c in vars(module).values()
        if inspect.isclass(c) and issubclass(c, base) and c.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise UsageError(f"secateur/{socket}/{name}.py must define exactly one {base.__name__}, it defines {len(own)}.")
    return own[0]


def name_of(method: Method | type[Method]) -> str:
    """The name under which a method is found: its file, or ``module:Class`` from outside."""
    kind = method if inspect.isclass(method) else type(method)
    inside = re.fullmatch(r"secateur\.(?:criteria|rules|probes|solvers)\.(\w+)", kind.__module__)
    return inside[1] if inside else f"{kind.__module__}:{kind.__qualname__}"


def check_plug_in(kind: Any, base: type, name: str) -> None:
    """Refuse what cannot be made from a recipe: it must be a dataclass derived from ``base``, with nothing abstract.

    Raises:
        UsageError: naming it and what to write.
    """
    if not (inspect.isclass(kind) and issubclass(kind, base)):
        raise UsageError(f"{name!r} is not of kind {base.__name__}; name a class derived from secateur's.")
    if inspect.isabstract(kind):
        missing = ", ".join(f"`{method}`" for method in sorted(vars(kind)["__abstractmethods__"]))
        raise UsageError(f"{name!r} is abstract: it does not define {missing}. Name a class that does.")
    if not dataclasses.is_dataclass(kind):
        raise UsageError(f"{name!r} is not a dataclass; put `@dataclass(frozen=True)` above `class {kind.__name__}`.")


@contextlib.contextmanager
def blame(plug_in: Any) -> Iterator[None]:
    """An error inside a class from outside is one for its author to mend: it is told with its own words and place.

    Errors of this package's own methods pass as they are: they are bugs.

    Args:
        plug_in: the class, or an instance.

    Raises:
        UsageError: naming the class, the error and the line; the original error is its cause.
    """
    kind = plug_in if inspect.isclass(plug_in) else type(plug_in)
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        if kind.__module__.partition(".")[0] == "secateur":
            raise
        frames = traceback.extract_tb(error.__traceback__)
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        last = [frame for frame in frames if frame.filename == file][-1:] or frames[-1:]
        raise UsageError(
            f"'{kind.__module__}:{kind.__qualname__}' failed: {type(error).__name__}: {error} "
            f"({Path(last[0].filename).name}, line {last[0].lineno}). Mend it; `--debug` shows the whole traceback."
        ) from error


def load_object(path: str) -> Any:
    """The object behind ``"package.module:attribute"``, looked up in the working folder too.

    Raises:
        UsageError: when the module or the attribute is missing; the message says which.
    """
    import os

    module_name, _, attribute = path.partition(":")
    if not re.fullmatch(r"[\w.]+", module_name) or not attribute:
        raise UsageError(f"{path!r} is not of the form 'package.module:name'.")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"cannot import {module_name!r} for {path!r}: {error}. Run from the folder that holds it, or install it."
        ) from error
    except Exception as error:
        raise UsageError(f"importing {module_name!r} for {path!r} failed: {type(error).__name__}: {error}") from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(
                f"{module_name!r} has no {attribute!r}. {nearest(part, [n for n in vars(module) if n[0] != '_'])}"
            )
        found = getattr(found, part)
    return found


def _socket(socket: str) -> str:
    if socket not in SOCKETS:
        raise UsageError(f"no socket is called {socket!r}. {nearest(socket, SOCKETS)}")
    return socket
