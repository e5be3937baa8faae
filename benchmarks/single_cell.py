"""Real single-cell counts: a conditional WAE beside scVI, on blood cells that come with scanpy.

    pip install scanpy scvi-tools
    python benchmarks/single_cell.py

The cells are 700 of the 68,000 blood cells (PBMC) of 10x Genomics, with 765 genes. A batch effect with a known answer
is added: half of the cells, drawn at random, lose a part of the counts of each gene, as with other reagents.
"""

import argparse
import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import Benchmark, Report, made_by, progress, table
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_wae import WAELoss
from pyro_wae.costs import NegativeLogLikelihood
from pyro_wae.diagnostics import two_sample_test
from pyro_wae.predict import encode

LATENT_DIM, HIDDEN, BATCH_SIZE, TRAINED = 10, 128, 112, 560


class Cells(nn.Module):
    """Latent codes of gene counts; the decoder receives the batch and the depth of a cell."""

    def __init__(self, genes: int, batches: int):
        super().__init__()
        self.batches = batches
        self.encoder = nn.Sequential(
            nn.Linear(genes + batches, HIDDEN), nn.ReLU(), nn.Dropout(0.1), nn.Linear(HIDDEN, LATENT_DIM)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENT_DIM + batches, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, genes))
        self.log_dispersion = nn.Parameter(torch.zeros(genes))

    def model(self, counts: Tensor, batch: Tensor) -> None:
        """A negative binomial, whose mean is the depth of the cell times the share of each gene."""
        with pyro.plate("cells", len(counts)):
            z = pyro.sample("z", dist.Normal(counts.new_zeros(LATENT_DIM), 1).to_event(1))
            shares = self.decoder(torch.cat([z, one_hot(batch, self.batches)], -1)).log_softmax(-1)
            logits = counts.sum(1, keepdim=True).log() + shares - self.log_dispersion
            negative_binomial = dist.NegativeBinomial(self.log_dispersion.exp(), logits=logits)
            pyro.sample("counts", negative_binomial.to_event(1), obs=counts)

    def guide(self, counts: Tensor, batch: Tensor) -> None:
        """A Normal around the encoder's output: the noise lets few cells fill the prior."""
        loc = self.encoder(torch.cat([counts.log1p(), one_hot(batch, self.batches)], -1))
        with pyro.plate("cells", len(counts)):
            pyro.sample("z", dist.Normal(loc, 0.3).to_event(1))


def train(counts: Tensor, batch: Tensor, condition: str | None, epochs: int) -> tuple[Cells, WAELoss]:
    """Minimises the loss; with ``condition="batch"`` the codes of each batch are compared with the prior."""
    net = Cells(counts.shape[1], int(batch.max()) + 1)
    loss = WAELoss(cost=NegativeLogLikelihood(), condition=condition)
    wae = loss(net.model, net.guide)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(counts)).split(BATCH_SIZE):
            optimizer.zero_grad()
            wae(counts[rows], batch[rows]).backward()
            optimizer.step()
    net.eval()
    return net, loss


def load() -> tuple[Tensor, Tensor, Any]:
    """Counts, batch and type of each cell."""
    import numpy as np
    import scanpy

    cells = scanpy.datasets.pbmc68k_reduced()  # comes with scanpy, as logarithms of scaled counts
    scaled = np.expm1(cells.raw.X.toarray())
    one = np.where(scaled > 0, scaled, np.inf).min(1, keepdims=True)  # the smallest number of a cell is a count of 1
    counts = torch.from_numpy(np.round(scaled / one)).float()
    generator = torch.Generator().manual_seed(0)
    batch = (torch.rand(len(counts), generator=generator) < 0.5).long()
    kept = (0.2 + 0.8 * torch.rand(counts.shape[1], generator=generator)).expand_as(counts)
    thinned = torch.binomial(counts, kept.contiguous(), generator=generator)
    types = cells.obs["bulk_labels"].astype(str).str.replace(r"^(CD[48])[+/].*", r"\1+ T", regex=True)
    return thinned.where(batch[:, None] == 1, counts), batch, types.to_numpy()


def guessed(codes: Tensor, labels: Any) -> float:
    """How often a label is guessed from the 15 nearest codes, the mean over labels, by cross-validation."""
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier

    return float(balanced_accuracy_score(labels, cross_val_predict(KNeighborsClassifier(15), codes, labels, cv=5)))


