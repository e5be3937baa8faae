"""One ``repr`` for every option object: the call that makes it."""

from __future__ import annotations

import inspect


class CallRepr:
    """Gives ``repr(obj)`` as ``Class(argument=value, ...)``, read from the signature of ``__init__``.

    Every argument but ``*args`` and ``**kwargs`` must be kept as an attribute of its own name.
    """

    def __repr__(self) -> str:
        variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [p.name for p in inspect.signature(type(self)).parameters.values() if p.kind not in variadic]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"
