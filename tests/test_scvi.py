"""A model of scvi-tools trained by its own training plans with `WAELoss` in place of the ELBO, beside scVI itself."""

import os
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot, softplus

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.penalties import MMD
from pyro_wae.predict import encode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of scvi-tools and what it imports
    scvi = pytest.importorskip("scvi", reason="make test-scvi")
    from scvi import REGISTRY_KEYS, train
    from scvi.data import AnnDataManager, fields, synthetic_iid
    from scvi.model.base import BaseModelClass, PyroSviTrainMixin
    from scvi.module.base import PyroBaseModuleClass

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
OPTIONS = {"accelerator": "cpu", "batch_size": 100, "train_size": 1.0, "enable_progress_bar": False, "logger": False}


class Counts(PyroBaseModuleClass):
    """Codes of counts, with a decoder that is told library size and batch."""

    def __init__(self, genes, batches, latent_dim=5):
        super().__init__()
        self.batches, self.latent_dim = batches, latent_dim
        self.encoder = nn.Sequential(nn.Linear(genes + batches, 64), nn.ReLU(), nn.Linear(64, latent_dim))
        self.decoder = nn.Sequential(nn.Linear(latent_dim + batches, 64), nn.ReLU(), nn.Linear(64, genes))
        self.dispersion = nn.Parameter(torch.zeros(genes))

    @staticmethod
    def _get_fn_args_from_batch(tensors):
        return (tensors[REGISTRY_KEYS.X_KEY], tensors[REGISTRY_KEYS.BATCH_KEY].long()), {}

    def beside(self, rows, batch):
        return torch.cat([rows, one_hot(batch[:, 0], self.batches)], 1)

    def model(self, x, batch):
        pyro.module("counts", self)
        with pyro.plate("cells", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1).to_event(1))
            mean = x.sum(1, keepdim=True) * self.decoder(self.beside(z, batch)).softmax(1)
            total = softplus(self.dispersion) + 1e-4
            pyro.sample("x", dist.NegativeBinomial(total, logits=((mean + 1e-8) / total).log()).to_event(1), obs=x)

    def guide(self, x, batch):
        pyro.module("counts", self)
        with pyro.plate("cells", len(x)):
            pyro.sample("z", dist.Delta(self.encoder(self.beside(x.log1p(), batch))).to_event(1))


class CountsModel(PyroSviTrainMixin, BaseModelClass):
    """The same as a model of scvi-tools, with its data handling and training."""

    def __init__(self, adata):
        super().__init__(adata)
        self.module = Counts(self.summary_stats.n_vars, self.summary_stats.n_batch)
        self.init_params_ = self._get_init_params(locals())

    @classmethod
    def setup_anndata(cls, adata, batch_key, **kwargs):
        setup = cls._get_setup_method_args(**locals())
        found = [
            fields.LayerField(REGISTRY_KEYS.X_KEY, None, is_count_data=True),
            fields.CategoricalObsField(REGISTRY_KEYS.BATCH_KEY, batch_key),
        ]
        manager = AnnDataManager(fields=found, setup_method_args=setup)
        manager.register_fields(adata)
        cls.register_manager(manager)


@pytest.fixture(scope="module")
def cells():
    """Counts of two batches; in the second, a third of the genes are counted five times as often."""
    scvi.settings.seed = 0
    adata = synthetic_iid(batch_size=300)
    is_second = (adata.obs["batch"] == "batch_1").to_numpy()
    adata.X[is_second, ::3] *= 5
    return adata


def tensors(cells):
    batch = torch.from_numpy((cells.obs["batch"] == "batch_1").to_numpy()).long()[:, None]
    return torch.as_tensor(cells.X, dtype=torch.float32), batch


def wae():
    """Codes that follow the prior whatever the batch: z and batch are compared jointly."""
    return WAELoss(MMD(), cost=NegativeLogLikelihood(), condition="batch", penalty_weight=1000.0)


@pytest.fixture(scope="module")
def trained(cells):
    """Costs of a WAE before and after its training and of scVI, and the rows in which batches may be mixed."""
    CountsModel.setup_anndata(cells, batch_key="batch")
    model, loss = CountsModel(cells), wae()
    x, batch = tensors(cells)
    program = model.module.model, model.module.guide
    loss_before = wae()
    loss_before.loss(*program, x, batch)
    model.train(max_epochs=40, plan_kwargs={"loss_fn": loss, "optim": pyro.optim.Adam({"lr": 5e-3})}, **OPTIONS)
    loss.loss(*program, x, batch)

    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    vae = scvi.model.SCVI(cells, gene_likelihood="nb", n_latent=5, n_hidden=64)
    vae.train(max_epochs=40, plan_kwargs={"lr": 5e-3}, **OPTIONS)
    costs = [loss_before.terms.cost, loss.terms.cost, vae.get_reconstruction_error()["reconstruction_loss"].item()]
    print("cost {:.1f} -> {:.1f}, of scVI {:.1f}".format(*costs))
    codes = encode(*program, x, batch)["z"].numpy()
    return costs, {"WAE": codes, "scVI": vae.get_latent_representation(), "counts": x.numpy()}


