"""One training step: the discriminator learns from a batch, then the generator from the discriminator.

A batch may be spread over processes, and each one's share may be taken in parts where memory is short. The step is the same: parts
of a batch are weighted by their share, gradients added up, random numbers are drawn for the whole batch, and the feature matching
compares all images with all. (Batch norm, the baseline's, is the exception for parts: each has statistics of its own.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import losses
from models.augment import Rows, augment
from models.config import View
from models.discriminators import Growing
from models.features import Lite0
from models.grader import Grader
from models.layers import GROUP, advance_spectral_norms, apart, cut_out, reduced, side_by_side, spectral_weights
from training.config import TrainConfig
from training.processes import Processes

GRADER_RATE = 5e-4
STATISTICS = ("loss_d", "loss_g", "acc_real", "acc_fake", "grad_d", "grad_g", "diversity")


def make_optimizer(network: nn.Module, learning_rate: float, betas: list[float]) -> torch.optim.Adam:
    """Adam over what is to be learned, in PyTorch's fused form. On CUDA its rate is a tensor, so that recordings can change it."""
    learned = [parameter for parameter in network.parameters() if parameter.requires_grad]
    cuda = learned[0].device.type == "cuda"
    rate = torch.tensor(learning_rate, device=learned[0].device) if cuda else learning_rate
    return torch.optim.Adam(learned, lr=rate, betas=tuple(betas), fused=True, capturable=cuda)


def set_rate(optimizer: torch.optim.Adam, rate: float) -> None:
    """Give an optimiser its learning rate."""
    group = optimizer.param_groups[0]
    if torch.is_tensor(group["lr"]):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def restore_optimizer(optimizer: torch.optim.Adam, state: dict) -> None:
    """Take over the averages of a checkpoint from any device; how they are applied is this device's matter."""
    own = {name: optimizer.param_groups[0][name] for name in ("lr", "fused", "capturable")}
    optimizer.load_state_dict(state)
    optimizer.param_groups[0].update(own)


def gradient_norm(network: nn.Module) -> Tensor:
    """Euclidean norm of all gradients of a network, a scalar on its device."""
    return torch.nn.utils.get_total_norm([p.grad for p in network.parameters() if p.grad is not None], foreach=True)


def small(images: Tensor) -> Tensor:
    """Images at an eighth of their size, to measure ``diversity`` on."""
    return nn.functional.avg_pool2d(images.detach(), 8)


def diversity(fake: Tensor, real: Tensor) -> Tensor:
    """How much small generated images vary beside real ones, by their standard deviations; 0 when all images are one."""
    return fake.std(dim=0).mean() / (real.std(dim=0).mean() + 1e-6)


