"""The tables of quality.py: the settings that each compares, and the page that shows what was measured."""

import dataclasses
import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from harness import Report, made_by, table

TESTED = 1000
"""Codes in a two-sample test."""

LEVEL = 0.05
"""A p-value above it does not distinguish codes from the prior."""

IMQ = "InverseMultiquadratic.multiscale()"


def laplace(*lengths: float) -> str:
    """The line of a Laplace kernel at several lengths, in its own default length."""
    return f"MultiScale(Laplace(), {[round(length**2, 8) for length in lengths]})"


FINE, MIDDLE, COARSE = laplace(0.02, 0.05, 0.15), laplace(0.05, 0.15, 0.5), laplace(0.1, 0.3, 1.0)
KERNELS = {
    "IMQ, 7 scales": IMQ,
    "Laplace .05 .15 .5 5": "Laplace.multiscale()",
    "Laplace .02 .05 .15": FINE,
    "Laplace .05 .15 .5": MIDDLE,
    "Laplace .1 .3 1": COARSE,
    "Matern 3/2 .05 .15 .5": MIDDLE.replace("Laplace()", "Matern(1.5)"),
    "IMQ + 3 Laplace .02 .05 .15": f"{IMQ} + 3.0 * {FINE}",
}


@dataclass(frozen=True)
class Setting:
    """One training of a table.

    Args:
        name: Of its row.
        penalty: The line that makes the penalty; ``"VAE(s)"`` takes Pyro's ELBO with a decoder of standard deviation s.
        weight: The line that makes the penalty weight.
        prior: The line that makes the prior from the latent dimension d, the encoder and the training data x; None is
            N(0, I).
        nets: ``"deep"`` or ``"shallow"``; for digits ``"deeper"``, too.
        data: Of what; None takes that of the command line.
        zdim: The latent dimension d.
        batch: Data in a step.
        epochs: Passes over the data; None takes those of the command line.
        rate: The learning rate of the prior.
        prior_last: Whether the networks' rate ends at 88 % of the steps, and the prior's starts to fall at 78 %; both
            fall along one cosine otherwise.
        average: The decay of an exponential average of the parameters, which is judged in their place.
        noise: The standard deviation of the encoder.
        initialise: Whether a mixture is put onto the codes after a fifth of the steps.
        fitted: Components of a mixture that is fitted to the codes afterwards, too; none by default.
    """

    name: str
    penalty: str = "MMD()"
    weight: str = "Constraint()"
    prior: str | None = None
    nets: str = "deep"
    data: str | None = None
    zdim: int = 8
    batch: int = 100
    epochs: int | None = None
    rate: float = 0.03
    prior_last: bool = False
    average: float | None = None
    noise: float = 0.0
    initialise: bool = False
    fitted: int = 0


ROW = {"setting": "name", "nets": "nets", "data": "data", "d": "zdim", "batch": "batch", "epochs": "epochs"}
ROW |= {"weight": "weight"}
"""Title and key of what names a row: no two settings of a table agree in all of it."""


def kernel_table() -> Iterator[Setting]:
    """Every kernel at three weights: kernels are compared at equal cost."""
    cells = [("bundled", 8, 100), *((data, d, 128) for data in ("bars", "digits8x8", "biopsies") for d in (2, 8, 32))]
    cells += [("bars", 64, 128), ("bars", 8, 64), ("bars", 8, 1024)]
    for data, d, batch in cells:
        for name, kernel in KERNELS.items():
            for weight in ("30.0", "300.0"):
                yield Setting(name, f"MMD({kernel})", weight, data=data, zdim=d, batch=batch)


def penalty_table() -> Iterator[Setting]:
    """Penalties, each with the weight that ``docs/penalties.md`` starts from."""
    yield Setting("no penalty", "MMD()", "0.0")
    starts = {
        "MMD()": 500, "MMD(standardize=True)": 0.6, "MMD(Gaussian())": 300, f"MMD({IMQ})": 100, "EnergyDistance()": 60,
        "CramerWold()": 900, "KernelStein()": 30, "SlicedWasserstein()": 100, "MaxSlicedWasserstein()": 12.5,
        "Sinkhorn()": 12.5, "JensenShannon()": 100,
    }  # fmt: skip
    for penalty, weight in starts.items():
        yield Setting(f"`{penalty}`", penalty, str(float(weight)))


def constraint_table() -> Iterator[Setting]:
    """The constraint beside constants."""
    for nets in ("deep", "shallow"):
        for name, penalty in (("IMQ", f"MMD({IMQ})"), ("Laplace", f"MMD({MIDDLE})"), ("GAN", "JensenShannon()")):
            for weight in ("Constraint()", "30.0", "100.0", "300.0"):
                yield Setting(name, penalty, weight, nets=nets)


LARGE_DISCRIMINATOR = (
    "JensenShannon(nn.Sequential(nn.LazyLinear(512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), "
    "nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 1)), steps=3, gradient_penalty_every=1)"
)


