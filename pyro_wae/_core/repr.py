"""One ``repr`` for every option object: the call that makes it."""

from __future__ import annotations

import inspect


def argument_names(kind: type) -> list[str]:
    """The arguments of a class, without ``*args`` and ``**kwargs``, which ``torch.nn.Module`` has."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in inspect.signature(kind).parameters.values() if p.kind not in variadic]


class CallRepr:
    """Gives ``repr(obj)`` as ``Class(argument=value, ...)``, read from the signature of ``__init__``.

    Every argument but ``*args`` and ``**kwargs`` must be kept as an attribute of its own name.
    """

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in argument_names(type(self)))
        return f"{type(self).__name__}({values})"
