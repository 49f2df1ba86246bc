"""Do the images look like their grade, and can a classifier learn from them? Both asked of one small classifier.

The classifier is multinomial logistic regression on frozen features: it trains in a second, so that every question can be asked
over several seeds, and with few slides it generalises better than a network trained from nothing (docs/evaluation.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from common.progress import track
from metrics.images import ImageSet
from metrics.section import Finding, Section, Table

MIN_PER_LABEL = 20
RUNS = 5  # draws of the generated images
DRAWS = 20  # of the held-out slides in each
WEIGHT_DECAY = 1e-2
FIDELITY_LIMIT = 0.5  # of held-out patches' margin over chance


@dataclass(frozen=True)
class Labelled:
    """features (N, D), labels (N,) names, groups (N,) slides."""

    features: np.ndarray
    labels: np.ndarray
    groups: np.ndarray

    def take(self, chosen: np.ndarray) -> Labelled:
        return Labelled(self.features[chosen], self.labels[chosen], self.groups[chosen])


class Classifier:
    """Multinomial logistic regression with every class weighing the same. classes: their names (C,), sorted."""

    def __init__(self, training: Labelled, iterations: int = 100):
        self.classes, targets = np.unique(training.labels, return_inverse=True)
        self.mean, self.scale = training.features.mean(0), training.features.std(0) + 1e-3
        inputs, targets = torch.from_numpy(self._scaled(training.features)), torch.from_numpy(targets)
        class_weights = len(targets) / (len(self.classes) * torch.bincount(targets).float())
        weights = torch.zeros(inputs.shape[1] + 1, len(self.classes), requires_grad=True)
        optimiser = torch.optim.LBFGS([weights], max_iter=iterations, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            optimiser.zero_grad()
            scores = inputs @ weights[:-1] + weights[-1]
            value = torch.nn.functional.cross_entropy(scores, targets, class_weights)
            value = value + WEIGHT_DECAY * weights[:-1].square().sum()
            value.backward()
            return value

        optimiser.step(loss)
        self.weights = weights.detach().numpy()

    def _scaled(self, features: np.ndarray) -> np.ndarray:
        return ((features - self.mean) / self.scale).astype(np.float32)

    def _scores(self, features: np.ndarray) -> np.ndarray:
        return self._scaled(features) @ self.weights[:-1] + self.weights[-1]

    def log_probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, C), a column for each of ``classes``."""
        scores = self._scores(features)
        return scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Label names (N,)."""
        return self.classes[self._scores(features).argmax(1)]


def confusion(truth: np.ndarray, predicted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(C, C) counts: row is the true label, column the predicted one."""
    return np.array([[int(((truth == a) & (predicted == b)).sum()) for b in classes] for a in classes])


def balanced_accuracy(matrix: np.ndarray) -> float:
    """Mean over the labels that occur of the share predicted right."""
    totals = matrix.sum(1)
    return float((np.diag(matrix)[totals > 0] / totals[totals > 0]).mean())


def shared_classes(*sets: Labelled | ImageSet) -> np.ndarray:
    """Names of the labels of which every set has at least MIN_PER_LABEL images."""
    common = [{name for name in np.unique(part.labels) if name and (part.labels == name).sum() >= MIN_PER_LABEL} for part in sets]
    return np.array(sorted(set.intersection(*common)))


def grades_section(train: Labelled, held_out: Labelled, fake: Labelled) -> Section:
    """A classifier trained on training slides labels held-out patches and generated images."""
    section = Section("grades", "Do the images look like their grade?", _GRADES)
    classes = shared_classes(train, fake)
    if len(classes) < 2:
        which = f"fewer than two labels have {MIN_PER_LABEL} images among both real and generated ones"
        section.untested.append(f"Whether the images look like their label was not tested: {which}.")
        return section
    train, held_out, fake = (part.take(np.isin(part.labels, classes)) for part in (train, held_out, fake))
    classifier = Classifier(train)
    accuracy = {}
    for name, part in (("held-out real", held_out), ("generated", fake)):
        if not len(part.labels):
            continue
        matrix = confusion(part.labels, classifier.predict(part.features), classes)
        accuracy[name] = balanced_accuracy(matrix)
        rows = [[label, *map(str, row)] for label, row in zip(classes, matrix, strict=True)]
        caption = f"{name}: balanced accuracy {accuracy[name]:.2f} (rows: label, columns: what the classifier says)"
        section.tables.append(Table(caption, ["", *classes], rows))
        section.numbers[name] = {"balanced_accuracy": accuracy[name], "confusion": matrix.tolist(), "classes": list(classes)}
    _judge(section, accuracy, 1 / len(classes))
    return section


