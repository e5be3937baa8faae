"""`pyro_wae.lightning.WAE` in a Trainer of Lightning, on one device; tests/test_scale.py has two processes."""

import copy
import importlib
import pickle
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import around
from pyro import poutine
from references import program

from pyro_wae import WAELoss
from pyro_wae.costs import SquaredError
from pyro_wae.penalties import MMD
from pyro_wae.predict import encode

lightning = pytest.importorskip("lightning")
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint  # noqa: E402

from pyro_wae.lightning import WAE  # noqa: E402

# Lightning warns of few workers, of few batches, and of its own use of torch.
pytestmark = pytest.mark.filterwarnings("ignore")


class Net(torch.nn.Module):
    """Codes are two of five numbers, times a factor; with 1 they are draws of the prior where the data are Normal."""

    def __init__(self, factor: float = 1.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))
        self.decoder = torch.nn.Linear(2, 5)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Delta(self.factor * x[:, :2]).to_event(1))


class Data(lightning.LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(60, 5), 20)

    def val_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(90, 5, generator=torch.Generator().manual_seed(1)), 60)


def trainer(folder, *callbacks, epochs=2, logger=False, **options):
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **options,
    )


def test_a_training_logs_the_terms_and_the_mean_cost_of_all_held_out_data(tmp_path):
    module, run = WAE(Net(), loss=WAELoss(penalty_weight=3.0), learning_rate=0.01), trainer(tmp_path)
    run.fit(module, Data())
    found = run.callback_metrics
    assert {"cost", "penalty", "weight", "val_cost", "val_p"} <= set(found)
    assert found["weight"] == 3.0
    (x,) = (torch.cat(list(Data().val_dataloader())),)  # a batch of 60 and one of 30
    z = module.wae.model.__self__.factor * x[:, :2]
    cost = (x - module.wae.model.__self__.decoder(z)).square().sum(1).mean()
    assert found["val_cost"].item() == pytest.approx(cost.item(), rel=1e-5)


@pytest.mark.parametrize(("factor", "is_prior"), [(1.0, True), (2.0, False)])
def test_the_p_value_is_that_of_all_held_out_codes(tmp_path, factor, is_prior):
    """Null: 90 codes are draws of N(0, I). Seed 1 of the data; p > 0.05 under it by the choice of the seed."""
    run = trainer(tmp_path)
    (found,) = run.validate(WAE(Net(factor)), Data(), verbose=False)
    assert (found["val_p"] > 0.05) == is_prior


@pytest.mark.parametrize(
    ("size", "options", "tested"),
    [
        (1, {}, True),
        (1, {"fast_dev_run": True}, False),
        (3, {"fast_dev_run": True}, False),
        (4, {"fast_dev_run": True}, True),
        (2, {"fast_dev_run": 2}, True),
    ],
)
def test_a_trial_run_with_too_few_codes_to_test_is_no_error(tmp_path, size, options, tested):
    run, module = trainer(tmp_path, epochs=1, **options), WAE(Net())
    run.fit(module, Data().train_dataloader(), torch.utils.data.DataLoader(torch.randn(20, 5), size))
    assert "val_cost" in run.callback_metrics
    assert ("val_p" in run.callback_metrics) == tested


def test_a_code_and_a_prior_draw_of_one_datum_are_not_compared(tmp_path):
    """With a prior that depends on the datum, codes of some data stand beside the prior draws of others."""
    model, _ = program(
        prior=lambda x: dist.Normal(x[:, :2], 1e-3).to_event(1), output=lambda z: around(z[..., :1].expand(-1, 5))
    )
    seen = []

    class Seen(WAE):
        def on_validation_epoch_end(self):
            seen.append(self._rows.compute().chunk(2, 1))
            super().on_validation_epoch_end()

    trainer(tmp_path).validate(Seen(model, Net().guide), Data(), verbose=False)
    ((codes, prior),) = seen
    assert len(codes) == len(prior) == 45
    assert torch.cdist(codes, prior).min() > 5e-3  # draws of the same datum are nearer


