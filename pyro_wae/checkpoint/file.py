"""Checkpoints: all that a training has to remember in one file, written so that it is whole or not there."""

from __future__ import annotations

import os
import pickle
import random
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import pyro_wae
from pyro_wae.checkpoint.pieces import ModulePiece, Piece, pieces_of, plain
from pyro_wae.checkpoint.store import differing_parameters, restore_store, store_state

__all__ = ["load_checkpoint", "save_checkpoint"]

FORMAT = 1
MOST_LINES = 20
"""Differences that an error lists."""
UNREADABLE = (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, NotImplementedError)
"""What reading raises where a file is cut off, changed or something else."""


def save_checkpoint(path: str | os.PathLike[str], /, *, extra: Mapping[str, Any] | None = None, **parts: Any) -> None:
    """Writes all that a training needs to go on as if it had never stopped.

    Of an :class:`~pyro.infer.svi.SVI` these are model and guide, if they are modules or methods of modules, the loss
    with its discriminator, penalty weight, bandwidths and counts of steps, and the optimiser with its schedulers. Of
    any module, a :class:`~pyro_wae.loss.WAEModule` too, its ``state_dict``. Always: Pyro's parameter store, and the
    random state of torch (CPU and all CUDA devices), numpy and Python. Where model and guide are plain functions, the
    modules that they use have to be given beside the SVI.

    The file is written under another name (``path`` with ``.tmp`` at its end) in the same folder, flushed to the disk
    and then renamed. A process that dies on the way leaves the last checkpoint as it was.

    Args:
        path: The file; one that exists is replaced.
        extra: What :func:`load_checkpoint` is to return: numbers, texts, tensors, and lists and dicts of them.
        **parts: What is to be saved, under names of your choice: SVIs, modules, optimisers, schedulers, generators,
            and whatever has ``state_dict`` and ``load_state_dict``, such as a ``GradScaler``.

    Raises:
        ValueError: If a module's parameters are in Pyro's store and the module is not among the parts, or the optimiser
            holds parameters without a name.
        TypeError: If there is nothing to save, a part has no state, or a state is made of other types than these.
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
    content = {
        "pyro_wae checkpoint": FORMAT,
        "versions": _versions(),
        "about": {name: piece.about() for name, piece in pieces.items()},
        "store": store_state(pieces),
        "states": {name: plain(piece.state(), name) for name, piece in pieces.items()},
        "random": _random_state(),
        "extra": plain(extra or {}, "extra"),
    }
    _write(Path(path), content)


def load_checkpoint(path: str | os.PathLike[str], /, **parts: Any) -> dict[str, Any]:
    """Brings a training back to where :func:`save_checkpoint` left it.

    The parts are made as they were for the training that is to go on, and given under the same names. Modules are
    loaded in place. What only the first step makes (a discriminator of unknown width, bandwidths, the optimiser's state
    of each parameter, the store's parameters) need not exist yet. What a first *call* makes in a module, as in an
    autoguide, must: call it once, or ``svi.evaluate_loss(x)``.

    All is compared before anything is changed. Optimisers get the saved learning rates, not those they were made with.

    Args:
        path: The file.
        **parts: As for :func:`save_checkpoint`.

    Returns:
        What was given there as ``extra``.

    Raises:
        ValueError: If the file is damaged, no checkpoint, of another format, or that of another training; in this case
            the message says what is missing, what is too much, and what has another shape, class or argument.
        TypeError: If a part has no state.
        OSError: If the file cannot be read.

    Example:
        See :func:`save_checkpoint`.
    """
    pieces = _pieces("load_checkpoint", parts)
    content = _read(Path(path))
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
    modules_first = sorted(pieces, key=lambda name: not isinstance(pieces[name], ModulePiece))
    modules = [name for name in modules_first if isinstance(pieces[name], ModulePiece)]
    for name in modules:
        pieces[name].restore(content["states"][name])
    restore_store(content["store"], pieces)
    for name in modules_first[len(modules) :]:
        pieces[name].restore(content["states"][name])
    _restore_random_state(content["random"])
    return dict(content["extra"])


def _pieces(function: str, parts: Mapping[str, Any]) -> dict[str, Piece]:
    if not parts:
        raise TypeError(
            f"{function} takes the parts of a training, found none. Write {function}(path, svi=svi), or "
            f"{function}(path, wae=wae, optimizer=optimizer)."
        )
    return pieces_of(parts)


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
            if "missing" in (there, here):
                place = "missing in the checkpoint" if there == "missing" else "in the checkpoint, missing here"
                yield f"{name}: {key}: {place}"
            else:
                yield f"{name}: {key}: {there or 'not made yet'} in the checkpoint, {here} here"
    yield from differing_parameters(content["store"])


def _versions() -> dict[str, str]:
    return {"pyro_wae": pyro_wae.__version__, "torch": str(torch.__version__), "pyro": pyro.__version__}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        try:
            # torch.load compares no checksums.
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
            file.seek(0)
            content = torch.load(file, map_location=_where_it_was, weights_only=True)
        except UNREADABLE as error:
            raise ValueError(
                f"{path} is damaged, or was not written by save_checkpoint ({type(error).__name__}: {error}). Load "
                "another one."
            ) from error
    if not isinstance(content, dict) or "pyro_wae checkpoint" not in content:
        raise ValueError(f"{path} was not written by save_checkpoint. Write torch.load({str(path)!r}) to look into it.")
    if content["pyro_wae checkpoint"] != FORMAT:
        version = content.get("versions", {}).get("pyro_wae")
        raise ValueError(
            f"{path} has format {content['pyro_wae checkpoint']}, of pyro_wae {version}; this one, "
            f"{pyro_wae.__version__}, reads format {FORMAT}. Install the version that wrote it."
        )
    return content


def _where_it_was(storage: Any, location: str) -> Any:
    """None where the device that a tensor was on exists, else the storage as it is, on the CPU."""
    device = torch.device(location)
    is_here = device.type != "cuda" or (device.index or 0) < torch.cuda.device_count()
    return None if is_here else storage


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - the state that legacy callers draw from
    return {
        "torch": torch.get_rng_state(),
        # Asking would start CUDA in a process that does not use it.
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": plain((kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest), "numpy"),
        "python": random.getstate(),
    }


def _restore_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    for device, own in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(own, device)
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