def with_wae(condition: str | None) -> Any:
    """A WAE, with or without the batch as its condition."""

    def fit(counts: Tensor, batch: Tensor, known: Tensor, held_out: Tensor, args: argparse.Namespace) -> Any:
        net, loss = train(counts[known], batch[known], condition, args.epochs)
        loss.loss(net.model, net.guide, counts[held_out], batch[held_out])
        assert loss.terms is not None
        return loss.terms.cost.item(), encode(net.model, net.guide, counts, batch)["z"]

    return fit


def with_scvi(counts: Tensor, batch: Tensor, known: Tensor, held_out: Tensor, args: argparse.Namespace) -> Any:
    """Trains scVI: layers of the same width and equal batch sizes, and otherwise its defaults, with some 400 epochs."""
    import anndata
    import scvi

    cells = anndata.AnnData(counts.numpy())
    cells.obs["batch"] = batch.numpy().astype(str)
    scvi.model.SCVI.setup_anndata(cells, batch_key="batch")
    model = scvi.model.SCVI(cells, n_latent=LATENT_DIM, n_hidden=HIDDEN, gene_likelihood="nb")
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "logger": False}
    split = {"external_indexing": [known.numpy(), held_out.numpy()]}
    model.train(max_epochs=1 if args.smoke else None, batch_size=BATCH_SIZE, datasplitter_kwargs=split, **quiet)
    cost = model.get_reconstruction_error(indices=held_out.numpy())["reconstruction_loss"]
    return float(cost), torch.as_tensor(model.get_latent_representation(give_mean=False))


def components(counts: Tensor, batch: Tensor, known: Tensor, held_out: Tensor, args: argparse.Namespace) -> Any:
    """Principal components of the logarithms of scaled counts."""
    logs = (1000 * counts / counts.sum(1, keepdim=True)).log1p()
    logs = logs - logs[known].mean(0)
    return None, logs @ torch.linalg.svd(logs[known], full_matrices=False)[2][:LATENT_DIM].T


CONTENDERS = {
    'WAE, `condition="batch"`': with_wae("batch"),
    "WAE, no condition": with_wae(None),
    "scVI": with_scvi,
    "principal components": components,
}


def page(report: Report) -> str:
    """The table, and how it came about."""
    rows = []
    for name in CONTENDERS:
        found = [row for row in report["results"] if row["contender"] == name]
        cells = [[f"{row[key]:{form}}" for row in found if row[key] is not None] for key, form in COLUMNS.items()]
        rows.append([name, *(", ".join(cell) or "-" for cell in cells)])
    scvi_epochs = 1 if report["options"]["smoke"] else "its default, 400"
    header = ["", "cost of a held-out cell", "batch guessed", "type guessed", "standard deviations under the null"]
    return f"""{table(header, rows)}

{made_by(report)}
{TRAINED} training cells, {report["held_out"]} held out; a number for each seed. {report["options"]["epochs"]} epochs;
scVI: {scvi_epochs}.

- *cost*: the negative log-likelihood of the counts given a code.
- *batch*, *type guessed*: accuracy by the 15 nearest codes, the mean over labels; 50% of the batches is guessing.
- *standard deviations under the null*: the two-sample statistic of held-out codes and as many samples of N(0, I).
"""


COLUMNS = {"cost": ".0f", "batch": ".0%", "type": ".0%", "standardized": ".1f"}
BENCH = Benchmark(__file__, page, smoke={"seeds": [0], "epochs": 1})
BENCH.option("--seeds", type=int, nargs="+", default=[0, 1, 2])
BENCH.option("--epochs", type=int, default=60)


def main(argv: list[str] | None = None) -> None:
    """Trains, measures and reports."""
    args = BENCH.start(argv)
    warnings.simplefilter("ignore")  # of scvi-tools and what it imports
    counts, batch, types = load()
    report = BENCH.report(args, held_out=len(counts) - TRAINED, results=[])
    for name, seed in progress([(name, seed) for seed in args.seeds for name in CONTENDERS], "cells", unit="training"):
        pyro.set_rng_seed(seed)
        order = torch.randperm(len(counts))
        known, held_out = order[:TRAINED], order[TRAINED:]
        cost, codes = CONTENDERS[name](counts, batch, known, held_out, args)
        found = two_sample_test(codes[held_out], torch.randn(len(held_out), LATENT_DIM))
        labels = {"batch": guessed(codes, batch), "type": guessed(codes, types)}
        standardized = None if cost is None else found.standardized
        report["results"].append(
            {"contender": name, "seed": seed, "cost": cost, **labels, "standardized": standardized}
        )
        BENCH.write(report)
    BENCH.finish(report)


if __name__ == "__main__":
    main()