def seen_by(view: View | None, images: Tensor, corners: Tensor | None) -> Tensor:
    """What a view shows of real images (N, 3, S, S): all at its resolution, or a window of each at its corner, (N, 2).

    While a resolution fades in, it does so in real images too (Karras et al., progressive growing, 2018): detail that no generated
    image may have yet would give them away.
    """
    if view is None:
        return images
    images = reduced(images, view.resolution)
    if torch.is_tensor(view.fade) or view.fade < 1.0:
        coarse = nn.functional.interpolate(reduced(images, view.resolution // 2), scale_factor=2.0, mode="bilinear")
        images = torch.lerp(coarse, images, view.fade)
    if not view.windowed:
        return images
    return cut_out(images, corners, view.side).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Batch:
    """What one step is about. real: (N, 3, S, S) in [-1, 1]; labels: (N,) or None; z: (N, latent_dim); N is this process's share.

    seed: of the random numbers of the step, the same in all processes. strength: probability of each augmentation before D, a
    tensor only if above 0. view: what of the images is looked at, None for all of them. corners: of a view's windows, (N, 2).
    """

    real: Tensor
    labels: Tensor | None
    z: Tensor
    seed: int
    strength: float | Tensor = 0.0
    view: View | None = None
    corners: Tensor | None = None


@dataclass(frozen=True)
class Seen:
    """A part of a batch as the discriminator looked at it: maps of real and generated images, and their feature statistics."""

    rows: Rows
    labels: Tensor | None
    real: list[Tensor]
    fake: list[Tensor]
    real_features: list[Tensor]
    fake_features: list[Tensor]
    small: tuple[Tensor, Tensor]

    def kept(self) -> list[Tensor]:
        """What must be known of all images of the batch at once, (N, ...) each, without gradient."""
        return [item.detach() for item in (*self.real_features, *self.fake_features, *self.small)]


def directly(work: Callable[[Batch, bool], Tensor], batch: Batch, penalise: bool) -> Tensor:
    """Do it."""
    return work(batch, penalise)


class GanStep:
    """Holds both networks and their optimisers, already on their device in channels_last (1.3 to 2 times the speed on CPUs).

    parts: in how many parts a process takes its share of a batch; more of them need less memory and more time. half: whether
    convolutions and products are taken in bfloat16 (weights, losses, penalties and what matters to rounding stay float32).
    perform: does what it is handed; a Recorder in place of the direct way.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        config: TrainConfig,
        processes: Processes | None = None,
        num_classes: int = 0,
    ):
        self.generator, self.discriminator, self.config = generator, discriminator, config
        self.processes, self.parts, self.half = processes or Processes(), 1, False
        self.perform: Callable[[Callable[[Batch, bool], Tensor], Batch, bool], Tensor] = directly
        self.opt_g = make_optimizer(generator, config.lr_g, config.betas)
        self.opt_d = make_optimizer(discriminator, config.lr_d, config.betas)
        self._learned = [parameter for parameter in discriminator.parameters() if parameter.requires_grad]
        device = next(generator.parameters()).device
        self._teacher, self.graders = None, nn.ModuleList()
        if config.teaches and not hasattr(discriminator, "backbone"):
            self._teacher = Lite0().to(device, memory_format=torch.channels_last)
        if config.grading and num_classes:
            # One for whole images, one for windows, which show less of the tissue and more of the cells.
            self.graders = nn.ModuleList(Grader(2 * sum(Lite0.fine), num_classes) for _ in range(2)).to(device)
            self.opt_c = make_optimizer(self.graders, GRADER_RATE, [0.9, 0.999])

    def __call__(self, batch: Batch, rate: float = 1.0, penalise: bool = False) -> Tensor:
        """One update of both networks.

        rate: factor of the learning rates. penalise: whether this step takes the gradient penalties. Returns STATISTICS of the
        whole batch as a tensor on the device, not synchronised, the same in all processes.
        """
        set_rate(self.opt_g, self.config.lr_g * rate)
        set_rate(self.opt_d, self.config.lr_d * rate)
        torch.manual_seed(batch.seed)
        return self.perform(self._both, batch, penalise)

    def _both(self, batch: Batch, penalise: bool) -> Tensor:
        """The work of a step. Numbers that change with each step may be tensors here, so that it can be recorded."""
        if batch.view is not None:
            self.discriminator.set_view(batch.view)
        self.opt_g.zero_grad(set_to_none=True)
        self.opt_d.zero_grad(set_to_none=True)
        whole = self._look(batch, 0, True) if self.parts == 1 else None
        sums_d, sums_g, kept = batch.real.new_zeros(3), batch.real.new_zeros(()), []
        self._freeze(False)
        advance_spectral_norms(self.discriminator)
        for part in range(self.parts):
            seen = whole or self._look(batch, part, False)
            with spectral_weights(self.discriminator):
                sums_d += self._discriminator(seen, penalise)
            kept.append(seen.kept())
        self._update(self.opt_d, self.discriminator)
        labels = None if batch.labels is None else self.processes.gather(batch.labels)
        everything = [self._together(parts) for parts in zip(*kept, strict=True)]
        grader = self.graders[int(batch.view is not None and batch.view.windowed)] if self.graders else None
        if grader is not None:
            self._learn_labels(grader, everything, labels)
        self._freeze(True)  # D only passes the gradient on: not computing its own saves a third of its backward pass
        advance_spectral_norms(self.discriminator)
        with spectral_weights(self.discriminator):
            for part in range(self.parts):
                sums_g += self._generator(whole or self._look(batch, part, True), everything, labels, grader)
        self._update(self.opt_g, self.generator)
        loss_d, *accuracy, loss_g = self.processes.total(torch.cat([sums_d, sums_g[None]])).unbind()
        norms = [gradient_norm(self.discriminator), gradient_norm(self.generator)]
        return torch.stack([loss_d, loss_g, *accuracy, *norms, diversity(everything[-1], everything[-2])])

    @property
    def _share(self) -> float:
        """Of the batch, that one part of one process is."""
        return 1.0 / (self.parts * self.processes.world)

    def _look(self, batch: Batch, part: int, learn: bool) -> Seen:
        """Generate a part's images and let D look at them and the real ones; ``learn``: with a gradient to the generator."""
        mine, world = slice(part, None, self.parts), self.processes.world
        rows = Rows(len(batch.real) * world, self.processes.rank + world * part, world * self.parts)
        labels = None if batch.labels is None else batch.labels[mine]
        if self.parts > 1:
            torch.manual_seed(batch.seed)  # each part draws for the whole batch
        corners = None if batch.corners is None else batch.corners[mine]
        real, kinds = seen_by(batch.view, batch.real[mine], corners), tuple(self.config.adaptive)
        with torch.set_grad_enabled(learn):
            with self._arithmetic():
                fake = losses.precise(self.generator(batch.z[mine], labels, *([batch.view] if batch.view else [])))
            seen = augment(real, batch.strength, kinds, rows), augment(fake, batch.strength, kinds, rows)
            with self._arithmetic():
                with torch.no_grad():
                    real_maps = self.discriminator.look(seen[0])
                fake_maps = self.discriminator.look(seen[1])
                features = self._features(real_maps, fake_maps, seen)
        return Seen(rows, labels, real_maps, fake_maps, *features, (small(real), small(fake)))

    def _arithmetic(self) -> torch.autocast:
        """In what the networks calculate."""
        return torch.autocast(next(self.generator.parameters()).device.type, torch.bfloat16, enabled=self.half)

    def _judge(self, maps: list[Tensor], labels: Tensor | None) -> Tensor:
        """D's logits, in float32 at least."""
        with self._arithmetic():
            return losses.precise(self.discriminator.judge(maps, labels))

    def _judge_both(self, real: list[Tensor], fake: list[Tensor], labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """D's logits of real and generated images: on a GPU, where small layers take as long for more images, in one go."""
        # The baseline sees them in batches of their own: mixed, batch norm would tell it the answer.
        if real[0].device.type == "cpu" or not isinstance(self.discriminator, Growing) or len(real[0]) % GROUP:
            return self._judge(real, labels), self._judge(fake, labels)
        both = [side_by_side(*maps).contiguous(memory_format=torch.channels_last) for maps in zip(real, fake, strict=True)]
        return apart(self._judge(both, None if labels is None else side_by_side(labels, labels)))

    def _features(self, real: list[Tensor], fake: list[Tensor], seen: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Statistics of frozen features of both; what a projected discriminator has looked at already serves again."""
        if not self.config.teaches:
            return [], []
        if self._teacher is None:
            real, fake = real[1:], fake[1:]
        else:
            with torch.no_grad():
                real = self._teacher.maps(seen[0], (0, 1, 2, 3))
            fake = self._teacher.maps(seen[1], (0, 1, 2, 3))
        return [losses.statistics(item) for item in real], [losses.statistics(item) for item in fake]

    def _together(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Rows of this process's parts -> rows of the whole batch in its order."""
        return self.processes.gather(torch.stack(parts, dim=1).flatten(0, 1))

    def _discriminator(self, seen: Seen, penalise: bool) -> Tensor:
        """Add D's gradients; its loss and its accuracies on real and fake, weighted by the part's share."""
        fake = [item.detach() for item in seen.fake]
        real_logits, fake_logits = self._judge_both(seen.real, fake, seen.labels)
        loss = losses.discriminator_loss(self.config.objective, real_logits, fake_logits, self.config.label_smoothing)
        total = loss + self.config.penalty_every * self._penalties(seen, fake) if penalise else loss
        (self._share * total).backward()
        accuracy = losses.judged_rightly(self.config.objective, real_logits, fake_logits)
        return self._share * torch.stack([loss.detach(), *accuracy])

    def _penalties(self, seen: Seen, fake: list[Tensor]) -> Tensor | float:
        config, total = self.config, 0.0
        if config.r1:
            total = total + 0.5 * config.r1 * losses.squared_gradient(self.discriminator, seen.real, seen.labels)
        if config.r2:
            total = total + 0.5 * config.r2 * losses.squared_gradient(self.discriminator, fake, seen.labels)
        if config.gradient_penalty:
            mixture = seen.rows.rand(1, 1, 1, device=fake[0].device)
            penalty = losses.gradient_penalty(self.discriminator, seen.real, fake, seen.labels, mixture)
            total = total + config.gradient_penalty * penalty
        return total

    def _learn_labels(self, grader: Grader, everything: list[Tensor], labels: Tensor) -> None:
        """The same in every process, since each has the features of the whole batch."""
        self.opt_c.zero_grad(set_to_none=True)
        grader.learn(everything[: len(Lite0.fine)], labels).backward()
        self.opt_c.step()

    def _generator(self, seen: Seen, everything: list[Tensor], labels: Tensor | None, grader: Grader | None) -> Tensor:
        """Add G's gradients; its loss weighted by the part's share. everything, labels: see ``Seen.kept``, of the whole batch."""
        real_logits = 0.0
        if self.config.objective == "relativistic":
            with torch.no_grad():
                real_logits = self._judge(seen.real, seen.labels)
        loss = losses.generator_loss(self.config.objective, self._judge(seen.fake, seen.labels), real_logits)
        loss = self._share * loss
        told = self._share * loss.new_zeros(())
        if self.config.teaches:
            count = len(seen.fake_features)
            fake = [seen.rows.put(mine, all_) for mine, all_ in zip(seen.fake_features, everything[count : 2 * count], strict=True)]
            taught = self.config.perceptual * losses.energy_distance(everything[:count], fake, labels)
            if grader is not None:
                taught = taught + self.config.grading * grader.unclear(fake, labels)
            # Of the whole batch: each part and process passes on the gradient of its own images.
            loss, told = loss + taught, (self._share - 1.0) * taught.detach()
        loss.backward()
        return loss.detach() + told

    def _update(self, optimizer: torch.optim.Adam, network: nn.Module) -> None:
        self.processes.total_gradients(network)
        optimizer.step()

    def _freeze(self, frozen: bool) -> None:
        for parameter in self._learned:
            parameter.requires_grad_(not frozen)
