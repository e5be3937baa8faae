"""Checkpoints: the whole state of a training in one file, from which it resumes exactly."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_wae
from pyro_wae._core.random_state import random_state, restored_random_state, set_random_state
from pyro_wae.checkpoint.archive import read_archive, write_archive
from pyro_wae.checkpoint.former import agreed_in_format_1
from pyro_wae.checkpoint.pieces import ModulePiece, Piece, pieces_of
from pyro_wae.checkpoint.store import differing_parameters, restore_store, saved_parameters, store_state
from pyro_wae.checkpoint.values import plain

FORMAT = 2
"""Format 1 had no digest."""
CONTENTS = ("versions", "about", "store", "states", "random", "extra")
MOST_LINES = 20
"""Differences that an error lists."""


def save_checkpoint(path: str | os.PathLike[str], /, *, extra: Mapping[str, Any] | None = None, **parts: Any) -> None:
    """Saves the whole state of a training: resumed from it, the training continues as if it had not stopped.

    Of an :class:`~pyro.infer.svi.SVI` these are model and guide, if they are modules or methods of modules, the loss
    with its discriminator, penalty weight, bandwidths and counts of steps, and the optimiser with its schedulers. Of
    any module, a :class:`~pyro_wae.WAEModule` too, its ``state_dict``. Always: Pyro's parameter store, and the
    random state of torch (CPU and all CUDA devices), numpy and Python. Where model and guide are plain functions, the
    modules that they use have to be given beside the SVI.

    The file is written under another name (``path`` with ``.tmp`` at its end) in the same folder, read once without its
    tensors' values, flushed to the disk and then renamed. A process that dies on the way leaves the last checkpoint as
    it was. At its end is the SHA-256 digest of all of it, by which :func:`load_checkpoint` recognises damage.

    Tensors that share memory go on sharing it in ``extra``. A view of a large tensor is saved with all of that tensor's
    memory: write ``x[:10].clone()`` for the part alone.

    Args:
        path: The file; one that exists is replaced. Of a symbolic link, the file that it points to.
        extra: Returned by :func:`load_checkpoint`: numbers, strings, tensors, and lists and dicts of them.
        **parts: The objects to save, under names of your choice: SVIs, modules, optimisers, schedulers, generators,
            and whatever has ``state_dict`` and ``load_state_dict``, such as a ``GradScaler``.

    Raises:
        ValueError: If a module's parameters are in Pyro's store and the module is not among the parts, or the optimiser
            holds parameters without a name, or the path is that of a folder.
        TypeError: If there is nothing to save, a part has no state, or a state or ``extra`` is made of other types than
            these, or could not be loaded again.
        OSError: If the file cannot be written.

    Example:
        >>> import tempfile
        >>> import pyro
        >>> from pyro_wae.checkpoint import load_checkpoint, save_checkpoint
        >>> pyro.clear_param_store()
        >>> network = torch.nn.Linear(3, 2)
        >>> optimizer = torch.optim.Adam(network.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_checkpoint(f"{folder}/run.pt", network=network, optimizer=optimizer, extra={"step": 100})
        ...     load_checkpoint(f"{folder}/run.pt", network=network, optimizer=optimizer)
        {'step': 100}
    """
    pieces = _pieces("save_checkpoint", parts)
    if not (extra is None or isinstance(extra, Mapping)):
        raise TypeError(f"extra must be a dict, found {type(extra).__name__}. Write extra={{'step': step}}.")
    content = {
        "pyro_wae checkpoint": FORMAT,
        "versions": _versions(),
        "about": {name: piece.about() for name, piece in pieces.items()},
        "store": store_state(pieces),
        "states": {name: plain(piece.state(), name) for name, piece in pieces.items()},
        "random": _portable(random_state()),
        "extra": plain(extra or {}, "extra"),
    }
    write_archive(_as_path("save_checkpoint", path), content)


def load_checkpoint(path: str | os.PathLike[str], /, **parts: Any) -> dict[str, Any]:
    """Restores the state of a training that :func:`save_checkpoint` saved.

    The parts are made as they were for the training that is to go on, and given under the same names. Modules are
    loaded in place. What only the first step makes (a discriminator of unknown width, bandwidths, the optimiser's state
    of each parameter, the store's parameters) need not exist yet. What a first *call* makes in a module, as in an
    autoguide, must: call it once, or ``svi.evaluate_loss(x)``.

    All is compared, and loaded into copies, before anything is changed. Only a part that cannot be copied is loaded
    without this rehearsal, before all others. Optimisers get the saved learning rates, not those they were made with.

    Args:
        path: The file.
        **parts: As for :func:`save_checkpoint`.

    Returns:
        What was given there as ``extra``.

    Raises:
        ValueError: If the file is a folder, damaged, no checkpoint, of another format, or that of another training; in
            this case the message lists what is missing, unexpected, or of another shape, class or argument, or the part
            that rejected its state.
        TypeError: If a part has no state.
        OSError: If the file cannot be read.

    Example:
        See :func:`save_checkpoint`.
    """
    pieces = _pieces("load_checkpoint", parts)
    content = _read(_as_path("load_checkpoint", path))
    differences = list(_differences(content, pieces))
    if differences:
        lines = [*differences[:MOST_LINES], *([f"and {n} more"] if (n := len(differences) - MOST_LINES) > 0 else [])]
        written, here = content["versions"], _versions()
        versions = ", ".join(f"{name} {written[name]} (here {here[name]})" for name in here)
        raise ValueError(
            f"{path} is a checkpoint of another training, and nothing was loaded. These differ:\n  "
            + "\n  ".join(lines)
            + f"\nMake all parts as they were when it was written, with {versions}. If what is missing here is made by "
            "a first call, as an autoguide's parameters are, write svi.evaluate_loss(x) before load_checkpoint."
        )
    with restored_random_state():
        uncopied = _rehearse(path, content, pieces)
    modules = [name for name, piece in pieces.items() if isinstance(piece, ModulePiece) and name not in uncopied]
    for name in [*uncopied, *modules]:
        pieces[name].restore(content["states"][name])
    restore_store(content["store"], pieces)
    for name, piece in pieces.items():
        if name not in uncopied and name not in modules:
            piece.restore(content["states"][name])
    set_random_state(_native(content["random"]))
    return dict(content["extra"])


def _pieces(function: str, parts: Mapping[str, Any]) -> dict[str, Piece]:
    if not parts:
        raise TypeError(
            f"{function} takes the parts of a training, found none. Write {function}(path, svi=svi), or "
            f"{function}(path, wae=wae, optimizer=optimizer)."
        )
    return pieces_of(parts)


def _as_path(function: str, path: Any) -> Path:
    """The file itself: through symbolic links."""
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        raise TypeError(f"{function} takes the path of a file, found {path!r}. Write {function}('run.pt', svi=svi).")
    file = Path(os.path.realpath(os.fsdecode(path)))
    if file.is_dir():
        write = f"{function}({str(file / 'run.pt')!r}, svi=svi)"
        raise ValueError(f"{function} takes the path of a file, found the folder {file}. Write {write}.")
    return file


def _differences(content: Mapping[str, Any], pieces: Mapping[str, Piece]) -> Iterator[str]:
    saved = content["about"]
    for name in saved:
        if name not in pieces:
            yield f"{name}: in the checkpoint, missing here"
    for name, piece in pieces.items():
        if name not in saved:
            yield f"{name}: missing in the checkpoint"
            continue
        for key, there, here in piece.differing(saved[name]):
            if content["pyro_wae checkpoint"] == 1 and agreed_in_format_1(key, there, here):
                continue
            if "missing" in (there, here):
                place = "missing in the checkpoint" if there == "missing" else "in the checkpoint, missing here"
                yield f"{name}: {key}: {place}"
            else:
                yield f"{name}: {key}: {there or 'not made yet'} in the checkpoint, {here} here"
    yield from differing_parameters(content["store"])


def _rehearse(path: Any, content: Mapping[str, Any], pieces: Mapping[str, Piece]) -> list[str]:
    """Loads the states into copies; the names of the pieces that cannot be copied.

    Raises:
        ValueError: If a state does not suit its piece.
    """
    states, uncopied = content["states"], []
    parameters = saved_parameters(content["store"], states)
    for name, piece in pieces.items():
        try:
            if not piece.rehearse(states[name], parameters):
                uncopied.append(name)
        except Exception as error:
            raise ValueError(
                f"{name} does not take its state from {path}, and nothing was loaded. Make it as it was when the "
                f"checkpoint was written ({type(error).__name__}: {error})."
            ) from error
    return uncopied


def _versions() -> dict[str, str]:
    return {"pyro_wae": pyro_wae.__version__, "torch": str(torch.__version__), "pyro": pyro.__version__}


def _read(path: Path) -> dict[str, Any]:
    content, has_digest = read_archive(path)
    if not isinstance(content, dict) or "pyro_wae checkpoint" not in content:
        raise ValueError(f"{path} was not written by save_checkpoint. Write torch.load({str(path)!r}) to look into it.")
    found = content["pyro_wae checkpoint"]
    if found not in range(1, FORMAT + 1):
        version = content.get("versions", {}).get("pyro_wae")
        raise ValueError(
            f"{path} has format {found}, of pyro_wae {version}; this one, {pyro_wae.__version__}, reads formats up to "
            f"{FORMAT}. Install the version that wrote it."
        )
    missing = [part for part in CONTENTS if part not in content]
    if missing or (found > 1 and not has_digest):
        what = f"it has no {missing}" if missing else "its digest is missing"
        raise ValueError(f"{path} is damaged ({what}). Load another one.")
    return content


def _portable(state: dict[str, Any]) -> dict[str, Any]:
    """The random state with numpy's keys as a tensor, which a checkpoint can hold."""
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": plain((kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest), "numpy")}


def _native(state: dict[str, Any]) -> dict[str, Any]:
    kind, keys, *rest = state["numpy"]
    return {**state, "numpy": (kind, keys.numpy().astype(np.uint32), *rest)}