def _judge(section: Section, accuracy: dict[str, float], chance: float) -> None:
    if "held-out real" not in accuracy:
        section.untested.append("Whether the images look like their label was not judged: no held-out patch has any of the labels.")
        return
    limit = chance + FIDELITY_LIMIT * (accuracy["held-out real"] - chance)
    if accuracy["generated"] < limit:
        text = "the images do not look like their labels: a classifier that knows real tissue tells them apart much worse"
        section.findings.append(Finding("grade fidelity", text, accuracy["generated"], limit))


_GRADES = (
    "A small classifier learns the labels from the training slides alone, then labels real patches of held-out slides and the "
    "generated images. Generated images that show their grade are recognised about as well as held-out ones; recognised much "
    "better means exaggerated or copied."
)


def utility_section(train: Labelled, held_out: Labelled, fake: Labelled, seed: int) -> Section:
    """The classifier trained on real, generated and both, tested on held-out slides.

    spread: root mean square of what draws of generated images and of held-out slides differ by.
    """
    section = Section("utility", "Are the images useful for training?", _UTILITY)
    classes = shared_classes(train, held_out, fake)
    if len(classes) < 2:
        which = f"fewer than two labels have {MIN_PER_LABEL} images in training, held-out and generated sets"
        section.untested.append(f"Usefulness was not tested: {which}.")
        return section
    scores = _scores(*(part.take(np.isin(part.labels, classes)) for part in (train, held_out, fake)), seed)
    scores["gain"] = scores["real and generated"] - scores["real"]
    rows = []
    for name, values in scores.items():
        value, spread = float(values[0, 0]), float(np.sqrt(((values[1:, 1:] - values[0, 0]) ** 2).mean()))
        section.numbers[name] = {"value": value, "spread": spread, "runs": values[1:, 0].tolist()}
        shown = ["gain of adding generated to real", f"{value:+.3f}"] if name == "gain" else [name, f"{value:.3f}"]
        rows.append([*shown, f"{spread:.3f}"])
    section.tables.append(Table("Balanced accuracy on held-out slides", ["trained on", "accuracy", "spread over draws"], rows))
    return section


_UTILITY = (
    "The same classifier trained on all real patches, on all generated images, and on both, tested on patches of held-out slides. "
    f"For the spread generated images are drawn anew {RUNS} times, and the held-out slides {DRAWS} times for each: few slides are "
    "seen in it. Generated images are useful when adding them gains more than twice the spread."
)


def _scores(train: Labelled, held_out: Labelled, fake: Labelled, seed: int) -> dict[str, np.ndarray]:
    """Balanced accuracies (1 + RUNS, 1 + DRAWS) by what was trained on.

    The first row is with all generated images, the others with draws of them; the first column is on all held-out patches, the
    others on draws of their slides. Training patches are not drawn: the generator saw all of them, and would bring back those that
    a draw leaves out.
    """
    classes = np.unique(train.labels)
    draws = np.random.default_rng(seed)
    tests = [np.arange(len(held_out.labels)), *(_bootstrap(held_out, draws) for _ in range(DRAWS))]

    def tested(training: Labelled) -> list[float]:
        predicted = Classifier(training).predict(held_out.features)
        return [balanced_accuracy(confusion(held_out.labels[at], predicted[at], classes)) for at in tests]

    scores = {"real": [tested(train)] * (1 + RUNS), "generated": [], "real and generated": []}
    for run in track(range(1 + RUNS), "usefulness", unit="runs"):
        made = fake.take(_bootstrap(fake, draws)) if run else fake
        scores["generated"].append(tested(made))
        both = Labelled(*(np.concatenate(pair) for pair in zip(vars(train).values(), vars(made).values(), strict=True)))
        scores["real and generated"].append(tested(both))
    return {name: np.array(values) for name, values in scores.items()}


def _bootstrap(part: Labelled, draws: np.random.Generator) -> np.ndarray:
    """Indices of whole groups, or of single images of one group, drawn with replacement, redrawn until every label occurs."""
    names, which = np.unique(part.groups, return_inverse=True)
    if len(names) == 1:
        which = np.arange(len(part.groups))
    members = [np.flatnonzero(which == index) for index in range(which.max() + 1)]
    labels = len(np.unique(part.labels))
    while True:
        chosen = np.concatenate([members[index] for index in draws.integers(len(members), size=len(members))])
        if len(np.unique(part.labels[chosen])) == labels:
            return chosen