def gan_table() -> Iterator[Setting]:
    """Discriminators."""
    choices = {
        "JensenShannon()": "JensenShannon()",
        "one step": "JensenShannon(steps=1)",
        "slope penalty in each step": "JensenShannon(gradient_penalty_every=1)",
        "4 x 512 ReLU, 3 steps, slope penalty in each": LARGE_DISCRIMINATOR,
    }
    for nets in ("deep", "shallow"):
        for name, penalty in choices.items():
            yield Setting(name, penalty, "100.0", nets=nets)


def prior_table() -> Iterator[Setting]:
    """Priors that are learnt inside, and mixtures fitted afterwards."""
    learned = f"MMD({MIDDLE}, closed_form=False) + PriorLikelihood()"
    mixture = "MixturePrior(100, d)"
    yield Setting("MixturePrior(100, d)", learned, "100.0", mixture, fitted=100)
    yield Setting("MixturePrior(100, d), initialise", learned, "100.0", mixture, initialise=True)
    yield Setting("MixturePrior(100, d), rate 0.001", learned, "100.0", mixture, rate=0.001)
    yield Setting("MixturePrior(200, d)", learned, "100.0", "MixturePrior(200, d)")
    full = "MixturePrior(300, d, full_covariance=True)"
    yield Setting(full, learned, "100.0", full, fitted=300)
    yield Setting(f"{full}, JensenShannon", f"{learned} + JensenShannon()", "Constraint(codes=16000)", full)
    both = f"{learned} + JensenShannon()"
    yield Setting(f"{full}, JensenShannon, prior last", both, "100.0", full, rate=0.01, prior_last=True, fitted=300)
    yield Setting("VampPrior(encoder, x[:100])", learned, "100.0", "VampPrior(encoder, x[:100])", rate=0.01)
    free = "VampPrior(encoder, x[:100], standardized=False)"
    yield Setting(free, learned, "100.0", free, rate=0.01)
    yield Setting("flow", learned, "100.0", "FlowPrior(d)", rate=0.003)
    yield Setting("N(0, I), fitted afterwards", f"MMD({MIDDLE})", "30.0", fitted=100)
    yield Setting("no penalty, fitted afterwards", "MMD()", "0.0", fitted=100)
    yield Setting("VAE, scale 0.15", "VAE(0.15)", fitted=100)


def normal_table() -> Iterator[Setting]:
    """N(0, I): what each part gives."""
    base = Setting("shallow, IMQ, Constraint()", f"MMD({IMQ})", nets="shallow")
    yield base
    yield dataclasses.replace(base, name="deep", nets="deep")
    fine = dataclasses.replace(base, name="deep, Laplace .02 .05 .15", nets="deep", penalty=f"MMD({FINE})")
    yield fine
    yield dataclasses.replace(fine, name="... averaged 0.999", average=0.999)
    yield dataclasses.replace(fine, name="... noise 0.05", noise=0.05)
    both = dataclasses.replace(fine, name="... with JensenShannon", penalty=f"5.0 * MMD({FINE}) + JensenShannon()")
    yield both
    yield dataclasses.replace(fine, name="... batch 200", batch=200)
    for codes in (4000, 16_000):
        name = f"... with JensenShannon, {codes:,} codes"
        strict = dataclasses.replace(both, name=name, weight=f"Constraint(codes={codes})")
        yield strict
        for zdim in (6, 5, 4) if codes == 4000 else ():
            yield dataclasses.replace(strict, zdim=zdim, fitted=100)
    longer = "... with JensenShannon, weight 300, 30 epochs"
    yield dataclasses.replace(both, name=longer, weight="300.0", epochs=30, fitted=100)
    all_of_it = "deeper, with JensenShannon, 4,000 codes"
    yield dataclasses.replace(both, name=all_of_it, nets="deeper", weight="Constraint(codes=4000)", fitted=100)


TABLES: dict[str, Callable[[], Iterable[Setting]]] = {
    "kernels": kernel_table,
    "penalties": penalty_table,
    "constraint": constraint_table,
    "gan": gan_table,
    "priors": prior_table,
    "normal": normal_table,
}


def chosen(tables: list[str], only: str) -> list[tuple[str, Setting]]:
    """The settings of some tables, each with the name of its table."""
    settings = [(name, setting) for name in tables for setting in TABLES[name]()]
    return [(name, one) for name, one in settings if only in f"{one.name} {one.penalty} {one.nets}"]


