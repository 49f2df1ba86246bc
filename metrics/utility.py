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
from metrics.section import Finding, Section, Table, number

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


def slides_of(part: Labelled, classes: np.ndarray) -> np.ndarray:
    """Number of slides (groups) that each of ``classes`` (C,) has, (C,)."""
    return np.array([len(np.unique(part.groups[part.labels == label])) for label in classes])


def grades_section(train: Labelled, held_out: Labelled, fake: Labelled) -> Section:
    """A classifier trained on training slides labels held-out patches and generated images, of the labels that all have."""
    section = Section("grades", "Do the images look like their grade?", _GRADES)
    classes = shared_classes(train, held_out, fake)
    if len(classes) < 2:
        section.untested.append(f"Whether the images look like their label was not tested: {_FEW}.")
        return section
    train, held_out, fake = (part.take(np.isin(part.labels, classes)) for part in (train, held_out, fake))
    classifier = Classifier(train)
    accuracy = {}
    for name, part in (("held-out real", held_out), ("generated", fake)):
        matrix = confusion(part.labels, classifier.predict(part.features), classes)
        accuracy[name] = balanced_accuracy(matrix)
        rows = [[label, *map(str, row)] for label, row in zip(classes, matrix, strict=True)]
        caption = f"{name}: balanced accuracy {accuracy[name]:.2f} (rows: label, columns: what the classifier says)"
        section.tables.append(Table(caption, ["", *classes], rows))
        section.numbers[name] = {"balanced_accuracy": accuracy[name], "confusion": matrix.tolist(), "classes": list(classes)}
    _judge(section, accuracy, slides_of(held_out, classes))
    return section


_FEW = f"fewer than two labels have {MIN_PER_LABEL} images each of training, held-out and generated ones"


def _judge(section: Section, accuracy: dict[str, float], slides: np.ndarray) -> None:
    real, chance, guessed = accuracy["held-out real"], 1 / len(slides), guessing(slides)
    if real <= guessed:
        needed = f"{real:.2f}, where guessing reaches {guessed:.2f} with so few slides"
        text = f"Whether the images look like their label was not judged: the accuracy on held-out patches is {needed}."
        section.untested.append(text)
        return
    limit = chance + FIDELITY_LIMIT * (real - chance)
    if accuracy["generated"] < limit:
        text = "the images do not look like their labels: a classifier that knows real tissue tells them apart much worse"
        section.findings.append(Finding("grade fidelity", text, accuracy["generated"], limit))


def guessing(slides: np.ndarray) -> float:
    """Balanced accuracy that guesses exceed in some 2 % of sets of patches with ``slides`` (C,) slides of each label.

    Two standard deviations above chance, as if all patches of a slide got one guess: they are alike.
    """
    chance = 1 / len(slides)
    return min(1.0, chance + 2 * float(np.sqrt(chance * (1 - chance) * (1 / slides).sum())) / len(slides))


_GRADES = (
    "A small classifier learns the labels from the training slides alone, then labels real patches of held-out slides and the "
    "generated images. Generated images that show their grade are recognised about as well as held-out ones; recognised much "
    "better means exaggerated or copied."
)


def utility_section(train: Labelled, held_out: Labelled, fake: Labelled, seed: int) -> Section:
    """The classifier trained on real, generated and both, tested on held-out slides.

    spread: root mean square of what draws of generated images and of held-out slides differ by; None where a label has one held-out
    slide.
    """
    section = Section("utility", "Are the images useful for training?", _UTILITY)
    classes = shared_classes(train, held_out, fake)
    if len(classes) < 2:
        section.untested.append(f"Usefulness was not tested: {_FEW}.")
        return section
    train, held_out, fake = (part.take(np.isin(part.labels, classes)) for part in (train, held_out, fake))
    scores = _scores(train, held_out, fake, seed)
    scores["gain"] = scores["real and generated"] - scores["real"]
    alone = classes[slides_of(held_out, classes) < 2]
    rows = []
    for name, values in scores.items():
        spread = None if len(alone) else float(np.sqrt(((values[1:, 1:] - values[0, 0]) ** 2).mean()))
        section.numbers[name] = {"value": float(values[0, 0]), "spread": spread, "runs": values[1:, 0].tolist()}
        shown = ["gain of adding generated to real", f"{values[0, 0]:+.3f}"] if name == "gain" else [name, number(values[0, 0])]
        rows.append([*shown, number(spread)])
    caption = "Balanced accuracy on held-out slides"
    if len(alone):
        why = f"held-out patches of {', '.join(alone)} are of one slide, from which it cannot be seen how slides differ"
        section.untested.append(f"Whether adding the images to real ones gains anything was not judged: {why}.")
        caption += f"; without a spread no gain can be told from chance: {why}"
    section.tables.append(Table(caption, ["trained on", "accuracy", "spread over draws"], rows))
    return section


_UTILITY = (
    "The same classifier trained on all real patches, on all generated images, and on both, tested on patches of held-out slides. "
    f"For the spread generated images are drawn anew {RUNS} times, and the held-out slides of each label {DRAWS} times for each: "
    "few slides are seen in it, where a label has at least two. Generated images are useful when adding them gains more than twice "
    "the spread."
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
    """Indices of whole groups drawn with replacement within each label; of single images where a label has one group.

    One group fewer than there are: the mean of n - 1 of n varies as that of n others would, the mean of n of them less (Rao and Wu,
    "Resampling inference with complex survey data", 1988).
    """
    chosen = []
    for label in np.unique(part.labels):
        at = np.flatnonzero(part.labels == label)
        names, which = np.unique(part.groups[at], return_inverse=True)
        members = [at[which == index] for index in range(len(names))] if len(names) > 1 else list(at[:, None])
        chosen += [members[index] for index in draws.integers(len(members), size=len(members) - 1)]
    return np.concatenate(chosen)
