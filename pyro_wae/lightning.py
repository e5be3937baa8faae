"""Training by Lightning: model, guide and loss as a ``LightningModule``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_wae import WAELoss
from pyro_wae._core import checks
from pyro_wae._core.programs import tensors_of
from pyro_wae.diagnostics import two_sample_test
from pyro_wae.diagnostics.hypothesis_test import new_generator
from pyro_wae.step.observe import Observer

try:
    from lightning.pytorch import LightningModule
    from torchmetrics import CatMetric
except ImportError as error:
    raise ImportError('pyro_wae.lightning needs Lightning. Write pip install "pyro-wae[scale]".') from error

__all__ = ["WAE"]

TESTABLE = 4
"""Fewest codes with which the two-sample test can reject at its level."""


class WAE(LightningModule):
    """A Pyro model and guide with their loss, for a ``lightning.Trainer``.

    A training step logs ``cost``, ``penalty`` and ``weight``. Validation logs ``val_cost``, the mean cost of held-out
    data, and ``val_p``, the p-value of :func:`~pyro_wae.diagnostics.two_sample_test` on their codes against prior
    samples, taken over all batches and processes. The test is skipped in Lightning's sanity check, and under
    ``fast_dev_run`` if there are too few codes. Checkpoints and early stopping may monitor either. In several processes
    each draws from a random state of its own; ``loss=WAELoss(process_group="world")`` compares the codes of all.

    Args:
        model: The Pyro model, or a module that has ``.model`` and ``.guide``.
        guide: Its guide; None where the module has it.
        loss: The loss. Default: :class:`~pyro_wae.WAELoss` with its own defaults.
        learning_rate: That of Adam. Override ``configure_optimizers`` for another optimiser.
        test_codes: Maximum number of held-out codes in the test, whose time grows with its square, >= 2.

    Attributes:
        wae: The :class:`~pyro_wae.WAEModule`, whose parameters are trained.

    Raises:
        TypeError: If there is no guide, or an argument has the wrong type.
        ValueError: If a number is out of range; in validation, if there are too few codes to test.

    Example:
        >>> import lightning, torch
        >>> from pyro_wae.demo.nets import DigitWAE
        >>> module = WAE(DigitWAE(zdim=8), learning_rate=1e-3)
        >>> loader = torch.utils.data.DataLoader(torch.rand(64, 1, 28, 28), batch_size=32)
        >>> trainer = lightning.Trainer(max_epochs=10, logger=False)  # doctest: +SKIP
        >>> trainer.fit(module, loader, loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any] | None = None,
        *,
        loss: WAELoss | None = None,
        learning_rate: float = 1e-3,
        test_codes: int = 500,
    ) -> None:
        super().__init__()
        what, write = "a WAELoss, or None", "WAE(model, guide, loss=WAELoss(MMD()))"
        loss = WAELoss() if loss is None else checks.instance("loss", loss, WAELoss, what, write=write)
        if guide is None:
            what = "a function beside its guide, or a module with .model and .guide"
            checks.accepted("model", model, not isinstance(model, type), what, write="WAE(Net())")
            what = "a function, or None beside a module with .model and .guide"
            guide = checks.function("guide", getattr(model, "guide", None), what, write="WAE(model, guide)")
            model = model.model  # type: ignore[attr-defined]
        self.wae = loss(model, guide)
        self.learning_rate = checks.number("learning_rate", learning_rate, above=0, write="learning_rate=1e-3")
        self.test_codes = checks.whole("test_codes", test_codes, least=2, write="test_codes=500")
        self._rows = CatMetric(nan_strategy="error")  # a code and a prior sample, side by side

    def arguments(self, batch: Any) -> tuple[Any, ...]:
        """What model and guide are called with: the items of a tuple or list, or the batch itself."""
        return tuple(batch) if isinstance(batch, tuple | list) else (batch,)

    def on_fit_start(self) -> None:
        if self.trainer.world_size > 1:  # as Lightning starts them, all have one state
            pyro.set_rng_seed((torch.initial_seed() + self.global_rank) % 2**32)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        arguments = self.arguments(batch)
        loss: Tensor = self.wae(*arguments)
        terms = self.wae.terms
        assert terms is not None  # it has just been set
        parts = {"cost": terms.cost, "penalty": terms.penalty, "weight": float(terms.weight)}
        data = next((len(tensor) for value in arguments for tensor in tensors_of(value)), 1)
        self.log_dict(parts, on_step=False, on_epoch=True, batch_size=data, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        elbo, programs = self.wae.elbo, (self.wae.model, self.wae.guide)
        options = {"cost": elbo.cost, "data_plate": elbo.data_plate, "condition": elbo.condition}
        # Held-out data may lack a site that a cost names, as labels; training checks the names.
        named = set(elbo.cost) if isinstance(elbo.cost, Mapping) else set()
        observer = Observer(*programs, prior_draws=1, once_observed=named, **options)
        step = observer.observe(self.arguments(batch), {})
        (codes,), prior = step.rows()
        assert prior is not None  # one draw for each code
        if step.prior_varies or step.kept is not None:
            # A code and a prior sample of one datum are not independent: each datum gives the one or the other.
            codes, prior = codes[1::2], prior[:-1:2]
        rows = torch.cat([codes, prior], 1)
        widths = {part.shape[1] // 2 for part in (*self._rows.value[:1], rows)}
        if len(widths) > 1:
            raise ValueError(
                f"Held-out batches give codes of different sizes, {sorted(widths)}, which have no joint distribution. "
                "Pad sequences to one length under poutine.mask."
            )
        self._rows.update(rows)
        terms = step.add({"": codes.new_zeros(())}, lambda cost: 0.0).terms
        assert terms is not None  # the loss has been added up
        seen = step.data if step.seen is None else int(step.seen.sum())
        self.log("val_cost", terms.cost, batch_size=seen, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        rows = self._rows.compute()  # those of all processes
        self._rows.reset()
        if self.trainer.sanity_checking or (self.trainer.fast_dev_run and len(rows) < TESTABLE):
            return  # batches of a trial run may hold too few codes to test
        order = torch.randperm(len(rows), generator=new_generator(0)[0], device="cpu")
        chosen = order[: self.test_codes].to(rows.device)
        self.log("val_p", two_sample_test(*rows[chosen].chunk(2, 1)).p_value, batch_size=1, sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The latent codes of a batch."""
        return self.wae.encode(*self.arguments(batch))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.wae.parameters(), lr=self.learning_rate)