def test_its_training_plan_trains_a_wae_as_well_as_scvi_trains_its_vae(trained):
    (before, after, of_scvi), _ = trained
    # Genes of `synthetic_iid` are independent draws: what there is to learn is the mean of each gene in each batch.
    assert after < before - 10
    assert after < 1.02 * of_scvi


def test_a_classifier_cannot_read_the_batch_off_the_codes(cells, trained):
    ensemble = pytest.importorskip("sklearn.ensemble")
    selection = pytest.importorskip("sklearn.model_selection")
    forest = ensemble.RandomForestClassifier(50, random_state=0)
    found = {
        name: selection.cross_val_score(forest, rows, cells.obs["batch"], cv=4).mean()
        for name, rows in trained[1].items()
    }
    print("accuracy of the batch:", {name: f"{value:.2f}" for name, value in found.items()})
    assert found["WAE"] < 0.6 < found["counts"]


def test_neighbours_in_codes_and_umap_are_of_both_batches(cells, trained, tmp_path):
    """The share of the other batch among 15 neighbours, 0.5 where batches are mixed, in scanpy's graph and its UMAP."""
    scanpy = pytest.importorskip("scanpy")
    pytest.importorskip("umap")
    pyplot = pytest.importorskip("matplotlib.pyplot")
    batch, found = (cells.obs["batch"] == "batch_1").to_numpy(), {}
    figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for panel, (name, rows) in zip(axes, trained[1].items(), strict=True):
        cells.obsm["rows"] = rows
        scanpy.pp.neighbors(cells, n_neighbors=15, use_rep="rows")
        shares = [other_batch(cells.obsp["distances"], batch)]
        scanpy.tl.umap(cells, random_state=0)
        scanpy.pp.neighbors(cells, n_neighbors=15, use_rep="X_umap")
        found[name] = [*shares, other_batch(cells.obsp["distances"], batch)]
        scanpy.pl.umap(cells, color="batch", title=name, ax=panel, show=False, legend_loc=None, size=20)
    print("neighbours of the other batch (codes, UMAP):", {k: [f"{x:.2f}" for x in v] for k, v in found.items()})
    figure.savefig(os.environ.get("PYRO_WAE_UMAP", tmp_path / "umap.png"), dpi=80)
    assert min(found["WAE"]) > 0.4
    assert max(found["counts"]) < 0.1


def other_batch(distances, batch):
    """The share of pairs of neighbours that join two batches."""
    rows, columns = distances.nonzero()
    return (batch[rows] != batch[columns]).mean()


@pytest.mark.parametrize("plan", ["PyroTrainingPlan", "LowLevelPyroTrainingPlan"])
@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_scale_elbo_scales_the_loss_and_nothing_warns(cells, plan, scale):
    CountsModel.setup_anndata(cells, batch_key="batch")
    model, loss, steps = CountsModel(cells), wae(), []
    training = getattr(train, plan)(model.module, loss_fn=loss, scale_elbo=scale)
    x, batch = (rows[::10] for rows in tensors(cells))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            pyro.set_rng_seed(0)
            given = {REGISTRY_KEYS.X_KEY: x, REGISTRY_KEYS.BATCH_KEY: batch}
            if plan == "PyroTrainingPlan":
                args, kwargs = model.module._get_fn_args_from_batch(given)
                steps.append(training.svi.step(*args, **kwargs))
            else:
                steps.append(training.training_step(given, 0)["loss"].item())
    pyro.set_rng_seed(0)
    parts = loss.terms
    assert steps[-1] == pytest.approx(float(parts.cost + parts.weight * parts.penalty), rel=1e-4)
    assert [str(item.message) for item in found if "WAE" in str(item.message)] == []


def test_a_model_is_saved_and_loaded_and_its_history_is_that_of_the_loss(cells, tmp_path):
    CountsModel.setup_anndata(cells, batch_key="batch")
    model, loss = CountsModel(cells), wae()
    # 600 cells in batches of 599: without drop_last a last batch of one cell, which has no distribution.
    options = {**OPTIONS, "batch_size": 599, "logger": None, "datasplitter_kwargs": {"drop_last": True}}
    model.train(max_epochs=1, plan_kwargs={"loss_fn": loss}, **options)
    found, parts = model.history["elbo_train"].iloc[0].item(), loss.terms
    assert found == pytest.approx(float(parts.cost + parts.weight * parts.penalty), rel=1e-4)
    model.save(tmp_path / "model")
    loaded = CountsModel.load(tmp_path / "model", adata=cells, accelerator="cpu")
    codes = [encode(one.module.model, one.module.guide, *tensors(cells))["z"] for one in (model, loaded)]
    assert torch.equal(*codes)
