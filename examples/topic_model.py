"""Fit a topic model whose documents have any subset of 40 binary factors.

    python examples/topic_model.py

A document has 2^40 latent states, too many to enumerate. The texts are the docstrings of Python's
standard library. AutoAmortized makes the guide, with forty Bernoulli variables per document, and
several estimators train it.
"""

from __future__ import annotations

import argparse
import ast
import math
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI
from torch import Tensor, nn
from tqdm import tqdm

import gradients
import style
from arguments import at_least, count, make_folder, natural, new_parser, positive
from evaluation import held_out_bounds
from pyro_gumbel.guides import AutoAmortized
from pyro_gumbel.infer import Estimator_ELBO

STOP_WORDS = re.findall(
    r"\w+",
    """
the and for that this with are not from but can has have will all any its was were been being they
them their there then than which when where what who how may must should would could does did done
into onto over only also such each other some more most one two use used uses using see you your
our out own per via etc yet just like same between before after while because both else however
otherwise given default self none true false return returns returned
""",
)


def docstrings() -> Iterator[str]:
    """Read the docstrings of the standard library's sources, without importing them."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests", "idlelib", "lib2to3", "site-packages"} & set(path.parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def load(num_words: int, min_length: int, limit: int) -> tuple[Tensor, list[str]]:
    """Return word counts ``(documents, num_words)``, in a fixed random order, and words."""
    documents = []
    for text in docstrings():
        words = [w for w in re.findall(r"[a-z]{3,}", text.lower()) if w not in STOP_WORDS]
        if len(words) >= min_length:
            documents.append(Counter(words))
        if len(documents) == limit:
            break
    documents = list({frozenset(d.items()): d for d in documents}.values())  # no duplicates
    spread = Counter(word for document in documents for word in document)
    vocabulary = [word for word, _ in spread.most_common(num_words)]
    counts = torch.tensor([[float(d[w]) for w in vocabulary] for d in documents])
    counts = counts.reshape(len(documents), len(vocabulary))
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))
    counts = counts[order]
    return counts[counts.sum(-1) > 0], vocabulary


class TopicModel(nn.Module):
    """A model in which each active factor multiplies the rates of its words."""

    def __init__(self, counts: Tensor, factors: int) -> None:
        super().__init__()
        frequency = counts.sum(0) + 0.5
        self.background = nn.Parameter((frequency / frequency.sum()).log())
        self.factors = nn.Parameter(0.01 * torch.randn(factors, counts.shape[-1]))
        self.prior = nn.Parameter(torch.full((factors,), -2.0))

    def rates(self, z: Tensor) -> Tensor:
        """Return the logits of a document's words."""
        return self.background + z @ self.factors

    def forward(self, counts: Tensor) -> None:
        pyro.module("topics", self)
        with pyro.plate("documents", len(counts)):
            z = pyro.sample("z", dist.Bernoulli(logits=self.prior).to_event(1))
            log_probs = self.rates(z).log_softmax(-1)
            # The multinomial log-mass without its combinatorial constant.
            pyro.factor("words", (counts * log_probs).sum(-1))


class Encoder(nn.Module):
    """A network from the logarithms of a document's word counts to features."""

    def __init__(self, num_words: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_words, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )

    def forward(self, counts: Tensor) -> Tensor:
        return self.layers(counts.log1p())


def make_svi(
    gradient: str, counts: Tensor, args: argparse.Namespace
) -> tuple[TopicModel, AutoAmortized, SVI]:
    """Make a new model, its guide and the SVI, reproducible by ``args.seed``."""
    pyro.clear_param_store()
    pyro.set_rng_seed(args.seed)
    estimator, particles = gradients.parse(gradient)
    model = TopicModel(counts, args.factors)
    guide = AutoAmortized(model, Encoder(counts.shape[-1], args.hidden), gradient=estimator)
    elbo = Estimator_ELBO(particles, vectorize_particles=True, max_plate_nesting=1)
    return model, guide, SVI(model, guide, pyro.optim.ClippedAdam({"lr": args.lr}), elbo)


def train(
    gradient: str, train_counts: Tensor, test_counts: Tensor, args: argparse.Namespace
) -> tuple[TopicModel, AutoAmortized, list[float]]:
    """Fit a model; return it, its guide and the held-out perplexity bound by epoch."""
    model, guide, svi = make_svi(gradient, train_counts, args)
    history = []
    bar = tqdm(range(args.epochs), desc=gradient)
    for _ in bar:
        for index in torch.randperm(len(train_counts)).split(args.batch_size):
            svi.step(train_counts[index])
        history.append(perplexity(model, guide, test_counts, 5))
        bar.set_postfix(perplexity=f"{history[-1]:.1f}", refresh=False)
    return model, guide, history