@pytest.mark.slow
def test_checkpoints_and_early_stopping_monitor_cost_and_p_value(tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor="val_cost")
    matching = ModelCheckpoint(tmp_path / "matching", monitor="val_p", mode="max")
    run = trainer(tmp_path, best, matching, EarlyStopping("val_cost", patience=0, min_delta=1e9), epochs=9)
    module = WAE(Net())
    run.fit(module, Data())
    assert run.current_epoch < 8  # no epoch is better by so much
    assert best.best_model_path
    assert matching.best_model_path
    loaded = WAE.load_from_checkpoint(best.best_model_path, model=Net(factor=7.0))
    saved = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert loaded.wae.model.__self__.factor == saved["wae.model_owner.factor"] != 7.0


def test_predictions_are_codes(tmp_path):
    x, net = torch.randn(40, 5), Net()
    found = trainer(tmp_path).predict(WAE(net), torch.utils.data.DataLoader(x, 20))
    assert torch.equal(torch.cat([codes["z"] for codes in found]), encode(net.model, net.guide, x)["z"])


def test_items_of_a_batch_are_arguments_unless_a_subclass_says_otherwise(tmp_path):
    class WithoutLabels(WAE):
        def arguments(self, batch):
            return batch[:1]

    labelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(40, 5), torch.arange(40)), 20)
    trainer(tmp_path, epochs=1).fit(WithoutLabels(Net()), labelled)
    with pytest.raises(TypeError, match="positional argument"):
        trainer(tmp_path, epochs=1).fit(WAE(Net()), labelled)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.model=test_lightning.Net", "--model.model.factor=2.5"],
        ["--model.model=test_lightning.model", "--model.guide=test_lightning.guide", "--optimizer=SGD"],
    ],
)
def test_lightning_cli_takes_import_paths_or_a_module(tmp_path, arguments, monkeypatch):
    cli = pytest.importorskip("lightning.pytorch.cli")
    pytest.importorskip("jsonargparse")
    monkeypatch.setitem(sys.modules, "test_lightning", sys.modules[__name__])
    quiet = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--trainer.accelerator=cpu"]
    quiet += ["--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    loss = ["--model.loss=pyro_wae.WAELoss", "--model.loss.penalty=pyro_wae.penalties.SlicedWasserstein"]
    loss += ["--model.loss.penalty_weight=7"]
    command = cli.LightningCLI(WAE, Data, run=False, save_config_callback=None, args=[*quiet, *arguments, *loss])
    assert repr(command.model.wae.elbo.penalty).startswith("SlicedWasserstein")
    command.trainer.fit(command.model, datamodule=command.datamodule)
    assert command.trainer.callback_metrics["weight"] == 7
    assert len(list(command.model.parameters())) == 3


@pytest.mark.slow
def test_tensorboard_receives_the_terms(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path)
    trainer(tmp_path, logger=logger).fit(WAE(Net()), Data())
    found = events.EventAccumulator(logger.log_dir)
    found.Reload()
    assert {"cost", "penalty", "weight", "val_cost", "val_p"} <= set(found.Tags()["scalars"])


@pytest.mark.parametrize(
    ("model", "options", "found"),
    [
        (torch.nn.Linear(2, 2), {}, r"guide must be a function.* found None\. Write WAE\(model, guide\)"),
        (Net, {}, r"model must be .*, found <class.*Net'>\. Write WAE\(Net\(\)\)"),
        (Net(), {"loss": WAELoss}, r"loss must be a WAELoss, or None, found <class.*WAELoss'>\. Write WAE\("),
        (Net(), {"loss": MMD()}, r"loss must be a WAELoss, or None, found MMD .*\. Write WAE\("),
        (Net(), {"learning_rate": "1e-3"}, r"learning_rate must be a finite number > 0, found '1e-3'\. Write"),
    ],
)
def test_a_wrong_argument_is_named(model, options, found):
    with pytest.raises(TypeError, match=found):
        WAE(model, **options)


def test_copies_and_pickles_give_the_same_loss():
    module, x = WAE(Net()), torch.randn(20, 5)
    module.wae(x)  # a kernel's length and a weight have been found
    for make in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        other = make(module)  # each of the same step: the weight moves from step to step
        pyro.set_rng_seed(1)
        expected = module.wae(x)
        pyro.set_rng_seed(1)
        assert torch.equal(other.wae(x), expected)


def test_a_batch_may_be_a_dict(tmp_path):
    class Named(Net):
        def model(self, batch):
            return super().model(batch["x"])

        def guide(self, batch):
            return super().guide(batch["x"])

    data = [{"name": str(i), "x": torch.randn(5), "label": i % 2} for i in range(60)]
    loader, run = torch.utils.data.DataLoader(data, 20), trainer(tmp_path, epochs=1)
    run.fit(WAE(Named(), loss=WAELoss(condition="label", micro_batch=10)), loader, loader)
    assert {"cost", "val_p"} <= set(run.callback_metrics)


@pytest.mark.parametrize("left_out", [False, True])
def test_the_mean_cost_is_that_of_all_data_whatever_else_a_batch_holds(tmp_path, left_out):
    class Masked(Net):
        def model(self, batch):
            with poutine.mask(mask=batch["kept"]):
                super().model(batch["x"])

        def guide(self, batch):
            super().guide(batch["x"])

    x, net = torch.randn(50, 5), Masked()
    kept = (torch.arange(50) < 30) | (torch.tensor(not left_out))
    batches = [{"table": torch.zeros(7), "x": x[rows], "kept": kept[rows]} for rows in (slice(20), slice(20, 50))]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    (found,) = trainer(tmp_path).validate(WAE(net), loader, verbose=False)
    costs = (x - net.decoder(x[:, :2])).square().sum(1)
    assert found["val_cost"] == pytest.approx(costs[kept].mean().item(), rel=1e-5)


def test_labels_may_be_missing_in_validation(tmp_path):
    class Labelled(Net):
        def model(self, x, y=None):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1).to_event(1))
                pyro.sample("x", dist.Normal(self.decoder(z), 1).to_event(1), obs=x)
                if y is not None:
                    pyro.sample("y", dist.Normal(z[:, 0], 1), obs=y)

        def guide(self, x, y=None):
            super().guide(x)

    x, run = torch.randn(60, 5), trainer(tmp_path, epochs=1)
    module = WAE(Labelled(), loss=WAELoss(cost={"x": SquaredError(), "y": SquaredError()}))
    labelled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x[:, 0]), 20)
    run.fit(module, labelled, torch.utils.data.DataLoader(x, 20))
    assert {"val_cost", "val_p"} <= set(run.callback_metrics)


def test_without_lightning_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "pyro_wae.lightning")
    with pytest.raises(ImportError, match=r"pyro-wae\[scale\]"):
        importlib.import_module("pyro_wae.lightning")


_net = Net()
model, guide = _net.model, _net.guide


def test_held_out_sequences_of_different_lengths_are_refused_by_their_sizes(tmp_path):
    class Steps(Net):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(x[0].numel()), 1).to_event(1))
                pyro.sample("x", dist.Normal(z, 1).to_event(1), obs=x.flatten(1))

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Delta(x.flatten(1)).to_event(1))

    batches = torch.utils.data.DataLoader([torch.randn(20, 3, 2), torch.randn(20, 2, 2)], batch_size=None)
    with pytest.raises(ValueError, match=r"Held-out batches give codes of different sizes, \[4, 6\].* Pad sequences"):
        trainer(tmp_path).validate(WAE(Steps()), batches, verbose=False)