def page(report: Report) -> str:
    """The table with the numbers of every seed, and how it came about."""
    kinds: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in report["results"]:
        kinds.setdefault(tuple(row[key] for key in ROW.values()), []).append(row)
    rows = []
    for key, found in kinds.items():
        seeds = sorted((row for row in found if "failure" not in row), key=lambda row: row["seed"])
        row = dict(zip(ROW, map(str, key), strict=True))
        row["weight"] = "-" if found[0]["penalty"].startswith("VAE") else row["weight"].removesuffix(".0")
        row["setting"] += f" ({len(found) - len(seeds)} of {len(found)} failed)" if len(seeds) < len(found) else ""
        rows.append(row | {title: column(seeds, *form) for title, form in COLUMNS.items()})
        if "(" not in row["weight"]:
            rows[-1]["at the end"] = "-"
    same = [title for title in rows[0] if len({row[title] for row in rows}) == 1]
    settled = [title for title in same if title in list(ROW)[1:-1]]
    shown = [title for title in rows[0] if title not in settled and not (title in same and rows[0][title] == "-")]
    alike = ", ".join(f"{title} {rows[0][title]}" for title in settled)
    legend = "\n".join(f"- *{title}*: {text}" for title, text in LEGEND.items() if title in shown)
    seeds_in_turn = " ".join(sorted({str(row["seed"]) for row in report["results"]}))
    return f"""{overview(report["results"])}{table(shown, ([row[title] for title in shown] for row in rows))}

{made_by(report)}
{report.get("note", "")}
All rows: {alike}, seeds {seeds_in_turn} (fewer where there are fewer numbers).

{legend}
"""


def overview(results: list[dict[str, Any]]) -> str:
    """Kernels side by side, a row for each case: their own table is too long to be read."""
    done = [row for row in results if row["table"] == "kernels" and "failure" not in row]
    case = {title: ROW[title] for title in ("data", "d", "batch", "weight")}
    names = list(dict.fromkeys(row["name"] for row in done))
    cells: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in done:
        by_name = cells.setdefault(tuple(str(row[key]).removesuffix(".0") for key in case.values()), {})
        by_name.setdefault(row["name"], []).append(row)

    def summary(rows: list[dict[str, Any]]) -> str:
        cost, samples = (statistics.fmean(row[key] for row in rows) for key in ("test_cost", "samples"))
        passed = [p > LEVEL for row in rows for p in row["p_values"]]
        return ("**{}**" if 2 * sum(passed) > len(passed) else "{}").format(f"{cost:.2f}, {samples:.2f}")

    rows = [[*key, *(summary(found[name]) if name in found else "-" for name in names)] for key, found in cells.items()]
    if not rows:
        return ""
    return f"""{table([*case, *names], rows)}

Test cost, and Frechet distance of the samples; means over the seeds. In bold where more than half of the tests of
held-out codes have p > {LEVEL}.

{EVERY_ROW}

"""


EVERY_ROW = "Every training:"
"""Ends the overview of a page."""

COLUMNS = {
    "at the end": ("weight_at_end", ".0f"), "outcome": ("outcome", ""), "test cost": ("test_cost", ".2f"),
    "reconstructions": ("reconstructions", ".2f"), "of training data": ("of_training_data", ".2f"),
    "samples": ("samples", ".2f"), "fitted afterwards": ("fitted_afterwards", ".2f"), "p fitted": ("fitted_p", ".3f"),
    "spread": ("spread", ".2f"), "p for choosing": ("p_for_choosing", ".3f"), "p": ("p_values", ".3f"),
    "ms/step": ("ms", ".0f"),
}  # fmt: skip
"""Title, key and form of what is measured."""

LEGEND = {
    "at the end": "of a weight that moves, its value in the last step.",
    "outcome": """of a constraint, whether the codes were matched, or its weight was rising, at a plateau or at its
  maximum.""",
    "test cost": "squared error of a test datum.",
    "reconstructions": """Frechet distance of the reconstructions of held-out data from these data, in the features of a
  small classifier (for data other than digits, in the space of the data).""",
    "of training data": """the same of the reconstructions of the training data. Samples are to be compared with these:
  reconstructions of held-out data have a smaller distance, because they are compared with the data of which they are
  reconstructions.""",
    "samples": "the same for samples: 10,000, or as many as there are training data, whichever is more.",
    "fitted afterwards": """the same of samples of Gaussians fitted to the codes, as many as the row's mixture has, else
  100.""",
    "p fitted": f"of a test of {TESTED} held-out codes against these.",
    "spread": "standard deviation of the held-out codes.",
    "p for choosing": "p-value of a test on a separate set of held-out codes, reserved for choosing between settings.",
    "p": f"of two-sample tests of {TESTED} held-out codes, those of each seed together; 0.003 is the least possible.",
    "ms/step": "wall time, which other work on the machine lengthens.",
}
"""What is said of the columns that a page has."""


def column(seeds: list[dict[str, Any]], key: str, form: str) -> str:
    """The values of all seeds."""
    values = [row[key] for row in seeds if row.get(key) is not None]
    lists = [value if isinstance(value, list) else [value] for value in values]
    return ", ".join(" ".join(f"{value:{form}}" for value in each) for each in lists) or "-"