def perplexity(model: TopicModel, guide: AutoAmortized, counts: Tensor, num_samples: int) -> float:
    """Return an upper bound on the perplexity per word, exp(-ELBO / words)."""
    bounds = held_out_bounds(model, guide, counts, num_samples)
    return math.exp(-bounds.elbo * len(counts) / counts.sum().item())


def unigram_perplexity(train_counts: Tensor, test_counts: Tensor) -> float:
    frequency = train_counts.sum(0) + 0.5
    return float(
        (-(test_counts * (frequency / frequency.sum()).log()).sum() / test_counts.sum()).exp()
    )


def print_topics(
    model: TopicModel, guide: AutoAmortized, counts: Tensor, vocabulary: list[str]
) -> None:
    usage = guide.posterior(counts)["z"].mean.mean(0)
    print(f"\n{'share of documents':>19}   words that a factor favours")
    for k in usage.argsort(descending=True)[:12].tolist():
        top = model.factors[k].topk(min(9, len(vocabulary))).indices.tolist()
        print(f"{usage[k]:19.3f}   {' '.join(vocabulary[i] for i in top)}")


def main(argv: list[str] | None = None) -> None:
    parser = new_parser(__doc__)
    add = parser.add_argument
    some = "reinmax,gumbel_straight_through,straight_through,score:4"
    form = f"{gradients.FORM},..."
    add("--gradients", type=gradients.several, default=some, metavar=form, help=gradients.HELP)
    add("--factors", type=count, default=40, help="binary factors per document")
    add("--words", type=count, default=1500, help="size of the vocabulary")
    add("--min-length", type=count, default=15, help="minimum words per document")
    add("--limit", type=at_least(2), default=20_000, help="maximum number of documents")
    add("--hidden", type=count, default=128, help="width of the encoder's layers")
    add("--epochs", type=count, default=20, help="passes over the training documents")
    add("--batch-size", type=count, default=100, help="documents per step")
    add("--lr", type=positive, default=1e-2, help="learning rate of Adam")
    add("--seed", type=natural, default=0, help="seed of each run")
    add("--out", type=Path, default=Path("out/topic_model"), metavar="DIR", help="output folder")
    add("--smoke", action="store_true", help="a quick run with few documents")
    args = parser.parse_args(argv)
    make_folder(parser, args.out)
    torch.set_num_threads(1)
    pyro.enable_validation(args.smoke)
    if args.smoke:
        args.limit, args.epochs, args.words = 150, 1, 200
    counts, vocabulary = load(args.words, args.min_length, args.limit)
    if len(counts) < 2:  # one to train, one to hold out
        parser.error(
            f"--min-length: {len(counts)} docstrings have {args.min_length} words or more; "
            "expected at least 2; give a smaller number"
        )
    split = len(counts) * 9 // 10
    train_counts, test_counts = counts[:split], counts[split:]
    print(
        f"{len(counts):,} docstrings, {int(counts.sum()):,} words "
        f"of a vocabulary of {len(vocabulary):,}"
    )
    gradients.try_all(
        parser,
        args.gradients,
        lambda name: make_svi(name, train_counts, args)[2].evaluate_loss(train_counts[:1]),
    )
    figure, axes = style.panels(1, 1, (6, 3.6))
    rows = {"one distribution for all": unigram_perplexity(train_counts, test_counts)}
    axes[0, 0].axhline(
        rows["one distribution for all"], **style.EXACT, label="one distribution for all"
    )
    best = None
    for gradient, color in style.colors(args.gradients).items():
        model, guide, history = train(gradient, train_counts, test_counts, args)
        rows[gradient] = perplexity(model, guide, test_counts, 100)
        best = min(
            (best or (rows[gradient], model, guide)),
            (rows[gradient], model, guide),
            key=lambda row: row[0],
        )
        axes[0, 0].plot(range(1, args.epochs + 1), history, color=color, label=gradient)
    print(f"\n{'held-out perplexity bound':34}{'per word':>10}")
    for name, value in rows.items():
        print(f"{name:34}{value:>10.1f}")
    print_topics(best[1], best[2], test_counts, vocabulary)
    axes[0, 0].set(xlabel="epoch", ylabel="held-out perplexity per word (bound)")
    style.whole_numbers(axes[0, 0])
    style.legend_outside(figure, axes[0], columns=2)
    print("\nwritten:", style.write(figure, args.out / "topic_model.png"))


if __name__ == "__main__":
    main()
